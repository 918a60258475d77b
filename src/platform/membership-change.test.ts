/** What becomes of a change of the members while a newcomer misbehaves. The whole of it runs in test/end-to-end/ and in the simulation. */
import assert from 'node:assert/strict';
import { createServer, type Socket } from 'node:net';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { SafekeeperClient } from '../api/safekeeper.ts';
import { decodeJson, encodeHelloReply, encodeJson, FRAME, type GiveRequest } from '../api/safekeeper-protocol.ts';
import type { SafekeeperDirectory } from '../api/safekeeper-set.ts';
import { StrataError } from '../base/errors.ts';
import { FrameReader } from '../base/frames.ts';
import { createLog } from '../base/log.ts';
import { MID_SEGMENT_LSN } from '../safekeeper/made-wal.test-data.ts';
import { newTimeline, serve } from '../safekeeper/served.test-data.ts';
import { type ChangeWorld, finishChange } from './membership-change.ts';

const log = createLog({ name: 'test', level: process.env['STRATA_LOG_LEVEL'] ?? 'silent' });

/** A safekeeper that answers calls as it is told to; undefined: never. */
async function pretend(
  context: TestContext,
  answer: (method: string, params: unknown) => Promise<object | null | undefined>,
): Promise<number> {
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    sockets.add(socket);
    const reader = new FrameReader();
    socket.on('error', () => {});
    socket.on('data', (chunk) => {
      reader.push(chunk);
      for (let frame = reader.next(); frame !== undefined; frame = reader.next()) {
        if (frame.type === FRAME.hello) socket.write(encodeHelloReply(2));
        if (frame.type !== FRAME.request) continue;
        const { id, method, params } = decodeJson(frame.payload) as { id: number; method: string; params: unknown };
        answer(method, params).then(
          (result) => result !== undefined && socket.write(encodeJson(FRAME.response, { id, result })),
          ({ code, message }: StrataError) =>
            socket.write(encodeJson(FRAME.response, { id, error: { code, message } })),
        );
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  context.after(() => {
    for (const socket of sockets) socket.destroy();
    server.close();
  });
  return (server.address() as { port: number }).port;
}

test('a change that begins anew leaves no move of a timeline running, and waits for no newcomer that is silent', async (context) => {
  const served = await serve(context);
  const [failing, waiting] = [newTimeline(), newTimeline()];
  const client = new SafekeeperClient(served.endpoint);
  for (const timeline of [failing, waiting]) await client.createTimeline(timeline);
  client.close();

  let askedCount = 0;
  let pollCount = 0;
  let fail: (() => void) | undefined;
  const failed = new Promise<void>((resolve) => (fail = resolve));
  const port = await pretend(context, async (method, params) => {
    switch (method) {
      case 'configure':
        if (++askedCount > 2) throw new StrataError('unavailable', 'it has been seen');
        return { incarnation: 'aa' };
      case 'list':
        return [];
      case 'giveTimeline':
        if ((params as GiveRequest).timeline.timelineId === waiting.timelineId) return null;
        await failed;
        throw new StrataError('conflict', 'it was started anew');
      default: {
        // Of the one that waits until it has got everything: twice it has not, then nothing is said any more, and the other one fails.
        assert.equal(method, 'status');
        if (++pollCount >= 3) {
          fail!();
          return undefined;
        }
        return { flushLsn: MID_SEGMENT_LSN, commitLsn: MID_SEGMENT_LSN, isVoter: false };
      }
    }
  });

  const addresses = new Map([
    [1, served.endpoint.address],
    [2, { host: '127.0.0.1', port }],
  ]);
  let configuration: SafekeeperDirectory['current']['configuration'] = { version: 2, members: [1], newMembers: [2] };
  const directory: SafekeeperDirectory = {
    get current() {
      return { configuration, addresses };
    },
    watch: () => () => {},
    settled: () => {},
  };
  const world: ChangeWorld = {
    directory,
    replace: (_expectedVersion, next) => {
      configuration = next;
      return true;
    },
    settledVersion: () => Infinity,
    identityOf: async (timelineId) => ({
      ...[failing, waiting].find((each) => each.timelineId === timelineId)!,
      hasWal: false,
    }),
    token: served.endpoint.token,
    log,
    progress: () => {},
  };
  const beganAtMs = performance.now();
  await assert.rejects(finishChange(world, AbortSignal.timeout(60_000)), /it has been seen/);
  assert(performance.now() - beganAtMs < 25_000, 'the call to the silent one has not run into its timeout');
  assert.equal(askedCount, 3); // Twice in the first round: alone, then with the members.
  assert.equal(pollCount, 3);
  await sleep(300);
  assert.equal(pollCount, 3, 'nobody waits for the newcomer any more');
  assert.notEqual(configuration.newMembers, undefined);
});
