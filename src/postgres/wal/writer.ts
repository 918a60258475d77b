/**
 * Writing WAL: one record laid into the stream at an LSN, and the segment files that let Postgres start from it.
 *
 * Postgres reads a record only from a segment whose first page has a right header, and from pages that have one. So a segment made here
 * holds, besides the record, the header of its first page and the header of the page the record begins on; all the rest is a hole. What
 * lies before the record on its page is zero: Postgres never reads it, as the record's own LSN is given to it (in the control file).
 * The header of that page says that what comes before the record on it belongs to a record from an earlier page, so that tools which
 * look for the first record of a page find ours.
 */

import { open } from 'node:fs/promises';
import { join } from 'node:path';
import {
  maxAlign,
  pageHeaderSize,
  pageOffset,
  pageStart,
  segmentStart,
  skipPageHeader,
  WAL_LONG_HEADER_SIZE,
  WAL_PAGE_SIZE,
  WAL_SEGMENT_SIZE,
  walFileName,
  writeLsn,
} from '../lsn.ts';
import type { Lsn } from '../lsn.ts';
import type { PgVersion } from '../version.ts';
import { WAL_TIMELINE_ID, writePageHeader } from './page-header.ts';
import { recordCrc } from './reader.ts';
import { RECORD_HEADER_SIZE } from './record.ts';

export interface RecordToWrite {
  /** End of the record before: a multiple of 8, which may be a page's start. */
  readonly lsn: Lsn;
  /** Start of the record before. */
  readonly prevLsn: Lsn;
  readonly rmid: number;
  readonly info: number;
  readonly xid: number;
  readonly mainData: Uint8Array;
  readonly version: PgVersion;
  readonly systemId: bigint;
}

export interface WrittenRecord {
  /** The stream from RecordToWrite.lsn up to endLsn, with the headers of the pages that begin in it. */
  readonly bytes: Buffer;
  /** Where the record itself begins: past a page header when `lsn` was a page's start. */
  readonly startLsn: Lsn;
  readonly endLsn: Lsn;
}

/** Lays a record without block references into WAL at an LSN. */
export function encodeRecordAt(record: RecordToWrite): WrittenRecord {
  const { lsn, version, systemId } = record;
  if (lsn % 8 !== 0) throw new RangeError(`a record cannot begin at byte ${lsn}, which is no multiple of 8`);
  const body = encodeRecord(record);
  const startLsn = skipPageHeader(lsn);
  const pages = Math.ceil(body.length / (WAL_PAGE_SIZE - WAL_LONG_HEADER_SIZE)) + 1;
  const bytes = Buffer.alloc(startLsn - lsn + body.length + pages * WAL_LONG_HEADER_SIZE + 8);
  let at = 0;
  let written = 0;
  while (written < body.length) {
    if (pageOffset(lsn + at) === 0) {
      const remaining = written === 0 ? 0 : body.length - written;
      at += writePageHeader(bytes, at, { pageLsn: lsn + at, remaining, systemId, version });
    }
    const take = Math.min(body.length - written, WAL_PAGE_SIZE - pageOffset(lsn + at));
    body.copy(bytes, at, written, written + take);
    at += take;
    written += take;
  }
  const endLsn = maxAlign(lsn + at);
  return { bytes: bytes.subarray(0, endLsn - lsn), startLsn, endLsn };
}

function encodeRecord(record: RecordToWrite): Buffer {
  const { mainData } = record;
  const isShort = mainData.length < 256;
  const dataHeaderSize = mainData.length === 0 ? 0 : isShort ? 2 : 5;
  const bytes = Buffer.alloc(RECORD_HEADER_SIZE + dataHeaderSize + mainData.length);
  bytes.writeUInt32LE(bytes.length, 0);
  bytes.writeUInt32LE(record.xid, 4);
  writeLsn(bytes, record.prevLsn, 8);
  bytes[16] = record.info;
  bytes[17] = record.rmid;
  if (mainData.length > 0) {
    bytes[24] = isShort ? 255 : 254;
    if (isShort) bytes[25] = mainData.length;
    else bytes.writeUInt32LE(mainData.length, 25);
  }
  bytes.set(mainData, RECORD_HEADER_SIZE + dataHeaderSize);
  bytes.writeUInt32LE(recordCrc(bytes), 20);
  return bytes;
}

/** A segment file of 16 MiB that is a hole but for these writes. */
export interface SparseSegment {
  readonly name: string;
  readonly startLsn: Lsn;
  readonly writes: readonly { readonly offset: number; readonly bytes: Buffer }[];
}

/**
 * The segment files that hold `bytes` at `lsn` (two when they cross a segment's end) in a form that Postgres can read a record from that
 * begins there. `bytes` brings the headers of the pages that begin in it; those of the segment's first page and of the page that holds
 * `lsn` are added where needed.
 */
export function walSegmentWithTail(lsn: Lsn, bytes: Buffer, version: PgVersion, systemId: bigint): SparseSegment[] {
  const segments: SparseSegment[] = [];
  const end = lsn + bytes.length;
  for (let start = segmentStart(lsn); start < end; start += WAL_SEGMENT_SIZE) {
    const from = Math.max(lsn, start);
    const to = Math.min(end, start + WAL_SEGMENT_SIZE);
    const writes: { offset: number; bytes: Buffer }[] = [];
    const page = pageStart(from);
    if (page > start) writes.push({ offset: 0, bytes: pageHeader(start, 0, version, systemId) });
    if (from > page)
      writes.push({ offset: page - start, bytes: pageHeader(page, pageOffset(from), version, systemId) });
    writes.push({ offset: from - start, bytes: bytes.subarray(from - lsn, to - lsn) });
    segments.push({ name: walFileName(WAL_TIMELINE_ID, start), startLsn: start, writes });
  }
  return segments;
}

/** Makes the segment files in a directory (pg_wal), as sparse files. They are not synced: a compute's disk is a cache. */
export async function writeSparseSegments(directory: string, segments: readonly SparseSegment[]): Promise<void> {
  for (const segment of segments) {
    const file = await open(join(directory, segment.name), 'w', 0o600);
    try {
      await file.truncate(WAL_SEGMENT_SIZE);
      for (const { offset, bytes } of segment.writes) await file.write(bytes, 0, bytes.length, offset);
    } finally {
      await file.close();
    }
  }
}

/** The header of a page whose first `used` bytes, header included, hold nothing that begins here. */
function pageHeader(pageLsn: Lsn, used: number, version: PgVersion, systemId: bigint): Buffer {
  const bytes = Buffer.alloc(pageHeaderSize(pageLsn));
  const remaining = Math.max(0, used - bytes.length);
  writePageHeader(bytes, 0, { pageLsn, remaining, systemId, version });
  return bytes;
}
