/**
 * Cuts a stream of WAL bytes into records. (Postgres: XLogDecodeNextRecord in xlogreader.c.)
 *
 * Bytes are pushed as they come, in chunks of any size; records are taken out one by one. A record that lies whole within a page and a
 * chunk is a view of the chunk; only records that cross pages or chunks are copied together. So a chunk must not be written to after it
 * was pushed, and lives as long as a record of it.
 *
 * What is checked: each page's header; that a record that goes on over a page has as much left as the page says; resource manager,
 * length and CRC of each record; and that each record names the start of the one before it, so that stale bytes are never taken for WAL.
 * A record is given out only when it is whole, checked, and every byte up to its end LSN is here. For the record that ends a segment
 * early (XLOG_SWITCH) the end is the segment's, and the zeroes up to there belong to it.
 *
 * An error is for good: `position` and `lastRecordStart` tell how far the WAL was good.
 */

import { CRC32C_INIT, crc32cExtendView, crc32cFinish } from '../../base/crc32c.ts';
import {
  maxAlign,
  pageHeaderSize,
  pageOffset,
  readLsn,
  segmentStart,
  WAL_PAGE_SIZE,
  WAL_SEGMENT_SIZE,
} from '../lsn.ts';
import type { Lsn } from '../lsn.ts';
import { isValidRmgr, RM_XLOG } from '../rmgr.ts';
import type { PgVersion } from '../version.ts';
import { WalError } from './error.ts';
import {
  checkPageHeader,
  pageHeaderInfo,
  pageHeaderRemaining,
  type PageHeaderRules,
  XLP_FIRST_IS_CONTRECORD,
  XLP_FIRST_IS_OVERWRITE_CONTRECORD,
} from './page-header.ts';
import { decodeWalRecordAt, MAX_RECORD_SIZE, RECORD_HEADER_SIZE, XLR_RMGR_INFO_MASK } from './record.ts';
import type { WalRecord } from './record.ts';

const XLOG_SWITCH = 0x40;
const XLOG_OVERWRITE_CONTRECORD = 0xd0;
/** Memory taken at once for a record whose length is not yet known to be true. */
const FIRST_ASSEMBLY_BYTES = 1024 * 1024;

export interface WalReaderOptions extends PageHeaderRules {
  /** Start of the record before startLsn. Without it the first record's link back is only checked to point back. */
  readonly prevLsn?: Lsn;
}

export class WalReader {
  readonly #version: PgVersion;
  readonly #rules: PageHeaderRules;
  readonly #prevLsn: Lsn | undefined;
  /** Bytes not consumed yet are #bytes[#at…]; #bytes[0] is at #base. */
  #bytes: Buffer = Buffer.alloc(0);
  #view = viewOf(this.#bytes);
  #base: Lsn;
  #at = 0;
  readonly #startLsn: Lsn;
  /** The last record given out: where it ends the next one begins, but for a page header. */
  #last: WalRecord | undefined;

  // The record being put together, when it did not lie whole before us.
  #partial: Buffer | undefined;
  #partialStart: Lsn = 0;
  #partialLength = 0;
  #partialTotal = 0;
  #partialHeaderChecked = false;
  /** Start of a record whose end was replaced by the record that comes now. */
  #overwritten: Lsn | undefined;
  /** A checked record, while bytes before its end LSN (padding, or the rest of a switched segment) are still to come. */
  #pending: WalRecord | undefined;
  #failure: WalError | undefined;

  /** `startLsn` is the start of a record or the end of one (which may be the start of a page). */
  constructor(startLsn: Lsn, version: PgVersion, options: WalReaderOptions = {}) {
    this.#base = startLsn;
    this.#startLsn = startLsn;
    this.#version = version;
    this.#rules = options;
    this.#prevLsn = options.prevLsn;
  }

  /** End LSN of the last record given out; startLsn before the first. */
  get position(): Lsn {
    return this.#last?.endLsn ?? this.#startLsn;
  }

  /** Start LSN of the last record given out. */
  get lastRecordStart(): Lsn | undefined {
    return this.#last?.startLsn;
  }

  /** The LSN that the next pushed bytes should begin at. */
  get pushLsn(): Lsn {
    return this.#base + this.#bytes.length;
  }

  /** Adds bytes that begin at `lsn`. Bytes that were pushed before are skipped; a gap throws WalError. */
  push(lsn: Lsn, bytes: Buffer): void {
    const end = this.pushLsn;
    if (lsn > end)
      throw new WalError(end, `bytes are missing: the next ones given are at ${lsn - end} bytes after this`);
    let fresh = lsn === end ? bytes : bytes.subarray(Math.min(end - lsn, bytes.length));
    if (this.#at < this.#bytes.length) fresh = Buffer.concat([this.#bytes.subarray(this.#at), fresh]);
    this.#base += this.#at;
    this.#at = 0;
    this.#bytes = fresh;
    this.#view = viewOf(fresh);
  }

  /**
   * The next whole record, or undefined until more bytes are pushed. Throws WalError when the WAL is not what it should be, and from then
   * on always.
   */
  next(): WalRecord | undefined {
    if (this.#failure !== undefined) throw this.#failure;
    try {
      return this.#read();
    } catch (error) {
      if (error instanceof WalError) this.#failure = error;
      throw error;
    }
  }

  #read(): WalRecord | undefined {
    for (;;) {
      if (this.#pending !== undefined) return this.#takePending();
      const bytes = this.#bytes;
      const at = this.#at;
      if (at >= bytes.length) return undefined;
      const lsn = this.#base + at;
      const inPage = pageOffset(lsn);
      if (inPage === 0) {
        if (!this.#readPageHeader(lsn)) return undefined;
        continue;
      }
      if (this.#partial !== undefined) {
        const record = this.#extendPartial(lsn);
        if (record !== undefined) return record;
        continue;
      }
      if (bytes.length - at < 4) return undefined;
      const total = this.#view.getUint32(at, true);
      if (total < RECORD_HEADER_SIZE || total > MAX_RECORD_SIZE) throw new WalError(lsn, `record length ${total}`);
      if (total <= WAL_PAGE_SIZE - inPage && maxAlign(total) <= bytes.length - at) {
        this.#checkHeader(this.#view, at, lsn);
        const record = this.#finish(bytes, this.#view, at, total, lsn, lsn + maxAlign(total));
        if (record !== undefined) return record;
      } else {
        this.#partial = Buffer.allocUnsafe(Math.min(total, FIRST_ASSEMBLY_BYTES));
        this.#partialStart = lsn;
        this.#partialLength = 0;
        this.#partialTotal = total;
        this.#partialHeaderChecked = false;
      }
    }
  }

  /** Consumes the page header at `lsn` if it is all here. */
  #readPageHeader(lsn: Lsn): boolean {
    const size = pageHeaderSize(lsn);
    if (this.#bytes.length - this.#at < size) return false;
    checkPageHeader(this.#bytes, this.#at, lsn, this.#version, this.#rules);
    const info = pageHeaderInfo(this.#bytes, this.#at);
    const remaining = pageHeaderRemaining(this.#bytes, this.#at);
    const isContinuation = (info & XLP_FIRST_IS_CONTRECORD) !== 0;
    if (this.#partial !== undefined && (info & XLP_FIRST_IS_OVERWRITE_CONTRECORD) !== 0) {
      this.#overwritten = this.#partialStart;
      this.#partial = undefined;
    } else if (this.#partial !== undefined) {
      const expected = this.#partialTotal - this.#partialLength;
      if (!isContinuation || remaining !== expected) {
        throw new WalError(
          lsn,
          `page goes on with ${isContinuation ? remaining : 'no'} bytes of a record, ${expected} are to come`,
        );
      }
    } else if (isContinuation) {
      throw new WalError(lsn, `page goes on with ${remaining} bytes of a record, but a record should begin here`);
    }
    this.#at += size;
    return true;
  }

  /** Adds what is here of this page to the record being put together; gives it when it is whole. */
  #extendPartial(lsn: Lsn): WalRecord | undefined {
    const take = Math.min(
      this.#partialTotal - this.#partialLength,
      WAL_PAGE_SIZE - pageOffset(lsn),
      this.#bytes.length - this.#at,
    );
    let partial = this.#partial!;
    if (this.#partialLength + take > partial.length) {
      const grown = Buffer.allocUnsafe(
        Math.min(this.#partialTotal, Math.max(2 * partial.length, this.#partialLength + take)),
      );
      partial.copy(grown, 0, 0, this.#partialLength);
      this.#partial = partial = grown;
    }
    this.#bytes.copy(partial, this.#partialLength, this.#at, this.#at + take);
    this.#partialLength += take;
    this.#at += take;
    if (!this.#partialHeaderChecked && this.#partialLength >= RECORD_HEADER_SIZE) {
      this.#checkHeader(viewOf(partial), 0, this.#partialStart);
      this.#partialHeaderChecked = true;
    }
    if (this.#partialLength < this.#partialTotal) return undefined;
    this.#partial = undefined;
    return this.#finish(partial, viewOf(partial), 0, this.#partialTotal, this.#partialStart, maxAlign(lsn + take));
  }

  /** Checks of a record header that need no more than the header. */
  #checkHeader(view: DataView, at: number, startLsn: Lsn): void {
    const rmid = view.getUint8(at + 17);
    if (!isValidRmgr(rmid)) throw new WalError(startLsn, `record of resource manager ${rmid}, which does not exist`);
    const prev = view.getUint32(at + 12, true) * 2 ** 32 + view.getUint32(at + 8, true);
    const expected = this.#last === undefined ? this.#prevLsn : this.#last.startLsn;
    if (expected === undefined ? prev >= startLsn : prev !== expected) {
      throw new WalError(
        startLsn,
        `record says that the one before it is at byte ${prev}, it is at ${expected ?? 'an earlier one'}`,
      );
    }
  }

  /** Checks and decodes a whole record. Undefined when bytes before its end LSN are still to come. */
  #finish(
    bytes: Buffer,
    view: DataView,
    at: number,
    length: number,
    startLsn: Lsn,
    endLsn: Lsn,
  ): WalRecord | undefined {
    checkCrc(view, at, length, startLsn);
    const isSwitch =
      view.getUint8(at + 17) === RM_XLOG && (view.getUint8(at + 16) & XLR_RMGR_INFO_MASK) === XLOG_SWITCH;
    const end = isSwitch ? segmentStart(endLsn - 1) + WAL_SEGMENT_SIZE : endLsn;
    const record = decodeWalRecordAt(bytes, view, at, length, startLsn, end);
    if (this.#overwritten !== undefined) {
      checkOverwrite(record, this.#overwritten);
      this.#overwritten = undefined;
    }
    if (end > this.pushLsn) {
      this.#pending = record;
      return undefined;
    }
    this.#took(record);
    return record;
  }

  #takePending(): WalRecord | undefined {
    const record = this.#pending!;
    if (this.pushLsn < record.endLsn) {
      this.#at = this.#bytes.length;
      return undefined;
    }
    this.#pending = undefined;
    this.#took(record);
    return record;
  }

  #took(record: WalRecord): void {
    this.#at = record.endLsn - this.#base;
    this.#last = record;
  }
}

export interface EndOfWal {
  /** End of the last record that is whole and right; startLsn when there is none. */
  readonly endLsn: Lsn;
  readonly lastRecordStart: Lsn | undefined;
  /** Why the next bytes are no record; undefined when the bytes just end. */
  readonly stoppedBy: WalError | undefined;
}

/** Reads WAL from `startLsn` until it ends or is not WAL any more, and tells how far every record is whole and CRC-valid. */
export async function findEndOfWal(
  startLsn: Lsn,
  version: PgVersion,
  chunks: AsyncIterable<Buffer> | Iterable<Buffer>,
  options: WalReaderOptions = {},
): Promise<EndOfWal> {
  const reader = new WalReader(startLsn, version, options);
  let stoppedBy: WalError | undefined;
  for await (const chunk of chunks) {
    reader.push(reader.pushLsn, chunk);
    try {
      while (reader.next() !== undefined);
    } catch (error) {
      if (!(error instanceof WalError)) throw error;
      stoppedBy = error;
      break;
    }
  }
  return { endLsn: reader.position, lastRecordStart: reader.lastRecordStart, stoppedBy };
}

/** CRC32C of a whole record: of what follows the header, then of the header up to the CRC itself. */
export function recordCrc(record: Uint8Array): number {
  return recordCrcAt(viewOf(record), 0, record.length);
}

function recordCrcAt(view: DataView, at: number, length: number): number {
  const state = crc32cExtendView(CRC32C_INIT, view, at + RECORD_HEADER_SIZE, at + length);
  return crc32cFinish(crc32cExtendView(state, view, at, at + 20));
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function checkCrc(view: DataView, at: number, length: number, startLsn: Lsn): void {
  const stored = view.getUint32(at + 20, true);
  const computed = recordCrcAt(view, at, length);
  if (stored !== computed) {
    throw new WalError(
      startLsn,
      `record of ${length} bytes has CRC 0x${stored.toString(16)}, its bytes give 0x${computed.toString(16)}`,
    );
  }
}

function checkOverwrite(record: WalRecord, overwritten: Lsn): void {
  const isOverwrite = record.rmid === RM_XLOG && (record.info & XLR_RMGR_INFO_MASK) === XLOG_OVERWRITE_CONTRECORD;
  const named = isOverwrite && record.mainLength >= 8 ? readLsn(record.bytes, record.mainOffset) : undefined;
  if (named !== overwritten) {
    throw new WalError(
      record.startLsn,
      `record should replace the one at byte ${overwritten}, it replaces ${named ?? 'none'}`,
    );
  }
}
