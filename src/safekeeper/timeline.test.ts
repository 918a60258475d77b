/** A timeline's disk: what is under way on it when something else happens, and what fails half-way. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import { mkdir, open, rename, rmdir } from 'node:fs/promises';
import { syncBuiltinESMExports } from 'node:module';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { SafekeeperClient } from '../api/safekeeper.ts';
import { segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import { makeWal, MID_SEGMENT_LSN } from './made-wal.test-data.ts';
import { newTimeline, RawProposer, serve } from './served.test-data.ts';
import { segmentPath } from './wal-store.ts';

/** The flush mark's record, the only small write through a FileHandle. */
const MARK_BYTES = 32;

/** Each write of a flush mark takes `ms`; resolves when the next one begins. */
async function slowFlushMarks(context: TestContext, ms: number): Promise<() => Promise<void>> {
  const handle = await open('/dev/null');
  const prototype = Object.getPrototypeOf(handle) as typeof handle;
  await handle.close();
  const write = Reflect.get(prototype, 'write') as (this: typeof handle, ...args: readonly unknown[]) => unknown;
  let begun = (): void => {};
  context.mock.method(
    prototype,
    'write',
    async function (this: typeof handle, ...args: Parameters<typeof handle.write>) {
      if ((args as readonly unknown[])[2] === MARK_BYTES) {
        begun();
        await sleep(ms);
      }
      return write.apply(this, args);
    },
  );
  return () => new Promise((resolve) => (begun = resolve));
}

/** Each large write of WAL begins so late. */
function delayLargeWrites(context: TestContext, ms: number): void {
  const { writev } = fs;
  const delayed = (...args: Parameters<typeof writev>): void => void setTimeout(() => writev(...args), ms);
  const mock = context.mock.method(fs, 'writev', delayed);
  syncBuiltinESMExports();
  context.after(() => {
    mock.mock.restore();
    syncBuiltinESMExports();
  });
}

test('a leader that comes back while the log is put to rest writes to files that are open', async (context) => {
  const served = await serve(context);
  const timeline = newTimeline();
  const wal = makeWal(MID_SEGMENT_LSN, [1_000, 300_000]);
  const first = new RawProposer(served.endpoint, timeline);
  await first.lead(1);
  const bytes = wal.bytes.subarray(0, wal.ends[0]! - MID_SEGMENT_LSN);
  first.send({ kind: 'append', term: 1, beginLsn: MID_SEGMENT_LSN, commitLsn: MID_SEGMENT_LSN, bytes });
  await first.next();
  const markBegins = (await slowFlushMarks(context, 300))();
  delayLargeWrites(context, 600);
  first.close();
  await markBegins;

  const again = new RawProposer(served.endpoint, timeline);
  assert.equal(await again.next(), 'greeted');
  const history = [
    { term: 0, startLsn: MID_SEGMENT_LSN },
    { term: 1, startLsn: MID_SEGMENT_LSN },
  ];
  again.send({ kind: 'elected', term: 1, startLsn: wal.ends[0]!, history });
  const following = await again.next();
  assert(following !== 'greeted' && following.kind === 'append-reply');
  const rest = wal.bytes.subarray(wal.ends[0]! - MID_SEGMENT_LSN);
  again.send({ kind: 'append', term: 1, beginLsn: wal.ends[0]!, commitLsn: 0, bytes: rest });
  for (;;) {
    const reply = await Promise.race([again.next(), again.closed]);
    if (reply instanceof Error) throw reply;
    if (reply !== 'greeted' && reply.kind === 'append-reply' && reply.flushLsn === wal.endLsn) break;
  }
});

test('a cut that failed half-way is made whole when the disk works again: nothing that it took is claimed', async (context) => {
  const served = await serve(context);
  const startLsn = segmentStart(MID_SEGMENT_LSN) + WAL_SEGMENT_SIZE - 8_192 * 3 + 1_000;
  const timeline = { ...newTimeline(), startLsn };
  const { tenantId, timelineId } = timeline;
  const wal = makeWal(startLsn, [1_000, 100_000]); // Ends in the second segment.
  const first = new RawProposer(served.endpoint, timeline);
  await first.lead(1);
  first.send({ kind: 'append', term: 1, beginLsn: startLsn, commitLsn: startLsn, bytes: wal.bytes });
  await first.next();

  const second = new RawProposer(served.endpoint, timeline);
  assert.equal(await second.next(), 'greeted');
  second.send({ kind: 'vote', term: 2, generation: 0, configuration: { version: 0, members: [] } });
  const vote = await second.next();
  assert(vote !== 'greeted' && vote.kind === 'vote-reply' && vote.flushLsn === wal.endLsn);
  // The second segment goes; then the first one cannot be opened.
  const path = segmentPath(join(served.dataDir, tenantId, timelineId), startLsn);
  await rename(path, `${path}.away`);
  await mkdir(path);
  const [cutLsn] = wal.ends as [number];
  const history = [...vote.history, { term: 2, startLsn: cutLsn }];
  second.send({ kind: 'elected', term: 2, startLsn: cutLsn, history });
  assert.equal((await second.closed).code, 'unavailable');
  assert(!fs.existsSync(segmentPath(join(served.dataDir, tenantId, timelineId), wal.endLsn)));
  await rmdir(path);
  await rename(`${path}.away`, path);

  const client = new SafekeeperClient(served.endpoint);
  context.after(() => client.close());
  for (;;) {
    const status = await client.status(tenantId, timelineId).catch(() => undefined);
    if (status === undefined) {
      await sleep(50);
      continue;
    }
    assert.deepEqual([status.flushLsn, status.term], [cutLsn, 2]);
    break;
  }
});

function diskError(code: string): NodeJS.ErrnoException {
  return Object.assign(new Error(`${code}: the disk's answer, writev`), { code });
}

/** Until it is called. */
type Restore = () => void;

/** What fails from here on, in this thread and in the thread pool. */
const failures: Readonly<
  Record<string, { readonly size: number; readonly fail: (context: TestContext) => Restore[] }>
> = {
  'in the main thread': { size: 500, fail: (context) => [failWrites(context, 0)] },
  'in the main thread, after a part of it': {
    size: 20_000,
    fail: (context) => [failWrites(context, 5_000), failPool(context)],
  },
  'in the thread pool': { size: 300_000, fail: (context) => [failPool(context)] },
};

function failWrites(context: TestContext, taken: number): Restore {
  const { writevSync } = fs;
  const failing = (file: number, [buffer]: readonly Buffer[], at: number): number => {
    if (taken === 0) throw diskError('EIO');
    return writevSync(file, [buffer!.subarray(0, taken)], at);
  };
  const { mock } = context.mock.method(fs, 'writevSync', failing);
  syncBuiltinESMExports();
  return () => mock.restore();
}

function failPool(context: TestContext): Restore {
  const failing = (...args: readonly unknown[]): void => {
    const callback = args.at(-1) as (error: Error) => void;
    setImmediate(() => callback(diskError('ENOSPC')));
  };
  const { mock } = context.mock.method(fs, 'writev', failing);
  syncBuiltinESMExports();
  return () => mock.restore();
}

for (const [where, { size, fail }] of Object.entries(failures)) {
  test(`a write that fails ${where} is not acknowledged, and nothing after it, until the disk works again`, async (context) => {
    const served = await serve(context);
    const timeline = newTimeline();
    const { tenantId, timelineId } = timeline;
    const wal = makeWal(MID_SEGMENT_LSN, [100, 100, 100, size, 100]);
    const ends = [MID_SEGMENT_LSN, ...wal.ends];
    const recordAt = (index: number): Parameters<RawProposer['send']>[0] => {
      const [beginLsn, endLsn] = [ends[index]!, ends[index + 1]!];
      const bytes = wal.bytes.subarray(beginLsn - MID_SEGMENT_LSN, endLsn - MID_SEGMENT_LSN);
      return { kind: 'append', term: 1, beginLsn, commitLsn: MID_SEGMENT_LSN, bytes };
    };
    const proposer = new RawProposer(served.endpoint, timeline);
    await proposer.lead(1);
    for (const index of [0, 1, 2]) {
      proposer.send(recordAt(index));
      const reply = await proposer.next();
      assert(reply !== 'greeted' && reply.kind === 'append-reply' && reply.flushLsn === ends[index + 1]);
    }
    const restores = fail(context);
    const answer = proposer.next();
    for (const index of [3, 4]) proposer.send(recordAt(index));
    const error = await Promise.race([proposer.closed, answer]);
    assert(error instanceof Error && error.code === 'unavailable', 'it says what the disk said, and nothing else');
    assert.match(error.message, /EIO|ENOSPC/);
    for (const restore of restores) restore();
    syncBuiltinESMExports();

    const client = new SafekeeperClient(served.endpoint);
    context.after(() => client.close());
    let status;
    while ((status = await client.status(tenantId, timelineId).catch(() => undefined)) === undefined) await sleep(50);
    assert.equal(status.flushLsn, ends[3]);
    const again = new RawProposer(served.endpoint, timeline);
    assert.equal(await again.next(), 'greeted');
    again.send({ kind: 'elected', term: 1, startLsn: ends[3]!, history: status.history });
    await again.next();
    again.send(recordAt(3));
    again.send(recordAt(4));
    while ((await client.status(tenantId, timelineId)).flushLsn !== wal.endLsn) await sleep(10);
    again.close();
  });
}
