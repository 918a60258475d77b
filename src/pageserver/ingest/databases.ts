/** Database directories: the keys that say they exist, with their filenode maps, and the copying and dropping of all that is in one. */

import type { Lsn } from '../../postgres/lsn.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { KEY_KIND, databaseKey, prefixRange, relationBlockKey } from '../key.ts';
import type { KeyValue, TimelineWriter } from '../timeline-access.ts';
import { encodeImage, encodeTombstone } from '../value.ts';
import type { KeyImage } from '../read.ts';
import { readWhole } from '../whole-reads.ts';
import type { Repair } from '../whole-reads.ts';
import type { Change } from './change.ts';
import type { ForkSizes } from './fork-sizes.ts';

const PAGES_AT_ONCE = 16;
const ZERO_PAGE = Buffer.alloc(BLOCK_SIZE);

export interface PrepareOptions {
  readonly signal?: AbortSignal;
  /** Brings back a layer that is absent or damaged. */
  readonly repair?: Repair;
}

/** The map follows in a record of its own; until then its file is empty. */
export function createDatabase(writer: TimelineWriter, spc: number, db: number, lsn: Lsn): void {
  if (writer.get(databaseKey(spc, db)) === undefined) putRelationMap(writer, spc, db, Buffer.alloc(0), lsn);
}

export function putRelationMap(writer: TimelineWriter, spc: number, db: number, map: Buffer, lsn: Lsn): void {
  writer.put(databaseKey(spc, db), lsn, encodeImage(map));
}

export type DatabaseCopy = Extract<Change, { kind: 'copy-database' }>;

interface CopiedFork {
  readonly rel: number;
  readonly fork: number;
  readonly blocks: number;
}

/** A copy whose pages the timeline has, for the record that ends at `endLsn`. */
export interface PreparedCopy {
  readonly endLsn: Lsn;
  readonly map: Buffer;
  readonly forks: readonly CopiedFork[];
}

/**
 * CREATE DATABASE … STRATEGY FILE_COPY logs that a directory was copied and not what was in it, so the pages as they are before the record
 * are copied here. A database may be of any size: they are read and written a little at a time, before the record is taken.
 */
export async function prepareCopy(
  writer: TimelineWriter,
  change: DatabaseCopy,
  endLsn: Lsn,
  { signal, repair = (damage) => Promise.reject(damage) }: PrepareOptions,
): Promise<PreparedCopy> {
  const { fromSpc, fromDb } = change;
  const [map, forks] = await readWhole(() => {
    const sizes = writer.scan(prefixRange(KEY_KIND.relationSize, fromSpc, fromDb));
    const found = sizes.map(([{ rel, fork }, image]): CopiedFork => ({ rel, fork, blocks: image.readUInt32LE(0) }));
    return [writer.get(databaseKey(fromSpc, fromDb)) ?? Buffer.alloc(0), found] as const;
  }, repair);
  await writer.putBulk(copiedPages(writer, change, forks, repair), endLsn, signal);
  // What the record itself reads may have been evicted meanwhile; missed only then, it would have all of this done again.
  await readWhole(() => void directoryOf(writer, change.spc, change.db), repair);
  return { endLsn, map, forks };
}

async function* copiedPages(
  writer: TimelineWriter,
  { spc, db, fromSpc, fromDb }: DatabaseCopy,
  forks: readonly CopiedFork[],
  repair: Repair,
): AsyncGenerator<KeyValue[]> {
  const lsn = writer.lastRecordLsn;
  for (const { rel, fork, blocks } of forks) {
    for (let first = 0; first < blocks; first += PAGES_AT_ONCE) {
      const count = Math.min(PAGES_AT_ONCE, blocks - first);
      const pages = await readWhole(
        () => writer.getPages({ spc: fromSpc, db: fromDb, rel, fork }, first, count, lsn),
        repair,
      );
      yield Array.from({ length: count }, (_, i): KeyValue => {
        const page = pages.subarray(i * BLOCK_SIZE, (i + 1) * BLOCK_SIZE);
        // Zeroes are what a block without a value reads as.
        const value = ZERO_PAGE.equals(page) ? encodeTombstone() : encodeImage(page);
        return [relationBlockKey(spc, db, rel, fork, first + i), value];
      });
    }
  }
}

/** What the record itself changes: from here on the forks are there, with the pages that were copied. */
export function copyDatabase(
  writer: TimelineWriter,
  sizes: ForkSizes,
  { spc, db }: DatabaseCopy,
  { map, forks, endLsn }: PreparedCopy,
): void {
  dropDatabase(writer, sizes, spc, db, endLsn);
  putRelationMap(writer, spc, db, map, endLsn);
  for (const { rel, fork, blocks } of forks) sizes.set(spc, db, rel, fork, blocks, endLsn);
}

/** One tablespace's directory of a database. */
export function dropDatabase(writer: TimelineWriter, sizes: ForkSizes, spc: number, db: number, lsn: Lsn): void {
  const { isThere, forks } = directoryOf(writer, spc, db);
  for (const [{ rel, fork }] of forks) sizes.remove(spc, db, rel, fork, lsn);
  if (isThere) writer.put(databaseKey(spc, db), lsn, encodeTombstone());
}

function directoryOf(writer: TimelineWriter, spc: number, db: number): { isThere: boolean; forks: KeyImage[] } {
  const forks = writer.scan(prefixRange(KEY_KIND.relationSize, spc, db));
  return { isThere: writer.get(databaseKey(spc, db)) !== undefined, forks };
}
