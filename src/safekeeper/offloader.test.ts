/** WAL that goes to the object store, leaves the disk, and is read all the same. */
import assert from 'node:assert/strict';
import {
  existsSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
  openSync,
  writeSync,
  closeSync,
  mkdtempSync,
} from 'node:fs';
import { once } from 'node:events';
import { tmpdir } from 'node:os';
import { connect } from 'node:net';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import fc from 'fast-check';
import { readWal, SafekeeperClient, watchCommits } from '../api/safekeeper.ts';
import { encodeHello, encodeJson, FRAME, type PageserverFeedback } from '../api/safekeeper-protocol.ts';
import { createLog } from '../base/log.ts';
import { FaultyStore } from '../object-store/faulty-store.ts';
import { FileSystemStore } from '../object-store/file-system-store.ts';
import { type Lsn, segmentStart, WAL_SEGMENT_SIZE, walFileName } from '../postgres/lsn.ts';
import { removalHorizon } from './kept-wal.ts';
import { type LedTimeline, startLedTimeline } from './led-timeline.test-data.ts';
import { runSafekeeper } from './main.ts';
import { makeWal, MID_SEGMENT_LSN } from './made-wal.test-data.ts';
import { OffloadedWal } from './offloaded-wal.ts';
import { Offloader } from './offloader.ts';
import { decodeOffloaded, encodeOffloaded, offloadedName, parseOffloadedName } from './offloaded-segment.ts';
import { Timelines } from './timelines.ts';
import { decodeWalExtent, encodeWalExtent, EXTENT_FILE_NAME, readWalExtent } from './wal-extent.ts';

const QUICK = { quietMs: 100, busyMs: 60_000, turnMs: 50, keptSegments: 0, lookMs: 20 };
const FIRST_SEGMENT = segmentStart(MID_SEGMENT_LSN);
const IDENTITY = {
  tenantId: 'a'.repeat(32),
  timelineId: 'b'.repeat(32),
  startLsn: MID_SEGMENT_LSN,
  pgVersion: 17,
  systemId: '7',
};

test('an object is what its name says, whole, and any flipped byte is refused', async () => {
  const bytes = makeWal(MID_SEGMENT_LSN, [100, 2_000]).bytes;
  const segment = {
    ...IDENTITY,
    fromLsn: MID_SEGMENT_LSN,
    endLsn: MID_SEGMENT_LSN + bytes.length,
    history: [{ term: 0, startLsn: MID_SEGMENT_LSN }],
    bytes,
  };
  const name = offloadedName(segment);
  assert.equal(name, `wal/${'a'.repeat(32)}/${'b'.repeat(32)}/00000000050063E8-${name.slice(-16)}`);
  assert.deepEqual(parseOffloadedName(name), { name, fromLsn: segment.fromLsn, endLsn: segment.endLsn });
  const object = await encodeOffloaded(segment);
  assert.equal(object.toString('latin1', 0, 8), 'STRATAWL');
  assert.deepEqual(await decodeOffloaded(name, object), segment);
  for (let at = 0; at < object.length; at += 7) {
    const damaged = Buffer.from(object);
    damaged[at]! ^= 0x10;
    await assert.rejects(decodeOffloaded(name, damaged));
  }
  await assert.rejects(decodeOffloaded(name, object.subarray(0, -1)));
  await assert.rejects(decodeOffloaded(offloadedName({ ...segment, endLsn: segment.endLsn + 8 }), object), /name/);
});

test('an extent is encoded as its header says, and damage is refused', () => {
  const extent = { logStartLsn: 1000, localStartLsn: WAL_SEGMENT_SIZE, offloadedLsn: 3 * WAL_SEGMENT_SIZE };
  const file = encodeWalExtent(extent);
  assert.equal(file.toString('latin1', 0, 8), 'STRATAWX');
  assert.deepEqual(decodeWalExtent(file), extent);
  for (let at = 0; at < file.length; at++) {
    const damaged = Buffer.from(file);
    damaged[at]! ^= 1;
    assert.throws(() => decodeWalExtent(damaged));
  }
});

test('what the object store has lost is offloaded again, from what is still on the disk, when that is asked for', async (context) => {
  const store = mkdtempSync(join(tmpdir(), 'strata-store-'));
  context.after(() => rmSync(store, { recursive: true, force: true }));
  const led = await startLedTimeline(context, { pgVersion: 17, objectStore: store, offload: QUICK });
  const wal = makeWal(
    MID_SEGMENT_LSN,
    Array.from({ length: 500 }, (_, index) => 90_000 + index),
  );
  led.append(wal.bytes, MID_SEGMENT_LSN, wal.endLsn, wal.endLsn);
  await led.flushed(wal.endLsn);
  await eventually(async () => (await objectsOf(store)).some((name) => name.endsWith(hex(wal.endLsn))), 'all of it');
  const before = await objectsOf(store);
  assert(before.length >= 3);
  for (const name of [before[0]!, before[1]!]) rmSync(join(store, name));
  const client = new SafekeeperClient(led.endpoint);
  context.after(() => client.close());
  await client.offloadAgain(led.timeline.tenantId, led.timeline.timelineId);
  await eventually(async () => (await objectsOf(store)).length === before.length, 'all of it again');
  assert.deepEqual(await objectsOf(store), before);
});

test('the removal horizon never passes what anybody needs', () => {
  const lsn = fc.integer({ min: 0, max: 100 * WAL_SEGMENT_SIZE });
  const input = fc.record({
    localStartLsn: lsn,
    offloadedLsn: lsn,
    remoteLsn: lsn,
    savedCommitLsn: lsn,
    readerLsns: fc.array(lsn, { maxLength: 3 }),
    keptSegments: fc.integer({ min: 0, max: 3 }),
    readerBytesMax: fc.constant(50 * WAL_SEGMENT_SIZE),
  });
  fc.assert(
    fc.property(input, (given) => {
      const horizon = removalHorizon(given);
      if (horizon === given.localStartLsn) return;
      assert(horizon > given.localStartLsn && horizon % WAL_SEGMENT_SIZE === 0);
      assert(horizon <= Math.min(given.offloadedLsn, given.remoteLsn));
      assert(horizon <= given.savedCommitLsn - given.keptSegments * WAL_SEGMENT_SIZE);
      for (const reader of given.readerLsns) {
        assert(horizon <= reader || reader < given.savedCommitLsn - given.readerBytesMax);
      }
    }),
  );
});

test('committed WAL is offloaded, removed once nobody needs it here, and read by all as if it were here', async (context) => {
  const store = mkdtempSync(join(tmpdir(), 'strata-store-'));
  context.after(() => rmSync(store, { recursive: true, force: true }));
  const led = await startLedTimeline(context, { pgVersion: 17, objectStore: store, offload: QUICK });
  const wal = makeWal(
    MID_SEGMENT_LSN,
    Array.from({ length: 700 }, (_, index) => 90_000 + index),
  );
  const commitLsn = wal.ends[650]!;
  led.append(wal.bytes, MID_SEGMENT_LSN, wal.endLsn, commitLsn);
  await led.flushed(wal.endLsn);

  const names = async (): Promise<string[]> => (await objectsOf(store)).map((name) => name.split('/').at(-1)!);
  await eventually(async () => (await names()).some((name) => name.endsWith(hex(commitLsn))), 'the partial segment');
  const boundaries = [MID_SEGMENT_LSN];
  for (let lsn = FIRST_SEGMENT + WAL_SEGMENT_SIZE; lsn < commitLsn; lsn += WAL_SEGMENT_SIZE) boundaries.push(lsn);
  const expected = boundaries.map((from, index) => `${hex(from)}-${hex(boundaries[index + 1] ?? commitLsn)}`);
  assert.deepEqual(await names(), expected, 'whole segments, and what is committed of the last');
  assert(boundaries.length >= 4);

  const files = (): string[] => segmentFiles(led);
  const allFiles = files();
  const tell = await pageserver(context, led);
  const told = { timelineId: led.timeline.timelineId, ingestedLsn: commitLsn, flushedLsn: commitLsn };
  const reader = connect(led.safekeeper.port, '127.0.0.1');
  reader.write(encodeHello(led.endpoint.token));
  reader.write(encodeJson(FRAME.read, { ...led.timeline, fromLsn: boundaries[1]! }));
  while (reader.bytesRead < 10_000) await once(reader, 'data');
  reader.pause(); // It gets no further than the system's buffers.
  tell({ ...told, remoteLsn: boundaries[2]! + 5, oldestLsn: 0 });
  tell({ ...told, remoteLsn: boundaries[3]! + 5, oldestLsn: 0 });
  await eventually(() => files().length < allFiles.length, 'something is removed');
  assert.deepEqual(files(), allFiles.slice(1), 'but not what a reader is about to read');
  reader.destroy();
  await eventually(() => files().length === allFiles.length - 3, 'the rest is removed');
  const extent = await readWalExtent(directoryOf(led));
  assert.equal(extent?.localStartLsn, boundaries[3]);

  const again = await readAll(led, MID_SEGMENT_LSN, commitLsn);
  assert(again.equals(wal.bytes.subarray(0, commitLsn - MID_SEGMENT_LSN)), 'from the store and the disk in turn');
  const status = new SafekeeperClient(led.endpoint);
  assert.equal((await status.status(led.timeline.tenantId, led.timeline.timelineId)).commitLsn, commitLsn);
  status.close();

  // What no history needs leaves the store too; then it is gone, and who asks for it is told so.
  tell({ ...told, remoteLsn: boundaries[3]! + 6, oldestLsn: boundaries[2]! + 100 });
  await eventually(async () => (await names()).length === expected.length - 2, 'two segments leave the store');
  assert.deepEqual(await names(), expected.slice(2));
  await assert.rejects(readAll(led, MID_SEGMENT_LSN, commitLsn), /has been removed/);
  const rest = await readAll(led, boundaries[2]!, commitLsn);
  assert(rest.equals(wal.bytes.subarray(boundaries[2]! - MID_SEGMENT_LSN, commitLsn - MID_SEGMENT_LSN)));

  const client = new SafekeeperClient(led.endpoint);
  await client.deleteTimeline(led.timeline.tenantId, led.timeline.timelineId);
  client.close();
  assert.deepEqual(await names(), [], 'a deleted timeline leaves nothing');
});

test('a restart goes on from what was offloaded and removed, and damaged WAL is not spread', async (context) => {
  const { led, store, log, count } = await segmentsOnDisk(context);

  const second = FIRST_SEGMENT + WAL_SEGMENT_SIZE;
  const path = join(directoryOf(led), walFileName(1, second));
  const good = readFileSync(path);
  const file = openSync(path, 'r+');
  writeSync(file, Buffer.from([good[9_000_000]! ^ 1]), 0, 1, 9_000_000);
  closeSync(file);
  const config = { nodeId: 1, dataDir: join(led.root, 'sk'), host: '127.0.0.1', port: 0, secret: led.secret, log };
  const offloading = { ...config, objectStore: store, offload: QUICK };
  const first = await runSafekeeper(offloading);
  await eventually(async () => (await objectsOf(store)).length === 1, 'the segment before the damage');
  await sleep(500);
  assert.equal((await objectsOf(store)).length, 1, 'nothing of the damaged one');
  await first.close();

  writeFileSync(path, good);
  const healed = await runSafekeeper(offloading);
  await eventually(async () => (await objectsOf(store)).length === count, 'all of it');
  await healed.close();
  const before = (await objectsOf(store)).map((name) => statSync(join(store, name)).mtimeMs);
  const third = await runSafekeeper(offloading);
  await sleep(500);
  await third.close();
  assert.deepEqual(
    (await objectsOf(store)).map((name) => statSync(join(store, name)).mtimeMs),
    before,
    'known',
  );
});

test('a record that goes over the end of a segment is looked at with both, whole', async (context) => {
  const { led, store, log, count } = await segmentsOnDisk(context);
  const config = { nodeId: 1, dataDir: join(led.root, 'sk'), host: '127.0.0.1', port: 0, secret: led.secret, log };
  const second = FIRST_SEGMENT + WAL_SEGMENT_SIZE;
  const objectsAfter = async (ms: number): Promise<number> => {
    const safekeeper = await runSafekeeper({ ...config, objectStore: store, offload: QUICK });
    await sleep(ms);
    await safekeeper.close();
    return (await objectsOf(store)).length;
  };
  for (const { segment, offset, what } of [
    { segment: FIRST_SEGMENT, offset: WAL_SEGMENT_SIZE - 100, what: 'its beginning' },
    { segment: second, offset: 100, what: 'its end' },
  ]) {
    const path = join(directoryOf(led), walFileName(1, segment));
    const good = readFileSync(path);
    const damaged = Buffer.from(good);
    damaged[offset]! ^= 1;
    writeFileSync(path, damaged);
    assert.equal(await objectsAfter(500), 0, what);
    writeFileSync(path, good);
  }

  // The first segment was brought to the store by another one.
  const healthy = await runSafekeeper({ ...config, objectStore: store, offload: QUICK });
  await eventually(async () => (await objectsOf(store)).length === count, 'all of it');
  await healthy.close();
  for (const name of (await objectsOf(store)).slice(1)) rmSync(join(store, name));
  rmSync(join(directoryOf(led), EXTENT_FILE_NAME), { force: true });
  const path = join(directoryOf(led), walFileName(1, second));
  const good = readFileSync(path);
  const damaged = Buffer.from(good);
  damaged[100]! ^= 1;
  writeFileSync(path, damaged);
  assert.equal(await objectsAfter(500), 1, 'nothing of the second segment');
  writeFileSync(path, good);
  const healed = await runSafekeeper({ ...config, objectStore: store, offload: QUICK });
  await eventually(async () => (await objectsOf(store)).length === count, 'all of it again');
  await healed.close();
});

test('whose turn is later passes over what is there, and stands in for who is away', async (context) => {
  const { led, store, log, count } = await segmentsOnDisk(context);

  const parity = parseInt(led.timeline.timelineId.slice(-6), 16) % 2;
  const config = { dataDir: join(led.root, 'sk'), host: '127.0.0.1', port: 0, secret: led.secret, log };
  const offloading = { ...config, safekeeperCount: 2, objectStore: store, offload: { ...QUICK, turnMs: 1_000 } };
  const first = await runSafekeeper({ ...offloading, nodeId: 2 + parity });
  await eventually(async () => (await objectsOf(store)).length === count, 'all of it');
  await first.close();
  rmSync(join(directoryOf(led), EXTENT_FILE_NAME), { force: true });
  const [removed, kept] = [(await objectsOf(store)).slice(1), (await objectsOf(store)).slice(0, 1)];
  const timesOf = (): number[] => kept.map((name) => statSync(join(store, name)).mtimeMs);
  const before = timesOf();
  for (const name of removed) rmSync(join(store, name));

  const second = await runSafekeeper({ ...offloading, nodeId: 1 + parity });
  context.after(() => second.close());
  await eventually(async () => (await objectsOf(store)).length === count, 'what was missing');
  assert.deepEqual(timesOf(), before, 'what was there was not put again');
});

/** A store whose puts after the first wait until they are let go. */
class HeldStore extends FaultyStore {
  readonly isReached = Promise.withResolvers<void>();
  readonly letGo = Promise.withResolvers<void>();
  #count = 0;

  override async put(name: string, bytes: Uint8Array): Promise<void> {
    if (this.#count++ > 0) {
      this.isReached.resolve();
      await this.letGo.promise;
    }
    await super.put(name, bytes);
  }
}

for (const isDeleted of [false, true]) {
  const what = isDeleted ? 'is deleted leaves nothing there' : 'fails, or is put aside, takes nothing with it there';
  test(`WAL that is on its way to the object store when its log ${what}`, async (context) => {
    const { led, store, log } = await segmentsOnDisk(context);
    const held = new HeldStore(await FileSystemStore.open(store));
    const wal = new OffloadedWal(held);
    const offloader = new Offloader({ wal, nodeId: 1, safekeeperCount: 1, log, limits: QUICK });
    const timelines = await Timelines.load(1, join(led.root, 'sk'), log, { wal, offloader });
    context.after(() => timelines.close());
    await held.isReached.promise;
    assert.equal((await objectsOf(store)).length, 1);
    const { tenantId, timelineId } = led.timeline;
    if (isDeleted) await timelines.delete(tenantId, timelineId);
    else await timelines.get(tenantId, timelineId).retire();
    const extent = join(directoryOf(led), EXTENT_FILE_NAME);
    rmSync(extent, { force: true });
    held.letGo.resolve();
    await offloader.close();
    assert.equal((await objectsOf(store)).length, isDeleted ? 0 : 2);
    assert(!existsSync(extent), 'the folder may be that of another log');
  });
}

/** More than two segments of committed WAL on the disk of a safekeeper that has stopped; how many, and where they may be offloaded to. */
async function segmentsOnDisk(context: TestContext) {
  const root = mkdtempSync(join(tmpdir(), 'strata-offload-'));
  const store = join(root, 'store');
  context.after(() => rmSync(root, { recursive: true, force: true }));
  const log = createLog({ name: 'test', level: 'silent' });
  const led = await startLedTimeline(context, { pgVersion: 17 });
  const wal = makeWal(
    MID_SEGMENT_LSN,
    Array.from({ length: 500 }, () => 100_000),
  );
  led.append(wal.bytes, MID_SEGMENT_LSN, wal.endLsn, wal.endLsn);
  await led.flushed(wal.endLsn);
  await led.safekeeper.close();
  const count = (segmentStart(wal.endLsn) - FIRST_SEGMENT) / WAL_SEGMENT_SIZE + 1;
  assert(count > 2);
  return { led, store, log, count };
}

function hex(lsn: Lsn): string {
  return lsn.toString(16).toUpperCase().padStart(16, '0');
}

function directoryOf({ root, timeline }: LedTimeline): string {
  return join(root, 'sk', timeline.tenantId, timeline.timelineId);
}

function segmentFiles(led: LedTimeline): string[] {
  return readdirSync(directoryOf(led))
    .filter((name) => /^[0-9A-F]{24}$/.test(name))
    .sort();
}

async function objectsOf(store: string): Promise<string[]> {
  return (await (await FileSystemStore.open(store)).list('wal/')).objects.map(({ name }) => name);
}

/** Connects as the pageserver does. */
async function pageserver(context: TestContext, led: LedTimeline): Promise<(entry: PageserverFeedback) => void> {
  const aborter = new AbortController();
  context.after(() => aborter.abort());
  return new Promise((resolve) => {
    const onConnected = (tell: (entries: readonly PageserverFeedback[]) => void): void =>
      resolve((entry) => tell([entry]));
    const watch = async (): Promise<void> => {
      for await (const batch of watchCommits({ ...led.endpoint, signal: aborter.signal, onConnected })) void batch;
    };
    void watch();
  });
}

async function readAll(led: LedTimeline, fromLsn: Lsn, endLsn: Lsn): Promise<Buffer> {
  const parts: Buffer[] = [];
  for await (const { lsn, bytes } of readWal({ ...led.endpoint, ...led.timeline, fromLsn })) {
    parts.push(Buffer.from(bytes));
    if (lsn + bytes.length >= endLsn) break;
  }
  return Buffer.concat(parts);
}

async function eventually(condition: () => boolean | Promise<boolean>, what: string): Promise<void> {
  for (const deadline = Date.now() + 60_000; !(await condition()); await sleep(20)) {
    assert(Date.now() < deadline, `waited in vain for ${what}`);
  }
}
