/**
 * Heap and Heap2: which visibility-map bits a record clears.
 *
 * A record that makes a page not all-visible says so by a flag in its main data; the map page is not among its block references.
 * Where the flag stands: insert at 2, multi-insert at 0, delete, update and the two kinds of lock at 7; the same in 15 to 18.
 * Both bits are cleared for a changed tuple, only all-frozen for a locked one. (Postgres: heapam_xlog.h, the heap_xlog_*
 * functions; heapam.c.)
 */

import { RM_HEAP2 } from '../../postgres/rmgr.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import { VISIBILITYMAP_ALL_FROZEN, VISIBILITYMAP_VALID_BITS } from '../redo/derived.ts';
import type { VisibilityClear } from '../redo/derived.ts';
import { NO_CHANGES } from './change.ts';
import type { Change } from './change.ts';

const OPERATION_MASK = 0x70;
const HEAP_INSERT = 0x00;
const HEAP_DELETE = 0x10;
const HEAP_UPDATE = 0x20;
const HEAP_HOT_UPDATE = 0x40;
const HEAP_LOCK = 0x60;
const HEAP2_MULTI_INSERT = 0x50;
const HEAP2_LOCK_UPDATED = 0x60;

/** First flag bit of insert, multi-insert, delete and lock; of update, for the old tuple's page. */
const CLEARED = 0x01;
/** Of update, for the new tuple's page. */
const CLEARED_ON_NEW_PAGE = 0x02;

export function heapChanges(record: WalRecord): readonly Change[] {
  const operation = record.info & OPERATION_MASK;
  if (record.rmid === RM_HEAP2) {
    if (operation === HEAP2_MULTI_INSERT) return clearOne(record, 0, VISIBILITYMAP_VALID_BITS);
    if (operation === HEAP2_LOCK_UPDATED) return clearOne(record, 7, VISIBILITYMAP_ALL_FROZEN);
    return NO_CHANGES;
  }
  switch (operation) {
    case HEAP_INSERT:
      return clearOne(record, 2, VISIBILITYMAP_VALID_BITS);
    case HEAP_DELETE:
      return clearOne(record, 7, VISIBILITYMAP_VALID_BITS);
    case HEAP_LOCK:
      return clearOne(record, 7, VISIBILITYMAP_ALL_FROZEN);
    case HEAP_UPDATE:
    case HEAP_HOT_UPDATE:
      return clearForUpdate(record);
    default:
      return NO_CHANGES;
  }
}

function clearOne(record: WalRecord, flagsAt: number, bits: number): readonly Change[] {
  if ((mainByte(record, flagsAt) & CLEARED) === 0) return NO_CHANGES;
  const block = record.blocks[0]!;
  return [clearVisibility(block, [{ heapBlock: block.blk, flags: bits }])];
}

/** The new tuple's page is block 0; the old one's is block 1, or block 0 too when the tuple stays on its page. */
function clearForUpdate(record: WalRecord): readonly Change[] {
  const flags = mainByte(record, 7);
  if ((flags & (CLEARED | CLEARED_ON_NEW_PAGE)) === 0) return NO_CHANGES;
  const newPage = record.blocks[0]!;
  const oldPage = record.blocks.find((block) => block.id === 1) ?? newPage;
  const clears: VisibilityClear[] = [];
  if ((flags & CLEARED) !== 0) clears.push({ heapBlock: oldPage.blk, flags: VISIBILITYMAP_VALID_BITS });
  if ((flags & CLEARED_ON_NEW_PAGE) !== 0) clears.push({ heapBlock: newPage.blk, flags: VISIBILITYMAP_VALID_BITS });
  return [clearVisibility(newPage, clears)];
}

/** Most records are only asked for their flags: no view of their bytes is made for that. */
function mainByte(record: WalRecord, at: number): number {
  return record.source[record.sourceOffset + record.mainOffset + at]!;
}

function clearVisibility(block: WalBlock, clears: readonly VisibilityClear[]): Change {
  return { kind: 'clear-visibility', relation: { spc: block.spc, db: block.db, rel: block.rel }, clears };
}
