/**
 * What the redo of all index access methods shares: index tuples and item pointers as bytes, and the ways a record can fail to fit.
 *
 * Index tuple (itup.h), MAXALIGNed in pages:
 *   0  6 bytes  item pointer: u16 high half of a block number, u16 low half, u16 offset number
 *   6  u16      size of the tuple (13 bits), a bit of the access method (0x2000), has variable-width (0x4000), has nulls (0x8000)
 *   8           null bitmap, values
 */

import { itemOffset, pageAddItem, pageIndexMultiDelete, pageMaxOffset } from '../../postgres/page.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { RM_BRIN, rmgrName } from '../../postgres/rmgr.ts';
import { findBlock } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { RedoError } from './redo-error.ts';

export const ITEM_POINTER_SIZE = 6;
export const TUPLE_HEADER_SIZE = 8;
export const TUPLE_INFO = 6;
export const TUPLE_SIZE_MASK = 0x1fff;
/** INDEX_AM_RESERVED_BIT: each access method gives it a meaning of its own. */
export const TUPLE_AM_BIT = 0x2000;

export const INVALID_BLOCK = 0xffffffff;
/** Where the contents of a page begin that has no line pointers: MAXALIGN of the page header. */
export const PAGE_CONTENTS = 24;

const MAIN_INFO_MASK = 0xf0;
const BRIN_OP_MASK = 0x70;

/** Size of the index tuple at `at`, as its header says (IndexTupleSize). */
export function tupleSize(bytes: Buffer, at: number): number {
  return bytes.readUInt16LE(at + TUPLE_INFO) & TUPLE_SIZE_MASK;
}

/** A block number as item pointers have it (BlockIdData): two halves of 16 bits, the high one first. */
export function readBlockId(bytes: Buffer, at: number): number {
  return bytes.readUInt16LE(at) * 0x10000 + bytes.readUInt16LE(at + 2);
}

export function writeBlockId(bytes: Buffer, block: number, at: number): void {
  bytes.writeUInt16LE(block >>> 16, at);
  bytes.writeUInt16LE(block & 0xffff, at + 2);
}

export function writeItemPointer(bytes: Buffer, block: number, offsetNumber: number, at: number): void {
  writeBlockId(bytes, block, at);
  bytes.writeUInt16LE(offsetNumber, at + 4);
}

/** Where the item with this offset number lies in the page. */
export function itemStart(page: Buffer, record: WalRecord, offsetNumber: number): number {
  if (offsetNumber < 1 || offsetNumber > pageMaxOffset(page)) {
    throw misfit(record, `it names item ${offsetNumber} of a page with ${pageMaxOffset(page)}`);
  }
  return itemOffset(page, offsetNumber);
}

/** Adds `length` bytes at `start` of `bytes` to the page as item `offsetNumber`; the items from there on move up. */
export function addItem(
  page: Buffer,
  record: WalRecord,
  bytes: Buffer,
  start: number,
  length: number,
  offsetNumber: number,
): void {
  if (pageAddItem(page, bytes.subarray(start, start + length), offsetNumber, 0) !== offsetNumber) {
    throw misfit(record, `item ${offsetNumber} of ${length} bytes does not fit the page`);
  }
}

/** Removes the items whose offset numbers, rising, are the `count` u16 at `start` in `bytes`. */
export function deleteItems(page: Buffer, bytes: Buffer, start: number, count: number): void {
  pageIndexMultiDelete(page, readOffsets(bytes, start, count));
}

/** An array of offset numbers, which in records need not be aligned. */
export function readOffsets(bytes: Buffer, start: number, count: number): Uint16Array {
  const offsets = new Uint16Array(count);
  for (let i = 0; i < count; i++) offsets[i] = bytes.readUInt16LE(start + i * 2);
  return offsets;
}

/** The special space of a page, as its header says: all index access methods keep their opaque data there. */
export function specialOffset(page: Buffer, record: WalRecord, size: number): number {
  const special = page.readUInt16LE(16);
  if (special + size > BLOCK_SIZE || special < PAGE_CONTENTS) {
    throw misfit(record, `page has its special space at ${special}, ${size} bytes are expected there`);
  }
  return special;
}

/** Number of the block that the record refers to under this id. */
export function blockNumber(record: WalRecord, blockId: number): number {
  const block = findBlock(record, blockId);
  if (block === undefined) throw misfit(record, `it has no block ${blockId}`);
  return block.blk;
}

/** A record that does not fit the page, or what its type promises. */
export function misfit(record: WalRecord, reason: string): RedoError {
  return new RedoError(rmgrName(record.rmid), typeName(record), record.startLsn, reason);
}

/** The record's type has no part for this block. */
export function strayBlock(record: WalRecord, blockId: number): RedoError {
  return misfit(record, `records of this type change no block ${blockId}`);
}

export function unknownType(record: WalRecord): RedoError {
  return misfit(record, 'unknown record type');
}

/** Names of the index access methods' record types as pg_waldump prints them, by their info bits. */
const TYPE_NAMES: Readonly<Record<string, Readonly<Record<number, string>>>> = {
  Btree: {
    0x00: 'INSERT_LEAF',
    0x10: 'INSERT_UPPER',
    0x20: 'INSERT_META',
    0x30: 'SPLIT_L',
    0x40: 'SPLIT_R',
    0x50: 'INSERT_POST',
    0x60: 'DEDUP',
    0x70: 'DELETE',
    0x80: 'UNLINK_PAGE',
    0x90: 'UNLINK_PAGE_META',
    0xa0: 'NEWROOT',
    0xb0: 'MARK_PAGE_HALFDEAD',
    0xc0: 'VACUUM',
    0xd0: 'REUSE_PAGE',
    0xe0: 'META_CLEANUP',
  },
  Hash: {
    0x00: 'INIT_META_PAGE',
    0x10: 'INIT_BITMAP_PAGE',
    0x20: 'INSERT',
    0x30: 'ADD_OVFL_PAGE',
    0x40: 'SPLIT_ALLOCATE_PAGE',
    0x50: 'SPLIT_PAGE',
    0x60: 'SPLIT_COMPLETE',
    0x70: 'MOVE_PAGE_CONTENTS',
    0x80: 'SQUEEZE_PAGE',
    0x90: 'DELETE',
    0xa0: 'SPLIT_CLEANUP',
    0xb0: 'UPDATE_META_PAGE',
    0xc0: 'VACUUM_ONE_PAGE',
  },
  Gin: {
    0x10: 'CREATE_PTREE',
    0x20: 'INSERT',
    0x30: 'SPLIT',
    0x40: 'VACUUM_PAGE',
    0x50: 'DELETE_PAGE',
    0x60: 'UPDATE_META_PAGE',
    0x70: 'INSERT_LISTPAGE',
    0x80: 'DELETE_LISTPAGE',
    0x90: 'VACUUM_DATA_LEAF_PAGE',
  },
  Gist: {
    0x00: 'PAGE_UPDATE',
    0x10: 'DELETE',
    0x20: 'PAGE_REUSE',
    0x30: 'PAGE_SPLIT',
    0x60: 'PAGE_DELETE',
    0x70: 'ASSIGN_LSN',
  },
  SPGist: {
    0x10: 'ADD_LEAF',
    0x20: 'MOVE_LEAFS',
    0x30: 'ADD_NODE',
    0x40: 'SPLIT_TUPLE',
    0x50: 'PICKSPLIT',
    0x60: 'VACUUM_LEAF',
    0x70: 'VACUUM_ROOT',
    0x80: 'VACUUM_REDIRECT',
  },
  BRIN: {
    0x00: 'CREATE_INDEX',
    0x10: 'INSERT',
    0x20: 'UPDATE',
    0x30: 'SAMEPAGE_UPDATE',
    0x40: 'REVMAP_EXTEND',
    0x50: 'DESUMMARIZE',
  },
  Generic: { 0x00: 'Generic' },
};

/** Every record type of the index access methods that redo knows, as `resource manager/type`; BRIN's "+INIT" is no type of its own here. */
export function indexRecordTypes(): readonly string[] {
  return Object.entries(TYPE_NAMES).flatMap(([rmgr, types]) => Object.values(types).map((type) => `${rmgr}/${type}`));
}

/** The type of an index access method's record, as pg_waldump names it (BRIN's "+INIT" left out). */
export function typeName(record: WalRecord): string {
  const info = record.info & (record.rmid === RM_BRIN ? BRIN_OP_MASK : MAIN_INFO_MASK);
  return TYPE_NAMES[rmgrName(record.rmid)]?.[info] ?? `0x${info.toString(16)}`;
}
