/**
 * Replays the WAL of a directory with our redo and compares each page with the image that wal_consistency_checking put into the WAL,
 * under the masks of the resource managers.
 *
 * Pages are held in memory. A page first met without an image that is applied, and that the record does not make anew, is taken from the
 * image it should become: it counts as trusted, not as compared.
 */

import assert from 'node:assert/strict';
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';

import { restoreImage } from '../../src/pageserver/redo/image.ts';
import { formatLsn, parseWalFileName } from '../../src/postgres/lsn.ts';
import type { Lsn } from '../../src/postgres/lsn.ts';
import { pageLsn, setPageLsn } from '../../src/postgres/page.ts';
import { RM_XLOG, rmgrName } from '../../src/postgres/rmgr.ts';
import type { PgVersion } from '../../src/postgres/version.ts';
import { WalReader } from '../../src/postgres/wal/reader.ts';
import type { WalBlock, WalRecord } from '../../src/postgres/wal/record.ts';
import { indexRecordTypes, typeName } from '../../src/pageserver/redo/index-tuple.ts';
import { recordWal } from './recorded-wal.ts';
import type { WorkloadSessions } from './recorded-wal.ts';

export interface AccessMethodRedo {
  readonly redo: (page: Buffer, record: WalRecord, blockId: number, version: PgVersion) => boolean;
  readonly mask: (page: Buffer, blk: number, version: PgVersion) => void;
  /** What remains to be done on a page that was restored from the record's image. */
  readonly redoOnImage?: (page: Buffer, record: WalRecord, blockId: number, version: PgVersion) => boolean;
  /** A mask that hides less, for the comparison with files, where what is set after the record was written is there too. */
  readonly fileMask?: (page: Buffer, blk: number, version: PgVersion) => void;
}

export interface TypeCounts {
  records: number;
  blocks: number;
  compared: number;
  trusted: number;
  restored: number;
}

export interface ReplayReport {
  readonly counts: ReadonlyMap<string, TypeCounts>;
  readonly mismatches: readonly string[];
  /** The pages as they are after the last record, by `tablespace/database/relation/fork/block`, each with who changed it last. */
  readonly pages: ReadonlyMap<string, ReplayedPage>;
}

interface ReplayedPage {
  readonly page: Buffer;
  readonly rmid: number;
}

/** Replays the records of the given resource managers; others are passed by, but for full page images. */
export function checkReplay(
  directory: string,
  startLsn: Lsn,
  version: PgVersion,
  methods: ReadonlyMap<number, AccessMethodRedo>,
): ReplayReport {
  const pages = new Map<string, ReplayedPage>();
  const counts = new Map<string, TypeCounts>();
  const mismatches: string[] = [];
  for (const record of readRecords(directory, startLsn, version)) {
    const method = methods.get(record.rmid);
    if (method === undefined && record.rmid !== RM_XLOG) continue;
    const type = `${rmgrName(record.rmid)}/${typeName(record)}`;
    let count = counts.get(type);
    if (count === undefined)
      counts.set(type, (count = { records: 0, blocks: 0, compared: 0, trusted: 0, restored: 0 }));
    count.records++;
    for (const block of record.blocks) {
      count.blocks++;
      const key = `${block.spc}/${block.db}/${block.rel}/${block.fork}/${block.blk}`;
      try {
        const wrong = replayBlock(pages, key, record, block, method, count, version);
        if (wrong !== undefined)
          mismatches.push(`${type} at ${formatLsn(record.startLsn)} block ${block.id} (${key}): ${wrong}`);
      } catch (error) {
        mismatches.push(`${type} at ${formatLsn(record.startLsn)} block ${block.id} (${key}): ${String(error)}`);
        if (block.hasImage) pages.set(key, { page: imageOf(record, block), rmid: record.rmid });
      }
    }
  }
  return { counts, mismatches, pages };
}

export function* readRecords(directory: string, startLsn: Lsn, version: PgVersion): Generator<WalRecord> {
  const reader = new WalReader(startLsn, version);
  for (const name of readdirSync(directory).sort()) {
    const segment = parseWalFileName(name);
    if (segment === undefined || segment.startLsn + 16 * 1024 * 1024 <= startLsn) continue;
    const bytes = readFileSync(join(directory, name));
    const skip = Math.max(0, startLsn - segment.startLsn);
    reader.push(segment.startLsn + skip, bytes.subarray(skip));
    for (;;) {
      let record: WalRecord | undefined;
      try {
        record = reader.next();
      } catch {
        return; // Segments are preallocated: what follows the last record is no WAL.
      }
      if (record === undefined) break;
      yield record;
    }
  }
}

function replayBlock(
  pages: Map<string, ReplayedPage>,
  key: string,
  record: WalRecord,
  block: WalBlock,
  method: AccessMethodRedo | undefined,
  count: TypeCounts,
  version: PgVersion,
): string | undefined {
  if (block.applyImage) {
    const page = imageOf(record, block);
    setPageLsn(page, record.endLsn);
    method?.redoOnImage?.(page, record, block.id, version);
    pages.set(key, { page, rmid: record.rmid });
    count.restored++;
    return undefined;
  }
  if (method === undefined) return undefined;
  let page = pages.get(key)?.page;
  if (block.willInit) page = Buffer.alloc(8192);
  if (page === undefined) {
    if (!block.hasImage) return 'its page was never seen and the record has no image';
    const image = imageOf(record, block);
    setPageLsn(image, record.endLsn);
    pages.set(key, { page: image, rmid: record.rmid });
    count.trusted++;
    return undefined;
  }
  pages.set(key, { page, rmid: record.rmid });
  if (method.redo(page, record, block.id, version)) setPageLsn(page, record.endLsn);
  if (!block.hasImage) return undefined;
  count.compared++;
  const expected = imageOf(record, block);
  const raw = Buffer.from(expected);
  const found = Buffer.from(page);
  method.mask(expected, block.blk, version);
  method.mask(found, block.blk, version);
  if (expected.equals(found)) return undefined;
  const differing: number[] = [];
  for (let i = 0; i < 8192; i++) if (expected[i] !== found[i]) differing.push(i);
  const at = differing[0] ?? 0;
  pages.set(key, { page: raw, rmid: record.rmid });
  return `${differing.length} bytes differ from byte ${at} on: expected ${expected.subarray(at, at + 16).toString('hex')}, found ${found.subarray(at, at + 16).toString('hex')}`;
}

/**
 * Compares the pages with the files that Postgres wrote at its shutdown: under the masks, and, what the masks hide, their LSNs. Returns
 * the differences and how many pages were compared. Pages that no record of `rmid` changed last are passed by.
 */
export function compareWithFiles(
  pages: ReadonlyMap<string, ReplayedPage>,
  baseDirectory: string,
  rmid: number,
  method: AccessMethodRedo,
  version: PgVersion,
): { compared: number; differences: string[] } {
  const files = new Map<string, Buffer | undefined>();
  const differences: string[] = [];
  let compared = 0;
  for (const [key, { page, rmid: changedBy }] of pages) {
    const [, db, rel, fork, blk] = key.split('/').map(Number);
    if (changedBy !== rmid || fork !== 0 || blk === undefined) continue;
    const path = join(baseDirectory, `${db}/${rel}`);
    if (!files.has(path)) files.set(path, existsSync(path) ? readFileSync(path) : undefined);
    const expected = files.get(path)?.subarray(blk * 8192, blk * 8192 + 8192);
    if (expected === undefined || expected.length !== 8192) continue;
    // SP-GiST takes an empty page, makes it anew without WAL, and may then not use it.
    if (pageLsn(expected) === 0) continue;
    compared++;
    if (pageLsn(expected) !== pageLsn(page)) {
      differences.push(`page ${key} has LSN ${formatLsn(pageLsn(page))}, in its file ${formatLsn(pageLsn(expected))}`);
    }
    const found = Buffer.from(page);
    const wanted = Buffer.from(expected);
    const mask = method.fileMask ?? method.mask;
    mask(found, blk, version);
    mask(wanted, blk, version);
    if (!found.equals(wanted)) differences.push(`page ${key} differs from its file`);
  }
  return { compared, differences };
}

function imageOf(record: WalRecord, block: WalBlock): Buffer {
  const page = Buffer.alloc(8192);
  restoreImage(page, record, block);
  return page;
}

/**
 * Runs a workload and asserts that every page that its resource manager's records change is, after replay, what Postgres made of it; and
 * that every type of record appeared, but for `absent`.
 */
export async function assertReplays(
  rmid: number,
  method: AccessMethodRedo,
  workload: (sessions: WorkloadSessions) => Promise<void>,
  options: { readonly absent?: readonly string[]; readonly settings?: string } = {},
): Promise<void> {
  const absent = options.absent ?? [];
  using wal = await recordWal(workload, { settings: options.settings });
  const report = checkReplay(wal.directory, wal.startLsn, wal.version, new Map([[rmid, method]]));
  assert.deepEqual(report.mismatches.slice(0, 5), []);
  const prefix = `${rmgrName(rmid)}/`;
  const expected = indexRecordTypes().filter((type) => type.startsWith(prefix) && !absent.includes(type));
  assert.deepEqual(
    expected.filter((type) => !report.counts.has(type)),
    [],
    'types that never appeared',
  );
  let compared = 0;
  for (const count of report.counts.values()) compared += count.compared;
  assert.ok(compared > 100, `${compared} pages were compared`);

  const files = compareWithFiles(report.pages, join(wal.directory, '..', 'base'), rmid, method, wal.version);
  assert.deepEqual(files.differences.slice(0, 5), []);
  assert.ok(files.compared > 10, `${files.compared} pages were compared with files`);
}
