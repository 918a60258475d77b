import assert from 'node:assert/strict';
import { test } from 'node:test';

import { makeRecord, u32 } from '../../../test/ingest/make-record.ts';
import { RM_MULTIXACT } from '../../postgres/rmgr.ts';
import { SLRU } from '../key.ts';
import { MULTIXACT_MEMBERS_PER_PAGE, MULTIXACT_OFFSETS_PER_PAGE } from '../redo/derived.ts';
import { multixactChanges } from './multixact.ts';
import { idPrecedes, parseSlruFileName, slruSegmentIsOld, slruSegmentPath } from './slru.ts';

test('segments have the names of Postgres', () => {
  assert.equal(slruSegmentPath(SLRU.clog, 0), 'pg_xact/0000');
  assert.equal(slruSegmentPath(SLRU.multixactMembers, 0x14078), 'pg_multixact/members/14078');
  assert.equal(parseSlruFileName('00FF'), 255);
  assert.equal(parseSlruFileName('00ff'), undefined);
});

test('ids precede each other the short way round', () => {
  assert.ok(idPrecedes(5, 6) && !idPrecedes(6, 5) && !idPrecedes(5, 5));
  assert.ok(idPrecedes(2 ** 32 - 1, 3) && !idPrecedes(3, 2 ** 32 - 1));
});

test('a segment is old when all of it is before the cutoff, also where ids wrap around', () => {
  assert.ok(slruSegmentIsOld(SLRU.clog, 0, 32));
  assert.ok(!slruSegmentIsOld(SLRU.clog, 0, 31));
  assert.ok(!slruSegmentIsOld(SLRU.clog, 1, 32));
  const lastClogPage = 2 ** 32 / 32768 - 1;
  assert.ok(slruSegmentIsOld(SLRU.clog, Math.floor(lastClogPage / 32), 5));
  assert.ok(!slruSegmentIsOld(SLRU.clog, 0, lastClogPage));
  assert.ok(slruSegmentIsOld(SLRU.commitTs, 3, 4 * 32));
});

test('a truncation of multixacts names the segments of members, wrapping around, and keeps the page of the oldest', () => {
  const lastSegment = Math.floor(0xffffffff / MULTIXACT_MEMBERS_PER_PAGE / 32);
  const member = (segment: number): number => segment * 32 * MULTIXACT_MEMBERS_PER_PAGE + 7;
  const main = u32(5, 1, 3 * MULTIXACT_OFFSETS_PER_PAGE, member(lastSegment - 1), member(2));
  const record = makeRecord({ lsn: 0x1000028, rmid: RM_MULTIXACT, info: 0x30, main });
  const changes = multixactChanges(record, 17);
  const dropped = changes.flatMap((change) => (change.kind === 'drop-slru-segment' ? [change.segment] : []));
  assert.deepEqual(dropped, [lastSegment - 1, lastSegment, 0, 1]);
  assert.deepEqual(changes[0], { kind: 'oldest-multixact', multi: 3 * MULTIXACT_OFFSETS_PER_PAGE, db: 5 });
  assert.deepEqual(changes.at(-1), { kind: 'truncate-slru', slru: SLRU.multixactOffsets, cutoffPage: 2 });
});
