/**
 * Redo of BRIN records, block by block (Postgres: brin_xlog.c, brin_pageops.c, brin_revmap.c, brin_page.h). The record layouts are the
 * same in 15 to 18.
 *
 * Special space of every page, 8 bytes: at 4 u16 flags, at 6 u16 type: 0xf091 meta page, 0xf092 revmap, 0xf093 regular.
 * A regular page holds summaries. A revmap page holds, from byte 24 on, the item pointers of the summaries of successive block ranges.
 * The meta page, from byte 24 on: u32 magic, u32 version, u32 blocks in a range, u32 last revmap page.
 *
 * Which record has which blocks:
 *   CREATE_INDEX      0 meta page (made anew)
 *   INSERT            0 regular page (made anew with "+INIT"), 1 revmap
 *   UPDATE            0 new page (made anew with "+INIT"), 1 revmap, 2 old page
 *   SAMEPAGE_UPDATE   0 regular page
 *   REVMAP_EXTEND     0 meta page, 1 revmap (made anew)
 *   DESUMMARIZE       0 revmap, 1 regular page
 */

import {
  PAI_OVERWRITE,
  pageAddItem,
  pageIndexTupleDeleteNoCompact,
  pageIndexTupleOverwrite,
  pageInit,
} from '../../postgres/page.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { blockData, findBlock } from '../../postgres/wal/record.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import {
  INVALID_BLOCK,
  ITEM_POINTER_SIZE,
  PAGE_CONTENTS,
  blockNumber,
  misfit,
  strayBlock,
  unknownType,
  writeItemPointer,
} from './index-tuple.ts';
import { maskPageHintBits, maskPageLsnAndChecksum, maskUnusedSpace } from './masks.ts';

const CREATE_INDEX = 0x00;
const INSERT = 0x10;
const UPDATE = 0x20;
const SAMEPAGE_UPDATE = 0x30;
const REVMAP_EXTEND = 0x40;
const DESUMMARIZE = 0x50;
const OP_MASK = 0x70;
const INIT_PAGE = 0x80;

const SPECIAL_SIZE = 8;
const FLAGS = 4;
const TYPE = 6;
const META = 0xf091;
const REVMAP = 0xf092;
const REGULAR = 0xf093;
const EVACUATE_PAGE = 0x01;

const META_MAGIC = 0xa8109cfa;
const META_END = PAGE_CONTENTS + 16;
const META_LAST_REVMAP = PAGE_CONTENTS + 12;
const REVMAP_ITEMS = Math.floor((BLOCK_SIZE - PAGE_CONTENTS - SPECIAL_SIZE) / ITEM_POINTER_SIZE);

/** Replays the record on its block `blockId`; false when the record leaves that page alone. Sets no LSN. */
export function redoBrin(page: Buffer, record: WalRecord, blockId: number, _version: PgVersion): boolean {
  const block = findBlock(record, blockId);
  if (block === undefined) throw strayBlock(record, blockId);
  const { bytes, mainOffset: main } = record;
  switch (record.info & OP_MASK) {
    case CREATE_INDEX:
      if (blockId !== 0) throw strayBlock(record, blockId);
      initMeta(page, bytes.readUInt32LE(main), bytes.readUInt16LE(main + 4));
      return true;
    case INSERT:
      insert(page, record, block, main);
      return true;
    case UPDATE:
      // u16 offset number of the old summary, (2 unused) what INSERT has
      if (blockId === 2) pageIndexTupleDeleteNoCompact(page, bytes.readUInt16LE(main));
      else insert(page, record, block, main + 4);
      return true;
    case SAMEPAGE_UPDATE:
      if (blockId !== 0) throw strayBlock(record, blockId);
      if (!pageIndexTupleOverwrite(page, bytes.readUInt16LE(main), blockData(record, block))) {
        throw misfit(record, `summary of ${block.dataLength} bytes does not fit in the place of another`);
      }
      return true;
    case REVMAP_EXTEND:
      if (blockId === 0) {
        bytes.copy(page, META_LAST_REVMAP, main, main + 4);
        page.writeUInt16LE(META_END, 12);
      } else if (blockId === 1) initPage(page, REVMAP);
      else throw strayBlock(record, blockId);
      return true;
    case DESUMMARIZE:
      // u32 blocks in a range, u32 first block of the range, u16 offset number of its summary
      if (blockId === 0) {
        setSummary(page, record, bytes.readUInt32LE(main), bytes.readUInt32LE(main + 4), INVALID_BLOCK, 0);
      } else if (blockId === 1) pageIndexTupleDeleteNoCompact(page, bytes.readUInt16LE(main + 8));
      else throw strayBlock(record, blockId);
      return true;
    default:
      throw unknownType(record);
  }
}

/** Blanks what may differ between a page of the primary and the same page replayed (brin_mask). */
export function maskBrin(page: Buffer, _blk: number, _version: PgVersion): void {
  maskPageLsnAndChecksum(page);
  maskPageHintBits(page);
  const special = page.readUInt16LE(16);
  const type = page.readUInt16LE(special + TYPE);
  if (type === REGULAR || (type === META && page.readUInt16LE(12) > PAGE_CONTENTS)) maskUnusedSpace(page);
  page.writeUInt16LE(page.readUInt16LE(special + FLAGS) & ~EVACUATE_PAGE, special + FLAGS);
}

/**
 * INSERT and UPDATE, blocks 0 and 1. Data at `at`: u32 first block of the range, u32 blocks in a range, u16 offset number. Data of block
 * 0: the summary.
 */
function insert(page: Buffer, record: WalRecord, block: WalBlock, at: number): void {
  const offsetNumber = record.bytes.readUInt16LE(at + 8);
  if (block.id === 0) {
    if ((record.info & INIT_PAGE) !== 0) initPage(page, REGULAR);
    if (pageAddItem(page, blockData(record, block), offsetNumber, PAI_OVERWRITE) !== offsetNumber) {
      throw misfit(record, `summary ${offsetNumber} of ${block.dataLength} bytes does not fit the page`);
    }
  } else if (block.id === 1) {
    const firstBlock = record.bytes.readUInt32LE(at);
    const rangeBlocks = record.bytes.readUInt32LE(at + 4);
    setSummary(page, record, rangeBlocks, firstBlock, blockNumber(record, 0), offsetNumber);
  } else throw strayBlock(record, block.id);
}

/** Notes in the revmap where the summary of a range of blocks is. */
function setSummary(
  page: Buffer,
  record: WalRecord,
  rangeBlocks: number,
  firstBlock: number,
  block: number,
  offsetNumber: number,
): void {
  if (rangeBlocks === 0) throw misfit(record, 'ranges of no blocks');
  const index = Math.floor(firstBlock / rangeBlocks) % REVMAP_ITEMS;
  writeItemPointer(page, block, offsetNumber, PAGE_CONTENTS + index * ITEM_POINTER_SIZE);
}

function initMeta(page: Buffer, rangeBlocks: number, version: number): void {
  initPage(page, META);
  page.writeUInt32LE(META_MAGIC, PAGE_CONTENTS);
  page.writeUInt32LE(version, PAGE_CONTENTS + 4);
  page.writeUInt32LE(rangeBlocks, PAGE_CONTENTS + 8);
  page.writeUInt16LE(META_END, 12);
}

function initPage(page: Buffer, type: number): void {
  pageInit(page, SPECIAL_SIZE);
  page.writeUInt16LE(type, BLOCK_SIZE - SPECIAL_SIZE + TYPE);
}
