/**
 * Pages of heaps and indexes: the header, line pointers, and the operations that redo repeats, with exactly the bytes that Postgres makes
 * (bufpage.h, itemid.h, bufpage.c; the same in 15, 16, 17 and 18).
 *
 *   0   u32  LSN, high half      } the LSN after the last record that changed the page
 *   4   u32  LSN, low half       } (halves in this order, unlike an LSN anywhere else)
 *   8   u16  checksum
 *   10  u16  flags: PD_*
 *   12  u16  lower: end of the line pointers
 *   14  u16  upper: start of the items; 0 = the page was never initialised
 *   16  u16  special: start of the access method's own space at the end
 *   18  u16  page size | layout version (0x2004)
 *   20  u32  oldest xid whose pruning may free space, or 0
 *   24  line pointers, u32 each: bits 0..14 offset, 15..16 flags (LP_*), 17..31 length
 *
 * Offset numbers count from 1. Items are laid out downwards from `special`, each at a multiple of 8. Which bytes lie between lower and
 * upper has no meaning, yet the operations here leave there what Postgres leaves.
 *
 * A page that cannot be what it says throws PageError before anything is changed, so that damage does not spread.
 */

import { BLOCK_SIZE } from './page-size.ts';
import { maxAlign } from './lsn.ts';
import type { Lsn } from './lsn.ts';

export { BLOCK_SIZE };
export const PAGE_HEADER_SIZE = 24;
export const ITEM_ID_SIZE = 4;
const PAGE_SIZE_AND_VERSION = BLOCK_SIZE | 4;

export const PD_HAS_FREE_LINES = 0x0001;
export const PD_PAGE_FULL = 0x0002;
export const PD_ALL_VISIBLE = 0x0004;

export const LP_UNUSED = 0;
export const LP_NORMAL = 1;
export const LP_REDIRECT = 2;
export const LP_DEAD = 3;

/** Flags of pageAddItem. */
export const PAI_OVERWRITE = 1;
export const PAI_IS_HEAP = 2;

export const MAX_HEAP_TUPLES_PER_PAGE = 291;
export const MAX_INDEX_TUPLES_PER_PAGE = 408;

/** A page whose header or line pointers contradict each other, or an operation that the page cannot take. */
export class PageError extends Error {
  override readonly name = 'PageError';
}

// --- Header ---

export function pageLsn(page: Buffer): Lsn {
  return page.readUInt32LE(0) * 0x100000000 + page.readUInt32LE(4);
}

export function setPageLsn(page: Buffer, lsn: Lsn): void {
  page.writeUInt32LE(Math.floor(lsn / 0x100000000), 0);
  page.writeUInt32LE(lsn >>> 0, 4);
}

export function pageChecksum(page: Buffer): number {
  return u16(page, 8);
}

export function setPageChecksum(page: Buffer, checksum: number): void {
  put16(page, 8, checksum);
}

export function pageFlags(page: Buffer): number {
  return u16(page, 10);
}

export function setPageFlags(page: Buffer, flags: number): void {
  put16(page, 10, flags);
}

/** Sets the bits of `flag` when `on`, clears them otherwise. */
export function setPageFlag(page: Buffer, flag: number, on: boolean): void {
  put16(page, 10, on ? u16(page, 10) | flag : u16(page, 10) & ~flag);
}

export function pageLower(page: Buffer): number {
  return u16(page, 12);
}

export function setPageLower(page: Buffer, lower: number): void {
  put16(page, 12, lower);
}

export function pageUpper(page: Buffer): number {
  return u16(page, 14);
}

export function setPageUpper(page: Buffer, upper: number): void {
  put16(page, 14, upper);
}

export function pageSpecial(page: Buffer): number {
  return u16(page, 16);
}

export function setPageSpecial(page: Buffer, special: number): void {
  put16(page, 16, special);
}

export function pageSizeVersion(page: Buffer): number {
  return u16(page, 18);
}

export function pagePruneXid(page: Buffer): number {
  return page.readUInt32LE(20);
}

export function setPagePruneXid(page: Buffer, xid: number): void {
  page.writeUInt32LE(xid >>> 0, 20);
}

/** Notes that `xid` may leave something to prune, unless an older xid is noted already (PageSetPrunable). */
export function setPagePrunable(page: Buffer, xid: number): void {
  const noted = pagePruneXid(page);
  if (noted === 0 || xidPrecedes(xid, noted)) setPagePruneXid(page, xid);
}

/** True when the page was never initialised. */
export function pageIsNew(page: Buffer): boolean {
  return u16(page, 14) === 0;
}

/** True when the page has no line pointers. */
export function pageIsEmpty(page: Buffer): boolean {
  return u16(page, 12) <= PAGE_HEADER_SIZE;
}

/** The number of line pointers, which is also the highest offset number. */
export function pageMaxOffset(page: Buffer): number {
  const lower = u16(page, 12);
  return lower <= PAGE_HEADER_SIZE ? 0 : (lower - PAGE_HEADER_SIZE) >>> 2;
}

/** xid order modulo 2^32 (TransactionIdPrecedes): permanent xids (below 3) come before all others. */
export function xidPrecedes(a: number, b: number): boolean {
  if (a < 3 || b < 3) return a < b;
  return ((a - b) | 0) < 0;
}

// --- Line pointers ---

/** The line pointer itself, as its 32 bits. Offset numbers count from 1. */
export function itemId(page: Buffer, offset: number): number {
  const at = PAGE_HEADER_SIZE - ITEM_ID_SIZE + offset * ITEM_ID_SIZE;
  if (at < 0 || at + ITEM_ID_SIZE > page.length) throw new RangeError(`line pointer ${offset} is outside of its page`);
  return (page[at]! | (page[at + 1]! << 8) | (page[at + 2]! << 16) | (page[at + 3]! << 24)) >>> 0;
}

export function setItemId(page: Buffer, offset: number, id: number): void {
  const at = PAGE_HEADER_SIZE - ITEM_ID_SIZE + offset * ITEM_ID_SIZE;
  if (at < 0 || at + ITEM_ID_SIZE > page.length) throw new RangeError(`line pointer ${offset} is outside of its page`);
  page[at] = id;
  page[at + 1] = id >>> 8;
  page[at + 2] = id >>> 16;
  page[at + 3] = id >>> 24;
}

export function makeItemId(itemOffset: number, flags: number, length: number): number {
  return (itemOffset | (flags << 15) | (length << 17)) >>> 0;
}

/** Where an item lies in the page; for LP_REDIRECT the offset number it points to. */
export function itemOffset(page: Buffer, offset: number): number {
  return itemId(page, offset) & 0x7fff;
}

export function itemFlags(page: Buffer, offset: number): number {
  return (itemId(page, offset) >>> 15) & 3;
}

export function itemLength(page: Buffer, offset: number): number {
  return itemId(page, offset) >>> 17;
}

/** The bytes of an item: a view of the page. Throws PageError when the line pointer has no storage or points outside the page. */
export function pageItem(page: Buffer, offset: number): Buffer {
  const id = offset >= 1 && offset <= pageMaxOffset(page) ? itemId(page, offset) : 0;
  const start = id & 0x7fff;
  const length = id >>> 17;
  if (length === 0 || start < PAGE_HEADER_SIZE || start + length > BLOCK_SIZE) {
    throw new PageError(`item ${offset} of ${pageMaxOffset(page)} is ${length} bytes at ${start}`);
  }
  return page.subarray(start, start + length);
}

export function setItemNormal(page: Buffer, offset: number, start: number, length: number): void {
  setItemId(page, offset, makeItemId(start, LP_NORMAL, length));
}

export function setItemUnused(page: Buffer, offset: number): void {
  setItemId(page, offset, 0);
}

export function setItemDead(page: Buffer, offset: number): void {
  setItemId(page, offset, makeItemId(0, LP_DEAD, 0));
}

/** Marks an item dead and keeps its storage (index entries). */
export function markItemDead(page: Buffer, offset: number): void {
  setItemId(page, offset, (itemId(page, offset) & ~(3 << 15)) | (LP_DEAD << 15));
}

export function setItemRedirect(page: Buffer, offset: number, target: number): void {
  setItemId(page, offset, makeItemId(target, LP_REDIRECT, 0));
}

// --- Operations ---

/** Zeroes the page and gives it an empty page's header, with `specialSize` (rounded up to 8) bytes at its end. */
export function pageInit(page: Buffer, specialSize: number): void {
  page.fill(0, 0, BLOCK_SIZE);
  const special = BLOCK_SIZE - maxAlign(specialSize);
  put16(page, 12, PAGE_HEADER_SIZE);
  put16(page, 14, special);
  put16(page, 16, special);
  put16(page, 18, PAGE_SIZE_AND_VERSION);
}

/**
 * Adds an item and returns its offset number, or 0 when it does not fit or the place asked for cannot be had (PageAddItemExtended).
 * `offset` 0 takes the first free line pointer that the page's hint allows. With PAI_OVERWRITE the line pointer must be unused or one
 * past the last; without, the line pointers from `offset` on move up. PAI_IS_HEAP limits the number of line pointers.
 */
export function pageAddItem(page: Buffer, item: Uint8Array, offset: number, flags: number): number {
  const at = pageReserveItem(page, item.length, offset, flags);
  if (at !== 0) page.set(item, pageUpper(page));
  return at;
}

/** As pageAddItem, for an item of which the caller writes all `length` bytes, from the page's upper end on. */
export function pageReserveItem(page: Buffer, length: number, offset: number, flags: number): number {
  checkHeader(page, false);
  const limit = pageMaxOffset(page) + 1;
  let at = offset;
  let shuffle = false;
  if (at !== 0) {
    if (at < limit) {
      if ((flags & PAI_OVERWRITE) === 0) shuffle = true;
      else if (!isFree(itemId(page, at))) return 0;
    }
  } else if ((pageFlags(page) & PD_HAS_FREE_LINES) !== 0) {
    at = 1;
    while (at < limit && !isFree(itemId(page, at))) at++;
    if (at >= limit) setPageFlag(page, PD_HAS_FREE_LINES, false);
  } else {
    at = limit;
  }
  if (at > limit) return 0;
  if ((flags & PAI_IS_HEAP) !== 0 && at > MAX_HEAP_TUPLES_PER_PAGE) return 0;

  const lower = at === limit || shuffle ? pageLower(page) + ITEM_ID_SIZE : pageLower(page);
  const upper = pageUpper(page) - maxAlign(length);
  if (lower > upper) return 0;

  const pointer = PAGE_HEADER_SIZE + (at - 1) * ITEM_ID_SIZE;
  if (shuffle) page.copyWithin(pointer + ITEM_ID_SIZE, pointer, pointer + (limit - at) * ITEM_ID_SIZE);
  setItemNormal(page, at, upper, length);
  put16(page, 12, lower);
  put16(page, 14, upper);
  return at;
}

/** Closes the gaps between the items of a heap page and drops unused line pointers at the end (PageRepairFragmentation). */
export function pageRepairFragmentation(page: Buffer): void {
  const { lower, upper, special } = checkHeader(page, true);
  const lineCount = pageMaxOffset(page);
  let kept = 0;
  let unused = 0;
  let total = 0;
  let lastUsed = 0;
  // Every prune comes here, and looks at all line pointers.
  const view = new DataView(page.buffer, page.byteOffset, page.length);
  for (let i = 1, at = PAGE_HEADER_SIZE; i <= lineCount; i++, at += ITEM_ID_SIZE) {
    const id = view.getUint32(at, true);
    if (((id >>> 15) & 3) === LP_UNUSED) {
      unused++;
      if (id !== 0) view.setUint32(at, 0, true);
      continue;
    }
    lastUsed = i;
    if (id >>> 17 === 0) continue;
    const start = id & 0x7fff;
    if (start < upper || start >= special)
      throw new PageError(`item ${i} is at ${start}, items lie in [${upper}, ${special})`);
    total += keep(kept++, i, start, id >>> 17);
  }
  if (kept > 0 && total > special - lower) {
    throw new PageError(`items need ${total} bytes, ${special - lower} are available`);
  }

  if (kept === 0) put16(page, 14, special);
  else compactify(page, view, kept);
  unused -= lineCount - lastUsed;
  put16(page, 12, pageLower(page) - (lineCount - lastUsed) * ITEM_ID_SIZE);
  setPageFlag(page, PD_HAS_FREE_LINES, unused > 0);
}

/** Drops unused line pointers at the end of a heap page, except the first one (PageTruncateLinePointerArray). */
export function pageTruncateLinePointerArray(page: Buffer): void {
  let count = pageMaxOffset(page);
  const before = count;
  while (count > 1 && itemFlags(page, count) === LP_UNUSED) count--;
  let hasUnused = false;
  for (let i = count; i >= 1 && !hasUnused; i--) hasUnused = itemFlags(page, i) === LP_UNUSED;
  put16(page, 12, pageLower(page) - (before - count) * ITEM_ID_SIZE);
  setPageFlag(page, PD_HAS_FREE_LINES, hasUnused);
}

/** Removes one item of an index page and its line pointer; later offset numbers go down by one (PageIndexTupleDelete). */
export function pageIndexTupleDelete(page: Buffer, offset: number): void {
  checkHeader(page, true);
  const { start, size } = checkItem(page, offset);
  const pointer = PAGE_HEADER_SIZE + (offset - 1) * ITEM_ID_SIZE;
  page.copyWithin(pointer, pointer + ITEM_ID_SIZE, pageLower(page));
  put16(page, 12, pageLower(page) - ITEM_ID_SIZE);
  moveItemsUp(page, start, size, false);
}

/** Removes items of an index page. `offsets` rise (PageIndexMultiDelete). */
export function pageIndexMultiDelete(page: Buffer, offsets: ArrayLike<number>): void {
  if (offsets.length <= 2) {
    for (let i = offsets.length - 1; i >= 0; i--) pageIndexTupleDelete(page, offsets[i]!);
    return;
  }
  const { lower, special } = checkHeader(page, true);
  const lineCount = pageMaxOffset(page);
  let next = 0;
  let kept = 0;
  let total = 0;
  for (let i = 1; i <= lineCount; i++) {
    const { start, length } = checkItem(page, i);
    if (next < offsets.length && offsets[next] === i) {
      next++;
    } else {
      keptIds[kept] = itemId(page, i);
      total += keep(kept, kept + 1, start, length);
      kept++;
    }
  }
  if (next !== offsets.length) throw new PageError(`offset numbers to delete do not rise or are above ${lineCount}`);
  if (total > special - lower) throw new PageError(`items need ${total} bytes, ${special - lower} are available`);

  for (let i = 0; i < kept; i++) setItemId(page, i + 1, keptIds[i]!);
  put16(page, 12, PAGE_HEADER_SIZE + kept * ITEM_ID_SIZE);
  if (kept > 0) compactify(page, new DataView(page.buffer, page.byteOffset, page.length), kept);
  else put16(page, 14, special);
}

/** Removes an item of an index page but keeps the other offset numbers (PageIndexTupleDeleteNoCompact). */
export function pageIndexTupleDeleteNoCompact(page: Buffer, offset: number): void {
  checkHeader(page, true);
  const { start, size } = checkItem(page, offset);
  if (offset < pageMaxOffset(page)) setItemUnused(page, offset);
  else put16(page, 12, pageLower(page) - ITEM_ID_SIZE);
  moveItemsUp(page, start, size, true);
}

/**
 * Puts another item in the place of one, moving the items below it as needed; line pointer flags stay (PageIndexTupleOverwrite).
 * Returns false, with nothing changed, when it does not fit.
 */
export function pageIndexTupleOverwrite(page: Buffer, offset: number, item: Uint8Array): boolean {
  const { lower, upper } = checkHeader(page, true);
  const { start, size } = checkItem(page, offset);
  const newSize = maxAlign(item.length);
  if (newSize > size + (upper - lower)) return false;
  const shift = size - newSize;
  if (shift !== 0) moveItemsUp(page, start, shift, true);
  setItemId(page, offset, makeItemId(start + shift, itemFlags(page, offset), item.length));
  page.set(item, start + shift);
  return true;
}

/** Free space less one line pointer: what an index page can take (PageGetFreeSpace). */
export function pageGetFreeSpace(page: Buffer): number {
  return pageGetFreeSpaceForMultipleTuples(page, 1);
}

/** Free space less `count` line pointers (PageGetFreeSpaceForMultipleTuples). */
export function pageGetFreeSpaceForMultipleTuples(page: Buffer, count: number): number {
  return Math.max(0, pageUpper(page) - pageLower(page) - count * ITEM_ID_SIZE);
}

/** Free space without room for a line pointer (PageGetExactFreeSpace). */
export function pageGetExactFreeSpace(page: Buffer): number {
  return Math.max(0, pageUpper(page) - pageLower(page));
}

/** What a heap page can take: none when all line pointers are in use (PageGetHeapFreeSpace). */
export function pageGetHeapFreeSpace(page: Buffer): number {
  const space = pageGetFreeSpace(page);
  const lineCount = pageMaxOffset(page);
  if (space === 0 || lineCount < MAX_HEAP_TUPLES_PER_PAGE) return space;
  if ((pageFlags(page) & PD_HAS_FREE_LINES) === 0) return 0;
  for (let i = 1; i <= lineCount; i++) if (itemFlags(page, i) === LP_UNUSED) return space;
  return 0;
}

/** Copies the special space of one page to another of the same layout (part of PageGetTempPageCopySpecial). */
export function copySpecial(from: Buffer, to: Buffer): void {
  from.copy(to, pageSpecial(to), pageSpecial(from), BLOCK_SIZE);
}

// --- How items are moved ---

// Work space of one operation: which items stay. No operation calls another one while it uses these.
const MAX_LINES = (BLOCK_SIZE - PAGE_HEADER_SIZE) / ITEM_ID_SIZE;
const keptOffset = new Uint16Array(MAX_LINES);
const keptStart = new Uint16Array(MAX_LINES);
const keptSize = new Uint16Array(MAX_LINES);
const keptIds = new Uint32Array(MAX_LINES);
const scratch = Buffer.alloc(BLOCK_SIZE);

/** Notes that an item stays, under the offset number it will have; returns its size in the page. */
function keep(index: number, offset: number, start: number, length: number): number {
  const size = maxAlign(length);
  keptOffset[index] = offset;
  keptStart[index] = start;
  keptSize[index] = size;
  return size;
}

/**
 * Lays the kept items out downwards from `special` in order of line pointer. Postgres has a fast path for items that are in that order
 * already; it makes the same bytes, so there is one path here: skip what is in place, copy the rest aside, put it back in runs.
 */
function compactify(page: Buffer, view: DataView, count: number): void {
  let upper = pageSpecial(page);
  let i = 0;
  while (i < count && keptStart[i]! + keptSize[i]! === upper) upper -= keptSize[i++]!;
  if (i < count) {
    page.copy(scratch, pageUpper(page), pageUpper(page), pageSpecial(page));
    let runEnd = keptStart[i]! + keptSize[i]!;
    let runStart = runEnd;
    for (; i < count; i++) {
      const start = keptStart[i]!;
      const size = keptSize[i]!;
      if (start + size !== runStart) {
        scratch.copy(page, upper, runStart, runEnd);
        runEnd = start + size;
      }
      upper -= size;
      runStart = start;
      const pointer = PAGE_HEADER_SIZE + (keptOffset[i]! - 1) * ITEM_ID_SIZE;
      view.setUint32(pointer, (view.getUint32(pointer, true) & ~0x7fff) | upper, true);
    }
    scratch.copy(page, upper, runStart, runEnd);
  }
  put16(page, 14, upper);
}

/** Moves the items below `start` up by `shift` (down when negative), and their line pointers with them. */
function moveItemsUp(page: Buffer, start: number, shift: number, onlyWithStorage: boolean): void {
  const upper = pageUpper(page);
  page.copyWithin(upper + shift, upper, start);
  put16(page, 14, upper + shift);
  const lineCount = pageMaxOffset(page);
  for (let i = 1; i <= lineCount; i++) {
    const id = itemId(page, i);
    if ((id & 0x7fff) <= start && (!onlyWithStorage || id >>> 17 !== 0)) {
      setItemId(page, i, (id & ~0x7fff) | (((id & 0x7fff) + shift) & 0x7fff));
    }
  }
}

function checkHeader(page: Buffer, aligned: boolean): { lower: number; upper: number; special: number } {
  const lower = pageLower(page);
  const upper = pageUpper(page);
  const special = pageSpecial(page);
  if (
    lower < PAGE_HEADER_SIZE ||
    lower > upper ||
    upper > special ||
    special > BLOCK_SIZE ||
    (aligned && special % 8 !== 0)
  ) {
    throw new PageError(`page header says lower ${lower}, upper ${upper}, special ${special}`);
  }
  return { lower, upper, special };
}

/** Where an item of an index page lies; `size` is its length rounded up to 8. */
function checkItem(page: Buffer, offset: number): { start: number; length: number; size: number } {
  if (offset < 1 || offset > pageMaxOffset(page)) throw new PageError(`item ${offset} of ${pageMaxOffset(page)}`);
  const id = itemId(page, offset);
  const start = id & 0x7fff;
  const length = id >>> 17;
  if (length === 0 || start < pageUpper(page) || start + length > pageSpecial(page) || start % 8 !== 0) {
    throw new PageError(
      `item ${offset} is ${length} bytes at ${start}, items lie in [${pageUpper(page)}, ${pageSpecial(page)})`,
    );
  }
  return { start, length, size: maxAlign(length) };
}

function isFree(id: number): boolean {
  return ((id >>> 15) & 3) === LP_UNUSED && id >>> 17 === 0;
}

function u16(page: Buffer, at: number): number {
  return page[at]! | (page[at + 1]! << 8);
}

function put16(page: Buffer, at: number, value: number): void {
  page[at] = value;
  page[at + 1] = value >>> 8;
}
