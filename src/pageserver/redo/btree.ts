/**
 * Redo of btree records, block by block (Postgres: nbtxlog.c, nbtdedup.c, nbtree.h). The record layouts are the same in 15 to 18.
 *
 * Page: line pointers and index tuples; the first item of a page that has a right sibling is its high key. Special space:
 *   0   u32  left sibling, 0 for none (a deleted page keeps it)
 *   4   u32  right sibling, 0 for none
 *   8   u32  level, 0 for leaves
 *   12  u16  BTP_* flags
 *   14  u16  vacuum cycle id
 * A posting list tuple has TUPLE_AM_BIT and, in its item pointer, the offset of its list as the block number and 0x2000 | count as the
 * offset number; the list is an array of item pointers.
 *
 * Which record has which blocks:
 *   INSERT_*                 0 page, 1 child whose split is now complete (not LEAF, POST), 2 meta page (META)
 *   SPLIT_*                  0 left half, 1 right half (made anew), 2 right sibling, 3 child whose split is now complete (not in leaves)
 *   DEDUP, VACUUM, DELETE    0 page
 *   MARK_PAGE_HALFDEAD       0 leaf (made anew), 1 parent
 *   UNLINK_PAGE(_META)       0 target (made anew), 1 left sibling, 2 right sibling, 3 leaf of the subtree (made anew), 4 meta page
 *   NEWROOT                  0 root (made anew), 1 left child, 2 meta page
 *   META_CLEANUP             0 meta page; meta pages are always made anew
 *   REUSE_PAGE               none
 *
 * Invariant: the physical order of tuples is the primary's, as wal_consistency_checking compares bytes.
 */

import { maxAlign } from '../../postgres/lsn.ts';
import {
  itemLength,
  pageIndexTupleDelete,
  pageIndexTupleOverwrite,
  pageInit,
  pageMaxOffset,
} from '../../postgres/page.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { findBlock } from '../../postgres/wal/record.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import {
  ITEM_POINTER_SIZE,
  PAGE_CONTENTS,
  TUPLE_AM_BIT,
  TUPLE_HEADER_SIZE,
  TUPLE_INFO,
  TUPLE_SIZE_MASK,
  addItem,
  blockNumber,
  deleteItems,
  itemStart,
  misfit,
  readBlockId,
  specialOffset,
  strayBlock,
  tupleSize,
  unknownType,
  writeBlockId,
  writeItemPointer,
} from './index-tuple.ts';
import { maskLpFlags, maskPageHintBits, maskPageLsnAndChecksum, maskUnusedSpace } from './masks.ts';

const INSERT_LEAF = 0x00;
const INSERT_UPPER = 0x10;
const INSERT_META = 0x20;
const SPLIT_L = 0x30;
const SPLIT_R = 0x40;
const INSERT_POST = 0x50;
const DEDUP = 0x60;
const DELETE = 0x70;
const UNLINK_PAGE = 0x80;
const UNLINK_PAGE_META = 0x90;
const NEWROOT = 0xa0;
const MARK_PAGE_HALFDEAD = 0xb0;
const VACUUM = 0xc0;
const META_CLEANUP = 0xe0;

const OPAQUE_SIZE = 16;
const PREV = 0;
const NEXT = 4;
const LEVEL = 8;
const FLAGS = 12;
const CYCLE_ID = 14;

const BTP_LEAF = 0x001;
const BTP_ROOT = 0x002;
const BTP_DELETED = 0x004;
const BTP_META = 0x008;
const BTP_HALF_DEAD = 0x010;
const BTP_SPLIT_END = 0x020;
const BTP_HAS_GARBAGE = 0x040;
const BTP_INCOMPLETE_SPLIT = 0x080;
const BTP_HAS_FULLXID = 0x100;

const HIGH_KEY = 1;
const IS_POSTING = 0x2000;
const POSTING_COUNT_MASK = 0x0fff;

const META_MAGIC = 0x053162;
const META_SIZE = 48;

/** A page under construction, and the item pointers of a posting list: redo is synchronous, so one of each is enough. */
const scratchPage = Buffer.alloc(BLOCK_SIZE);
const scratchTids = Buffer.alloc(BLOCK_SIZE);

/** Replays the record on its block `blockId`; false when the record leaves that page alone. Sets no LSN. */
export function redoBtree(page: Buffer, record: WalRecord, blockId: number, _version: PgVersion): boolean {
  const block = findBlock(record, blockId);
  if (block === undefined) throw strayBlock(record, blockId);
  const type = record.info & 0xf0;
  switch (type) {
    case INSERT_LEAF:
    case INSERT_UPPER:
    case INSERT_META:
    case INSERT_POST:
      if (blockId === 0) insert(page, record, block, type === INSERT_POST);
      else if (blockId === 1 && type !== INSERT_LEAF && type !== INSERT_POST) clearIncompleteSplit(page, record);
      else if (blockId === 2 && type === INSERT_META) restoreMeta(page, record, block);
      else throw strayBlock(record, blockId);
      return true;
    case SPLIT_L:
    case SPLIT_R:
      if (blockId === 0) splitLeft(page, record, block, type === SPLIT_L);
      else if (blockId === 1) splitRight(page, record, block);
      else if (blockId === 2) setOpaque32(page, record, PREV, blockNumber(record, 1));
      else if (blockId === 3) clearIncompleteSplit(page, record);
      else throw strayBlock(record, blockId);
      return true;
    case DEDUP:
      if (blockId !== 0) throw strayBlock(record, blockId);
      deduplicate(page, record, block);
      return true;
    case VACUUM:
      if (blockId !== 0) throw strayBlock(record, blockId);
      vacuum(page, record, block, record.mainOffset);
      return true;
    case DELETE:
      if (blockId !== 0) throw strayBlock(record, blockId);
      vacuum(page, record, block, record.mainOffset + 4);
      return true;
    case MARK_PAGE_HALFDEAD:
      if (blockId === 0) initHalfDead(page, record, 8, 12, 16);
      else if (blockId === 1) removeDownlink(page, record);
      else throw strayBlock(record, blockId);
      return true;
    case UNLINK_PAGE:
    case UNLINK_PAGE_META:
      if (blockId === 4 && type === UNLINK_PAGE_META) restoreMeta(page, record, block);
      else unlink(page, record, blockId);
      return true;
    case NEWROOT:
      if (blockId === 0) newRoot(page, record, block);
      else if (blockId === 1) clearIncompleteSplit(page, record);
      else if (blockId === 2) restoreMeta(page, record, block);
      else throw strayBlock(record, blockId);
      return true;
    case META_CLEANUP:
      if (blockId !== 0) throw strayBlock(record, blockId);
      restoreMeta(page, record, block);
      return true;
    default:
      throw unknownType(record);
  }
}

/** Blanks what may differ between a page of the primary and the same page replayed (btree_mask). */
export function maskBtree(page: Buffer, _blk: number, _version: PgVersion): void {
  maskPageLsnAndChecksum(page);
  maskPageHintBits(page);
  maskUnusedSpace(page);
  const opaque = page.readUInt16LE(16);
  const flags = page.readUInt16LE(opaque + FLAGS);
  if ((flags & BTP_LEAF) !== 0) maskLpFlags(page);
  page.writeUInt16LE(flags & ~(BTP_HAS_GARBAGE | BTP_SPLIT_END), opaque + FLAGS);
  page.writeUInt16LE(0, opaque + CYCLE_ID);
}

/** INSERT_*, block 0. Main data: u16 offset number. Block data: the tuple; before it, for a posting split, u16 where to split. */
function insert(page: Buffer, record: WalRecord, block: WalBlock, isPostingSplit: boolean): void {
  const bytes = record.bytes;
  const offsetNumber = bytes.readUInt16LE(record.mainOffset);
  if (!isPostingSplit) {
    addItem(page, record, bytes, block.dataOffset, block.dataLength, offsetNumber);
    return;
  }
  const at = bytes.readUInt16LE(block.dataOffset);
  const newItem = copyTuple(bytes, block.dataOffset + 2);
  const posting = itemStart(page, record, offsetNumber - 1);
  const split = swapPosting(record, newItem, page, posting, at);
  split.copy(page, posting);
  addItem(page, record, newItem, 0, newItem.length, offsetNumber);
}

/**
 * SPLIT_*, block 0: keeps the left part of the page. Main data: u32 level, u16 first offset number that goes right, u16 offset number of
 * the new item, u16 where to split the posting list before the new item (0: there is none to split). Block data: the new item (if it goes
 * left, or a posting list is split), then the left page's new high key.
 */
function splitLeft(page: Buffer, record: WalRecord, block: WalBlock, newItemOnLeft: boolean): void {
  const bytes = record.bytes;
  const level = bytes.readUInt32LE(record.mainOffset);
  const firstRight = bytes.readUInt16LE(record.mainOffset + 4);
  const newItemOffset = bytes.readUInt16LE(record.mainOffset + 6);
  const postingAt = bytes.readUInt16LE(record.mainOffset + 8);

  let at = block.dataOffset;
  let newItem: Buffer | undefined;
  let replaced = 0;
  let replacement: Buffer | undefined;
  if (newItemOnLeft || postingAt !== 0) {
    newItem = copyTuple(bytes, at);
    at += maxAlign(newItem.length);
    if (postingAt !== 0) {
      replaced = newItemOffset - 1;
      replacement = swapPosting(record, newItem, page, itemStart(page, record, replaced), postingAt);
    }
  }

  const left = startCopy(page, record);
  addItem(left, record, bytes, at, maxAlign(tupleSize(bytes, at)), HIGH_KEY);
  let to = HIGH_KEY + 1;
  let from = firstDataKey(page, record);
  for (; from < firstRight; from++) {
    if (from === replaced && replacement !== undefined) {
      addItem(left, record, replacement, 0, replacement.length, to++);
      continue;
    }
    if (newItemOnLeft && from === newItemOffset && newItem !== undefined) {
      addItem(left, record, newItem, 0, newItem.length, to++);
    }
    addItem(left, record, page, itemStart(page, record, from), itemLength(page, from), to++);
  }
  if (newItemOnLeft && from === newItemOffset && newItem !== undefined) {
    addItem(left, record, newItem, 0, newItem.length, to++);
  }
  left.copy(page);

  const opaque = specialOffset(page, record, OPAQUE_SIZE);
  page.writeUInt32LE(blockNumber(record, 1), opaque + NEXT);
  page.writeUInt16LE(BTP_INCOMPLETE_SPLIT | (level === 0 ? BTP_LEAF : 0), opaque + FLAGS);
  page.writeUInt16LE(0, opaque + CYCLE_ID);
}

/** SPLIT_*, block 1: the right half, made from the tuples in the record. */
function splitRight(page: Buffer, record: WalRecord, block: WalBlock): void {
  const level = record.bytes.readUInt32LE(record.mainOffset);
  const next = findBlock(record, 2)?.blk ?? 0;
  initPage(page, blockNumber(record, 0), next, level, level === 0 ? BTP_LEAF : 0);
  restoreTuples(page, record, block);
}

/**
 * DEDUP: merges runs of tuples into posting lists. Main data: u16 number of runs. Block data, per run: u16 offset number of its first
 * tuple, u16 number of tuples.
 */
function deduplicate(page: Buffer, record: WalRecord, block: WalBlock): void {
  const bytes = record.bytes;
  const intervals = bytes.readUInt16LE(record.mainOffset);
  const merged = startCopy(page, record);
  const first = firstDataKey(page, record);
  const last = pageMaxOffset(page);
  if (first !== HIGH_KEY) {
    addItem(merged, record, page, itemStart(page, record, HIGH_KEY), itemLength(page, HIGH_KEY), HIGH_KEY);
  }

  let to = first;
  let interval = 0;
  let from = first;
  while (from <= last) {
    const base = itemStart(page, record, from);
    const at = block.dataOffset + interval * 4;
    if (interval < intervals && bytes.readUInt16LE(at) === from) {
      const items = bytes.readUInt16LE(at + 2);
      if (items === 0) throw misfit(record, `run of no tuples at ${from}`);
      let length = 0;
      for (let i = 0; i < items; i++) length = collectTids(page, itemStart(page, record, from + i), length);
      const posting = formPosting(page, base, scratchTids, length);
      addItem(merged, record, posting, 0, posting.length, to++);
      interval++;
      from += items;
    } else {
      addItem(merged, record, page, base, tupleSize(page, base), to++);
      from++;
    }
  }
  if (interval !== intervals) throw misfit(record, `${interval} of its ${intervals} runs of tuples are on the page`);

  clearFlags(merged, record, BTP_HAS_GARBAGE);
  merged.copy(page);
}

/**
 * VACUUM and DELETE: the counts, at `countsAt`, are u16 deleted, u16 updated. Block data: the deleted offset numbers, the updated offset
 * numbers, then for each updated tuple u16 count and the indexes of the item pointers that its posting list loses.
 */
function vacuum(page: Buffer, record: WalRecord, block: WalBlock, countsAt: number): void {
  const bytes = record.bytes;
  const deletedCount = bytes.readUInt16LE(countsAt);
  const updatedCount = bytes.readUInt16LE(countsAt + 2);
  const updated = block.dataOffset + deletedCount * 2;
  let at = updated + updatedCount * 2;
  for (let i = 0; i < updatedCount; i++) {
    const offsetNumber = bytes.readUInt16LE(updated + i * 2);
    const count = bytes.readUInt16LE(at);
    const tuple = shrinkPosting(record, page, itemStart(page, record, offsetNumber), at + 2, count);
    if (!pageIndexTupleOverwrite(page, offsetNumber, tuple)) {
      throw misfit(record, `tuple ${offsetNumber} does not fit when its posting list has shrunk`);
    }
    at += 2 + count * 2;
  }
  if (deletedCount > 0) deleteItems(page, bytes, block.dataOffset, deletedCount);
  clearFlags(page, record, BTP_HAS_GARBAGE);
}

/** MARK_PAGE_HALFDEAD, block 1: the parent's downlink to the leaf goes; the next one takes the place of its key. */
function removeDownlink(page: Buffer, record: WalRecord): void {
  const offsetNumber = record.bytes.readUInt16LE(record.mainOffset);
  const rightSibling = readBlockId(page, itemStart(page, record, offsetNumber + 1));
  writeBlockId(page, rightSibling, itemStart(page, record, offsetNumber));
  pageIndexTupleDelete(page, offsetNumber + 1);
}

/**
 * UNLINK_PAGE. Main data: u32 left sibling, u32 right sibling, u32 level, (4 unused) u64 safe xid; then, for the leaf at the bottom of
 * the subtree, u32 left sibling, u32 right sibling, u32 top parent.
 */
function unlink(page: Buffer, record: WalRecord, blockId: number): void {
  const main = record.mainOffset;
  const left = record.bytes.readUInt32LE(main);
  const right = record.bytes.readUInt32LE(main + 4);
  if (blockId === 0) {
    const level = record.bytes.readUInt32LE(main + 8);
    initPage(page, left, right, level, BTP_DELETED | BTP_HAS_FULLXID | (level === 0 ? BTP_LEAF : 0));
    record.bytes.copy(page, PAGE_CONTENTS, main + 16, main + 24);
    page.writeUInt16LE(PAGE_CONTENTS + 8, 12);
  } else if (blockId === 1) setOpaque32(page, record, NEXT, right);
  else if (blockId === 2) setOpaque32(page, record, PREV, left);
  else if (blockId === 3) initHalfDead(page, record, 24, 28, 32);
  else throw strayBlock(record, blockId);
}

/** An empty leaf that waits to be unlinked; the arguments say where in the main data its siblings and its top parent are. */
function initHalfDead(page: Buffer, record: WalRecord, leftAt: number, rightAt: number, topParentAt: number): void {
  const { bytes, mainOffset: main } = record;
  initPage(page, bytes.readUInt32LE(main + leftAt), bytes.readUInt32LE(main + rightAt), 0, BTP_HALF_DEAD | BTP_LEAF);
  const highKey = Buffer.alloc(TUPLE_HEADER_SIZE);
  writeItemPointer(highKey, bytes.readUInt32LE(main + topParentAt), 0, 0);
  highKey.writeUInt16LE(TUPLE_AM_BIT | TUPLE_HEADER_SIZE, TUPLE_INFO);
  addItem(page, record, highKey, 0, highKey.length, HIGH_KEY);
}

/** NEWROOT, block 0. Main data: u32 block number of the root, u32 its level. */
function newRoot(page: Buffer, record: WalRecord, block: WalBlock): void {
  const level = record.bytes.readUInt32LE(record.mainOffset + 4);
  initPage(page, 0, 0, level, BTP_ROOT | (level === 0 ? BTP_LEAF : 0));
  if (level > 0) restoreTuples(page, record, block);
}

/**
 * Makes the meta page. Block data: u32 version, u32 root, u32 level, u32 fast root, u32 its level, u32 pages deleted by the last cleanup,
 * u8 whether all columns allow deduplication. On the page these follow the magic; the number of heap tuples of the last cleanup, no
 * longer used, is -1.
 */
function restoreMeta(page: Buffer, record: WalRecord, block: WalBlock): void {
  initPage(page, 0, 0, 0, BTP_META);
  page.writeUInt32LE(META_MAGIC, PAGE_CONTENTS);
  record.bytes.copy(page, PAGE_CONTENTS + 4, block.dataOffset, block.dataOffset + 24);
  page.writeDoubleLE(-1, PAGE_CONTENTS + 32);
  page[PAGE_CONTENTS + 40] = record.bytes[block.dataOffset + 24]!;
  page.writeUInt16LE(PAGE_CONTENTS + META_SIZE, 12);
}

/**
 * Adds the tuples of the block's data, which stand as they did on the page, the last item first. They are added in the order of their
 * items, so each lands where it was.
 */
function restoreTuples(page: Buffer, record: WalRecord, block: WalBlock): void {
  const end = block.dataOffset + block.dataLength;
  const starts: number[] = [];
  for (let at = block.dataOffset; at < end;) {
    const size = maxAlign(tupleSize(record.bytes, at));
    if (size === 0) throw misfit(record, `tuple of no size in the data of block ${block.id}`);
    starts.push(at);
    at += size;
  }
  for (let i = starts.length - 1; i >= 0; i--) {
    const at = starts[i]!;
    addItem(page, record, record.bytes, at, maxAlign(tupleSize(record.bytes, at)), starts.length - i);
  }
}

function initPage(page: Buffer, prev: number, next: number, level: number, flags: number): void {
  pageInit(page, OPAQUE_SIZE);
  const opaque = BLOCK_SIZE - OPAQUE_SIZE;
  page.writeUInt32LE(prev, opaque + PREV);
  page.writeUInt32LE(next, opaque + NEXT);
  page.writeUInt32LE(level, opaque + LEVEL);
  page.writeUInt16LE(flags, opaque + FLAGS);
}

/** An empty page with the special space of `page`, to be filled and copied over it. */
function startCopy(page: Buffer, record: WalRecord): Buffer {
  const opaque = specialOffset(page, record, OPAQUE_SIZE);
  pageInit(scratchPage, BLOCK_SIZE - opaque);
  page.copy(scratchPage, opaque, opaque);
  return scratchPage;
}

function setOpaque32(page: Buffer, record: WalRecord, field: number, value: number): void {
  page.writeUInt32LE(value, specialOffset(page, record, OPAQUE_SIZE) + field);
}

function clearFlags(page: Buffer, record: WalRecord, flags: number): void {
  const at = specialOffset(page, record, OPAQUE_SIZE) + FLAGS;
  page.writeUInt16LE(page.readUInt16LE(at) & ~flags, at);
}

function clearIncompleteSplit(page: Buffer, record: WalRecord): void {
  clearFlags(page, record, BTP_INCOMPLETE_SPLIT);
}

/** The first item that is not the high key. */
function firstDataKey(page: Buffer, record: WalRecord): number {
  return page.readUInt32LE(specialOffset(page, record, OPAQUE_SIZE) + NEXT) === 0 ? HIGH_KEY : HIGH_KEY + 1;
}

function isPosting(bytes: Buffer, tuple: number): boolean {
  return (
    (bytes.readUInt16LE(tuple + TUPLE_INFO) & TUPLE_AM_BIT) !== 0 && (bytes.readUInt16LE(tuple + 4) & IS_POSTING) !== 0
  );
}

function postingCount(bytes: Buffer, tuple: number): number {
  return bytes.readUInt16LE(tuple + 4) & POSTING_COUNT_MASK;
}

function copyTuple(bytes: Buffer, at: number): Buffer {
  return Buffer.from(bytes.subarray(at, at + tupleSize(bytes, at)));
}

/**
 * Splits a posting list so that the new item fits in between (_bt_swap_posting): the list takes the new item's heap pointer at index
 * `at` and gives its last one to the new item. Returns the list's tuple, of the same size; changes `newItem`, not the page.
 */
function swapPosting(record: WalRecord, newItem: Buffer, page: Buffer, posting: number, at: number): Buffer {
  const count = postingCount(page, posting);
  if (!isPosting(page, posting) || at <= 0 || at >= count) {
    throw misfit(record, `posting list of ${count} cannot be split at ${at}`);
  }
  const split = copyTuple(page, posting);
  const list = readBlockId(split, 0);
  const last = list + (count - 1) * ITEM_POINTER_SIZE;
  const place = list + at * ITEM_POINTER_SIZE;
  split.copyWithin(place + ITEM_POINTER_SIZE, place, last);
  newItem.copy(split, place, 0, ITEM_POINTER_SIZE);
  page.copy(newItem, 0, posting + last, posting + last + ITEM_POINTER_SIZE);
  return split;
}

/** Appends the heap pointers of a tuple to scratchTids at `length`; returns the new length in bytes. */
function collectTids(page: Buffer, tuple: number, length: number): number {
  const posting = isPosting(page, tuple);
  const from = posting ? tuple + readBlockId(page, tuple) : tuple;
  const bytes = (posting ? postingCount(page, tuple) : 1) * ITEM_POINTER_SIZE;
  page.copy(scratchTids, length, from, from + bytes);
  return length + bytes;
}

/** The tuple at `base` with these heap pointers instead of its own (_bt_form_posting); `length` is in bytes. */
function formPosting(page: Buffer, base: number, tids: Buffer, length: number): Buffer {
  const keySize = isPosting(page, base) ? readBlockId(page, base) : tupleSize(page, base);
  const count = length / ITEM_POINTER_SIZE;
  const size = count > 1 ? maxAlign(keySize + length) : keySize;
  const tuple = Buffer.alloc(size);
  page.copy(tuple, 0, base, base + keySize);
  const info = (tuple.readUInt16LE(TUPLE_INFO) & ~TUPLE_SIZE_MASK) | size;
  if (count > 1) {
    tuple.writeUInt16LE(info | TUPLE_AM_BIT, TUPLE_INFO);
    writeItemPointer(tuple, keySize, count | IS_POSTING, 0);
    tids.copy(tuple, keySize, 0, length);
  } else {
    tuple.writeUInt16LE(info & ~TUPLE_AM_BIT, TUPLE_INFO);
    tids.copy(tuple, 0, 0, ITEM_POINTER_SIZE);
  }
  return tuple;
}

/** The posting list tuple at `tuple` without the heap pointers whose indexes, rising, are the `count` u16 at `lost` in the record. */
function shrinkPosting(record: WalRecord, page: Buffer, tuple: number, lost: number, count: number): Buffer {
  if (!isPosting(page, tuple)) throw misfit(record, 'a tuple that is no posting list cannot lose heap pointers');
  const list = tuple + readBlockId(page, tuple);
  const all = postingCount(page, tuple);
  let length = 0;
  let next = 0;
  for (let i = 0; i < all; i++) {
    if (next < count && record.bytes.readUInt16LE(lost + next * 2) === i) {
      next++;
      continue;
    }
    const from = list + i * ITEM_POINTER_SIZE;
    page.copy(scratchTids, length, from, from + ITEM_POINTER_SIZE);
    length += ITEM_POINTER_SIZE;
  }
  if (next !== count || length === 0) throw misfit(record, `posting list of ${all} cannot lose ${count} heap pointers`);
  return formPosting(page, tuple, scratchTids, length);
}
