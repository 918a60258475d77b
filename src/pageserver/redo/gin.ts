/**
 * Redo of gin records, block by block (Postgres: ginxlog.c, gindatapage.c, ginpostinglist.c). The record layouts are the same in 15 to 18.
 *
 * Special space of every page:
 *   0   u32  right link, INVALID_BLOCK for none
 *   4   u16  number of posting items (inner pages of posting trees), number of heap rows (pending list pages)
 *   6   u16  GIN_* flags
 * Pages of the entry tree and of the pending list hold index tuples. Pages of posting trees hold their right bound at byte 24 and, from
 * byte 32 on, posting items (inner pages: block id of the child, item pointer) or posting lists (leaves: see gin-posting-list.ts).
 * pd_lower is the end of what they hold.
 *
 * Which record has which blocks:
 *   CREATE_PTREE            0 root of a posting tree (made anew)
 *   INSERT                  0 page, 1 child whose split is now complete (not in leaves)
 *   SPLIT                   0, 1, 2 as full page images only, 3 child whose split is now complete (not in leaves)
 *   VACUUM_PAGE             0 as a full page image only
 *   VACUUM_DATA_LEAF_PAGE   0 page
 *   DELETE_PAGE             0 page, 1 parent, 2 left sibling
 *   UPDATE_META_PAGE        0 meta page (made anew), 1 tail of the pending list
 *   INSERT_LISTPAGE         0 page (made anew)
 *   DELETE_LISTPAGE         0 meta page (made anew), 1 and up: deleted pages (made anew)
 */

import { pageIndexTupleDelete, pageInit, pageMaxOffset } from '../../postgres/page.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { findBlock } from '../../postgres/wal/record.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import { maskPageContent, maskPageHintBits, maskPageLsnAndChecksum, maskUnusedSpace } from './masks.ts';
import { compressUncompressedLeaf, recompressLeaf } from './gin-posting-list.ts';
import {
  INVALID_BLOCK,
  PAGE_CONTENTS,
  addItem,
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

const CREATE_PTREE = 0x10;
const INSERT = 0x20;
const SPLIT = 0x30;
const VACUUM_PAGE = 0x40;
const DELETE_PAGE = 0x50;
const UPDATE_META_PAGE = 0x60;
const INSERT_LISTPAGE = 0x70;
const DELETE_LISTPAGE = 0x80;
const VACUUM_DATA_LEAF_PAGE = 0x90;

const OPAQUE_SIZE = 8;
const RIGHT_LINK = 0;
const MAX_OFF = 4;
const FLAGS = 6;

const GIN_DATA = 0x01;
const GIN_LEAF = 0x02;
const GIN_DELETED = 0x04;
const GIN_META = 0x08;
const GIN_LIST = 0x10;
const GIN_LIST_FULLROW = 0x20;
const GIN_INCOMPLETE_SPLIT = 0x40;
const GIN_COMPRESSED = 0x80;

const INSERT_IS_DATA = 0x01;
const INSERT_IS_LEAF = 0x02;

const META_SIZE = 56;
/** Where the posting items or lists of a posting tree's page begin: after its right bound. */
const DATA_START = 32;
const POSTING_ITEM_SIZE = 10;

/** Replays the record on its block `blockId`; false when the record leaves that page alone. Sets no LSN. */
export function redoGin(page: Buffer, record: WalRecord, blockId: number, _version: PgVersion): boolean {
  const block = findBlock(record, blockId);
  if (block === undefined) throw strayBlock(record, blockId);
  const bytes = record.bytes;
  const main = record.mainOffset;
  switch (record.info & 0xf0) {
    case CREATE_PTREE:
      if (blockId !== 0) throw strayBlock(record, blockId);
      createPostingTree(page, record);
      return true;
    case INSERT:
      if (blockId === 0) insert(page, record, block);
      else if (blockId === 1) clearIncompleteSplit(page, record);
      else throw strayBlock(record, blockId);
      return true;
    case SPLIT:
      if (blockId !== 3) throw misfit(record, `block ${blockId} should have a full page image`);
      clearIncompleteSplit(page, record);
      return true;
    case VACUUM_PAGE:
      throw misfit(record, `block ${blockId} should have a full page image`);
    case VACUUM_DATA_LEAF_PAGE:
      if (blockId !== 0) throw strayBlock(record, blockId);
      changeLeaf(page, record, block.dataOffset);
      return true;
    case DELETE_PAGE:
      deletePage(page, record, blockId);
      return true;
    case UPDATE_META_PAGE:
      if (blockId === 0) restoreMeta(page, record, main + 16);
      else if (blockId === 1) return updateTail(page, record, block);
      else throw strayBlock(record, blockId);
      return true;
    case INSERT_LISTPAGE:
      if (blockId !== 0) throw strayBlock(record, blockId);
      fillListPage(page, record, block);
      return true;
    case DELETE_LISTPAGE:
      if (blockId === 0) restoreMeta(page, record, main);
      else if (blockId <= bytes.readInt32LE(main + META_SIZE)) initPage(page, GIN_DELETED);
      else throw strayBlock(record, blockId);
      return true;
    default:
      throw unknownType(record);
  }
}

/** Blanks what may differ between a page of the primary and the same page replayed (gin_mask). */
export function maskGin(page: Buffer, _blk: number, _version: PgVersion): void {
  maskPageLsnAndChecksum(page);
  const flags = page.readUInt16LE(page.readUInt16LE(16) + FLAGS);
  maskPageHintBits(page);
  if ((flags & GIN_DELETED) !== 0) maskPageContent(page);
  else if (page.readUInt16LE(12) > PAGE_CONTENTS) maskUnusedSpace(page);
}

/** CREATE_PTREE. Main data: u32 size, posting lists. */
function createPostingTree(page: Buffer, record: WalRecord): void {
  const size = record.bytes.readUInt32LE(record.mainOffset);
  if (size + 4 > record.mainLength || DATA_START + size > BLOCK_SIZE - OPAQUE_SIZE) {
    throw misfit(record, `posting lists of ${size} bytes, the record has ${record.mainLength}`);
  }
  initPage(page, GIN_DATA | GIN_LEAF | GIN_COMPRESSED);
  record.bytes.copy(page, DATA_START, record.mainOffset + 4, record.mainOffset + 4 + size);
  setDataSize(page, size);
}

/**
 * INSERT, block 0. Main data: u16 flags; unless into a leaf, the block ids of the left and the right half of the child that was split.
 * Block data of an entry tree's page: u16 offset number, u8 whether the tuple there goes first, (1 unused) the tuple; of a posting
 * tree's inner page: u16 index, posting item; of its leaf: actions on its posting lists.
 */
function insert(page: Buffer, record: WalRecord, block: WalBlock): void {
  const bytes = record.bytes;
  const flags = bytes.readUInt16LE(record.mainOffset);
  const isLeaf = (flags & INSERT_IS_LEAF) !== 0;
  const rightChild = isLeaf ? INVALID_BLOCK : readBlockId(bytes, record.mainOffset + 6);
  const at = block.dataOffset;
  if ((flags & INSERT_IS_DATA) !== 0) {
    if (isLeaf) changeLeaf(page, record, at);
    else addPostingItem(page, record, bytes.readUInt16LE(at), at + 2, rightChild);
    return;
  }
  const offsetNumber = bytes.readUInt16LE(at);
  if (!isLeaf) writeItemPointer(page, rightChild, 0, itemStart(page, record, offsetNumber));
  if (bytes[at + 2] !== 0) pageIndexTupleDelete(page, offsetNumber);
  addItem(page, record, bytes, at + 4, tupleSize(bytes, at + 4), offsetNumber);
}

/** Adds the posting item at `at` in the record's bytes before the one at `index`, which from now on leads to the right half. */
function addPostingItem(page: Buffer, record: WalRecord, index: number, at: number, rightChild: number): void {
  const opaque = specialOffset(page, record, OPAQUE_SIZE);
  const count = page.readUInt16LE(opaque + MAX_OFF);
  const end = DATA_START + (count + 1) * POSTING_ITEM_SIZE;
  if (index < 1 || index > count || end > opaque) throw misfit(record, `posting item ${index} of a page with ${count}`);
  const place = DATA_START + (index - 1) * POSTING_ITEM_SIZE;
  writeBlockId(page, rightChild, place);
  page.copyWithin(place + POSTING_ITEM_SIZE, place, end - POSTING_ITEM_SIZE);
  record.bytes.copy(page, place, at, at + POSTING_ITEM_SIZE);
  page.writeUInt16LE(count + 1, opaque + MAX_OFF);
  setDataSize(page, (count + 1) * POSTING_ITEM_SIZE);
}

/** Applies the actions at `at` to the posting lists of a leaf; a leaf from before 9.4 is first converted to hold posting lists. */
function changeLeaf(page: Buffer, record: WalRecord, at: number): void {
  const opaque = specialOffset(page, record, OPAQUE_SIZE);
  const flags = page.readUInt16LE(opaque + FLAGS);
  let size = page.readUInt16LE(12) - DATA_START;
  if ((flags & GIN_COMPRESSED) === 0) {
    size = compressUncompressedLeaf(page, DATA_START, page.readUInt16LE(opaque + MAX_OFF));
    page.writeUInt16LE(flags | GIN_COMPRESSED, opaque + FLAGS);
    page.writeUInt16LE(0, opaque + MAX_OFF);
  }
  if (size < 0 || DATA_START + size > opaque) throw misfit(record, `page has ${size} bytes of posting lists`);
  const changed = recompressLeaf(page.subarray(DATA_START, opaque), size, record.bytes, at);
  if (changed === undefined) throw misfit(record, 'its actions do not fit the posting lists of the page');
  setDataSize(page, changed);
}

/** DELETE_PAGE. Main data: u16 index of the posting item in the parent, (2 unused) u32 right link of the deleted page, u32 deleting xid. */
function deletePage(page: Buffer, record: WalRecord, blockId: number): void {
  const opaque = specialOffset(page, record, OPAQUE_SIZE);
  const { bytes, mainOffset: main } = record;
  if (blockId === 0) {
    page.writeUInt16LE(page.readUInt16LE(opaque + FLAGS) | GIN_DELETED, opaque + FLAGS);
    bytes.copy(page, 20, main + 8, main + 12);
  } else if (blockId === 1) {
    const index = bytes.readUInt16LE(main);
    const count = page.readUInt16LE(opaque + MAX_OFF);
    if (index < 1 || index > count) throw misfit(record, `posting item ${index} of a page with ${count}`);
    const place = DATA_START + (index - 1) * POSTING_ITEM_SIZE;
    page.copyWithin(place, place + POSTING_ITEM_SIZE, DATA_START + count * POSTING_ITEM_SIZE);
    page.writeUInt16LE(count - 1, opaque + MAX_OFF);
    setDataSize(page, (count - 1) * POSTING_ITEM_SIZE);
  } else if (blockId === 2) {
    bytes.copy(page, opaque + RIGHT_LINK, main + 4, main + 8);
  } else throw strayBlock(record, blockId);
}

/** The meta page's contents stand in the main data as they do on the page (GinMetaPageData). */
function restoreMeta(page: Buffer, record: WalRecord, at: number): void {
  initPage(page, GIN_META);
  record.bytes.copy(page, PAGE_CONTENTS, at, at + META_SIZE);
  page.writeUInt16LE(PAGE_CONTENTS + META_SIZE, 12);
}

/**
 * UPDATE_META_PAGE, block 1. Main data: 12 bytes relation, (4 unused) 56 bytes meta page, u32 previous tail, u32 its new right link, i32
 * number of tuples. With tuples, they are added to the tail; without, the previous tail links to a new one.
 */
function updateTail(page: Buffer, record: WalRecord, block: WalBlock): boolean {
  const { bytes, mainOffset: main } = record;
  const opaque = specialOffset(page, record, OPAQUE_SIZE);
  const tuples = bytes.readInt32LE(main + 80);
  if (tuples > 0) {
    addTuples(page, record, block, tuples);
    page.writeUInt16LE((page.readUInt16LE(opaque + MAX_OFF) + 1) & 0xffff, opaque + MAX_OFF);
    return true;
  }
  if (bytes.readUInt32LE(main + 72) === INVALID_BLOCK) return false;
  bytes.copy(page, opaque + RIGHT_LINK, main + 76, main + 80);
  return true;
}

/** INSERT_LISTPAGE. Main data: u32 right link, i32 number of tuples. The last page of what is added at once ends a row. */
function fillListPage(page: Buffer, record: WalRecord, block: WalBlock): void {
  const rightLink = record.bytes.readUInt32LE(record.mainOffset);
  const isTail = rightLink === INVALID_BLOCK;
  initPage(page, isTail ? GIN_LIST | GIN_LIST_FULLROW : GIN_LIST);
  const opaque = BLOCK_SIZE - OPAQUE_SIZE;
  page.writeUInt32LE(rightLink, opaque + RIGHT_LINK);
  page.writeUInt16LE(isTail ? 1 : 0, opaque + MAX_OFF);
  addTuples(page, record, block, record.bytes.readInt32LE(record.mainOffset + 4));
}

/** Appends the tuples of the block's data, which follow one another without padding. */
function addTuples(page: Buffer, record: WalRecord, block: WalBlock, count: number): void {
  let offsetNumber = pageMaxOffset(page) + 1;
  let at = block.dataOffset;
  for (let i = 0; i < count; i++) {
    const size = tupleSize(record.bytes, at);
    addItem(page, record, record.bytes, at, size, offsetNumber++);
    at += size;
  }
}

function initPage(page: Buffer, flags: number): void {
  pageInit(page, OPAQUE_SIZE);
  page.writeUInt32LE(INVALID_BLOCK, BLOCK_SIZE - OPAQUE_SIZE + RIGHT_LINK);
  page.writeUInt16LE(flags, BLOCK_SIZE - OPAQUE_SIZE + FLAGS);
}

function setDataSize(page: Buffer, size: number): void {
  page.writeUInt16LE(DATA_START + size, 12);
}

function clearIncompleteSplit(page: Buffer, record: WalRecord): void {
  const at = specialOffset(page, record, OPAQUE_SIZE) + FLAGS;
  page.writeUInt16LE(page.readUInt16LE(at) & ~GIN_INCOMPLETE_SPLIT, at);
}
