import assert from 'node:assert/strict';
import { closeSync, existsSync, openSync, readSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import type { TestContext } from 'node:test';

import { concurrentWorkload, heapWorkload, logicalWorkload } from '../../../test/redo/heap-workload.ts';
import { LOGICAL_TYPES, heapTypes } from '../../../test/redo/record-types.ts';
import { recordWal } from '../../../test/redo/recorded-wal.ts';
import type { RecordedWal, WorkloadSessions } from '../../../test/redo/recorded-wal.ts';
import { formatLsn } from '../../postgres/lsn.ts';
import { BLOCK_SIZE, PD_ALL_VISIBLE, pageFlags, pageSpecial } from '../../postgres/page.ts';
import { FORK_MAIN, FORK_VM, blockInSegment, relationSegmentPath, segmentOfBlock } from '../../postgres/relation.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { WalError } from '../../postgres/wal/error.ts';
import { WalReader } from '../../postgres/wal/reader.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { impliedChanges } from '../ingest/implied-changes.ts';
import { PAGES_PER_SLRU_SEGMENT, slruSegmentPath } from '../ingest/slru.ts';
import { SLRU } from '../key.ts';
import { openWalDirectory } from '../wal-directory.ts';
import type { WalSource } from '../wal-directory.ts';
import { verifyWal } from '../wal-verify.ts';
import type { VerifyReport } from '../wal-verify-report.ts';
import type { VerifyPages } from '../wal-verify-pages.ts';
import { applyDerived } from './derived.ts';
import { maskHeap } from './masks.ts';

/** Other builds to run on besides npm's: bin folders, separated by colons. */
const BIN_DIRS = [undefined, ...(process.env['STRATA_TEST_PG_BIN_DIRS'] ?? '').split(':').filter((dir) => dir !== '')];

function assertEqualToPostgres(t: TestContext, report: VerifyReport, expectedTypes: readonly string[]): void {
  for (const { rmgr, type, records, compared, restored, trusted, mismatches, firstMismatch: first } of report.types) {
    const at = first === undefined ? '' : `, first at ${formatLsn(first.lsn)}: ${JSON.stringify(first)}`;
    t.diagnostic(
      `${rmgr}/${type}: ${records} records, ${compared} compared, ${restored} restored, ${trusted} trusted, ${mismatches} mismatches${at}`,
    );
  }
  const types = new Set(report.types.map((type) => `${type.rmgr}/${type.type}`));
  const missing = expectedTypes.filter((type) => !types.has(type));
  assert.deepEqual(missing, [], 'record types that the workload was to make');
  assert.equal(report.mismatches, 0);
  assert.equal(report.visibilityBitsLeft, 0);
}

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

/** The clog and multixact pages that the WAL since initdb implies, against the files. Returns those that differ. */
async function compareStatusesWithFiles(wal: RecordedWal): Promise<string[]> {
  const pages = new Map<string, Buffer>();
  const source = await openWalDirectory(wal.directory);
  const reader = new WalReader(source.startLsn, source.version);
  const { stoppedBy } = await readAll(source, reader, (record) => {
    for (const change of impliedChanges(record, source.version)) {
      if (change.kind !== 'change-slru-page') continue;
      const name = `${change.slru}/${change.change.page}`;
      let page = pages.get(name);
      if (page === undefined) pages.set(name, (page = Buffer.alloc(BLOCK_SIZE)));
      applyDerived(page, change.change.subtype, change.change.payload);
    }
  });
  assert.match(stoppedBy, /record length 0/);
  assert.deepEqual([...pages.keys()].sort(), ['0/0', '1/0', '2/0']);
  return [...pages].flatMap(([name, page]) => {
    const [slru, pageNumber] = name.split('/').map(Number) as [number, number];
    const path = join(dirname(wal.directory), slruSegmentPath(slru, Math.floor(pageNumber / PAGES_PER_SLRU_SEGMENT)));
    const onDisk = readPage(path, pageNumber % PAGES_PER_SLRU_SEGMENT);
    // The first byte of the clog is of special transactions, which initdb sets without WAL.
    const from = slru === SLRU.clog ? 1 : 0;
    return onDisk?.subarray(from).equals(page.subarray(from)) === true ? [] : [name];
  });
}

async function readAll(
  source: WalSource,
  reader: WalReader,
  visit: (record: WalRecord) => void,
): Promise<{ stoppedBy: string }> {
  for await (const chunk of source.chunks) {
    reader.push(chunk.lsn, chunk.bytes);
    try {
      for (let record = reader.next(); record !== undefined; record = reader.next()) visit(record);
    } catch (error) {
      if (error instanceof WalError) return { stoppedBy: error.message };
      throw error;
    }
  }
  return { stoppedBy: '' };
}

for (const pgBinDir of BIN_DIRS) {
  const where = pgBinDir === undefined ? '' : ` (${pgBinDir})`;

  test(`heap, heap2 and sequence records replayed from the first change on give the pages of Postgres${where}`, async (t) => {
    using wal = await recordWal(heapWorkload, { pgBinDir, settings: `wal_consistency_checking = 'all'` });
    let differing: string[] = ['not compared'];
    const report = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn), {
      onPages: (pages) => (differing = comparePagesWithFiles(pages, dirname(wal.directory), wal.version)),
    });
    assertEqualToPostgres(t, report, heapTypes(wal.version));
    assert.deepEqual(differing, [], 'pages that differ from the files of the server');
    assert.deepEqual(await compareStatusesWithFiles(wal), [], 'transaction statuses and multixacts that differ');
  });

  test(`so they do with full page images, compressed, with hints logged, and with logical decoding${where}`, async (t) => {
    const workload = async (sessions: WorkloadSessions): Promise<void> => {
      await heapWorkload(sessions);
      await sessions.sql('CHECKPOINT');
      await logicalWorkload(sessions);
    };
    using wal = await recordWal(workload, {
      pgBinDir,
      settings: `wal_consistency_checking = 'all'\nfull_page_writes = on\nwal_log_hints = on\nwal_compression = pglz\nwal_level = logical\n`,
    });
    const report = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn));
    assertEqualToPostgres(t, report, [...heapTypes(wal.version), ...LOGICAL_TYPES]);
  });

  test(`so they do when sessions change the same pages at once and VACUUM runs among them${where}`, async (t) => {
    using wal = await recordWal(concurrentWorkload, { pgBinDir, settings: `wal_consistency_checking = 'all'` });
    let differing: string[] = ['not compared'];
    const report = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn), {
      onPages: (pages) => (differing = comparePagesWithFiles(pages, dirname(wal.directory), wal.version)),
    });
    assertEqualToPostgres(t, report, ['Heap2/VISIBLE', 'Heap/LOCK', 'Heap/DELETE']);
    assert.deepEqual(differing, []);
  });
}
