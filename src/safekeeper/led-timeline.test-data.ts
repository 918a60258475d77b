/** A safekeeper in this process with one timeline and a leader that appends made WAL to it, for tests of readers. */
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { greetingOf, SafekeeperClient, SafekeeperConnection, type TimelineIdentity } from '../api/safekeeper.ts';
import {
  decodeAcceptorMessage,
  encodeAppendHead,
  encodeJson,
  encodeProposerMessage,
  FRAME,
} from '../api/safekeeper-protocol.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import type { AcceptorMessage } from '../consensus/messages.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { runSafekeeper, type Safekeeper, type SafekeeperConfig } from './main.ts';
import { MID_SEGMENT_LSN, SYSTEM_ID } from './made-wal.test-data.ts';

const APPEND_BYTES = 100_000;

export interface LedTimeline {
  readonly root: string;
  readonly secret: Buffer;
  readonly timeline: TimelineIdentity;
  readonly safekeeper: Safekeeper;
  /** Scope `platform`. */
  readonly endpoint: { readonly address: { readonly host: string; readonly port: number }; readonly token: string };
  /** Appends WAL that begins at the timeline's start: its bytes from `from` to `to`, of which what is before `commitLsn` is committed. */
  readonly append: (wal: Buffer, from: Lsn, to: Lsn, commitLsn: Lsn) => void;
  /** Resolves when so much is durable. */
  readonly flushed: (lsn: Lsn) => Promise<void>;
}

export async function startLedTimeline(
  context: TestContext,
  options: { readonly pgVersion: number } & Partial<SafekeeperConfig>,
): Promise<LedTimeline> {
  const { pgVersion, ...config } = options;
  const secret = randomBytes(32);
  const root = mkdtempSync(join(tmpdir(), 'strata-led-timeline-'));
  const log = createLog({ name: 'test', level: 'silent' });
  const host = '127.0.0.1';
  const running = await runSafekeeper({
    nodeId: 1,
    dataDir: join(root, 'sk'),
    host,
    port: 0,
    secret,
    log,
    ...config,
  });
  let closed: Promise<void> | undefined;
  const safekeeper = { port: running.port, close: () => (closed ??= running.close()) };
  const [tenantId, timelineId] = [randomBytes(16).toString('hex'), randomBytes(16).toString('hex')];
  const timeline = { tenantId, timelineId, startLsn: MID_SEGMENT_LSN, pgVersion, systemId: String(SYSTEM_ID) };
  const endpoint = {
    address: { host, port: safekeeper.port },
    token: await signToken(secret, { scope: 'platform' }),
  };
  const client = new SafekeeperClient(endpoint);
  await client.createTimeline(timeline);
  client.close();
  const replies: AcceptorMessage[] = [];
  const proposer = new SafekeeperConnection(endpoint, {
    onFrame: ({ type, payload }) => {
      const message = decodeAcceptorMessage(type, payload);
      if (message !== undefined) replies.push(message);
    },
    onClose: () => {},
  });
  context.after(async () => {
    proposer.close();
    await safekeeper.close();
    rmSync(root, { recursive: true });
  });
  const first = { term: 0, startLsn: MID_SEGMENT_LSN };
  const history = [first, { term: 1, startLsn: MID_SEGMENT_LSN }];
  proposer.write(encodeJson(FRAME.greeting, greetingOf(timeline)));
  proposer.write(encodeProposerMessage({ kind: 'vote', term: 1, generation: 0, configuration: NO_CONFIGURATION }));
  proposer.write(encodeProposerMessage({ kind: 'elected', term: 1, startLsn: MID_SEGMENT_LSN, history }));
  // An append that comes while the history is being written down is refused.
  while (!replies.some(({ kind }) => kind === 'append-reply')) await sleep(5);
  return {
    root,
    secret,
    timeline,
    safekeeper,
    endpoint,
    append: (wal, from, to, commitLsn) => {
      for (let lsn = from; lsn < to; lsn += APPEND_BYTES) {
        const bytes = wal.subarray(lsn - MID_SEGMENT_LSN, Math.min(to, lsn + APPEND_BYTES) - MID_SEGMENT_LSN);
        proposer.write(encodeAppendHead({ kind: 'append', term: 1, beginLsn: lsn, commitLsn, bytes }), bytes);
      }
      proposer.write(encodeAppendHead({ kind: 'append', term: 1, beginLsn: to, commitLsn, bytes: Buffer.alloc(0) }));
    },
    flushed: async (lsn) => {
      for (;;) {
        const reply = replies.at(-1);
        if (reply?.kind === 'append-reply' && reply.flushLsn >= lsn) return;
        await sleep(5);
      }
    },
  };
}
