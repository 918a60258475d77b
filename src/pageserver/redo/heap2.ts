/**
 * Redo of heap2 records, block by block (Postgres: heapam.c, pruneheap.c, heapam_xlog.h, heapdesc.c).
 *
 * Main data and blocks:
 *
 *   0x00 REWRITE, 0x70 NEW_CID   for logical decoding only; no blocks
 *   0x40 VISIBLE       u32 horizon, u8 flags                           0 visibility-map page, 1 heap page
 *   0x50 MULTI_INSERT  u8 flags, u8 pad, u16 count, u16 offsets[]      0 page; its data, each at an even offset: u16 length,
 *        (0xd0 +INIT: no offsets, items are 1, 2, …)                     u16 infomask2, u16 infomask, u8 hoff, tuple after byte 23
 *   0x60 LOCK_UPDATED  u32 xmax, u16 offset, u8 infobits, u8 flags     0 page
 *
 * From 17, one record prunes, freezes and vacuums:
 *   0x10, 0x20, 0x30 PRUNE_*  u8 reason, u8 flags, u32 horizon?        0 page; its data, each part only if its flag is set:
 *        0x10 freeze plans   u16 count, u16 pad, plan[count]             plan: u32 xmax, u16 infomask2, u16 infomask, u8 flags,
 *        0x20 redirections   u16 count, u16 from, to [count]                   u8 pad, u16 tuples
 *        0x40 dead           u16 count, u16 [count]
 *        0x80 now unused     u16 count, u16 [count]
 *        then the offsets of the tuples of all plans, u16 each
 * Until 16:
 *   0x10 PRUNE         u32 horizon, u16 redirected, u16 dead           0 page; its data: from, to pairs, dead, now unused (the rest)
 *   0x20 VACUUM        u16 now unused                                  0 page; its data: u16 offsets
 *   0x30 FREEZE_PAGE   u32 horizon, u16 count                          0 page; its data, 16: plan[count], then u16 offsets;
 *                                                                        15: {u32 xmax, u16 offset, u16 infomask2, u16 infomask,
 *                                                                        u8 flags, u8 pad}[count]
 */

import { maxAlign } from '../../postgres/lsn.ts';
import {
  BLOCK_SIZE,
  ITEM_ID_SIZE,
  LP_NORMAL,
  MAX_HEAP_TUPLES_PER_PAGE,
  PAGE_HEADER_SIZE,
  PD_ALL_VISIBLE,
  PageError,
  makeItemId,
  pageInit,
  pageIsNew,
  pageMaxOffset,
  pageRepairFragmentation,
  pageTruncateLinePointerArray,
  setItemDead,
  setItemRedirect,
  setItemUnused,
  setPageFlag,
  setPageLower,
  setPageUpper,
} from '../../postgres/page.ts';
import { versionFacts } from '../../postgres/version.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { findBlock } from '../../postgres/wal/record.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import { copyBytes, viewOf } from '../layers/copy-bytes.ts';
import { VISIBILITYMAP_VALID_BITS, visibilityMapBlock, visibilityMapByte, visibilityMapShift } from './derived.ts';
import {
  CID,
  COMBOCID,
  CTID,
  HOFF,
  INFOMASK,
  INFOMASK2,
  TUPLE_HEADER_SIZE,
  XMAX,
  XMIN,
  getU16,
  heapTupleAt,
  setXmaxBits,
} from './heap-tuple.ts';
import { HEAP_INIT_PAGE, INSERT_ALL_FROZEN_SET, INSERT_ALL_VISIBLE_CLEARED, addTuple, need } from './heap.ts';

const OPMASK = 0x70;
export const HEAP2_REWRITE = 0x00;
export const HEAP2_PRUNE_ON_ACCESS = 0x10;
export const HEAP2_PRUNE_VACUUM_SCAN = 0x20;
export const HEAP2_PRUNE_VACUUM_CLEANUP = 0x30;
export const HEAP2_VISIBLE = 0x40;
export const HEAP2_MULTI_INSERT = 0x50;
export const HEAP2_LOCK_UPDATED = 0x60;
export const HEAP2_NEW_CID = 0x70;

const PRUNE_CLEANUP_LOCK = 0x04;
const PRUNE_HAS_FREEZE_PLANS = 0x10;
const PRUNE_HAS_REDIRECTIONS = 0x20;
const PRUNE_HAS_DEAD_ITEMS = 0x40;
const PRUNE_HAS_NOW_UNUSED_ITEMS = 0x80;

const FREEZE_XVAC = 0x02;
const INVALID_XVAC = 0x04;
const FROZEN_XID = 2;
const FREEZE_PLAN_SIZE = 12;
const MULTI_INSERT_HEADER_SIZE = 7;

/** Replays the record on its block `blockId`. Returns whether the page's LSN is to become the record's. */
export function redoHeap2(page: Buffer, record: WalRecord, blockId: number, version: PgVersion): boolean {
  const operation = record.info & OPMASK;
  if (blockId !== 0 && !(blockId === 1 && operation === HEAP2_VISIBLE)) {
    throw new PageError(`records of this type change no block ${blockId}`);
  }
  const block = findBlock(record, blockId)!;
  switch (operation) {
    case HEAP2_VISIBLE:
      return redoVisible(page, record, blockId);
    case HEAP2_MULTI_INSERT:
      redoMultiInsert(page, record, block);
      break;
    case HEAP2_LOCK_UPDATED:
      redoLockUpdated(page, record);
      break;
    case HEAP2_PRUNE_ON_ACCESS:
    case HEAP2_PRUNE_VACUUM_SCAN:
    case HEAP2_PRUNE_VACUUM_CLEANUP:
      if (versionFacts(version).redo.pruneFreezeCombined) redoPruneFreeze(page, record, block);
      else if (operation === HEAP2_PRUNE_ON_ACCESS) redoPrune(page, record, block);
      else if (operation === HEAP2_PRUNE_VACUUM_SCAN) redoVacuum(page, record, block);
      else redoFreezePage(page, record, block, version);
      break;
    default:
      throw new PageError('records of this type change no blocks');
  }
  return true;
}

/**
 * The heap page's LSN stays: Postgres moves it only where checksums or wal_log_hints are on, which the record does not tell and
 * Strata's computes never have. The map page's LSN moves only when bits change.
 */
function redoVisible(page: Buffer, record: WalRecord, blockId: number): boolean {
  need(record, 5);
  if (blockId === 1) {
    setPageFlag(page, PD_ALL_VISIBLE, true);
    return false;
  }
  const heap = findBlock(record, 1);
  const map = findBlock(record, 0);
  if (heap === undefined || map?.blk !== visibilityMapBlock(heap.blk)) {
    throw new PageError(`visibility of block ${heap?.blk} set on map block ${map?.blk}`);
  }
  if (pageIsNew(page)) pageInit(page, 0);
  const flags = record.bytes[record.mainOffset + 4]! & VISIBILITYMAP_VALID_BITS;
  const byte = visibilityMapByte(heap.blk);
  const shift = visibilityMapShift(heap.blk);
  if (((page[byte]! >> shift) & VISIBILITYMAP_VALID_BITS) === flags) return false;
  page[byte] = page[byte]! | (flags << shift);
  return true;
}

function redoMultiInsert(page: Buffer, record: WalRecord, block: WalBlock): void {
  need(record, 4);
  const { bytes, mainOffset: main } = record;
  const flags = bytes[main]!;
  const count = getU16(bytes, main + 2);
  if ((record.info & HEAP_INIT_PAGE) !== 0) {
    pageInit(page, 0);
    fillPage(page, record, block, count);
  } else {
    need(record, 4 + count * 2);
    addTuples(page, record, block, count);
  }
  if ((flags & INSERT_ALL_VISIBLE_CLEARED) !== 0) setPageFlag(page, PD_ALL_VISIBLE, false);
  if ((flags & INSERT_ALL_FROZEN_SET) !== 0) setPageFlag(page, PD_ALL_VISIBLE, true);
}

function addTuples(page: Buffer, record: WalRecord, block: WalBlock, count: number): void {
  const { bytes, mainOffset: main } = record;
  const end = block.dataOffset + block.dataLength;
  let at = block.dataOffset;
  for (let i = 0; i < count; i++) {
    const offset = getU16(bytes, main + 4 + i * 2);
    at += (at - block.dataOffset) & 1;
    const next = at + MULTI_INSERT_HEADER_SIZE + (at + 2 <= end ? getU16(bytes, at) : 0);
    if (next > end) throw new PageError(`tuple ${i + 1} of ${count} leaves the record's data`);
    addTuple(page, record, block.blk, offset, at + 2, next);
    at = next;
  }
  if (at !== end) throw new PageError(`${end - at} bytes are left after ${count} tuples`);
}

/**
 * As addTuples, for items 1 to `count` of a page that is empty: all of what was loaded by COPY comes by this way, so it looks at each tuple once, and at the
 * page's header not at all.
 */
function fillPage(page: Buffer, record: WalRecord, block: WalBlock, count: number): void {
  const { sourceView: from, xid } = record;
  const to = viewOf(page);
  const start = record.sourceOffset + block.dataOffset;
  const end = start + block.dataLength;
  const ctidBlock = ((block.blk & 0xffff) << 16) | (block.blk >>> 16);
  let at = start;
  let lower = PAGE_HEADER_SIZE;
  let upper = BLOCK_SIZE;
  for (let item = 1; item <= count; item++) {
    at += (at - start) & 1;
    const body = at + MULTI_INSERT_HEADER_SIZE;
    const bodyLength = at + 2 <= end ? from.getUint16(at, true) : 0;
    if (body + bodyLength > end) throw new PageError(`tuple ${item} of ${count} leaves the record's data`);
    const length = TUPLE_HEADER_SIZE + bodyLength;
    upper -= maxAlign(length);
    if (lower + ITEM_ID_SIZE > upper || item > MAX_HEAP_TUPLES_PER_PAGE) {
      throw new PageError(`a tuple of ${length} bytes does not fit at item ${item}`);
    }
    to.setUint32(lower, makeItemId(upper, LP_NORMAL, length), true);
    lower += ITEM_ID_SIZE;
    to.setUint32(upper + XMIN, xid, true);
    to.setUint32(upper + CTID, ctidBlock, true);
    to.setUint16(upper + CTID + 4, item, true);
    to.setUint16(upper + INFOMASK2, from.getUint16(at + 2, true), true);
    to.setUint16(upper + INFOMASK, from.getUint16(at + 4, true) & ~COMBOCID, true);
    to.setUint8(upper + HOFF, from.getUint8(at + 6));
    copyBytes(from, body, to, upper + TUPLE_HEADER_SIZE, bodyLength);
    at = body + bodyLength;
  }
  if (at !== end) throw new PageError(`${end - at} bytes are left after ${count} tuples`);
  setPageLower(page, lower);
  setPageUpper(page, upper);
}

/** Unlike a plain lock, this leaves ctid, HEAP_HOT_UPDATED and the command id alone. */
function redoLockUpdated(page: Buffer, record: WalRecord): void {
  need(record, 8);
  const { bytes, mainOffset: main } = record;
  const tuple = heapTupleAt(page, getU16(bytes, main + 4));
  setXmaxBits(page, tuple, bytes[main + 6]!);
  bytes.copy(page, tuple + XMAX, main, main + 4);
}

function redoPruneFreeze(page: Buffer, record: WalRecord, block: WalBlock): void {
  need(record, 2);
  const flags = record.bytes[record.mainOffset + 1]!;
  const data = new OffsetReader(record, block);
  let planCount = 0;
  let plansAt = 0;
  if ((flags & PRUNE_HAS_FREEZE_PLANS) !== 0) {
    planCount = data.next();
    data.next();
    plansAt = data.skip(planCount * FREEZE_PLAN_SIZE);
  }
  let changed = false;
  if ((flags & PRUNE_HAS_REDIRECTIONS) !== 0) changed = redirectItems(page, data, data.next()) || changed;
  if ((flags & PRUNE_HAS_DEAD_ITEMS) !== 0) changed = killItems(page, data, data.next()) || changed;
  if ((flags & PRUNE_HAS_NOW_UNUSED_ITEMS) !== 0) changed = freeItems(page, data, data.next()) || changed;
  if (changed) {
    if ((flags & PRUNE_CLEANUP_LOCK) !== 0) pageRepairFragmentation(page);
    else pageTruncateLinePointerArray(page);
  }
  freezeByPlans(page, record, data, plansAt, planCount);
  data.finish();
}

function redoPrune(page: Buffer, record: WalRecord, block: WalBlock): void {
  need(record, 8);
  const data = new OffsetReader(record, block);
  redirectItems(page, data, getU16(record.bytes, record.mainOffset + 4));
  killItems(page, data, getU16(record.bytes, record.mainOffset + 6));
  freeItems(page, data, data.left());
  data.finish();
  pageRepairFragmentation(page);
}

function redoVacuum(page: Buffer, record: WalRecord, block: WalBlock): void {
  need(record, 2);
  const data = new OffsetReader(record, block);
  freeItems(page, data, getU16(record.bytes, record.mainOffset));
  data.finish();
  pageTruncateLinePointerArray(page);
}

function redoFreezePage(page: Buffer, record: WalRecord, block: WalBlock, version: PgVersion): void {
  need(record, 6);
  const { bytes } = record;
  const count = getU16(bytes, record.mainOffset + 4);
  const data = new OffsetReader(record, block);
  const at = data.skip(count * FREEZE_PLAN_SIZE);
  if (versionFacts(version).redo.freezePlans) {
    freezeByPlans(page, record, data, at, count);
  } else {
    for (let entry = at; entry < at + count * FREEZE_PLAN_SIZE; entry += FREEZE_PLAN_SIZE) {
      const tuple = heapTupleAt(page, getU16(bytes, entry + 4));
      freezeTuple(page, record, tuple, entry, entry + 6, bytes[entry + 10]!);
    }
  }
  data.finish();
}

function freezeByPlans(page: Buffer, record: WalRecord, data: OffsetReader, at: number, count: number): void {
  const { bytes } = record;
  for (let plan = at; plan < at + count * FREEZE_PLAN_SIZE; plan += FREEZE_PLAN_SIZE) {
    const tuples = getU16(bytes, plan + 10);
    for (let i = 0; i < tuples; i++) {
      freezeTuple(page, record, heapTupleAt(page, data.next()), plan, plan + 4, bytes[plan + 8]!);
    }
  }
}

/** heap_execute_freeze_tuple; `masksAt` is where the record has infomask2 and then infomask. */
function freezeTuple(
  page: Buffer,
  record: WalRecord,
  tuple: number,
  xmaxAt: number,
  masksAt: number,
  flags: number,
): void {
  record.bytes.copy(page, tuple + XMAX, xmaxAt, xmaxAt + 4);
  if ((flags & FREEZE_XVAC) !== 0) page.writeUInt32LE(FROZEN_XID, tuple + CID);
  if ((flags & INVALID_XVAC) !== 0) page.writeUInt32LE(0, tuple + CID);
  record.bytes.copy(page, tuple + INFOMASK2, masksAt, masksAt + 2);
  record.bytes.copy(page, tuple + INFOMASK, masksAt + 2, masksAt + 4);
}

function redirectItems(page: Buffer, data: OffsetReader, count: number): boolean {
  for (let i = 0; i < count; i++) {
    const from = existing(page, data.next());
    setItemRedirect(page, from, existing(page, data.next()));
  }
  return count > 0;
}

function killItems(page: Buffer, data: OffsetReader, count: number): boolean {
  for (let i = 0; i < count; i++) setItemDead(page, existing(page, data.next()));
  return count > 0;
}

function freeItems(page: Buffer, data: OffsetReader, count: number): boolean {
  for (let i = 0; i < count; i++) setItemUnused(page, existing(page, data.next()));
  return count > 0;
}

function existing(page: Buffer, offset: number): number {
  if (offset < 1 || offset > pageMaxOffset(page)) throw new PageError(`no item ${offset} of ${pageMaxOffset(page)}`);
  return offset;
}

/** Reads a block's data as u16s, never past its end. */
class OffsetReader {
  readonly #bytes: Buffer;
  readonly #end: number;
  #at: number;

  constructor(record: WalRecord, block: WalBlock) {
    this.#bytes = record.bytes;
    this.#at = block.dataOffset;
    this.#end = block.dataOffset + block.dataLength;
  }

  next(): number {
    return getU16(this.#bytes, this.skip(2));
  }

  /** Passes over bytes; returns where they begin in the record. */
  skip(length: number): number {
    const at = this.#at;
    if (at + length > this.#end) throw new PageError("the block's data ends too early");
    this.#at += length;
    return at;
  }

  /** How many u16s are left. */
  left(): number {
    return (this.#end - this.#at) >>> 1;
  }

  finish(): void {
    if (this.#at !== this.#end) throw new PageError(`${this.#end - this.#at} bytes of the block's data are left over`);
  }
}
