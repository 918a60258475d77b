/**
 * Redo of SP-GiST records, block by block (Postgres: spgxlog.c, spgdoinsert.c, spgist_private.h).
 *
 * Special space of every page:
 *   0   u16  flags: 4 leaf, 8 of the tree of nulls
 *   2   u16  number of redirections
 *   4   u16  number of placeholders
 *   6   u16  0xff82
 * Leaf tuple: u32 state (2 bits) and size (30 bits), u16 offset number of the next in the chain (14 bits) and flags, item pointer, value.
 * Dead tuple, 16 bytes: the same, then u32 xid; its item pointer is where a redirection leads.
 * Inner tuple: u32 state (2 bits), all the same (1), number of nodes (13), size of the prefix (16), u16 size, (2 unused) prefix, nodes;
 * a node is an index tuple whose item pointer is its downlink.
 * States: 0 live, 1 redirection, 2 dead, 3 placeholder.
 *
 * Which record has which blocks (all data is main data):
 *   ADD_LEAF         0 leaf page (anew if it is a new page), 1 parent
 *   MOVE_LEAFS       0 source, 1 destination (anew if it is a new page), 2 parent
 *   ADD_NODE         0 page, 1 page of the new tuple if another (anew if it is a new page), 2 parent if on a third page
 *   SPLIT_TUPLE      0 page, 1 page of the postfix tuple if another (anew if it is a new page)
 *   PICKSPLIT        0 source (unless the root), 1 destination, 2 inner page, 3 parent (unless on the inner page); 0 to 2 may be made anew
 *   VACUUM_LEAF, VACUUM_ROOT, VACUUM_REDIRECT  0 page
 */

import {
  itemId,
  pageIndexMultiDelete,
  pageIndexTupleDelete,
  pageInit,
  pageMaxOffset,
  setItemId,
} from '../../postgres/page.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { versionFacts } from '../../postgres/version.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { findBlock } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import {
  INVALID_BLOCK,
  addItem,
  blockNumber,
  deleteItems,
  itemStart,
  misfit,
  readOffsets,
  specialOffset,
  strayBlock,
  tupleSize,
  unknownType,
  writeItemPointer,
} from './index-tuple.ts';
import { maskPageHintBits, maskPageLsnAndChecksum, maskUnusedSpace } from './masks.ts';

const ADD_LEAF = 0x10;
const MOVE_LEAFS = 0x20;
const ADD_NODE = 0x30;
const SPLIT_TUPLE = 0x40;
const PICKSPLIT = 0x50;
const VACUUM_LEAF = 0x60;
const VACUUM_ROOT = 0x70;
const VACUUM_REDIRECT = 0x80;

const OPAQUE_SIZE = 8;
const REDIRECTIONS = 2;
const PLACEHOLDERS = 4;
const PAGE_ID = 6;
const SPGIST_PAGE_ID = 0xff82;
const SPGIST_LEAF = 0x04;
const SPGIST_NULLS = 0x08;

const REDIRECT = 1;
const DEAD = 2;
const PLACEHOLDER = 3;
const STATE_MASK = 3;
const NEXT_OFFSET_MASK = 0x3fff;

const DEAD_TUPLE_SIZE = 16;
const INNER_HEADER_SIZE = 8;

/** Replays the record on its block `blockId`; false when the record leaves that page alone. Sets no LSN. */
export function redoSpgist(page: Buffer, record: WalRecord, blockId: number, version: PgVersion): boolean {
  if (findBlock(record, blockId) === undefined) throw strayBlock(record, blockId);
  switch (record.info & 0xf0) {
    case ADD_LEAF:
      addLeaf(page, record, blockId);
      return true;
    case MOVE_LEAFS:
      moveLeaves(page, record, blockId);
      return true;
    case ADD_NODE:
      return addNode(page, record, blockId);
    case SPLIT_TUPLE:
      splitTuple(page, record, blockId);
      return true;
    case PICKSPLIT:
      pickSplit(page, record, blockId);
      return true;
    case VACUUM_LEAF:
      if (blockId !== 0) throw strayBlock(record, blockId);
      vacuumLeaf(page, record);
      return true;
    case VACUUM_ROOT:
      if (blockId !== 0) throw strayBlock(record, blockId);
      // u16 number of tuples, (2 unused) 8 bytes state, u16[] offset numbers
      deleteItems(page, record.bytes, record.mainOffset + 12, record.bytes.readUInt16LE(record.mainOffset));
      return true;
    case VACUUM_REDIRECT:
      if (blockId !== 0) throw strayBlock(record, blockId);
      vacuumRedirections(page, record, version);
      return true;
    default:
      throw unknownType(record);
  }
}

/** Blanks what may differ between a page of the primary and the same page replayed (spg_mask). */
export function maskSpgist(page: Buffer, _blk: number, _version: PgVersion): void {
  maskPageLsnAndChecksum(page);
  maskPageHintBits(page);
  if (page.readUInt16LE(12) >= 24) maskUnusedSpace(page);
}

/**
 * ADD_LEAF. Main data: u8 new page, u8 of nulls, u16 offset number, u16 of the chain's head (0: none; the same: a dead tuple is
 * replaced), u16 of the parent (0: none), u16 node of the parent, leaf tuple.
 */
function addLeaf(page: Buffer, record: WalRecord, blockId: number): void {
  const { bytes, mainOffset: main } = record;
  const offsetNumber = bytes.readUInt16LE(main + 2);
  if (blockId === 1) {
    const parent = bytes.readUInt16LE(main + 6);
    setDownlink(page, record, parent, bytes.readUInt16LE(main + 8), blockNumber(record, 0), offsetNumber);
    return;
  }
  if (blockId !== 0) throw strayBlock(record, blockId);
  if (bytes[main] !== 0) initLeaf(page, bytes[main + 1] !== 0);
  const head = bytes.readUInt16LE(main + 4);
  const tuple = main + 10;
  const size = leafSize(bytes, tuple);
  if (offsetNumber === head) {
    replaceItem(page, record, bytes, tuple, size, offsetNumber);
    return;
  }
  addOrReplace(page, record, tuple, size, offsetNumber);
  if (head !== 0) setNextOffset(page, itemStart(page, record, head), offsetNumber);
}

/**
 * MOVE_LEAFS. Main data: u16 number of moved tuples, u8 new page, u8 replaces a dead tuple, u8 of nulls, (1 unused) u16 offset number of
 * the parent, u16 its node, (2 unused) state, then u16[] offset numbers of deleted tuples, u16[] of inserted ones, which are one more
 * (one only when a dead tuple is replaced), the leaf tuples.
 */
function moveLeaves(page: Buffer, record: WalRecord, blockId: number): void {
  const { bytes, mainOffset: main } = record;
  const moved = bytes.readUInt16LE(main);
  const inserted = bytes[main + 3] !== 0 ? 1 : moved + 1;
  const deletes = main + 20;
  const inserts = deletes + moved * 2;
  const destination = blockNumber(record, 1);
  const first = bytes.readUInt16LE(inserts + (inserted - 1) * 2);
  if (blockId === 0) {
    const state = readState(bytes, main + 12);
    const kind = state.isBuild ? PLACEHOLDER : REDIRECT;
    killItems(page, record, readOffsets(bytes, deletes, moved), kind, PLACEHOLDER, destination, first, state.xid);
  } else if (blockId === 1) {
    if (bytes[main + 2] !== 0) initLeaf(page, bytes[main + 4] !== 0);
    let tuple = inserts + inserted * 2;
    for (let i = 0; i < inserted; i++) {
      const size = leafSize(bytes, tuple);
      addOrReplace(page, record, tuple, size, bytes.readUInt16LE(inserts + i * 2));
      tuple += size;
    }
  } else if (blockId === 2) {
    setDownlink(page, record, bytes.readUInt16LE(main + 6), bytes.readUInt16LE(main + 8), destination, first);
  } else throw strayBlock(record, blockId);
}

/**
 * ADD_NODE. Main data: u16 offset number of the tuple, u16 of the new one on another page, u8 new page, i8 block with the parent (-1:
 * not changed), u16 offset number of the parent, u16 its node, (2 unused) state, inner tuple.
 */
function addNode(page: Buffer, record: WalRecord, blockId: number): boolean {
  const { bytes, mainOffset: main } = record;
  const offsetNumber = bytes.readUInt16LE(main);
  const tuple = main + 20;
  const size = innerSize(bytes, tuple);
  if (findBlock(record, 1) === undefined) {
    if (blockId !== 0) throw strayBlock(record, blockId);
    replaceItem(page, record, bytes, tuple, size, offsetNumber);
    return true;
  }

  const newOffset = bytes.readUInt16LE(main + 2);
  const newBlock = blockNumber(record, 1);
  const parentBlock = bytes.readInt8(main + 5);
  if (blockId === 0) {
    const state = readState(bytes, main + 12);
    const dead = state.isBuild ? deadTuple(PLACEHOLDER) : deadTuple(REDIRECT, newBlock, newOffset, state.xid);
    replaceItem(page, record, dead, 0, dead.length, offsetNumber);
    count(page, record, state.isBuild ? PLACEHOLDERS : REDIRECTIONS, 1);
  } else if (blockId === 1) {
    if (bytes[main + 4] !== 0) initPage(page, 0);
    addOrReplace(page, record, tuple, size, newOffset);
  } else if (blockId !== 2) throw strayBlock(record, blockId);
  if (parentBlock === blockId) {
    setDownlink(page, record, bytes.readUInt16LE(main + 6), bytes.readUInt16LE(main + 8), newBlock, newOffset);
  }
  return blockId !== 2 || parentBlock === 2;
}

/**
 * SPLIT_TUPLE. Main data: u16 offset number of the prefix tuple, u16 of the postfix tuple, u8 new page, u8 both on one page, prefix
 * tuple, postfix tuple.
 */
function splitTuple(page: Buffer, record: WalRecord, blockId: number): void {
  const { bytes, mainOffset: main } = record;
  const prefix = main + 6;
  const postfix = prefix + innerSize(bytes, prefix);
  const postfixOffset = bytes.readUInt16LE(main + 2);
  const isSamePage = bytes[main + 5] !== 0;
  if (blockId === 0) {
    replaceItem(page, record, bytes, prefix, innerSize(bytes, prefix), bytes.readUInt16LE(main));
    if (isSamePage) addOrReplace(page, record, postfix, innerSize(bytes, postfix), postfixOffset);
  } else if (blockId === 1 && !isSamePage) {
    if (bytes[main + 4] !== 0) initPage(page, 0);
    addOrReplace(page, record, postfix, innerSize(bytes, postfix), postfixOffset);
  } else throw strayBlock(record, blockId);
}

/**
 * PICKSPLIT. Main data: u8 root split, (1 unused) u16 deleted tuples, u16 inserted ones, u8 source anew, u8 destination anew, u16 offset
 * number of the inner tuple, u8 inner page anew, u8 of nulls, u8 inner page is the parent's, (1 unused) u16 offset number of the parent,
 * u16 its node, (2 unused) state, then u16[] offset numbers of deleted tuples, u16[] of inserted ones, u8[] where each goes (0 source, 1
 * destination), inner tuple, leaf tuples.
 */
function pickSplit(page: Buffer, record: WalRecord, blockId: number): void {
  const { bytes, mainOffset: main } = record;
  const deleted = bytes.readUInt16LE(main + 2);
  const inserted = bytes.readUInt16LE(main + 4);
  const innerOffset = bytes.readUInt16LE(main + 8);
  const ofNulls = bytes[main + 11] !== 0;
  const innerIsParent = bytes[main + 12] !== 0;
  const parentOffset = bytes.readUInt16LE(main + 14);
  const node = bytes.readUInt16LE(main + 16);
  const deletes = main + 28;
  const inserts = deletes + deleted * 2;
  const selectors = inserts + inserted * 2;
  const inner = selectors + inserted;
  const innerBlock = blockNumber(record, 2);
  switch (blockId) {
    case 0:
      if (bytes[main + 6] !== 0) initLeaf(page, ofNulls);
      else {
        const state = readState(bytes, main + 20);
        const kind = state.isBuild ? PLACEHOLDER : REDIRECT;
        const offsets = readOffsets(bytes, deletes, deleted);
        killItems(page, record, offsets, kind, PLACEHOLDER, innerBlock, innerOffset, state.xid);
      }
      break;
    case 1:
      if (bytes[main + 7] !== 0) initLeaf(page, ofNulls);
      break;
    case 2:
      if (bytes[main + 10] !== 0) initPage(page, ofNulls ? SPGIST_NULLS : 0);
      addOrReplace(page, record, inner, innerSize(bytes, inner), innerOffset);
      if (innerIsParent) setDownlink(page, record, parentOffset, node, innerBlock, innerOffset);
      return;
    case 3:
      setDownlink(page, record, parentOffset, node, innerBlock, innerOffset);
      return;
    default:
      throw strayBlock(record, blockId);
  }
  let tuple = inner + innerSize(bytes, inner);
  for (let i = 0; i < inserted; i++) {
    const size = leafSize(bytes, tuple);
    if ((bytes[selectors + i] !== 0 ? 1 : 0) === blockId) {
      addOrReplace(page, record, tuple, size, bytes.readUInt16LE(inserts + i * 2));
    }
    tuple += size;
  }
}

/**
 * VACUUM_LEAF. Main data: u16 number of tuples to make dead, u16 to make placeholders, u16 to move, u16 to chain anew, state, then six
 * arrays of offset numbers: dead, placeholders, moved from, moved to, chained, their next.
 */
function vacuumLeaf(page: Buffer, record: WalRecord): void {
  const { bytes, mainOffset: main } = record;
  const moves = bytes.readUInt16LE(main + 4);
  const chains = bytes.readUInt16LE(main + 6);
  let at = main + 16;
  const take = (length: number): Uint16Array => {
    const offsets = readOffsets(bytes, at, length);
    at += length * 2;
    return offsets;
  };
  const dead = take(bytes.readUInt16LE(main));
  const placeholders = take(bytes.readUInt16LE(main + 2));
  const from = take(moves);
  const to = take(moves);
  const chained = take(chains);
  const next = take(chains);

  killItems(page, record, dead, DEAD, DEAD);
  killItems(page, record, placeholders, PLACEHOLDER, PLACEHOLDER);
  // A tuple moves by exchanging line pointers with what is in its new place; what was there becomes a placeholder in its old one.
  for (let i = 0; i < moves; i++) {
    itemStart(page, record, from[i]!);
    itemStart(page, record, to[i]!);
    const id = itemId(page, from[i]!);
    setItemId(page, from[i]!, itemId(page, to[i]!));
    setItemId(page, to[i]!, id);
  }
  killItems(page, record, from, PLACEHOLDER, PLACEHOLDER);
  for (let i = 0; i < chains; i++) setNextOffset(page, itemStart(page, record, chained[i]!), next[i]!);
}

/**
 * VACUUM_REDIRECT. Main data: u16 number of redirections to make placeholders, u16 offset number of the first placeholder to remove (0:
 * none; all after it go too), u32 xid, from 16 u8 whether the table is a catalog, u16[] offset numbers of the redirections.
 */
function vacuumRedirections(page: Buffer, record: WalRecord, version: PgVersion): void {
  const { bytes, mainOffset: main } = record;
  const converted = bytes.readUInt16LE(main);
  const firstRemoved = bytes.readUInt16LE(main + 2);
  const offsets = main + (versionFacts(version).redo.isCatalogRel ? 10 : 8);
  for (let i = 0; i < converted; i++) {
    const at = itemStart(page, record, bytes.readUInt16LE(offsets + i * 2));
    page[at] = (page[at]! & ~STATE_MASK) | PLACEHOLDER;
    writeItemPointer(page, INVALID_BLOCK, 0, at + 6);
  }
  count(page, record, REDIRECTIONS, -converted);
  count(page, record, PLACEHOLDERS, converted);
  if (firstRemoved === 0) return;
  const removed = pageMaxOffset(page) - firstRemoved + 1;
  if (removed < 0) throw misfit(record, `placeholders from ${firstRemoved} on of ${pageMaxOffset(page)} items`);
  count(page, record, PLACEHOLDERS, -removed);
  pageIndexMultiDelete(
    page,
    Uint16Array.from({ length: removed }, (_, i) => firstRemoved + i),
  );
}

/** What dead tuples need to know of the transaction: u32 xid, u8 whether the index is being built. */
function readState(bytes: Buffer, at: number): { xid: number; isBuild: boolean } {
  return { xid: bytes.readUInt32LE(at), isBuild: bytes[at + 4] !== 0 };
}

/** Puts dead tuples in place of items: of the first one named of state `first`, of the others `rest` (spgPageIndexMultiDelete). */
function killItems(
  page: Buffer,
  record: WalRecord,
  offsets: Uint16Array,
  first: number,
  rest: number,
  block = INVALID_BLOCK,
  offsetNumber = 0,
  xid = 0,
): void {
  if (offsets.length === 0) return;
  const firstOffset = offsets[0]!;
  const sorted = Uint16Array.from(offsets).sort();
  pageIndexMultiDelete(page, sorted);
  for (const offset of sorted) {
    const state = offset === firstOffset ? first : rest;
    const tuple = state === REDIRECT ? deadTuple(state, block, offsetNumber, xid) : deadTuple(state);
    addItem(page, record, tuple, 0, tuple.length, offset);
    if (state === REDIRECT) count(page, record, REDIRECTIONS, 1);
    else if (state === PLACEHOLDER) count(page, record, PLACEHOLDERS, 1);
  }
}

function deadTuple(state: number, block = INVALID_BLOCK, offsetNumber = 0, xid = 0): Buffer {
  const tuple = Buffer.alloc(DEAD_TUPLE_SIZE);
  tuple.writeUInt32LE(state | (DEAD_TUPLE_SIZE << 2), 0);
  writeItemPointer(tuple, block, offsetNumber, 6);
  tuple.writeUInt32LE(xid, 12);
  return tuple;
}

/** Adds the tuple at `start` of the record; where there is an item it must be a placeholder, which goes (addOrReplaceTuple). */
function addOrReplace(page: Buffer, record: WalRecord, start: number, size: number, offsetNumber: number): void {
  if (offsetNumber <= pageMaxOffset(page)) {
    const at = itemStart(page, record, offsetNumber);
    if ((page[at]! & STATE_MASK) !== PLACEHOLDER) throw misfit(record, `item ${offsetNumber} is no placeholder`);
    count(page, record, PLACEHOLDERS, -1);
    pageIndexTupleDelete(page, offsetNumber);
  }
  addItem(page, record, record.bytes, start, size, offsetNumber);
}

function replaceItem(
  page: Buffer,
  record: WalRecord,
  bytes: Buffer,
  start: number,
  size: number,
  offsetNumber: number,
): void {
  pageIndexTupleDelete(page, offsetNumber);
  addItem(page, record, bytes, start, size, offsetNumber);
}

/** Lets node `node` of the inner tuple lead to another place (spgUpdateNodeLink). */
function setDownlink(
  page: Buffer,
  record: WalRecord,
  parent: number,
  node: number,
  block: number,
  offsetNumber: number,
): void {
  const tuple = itemStart(page, record, parent);
  const header = page.readUInt32LE(tuple);
  const nodes = (header >>> 3) & 0x1fff;
  if (node >= nodes) throw misfit(record, `node ${node} of an inner tuple with ${nodes}`);
  let at = tuple + INNER_HEADER_SIZE + (header >>> 16);
  for (let i = 0; i < node; i++) at += tupleSize(page, at);
  writeItemPointer(page, block, offsetNumber, at);
}

function setNextOffset(page: Buffer, tuple: number, offsetNumber: number): void {
  const info = page.readUInt16LE(tuple + 4);
  page.writeUInt16LE((info & ~NEXT_OFFSET_MASK) | (offsetNumber & NEXT_OFFSET_MASK), tuple + 4);
}

function leafSize(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at) >>> 2;
}

function innerSize(bytes: Buffer, at: number): number {
  return bytes.readUInt16LE(at + 4);
}

function initLeaf(page: Buffer, ofNulls: boolean): void {
  initPage(page, SPGIST_LEAF | (ofNulls ? SPGIST_NULLS : 0));
}

function initPage(page: Buffer, flags: number): void {
  pageInit(page, OPAQUE_SIZE);
  page.writeUInt16LE(flags, BLOCK_SIZE - OPAQUE_SIZE);
  page.writeUInt16LE(SPGIST_PAGE_ID, BLOCK_SIZE - OPAQUE_SIZE + PAGE_ID);
}

function count(page: Buffer, record: WalRecord, field: number, change: number): void {
  const at = specialOffset(page, record, OPAQUE_SIZE) + field;
  page.writeUInt16LE((page.readUInt16LE(at) + change) & 0xffff, at);
}
