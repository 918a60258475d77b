import assert from 'node:assert/strict';
import { test } from 'node:test';

import { heapWorkload, logicalWorkload } from '../../../test/redo/heap-workload.ts';
import { recordWal } from '../../../test/redo/recorded-wal.ts';
import { formatLsn } from '../../postgres/lsn.ts';
import { openWalDirectory } from '../wal-directory.ts';
import { verifyWal } from '../wal-verify.ts';
import type { VerifyReport } from '../wal-verify.ts';

const CHECKED = new Set(['Heap', 'Heap2', 'Sequence', 'XLOG']);

function assertEqualToPostgres(report: VerifyReport, expectedTypes: readonly string[]): void {
  const checked = report.types.filter((type) => CHECKED.has(type.rmgr));
  for (const type of checked) {
    const { records, compared, restored, trusted, unchecked, mismatches, firstMismatch: first } = type;
    const at = first === undefined ? '' : ` first at ${formatLsn(first.lsn)} ${JSON.stringify(first)}`;
    console.log(
      `${type.rmgr}/${type.type}: ${records} records, ${compared} compared, ${restored} restored, ${trusted} trusted, ` +
        `${unchecked} unchecked, ${mismatches} mismatches${at}`,
    );
  }
  const types = new Set(checked.filter((type) => type.records > 0).map((type) => `${type.rmgr}/${type.type}`));
  assert.deepEqual(
    expectedTypes.filter((type) => !types.has(type)),
    [],
    'record types that the workload was to make',
  );
  assert.equal(
    checked.reduce((sum, type) => sum + type.mismatches, 0),
    0,
  );
  assert.equal(report.visibilityBitsLeft, 0);
}

const HEAP_TYPES = [
  'Heap/INSERT',
  'Heap/INSERT+INIT',
  'Heap/DELETE',
  'Heap/UPDATE',
  'Heap/UPDATE+INIT',
  'Heap/HOT_UPDATE',
  'Heap/HEAP_CONFIRM',
  'Heap/LOCK',
  'Heap/INPLACE',
  'Heap2/VISIBLE',
  'Heap2/MULTI_INSERT',
  'Heap2/MULTI_INSERT+INIT',
  'Heap2/LOCK_UPDATED',
  'Heap2/PRUNE_ON_ACCESS',
  'Heap2/PRUNE_VACUUM_SCAN',
  'Heap2/PRUNE_VACUUM_CLEANUP',
  'Sequence/LOG',
  'XLOG/FPI',
];

test('heap, heap2 and sequence records replayed from their first change on give the pages of Postgres', async () => {
  using wal = await recordWal(heapWorkload, { settings: `wal_consistency_checking = 'all'` });
  const report = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn));
  assertEqualToPostgres(report, HEAP_TYPES);
});

test('so they do with full page images, compressed, with hints logged, and with logical decoding', async () => {
  using wal = await recordWal(
    async (sessions) => {
      await heapWorkload(sessions);
      await sessions.sql('CHECKPOINT');
      await logicalWorkload(sessions);
    },
    {
      settings: `wal_consistency_checking = 'all'\nfull_page_writes = on\nwal_log_hints = on\nwal_compression = pglz\nwal_level = logical\n`,
    },
  );
  const report = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn));
  assertEqualToPostgres(report, [
    ...HEAP_TYPES,
    'Heap/TRUNCATE',
    'Heap2/NEW_CID',
    'Heap2/REWRITE',
    'XLOG/FPI_FOR_HINT',
  ]);
});
