/**
 * Who asks a safekeeper without end and never reads an answer is not answered without end: it would take all memory there is. Over the Unix socket, whose
 * buffers in the system are small.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { greetingOf } from '../api/safekeeper.ts';
import { encodeHello, encodeJson, encodeProposerMessage, FRAME } from '../api/safekeeper-protocol.ts';
import { FrameReader } from '../base/frames.ts';
import { signToken } from '../base/token.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import { cstring, encodeMessage, encodeStartupPacket } from '../postgres/wire.ts';
import { type LedTimeline, startLedTimeline } from './led-timeline.test-data.ts';

const ASKED_BYTES = 1_500_000;
const SOCKET_BUFFER_BYTES_MAX = 300_000;
/** Several megabytes. */
const VOTES_AT_ONCE = 300_000;
const PIECE_BYTES = 16_000;
/** More than the system holds of a Unix socket in both directions, and less than what is asked here. */
const TAKEN_BYTES_MAX = 1_000_000;

/** A safekeeper with a led timeline, and a Unix socket that leads to it. */
async function startOnSocket(
  context: TestContext,
): Promise<{ readonly led: LedTimeline; readonly socketPath: string }> {
  const folder = mkdtempSync(join(tmpdir(), 'strata-unread-'));
  context.after(() => rmSync(folder, { recursive: true }));
  const socketPath = join(folder, 'safekeeper.sock');
  return { led: await startLedTimeline(context, { pgVersion: 17, socketPath }), socketPath };
}

test(
  'a client that asks and reads nothing is listened to again when it reads',
  { timeout: 120_000 },
  async (context) => {
    if (socketBufferBytes() > SOCKET_BUFFER_BYTES_MAX) {
      context.skip('the system keeps more of what is written to a socket than this test asks');
      return;
    }
    const { led, socketPath } = await startOnSocket(context);
    for (const [name, { opening, question }] of Object.entries(await conversations(led))) {
      const client = new Asker(context, socketPath);
      client.socket.write(opening);
      await once(client.socket, 'readable'); // It is known.
      const asking = client.ask(question, ASKED_BYTES);
      await client.stalled();
      assert(client.takenBytes < TAKEN_BYTES_MAX, `${name}: ${client.takenBytes} bytes of questions were taken`);
      client.socket.resume();
      await asking;
      client.socket.destroy();
    }
  },
);

test('votes that come faster than they can be written down wait outside', { timeout: 120_000 }, async (context) => {
  if (socketBufferBytes() > SOCKET_BUFFER_BYTES_MAX) {
    context.skip('the system keeps more of what is written to a socket than this test asks');
    return;
  }
  const { led, socketPath } = await startOnSocket(context);
  const { proposer } = await conversations(led);
  const client = new Asker(context, socketPath);
  const replies = new FrameReader();
  let replyCount = 0;
  const answered = new Promise<void>((resolve) => {
    client.socket.on('data', (chunk: Buffer) => {
      replies.push(chunk);
      while (replies.next() !== undefined) if (++replyCount === 100) resolve();
    });
  });
  client.socket.write(proposer!.opening);
  let term = 100;
  const votes = Array.from({ length: VOTES_AT_ONCE }, () =>
    encodeProposerMessage({ kind: 'vote', term: term++, generation: 0, configuration: NO_CONFIGURATION }),
  );
  void client.ask(Buffer.concat(votes), votes.length * votes[0]!.length);
  await answered;
  assert(client.socket.writableLength > 0, 'all votes were taken, before a hundred were answered');
});

/** What the system holds of a Unix socket in one direction. */
function socketBufferBytes(): number {
  return Number(readFileSync('/proc/sys/net/core/wmem_default', 'utf8'));
}

/** What each kind of client says first, and what it asks again and again. */
async function conversations(led: LedTimeline): Promise<Record<string, { opening: Buffer; question: Buffer }>> {
  const { tenantId, timelineId } = led.timeline;
  const token = await signToken(led.secret, { scope: 'timeline', timelineId });
  const startup = encodeStartupPacket(new Map(Object.entries({ user: timelineId, replication: 'true' })));
  const status = { id: 1, method: 'status', params: { tenantId, timelineId } };
  const vote = { kind: 'vote', term: 0, generation: 0, configuration: NO_CONFIGURATION } as const;
  return {
    replication: {
      opening: Buffer.concat([startup, encodeMessage('p', cstring(token))]),
      question: encodeMessage('Q', cstring('IDENTIFY_SYSTEM')),
    },
    status: { opening: encodeHello(token), question: encodeJson(FRAME.request, status) },
    proposer: {
      opening: Buffer.concat([encodeHello(led.endpoint.token), encodeJson(FRAME.greeting, greetingOf(led.timeline))]),
      question: encodeProposerMessage(vote),
    },
  };
}

class Asker {
  readonly socket: Socket;
  takenBytes = 0;

  constructor(context: TestContext, path: string) {
    this.socket = connect(path);
    this.socket.on('error', () => {});
    context.after(() => this.socket.destroy());
  }

  /** Resolves when so much has been taken. */
  async ask(question: Buffer, totalBytes: number): Promise<void> {
    const piece = Buffer.concat(Array.from({ length: Math.ceil(PIECE_BYTES / question.length) }, () => question));
    while (this.takenBytes < totalBytes) {
      await new Promise<void>((resolve) => this.socket.write(piece, () => resolve()));
      this.takenBytes += piece.length;
    }
  }

  /** Resolves when nothing more has been taken for a while. */
  async stalled(): Promise<void> {
    for (let before = -1; before !== this.takenBytes;) {
      before = this.takenBytes;
      await sleep(300);
    }
  }
}
