/**
 * Redo of heap records, block by block (Postgres: heapam.c, heapam_xlog.c from 18; heapam_xlog.h).
 *
 * Main data, and which block is what. `header` is {u16 infomask2, u16 infomask, u8 hoff}:
 *
 *   0x00 INSERT      u16 offset, u8 flags                                          0 page; its data: header, tuple after byte 23
 *   0x10 DELETE      u32 xmax, u16 offset, u8 infobits, u8 flags                   0 page
 *   0x20 UPDATE      u32 old xmax, u16 old offset, u8 old infobits, u8 flags,      0 new page; its data: u16 prefix?, u16 suffix?,
 *   0x40 HOT_UPDATE  u32 new xmax, u16 new offset                                    header, tuple after byte 23 less both
 *                                                                                  1 old page, when it is another
 *   0x30 TRUNCATE    for logical decoding only                                     none
 *   0x50 CONFIRM     u16 offset                                                    0 page
 *   0x60 LOCK        u32 xmax, u16 offset, u8 infobits, u8 flags                   0 page
 *   0x70 INPLACE     u16 offset (from 18 invalidations follow)                     0 page; its data: the tuple's data after hoff
 *
 * Bit 0x80 of an insert or update says that the new page is made anew. Clearing bits of the visibility map is not done here: it is a
 * change of another page (derived.ts).
 *
 * Invariant: a record that does not fit the page throws PageError.
 */

import {
  BLOCK_SIZE,
  PAI_IS_HEAP,
  PAI_OVERWRITE,
  PD_ALL_VISIBLE,
  PageError,
  itemLength,
  pageInit,
  pageMaxOffset,
  pageReserveItem,
  pageUpper,
  setPageFlag,
  setPagePrunable,
} from '../../postgres/page.ts';
import { findBlock } from '../../postgres/wal/record.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import { copyBytes, viewOf } from '../layers/copy-bytes.ts';
import {
  CID,
  COMBOCID,
  HOFF,
  INFOMASK,
  INFOMASK2,
  MOVED_PARTITIONS_BLOCK,
  MOVED_PARTITIONS_OFFSET,
  TUPLE_HEADER_SIZE,
  WAL_TUPLE_HEADER_SIZE,
  XMAX,
  XMIN,
  clearCommandId,
  getU16,
  heapTupleAt,
  isLockedOnly,
  putCtid,
  putU16,
  setHotUpdated,
  setXmaxBits,
} from './heap-tuple.ts';

const OPMASK = 0x70;
export const HEAP_INSERT = 0x00;
export const HEAP_DELETE = 0x10;
export const HEAP_UPDATE = 0x20;
export const HEAP_TRUNCATE = 0x30;
export const HEAP_HOT_UPDATE = 0x40;
export const HEAP_CONFIRM = 0x50;
export const HEAP_LOCK = 0x60;
export const HEAP_INPLACE = 0x70;
export const HEAP_INIT_PAGE = 0x80;

export const INSERT_ALL_VISIBLE_CLEARED = 0x01;
export const INSERT_ALL_FROZEN_SET = 0x20;
export const DELETE_ALL_VISIBLE_CLEARED = 0x01;
const DELETE_IS_SUPER = 0x08;
const DELETE_IS_PARTITION_MOVE = 0x10;
export const UPDATE_OLD_ALL_VISIBLE_CLEARED = 0x01;
export const UPDATE_NEW_ALL_VISIBLE_CLEARED = 0x02;
const UPDATE_PREFIX_FROM_OLD = 0x20;
const UPDATE_SUFFIX_FROM_OLD = 0x40;

/** Replays the record on its block `blockId`. Returns true: the page's LSN is to become the record's. */
export function redoHeap(page: Buffer, record: WalRecord, blockId: number): boolean {
  const operation = record.info & OPMASK;
  if (blockId !== 0 && !(blockId === 1 && (operation === HEAP_UPDATE || operation === HEAP_HOT_UPDATE))) {
    throw new PageError(`records of this type change no block ${blockId}`);
  }
  const block = findBlock(record, blockId)!;
  switch (operation) {
    case HEAP_INSERT:
      redoInsert(page, record, block);
      break;
    case HEAP_DELETE:
      redoDelete(page, record, block);
      break;
    case HEAP_UPDATE:
    case HEAP_HOT_UPDATE:
      redoUpdate(page, record, block, operation === HEAP_HOT_UPDATE);
      break;
    case HEAP_CONFIRM: {
      need(record, 2);
      const offset = getU16(record.bytes, record.mainOffset);
      putCtid(page, heapTupleAt(page, offset), block.blk, offset);
      break;
    }
    case HEAP_LOCK:
      redoLock(page, record, block);
      break;
    case HEAP_INPLACE:
      redoInplace(page, record, block);
      break;
    default:
      throw new PageError('records of this type change no blocks');
  }
  return true;
}

function redoInsert(page: Buffer, record: WalRecord, block: WalBlock): void {
  need(record, 3);
  const main = record.mainOffset;
  const flags = record.bytes[main + 2]!;
  if ((record.info & HEAP_INIT_PAGE) !== 0) pageInit(page, 0);
  const end = block.dataOffset + block.dataLength;
  addTuple(page, record, block.blk, getU16(record.bytes, main), block.dataOffset, end);
  if ((flags & INSERT_ALL_VISIBLE_CLEARED) !== 0) setPageFlag(page, PD_ALL_VISIBLE, false);
  // Set by no insert of a single tuple that is known, but 15 and 16 replay it.
  if ((flags & INSERT_ALL_FROZEN_SET) !== 0) setPageFlag(page, PD_ALL_VISIBLE, true);
}

function redoDelete(page: Buffer, record: WalRecord, block: WalBlock): void {
  need(record, 8);
  const { bytes, mainOffset: main } = record;
  const offset = getU16(bytes, main + 4);
  const flags = bytes[main + 7]!;
  const tuple = heapTupleAt(page, offset);
  setXmaxBits(page, tuple, bytes[main + 6]!);
  setHotUpdated(page, tuple, false);
  if ((flags & DELETE_IS_SUPER) === 0) bytes.copy(page, tuple + XMAX, main, main + 4);
  else page.writeUInt32LE(0, tuple + XMIN);
  clearCommandId(page, tuple);
  setPagePrunable(page, record.xid);
  if ((flags & DELETE_ALL_VISIBLE_CLEARED) !== 0) setPageFlag(page, PD_ALL_VISIBLE, false);
  if ((flags & DELETE_IS_PARTITION_MOVE) !== 0) putCtid(page, tuple, MOVED_PARTITIONS_BLOCK, MOVED_PARTITIONS_OFFSET);
  else putCtid(page, tuple, block.blk, offset);
}

/** The old tuple first, as the new one may take its ends from it. */
function redoUpdate(page: Buffer, record: WalRecord, block: WalBlock, hot: boolean): void {
  need(record, 14);
  const newBlock = findBlock(record, 0);
  if (newBlock === undefined) throw new PageError('an update without its new page');
  const samePage = findBlock(record, 1) === undefined;
  if (samePage || block.id === 1) redoUpdateOld(page, record, newBlock.blk, hot);
  if (block.id === 0) redoUpdateNew(page, record, newBlock, samePage);
}

function redoUpdateOld(page: Buffer, record: WalRecord, newBlk: number, hot: boolean): void {
  const { bytes, mainOffset: main } = record;
  const tuple = heapTupleAt(page, getU16(bytes, main + 4));
  setXmaxBits(page, tuple, bytes[main + 6]!);
  setHotUpdated(page, tuple, hot);
  bytes.copy(page, tuple + XMAX, main, main + 4);
  clearCommandId(page, tuple);
  putCtid(page, tuple, newBlk, getU16(bytes, main + 12));
  setPagePrunable(page, record.xid);
  if ((bytes[main + 7]! & UPDATE_OLD_ALL_VISIBLE_CLEARED) !== 0) setPageFlag(page, PD_ALL_VISIBLE, false);
}

function redoUpdateNew(page: Buffer, record: WalRecord, block: WalBlock, samePage: boolean): void {
  const { bytes, mainOffset: main } = record;
  const flags = bytes[main + 7]!;
  const offset = getU16(bytes, main + 12);
  let at = block.dataOffset;
  const end = at + block.dataLength;
  let prefix = 0;
  let suffix = 0;
  if ((flags & UPDATE_PREFIX_FROM_OLD) !== 0) {
    prefix = getU16(bytes, at);
    at += 2;
  }
  if ((flags & UPDATE_SUFFIX_FROM_OLD) !== 0) {
    suffix = getU16(bytes, at);
    at += 2;
  }
  if (!samePage && (record.info & HEAP_INIT_PAGE) !== 0) pageInit(page, 0);
  if (prefix === 0 && suffix === 0) addTuple(page, record, block.blk, offset, at, end, main + 8);
  else if (samePage) addTupleFromOld(page, record, block.blk, at, end, prefix, suffix);
  else throw new PageError('an update takes parts of an old tuple that is on another page');
  if ((flags & UPDATE_NEW_ALL_VISIBLE_CLEARED) !== 0) setPageFlag(page, PD_ALL_VISIBLE, false);
}

/** The new tuple is bitmap and padding from the record, prefix from the old one, data from the record, suffix from the old one. */
function addTupleFromOld(
  page: Buffer,
  record: WalRecord,
  blk: number,
  at: number,
  end: number,
  prefix: number,
  suffix: number,
): void {
  const { bytes, mainOffset: main } = record;
  const oldOffset = getU16(bytes, main + 4);
  const old = heapTupleAt(page, oldOffset);
  const oldLength = itemLength(page, oldOffset);
  const oldHoff = page[old + HOFF]!;
  const body = at + WAL_TUPLE_HEADER_SIZE;
  const bitmap = bytes[at + 4]! - TUPLE_HEADER_SIZE;
  const length = TUPLE_HEADER_SIZE + (end - body) + prefix + suffix;
  if (
    bitmap < 0 ||
    body + bitmap > end ||
    oldHoff + prefix > oldLength ||
    suffix > oldLength ||
    length > scratch.length
  ) {
    throw new PageError(`new tuple with prefix ${prefix} and suffix ${suffix} of an old tuple of ${oldLength} bytes`);
  }
  startTuple(scratch, scratchView, 0, record, blk, getU16(bytes, main + 12), at, main + 8);
  let to = TUPLE_HEADER_SIZE;
  let from = body;
  if (prefix > 0) {
    to += bytes.copy(scratch, to, from, from + bitmap);
    from += bitmap;
    to += page.copy(scratch, to, old + oldHoff, old + oldHoff + prefix);
  }
  to += bytes.copy(scratch, to, from, end);
  page.copy(scratch, to, old + oldLength - suffix, old + oldLength);
  scratch.copy(page, reserveTuple(page, getU16(bytes, main + 12), length), 0, length);
}

function redoLock(page: Buffer, record: WalRecord, block: WalBlock): void {
  need(record, 8);
  const { bytes, mainOffset: main } = record;
  const offset = getU16(bytes, main + 4);
  const tuple = heapTupleAt(page, offset);
  setXmaxBits(page, tuple, bytes[main + 6]!);
  if (isLockedOnly(page, tuple)) {
    setHotUpdated(page, tuple, false);
    putCtid(page, tuple, block.blk, offset);
  }
  bytes.copy(page, tuple + XMAX, main, main + 4);
  clearCommandId(page, tuple);
}

function redoInplace(page: Buffer, record: WalRecord, block: WalBlock): void {
  need(record, 2);
  const offset = getU16(record.bytes, record.mainOffset);
  const tuple = heapTupleAt(page, offset);
  const hoff = page[tuple + HOFF]!;
  const length = itemLength(page, offset) - hoff;
  if (length !== block.dataLength) {
    throw new PageError(`item ${offset} has ${length} bytes of data, the record has ${block.dataLength}`);
  }
  record.bytes.copy(page, tuple + hoff, block.dataOffset, block.dataOffset + length);
}

const scratch: Buffer = Buffer.alloc(BLOCK_SIZE);
const scratchView = viewOf(scratch);
let viewedPage = scratch;
let pageView = scratchView;

/** A view of the page; records of one page come one after the other, and a multi-insert has many tuples. */
function viewOfPage(page: Buffer): DataView {
  if (viewedPage !== page) {
    viewedPage = page;
    pageView = viewOf(page);
  }
  return pageView;
}

/**
 * Makes a tuple of the header and body in `record.bytes[at, end)` and adds it at `offset`. `xmaxAt` is where the record has the new
 * tuple's xmax, if it may have one.
 */
export function addTuple(
  page: Buffer,
  record: WalRecord,
  blk: number,
  offset: number,
  at: number,
  end: number,
  xmaxAt?: number,
): void {
  const length = TUPLE_HEADER_SIZE + end - at - WAL_TUPLE_HEADER_SIZE;
  if (length < TUPLE_HEADER_SIZE || length > BLOCK_SIZE) throw new PageError(`a tuple of ${length} bytes`);
  const view = viewOfPage(page);
  const tuple = reserveTuple(page, offset, length);
  startTuple(page, view, tuple, record, blk, offset, at, xmaxAt);
  const from = record.sourceOffset + at + WAL_TUPLE_HEADER_SIZE;
  copyBytes(record.sourceView, from, view, tuple + TUPLE_HEADER_SIZE, length - TUPLE_HEADER_SIZE);
}

/** Writes the fixed part of a new tuple; `at` is where the record has infomask2, infomask and hoff. */
function startTuple(
  to: Buffer,
  view: DataView,
  tuple: number,
  record: WalRecord,
  blk: number,
  offset: number,
  at: number,
  xmaxAt: number | undefined,
): void {
  const { bytes } = record;
  view.setUint32(tuple + XMIN, record.xid, true);
  view.setUint32(tuple + XMAX, xmaxAt === undefined ? 0 : bytes.readUInt32LE(xmaxAt), true);
  view.setUint32(tuple + CID, 0, true);
  putCtid(to, tuple, blk, offset);
  putU16(to, getU16(bytes, at), tuple + INFOMASK2);
  putU16(to, getU16(bytes, at + 2) & ~COMBOCID, tuple + INFOMASK);
  to[tuple + HOFF] = bytes[at + 4]!;
}

/** Where the tuple is to be written. */
function reserveTuple(page: Buffer, offset: number, length: number): number {
  if (offset < 1 || offset > pageMaxOffset(page) + 1) {
    throw new PageError(`a tuple for item ${offset} where ${pageMaxOffset(page)} are`);
  }
  if (pageReserveItem(page, length, offset, PAI_OVERWRITE | PAI_IS_HEAP) === 0) {
    throw new PageError(`a tuple of ${length} bytes does not fit at item ${offset}`);
  }
  return pageUpper(page);
}

/** The main data of a record must hold what its type reads. */
export function need(record: WalRecord, length: number): void {
  if (record.mainLength < length) throw new PageError(`main data of ${record.mainLength} bytes, ${length} needed`);
}
