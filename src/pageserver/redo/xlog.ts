/**
 * Redo of the XLOG resource manager's records that have blocks: full page images (Postgres: xlog_redo in xlog.c).
 *
 *   0xa0 FPI_FOR_HINT   any blocks; one without an image to apply is left as it is
 *   0xb0 FPI            any blocks, each with an image to apply
 *
 * Images to apply are restored before any resource manager is asked, so what comes here is a block without one.
 */

import { PageError } from '../../postgres/page.ts';
import { XLR_RMGR_INFO_MASK } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';

export const XLOG_FPI_FOR_HINT = 0xa0;
export const XLOG_FPI = 0xb0;

/** Returns false: the page and its LSN stay as they are. */
export function redoXlog(record: WalRecord, blockId: number): boolean {
  const info = record.info & XLR_RMGR_INFO_MASK;
  if (info === XLOG_FPI_FOR_HINT) return false;
  if (info === XLOG_FPI) throw new PageError(`block ${blockId} has no image to apply`);
  throw new PageError('records of this type change no blocks');
}
