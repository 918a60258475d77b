import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { crc32c } from '../base/crc32c.ts';
import { decodeCheckPoint, encodeCheckPoint } from './checkpoint.ts';
import { ControlFileError, DB_SHUTDOWNED, decodeControlFile, encodeControlFile } from './control-file.ts';
import { forgeShutdownCheckpoint } from './forge-checkpoint.ts';
import { parseLsn } from './lsn.ts';
import { PG_VERSIONS } from './version.ts';
import { WalReader } from './wal/reader.ts';
import { CONTROL_FILE_15, CONTROL_FILE_17, CONTROL_FILE_18, FIRST_PAGE_17 } from './wal/records.test-data.ts';

const REAL = [
  { version: 15, hex: CONTROL_FILE_15, checkPoint: '0/19C4D288', nextXid: 69663, walLevel: 0, catalog: 202209061 },
  { version: 17, hex: CONTROL_FILE_17, checkPoint: '0/1A6C5448', nextXid: 62196, walLevel: 2, catalog: 202406281 },
  { version: 18, hex: CONTROL_FILE_18, checkPoint: '0/C275C58', nextXid: 33942, walLevel: 2, catalog: 202506291 },
] as const;

function realFile(hex: string): Buffer {
  const bytes = Buffer.alloc(8192);
  Buffer.from(hex, 'hex').copy(bytes);
  return bytes;
}

test('the control files of real clusters are read, and written back byte for byte', () => {
  for (const real of REAL) {
    const bytes = realFile(real.hex);
    const file = decodeControlFile(bytes);
    assert.equal(file.version, real.version);
    assert.equal(file.state, DB_SHUTDOWNED);
    assert.equal(file.checkPoint, parseLsn(real.checkPoint));
    assert.equal(file.checkPointCopy.redo, file.checkPoint);
    assert.equal(file.checkPointCopy.nextXid, real.nextXid);
    assert.equal(file.checkPointCopy.walLevel, real.walLevel);
    assert.equal(file.walLevel, 2);
    assert.equal(file.maxPreparedTransactions, 20);
    assert.equal(file.mockAuthenticationNonce.length, 32);
    assert.ok(encodeControlFile(file).equals(bytes), `Postgres ${real.version}`);
  }
});

test('a changed byte, another version and another build are refused', () => {
  fc.assert(
    fc.property(fc.constantFrom(...REAL), fc.nat(287), fc.integer({ min: 1, max: 255 }), (real, at, flip) => {
      const bytes = realFile(real.hex);
      bytes[at]! ^= flip;
      assert.throws(() => decodeControlFile(bytes), ControlFileError);
    }),
  );
  const bytes = realFile(CONTROL_FILE_17);
  bytes.writeUInt32LE(32768, 216);
  bytes.writeUInt32LE(crc32c(bytes, 0, 288), 288);
  assert.throws(() => decodeControlFile(bytes), /page size is 32768 in this build of Postgres, 8192 is supported/);
  assert.throws(() => decodeControlFile(Buffer.alloc(8192)), ControlFileError);
  assert.throws(() => decodeControlFile(Buffer.alloc(100)), ControlFileError);
});

test('the checkpoint that initdb wrote is read as pg_waldump shows it, and written back byte for byte', () => {
  const main = Buffer.from(FIRST_PAGE_17, 'hex').subarray(40 + 26, 40 + 26 + 88);
  const checkPoint = decodeCheckPoint(main, 0, 17);
  assert.deepEqual(
    [
      checkPoint.redo,
      checkPoint.nextXid,
      checkPoint.nextOid,
      checkPoint.nextMulti,
      checkPoint.oldestXid,
      checkPoint.walLevel,
    ],
    [parseLsn('0/1000028'), 3, 10000, 1, 3, 1],
  );
  assert.ok(encodeCheckPoint(checkPoint, 17).equals(main));
  assert.throws(() => decodeCheckPoint(main, 1, 17), RangeError);
});

test('a forged checkpoint is one readable record, and the control file points to it', () => {
  const anyStart = fc.nat(2 ** 24 / 8).map((at) => 7 * 2 ** 32 + at * 8);
  fc.assert(
    fc.property(fc.constantFrom(...PG_VERSIONS), anyStart, (version, place) => {
      const lsn = place % 8192 > 0 && place % 8192 < 40 ? place - (place % 8192) : place;
      const controlFile = { ...decodeControlFile(realFile(CONTROL_FILE_17)), version };
      const state = { ...controlFile.checkPointCopy, nextXid: 5 * 2 ** 32 + 1000, oldestActiveXid: 77 };
      const forged = forgeShutdownCheckpoint({
        controlFile,
        state,
        lsn,
        prevLsn: lsn - 256,
        time: 1_700_000_000,
        parameters: { walLevel: 1 },
      });

      const reader = new WalReader(lsn, version, { prevLsn: lsn - 256 });
      reader.push(lsn, forged.wal);
      const record = reader.next();
      assert.ok(record !== undefined && record.startLsn === forged.startLsn && record.endLsn === forged.endLsn);
      assert.equal(lsn + forged.wal.length, forged.endLsn);
      const written = decodeCheckPoint(record.bytes, record.mainOffset, version);
      assert.deepEqual(written, forged.checkPoint);
      assert.deepEqual([written.redo, written.nextXid, written.oldestActiveXid], [forged.startLsn, state.nextXid, 0]);
      assert.equal(written.walLevel, version >= 17 ? 1 : 0);

      const file = decodeControlFile(forged.controlFile);
      assert.deepEqual(
        [file.state, file.checkPoint, file.walLevel, file.time],
        [DB_SHUTDOWNED, forged.startLsn, 1, 1_700_000_000],
      );
      assert.deepEqual(file.checkPointCopy, written);

      for (const segment of forged.segments) {
        let end = 0;
        for (const { offset, bytes } of segment.writes) {
          assert.ok(offset >= end, 'writes rise and do not overlap');
          end = offset + bytes.length;
        }
        assert.equal(segment.writes[0]!.offset, 0);
        assert.ok(end <= 2 ** 24);
      }
    }),
    { numRuns: 300 },
  );
});

test('a checkpoint whose next xid no transaction may have is not forged', () => {
  const controlFile = decodeControlFile(realFile(CONTROL_FILE_17));
  const state = { ...controlFile.checkPointCopy, nextXid: 2 ** 32 + 2 };
  assert.throws(
    () => forgeShutdownCheckpoint({ controlFile, state, lsn: 8192 * 9 + 64, prevLsn: 0, time: 0 }),
    RangeError,
  );
});
