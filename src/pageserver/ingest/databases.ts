/** Database directories: the keys that say they exist, with their filenode maps, and the copying and dropping of all that is in one. */

import type { Lsn } from '../../postgres/lsn.ts';
import { KEY_KIND, databaseKey, prefixRange, relationBlockKey } from '../key.ts';
import type { TimelineWriter } from '../timeline-access.ts';
import { encodeImage, encodeTombstone } from '../value.ts';
import type { Change } from './change.ts';
import type { ForkSizes } from './fork-sizes.ts';

/** The map follows in a record of its own; until then its file is empty. */
export function createDatabase(writer: TimelineWriter, spc: number, db: number, lsn: Lsn): void {
  if (writer.get(databaseKey(spc, db)) === undefined) putRelationMap(writer, spc, db, Buffer.alloc(0), lsn);
}

export function putRelationMap(writer: TimelineWriter, spc: number, db: number, map: Buffer, lsn: Lsn): void {
  writer.put(databaseKey(spc, db), lsn, encodeImage(map));
}

/**
 * CREATE DATABASE … STRATEGY FILE_COPY logs that a directory was copied and not what was in it, so the pages as they are at the record
 * are copied here, as images. All of them are held by the timeline until the record is taken.
 */
export function copyDatabase(
  writer: TimelineWriter,
  sizes: ForkSizes,
  change: Extract<Change, { kind: 'copy-database' }>,
  lsn: Lsn,
): void {
  const { spc, db, fromSpc, fromDb } = change;
  dropDatabase(writer, sizes, spc, db, lsn);
  putRelationMap(writer, spc, db, writer.get(databaseKey(fromSpc, fromDb)) ?? Buffer.alloc(0), lsn);
  for (const [{ rel, fork }, image] of writer.scan(prefixRange(KEY_KIND.relationSize, fromSpc, fromDb))) {
    const blocks = image.readUInt32LE(0);
    for (let blk = 0; blk < blocks; blk++) {
      const page = writer.get(relationBlockKey(fromSpc, fromDb, rel, fork, blk));
      const copy = page === undefined ? encodeTombstone() : encodeImage(page);
      writer.put(relationBlockKey(spc, db, rel, fork, blk), lsn, copy);
    }
    sizes.set(spc, db, rel, fork, blocks, lsn);
  }
}

/** One tablespace's directory of a database. */
export function dropDatabase(writer: TimelineWriter, sizes: ForkSizes, spc: number, db: number, lsn: Lsn): void {
  for (const [{ rel, fork }] of writer.scan(prefixRange(KEY_KIND.relationSize, spc, db))) {
    sizes.remove(spc, db, rel, fork, lsn);
  }
  if (writer.get(databaseKey(spc, db)) !== undefined) writer.put(databaseKey(spc, db), lsn, encodeTombstone());
}
