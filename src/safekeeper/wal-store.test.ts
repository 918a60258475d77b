import assert from 'node:assert/strict';
import fs from 'node:fs';
import { mkdtemp, open, readdir, readFile, rm } from 'node:fs/promises';
import { syncBuiltinESMExports } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import type { TimelineIdentity } from '../api/safekeeper.ts';
import { pageStart, segmentOffset, segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import { checkPageHeader, pageHeaderRemaining } from '../postgres/wal/page-header.ts';
import { makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from './made-wal.test-data.ts';
import { segmentPath, WalFileReader, WalStore } from './wal-store.ts';

async function newStore(
  context: TestContext,
  startLsn = MID_SEGMENT_LSN,
): Promise<{ directory: string; store: WalStore; identity: TimelineIdentity }> {
  const directory = await mkdtemp(join(tmpdir(), 'strata-wal-'));
  const identity = {
    tenantId: 'a'.repeat(32),
    timelineId: 'b'.repeat(32),
    startLsn,
    pgVersion: 17,
    systemId: String(SYSTEM_ID),
  };
  const store = new WalStore(directory, identity);
  context.after(async () => {
    await store.release();
    await rm(directory, { recursive: true });
  });
  await store.create();
  return { directory, store, identity };
}

async function readBack(directory: string, from: number, to: number): Promise<Buffer> {
  const reader = new WalFileReader(directory);
  return reader.readAll(from, to).finally(() => reader.close());
}

test('the first segment has the headers that lead a reader to the middle of it', async (context) => {
  const { directory } = await newStore(context);
  const file = await readFile(segmentPath(directory, MID_SEGMENT_LSN));
  assert.equal(file.length, WAL_SEGMENT_SIZE);
  checkPageHeader(file, 0, segmentStart(MID_SEGMENT_LSN), 17);
  assert.equal(file.readBigUInt64LE(24), SYSTEM_ID);
  const at = segmentOffset(pageStart(MID_SEGMENT_LSN));
  checkPageHeader(file, at, pageStart(MID_SEGMENT_LSN), 17);
  assert.equal(pageStart(MID_SEGMENT_LSN) + 24 + pageHeaderRemaining(file, at), MID_SEGMENT_LSN);
});

test('chunks are written one after the other, across segments', async (context) => {
  const { directory, store } = await newStore(context);
  const wal = makeWal(MID_SEGMENT_LSN, [100, 9_000_000, 9_000_000, 50, 0, 7]);
  const cuts = [0, 1, 700_000, 700_001, 15_000_000, wal.bytes.length];
  const chunks = cuts.slice(1).map((cut, index) => wal.bytes.subarray(cuts[index], cut));
  await store.write(wal.startLsn, chunks.slice(0, 2));
  await store.write(wal.startLsn + 700_000, chunks.slice(2));
  assert((await readBack(directory, wal.startLsn, wal.endLsn)).equals(wal.bytes));
  assert.equal((await readdir(directory)).length, 2);
  assert.equal(await store.recover(MID_SEGMENT_LSN), wal.endLsn);
});

test('a write of which the system takes only a part, as a disk that is nearly full, goes on with the rest', async (context) => {
  const { directory, store } = await newStore(context);
  const wal = makeWal(MID_SEGMENT_LSN, [100, 20_000, 300]);
  const first = wal.ends[0]! - wal.startLsn;
  await store.write(wal.startLsn, [wal.bytes.subarray(0, first)]);
  const { writevSync } = fs;
  const takeSome = context.mock.method(fs, 'writevSync', (file: number, [buffer]: readonly Buffer[], at: number) =>
    writevSync(file, [buffer!.subarray(0, 5_000)], at),
  );
  syncBuiltinESMExports();
  try {
    await store.write(wal.ends[0]!, [wal.bytes.subarray(first, 10_000), wal.bytes.subarray(10_000)]);
    assert.equal(takeSome.mock.callCount(), 1);
  } finally {
    takeSome.mock.restore();
    syncBuiltinESMExports();
  }
  assert((await readBack(directory, wal.startLsn, wal.endLsn)).equals(wal.bytes));
});

test('a write of more buffers than one system call takes arrives whole', async (context) => {
  const { directory, store } = await newStore(context);
  const wal = makeWal(MID_SEGMENT_LSN, Array<number>(3_000).fill(20));
  const chunks = Array.from({ length: Math.ceil(wal.bytes.length / 7) }, (_, index) =>
    wal.bytes.subarray(7 * index, 7 * index + 7),
  );
  await store.write(wal.startLsn, chunks);
  assert((await readBack(directory, wal.startLsn, wal.endLsn)).equals(wal.bytes));
});

test('recovery ends at the last whole record and leaves only zeroes after it', async (context) => {
  const { directory, store } = await newStore(context);
  const wal = makeWal(MID_SEGMENT_LSN, [100, 200, 300, 20_000, 400]);
  await store.write(wal.startLsn, [wal.bytes]);
  // A torn write: a page inside the fourth record never reached the disk, what follows did.
  const file = await open(segmentPath(directory, wal.startLsn), 'r+');
  await file.write(Buffer.alloc(512), 0, 512, segmentOffset(wal.ends[2]!) + 9_000);
  await file.close();

  const endLsn = await store.recover(MID_SEGMENT_LSN);
  assert.equal(endLsn, wal.ends[2]);
  const tail = (await readFile(segmentPath(directory, endLsn))).subarray(segmentOffset(endLsn));
  assert(tail.every((byte) => byte === 0));

  // What another leader writes there ends where a record of the old one used to begin: nothing may be found after it.
  const other = makeWal(MID_SEGMENT_LSN, [100, 200, 300, 20_000], 77);
  const from = wal.ends[2]! - MID_SEGMENT_LSN;
  await store.write(endLsn, [other.bytes.subarray(from)]);
  assert.equal(await store.recover(endLsn), other.endLsn);
});

test('recovery drops segments after the end', async (context) => {
  const { directory, store } = await newStore(context);
  const wal = makeWal(MID_SEGMENT_LSN, [1_000, 17_000_000, 17_000_000]);
  await store.write(wal.startLsn, [wal.bytes]);
  const damaged = wal.ends[0]! + 10_000;
  const file = await open(segmentPath(directory, damaged), 'r+');
  await file.write(Buffer.from('damage'), 0, 6, segmentOffset(damaged));
  await file.close();
  assert.equal(await store.recover(MID_SEGMENT_LSN), wal.ends[0]);
  assert.deepEqual(await readdir(directory), [segmentPath('', MID_SEGMENT_LSN)]);
});

test('recovery fails when the WAL before the commit LSN is not here', async (context) => {
  const { store } = await newStore(context);
  await assert.rejects(store.recover(MID_SEGMENT_LSN + WAL_SEGMENT_SIZE), /is not in/);
});

test('truncation cuts at an LSN, at the start of a segment too', async (context) => {
  const { directory, store } = await newStore(context);
  const wal = makeWal(MID_SEGMENT_LSN, [5_000, 17_000_000, 300]);
  await store.write(wal.startLsn, [wal.bytes]);
  await store.truncate(segmentStart(wal.endLsn));
  assert.equal((await readdir(directory)).length, 1);
  await store.truncate(wal.ends[0]!);
  assert.equal(await store.recover(MID_SEGMENT_LSN), wal.ends[0]);
  await store.write(wal.ends[0]!, [wal.bytes.subarray(wal.ends[0]! - wal.startLsn)]);
  assert.equal(await store.recover(wal.ends[0]!), wal.endLsn);
});

test('a timeline that begins with a segment needs no header made for it', async (context) => {
  const startLsn = segmentStart(MID_SEGMENT_LSN);
  const { directory, store } = await newStore(context, startLsn);
  assert.deepEqual(await readdir(directory), []);
  assert.equal(await store.recover(startLsn), startLsn);
  const wal = makeWal(startLsn, [100, 20_000]);
  await store.write(startLsn, [wal.bytes]);
  assert.equal(await store.recover(startLsn), wal.endLsn);
});
