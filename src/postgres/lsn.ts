/**
 * WAL positions (LSNs) and the arithmetic of WAL pages and segments.
 *
 * An LSN is a byte position in the WAL of a branch. Postgres keeps it in 64 bits; here it is a number, exact up to 2^53, which at 1 GB/s
 * of WAL lasts a hundred days short of three centuries. Its low 32 bits are exact in bitwise operators too (`lsn & mask`), because those
 * work modulo 2^32; divisions by powers of two are exact in floating point.
 *
 * The byte stream is cut into pages of 8192 bytes, each of which begins with a header of 24 bytes (40 bytes on the first page of a
 * segment of 16 MiB). Headers count in LSNs: an LSN points at a byte of the stream including headers. (Postgres: xlog_internal.h.)
 */

export type Lsn = number;

export const WAL_PAGE_SIZE = 8192;
export const WAL_SEGMENT_SIZE = 16 * 1024 * 1024;
/** Size of the header of a WAL page, MAXALIGNed (XLogPageHeaderData). */
export const WAL_SHORT_HEADER_SIZE = 24;
/** Size of the header of the first page of a segment, MAXALIGNed (XLogLongPageHeaderData). */
export const WAL_LONG_HEADER_SIZE = 40;
/** The LSN that stands for "none". No record begins here. */
export const INVALID_LSN: Lsn = 0;

const TWO_32 = 2 ** 32;
const SEGMENTS_PER_LOG_ID = TWO_32 / WAL_SEGMENT_SIZE;

/** `1/6B374D48`: the text form, as pg_lsn prints it. */
export function formatLsn(lsn: Lsn): string {
  return `${lsnHigh(lsn).toString(16).toUpperCase()}/${lsnLow(lsn).toString(16).toUpperCase()}`;
}

/** Parses `X/Y`; throws a RangeError that names the text when it is not an LSN or is above 2^53 - 1. */
export function parseLsn(text: string): Lsn {
  const match = /^([0-9A-Fa-f]{1,8})\/([0-9A-Fa-f]{1,8})$/.exec(text);
  const lsn = match ? parseInt(match[1]!, 16) * TWO_32 + parseInt(match[2]!, 16) : NaN;
  if (!Number.isSafeInteger(lsn)) throw new RangeError(`not an LSN: ${JSON.stringify(text)}`);
  return lsn;
}

/** 16 upper-case hex digits: the form in file names, which sorts as text the way LSNs sort. */
export function lsnToHex(lsn: Lsn): string {
  return lsn.toString(16).toUpperCase().padStart(16, '0');
}

/** The inverse of lsnToHex; throws a RangeError that names the text. */
export function lsnFromHex(text: string): Lsn {
  const lsn = /^[0-9A-Fa-f]{16}$/.test(text) ? parseInt(text, 16) : NaN;
  if (!Number.isSafeInteger(lsn)) throw new RangeError(`not an LSN of 16 hex digits: ${JSON.stringify(text)}`);
  return lsn;
}

export function lsnHigh(lsn: Lsn): number {
  return Math.floor(lsn / TWO_32);
}

export function lsnLow(lsn: Lsn): number {
  return lsn >>> 0;
}

/** An LSN stored as a plain little-endian u64 (records, control file, protocol messages of ours). Exact below 2^53. */
export function readLsn(bytes: Buffer, offset: number): Lsn {
  if (offset + 8 > bytes.length) throw new RangeError(`an LSN at byte ${offset} of ${bytes.length}`);
  return readU32(bytes, offset + 4) * TWO_32 + readU32(bytes, offset);
}

/** As Buffer.readUInt32LE, whose checks cost more than the loads: this is done twice for each WAL record. */
function readU32(bytes: Buffer, at: number): number {
  return (bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)) >>> 0;
}

export function writeLsn(bytes: Buffer, lsn: Lsn, offset: number): void {
  bytes.writeUInt32LE(lsnLow(lsn), offset);
  bytes.writeUInt32LE(lsnHigh(lsn), offset + 4);
}

/** Rounds up to 8, where records begin (MAXALIGN). */
export function maxAlign(value: number): number {
  return value + (-value & 7);
}

/** Offset of an LSN in its WAL page. */
export function pageOffset(lsn: Lsn): number {
  return lsn & (WAL_PAGE_SIZE - 1);
}

/** LSN of the first byte of the WAL page that holds `lsn`. */
export function pageStart(lsn: Lsn): Lsn {
  return lsn - pageOffset(lsn);
}

/** Offset of an LSN in its segment file. */
export function segmentOffset(lsn: Lsn): number {
  return lsn & (WAL_SEGMENT_SIZE - 1);
}

/** LSN of the first byte of the segment that holds `lsn`. */
export function segmentStart(lsn: Lsn): Lsn {
  return lsn - segmentOffset(lsn);
}

/** Number of the segment that holds `lsn`: segment n holds [n * 16 MiB, (n + 1) * 16 MiB). */
export function segmentNumber(lsn: Lsn): number {
  return Math.floor(lsn / WAL_SEGMENT_SIZE);
}

/** Size of the header of the WAL page that holds `lsn`: 40 on the first page of a segment, else 24. */
export function pageHeaderSize(lsn: Lsn): number {
  return segmentOffset(lsn) < WAL_PAGE_SIZE ? WAL_LONG_HEADER_SIZE : WAL_SHORT_HEADER_SIZE;
}

/** Where a byte written "at" `lsn` really goes: past the page header when `lsn` is exactly a page's start, else `lsn` itself. */
export function skipPageHeader(lsn: Lsn): Lsn {
  return pageOffset(lsn) === 0 ? lsn + pageHeaderSize(lsn) : lsn;
}

/**
 * Where the record before ends, when an LSN is just after a page's header, and the LSN itself otherwise: pg_current_wal_insert_lsn() gives the place
 * of the next record's first byte (XLogBytePosToRecPtr in xlog.c), but no record ends there.
 */
export function withoutPageHeader(lsn: Lsn): Lsn {
  const start = pageStart(lsn);
  return lsn - start === pageHeaderSize(start) ? start : lsn;
}

/**
 * The LSN just past `length` bytes of record data that begin at `lsn`, counting the page headers between them. A position that falls
 * exactly on the end of a page stays there: it is not moved past the next page's header.
 */
export function advanceLsn(lsn: Lsn, length: number): Lsn {
  let at = lsn;
  let left = length;
  while (left > 0) {
    at = skipPageHeader(at);
    const room = WAL_PAGE_SIZE - pageOffset(at);
    const step = left < room ? left : room;
    at += step;
    left -= step;
  }
  return at;
}

/** Name of the segment file that holds `lsn`: 24 hex digits (timeline, high 32 bits, segment within them). */
export function walFileName(tli: number, lsn: Lsn): string {
  const segment = segmentNumber(lsn);
  return hex8(tli) + hex8(Math.floor(segment / SEGMENTS_PER_LOG_ID)) + hex8(segment % SEGMENTS_PER_LOG_ID);
}

/** Timeline and first LSN of a segment file's name, or undefined when the name is not one. */
export function parseWalFileName(name: string): { tli: number; startLsn: Lsn } | undefined {
  if (!/^[0-9A-F]{24}$/.test(name)) return undefined;
  const low = parseInt(name.slice(16), 16);
  if (low >= SEGMENTS_PER_LOG_ID) return undefined;
  const segment = parseInt(name.slice(8, 16), 16) * SEGMENTS_PER_LOG_ID + low;
  return { tli: parseInt(name.slice(0, 8), 16), startLsn: segment * WAL_SEGMENT_SIZE };
}

function hex8(value: number): string {
  return value.toString(16).toUpperCase().padStart(8, '0');
}
