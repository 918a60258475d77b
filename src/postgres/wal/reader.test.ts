import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { parseLsn, writeLsn } from '../lsn.ts';
import type { Lsn } from '../lsn.ts';
import { RM_XLOG } from '../rmgr.ts';
import { WalBoundaryTracker } from './boundary-tracker.ts';
import { WalError } from './error.ts';
import { chunksOf, makeWal, TEST_SYSTEM_ID, TEST_VERSION } from './made-wal.test-data.ts';
import { checkPageHeader } from './page-header.ts';
import { findEndOfWal, WalReader } from './reader.ts';
import { decodeWalRecord } from './record.ts';
import type { WalRecord } from './record.ts';
import { FIRST_PAGE_17 } from './records.test-data.ts';
import { encodeRecordAt } from './writer.ts';

const SEGMENT = 2 ** 24;
/** Places where page and segment headers matter, in a segment far above 2^32. */
const BASE = 5 * 2 ** 32;
const starts = fc.constantFrom(
  BASE,
  BASE + 40,
  BASE + 8192,
  BASE + 8192 + 24,
  BASE + 8184,
  BASE + SEGMENT - 8,
  BASE + SEGMENT - 8192,
  BASE + SEGMENT - 24,
  BASE + 4096,
);
const lengths = fc.array(fc.oneof(fc.nat(300), fc.constantFrom(0, 8192 - 24 - 29, 8168, 20_000)), {
  minLength: 1,
  maxLength: 30,
});
const chunkLengths = fc.array(fc.oneof(fc.integer({ min: 1, max: 9 }), fc.integer({ min: 1, max: 30_000 })), {
  minLength: 1,
  maxLength: 5,
});

test("the first record of a real cluster is read, and then the WAL's end is found", async () => {
  const page = Buffer.alloc(8192);
  Buffer.from(FIRST_PAGE_17, 'hex').copy(page);
  checkPageHeader(page, 0, SEGMENT, 17);
  const reader = new WalReader(SEGMENT, 17);
  reader.push(SEGMENT, page);
  const record = reader.next();
  assert.ok(record !== undefined);
  assert.deepEqual([record.startLsn, record.endLsn, record.mainLength], [SEGMENT + 40, SEGMENT + 160, 88]);
  assert.throws(() => reader.next(), /WAL at 0\/10000A0: record length 0/);
  assert.throws(() => reader.next(), /WAL at 0\/10000A0: record length 0/, 'an error is for good');
  assert.deepEqual([reader.position, reader.lastRecordStart], [SEGMENT + 160, SEGMENT + 40]);

  const end = await findEndOfWal(SEGMENT, 17, [page]);
  assert.deepEqual([end.endLsn, end.lastRecordStart, end.stoppedBy?.lsn], [SEGMENT + 160, SEGMENT + 40, SEGMENT + 160]);
});

test('records come out whole however the stream is cut, over pages and segments', () => {
  fc.assert(
    fc.property(starts, lengths, chunkLengths, (start, sizes, cuts) => {
      const wal = makeWal(start, sizes);
      const reader = new WalReader(start, TEST_VERSION, { prevLsn: wal.prevLsn });
      const tracker = new WalBoundaryTracker(start);
      const found: WalRecord[] = [];
      for (const chunk of chunksOf(wal.bytes, cuts)) {
        reader.push(reader.pushLsn, chunk);
        for (let record = reader.next(); record !== undefined; record = reader.next()) found.push(record);
        assert.ok(reader.position <= reader.pushLsn, 'no record is given out before all its bytes are here');
        assert.equal(tracker.push(chunk), reader.position);
        assert.equal(tracker.lastRecordStart, reader.lastRecordStart);
      }
      assert.deepEqual(
        found.map(({ startLsn, endLsn, mainLength }) => ({ startLsn, endLsn, mainLength })),
        wal.records,
      );
      found.forEach((record, i) => {
        const main = record.bytes.subarray(record.mainOffset);
        assert.ok(main.equals(Buffer.alloc(wal.records[i]!.mainLength, i)));
      });
    }),
  );
});

test('a tracker made anew at the last end goes on as the old one', () => {
  fc.assert(
    fc.property(starts, lengths, chunkLengths, fc.nat(), (start, sizes, cuts, pick) => {
      const wal = makeWal(start, sizes);
      const cut = pick % wal.bytes.length;
      const old = new WalBoundaryTracker(start);
      const end = old.push(wal.bytes.subarray(0, cut));
      const fresh = new WalBoundaryTracker(end);
      for (const chunk of chunksOf(wal.bytes.subarray(end - start), cuts)) fresh.push(chunk);
      assert.equal(fresh.endLsn, wal.records.at(-1)!.endLsn);
      assert.equal(fresh.pushLsn, start + wal.bytes.length);
    }),
  );
});

test('a tracker may begin at any page: the first end that counts is that of the record which goes on there', () => {
  const wal = makeWal(BASE + 8000, [20_000, 10, 30_000, 10]);
  const ends = wal.records.map((record) => record.endLsn);
  for (let page = BASE + 8192; page < ends.at(-1)!; page += 8192) {
    const tracker = new WalBoundaryTracker(page);
    const seen = new Set<Lsn>();
    for (const chunk of chunksOf(wal.bytes.subarray(page - wal.startLsn), [8])) seen.add(tracker.push(chunk));
    assert.deepEqual(
      [...seen].filter((lsn) => lsn !== page),
      ends.filter((lsn) => lsn > page),
    );
  }
});

test('any changed byte of a record or page header is noticed, and what came before is still given out', () => {
  const wal = makeWal(BASE + 8000, [100, 9_000, 50, 300]);
  fc.assert(
    fc.property(fc.nat(wal.bytes.length - 1), fc.integer({ min: 1, max: 255 }), (at, flip) => {
      // Two bits of a page's info change nothing on their own, for Postgres neither.
      fc.pre((wal.startLsn + at) % 8192 !== 2 || (flip & ~0x0c) !== 0);
      const bytes = Buffer.from(wal.bytes);
      bytes[at]! ^= flip;
      const reader = new WalReader(wal.startLsn, TEST_VERSION, { prevLsn: wal.prevLsn });
      reader.push(wal.startLsn, bytes);
      let error: unknown;
      try {
        while (reader.next() !== undefined);
      } catch (caught) {
        error = caught;
      }
      if (isUnchecked(wal.startLsn + at, wal.records)) {
        assert.equal(reader.position, wal.records.at(-1)!.endLsn);
        return;
      }
      assert.ok(
        error instanceof WalError || reader.position < wal.records.at(-1)!.endLsn,
        `byte ${at} changed unnoticed`,
      );
      const good = wal.records.filter((record) => record.endLsn <= wal.startLsn + at).at(-1)?.endLsn ?? wal.startLsn;
      assert.ok(reader.position >= good && reader.position <= wal.startLsn + at);
    }),
    { numRuns: 2000 },
  );
});

test('a record that does not follow the one before is refused, as stale bytes would not', () => {
  const wal = makeWal(BASE + 40, [10]);
  const reader = new WalReader(BASE + 40, TEST_VERSION, { prevLsn: wal.prevLsn - 8 });
  reader.push(BASE + 40, wal.bytes);
  assert.throws(() => reader.next(), WalError);
  const free = new WalReader(BASE + 40, TEST_VERSION);
  free.push(BASE + 40, wal.bytes);
  assert.ok(free.next() !== undefined, 'without knowing the record before, any earlier one will do');
});

test('bytes that were pushed before are skipped, a gap is refused', () => {
  const wal = makeWal(BASE + 40, [10, 200, 30]);
  const reader = new WalReader(BASE + 40, TEST_VERSION);
  reader.push(BASE + 40, wal.bytes.subarray(0, 60));
  reader.push(BASE + 40, wal.bytes.subarray(0, 20));
  reader.push(BASE + 50, wal.bytes.subarray(10));
  let count = 0;
  while (reader.next() !== undefined) count++;
  assert.equal(count, 3);
  assert.throws(() => reader.push(reader.pushLsn + 8, Buffer.alloc(8)), WalError);
});

test('WAL of another version is refused', () => {
  const wal = makeWal(BASE, [10]);
  const reader = new WalReader(BASE, 16);
  reader.push(BASE, wal.bytes);
  assert.throws(() => reader.next(), /page magic is 0xd116/);
});

test('the record that ends a segment early reaches to the segment’s end, and counts when the zeroes are here', () => {
  const lsn = BASE + 3 * 8192 + 100 + 4;
  const write = (at: Lsn, prevLsn: Lsn, info: number): Buffer =>
    encodeRecordAt({
      lsn: at,
      prevLsn,
      rmid: RM_XLOG,
      info,
      xid: 0,
      mainData: Buffer.alloc(info === 0x40 ? 0 : 8),
      version: TEST_VERSION,
      systemId: TEST_SYSTEM_ID,
    }).bytes;
  const segment = Buffer.alloc(BASE + SEGMENT - lsn);
  write(lsn, lsn - 32, 0x40).copy(segment);
  const after = write(BASE + SEGMENT, lsn, 0x20);

  const reader = new WalReader(lsn, TEST_VERSION);
  const tracker = new WalBoundaryTracker(lsn);
  for (const chunk of chunksOf(segment.subarray(0, -8), [100, 1_000_000])) {
    reader.push(reader.pushLsn, chunk);
    assert.equal(reader.next(), undefined);
    assert.equal(tracker.push(chunk), lsn);
  }
  reader.push(reader.pushLsn, segment.subarray(-8));
  assert.equal(tracker.push(segment.subarray(-8)), BASE + SEGMENT);
  assert.equal(reader.next()?.endLsn, BASE + SEGMENT);
  reader.push(reader.pushLsn, after);
  assert.equal(reader.next()?.startLsn, BASE + SEGMENT + 40);
  assert.equal(tracker.push(after), BASE + SEGMENT + 40 + 40);
});

test('a record whose end never came gives way to the one that replaces it', () => {
  const start = BASE + 8000;
  const lost = makeWal(start, [100, 500]);
  const lostStart = lost.records[1]!.startLsn;
  const pageLsn = BASE + 8192;
  const named = Buffer.alloc(16);
  writeLsn(named, lostStart, 0);
  const replacement = (overwritten: Buffer): Buffer => {
    const { bytes } = encodeRecordAt({
      lsn: pageLsn,
      prevLsn: lost.records[0]!.startLsn,
      rmid: RM_XLOG,
      info: 0xd0,
      xid: 0,
      mainData: overwritten,
      version: TEST_VERSION,
      systemId: TEST_SYSTEM_ID,
    });
    bytes.writeUInt16LE(0x0008, 2);
    return bytes;
  };
  const head = lost.bytes.subarray(0, pageLsn - start);
  const reader = new WalReader(start, TEST_VERSION);
  const tracker = new WalBoundaryTracker(start);
  reader.push(start, Buffer.concat([head, replacement(named)]));
  assert.equal(reader.next()?.startLsn, start);
  assert.equal(reader.next()?.startLsn, pageLsn + 24);
  tracker.push(head);
  assert.equal(tracker.endLsn, lostStart);
  tracker.push(replacement(named));
  assert.equal(tracker.endLsn, reader.position);
  assert.equal(tracker.lastRecordStart, pageLsn + 24);

  const wrong = new WalReader(start, TEST_VERSION);
  wrong.push(start, Buffer.concat([head, replacement(Buffer.alloc(16))]));
  wrong.next();
  assert.throws(() => wrong.next(), /record should replace/);
});

test('a length that cannot be true costs no memory and is refused', () => {
  const bytes = Buffer.alloc(8192 - 40, 0x11);
  bytes.writeUInt32LE(900 * 1024 * 1024, 0);
  const reader = new WalReader(BASE + 40, TEST_VERSION);
  const before = process.memoryUsage().arrayBuffers;
  reader.push(BASE + 40, bytes);
  assert.throws(() => reader.next(), WalError);
  assert.ok(process.memoryUsage().arrayBuffers - before < 16 * 1024 * 1024);
  assert.throws(() => new WalBoundaryTracker(BASE + 40).push(Buffer.alloc(24)), /record length 0/);
});

test('what the writer lays out is one record with the given parts', () => {
  const lsn = parseLsn('0/30FFFFF8');
  const { bytes, startLsn, endLsn } = encodeRecordAt({
    lsn,
    prevLsn: lsn - 64,
    rmid: RM_XLOG,
    info: 0,
    xid: 7,
    mainData: Buffer.alloc(88, 0xab),
    version: 18,
    systemId: TEST_SYSTEM_ID,
  });
  assert.deepEqual([startLsn, endLsn, bytes.length], [lsn, parseLsn('0/31000098'), 160]);
  checkPageHeader(bytes, 8, parseLsn('0/31000000'), 18);
  assert.equal(bytes.readBigUInt64LE(8 + 24), TEST_SYSTEM_ID);
  const whole = Buffer.concat([bytes.subarray(0, 8), bytes.subarray(48, 48 + 106)]);
  const record = decodeWalRecord(whole, startLsn, endLsn);
  assert.deepEqual([record.xid, record.prevLsn, record.mainLength], [7, lsn - 64, 88]);
  assert.throws(
    () => encodeRecordAt({ lsn: 4, prevLsn: 0, rmid: 0, info: 0, xid: 0, mainData: whole, version: 17, systemId: 0n }),
    RangeError,
  );
});

/** Bytes that Postgres does not check either: padding after records, and the unused end of page headers. */
function isUnchecked(
  lsn: Lsn,
  records: readonly { readonly startLsn: Lsn; readonly endLsn: Lsn; readonly mainLength: number }[],
): boolean {
  const inPage = lsn % 8192;
  if (inPage >= 20 && inPage < 24) return true;
  if (inPage < 20) return false;
  for (const record of records) {
    if (lsn >= record.endLsn) continue;
    return lsn >= record.endLsn - padding(record);
  }
  return false;
}

function padding(record: { readonly startLsn: Lsn; readonly mainLength: number }): number {
  const total = 24 + (record.mainLength === 0 ? 0 : record.mainLength < 256 ? 2 : 5) + record.mainLength;
  return -total & 7;
}
