/**
 * Redo of sequence records (Postgres: sequence.c). A sequence is a page with one tuple, which every record makes anew.
 *
 *   0x00 LOG   main data: u32 tablespace, u32 database, u32 relation, then the tuple     0 page (always made anew)
 *
 * The page's special space is u32 0x1717 and 4 bytes of padding.
 */

import { PageError, pageAddItem, pageInit, pageSpecial } from '../../postgres/page.ts';
import { XLR_RMGR_INFO_MASK } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';

const SEQUENCE_LOG = 0x00;
const SEQUENCE_MAGIC = 0x1717;
const MAGIC_SIZE = 4;
const LOCATOR_SIZE = 12;

/** Replays the record on its only block. Returns true: the page's LSN is to become the record's. */
export function redoSequence(page: Buffer, record: WalRecord, blockId: number): boolean {
  if ((record.info & XLR_RMGR_INFO_MASK) !== SEQUENCE_LOG) throw new PageError('unknown record type');
  if (blockId !== 0) throw new PageError(`records of this type change no block ${blockId}`);
  if (record.mainLength <= LOCATOR_SIZE) throw new PageError(`main data of ${record.mainLength} bytes`);
  const tuple = record.bytes.subarray(record.mainOffset + LOCATOR_SIZE, record.mainOffset + record.mainLength);
  pageInit(page, MAGIC_SIZE);
  page.writeUInt32LE(SEQUENCE_MAGIC, pageSpecial(page));
  if (pageAddItem(page, tuple, 1, 0) === 0) throw new PageError(`a tuple of ${tuple.length} bytes does not fit`);
  return true;
}
