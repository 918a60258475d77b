/**
 * Redo of hash records, block by block (Postgres: hash_xlog.c, hashpage.c, hashovfl.c, hash.h). The record layouts are the same in 15 to
 * 18 as far as redo reads them.
 *
 * Special space of every page:
 *   0   u32  previous page of the bucket's chain; in a bucket's first page the highest bucket when it was last split
 *   4   u32  next page of the chain, INVALID_BLOCK for none
 *   8   u32  bucket
 *   12  u16  LH_* flags: page type and states
 *   14  u16  0xff80
 * Bucket and overflow pages hold index tuples, bitmap pages one bit for each overflow page. The meta page, from byte 24 on:
 *   0   u32 magic, u32 version, f64 tuples, u16 fill factor, u16 bytes of a page that can hold a bitmap, u16 bytes of a bitmap,
 *       u16 log2 of its bits
 *   24  u32 highest bucket, u32 high mask, u32 low mask, u32 current splitpoint, u32 first free overflow page, u32 number of bitmaps,
 *       u32 hash function, u32[98] overflow pages before each splitpoint, u32[1024] blocks of bitmaps
 *
 * Which record has which blocks:
 *   INIT_META_PAGE        0 meta page (made anew)
 *   INIT_BITMAP_PAGE      0 bitmap (made anew), 1 meta page
 *   INSERT                0 page, 1 meta page
 *   ADD_OVFL_PAGE         0 overflow page (made anew), 1 page before it, 2 bitmap, 3 new bitmap (made anew), 4 meta page
 *   SPLIT_ALLOCATE_PAGE   0 old bucket, 1 new bucket (made anew), 2 meta page
 *   SPLIT_PAGE            0 as a full page image only
 *   SPLIT_COMPLETE        0 old bucket, 1 new bucket
 *   MOVE_PAGE_CONTENTS    0 first page of the bucket (not changed), 1 page that gets tuples, 2 page that loses them
 *   SQUEEZE_PAGE          0 first page of the bucket (not changed), 1 page that gets tuples, 2 freed page, 3 page before it, 4 page after
 *                         it, 5 bitmap, 6 meta page
 *   DELETE                0 first page of the bucket (not changed), 1 page that loses tuples
 *   SPLIT_CLEANUP         0 first page of the bucket
 *   UPDATE_META_PAGE      0 meta page
 *   VACUUM_ONE_PAGE       0 page, 1 meta page
 *
 * Two records (SPLIT_ALLOCATE_PAGE, SPLIT_COMPLETE) are replayed by Postgres even on a restored image. The primary changes those pages
 * before it takes the image, so restoring the image is enough.
 */

import { pageInit } from '../../postgres/page.ts';
import { maxAlign } from '../../postgres/lsn.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
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
import { maskLpFlags, maskPageContent, maskPageHintBits, maskPageLsnAndChecksum, maskUnusedSpace } from './masks.ts';

const INIT_META_PAGE = 0x00;
const INIT_BITMAP_PAGE = 0x10;
const INSERT = 0x20;
const ADD_OVFL_PAGE = 0x30;
const SPLIT_ALLOCATE_PAGE = 0x40;
const SPLIT_PAGE = 0x50;
const SPLIT_COMPLETE = 0x60;
const MOVE_PAGE_CONTENTS = 0x70;
const SQUEEZE_PAGE = 0x80;
const DELETE = 0x90;
const SPLIT_CLEANUP = 0xa0;
const UPDATE_META_PAGE = 0xb0;
const VACUUM_ONE_PAGE = 0xc0;

const OPAQUE_SIZE = 16;
const PREV = 0;
const NEXT = 4;
const BUCKET = 8;
const FLAGS = 12;
const PAGE_ID = 14;
const HASH_PAGE_ID = 0xff80;

const LH_OVERFLOW_PAGE = 0x01;
const LH_BUCKET_PAGE = 0x02;
const LH_BITMAP_PAGE = 0x04;
const LH_META_PAGE = 0x08;
const LH_NEEDS_SPLIT_CLEANUP = 0x40;
const LH_HAS_DEAD_TUPLES = 0x80;
const LH_PAGE_TYPE = 0x0f;

/** Places in the meta page, from the start of the page. */
const META_TUPLES = PAGE_CONTENTS + 8;
const META_MAX_BUCKET = PAGE_CONTENTS + 24;
const META_HIGH_MASK = PAGE_CONTENTS + 28;
const META_LOW_MASK = PAGE_CONTENTS + 32;
const META_SPLITPOINT = PAGE_CONTENTS + 36;
const META_FIRST_FREE = PAGE_CONTENTS + 40;
const META_BITMAP_COUNT = PAGE_CONTENTS + 44;
const META_SPARES = PAGE_CONTENTS + 52;
const META_BITMAPS = PAGE_CONTENTS + 444;
const META_END = PAGE_CONTENTS + 4544;
const MAX_SPLITPOINTS = 98;
const MAX_BITMAPS = 1024;

const META_MAGIC = 0x6440640;
const META_VERSION = 4;
const BITMAP_SPACE = BLOCK_SIZE - PAGE_CONTENTS - OPAQUE_SIZE;
const BITMAP_BYTES_LOG2 = 12;

const UPDATE_MASKS = 0x01;
const UPDATE_SPLITPOINT = 0x02;

const SINGLE_PHASE_GROUPS = 10;
const PHASE_BITS = 2;
const PHASE_MASK = 3;

/** Replays the record on its block `blockId`; false when the record leaves that page alone. Sets no LSN. */
export function redoHash(page: Buffer, record: WalRecord, blockId: number, version: PgVersion): boolean {
  const block = findBlock(record, blockId);
  if (block === undefined) throw strayBlock(record, blockId);
  const { bytes, mainOffset: main } = record;
  switch (record.info & 0xf0) {
    case INIT_META_PAGE:
      if (blockId !== 0) throw strayBlock(record, blockId);
      initMeta(page, bytes.readDoubleLE(main), bytes.readUInt32LE(main + 8), bytes.readUInt16LE(main + 12));
      return true;
    case INIT_BITMAP_PAGE:
      if (blockId === 0) initBitmap(page, bytes.readUInt16LE(main));
      else if (blockId === 1) addBitmap(page, record, page.readUInt32LE(META_MAX_BUCKET) + 2);
      else throw strayBlock(record, blockId);
      return true;
    case INSERT:
      if (blockId === 0) {
        addItem(page, record, bytes, block.dataOffset, block.dataLength, bytes.readUInt16LE(main));
      } else if (blockId === 1) addToTupleCount(page, 1);
      else throw strayBlock(record, blockId);
      return true;
    case ADD_OVFL_PAGE:
      addOverflowPage(page, record, block);
      return true;
    case SPLIT_ALLOCATE_PAGE:
      allocateBucket(page, record, block);
      return true;
    case SPLIT_PAGE:
      throw misfit(record, `block ${blockId} should have a full page image`);
    case SPLIT_COMPLETE:
      if (blockId > 1) throw strayBlock(record, blockId);
      page.writeUInt16LE(bytes.readUInt16LE(main + blockId * 2), specialOffset(page, record, OPAQUE_SIZE) + FLAGS);
      return true;
    case MOVE_PAGE_CONTENTS:
      if (blockId === 0) return false;
      if (blockId === 1) addTuples(page, record, block, bytes.readUInt16LE(main));
      else if (blockId === 2) deleteItems(page, bytes, block.dataOffset, block.dataLength >> 1);
      else throw strayBlock(record, blockId);
      return true;
    case SQUEEZE_PAGE:
      return squeeze(page, record, block, version);
    case DELETE:
      if (blockId === 0) return false;
      if (blockId !== 1) throw strayBlock(record, blockId);
      deleteItems(page, bytes, block.dataOffset, block.dataLength >> 1);
      if (bytes[main] !== 0) clearFlags(page, record, LH_HAS_DEAD_TUPLES);
      return true;
    case SPLIT_CLEANUP:
      if (blockId !== 0) throw strayBlock(record, blockId);
      clearFlags(page, record, LH_NEEDS_SPLIT_CLEANUP);
      return true;
    case UPDATE_META_PAGE:
      if (blockId !== 0) throw strayBlock(record, blockId);
      bytes.copy(page, META_TUPLES, main, main + 8);
      return true;
    case VACUUM_ONE_PAGE:
      vacuumPage(page, record, blockId);
      return true;
    default:
      throw unknownType(record);
  }
}

/** Blanks what may differ between a page of the primary and the same page replayed (hash_mask). */
export function maskHash(page: Buffer, _blk: number, _version: PgVersion): void {
  maskPageLsnAndChecksum(page);
  maskPageHintBits(page);
  maskUnusedSpace(page);
  const at = page.readUInt16LE(16) + FLAGS;
  const type = page.readUInt16LE(at) & LH_PAGE_TYPE;
  if (type === 0) maskPageContent(page);
  else if (type === LH_BUCKET_PAGE || type === LH_OVERFLOW_PAGE) maskLpFlags(page);
  page.writeUInt16LE(page.readUInt16LE(at) & ~LH_HAS_DEAD_TUPLES, at);
}

/** INIT_META_PAGE. Main data: f64 tuples to expect, u32 hash function, u16 fill factor (_hash_init_metabuffer). */
function initMeta(page: Buffer, tuples: number, hashFunction: number, fillFactor: number): void {
  const wanted = tuples / fillFactor;
  let buckets = 2;
  if (wanted >= 0x40000000) buckets = 0x40000000;
  else if (wanted > 2) buckets = bucketsUpTo(splitpointOf(Math.trunc(wanted)));
  const splitpoint = splitpointOf(buckets);

  initPage(page, INVALID_BLOCK, INVALID_BLOCK, LH_META_PAGE);
  page.writeUInt32LE(META_MAGIC, PAGE_CONTENTS);
  page.writeUInt32LE(META_VERSION, PAGE_CONTENTS + 4);
  page.writeUInt16LE(fillFactor, PAGE_CONTENTS + 16);
  page.writeUInt16LE(BITMAP_SPACE, PAGE_CONTENTS + 18);
  page.writeUInt16LE(1 << BITMAP_BYTES_LOG2, PAGE_CONTENTS + 20);
  page.writeUInt16LE(BITMAP_BYTES_LOG2 + 3, PAGE_CONTENTS + 22);
  page.writeUInt32LE(buckets - 1, META_MAX_BUCKET);
  const highMask = 2 ** (32 - Math.clz32(buckets)) - 1;
  page.writeUInt32LE(highMask, META_HIGH_MASK);
  page.writeUInt32LE(highMask >>> 1, META_LOW_MASK);
  page.writeUInt32LE(splitpoint, META_SPLITPOINT);
  page.writeUInt32LE(hashFunction, PAGE_CONTENTS + 48);
  page.writeUInt32LE(1, META_SPARES + splitpoint * 4);
  page.writeUInt16LE(META_END, 12);
}

/** The splitpoint phase in which this many buckets are reached (_hash_spareindex). */
function splitpointOf(buckets: number): number {
  const group = 32 - Math.clz32(buckets - 1);
  if (group < SINGLE_PHASE_GROUPS) return group;
  const phase = ((buckets - 1) >>> (group - (PHASE_BITS + 1))) & PHASE_MASK;
  return SINGLE_PHASE_GROUPS + ((group - SINGLE_PHASE_GROUPS) << PHASE_BITS) + phase;
}

/** The number of buckets when a splitpoint phase is complete (_hash_get_totalbuckets). */
function bucketsUpTo(splitpoint: number): number {
  if (splitpoint < SINGLE_PHASE_GROUPS) return 1 << splitpoint;
  const group = SINGLE_PHASE_GROUPS + ((splitpoint - SINGLE_PHASE_GROUPS) >> PHASE_BITS);
  const phases = ((splitpoint - SINGLE_PHASE_GROUPS) & PHASE_MASK) + 1;
  const before = 1 << (group - 1);
  return before + (before >> PHASE_BITS) * phases;
}

function initBitmap(page: Buffer, size: number): void {
  initPage(page, INVALID_BLOCK, INVALID_BLOCK, LH_BITMAP_PAGE);
  page.fill(0xff, PAGE_CONTENTS, PAGE_CONTENTS + size);
  page.writeUInt16LE(PAGE_CONTENTS + size, 12);
}

/** Notes in the meta page that `block` is the next bitmap. */
function addBitmap(page: Buffer, record: WalRecord, block: number): void {
  const count = page.readUInt32LE(META_BITMAP_COUNT);
  if (count >= MAX_BITMAPS) throw misfit(record, `meta page has ${count} bitmaps`);
  page.writeUInt32LE(block, META_BITMAPS + count * 4);
  page.writeUInt32LE(count + 1, META_BITMAP_COUNT);
}

/**
 * ADD_OVFL_PAGE. Main data: u16 size of a bitmap, u8 whether a free page was found in a bitmap. Block data: 0 u32 bucket, 2 u32 bit to
 * set, 4 u32 first free page.
 */
function addOverflowPage(page: Buffer, record: WalRecord, block: WalBlock): void {
  const { bytes, mainOffset: main } = record;
  switch (block.id) {
    case 0:
      initPage(page, blockNumber(record, 1), bytes.readUInt32LE(block.dataOffset), LH_OVERFLOW_PAGE);
      return;
    case 1:
      page.writeUInt32LE(blockNumber(record, 0), specialOffset(page, record, OPAQUE_SIZE) + NEXT);
      return;
    case 2:
      setBit(page, record, bytes.readUInt32LE(block.dataOffset), true);
      return;
    case 3:
      initBitmap(page, bytes.readUInt16LE(main));
      return;
    case 4: {
      bytes.copy(page, META_FIRST_FREE, block.dataOffset, block.dataOffset + 4);
      if (bytes[main + 2] !== 0) return;
      const newBitmap = findBlock(record, 3);
      if (newBitmap !== undefined) addBitmap(page, record, newBitmap.blk);
      const at = spareAt(record, page.readUInt32LE(META_SPLITPOINT));
      page.writeUInt32LE(page.readUInt32LE(at) + (newBitmap === undefined ? 1 : 2), at);
      return;
    }
    default:
      throw strayBlock(record, block.id);
  }
}

/**
 * SPLIT_ALLOCATE_PAGE. Main data: u32 new bucket, u16 flags of the old bucket's page, u16 flags of the new one's, u8 what changes in the
 * meta page. Block data of the meta page: if the masks change u32 low mask, u32 high mask; if the splitpoint does u32 splitpoint, u32
 * overflow pages before it.
 */
function allocateBucket(page: Buffer, record: WalRecord, block: WalBlock): void {
  const { bytes, mainOffset: main } = record;
  const bucket = bytes.readUInt32LE(main);
  if (block.id === 0) {
    const opaque = specialOffset(page, record, OPAQUE_SIZE);
    page.writeUInt16LE(bytes.readUInt16LE(main + 4), opaque + FLAGS);
    page.writeUInt32LE(bucket, opaque + PREV);
  } else if (block.id === 1) {
    initPage(page, bucket, bucket, bytes.readUInt16LE(main + 6));
  } else if (block.id === 2) {
    const changes = bytes[main + 8]!;
    let at = block.dataOffset;
    page.writeUInt32LE(bucket, META_MAX_BUCKET);
    if ((changes & UPDATE_MASKS) !== 0) {
      bytes.copy(page, META_LOW_MASK, at, at + 4);
      bytes.copy(page, META_HIGH_MASK, at + 4, at + 8);
      at += 8;
    }
    if ((changes & UPDATE_SPLITPOINT) !== 0) {
      const splitpoint = bytes.readUInt32LE(at);
      bytes.copy(page, spareAt(record, splitpoint), at + 4, at + 8);
      page.writeUInt32LE(splitpoint, META_SPLITPOINT);
    }
  } else throw strayBlock(record, block.id);
}

/** Adds tuples to a page. Block data: u16 offset number of each, then the tuples. */
function addTuples(page: Buffer, record: WalRecord, block: WalBlock, count: number): void {
  const bytes = record.bytes;
  const end = block.dataOffset + block.dataLength;
  let offsets = block.dataOffset;
  let at = offsets + count * 2;
  for (let i = 0; i < count && at < end; i++) {
    const size = maxAlign(tupleSize(bytes, at));
    addItem(page, record, bytes, at, size, bytes.readUInt16LE(offsets));
    offsets += 2;
    at += size;
  }
}

/**
 * SQUEEZE_PAGE: an overflow page is freed, its tuples go to a page before it in the chain. Main data: u32 page before the freed one, u32
 * page after it, u16 number of tuples, u8 whether they go to the bucket's first page, u8 whether they go to the page before the freed
 * one. Block data: 1 offset numbers and tuples, 5 u32 bit to clear, 6 u32 first free page.
 */
function squeeze(page: Buffer, record: WalRecord, block: WalBlock, version: PgVersion): boolean {
  const { bytes, mainOffset: main } = record;
  switch (block.id) {
    case 0:
      return false;
    case 1: {
      const count = bytes.readUInt16LE(main + 8);
      const isBefore = bytes[main + 11] !== 0;
      addTuples(page, record, block, count);
      if (isBefore) bytes.copy(page, specialOffset(page, record, OPAQUE_SIZE) + NEXT, main + 4, main + 8);
      // Until 16 the page got the record's LSN even when nothing in it changed.
      return count > 0 || isBefore || version <= 16;
    }
    case 2:
      initPage(page, INVALID_BLOCK, INVALID_BLOCK, 0);
      return true;
    case 3:
      bytes.copy(page, specialOffset(page, record, OPAQUE_SIZE) + NEXT, main + 4, main + 8);
      return true;
    case 4:
      bytes.copy(page, specialOffset(page, record, OPAQUE_SIZE) + PREV, main, main + 4);
      return true;
    case 5:
      setBit(page, record, bytes.readUInt32LE(block.dataOffset), false);
      return true;
    case 6:
      bytes.copy(page, META_FIRST_FREE, block.dataOffset, block.dataOffset + 4);
      return true;
    default:
      throw strayBlock(record, block.id);
  }
}

/** VACUUM_ONE_PAGE. Main data: u32 xid, u16 number of tuples, u8 whether the table is a catalog (from 16), u16[] offset numbers at 8. */
function vacuumPage(page: Buffer, record: WalRecord, blockId: number): void {
  const { bytes, mainOffset: main } = record;
  const count = bytes.readUInt16LE(main + 4);
  if (blockId === 0) {
    deleteItems(page, bytes, main + 8, count);
    clearFlags(page, record, LH_HAS_DEAD_TUPLES);
  } else if (blockId === 1) addToTupleCount(page, -count);
  else throw strayBlock(record, blockId);
}

function initPage(page: Buffer, prev: number, bucket: number, flags: number): void {
  pageInit(page, OPAQUE_SIZE);
  const opaque = BLOCK_SIZE - OPAQUE_SIZE;
  page.writeUInt32LE(prev, opaque + PREV);
  page.writeUInt32LE(INVALID_BLOCK, opaque + NEXT);
  page.writeUInt32LE(bucket, opaque + BUCKET);
  page.writeUInt16LE(flags, opaque + FLAGS);
  page.writeUInt16LE(HASH_PAGE_ID, opaque + PAGE_ID);
}

function addToTupleCount(page: Buffer, count: number): void {
  page.writeDoubleLE(page.readDoubleLE(META_TUPLES) + count, META_TUPLES);
}

function spareAt(record: WalRecord, splitpoint: number): number {
  if (splitpoint >= MAX_SPLITPOINTS) throw misfit(record, `splitpoint ${splitpoint} of ${MAX_SPLITPOINTS}`);
  return META_SPARES + splitpoint * 4;
}

function setBit(page: Buffer, record: WalRecord, bit: number, on: boolean): void {
  const at = PAGE_CONTENTS + (bit >>> 3);
  if (at >= BLOCK_SIZE - OPAQUE_SIZE) throw misfit(record, `bit ${bit} lies outside the bitmap`);
  const mask = 1 << (bit & 7);
  page[at] = on ? page[at]! | mask : page[at]! & ~mask;
}

function clearFlags(page: Buffer, record: WalRecord, flags: number): void {
  const at = specialOffset(page, record, OPAQUE_SIZE) + FLAGS;
  page.writeUInt16LE(page.readUInt16LE(at) & ~flags, at);
}
