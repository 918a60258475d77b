import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';

import { pageInit, pageLsn, setPageLsn } from '../../postgres/page.ts';
import { RM_HEAP, RM_HEAP2, RM_MAX_BUILTIN, RM_SEQ, RM_XLOG } from '../../postgres/rmgr.ts';
import { PG_VERSIONS } from '../../postgres/version.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import { RedoError } from './redo-error.ts';
import { applyRecord, needsPriorPage } from './redo.ts';

interface Shape {
  readonly rmid: number;
  readonly info: number;
  readonly main: Uint8Array;
  readonly data?: Uint8Array;
  readonly block?: Partial<WalBlock>;
}

/** A record with one block, 0, of block number 7. */
function makeRecord({ rmid, info, main, data = new Uint8Array(), block = {} }: Shape): WalRecord {
  const bytes = Buffer.concat([data, main]);
  const place = { id: 0, spc: 1663, db: 5, rel: 16384, fork: 0, blk: 7, flags: 0, willInit: false };
  const image = { hasImage: false, applyImage: false, imageOffset: 0, imageLength: 0, holeOffset: 0, holeLength: 0 };
  return {
    startLsn: 0x1000,
    endLsn: 0x1080,
    prevLsn: 0xf00,
    totalLength: bytes.length,
    xid: 900,
    info,
    rmid,
    blocks: [{ ...place, ...image, imageInfo: 0, dataOffset: 0, dataLength: data.length, ...block }],
    mainOffset: data.length,
    mainLength: main.length,
    originId: 0,
    topLevelXid: 0,
    bytes,
    source: bytes,
    sourceView: new DataView(bytes.buffer, bytes.byteOffset, bytes.length),
    sourceOffset: 0,
  };
}

const heapHeader = [2, 0, 2, 8, 24];

function insertRecord(offset: number): WalRecord {
  return makeRecord({
    rmid: RM_HEAP,
    info: 0x00,
    main: Buffer.from([offset, 0, 0]),
    data: Buffer.from([...heapHeader, 0, 1, 2, 3, 4]),
  });
}

function emptyPage(): Buffer {
  const page = Buffer.alloc(8192);
  pageInit(page, 0);
  return page;
}

test('an insertion rebuilds the tuple header from the record and its block', () => {
  const page = emptyPage();
  applyRecord(page, insertRecord(1), 0, 17);
  assert.equal(pageLsn(page), 0x1080);
  const tuple = page.subarray(8192 - 32);
  assert.equal(tuple.readUInt32LE(0), 900);
  assert.equal(tuple.readUInt32LE(4), 0);
  assert.deepEqual([...tuple.subarray(12, 18)], [0, 0, 7, 0, 1, 0]);
  assert.deepEqual([...tuple.subarray(18, 28)], [...heapHeader, 0, 1, 2, 3, 4]);
});

test('a record that does not fit the page names resource manager, type and LSN', () => {
  const error = catchError(() => applyRecord(emptyPage(), insertRecord(2), 0, 17));
  assert(error instanceof RedoError);
  assert.equal(error.rmgr, 'Heap');
  assert.equal(error.recordType, 'INSERT');
  assert.equal(error.lsn, 0x1000);
  assert.match(error.message, /cannot replay Heap\/INSERT at 0\/1000/);
});

test('a record of an unknown resource manager or type is refused', () => {
  for (const shape of [
    { rmid: 177, info: 0 },
    { rmid: RM_MAX_BUILTIN + 1, info: 0 },
    { rmid: RM_SEQ, info: 0x10 },
    { rmid: RM_XLOG, info: 0xc0 },
    { rmid: RM_HEAP2, info: 0x70 },
  ]) {
    const record = makeRecord({ ...shape, main: Buffer.alloc(20) });
    assert.throws(() => applyRecord(emptyPage(), record, 0, 17), RedoError, JSON.stringify(shape));
  }
});

test('an image to be applied is restored even for a resource manager that is not known', () => {
  const image = emptyPage();
  image.fill(0x5a, 8000);
  const block = { hasImage: true, applyImage: true, imageLength: 8192, imageInfo: 2, dataOffset: 8192 };
  const record = makeRecord({
    rmid: 177,
    info: 0,
    main: Buffer.alloc(0),
    data: image,
    block: { ...block, dataLength: 0 },
  });
  assert.equal(needsPriorPage(record, 0), false);
  const page = Buffer.alloc(8192, 0xff);
  applyRecord(page, record, 0, 17);
  setPageLsn(image, 0x1080);
  assert.deepEqual(page, image);
});

test('the page of a block that the record makes anew need not be given', () => {
  assert.equal(needsPriorPage(insertRecord(1), 0), true);
  const record = makeRecord({ rmid: RM_HEAP, info: 0x80, main: Buffer.from([1, 0, 0]), block: { willInit: true } });
  assert.equal(needsPriorPage(record, 0), false);
});

test('a hint-bit image that was left out changes nothing, an image that is missing is refused', () => {
  const page = emptyPage();
  const before = Buffer.from(page);
  applyRecord(page, makeRecord({ rmid: RM_XLOG, info: 0xa0, main: Buffer.alloc(0) }), 0, 17);
  assert.deepEqual(page, before);
  const missing = makeRecord({ rmid: RM_XLOG, info: 0xb0, main: Buffer.alloc(0) });
  assert.throws(() => applyRecord(page, missing, 0, 17), RedoError);
});

test('records of any bytes on any page are replayed or refused with a RedoError, and never hang', () => {
  const page = fc.oneof(fc.constant(emptyPage()), fc.uint8Array({ minLength: 8192, maxLength: 8192 }));
  const record = fc.record({
    rmid: fc.constantFrom(RM_HEAP, RM_HEAP2, RM_SEQ, RM_XLOG),
    info: fc.nat(15).map((high) => high << 4),
    main: fc.uint8Array({ maxLength: 40 }),
    data: fc.uint8Array({ maxLength: 80 }),
  });
  fc.assert(
    fc.property(page, record, fc.nat(5), fc.constantFrom(...PG_VERSIONS), (bytes, shape, inserted, version) => {
      const target = Buffer.from(bytes);
      for (let i = 1; i <= inserted; i++) attempt(() => applyRecord(target, insertRecord(i), 0, version));
      attempt(() => applyRecord(target, makeRecord(shape), 0, version));
      assert.equal(target.length, 8192);
    }),
    { numRuns: 4000 },
  );
});

function attempt(action: () => void): void {
  const error = catchError(action);
  assert(error === undefined || error instanceof RedoError, String(error));
}

function catchError(action: () => void): unknown {
  try {
    action();
    return undefined;
  } catch (error) {
    return error;
  }
}
