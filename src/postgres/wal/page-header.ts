/**
 * The headers of WAL pages (XLogPageHeaderData and XLogLongPageHeaderData in xlog_internal.h).
 *
 *   0   u16  magic, by major version
 *   2   u16  info: XLP_* flags
 *   4   u32  timeline id: always 1 in WAL of ours
 *   8   u64  LSN of the page's first byte
 *   16  u32  bytes left of the record that goes on from the page before; 0 without XLP_FIRST_IS_CONTRECORD
 *   20  u32  zero
 *   on the first page of a segment (XLP_LONG_HEADER):
 *   24  u64  system identifier
 *   32  u32  segment size
 *   36  u32  WAL page size
 */

import {
  pageHeaderSize,
  readLsn,
  segmentOffset,
  WAL_LONG_HEADER_SIZE,
  WAL_PAGE_SIZE,
  WAL_SEGMENT_SIZE,
  writeLsn,
} from '../lsn.ts';
import type { Lsn } from '../lsn.ts';
import { versionFacts } from '../version.ts';
import type { PgVersion } from '../version.ts';
import { WalError } from './error.ts';

export const XLP_FIRST_IS_CONTRECORD = 0x0001;
export const XLP_LONG_HEADER = 0x0002;
export const XLP_BKP_REMOVABLE = 0x0004;
/** The page begins with a record that replaces one whose end never came. */
export const XLP_FIRST_IS_OVERWRITE_CONTRECORD = 0x0008;
const XLP_ALL_FLAGS = 0x000f;

/** The only timeline id: a new primary is a new start at an LSN, never a promotion. */
export const WAL_TIMELINE_ID = 1;

export interface PageHeaderRules {
  /** The WAL is of some other cluster, which may have been promoted. */
  readonly anyTimeline?: boolean;
}

/** Checks the header of the page at `pageLsn`, which lies whole at `bytes[at…]`; throws WalError naming what is wrong. */
export function checkPageHeader(
  bytes: Buffer,
  at: number,
  pageLsn: Lsn,
  version: PgVersion,
  rules: PageHeaderRules = {},
): void {
  const magic = bytes.readUInt16LE(at);
  if (magic !== versionFacts(version).walPageMagic) {
    throw new WalError(
      pageLsn,
      `page magic is 0x${magic.toString(16)}, Postgres ${version} writes 0x${versionFacts(version).walPageMagic.toString(16)}`,
    );
  }
  const info = bytes.readUInt16LE(at + 2);
  const isFirst = segmentOffset(pageLsn) === 0;
  if ((info & ~XLP_ALL_FLAGS) !== 0 || ((info & XLP_LONG_HEADER) !== 0) !== isFirst) {
    throw new WalError(pageLsn, `page has info bits 0x${info.toString(16)}`);
  }
  const tli = bytes.readUInt32LE(at + 4);
  if (tli !== WAL_TIMELINE_ID && rules.anyTimeline !== true)
    throw new WalError(pageLsn, `page is of timeline ${tli}, not ${WAL_TIMELINE_ID}`);
  const address = readLsn(bytes, at + 8);
  if (address !== pageLsn) throw new WalError(pageLsn, `page says it is at byte ${address}, it is at ${pageLsn}`);
  if (isFirst) {
    const segmentSize = bytes.readUInt32LE(at + 32);
    const pageSize = bytes.readUInt32LE(at + 36);
    if (segmentSize !== WAL_SEGMENT_SIZE || pageSize !== WAL_PAGE_SIZE) {
      throw new WalError(
        pageLsn,
        `segments of ${segmentSize} bytes in pages of ${pageSize}, not ${WAL_SEGMENT_SIZE} and ${WAL_PAGE_SIZE}`,
      );
    }
  }
}

/** The info bits of a header that was checked. */
export function pageHeaderInfo(bytes: Buffer, at: number): number {
  return bytes.readUInt16LE(at + 2);
}

/** How many bytes of the record that began on an earlier page are still to come, this page included. */
export function pageHeaderRemaining(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at + 16);
}

export interface PageHeaderFields {
  readonly pageLsn: Lsn;
  /** Bytes left of the record that goes on from the page before, or 0. */
  readonly remaining: number;
  readonly systemId: bigint;
  readonly version: PgVersion;
}

/** Writes the header of the page at `pageLsn` to `bytes[at…]` and returns its size: 40 on a segment's first page, else 24. */
export function writePageHeader(bytes: Buffer, at: number, fields: PageHeaderFields): number {
  const { pageLsn, remaining, systemId, version } = fields;
  const size = pageHeaderSize(pageLsn);
  const isLong = size === WAL_LONG_HEADER_SIZE;
  bytes.writeUInt16LE(versionFacts(version).walPageMagic, at);
  bytes.writeUInt16LE((remaining > 0 ? XLP_FIRST_IS_CONTRECORD : 0) | (isLong ? XLP_LONG_HEADER : 0), at + 2);
  bytes.writeUInt32LE(WAL_TIMELINE_ID, at + 4);
  writeLsn(bytes, pageLsn, at + 8);
  bytes.writeUInt32LE(remaining, at + 16);
  bytes.writeUInt32LE(0, at + 20);
  if (isLong) {
    bytes.writeBigUInt64LE(systemId, at + 24);
    bytes.writeUInt32LE(WAL_SEGMENT_SIZE, at + 32);
    bytes.writeUInt32LE(WAL_PAGE_SIZE, at + 36);
  }
  return size;
}
