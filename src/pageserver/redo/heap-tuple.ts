/**
 * Heap tuples as bytes in a page, and what redo changes in their headers. (Sources: htup_details.h, heapam_xlog.h.)
 *
 *   0   u32  xmin
 *   4   u32  xmax
 *   8   u32  command id, or xvac of a tuple that VACUUM FULL of before 9.0 moved
 *   12       ctid: u16 high half of the block number, u16 low half, u16 offset number
 *   18  u16  infomask2: number of attributes (11 bits), HEAP_KEYS_UPDATED, HEAP_HOT_UPDATED, HEAP_ONLY_TUPLE
 *   20  u16  infomask
 *   22  u8   hoff: where the data begins
 *   23       null bitmap, then padding to hoff
 *
 * A record carries of a new tuple only {u16 infomask2, u16 infomask, u8 hoff} and what comes after byte 23; the rest follows from the
 * record and the block.
 */

import { BLOCK_SIZE, LP_NORMAL, PageError, itemId, pageMaxOffset } from '../../postgres/page.ts';

export const TUPLE_HEADER_SIZE = 23;
export const WAL_TUPLE_HEADER_SIZE = 5;
export const XMIN = 0;
export const XMAX = 4;
export const CID = 8;
export const CTID = 12;
export const INFOMASK2 = 18;
export const INFOMASK = 20;
export const HOFF = 22;

const XMAX_KEYSHR_LOCK = 0x0010;
export const COMBOCID = 0x0020;
const XMAX_EXCL_LOCK = 0x0040;
const XMAX_LOCK_ONLY = 0x0080;
const XMAX_COMMITTED = 0x0400;
const XMAX_INVALID = 0x0800;
const XMAX_IS_MULTI = 0x1000;
const MOVED = 0xc000;
const LOCK_MASK = XMAX_EXCL_LOCK | XMAX_KEYSHR_LOCK;
const XMAX_BITS = XMAX_COMMITTED | XMAX_INVALID | XMAX_IS_MULTI | LOCK_MASK | XMAX_LOCK_ONLY;

const KEYS_UPDATED = 0x2000;
export const HOT_UPDATED = 0x4000;

/** A tuple moved to another partition has this as its ctid. */
export const MOVED_PARTITIONS_BLOCK = 0xffffffff;
export const MOVED_PARTITIONS_OFFSET = 0xfffd;

/** Where the tuple at this line pointer begins. Throws PageError unless it is a normal item that lies in the page. */
export function heapTupleAt(page: Buffer, offset: number): number {
  const id = offset >= 1 && offset <= pageMaxOffset(page) ? itemId(page, offset) : 0;
  const start = id & 0x7fff;
  const length = id >>> 17;
  if (((id >>> 15) & 3) !== LP_NORMAL || length < TUPLE_HEADER_SIZE || start + length > BLOCK_SIZE) {
    throw new PageError(`no tuple at item ${offset} of ${pageMaxOffset(page)} (line pointer 0x${id.toString(16)})`);
  }
  return start;
}

export function getU16(bytes: Buffer, at: number): number {
  return bytes[at]! | (bytes[at + 1]! << 8);
}

export function putU16(bytes: Buffer, value: number, at: number): void {
  bytes[at] = value;
  bytes[at + 1] = value >>> 8;
}

export function putCtid(bytes: Buffer, tuple: number, block: number, offset: number): void {
  putU16(bytes, block >>> 16, tuple + CTID);
  putU16(bytes, block & 0xffff, tuple + CTID + 2);
  putU16(bytes, offset, tuple + CTID + 4);
}

/**
 * Replaces what a tuple says about its xmax: clears all xmax bits, then sets those of a record's infobits
 * (fix_infomask_from_infobits).
 */
export function setXmaxBits(page: Buffer, tuple: number, infobits: number): void {
  let infomask = getU16(page, tuple + INFOMASK) & ~(XMAX_BITS | MOVED);
  let infomask2 = getU16(page, tuple + INFOMASK2) & ~KEYS_UPDATED;
  if ((infobits & 0x01) !== 0) infomask |= XMAX_IS_MULTI;
  if ((infobits & 0x02) !== 0) infomask |= XMAX_LOCK_ONLY;
  if ((infobits & 0x04) !== 0) infomask |= XMAX_EXCL_LOCK;
  if ((infobits & 0x08) !== 0) infomask |= XMAX_KEYSHR_LOCK;
  if ((infobits & 0x10) !== 0) infomask2 |= KEYS_UPDATED;
  putU16(page, infomask, tuple + INFOMASK);
  putU16(page, infomask2, tuple + INFOMASK2);
}

/** True when xmax only locks the tuple (HEAP_XMAX_IS_LOCKED_ONLY). */
export function isLockedOnly(page: Buffer, tuple: number): boolean {
  const infomask = getU16(page, tuple + INFOMASK);
  return (infomask & XMAX_LOCK_ONLY) !== 0 || (infomask & (XMAX_IS_MULTI | LOCK_MASK)) === XMAX_EXCL_LOCK;
}

export function setHotUpdated(page: Buffer, tuple: number, on: boolean): void {
  const infomask2 = getU16(page, tuple + INFOMASK2);
  putU16(page, on ? infomask2 | HOT_UPDATED : infomask2 & ~HOT_UPDATED, tuple + INFOMASK2);
}

/** Replay does not know command ids: it sets the first one, which is no combo id. */
export function clearCommandId(page: Buffer, tuple: number): void {
  page.fill(0, tuple + CID, tuple + CID + 4);
  putU16(page, getU16(page, tuple + INFOMASK) & ~COMBOCID, tuple + INFOMASK);
}
