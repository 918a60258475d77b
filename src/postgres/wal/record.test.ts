import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { maxAlign, parseLsn } from '../lsn.ts';
import { isValidRmgr, RM_BRIN, RM_BTREE, RM_HASH, RM_XACT, rmgrName } from '../rmgr.ts';
import { WalError } from './error.ts';
import { recordCrc } from './reader.ts';
import { blockData, decodeWalRecord, findBlock, mainData } from './record.ts';
import type { WalRecord } from './record.ts';
import {
  ASSIGNMENT_17,
  BRIN_INIT_17,
  FPI_PGLZ_17,
  FPI_WITH_HOLE_17,
  HASH_INSERT_17,
  PREPARE_17,
  REAL_RECORDS,
} from './records.test-data.ts';
import type { RealRecord } from './records.test-data.ts';

test('two blocks of one relation are decoded as pg_waldump shows them', () => {
  const record = decode(HASH_INSERT_17);
  assert.equal(rmgrName(record.rmid), 'Hash');
  assert.deepEqual([record.rmid, record.xid, record.info, record.totalLength], [RM_HASH, 21437, 0x10, 56]);
  assert.equal(record.prevLsn, parseLsn('0/D1F2428'));
  assert.equal(record.blocks.length, 2);
  const [first, second] = record.blocks;
  assert.ok(first !== undefined && second !== undefined);
  assert.deepEqual([first.spc, first.db, first.rel, first.fork, first.blk], [1663, 5, 16423, 0, 129]);
  assert.deepEqual([second.spc, second.db, second.rel, second.fork, second.blk], [1663, 5, 16423, 0, 0]);
  assert.equal(findBlock(record, 1), second);
  assert.equal(findBlock(record, 2), undefined);
  assert.equal(blockData(record, first).length, 0);
  assert.equal(mainData(record).toString('hex'), '0010');
});

test('images, holes, blocks made anew, long main data and a top-level xid are decoded', () => {
  const image = decode(FPI_WITH_HOLE_17).blocks[0]!;
  assert.ok(image.hasImage && image.applyImage && !image.willInit);
  assert.deepEqual([image.imageLength, image.holeOffset, image.holeLength], [24, 24, 8168]);

  const compressed = decode(FPI_PGLZ_17);
  const block = compressed.blocks[0]!;
  assert.equal(compressed.rmid, RM_BTREE);
  assert.deepEqual([block.imageLength, block.holeOffset, block.holeLength, block.imageInfo], [68, 36, 8100, 7]);
  assert.equal(block.imageOffset + block.imageLength, block.dataOffset);

  const init = decode(BRIN_INIT_17);
  assert.ok(init.rmid === RM_BRIN && init.blocks[0]!.willInit);

  const assignment = decode(ASSIGNMENT_17);
  assert.deepEqual([assignment.topLevelXid, assignment.xid, assignment.rmid], [0x53c2, 0x53c3, RM_XACT]);

  assert.equal(decode(PREPARE_17).mainLength, 256);
});

test('the CRC of every real record is right and covers all of it', () => {
  for (const real of REAL_RECORDS) {
    const bytes = Buffer.from(real.hex, 'hex');
    assert.equal(recordCrc(bytes), bytes.readUInt32LE(20));
    assert.equal(maxAlign(parseLsn(real.start) + bytes.length), parseLsn(real.end));
    for (const at of [0, 8, 16, 24, bytes.length - 1]) {
      const damaged = Buffer.from(bytes);
      damaged[at]! ^= 1;
      assert.notEqual(recordCrc(damaged), damaged.readUInt32LE(20));
    }
  }
});

test('damaged bytes are refused with the LSN, or give offsets inside the record', () => {
  fc.assert(
    fc.property(
      fc.constantFrom(...REAL_RECORDS),
      fc.array(fc.tuple(fc.nat(), fc.nat(255)), { minLength: 1, maxLength: 4 }),
      (real, changes) => {
        const bytes = Buffer.from(real.hex, 'hex');
        for (const [at, value] of changes) bytes[at % bytes.length] = value;
        checkDecodes(bytes);
      },
    ),
    { numRuns: 3000 },
  );
});

test('any bytes at all are refused with the LSN, or give offsets inside the record', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 120 }), (content) => {
      const bytes = Buffer.concat([Buffer.alloc(24), content]);
      bytes.writeUInt32LE(bytes.length, 0);
      checkDecodes(bytes);
    }),
    { numRuns: 3000 },
  );
});

test('a record cut short anywhere is refused, or is a shorter record when its length says so too', () => {
  for (const real of REAL_RECORDS) {
    const bytes = Buffer.from(real.hex, 'hex');
    for (let length = 0; length < bytes.length; length++) {
      const cut = Buffer.from(bytes.subarray(0, length));
      assert.throws(() => decodeWalRecord(cut, 4096, 8192), WalError);
      if (length < 4) continue;
      cut.writeUInt32LE(length, 0);
      checkDecodes(cut);
    }
  }
});

test('resource managers have their names and the ids of extensions are valid', () => {
  assert.equal(rmgrName(21), 'LogicalMessage');
  assert.equal(rmgrName(128), 'custom128');
  assert.ok(isValidRmgr(0) && isValidRmgr(21) && !isValidRmgr(22) && !isValidRmgr(127) && isValidRmgr(128));
});

function decode(real: RealRecord): WalRecord {
  return decodeWalRecord(Buffer.from(real.hex, 'hex'), parseLsn(real.start), parseLsn(real.end));
}

function checkDecodes(bytes: Buffer): void {
  let record: WalRecord;
  try {
    record = decodeWalRecord(bytes, 4096, 8192);
  } catch (error) {
    assert.ok(error instanceof WalError && error.lsn === 4096, String(error));
    return;
  }
  let end = 24;
  for (const block of record.blocks) {
    assert.ok(block.imageOffset >= end && block.dataOffset === block.imageOffset + block.imageLength);
    assert.ok(block.fork <= 3 && block.holeOffset + block.holeLength <= 8192);
    end = block.dataOffset + block.dataLength;
  }
  assert.ok(record.mainOffset >= end && record.mainOffset + record.mainLength === bytes.length);
}
