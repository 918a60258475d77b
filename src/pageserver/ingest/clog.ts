/**
 * CLOG and CommitTs: pages of transaction statuses and of commit timestamps begin and end.
 *
 *   clog zero page       page
 *   clog truncate        page, u32 oldest xid, u32 its database
 *   commit_ts zero page  page
 *   commit_ts truncate   page, u32 oldest xid
 *
 * `page` is 4 bytes until 16, 8 bytes from 17. (Postgres: clog.h, commit_ts.h, clog_redo, commit_ts_redo.)
 */

import { versionFacts } from '../../postgres/version.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { XLR_RMGR_INFO_MASK, mainData } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { SLRU } from '../key.ts';
import { IngestError } from './ingest-error.ts';
import type { Change } from './change.ts';

const ZERO_PAGE = 0x00;
const TRUNCATE = 0x10;

export function clogChanges(record: WalRecord, version: PgVersion): readonly Change[] {
  const main = mainData(record);
  const { page, size } = readPageNumber(main, version);
  switch (record.info & XLR_RMGR_INFO_MASK) {
    case ZERO_PAGE:
      return [{ kind: 'zero-slru-page', slru: SLRU.clog, page }];
    case TRUNCATE:
      // Redo only notes the oldest xid whose status can be looked up, but it is the horizon that the next checkpoint will carry.
      return [
        { kind: 'oldest-xid', xid: main.readUInt32LE(size), db: main.readUInt32LE(size + 4) },
        { kind: 'truncate-slru', slru: SLRU.clog, cutoffPage: page },
      ];
    default:
      throw IngestError.unknownRecord(record);
  }
}

export function commitTsChanges(record: WalRecord, version: PgVersion): readonly Change[] {
  const main = mainData(record);
  const { page, size } = readPageNumber(main, version);
  switch (record.info & XLR_RMGR_INFO_MASK) {
    case ZERO_PAGE:
      return [{ kind: 'zero-slru-page', slru: SLRU.commitTs, page }];
    case TRUNCATE:
      return [
        { kind: 'oldest-commit-timestamp', xid: main.readUInt32LE(size) },
        { kind: 'truncate-slru', slru: SLRU.commitTs, cutoffPage: page },
      ];
    default:
      throw IngestError.unknownRecord(record);
  }
}

/** The page number that begins the main data of the records of SLRUs. No SLRU has 2^32 pages. */
export function readPageNumber(main: Buffer, version: PgVersion): { page: number; size: number } {
  return { page: main.readUInt32LE(0), size: versionFacts(version).redo.slruPageNumberBytes };
}
