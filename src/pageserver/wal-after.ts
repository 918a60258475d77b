/**
 * Whether WAL goes on after the place where it could not be read any further. Where it ends for good there is nothing that Postgres wrote
 * later: zeroes, or pages of a segment that was reused under a new name, which say an older address; perhaps the first part of a record
 * that was being written. Where a page with its own address or a record that links back follows, something in the middle is damaged.
 *
 * The last record of all cannot be judged so: a damaged one looks like one that was half written.
 */

import { WAL_PAGE_SIZE, maxAlign, pageOffset, pageStart, readLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { isValidRmgr } from '../postgres/rmgr.ts';
import type { PgVersion } from '../postgres/version.ts';
import { checkPageHeader } from '../postgres/wal/page-header.ts';
import { WalError } from '../postgres/wal/error.ts';
import { recordCrc } from '../postgres/wal/reader.ts';
import { RECORD_HEADER_SIZE } from '../postgres/wal/record.ts';

export interface WalStop {
  /** End of the last record that is whole and right. */
  readonly goodUntil: Lsn;
  /** What the reader complained about; at or after `goodUntil`, as a record may span pages. */
  readonly errorLsn: Lsn;
}

/** Looks at bytes, which begin at `lsn`, for WAL that goes on after the stop. Returns where it does. */
export function findWalAfter(stop: WalStop, lsn: Lsn, bytes: Buffer, version: PgVersion): Lsn | undefined {
  return findRecord(stop.goodUntil, lsn, bytes) ?? findPage(stop.errorLsn, lsn, bytes, version);
}

/** A whole record in the rest of the page. */
function findRecord(after: Lsn, lsn: Lsn, bytes: Buffer): Lsn | undefined {
  const pageEnd = pageStart(after) + WAL_PAGE_SIZE;
  for (let at = Math.max(maxAlign(after + 8), maxAlign(lsn)); at + RECORD_HEADER_SIZE <= pageEnd; at += 8) {
    const start = at - lsn;
    if (start + RECORD_HEADER_SIZE > bytes.length) return undefined;
    const length = bytes.readUInt32LE(start);
    if (length < RECORD_HEADER_SIZE || at + length > pageEnd || start + length > bytes.length) continue;
    const prev = readLsn(bytes, start + 8);
    if (prev < after || prev >= at || !isValidRmgr(bytes[start + 17]!)) continue;
    const record = bytes.subarray(start, start + length);
    if (recordCrc(record) === record.readUInt32LE(20)) return at;
  }
  return undefined;
}

/** A page that says that it is where it is. The one with the error counts when it is not its header's place that is wrong. */
function findPage(errorLsn: Lsn, lsn: Lsn, bytes: Buffer, version: PgVersion): Lsn | undefined {
  const first = Math.max(nextPage(errorLsn), nextPage(lsn));
  for (let page = first; page - lsn + 40 <= bytes.length; page += WAL_PAGE_SIZE) {
    try {
      checkPageHeader(bytes, page - lsn, page, version, { anyTimeline: true });
      return page;
    } catch (error) {
      if (!(error instanceof WalError)) throw error;
    }
  }
  return undefined;
}

/** The first page that begins at or after this. */
function nextPage(lsn: Lsn): Lsn {
  return pageOffset(lsn) === 0 ? lsn : pageStart(lsn) + WAL_PAGE_SIZE;
}
