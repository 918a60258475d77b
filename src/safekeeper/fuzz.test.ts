/**
 * Whatever bytes come to a safekeeper's port, it answers an error or closes, takes no more memory than its bounds, and goes on serving all others.
 *
 * Conversations of each kind of client are sent as they are but for one place: bits flipped, bytes left out, put in or repeated, lengths of any size, a
 * message too early, half a message. Some know the platform's token, so that what is behind it is reached too.
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { connect } from 'node:net';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { greetingOf, readWal, SafekeeperClient, type TimelineIdentity } from '../api/safekeeper.ts';
import {
  encodeAppendHead,
  encodeFeedback,
  encodeHello,
  encodeJson,
  encodeProposerMessage,
  FRAME,
} from '../api/safekeeper-protocol.ts';
import { encodeFrame } from '../base/frames.ts';
import { signToken } from '../base/token.ts';
import { blankState } from '../consensus/acceptor.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import { cstring, encodeMessage, encodeSslRequest, encodeStartupPacket } from '../postgres/wire.ts';
import { makeWal, MID_SEGMENT_LSN } from './made-wal.test-data.ts';
import { newTimeline, RawProposer, SECRET, serve } from './served.test-data.ts';

const CONNECTIONS = Number(process.env['STRATA_TEST_FUZZ_CONNECTIONS'] ?? 1_500);
const AT_ONCE = 20;
/** What one that is let be takes; the safekeeper waits much longer for a hello. */
const PATIENCE_MS = 30;
const MAX_GROWTH_BYTES = 200 * 1024 * 1024;
const SEED = Number(process.env['STRATA_TEST_SEED'] ?? randomBytes(4).readUInt32LE());

/** mulberry32 */
function randomOf(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return Math.floor((((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32) * below);
  };
}

type Conversation = readonly Buffer[];

interface Tokens {
  readonly platform: string;
  readonly reader: string;
}

/** New timelines each time, as a log that another has led refuses almost everything. */
function conversations(timeline: TimelineIdentity, incarnation: string, { platform, reader }: Tokens): Conversation[] {
  const { tenantId, timelineId } = timeline;
  const hello = encodeHello(platform);
  const configuration = { version: 1, members: [1, 2, 3], newMembers: [1, 2, 4] };
  const wal = makeWal(MID_SEGMENT_LSN, [50, 3_000, 200]);
  const history = [
    { term: 0, startLsn: MID_SEGMENT_LSN },
    { term: 3, startLsn: MID_SEGMENT_LSN },
  ];
  const append = {
    kind: 'append',
    term: 3,
    beginLsn: MID_SEGMENT_LSN,
    commitLsn: wal.ends[0]!,
    bytes: wal.bytes,
  } as const;
  const request = (method: string, params: unknown): Buffer => encodeJson(FRAME.request, { id: 1, method, params });
  const state = blankState(timeline.startLsn);
  const greeting = encodeJson(FRAME.greeting, greetingOf(newTimeline()));
  const create = encodeJson(FRAME.create, { incarnation, state });
  const startup = encodeStartupPacket(new Map(Object.entries({ user: timelineId, replication: 'true' })));
  const password = encodeMessage('p', cstring(reader));
  const query = (text: string): Buffer => encodeMessage('Q', cstring(text));
  return [
    [
      hello,
      greeting,
      create,
      encodeProposerMessage({ kind: 'vote', term: 3, generation: 0, configuration: NO_CONFIGURATION }),
      encodeProposerMessage({ kind: 'elected', term: 3, startLsn: MID_SEGMENT_LSN, history }),
      encodeProposerMessage({ kind: 'renew', term: 3, generation: 1, configuration: NO_CONFIGURATION }),
      encodeAppendHead(append),
      wal.bytes,
    ],
    [hello, greeting, create, encodeProposerMessage({ kind: 'vote', term: 9, generation: 0, configuration })],
    [
      encodeHello(reader),
      encodeJson(FRAME.read, { tenantId, timelineId, fromLsn: MID_SEGMENT_LSN }),
      encodeFrame(FRAME.hurry, Buffer.alloc(8, 1)),
    ],
    [
      hello,
      encodeJson(FRAME.watch, {}),
      encodeFeedback([{ timelineId, ingestedLsn: 1, flushedLsn: 2, remoteLsn: 3, oldestLsn: 4 }]),
    ],
    [hello, request('status', { tenantId, timelineId }), request('list', {}), request('walStatus', {})],
    [
      hello,
      request('resumePoint', { tenantId, timelineId }),
      request('configure', { configuration: NO_CONFIGURATION }),
    ],
    [hello, request('giveTimeline', { timeline: greetingOf(newTimeline()), incarnation, state })],
    [
      hello,
      request('rebuildTimeline', {
        timeline: greetingOf(newTimeline()),
        logStartLsn: MID_SEGMENT_LSN,
        state,
        replace: false,
      }),
    ],
    [
      hello,
      request('createTimeline', greetingOf(newTimeline())),
      request('deleteTimeline', { tenantId, timelineId: 'd'.repeat(32) }),
    ],
    [
      encodeSslRequest(),
      startup,
      password,
      query('IDENTIFY_SYSTEM'),
      query('START_REPLICATION 0/5000000'),
      encodeMessage('d', Buffer.alloc(34, 0x72)),
    ],
    [startup, password, query('SHOW wal_segment_size'), query('TIMELINE_HISTORY 1'), encodeMessage('X')],
  ];
}

/** The conversation with one thing wrong. */
function mutate(conversation: Conversation, random: (below: number) => number): Buffer {
  const messages = conversation.map((message) => Buffer.from(message));
  const at = random(messages.length);
  const message = messages[at]!;
  const place = random(message.length);
  switch (random(9)) {
    case 0:
      for (let count = 1 + random(8); count > 0; count--) message[random(message.length)]! ^= 1 << random(8);
      break;
    case 1: // In a length, of ours or of Postgres'.
      message.writeUInt32LE(
        random(2) === 0 ? 0xffffffff : random(0x7fffffff),
        random(Math.max(1, Math.min(5, message.length - 4))),
      );
      break;
    case 2:
      messages[at] = Buffer.concat([message.subarray(0, place), randomBytes(1 + random(64)), message.subarray(place)]);
      break;
    case 3:
      messages[at] = Buffer.concat([message.subarray(0, place), message.subarray(place + 1 + random(16))]);
      break;
    case 4:
      messages.splice(at, 1);
      break;
    case 5:
      messages.splice(at, 0, ...Array.from({ length: 1 + random(50) }, () => message));
      break;
    case 6:
      message.fill(random(2) === 0 ? 0xff : 0, place, Math.min(place + 8, message.length));
      break;
    case 7: // Of another type.
      if (message.length > 4) message[4] = random(50);
      break;
    case 8:
      return Buffer.concat([...messages.slice(0, at), message.subarray(0, place)]);
  }
  return Buffer.concat(messages);
}

/** Sends the bytes, in one piece or several, and waits for the end, or for a little. */
async function send(port: number, bytes: Buffer, isSplit: boolean): Promise<void> {
  const socket = connect({ host: '127.0.0.1', port });
  socket.resume();
  const closed = new Promise<void>((resolve) => socket.once('close', () => resolve()));
  socket.on('error', () => {});
  const half = isSplit ? bytes.length >> 1 : bytes.length;
  socket.write(bytes.subarray(0, half));
  if (isSplit) {
    await sleep(2);
    socket.write(bytes.subarray(half));
  }
  await Promise.race([closed, sleep(PATIENCE_MS)]);
  socket.destroy();
  await closed;
}

test(
  'no bytes from a client stop a safekeeper, make it forget or make it grow',
  { timeout: 300_000 },
  async (context) => {
    context.diagnostic(`STRATA_TEST_SEED=${SEED}`);
    const random = randomOf(SEED);
    const served = await serve(context);
    const { port } = served.endpoint.address;
    const [sound, fuzzed] = [newTimeline(), newTimeline()];
    const wal = makeWal(MID_SEGMENT_LSN, [400, 20_000]);
    const leader = new RawProposer(served.endpoint, sound);
    await leader.lead(1);
    const client = new SafekeeperClient(served.endpoint);
    await client.createTimeline(fuzzed);
    const { incarnation } = await client.configure(NO_CONFIGURATION);
    const tokens = {
      platform: served.endpoint.token,
      reader: await signToken(SECRET, { scope: 'timeline', timelineId: fuzzed.timelineId }),
    };
    const before = process.memoryUsage().rss;
    const one = async (): Promise<void> => {
      const isNoise = random(20) === 0;
      const known = conversations(fuzzed, incarnation, tokens);
      // Proposers have most to say.
      const conversation = known[random(2) === 0 ? 0 : random(known.length)]!;
      const bytes = isNoise ? randomBytes(1 + random(5_000)) : mutate(conversation, random);
      await send(port, bytes, random(3) === 0);
    };
    let left = CONNECTIONS;
    const worker = async (): Promise<void> => {
      while (left-- > 0) await one();
    };
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
    const grown = process.memoryUsage().rss - before;
    context.diagnostic(`${Math.round(grown / 1_000_000)} MB more`);
    assert(grown < MAX_GROWTH_BYTES, `${grown} bytes more`);

    // The leader of another timeline has not noticed, and what it writes is kept.
    leader.send({ kind: 'append', term: 1, beginLsn: MID_SEGMENT_LSN, commitLsn: wal.endLsn, bytes: wal.bytes });
    const reply = await leader.next();
    assert(reply !== 'greeted' && reply.kind === 'append-reply' && reply.flushLsn === wal.endLsn);
    const { tenantId, timelineId } = sound;
    const stopping = AbortSignal.timeout(10_000);
    const chunk = await readWal({
      ...served.endpoint,
      tenantId,
      timelineId,
      fromLsn: MID_SEGMENT_LSN,
      signal: stopping,
    }).next();
    assert(chunk.value?.bytes.equals(wal.bytes) === true);
    leader.close();
    client.close();
    await served.restart();
    const again = new SafekeeperClient(served.endpoint);
    assert.equal((await again.status(tenantId, timelineId)).flushLsn, wal.endLsn);
    again.close();
  },
);
