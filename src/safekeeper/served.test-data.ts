/** A safekeeper in this process for a test, and a proposer that speaks its protocol by hand. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import { greetingOf, SafekeeperConnection, type SafekeeperEndpoint, type TimelineIdentity } from '../api/safekeeper.ts';
import {
  decodeAcceptorMessage,
  decodeGreetingReply,
  encodeAppendHead,
  encodeJson,
  encodeProposerMessage,
  FRAME,
} from '../api/safekeeper-protocol.ts';
import type { StrataError } from '../base/errors.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { blankState } from '../consensus/acceptor.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import type { AcceptorMessage, ProposerMessage } from '../consensus/messages.ts';
import { MID_SEGMENT_LSN, SYSTEM_ID } from './made-wal.test-data.ts';
import { runSafekeeper, type Safekeeper } from './main.ts';

export const SECRET = randomBytes(32);
const log = createLog({ name: 'test', level: process.env['STRATA_LOG_LEVEL'] ?? 'silent' });

export interface Served {
  safekeeper: Safekeeper;
  endpoint: SafekeeperEndpoint;
  readonly dataDir: string;
  /** Again, once it was closed. */
  start(): Promise<void>;
  restart(): Promise<void>;
}

export async function serve(context: TestContext, existing?: string): Promise<Served> {
  const dataDir = existing ?? (await mkdtemp(join(tmpdir(), 'strata-safekeeper-')));
  const token = await signToken(SECRET, { scope: 'platform' });
  const start = async (): Promise<void> => {
    served.safekeeper = await runSafekeeper({ nodeId: 1, dataDir, host: '127.0.0.1', port: 0, secret: SECRET, log });
    served.endpoint = { address: { host: '127.0.0.1', port: served.safekeeper.port }, token };
  };
  const served = {
    dataDir,
    start,
    restart: async () => {
      await served.safekeeper.close();
      await start();
    },
  } as Served;
  await start();
  context.after(async () => {
    await served.safekeeper.close();
    await rm(dataDir, { recursive: true });
  });
  return served;
}

export function newTimeline(): TimelineIdentity {
  return {
    tenantId: randomBytes(16).toString('hex'),
    timelineId: randomBytes(16).toString('hex'),
    startLsn: MID_SEGMENT_LSN,
    pgVersion: 17,
    systemId: String(SYSTEM_ID),
  };
}

/** Speaks the proposer's protocol by hand. */
export class RawProposer {
  readonly #connection: SafekeeperConnection;
  readonly #replies: (AcceptorMessage | 'greeted')[] = [];
  readonly closed: Promise<StrataError>;
  #wake: (() => void) | undefined;

  constructor(endpoint: SafekeeperEndpoint, timeline: TimelineIdentity) {
    let resolveClosed: (error: StrataError) => void;
    this.closed = new Promise((resolve) => (resolveClosed = resolve));
    this.#connection = new SafekeeperConnection(endpoint, {
      onFrame: ({ type, payload }) => {
        const greeting = type === FRAME.greetingReply ? decodeGreetingReply(payload) : undefined;
        if (greeting?.kind === 'absent') {
          const { incarnation } = greeting;
          this.#connection.write(encodeJson(FRAME.create, { incarnation, state: blankState(timeline.startLsn) }));
          return;
        }
        this.#replies.push(greeting === undefined ? decodeAcceptorMessage(type, payload)! : 'greeted');
        this.#wake?.();
      },
      onClose: (error) => resolveClosed(error),
    });
    this.#connection.write(encodeJson(FRAME.greeting, greetingOf(timeline)));
  }

  send(message: ProposerMessage): void {
    if (message.kind === 'append') this.#connection.write(encodeAppendHead(message), message.bytes);
    else this.#connection.write(encodeProposerMessage(message));
  }

  async next(): Promise<AcceptorMessage | 'greeted'> {
    while (this.#replies.length === 0) {
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
    return this.#replies.shift()!;
  }

  /** Greeting, vote and election under a term; the log begins where the timeline does. */
  async lead(term: number): Promise<void> {
    assert.equal(await this.next(), 'greeted');
    this.send({ kind: 'vote', term, generation: 0, configuration: NO_CONFIGURATION });
    const vote = await this.next();
    assert(vote !== 'greeted' && vote.kind === 'vote-reply' && vote.granted);
    this.send({
      kind: 'elected',
      term,
      startLsn: vote.flushLsn,
      history: [...vote.history, { term, startLsn: vote.flushLsn }],
    });
    const reply = await this.next();
    assert(reply !== 'greeted' && reply.kind === 'append-reply');
  }

  close(): void {
    this.#connection.close();
  }
}
