import assert from 'node:assert/strict';
import { closeSync, existsSync, openSync, readSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { test } from 'node:test';

import { concurrentWorkload, heapWorkload, logicalWorkload } from '../../../test/redo/heap-workload.ts';
import { recordWal } from '../../../test/redo/recorded-wal.ts';
import { formatLsn } from '../../postgres/lsn.ts';
import { BLOCK_SIZE, PD_ALL_VISIBLE, pageFlags, pageSpecial } from '../../postgres/page.ts';
import { FORK_MAIN, FORK_VM, blockInSegment, relationSegmentPath, segmentOfBlock } from '../../postgres/relation.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { openWalDirectory } from '../wal-directory.ts';
import { verifyWal } from '../wal-verify.ts';
import type { VerifyReport } from '../wal-verify.ts';
import type { VerifyPages } from '../wal-verify-pages.ts';
import { maskHeap } from './masks.ts';

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

/** Compares heap and visibility-map pages with those in the files of a server that was shut down. */
function comparePagesWithFiles(pages: VerifyPages, dataDir: string, version: PgVersion): string[] {
  const differing: string[] = [];
  const compared = { heap: 0, visibility: 0, gone: 0 };
  pages.forEach((page, name, blk) => {
    const [spc, db, rel, fork] = name.split('/').map(Number) as [number, number, number, number];
    const isHeap = fork === FORK_MAIN && pageSpecial(page) === BLOCK_SIZE;
    if (!isHeap && fork !== FORK_VM) return;
    const path = join(dataDir, relationSegmentPath({ spc, db, rel, fork, segment: segmentOfBlock(blk) }, version));
    const onDisk = readPage(path, blockInSegment(blk));
    if (onDisk === undefined) {
      compared.gone++;
      return;
    }
    const ours = Buffer.from(page);
    const visible = (of: Buffer): number => pageFlags(of) & PD_ALL_VISIBLE;
    let equal: boolean;
    if (isHeap) {
      const samePageVisibility = visible(ours) === visible(onDisk);
      maskHeap(ours, blk);
      maskHeap(onDisk, blk);
      equal = samePageVisibility && ours.equals(onDisk);
      compared.heap++;
    } else {
      equal = ours.subarray(10).equals(onDisk.subarray(10));
      compared.visibility++;
    }
    if (!equal) differing.push(`${name}/${blk}`);
  });
  console.log(`files: ${JSON.stringify(compared)}`);
  assert(compared.heap > 20 && compared.visibility > 0, 'there are pages to compare');
  return differing;
}

function readPage(path: string, block: number): Buffer | undefined {
  if (!existsSync(path)) return undefined;
  const file = openSync(path, 'r');
  try {
    const page = Buffer.alloc(BLOCK_SIZE);
    return readSync(file, page, 0, BLOCK_SIZE, block * BLOCK_SIZE) === BLOCK_SIZE ? page : undefined;
  } finally {
    closeSync(file);
  }
}

test('heap, heap2 and sequence records replayed from their first change on give the pages of Postgres', async () => {
  using wal = await recordWal(heapWorkload, { settings: `wal_consistency_checking = 'all'` });
  let differing: string[] = ['not compared'];
  const report = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn), {
    onPages: (pages) => (differing = comparePagesWithFiles(pages, dirname(wal.directory), wal.version)),
  });
  assertEqualToPostgres(report, HEAP_TYPES);
  assert.deepEqual(differing, [], 'pages that differ from the files of the server');
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

test('so they do when sessions change the same pages at once and VACUUM runs among them', async () => {
  using wal = await recordWal(concurrentWorkload, { settings: `wal_consistency_checking = 'heap,heap2'` });
  let differing: string[] = ['not compared'];
  const report = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn), {
    onPages: (pages) => (differing = comparePagesWithFiles(pages, dirname(wal.directory), wal.version)),
  });
  assertEqualToPostgres(report, ['Heap2/VISIBLE', 'Heap2/PRUNE_VACUUM_SCAN', 'Heap/LOCK']);
  assert.deepEqual(differing, []);
});
