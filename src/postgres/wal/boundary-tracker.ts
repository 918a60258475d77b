/**
 * Follows a WAL stream just closely enough to know where whole records end. What a safekeeper acknowledges, and what a new primary starts
 * from, is such an end.
 *
 * Lengths are followed, not contents: no CRC is checked (what is checked is that page headers say where they are and how much of a
 * record goes on over them). An end counts when every byte before it was pushed, padding included. For the record that ends a segment
 * early (XLOG_SWITCH) it is the segment's end. A record that was cut short and replaced (an "overwrite contrecord") never counts.
 *
 * There is no state to be saved: a tracker made anew at `endLsn` and given the bytes from there on is in the same state.
 */

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
import { RM_XLOG } from '../rmgr.ts';
import { WalError } from './error.ts';
import {
  pageHeaderInfo,
  pageHeaderRemaining,
  XLP_FIRST_IS_CONTRECORD,
  XLP_FIRST_IS_OVERWRITE_CONTRECORD,
} from './page-header.ts';
import { MAX_RECORD_SIZE, RECORD_HEADER_SIZE, XLR_RMGR_INFO_MASK } from './record.ts';

const XLOG_SWITCH = 0x40;

export class WalBoundaryTracker {
  /** The next byte to come. */
  #lsn: Lsn;
  #endLsn: Lsn;
  #lastRecordStart: Lsn | undefined;
  /** Bytes before this are padding, or the rest of a switched segment; when they are here, the record is whole and ends here. */
  #skipTo: Lsn;

  #recordStart: Lsn | undefined;
  /** Bytes of the current record still to come, when its header is here. */
  #left = 0;
  #isSwitch = false;
  /** The first bytes of the current record, until its header is here. */
  readonly #header = Buffer.alloc(RECORD_HEADER_SIZE);
  #headerLength = 0;
  /** The first bytes of the current page, until its header is here. */
  readonly #pageHeader = Buffer.alloc(40);
  #pageHeaderLength = 0;

  /**
   * `startLsn` is the end of a record; or any page's start, and when a record goes on over that page, its end is the first that counts.
   */
  constructor(startLsn: Lsn) {
    this.#lsn = startLsn;
    this.#endLsn = startLsn;
    this.#skipTo = startLsn;
  }

  /** End of the last whole record; startLsn before the first. */
  get endLsn(): Lsn {
    return this.#endLsn;
  }

  /** Start of the last whole record, if it began here. */
  get lastRecordStart(): Lsn | undefined {
    return this.#lastRecordStart;
  }

  /** The LSN of the next byte to be pushed. */
  get pushLsn(): Lsn {
    return this.#lsn;
  }

  /** Takes the next bytes of the stream and returns `endLsn`. Throws WalError where the bytes cannot be WAL. */
  push(bytes: Buffer): Lsn {
    let at = 0;
    while (at < bytes.length) {
      const here = bytes.length - at;
      let took: number;
      if (this.#lsn < this.#skipTo) took = this.#skip(here);
      else if (pageOffset(this.#lsn) < pageHeaderSize(this.#lsn)) took = this.#takePageHeader(bytes, at, here);
      else if (this.#left > 0) took = this.#takeBody(here);
      else took = this.#takeRecordHeader(bytes, at, here);
      at += took;
    }
    return this.#endLsn;
  }

  #skip(here: number): number {
    const took = Math.min(here, this.#skipTo - this.#lsn);
    this.#lsn += took;
    if (this.#lsn === this.#skipTo) this.#reachEnd();
    return took;
  }

  #takePageHeader(bytes: Buffer, at: number, here: number): number {
    const size = pageHeaderSize(this.#lsn);
    const took = Math.min(here, size - this.#pageHeaderLength);
    bytes.copy(this.#pageHeader, this.#pageHeaderLength, at, at + took);
    this.#pageHeaderLength += took;
    this.#lsn += took;
    if (this.#pageHeaderLength < size) return took;

    this.#pageHeaderLength = 0;
    const pageLsn = this.#lsn - size;
    const address = readLsn(this.#pageHeader, 8);
    if (address !== pageLsn) throw new WalError(pageLsn, `page says it is at byte ${address}, it is at ${pageLsn}`);
    const info = pageHeaderInfo(this.#pageHeader, 0);
    const remaining = (info & XLP_FIRST_IS_CONTRECORD) !== 0 ? pageHeaderRemaining(this.#pageHeader, 0) : 0;
    const isFirst = pageLsn === this.#endLsn && this.#lastRecordStart === undefined;
    if ((info & XLP_FIRST_IS_OVERWRITE_CONTRECORD) !== 0) {
      this.#left = 0;
      this.#headerLength = 0;
    } else if (isFirst && this.#headerLength === 0 && this.#left === 0) {
      this.#left = remaining;
    } else if (remaining !== this.#expected()) {
      throw new WalError(pageLsn, `page goes on with ${remaining} bytes of a record, ${this.#expected()} are to come`);
    }
    return took;
  }

  /** How much of the current record is still to come; its first 4 bytes are always on its first page. */
  #expected(): number {
    return this.#headerLength > 0 ? this.#header.readUInt32LE(0) - this.#headerLength : this.#left;
  }

  #takeRecordHeader(bytes: Buffer, at: number, here: number): number {
    if (this.#headerLength === 0) this.#recordStart = this.#lsn;
    const room = WAL_PAGE_SIZE - pageOffset(this.#lsn);
    const took = Math.min(here, room, RECORD_HEADER_SIZE - this.#headerLength);
    bytes.copy(this.#header, this.#headerLength, at, at + took);
    this.#headerLength += took;
    this.#lsn += took;
    if (this.#headerLength < 4) return took;
    const total = this.#header.readUInt32LE(0);
    if (total < RECORD_HEADER_SIZE || total > MAX_RECORD_SIZE)
      throw new WalError(this.#recordStart!, `record length ${total}`);
    if (this.#headerLength < RECORD_HEADER_SIZE) return took;
    this.#headerLength = 0;
    this.#left = total - RECORD_HEADER_SIZE;
    this.#isSwitch = this.#header[17] === RM_XLOG && (this.#header[16]! & XLR_RMGR_INFO_MASK) === XLOG_SWITCH;
    if (this.#left === 0) this.#finish();
    return took;
  }

  #takeBody(here: number): number {
    const took = Math.min(here, this.#left, WAL_PAGE_SIZE - pageOffset(this.#lsn));
    this.#left -= took;
    this.#lsn += took;
    if (this.#left === 0) this.#finish();
    return took;
  }

  #finish(): void {
    const end = maxAlign(this.#lsn);
    this.#skipTo = this.#isSwitch ? segmentStart(end - 1) + WAL_SEGMENT_SIZE : end;
    this.#isSwitch = false;
    if (this.#lsn === this.#skipTo) this.#reachEnd();
  }

  #reachEnd(): void {
    this.#endLsn = this.#skipTo;
    this.#lastRecordStart = this.#recordStart;
    this.#recordStart = undefined;
  }
}
