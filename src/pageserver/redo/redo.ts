/**
 * Redo: making of a page what it must be after a WAL record. (Postgres: XLogReadBufferForRedo in xlogutils.c, and each rm_redo.)
 *
 * Postgres replays a record on all its blocks at once. Here one block is replayed at a time, on the page as it was just before the
 * record, so that a page can be made from its own history alone. What a record does to pages that it does not name is in derived.ts.
 *
 * Invariants:
 * - A page is never served after an error: redo may have changed half of it.
 * - A record of a kind that is not known, or that does not fit the page, throws RedoError. A full page image that is to be applied is
 *   restored whatever the resource manager: that much of an unknown extension's records can be replayed.
 * - The page's LSN becomes the record's end LSN, except where Postgres leaves it alone (see each resource manager).
 */

import { PageError, pageIsNew, setPageLsn } from '../../postgres/page.ts';
import {
  RM_BRIN,
  RM_BTREE,
  RM_GENERIC,
  RM_GIN,
  RM_GIST,
  RM_HASH,
  RM_HEAP,
  RM_HEAP2,
  RM_SEQ,
  RM_SPGIST,
  RM_XLOG,
  rmgrName,
} from '../../postgres/rmgr.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { findBlock } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { maskBrin, redoBrin } from './brin.ts';
import { maskBtree, redoBtree } from './btree.ts';
import { maskGeneric, redoGeneric } from './generic.ts';
import { maskGin, redoGin } from './gin.ts';
import { maskGist, redoGist, redoGistOnImage } from './gist.ts';
import { maskHash, redoHash } from './hash.ts';
import { redoHeap } from './heap.ts';
import { redoHeap2 } from './heap2.ts';
import { ImageError, restoreImage } from './image.ts';
import { maskHeap, maskSequence } from './masks.ts';
import { recordTypeName } from './record-type.ts';
import { RedoError } from './redo-error.ts';
import { redoSequence } from './sequence.ts';
import { maskSpgist, redoSpgist } from './spgist.ts';
import { redoXlog } from './xlog.ts';

/**
 * Whether replaying the record on this block needs the page as it was. It does not when the record makes the page anew or restores it
 * from an image.
 */
export function needsPriorPage(record: WalRecord, blockId: number): boolean {
  const block = findBlock(record, blockId);
  return block === undefined || !(block.willInit || (block.hasImage && block.applyImage));
}

/**
 * Replays a record on one of its blocks. `page` is the page before the record, or any page where needsPriorPage is false; it is
 * changed in place.
 */
export function applyRecord(page: Buffer, record: WalRecord, blockId: number, version: PgVersion): void {
  try {
    const block = findBlock(record, blockId);
    if (block === undefined) throw new PageError(`the record has no block ${blockId}`);
    if (block.hasImage && block.applyImage) {
      restoreImage(page, record, block);
      // The header of a page that is all zeros is not to be touched.
      if (record.rmid === RM_GIST) redoGistOnImage(page, record, blockId, version);
      if (!pageIsNew(page)) setPageLsn(page, record.endLsn);
      return;
    }
    if (block.willInit) page.fill(0);
    if (redo(page, record, blockId, version)) setPageLsn(page, record.endLsn);
  } catch (error) {
    throw asRedoError(error, record, version);
  }
}

/** Returns whether the page's LSN is to become the record's. */
function redo(page: Buffer, record: WalRecord, blockId: number, version: PgVersion): boolean {
  switch (record.rmid) {
    case RM_HEAP:
      return redoHeap(page, record, blockId);
    case RM_HEAP2:
      return redoHeap2(page, record, blockId, version);
    case RM_BTREE:
      return redoBtree(page, record, blockId, version);
    case RM_HASH:
      return redoHash(page, record, blockId, version);
    case RM_GIN:
      return redoGin(page, record, blockId, version);
    case RM_GIST:
      return redoGist(page, record, blockId, version);
    case RM_SPGIST:
      return redoSpgist(page, record, blockId, version);
    case RM_BRIN:
      return redoBrin(page, record, blockId, version);
    case RM_GENERIC:
      return redoGeneric(page, record, blockId, version);
    case RM_SEQ:
      return redoSequence(page, record, blockId);
    case RM_XLOG:
      return redoXlog(record, blockId);
    default:
      throw new PageError('records of this resource manager cannot be replayed on pages');
  }
}

/**
 * Masks in a page, in place, what may differ between the primary's and ours after a record of this resource manager. Postgres compares
 * without a mask where there is none. Throws MaskError when the page cannot be masked.
 */
export function maskPage(page: Buffer, rmid: number, blk: number, version: PgVersion): void {
  switch (rmid) {
    case RM_HEAP:
    case RM_HEAP2:
      return maskHeap(page, blk);
    case RM_BTREE:
      return maskBtree(page, blk, version);
    case RM_HASH:
      return maskHash(page, blk, version);
    case RM_GIN:
      return maskGin(page, blk, version);
    case RM_GIST:
      return maskGist(page, blk, version);
    case RM_SPGIST:
      return maskSpgist(page, blk, version);
    case RM_BRIN:
      return maskBrin(page, blk, version);
    case RM_GENERIC:
      return maskGeneric(page, blk, version);
    case RM_SEQ:
      return maskSequence(page);
  }
}

function asRedoError(error: unknown, record: WalRecord, version: PgVersion): unknown {
  // A RangeError comes from reading or writing outside a record or page.
  const known = error instanceof PageError || error instanceof ImageError || error instanceof RangeError;
  if (!known) return error;
  const rmgr = rmgrName(record.rmid);
  return new RedoError(rmgr, recordTypeName(record, version), record.startLsn, error.message, { cause: error });
}
