/**
 * Redo of generic records, by which extensions change pages of their own kind (Postgres: generic_xlog.c; the same in 15 to 18).
 *
 * Each block's data is a list of changes: u16 offset in the page, u16 length, that many bytes. The bytes between lower and upper, as the
 * page has them after the changes, become zero. A record has any number of blocks; each is changed by its own data alone.
 */

import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { findBlock } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { misfit, strayBlock } from './index-tuple.ts';
import { maskPageLsnAndChecksum, maskUnusedSpace } from './masks.ts';

const CHANGE_HEADER_SIZE = 4;

/** Replays the record on its block `blockId`; always changes the page. Sets no LSN. */
export function redoGeneric(page: Buffer, record: WalRecord, blockId: number, _version: PgVersion): boolean {
  const block = findBlock(record, blockId);
  if (block === undefined) throw strayBlock(record, blockId);
  const bytes = record.bytes;
  const end = block.dataOffset + block.dataLength;
  let at = block.dataOffset;
  while (at < end) {
    if (at + CHANGE_HEADER_SIZE > end) throw misfit(record, `data of block ${blockId} ends inside a change`);
    const offset = bytes.readUInt16LE(at);
    const length = bytes.readUInt16LE(at + 2);
    at += CHANGE_HEADER_SIZE;
    if (offset + length > BLOCK_SIZE || at + length > end) {
      throw misfit(record, `change of ${length} bytes at ${offset} of block ${blockId} leaves the page or the data`);
    }
    bytes.copy(page, offset, at, at + length);
    at += length;
  }
  const lower = page.readUInt16LE(12);
  const upper = page.readUInt16LE(14);
  if (lower > upper || upper > BLOCK_SIZE) throw misfit(record, `page has lower ${lower}, upper ${upper}`);
  page.fill(0, lower, upper);
  return true;
}

/** Blanks what may differ between a page of the primary and the same page replayed (generic_mask). */
export function maskGeneric(page: Buffer, _blk: number, _version: PgVersion): void {
  maskPageLsnAndChecksum(page);
  maskUnusedSpace(page);
}
