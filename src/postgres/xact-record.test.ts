import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { crc32c } from '../base/crc32c.ts';
import { parseLsn } from './lsn.ts';
import type { PgVersion } from './version.ts';
import { WalError } from './wal/error.ts';
import { decodeWalRecord } from './wal/record.ts';
import type { WalRecord } from './wal/record.ts';
import {
  ABORT_PREPARED_17,
  ABORT_PREPARED_18,
  ASSIGNMENT_17,
  COMMIT_17,
  COMMIT_DROPPING_17,
  COMMIT_PREPARED_17,
  PREPARE_17,
} from './wal/records.test-data.ts';
import type { RealRecord } from './wal/records.test-data.ts';
import { dateToTimestamp, parseXactRecord, timestampToDate, twoPhaseFileBytes } from './xact-record.ts';
import type { XactEnd } from './xact-record.ts';

test('a plain commit has its time, its own xid and nothing else', () => {
  const end = parseEnd(COMMIT_17, 17);
  assert.deepEqual([end.kind, end.prepared, end.xid], ['commit', false, 533]);
  assert.deepEqual([end.subxacts, end.droppedRelations, end.droppedStats], [[], [], []]);
  assert.equal(timestampToDate(end.timeUs).toISOString(), '2026-11-21T08:21:50.980Z');
  assert.equal(dateToTimestamp(timestampToDate(end.timeUs)), end.timeUs - (end.timeUs % 1000));
});

test('a commit names the relations that go away with it', () => {
  const end = parseEnd(COMMIT_DROPPING_17, 17);
  assert.deepEqual(end.droppedRelations, [{ spc: 1663, db: 5, rel: 16398 }]);
  assert.deepEqual([end.db, end.spc, end.invalidationCount, end.gid], [5, 1663, 3, undefined]);
});

test('the end of a prepared transaction is about the prepared one', () => {
  const commit = parseEnd(COMMIT_PREPARED_17, 17);
  assert.deepEqual([commit.kind, commit.prepared, commit.xid, commit.gid], ['commit', true, 0x53c2, 'gid one']);
  assert.deepEqual(commit.subxacts, [0x53c3, 0x53c4]);
  const abort = parseEnd(ABORT_PREPARED_17, 17);
  assert.deepEqual([abort.kind, abort.prepared, abort.xid, abort.gid], ['abort', true, 0x53c5, 'gid two']);
  assert.deepEqual(abort.droppedRelations, [{ spc: 1663, db: 5, rel: 0x4029 }]);
  assert.deepEqual(abort.droppedStats, [{ kind: 2, db: 5, objectId: 0x4029 }]);
});

test("Postgres 18's longer entries of dropped statistics are read", () => {
  const abort = parseEnd(ABORT_PREPARED_18, 18);
  assert.deepEqual([abort.xid, abort.gid], [0x62df, 'gid two']);
  assert.deepEqual(abort.droppedStats, [{ kind: 2, db: 5, objectId: 0x402d }]);
});

test('a prepare has what its state file has', () => {
  const record = decode(PREPARE_17);
  const prepare = parseXactRecord(record, 17);
  assert.ok(prepare?.kind === 'prepare');
  assert.deepEqual(
    [prepare.xid, prepare.db, prepare.owner, prepare.gid, prepare.subxacts],
    [0x53c2, 5, 10, 'gid one', [0x53c3, 0x53c4]],
  );
  const file = twoPhaseFileBytes(record);
  assert.equal(file.readUInt32LE(4), file.length);
  assert.equal(file.readUInt32LE(file.length - 4), crc32c(file, 0, file.length - 4));
});

test('an assignment of subtransactions is not an end', () => {
  assert.equal(parseXactRecord(decode(ASSIGNMENT_17), 17), undefined);
});

test('damaged records are refused with their LSN, never read past their end', () => {
  const records = [COMMIT_DROPPING_17, COMMIT_PREPARED_17, ABORT_PREPARED_17, PREPARE_17];
  fc.assert(
    fc.property(fc.constantFrom(...records), fc.nat(), fc.nat(255), fc.boolean(), (real, at, value, cut) => {
      const whole = decode(real);
      const bytes = Buffer.from(whole.bytes);
      bytes[whole.mainOffset + (at % whole.mainLength)] = value;
      const mainLength = cut ? at % whole.mainLength : whole.mainLength;
      try {
        parseXactRecord({ ...whole, bytes, mainLength }, 17);
      } catch (error) {
        assert.ok(error instanceof WalError && error.lsn === whole.startLsn, String(error));
      }
    }),
    { numRuns: 2000 },
  );
});

function decode(real: RealRecord): WalRecord {
  return decodeWalRecord(Buffer.from(real.hex, 'hex'), parseLsn(real.start), parseLsn(real.end));
}

function parseEnd(real: RealRecord, version: PgVersion): XactEnd {
  const parsed = parseXactRecord(decode(real), version);
  assert.ok(parsed !== undefined && parsed.kind !== 'prepare');
  return parsed;
}
