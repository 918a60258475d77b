/**
 * Redo of gist records, block by block (Postgres: gistxlog.c, gist.h).
 *
 * Special space of every page:
 *   0   u32, u32  NSN, high half first: the LSN of the insertion of the downlink to this page's right half
 *   8   u32  right link, INVALID_BLOCK for none
 *   12  u16  F_* flags
 *   14  u16  0xff81
 * All pages hold index tuples; a deleted page the full xid of its deletion instead, from byte 24 on.
 *
 * Which record has which blocks:
 *   PAGE_UPDATE   0 page, 1 left half of a split that is now complete
 *   DELETE        0 page
 *   PAGE_SPLIT    0 left half of a split one level below that is now complete, 1 and up: the page and its new right neighbours (all made
 *                 anew)
 *   PAGE_DELETE   0 page, 1 parent
 *   PAGE_REUSE, ASSIGN_LSN: none
 *
 * The primary sets NSN and flags of the left half only after it has taken the page's image for the record. So that block is replayed on a
 * restored image too: redoGistOnImage. Its NSN is the record's end LSN.
 *
 * One difference from Postgres: its replay of DELETE sets F_TUPLES_DELETED, which the primary does not (gistprunepage), so that its own
 * consistency check finds fault with it. Here the page is as on the primary. Nothing reads the flag.
 */

import { pageIndexTupleDelete, pageIndexTupleOverwrite, pageInit, pageMaxOffset } from '../../postgres/page.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { versionFacts } from '../../postgres/version.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { findBlock } from '../../postgres/wal/record.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import {
  INVALID_BLOCK,
  PAGE_CONTENTS,
  addItem,
  blockNumber,
  deleteItems,
  misfit,
  specialOffset,
  strayBlock,
  tupleSize,
  unknownType,
} from './index-tuple.ts';
import { maskLpFlags, maskPageHintBits, maskPageLsnAndChecksum, maskUnusedSpace } from './masks.ts';

const PAGE_UPDATE = 0x00;
const DELETE = 0x10;
const PAGE_SPLIT = 0x30;
const PAGE_DELETE = 0x60;

const OPAQUE_SIZE = 16;
const NSN = 0;
const RIGHT_LINK = 8;
const FLAGS = 12;
const PAGE_ID = 14;
const GIST_PAGE_ID = 0xff81;

const F_LEAF = 0x01;
const F_DELETED = 0x02;
const F_TUPLES_DELETED = 0x04;
const F_FOLLOW_RIGHT = 0x08;
const F_HAS_GARBAGE = 0x10;

const ROOT_BLOCK = 0;

/** Replays the record on its block `blockId`; false when the record leaves that page alone. Sets no LSN. */
export function redoGist(page: Buffer, record: WalRecord, blockId: number, version: PgVersion): boolean {
  const block = findBlock(record, blockId);
  if (block === undefined) throw strayBlock(record, blockId);
  switch (record.info & 0xf0) {
    case PAGE_UPDATE:
      if (blockId === 0) update(page, record, block);
      else if (blockId === 1) completeSplit(page, record);
      else throw strayBlock(record, blockId);
      return true;
    case DELETE:
      if (blockId !== 0) throw strayBlock(record, blockId);
      deleteDead(page, record, version);
      return true;
    case PAGE_SPLIT:
      if (blockId === 0) completeSplit(page, record);
      else split(page, record, block);
      return true;
    case PAGE_DELETE:
      if (blockId === 0) markDeleted(page, record);
      else if (blockId === 1) pageIndexTupleDelete(page, record.bytes.readUInt16LE(record.mainOffset + 8));
      else throw strayBlock(record, blockId);
      return true;
    default:
      throw unknownType(record);
  }
}

/** What remains to be done on a page that was restored from the record's image; false when nothing does. */
export function redoGistOnImage(page: Buffer, record: WalRecord, blockId: number, _version: PgVersion): boolean {
  const type = record.info & 0xf0;
  if (!((type === PAGE_UPDATE && blockId === 1) || (type === PAGE_SPLIT && blockId === 0))) return false;
  completeSplit(page, record);
  return true;
}

/** Blanks what may differ between a page of the primary and the same page replayed (gist_mask). */
export function maskGist(page: Buffer, _blk: number, _version: PgVersion): void {
  maskPageLsnAndChecksum(page);
  maskPageHintBits(page);
  maskUnusedSpace(page);
  const opaque = page.readUInt16LE(16);
  page.fill(0, opaque + NSN, opaque + NSN + 8);
  const flags = page.readUInt16LE(opaque + FLAGS);
  if ((flags & F_LEAF) !== 0) maskLpFlags(page);
  page.writeUInt16LE((flags | F_FOLLOW_RIGHT) & ~F_HAS_GARBAGE, opaque + FLAGS);
}

/** PAGE_UPDATE, block 0. Main data: u16 tuples to delete, u16 tuples to add. Block data: u16[] offset numbers, then the tuples. */
function update(page: Buffer, record: WalRecord, block: WalBlock): void {
  const bytes = record.bytes;
  const deleteCount = bytes.readUInt16LE(record.mainOffset);
  const insertCount = bytes.readUInt16LE(record.mainOffset + 2);
  const end = block.dataOffset + block.dataLength;
  let at = block.dataOffset + deleteCount * 2;
  if (deleteCount === 1 && insertCount === 1) {
    // The primary puts the new tuple where the old one was, so that the others stay in their places.
    const size = tupleSize(bytes, at);
    if (!pageIndexTupleOverwrite(page, bytes.readUInt16LE(block.dataOffset), bytes.subarray(at, at + size))) {
      throw misfit(record, `tuple of ${size} bytes does not fit in the place of another`);
    }
    at += size;
  } else if (deleteCount > 0) {
    deleteItems(page, bytes, block.dataOffset, deleteCount);
    const opaque = specialOffset(page, record, OPAQUE_SIZE);
    const flags = page.readUInt16LE(opaque + FLAGS);
    if ((flags & F_LEAF) !== 0) page.writeUInt16LE(flags | F_TUPLES_DELETED, opaque + FLAGS);
  }
  addTuples(page, record, at, end);
}

/** DELETE. Main data: u32 xid, u16 number of tuples, then u16[] offset numbers; from 16, u8 whether the table is a catalog, at 6. */
function deleteDead(page: Buffer, record: WalRecord, version: PgVersion): void {
  const main = record.mainOffset;
  const offsets = main + (versionFacts(version).redo.isCatalogRel ? 8 : 6);
  deleteItems(page, record.bytes, offsets, record.bytes.readUInt16LE(main + 4));
  const opaque = specialOffset(page, record, OPAQUE_SIZE);
  page.writeUInt16LE(page.readUInt16LE(opaque + FLAGS) & ~F_HAS_GARBAGE, opaque + FLAGS);
}

/**
 * PAGE_SPLIT, blocks 1 and up. Main data: u32 right link of the page before the split, (4 unused) u64 its NSN, u8 whether it was a leaf,
 * (1 unused) u16 number of pages, u8 whether they lead to the right until their downlinks are there. Block data: u32 number of tuples,
 * the tuples. When the root is split it stays in its block, as the first of the pages, and links nowhere.
 */
function split(page: Buffer, record: WalRecord, block: WalBlock): void {
  const { bytes, mainOffset: main } = record;
  const wasLeaf = bytes[main + 16] !== 0;
  const pageCount = bytes.readUInt16LE(main + 18);
  const followRight = bytes[main + 20] !== 0;
  const isRoot = block.blk === ROOT_BLOCK;
  const isLast = block.id === pageCount;
  const isRootSplit = blockNumber(record, 1) === ROOT_BLOCK;
  if (block.id > pageCount) throw strayBlock(record, block.id);

  pageInit(page, OPAQUE_SIZE);
  const opaque = BLOCK_SIZE - OPAQUE_SIZE;
  let rightLink = INVALID_BLOCK;
  if (!isRoot) rightLink = isLast ? bytes.readUInt32LE(main) : blockNumber(record, block.id + 1);
  // The NSN stands in the record as one number of 8 bytes, low half first.
  bytes.copy(page, opaque + NSN, main + 12, main + 16);
  bytes.copy(page, opaque + NSN + 4, main + 8, main + 12);
  page.writeUInt32LE(rightLink, opaque + RIGHT_LINK);
  let flags = wasLeaf && !isRoot ? F_LEAF : 0;
  if (!isRoot && !isLast && !isRootSplit && followRight) flags |= F_FOLLOW_RIGHT;
  page.writeUInt16LE(flags, opaque + FLAGS);
  page.writeUInt16LE(GIST_PAGE_ID, opaque + PAGE_ID);
  addTuples(page, record, block.dataOffset + 4, block.dataOffset + block.dataLength);
}

/** Appends the tuples in the record's bytes [at, end), which follow one another without padding. */
function addTuples(page: Buffer, record: WalRecord, at: number, end: number): void {
  let offsetNumber = pageMaxOffset(page) + 1;
  while (at < end) {
    const size = tupleSize(record.bytes, at);
    addItem(page, record, record.bytes, at, size, offsetNumber++);
    at += size;
  }
}

/** PAGE_DELETE, block 0. Main data: u64 deleting full xid, u16 offset number of the downlink in the parent. */
function markDeleted(page: Buffer, record: WalRecord): void {
  const opaque = specialOffset(page, record, OPAQUE_SIZE);
  page.writeUInt16LE(page.readUInt16LE(opaque + FLAGS) | F_DELETED, opaque + FLAGS);
  record.bytes.copy(page, PAGE_CONTENTS, record.mainOffset, record.mainOffset + 8);
  page.writeUInt16LE(PAGE_CONTENTS + 8, 12);
}

/** The page's right half has its downlink now: its NSN says when it got it, and nobody needs to follow the right link any more. */
function completeSplit(page: Buffer, record: WalRecord): void {
  const opaque = specialOffset(page, record, OPAQUE_SIZE);
  page.writeUInt32LE(Math.floor(record.endLsn / 0x100000000), opaque + NSN);
  page.writeUInt32LE(record.endLsn % 0x100000000, opaque + NSN + 4);
  page.writeUInt16LE(page.readUInt16LE(opaque + FLAGS) & ~F_FOLLOW_RIGHT, opaque + FLAGS);
}
