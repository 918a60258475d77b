import assert from 'node:assert/strict';
import { beforeEach, test } from 'node:test';

import { checkPointAt, checkpointStateAt } from '../../../test/ingest/checkpoint.ts';
import { makeRecord, u32 } from '../../../test/ingest/make-record.ts';
import type { RecordToMake } from '../../../test/ingest/make-record.ts';
import { MemoryTimeline } from '../../../test/ingest/memory-timeline.ts';
import { encodeCheckPoint } from '../../postgres/checkpoint.ts';
import type { CheckPoint } from '../../postgres/checkpoint.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { FORK_MAIN, FORK_VM } from '../../postgres/relation.ts';
import { RM_CLOG, RM_DBASE, RM_HEAP, RM_HEAP2, RM_SMGR, RM_XACT, RM_XLOG } from '../../postgres/rmgr.ts';
import {
  CHECKPOINT_STATE_KEY,
  SLRU,
  databaseKey,
  relationSizeKey,
  slruPageKey,
  slruSizeKey,
  twoPhaseKey,
} from '../key.ts';
import { decodeCheckpointState } from './checkpoint-state.ts';
import { IngestError } from './ingest-error.ts';
import { Ingest } from './ingest.ts';

const XLOG_FPI = 0xb0;
const REL = { spc: 1663, db: 5, rel: 16384 };
const START = 0x1000000;

let timeline: MemoryTimeline;
let ingest: Ingest;
let lsn: Lsn;

const CHECKPOINT = checkPointAt(START);

beforeEach(() => open(CHECKPOINT));

function open(checkPoint: CheckPoint): void {
  timeline = new MemoryTimeline(17, START, START - 64);
  timeline.put(CHECKPOINT_STATE_KEY, checkpointStateAt(START, checkPoint));
  ingest = new Ingest(timeline);
  lsn = START + 40;
}

/** Ingests the next record; its end LSN. */
function take(make: Omit<RecordToMake, 'lsn'>): Lsn {
  const record = makeRecord({ ...make, lsn });
  ingest.ingest(record);
  lsn = record.endLsn;
  return record.endLsn;
}

function pageFilledWith(byte: number): Buffer {
  const page = Buffer.alloc(BLOCK_SIZE, byte);
  page.writeUInt16LE(24, 12);
  page.writeUInt16LE(BLOCK_SIZE, 14);
  return page;
}

function writePages(byte: number, blocks: readonly number[], fork = FORK_MAIN): Lsn {
  return take({
    rmid: RM_XLOG,
    info: XLOG_FPI,
    blocks: blocks.map((blk) => ({ blk, fork, image: pageFilledWith(byte) })),
  });
}

/** The byte that each block is filled with, from the middle of its page, at an LSN. */
function fillOf(count: number, at = timeline.lastRecordLsn, fork = FORK_MAIN): number[] {
  const pages = timeline.getPages({ ...REL, fork }, 0, count, at);
  return Array.from({ length: count }, (_, blk) => pages[blk * BLOCK_SIZE + 4096]!);
}

function sizeOf(fork = FORK_MAIN, at = timeline.lastRecordLsn): number | undefined {
  return timeline.getImage(relationSizeKey(REL.spc, REL.db, REL.rel, fork), at)?.readUInt32LE(0);
}

function state(): CheckPoint {
  return decodeCheckpointState(timeline.getImage(CHECKPOINT_STATE_KEY, timeline.lastRecordLsn)!).checkPoint;
}

function truncateTo(blocks: number): Lsn {
  return take({ rmid: RM_SMGR, info: 0x20, main: u32(blocks, REL.spc, REL.db, REL.rel, 7) });
}

test('what was cut off by a truncation reads as zeroes when the relation grows again, and is still there before it', () => {
  const full = writePages(0xaa, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  truncateTo(3);
  assert.equal(sizeOf(), 3);
  writePages(0xbb, [6]);
  assert.deepEqual(fillOf(8), [0xaa, 0xaa, 0xaa, 0, 0, 0, 0xbb, 0]);
  assert.equal(sizeOf(), 7);
  assert.deepEqual(fillOf(10, full), Array(10).fill(0xaa));
});

test('a relation whose file number comes back has none of the old pages', () => {
  const full = writePages(0xaa, [0, 1, 2, 3]);
  take({
    rmid: RM_XACT,
    info: 0x80,
    xid: 700,
    main: Buffer.concat([u32(0, 0), u32(0x04), u32(1, REL.spc, REL.db, REL.rel)]),
  });
  assert.equal(sizeOf(), undefined);
  take({ rmid: RM_SMGR, info: 0x10, main: u32(REL.spc, REL.db, REL.rel, 0) });
  assert.equal(sizeOf(), 0);
  writePages(0xbb, [2]);
  assert.deepEqual(fillOf(4), [0, 0, 0xbb, 0]);
  assert.equal(sizeOf(FORK_MAIN, full), 4);
});

test('a record that changes a page past the end is replayed on an empty page', () => {
  writePages(0xaa, [0], FORK_VM);
  take({ rmid: RM_SMGR, info: 0x20, main: u32(0, REL.spc, REL.db, REL.rel, 7) });
  assert.equal(sizeOf(FORK_VM), 0);
  // XLOG_HEAP2_VISIBLE: block 0 is the map page, block 1 the heap page.
  take({
    rmid: RM_HEAP2,
    info: 0x40,
    main: Buffer.from([0, 0, 0, 0, 3]),
    blocks: [
      { blk: 0, fork: FORK_VM },
      { blk: 1, willInit: false },
    ],
  });
  const map = timeline.getPages({ ...REL, fork: FORK_VM }, 0, 1, timeline.lastRecordLsn);
  assert.equal(map[24], 0x0c);
  assert.ok(map.subarray(25).every((byte) => byte === 0));
});

test('visibility bits are cleared where the map has the page, and no map is made for it', () => {
  const insert = (blk: number, flags: number): Lsn =>
    take({ rmid: RM_HEAP, info: 0, main: Buffer.from([1, 0, flags]), blocks: [{ blk, image: pageFilledWith(1) }] });
  insert(5, 1);
  assert.equal(sizeOf(FORK_VM), undefined);
  writePages(0xff, [0], FORK_VM);
  insert(5, 0);
  const bits = (): number => timeline.getPages({ ...REL, fork: FORK_VM }, 0, 1, timeline.lastRecordLsn)[25]!;
  assert.equal(bits(), 0xff);
  insert(5, 1);
  assert.equal(bits(), 0xff & ~0x0c);
  // A lock clears all-frozen only.
  take({
    rmid: RM_HEAP,
    info: 0x60,
    main: Buffer.from([1, 0, 0, 0, 1, 0, 0, 1]),
    blocks: [{ blk: 6, image: pageFilledWith(1) }],
  });
  assert.equal(bits(), 0xff & ~0x0c & ~0x20);
});

test('records with many images are stored as one page for each block, not as the whole record', () => {
  const before = timeline.putBytes;
  writePages(
    0x11,
    Array.from({ length: 30 }, (_, i) => i),
  );
  assert.ok(timeline.putBytes - before < 31 * BLOCK_SIZE);
  assert.deepEqual(fillOf(30), Array(30).fill(0x11));
  const page = timeline.getPages({ ...REL, fork: 0 }, 7, 1, timeline.lastRecordLsn);
  assert.equal(page.readUInt32LE(4), timeline.lastRecordLsn, 'the page has the LSN of the record');
});

test('the next xid is past every xid, rounded up so that it seldom changes, through the end of an epoch', () => {
  take({ rmid: RM_CLOG, info: 0, xid: 700, main: Buffer.alloc(8) });
  assert.equal(state().nextXid, 768);
  const written = timeline.putBytes;
  writePages(1, [0]);
  const pageBytes = timeline.putBytes - written;
  take({ rmid: RM_XLOG, info: XLOG_FPI, xid: 767, blocks: [{ blk: 1, image: pageFilledWith(1) }] });
  assert.ok(timeline.putBytes - written - pageBytes < pageBytes + 64, 'the state is not written again');
  take({ rmid: RM_XLOG, info: XLOG_FPI, xid: 768, blocks: [{ blk: 1, image: pageFilledWith(1) }] });
  assert.equal(state().nextXid, 896);

  open({ ...CHECKPOINT, nextXid: 2 ** 32 * 7 - 130, oldestXid: 2 ** 31 + 5 });
  take({ rmid: RM_XLOG, info: XLOG_FPI, xid: 2 ** 32 - 1, blocks: [{ blk: 0, image: pageFilledWith(1) }] });
  assert.equal(state().nextXid, 2 ** 32 * 7 + 3, 'the special ids are skipped');
  take({ rmid: RM_XLOG, info: XLOG_FPI, xid: 4, blocks: [{ blk: 0, image: pageFilledWith(1) }] });
  assert.equal(state().nextXid, 2 ** 32 * 7 + 128);
  take({ rmid: RM_XLOG, info: XLOG_FPI, xid: 2 ** 32 - 500, blocks: [{ blk: 0, image: pageFilledWith(1) }] });
  assert.equal(state().nextXid, 2 ** 32 * 7 + 128, 'an old xid changes nothing');
});

test('a shutdown checkpoint is believed; an online one only moves counters forward', () => {
  take({ rmid: RM_XLOG, info: XLOG_FPI, xid: 900, blocks: [{ blk: 0, image: pageFilledWith(1) }] });
  take({ rmid: RM_XLOG, info: 0x30, main: u32(30000) });
  const checkpoint = (info: number, values: Partial<CheckPoint>): Lsn =>
    take({ rmid: RM_XLOG, info, main: encodeCheckPoint({ ...CHECKPOINT, ...values }, 17) });
  checkpoint(0x10, { nextXid: 850, nextOid: 20000, oldestXid: 600, oldestXidDb: 5, time: 42, redo: START + 64 });
  assert.equal(state().nextXid, 1024);
  assert.equal(state().nextOid, 30000);
  assert.equal(state().oldestXid, 600);
  assert.equal(state().redo, START + 64);
  const end = checkpoint(0x00, { nextXid: 901, nextOid: 20001, oldestXid: 600, time: 43 });
  assert.equal(state().nextXid, 901);
  assert.equal(state().nextOid, 20001);
  assert.equal(decodeCheckpointState(timeline.getImage(CHECKPOINT_STATE_KEY, end)!).shutdownLsn, end);
});

test('a record of an extension is taken when images restore all its blocks, else refused without a trace', () => {
  take({ rmid: 130, info: 0x20, blocks: [{ blk: 0, image: pageFilledWith(7) }] });
  assert.deepEqual(fillOf(1), [7]);
  const at = timeline.lastRecordLsn;
  const blocks = [{ blk: 3, image: pageFilledWith(8) }, { blk: 1 }];
  const record = makeRecord({ rmid: 130, info: 0x20, blocks, lsn });
  assert.throws(
    () => ingest.ingest(record),
    (error) => error instanceof IngestError && /custom130 record 0x20 at 0\/1/.test(error.message),
  );
  assert.equal(timeline.lastRecordLsn, at);
  assert.equal(timeline.get(relationSizeKey(REL.spc, REL.db, REL.rel, 0))!.readUInt32LE(0), 1);
  assert.throws(() => ingest.ingest(record), /earlier record could not be taken/);
  ingest = new Ingest(timeline);
  writePages(9, [1]);
  assert.deepEqual(fillOf(4), [7, 9, 0, 0]);
});

test('a database copied as files has the pages of its source, whatever it had before; dropped, it has nothing', async () => {
  writePages(0xaa, [0, 1, 2]);
  truncateTo(1);
  writePages(0xcc, [2]);
  timeline.put(databaseKey(1663, 5), Buffer.from('map'));
  const copies = { rmid: RM_DBASE, info: 0x00, main: u32(6, 1663, 5, 1663) };
  await ingest.prepare(makeRecord({ ...copies, lsn }));
  take(copies);
  const pages = timeline.getPages({ ...REL, db: 6, fork: 0 }, 0, 4, timeline.lastRecordLsn);
  assert.deepEqual(
    [0, 1, 2, 3].map((blk) => pages[blk * BLOCK_SIZE + 4096]),
    [0xaa, 0, 0xcc, 0],
  );
  assert.equal(timeline.get(databaseKey(1663, 6))!.toString(), 'map');
  take({ rmid: RM_DBASE, info: 0x20, main: u32(6, 1, 1663) });
  assert.equal(timeline.get(databaseKey(1663, 6)), undefined);
  assert.equal(timeline.get(relationSizeKey(1663, 6, REL.rel, 0)), undefined);
  assert.equal(sizeOf(), 3);
  assert.throws(() => take({ ...copies, main: u32(7, 1663, 5, 1663) }), /is prepared first/);
});

test('a statuses page is made by its record or by a transaction on it, and old segments go', () => {
  const zero = (page: number): Lsn => take({ rmid: RM_CLOG, info: 0, main: u32(page, 0) });
  for (let page = 0; page < 34; page++) zero(page);
  assert.equal(timeline.get(slruSizeKey(SLRU.clog, 0))!.readUInt32LE(0), 32);
  assert.equal(timeline.get(slruSizeKey(SLRU.clog, 1))!.readUInt32LE(0), 2);
  const xid = 33 * 32768 + 5;
  take({ rmid: RM_XACT, info: 0, xid, main: u32(0, 0) });
  assert.equal(timeline.get(slruPageKey(SLRU.clog, 1, 1))![1], 1 << 2);
  take({ rmid: RM_CLOG, info: 0x10, main: u32(33, 0, xid, 5) });
  assert.equal(timeline.get(slruSizeKey(SLRU.clog, 0)), undefined);
  assert.equal(timeline.get(slruPageKey(SLRU.clog, 0, 3)), undefined);
  assert.equal(timeline.get(slruSizeKey(SLRU.clog, 1))!.readUInt32LE(0), 2);
  assert.deepEqual([state().oldestXid, state().oldestXidDb], [xid, 5]);
});

test('a transaction prepared under an earlier epoch is found again by its xid', () => {
  open({ ...CHECKPOINT, nextXid: 2 ** 32 * 3 - 100, oldestXid: 2 ** 31 + 5 });
  const header = Buffer.alloc(72);
  header.writeUInt32LE(0x57f94534, 0);
  header.writeUInt32LE(72 + 8 + 4, 4);
  header.writeUInt32LE(2 ** 32 - 50, 8);
  header.writeUInt16LE(4, 54);
  take({ rmid: RM_XACT, info: 0x10, xid: 2 ** 32 - 50, main: Buffer.concat([header, Buffer.from('gid\0\0\0\0\0')]) });
  const key = twoPhaseKey(2, 2 ** 32 - 50);
  assert.equal(timeline.get(key)!.length, 84);
  take({ rmid: RM_XLOG, info: XLOG_FPI, xid: 5000, blocks: [{ blk: 0, image: pageFilledWith(1) }] });
  const end = Buffer.concat([u32(0, 0), u32(0x10), u32(2 ** 32 - 50)]);
  take({ rmid: RM_XACT, info: 0x30 | 0x80, xid: 5001, main: end });
  assert.equal(timeline.get(key), undefined);
});

test('the index is complete in what was flushed, and goes on after a restart or an error', () => {
  writePages(1, [0]);
  assert.equal(ingest.indexTail?.ends.length, 1);
  timeline.beforeFlush?.();
  delete timeline.beforeFlush;
  ingest = new Ingest(timeline);
  writePages(2, [0]);
  assert.equal(ingest.indexTail?.ends.length, 2);
  assert.throws(() => ingest.ingest(makeRecord({ rmid: 130, lsn })), IngestError);
  ingest = new Ingest(timeline);
  assert.equal(ingest.indexTail?.ends.length, 2);
  writePages(3, [0]);
  assert.equal(ingest.indexTail?.ends.length, 3);
  assert.equal(ingest.indexTail?.ends.at(-1), timeline.lastRecordLsn);
});
