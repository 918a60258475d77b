/**
 * SLRU pages of a timeline: made, changed and removed as records say.
 *
 * Invariant: a segment's size key exists exactly while the segment does, and every page below its size has a value.
 */

import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { KEY_KIND, SLRU, prefixRange, slruPageKey, slruSizeKey } from '../key.ts';
import {
  COMMIT_TIMESTAMPS_PER_PAGE,
  commitTimestampChanges,
  TRANSACTION_COMMITTED,
  transactionStatusChanges,
  TRANSACTIONS_PER_CLOG_PAGE,
} from '../redo/derived.ts';
import type { DerivedChange } from '../redo/derived.ts';
import type { TimelineWriter } from '../timeline-access.ts';
import { encodeCountImage, encodeDerived, encodeImage, encodeTombstone } from '../value.ts';
import { PAGES_PER_SLRU_SEGMENT, slruSegmentIsOld } from './slru.ts';

const ZERO_PAGE = encodeImage(Buffer.alloc(BLOCK_SIZE));
const TOMBSTONE = encodeTombstone();

export class SlruStore {
  readonly #writer: TimelineWriter;
  /** Pages of the segments seen so far, by slru * 2^24 + segment; 0 for one that does not exist. */
  readonly #sizes = new Map<number, number>();
  /** The value that says so of a transaction whose id is its last four bytes. */
  readonly #committed: Buffer;

  constructor(writer: TimelineWriter) {
    this.#writer = writer;
    const { subtype, payload } = transactionStatusChanges(TRANSACTION_COMMITTED, [0])[0]!;
    this.#committed = encodeDerived(subtype, payload);
  }

  zeroPage(slru: number, page: number, lsn: Lsn): void {
    const { segment, index } = locate(page);
    const size = this.#size(slru, segment);
    for (let each = Math.min(size, index); each <= index; each++) {
      this.#writer.put(slruPageKey(slru, segment, each), lsn, ZERO_PAGE);
    }
    if (index >= size) this.#setSize(slru, segment, index + 1, lsn);
  }

  change(slru: number, change: DerivedChange, lsn: Lsn): void {
    this.#put(slru, change.page, lsn, encodeDerived(change.subtype, change.payload));
  }

  /** One transaction has committed: most commits are this change and no other. */
  setCommitted(xid: number, lsn: Lsn): void {
    const value = this.#committed;
    value.writeUInt32LE(xid, value.length - 4);
    this.#put(SLRU.clog, Math.floor(xid / TRANSACTIONS_PER_CLOG_PAGE), lsn, value);
  }

  setCommitTimestamps(timeUs: number, origin: number, xids: readonly number[], lsn: Lsn): void {
    for (const change of commitTimestampChanges(timeUs, origin, xids)) this.change(SLRU.commitTs, change, lsn);
  }

  /** Timestamps are tracked from here on: the page of the next transaction exists, though no record says so (ActivateCommitTs). */
  beginCommitTimestamps(nextXid: number, lsn: Lsn): void {
    const page = Math.floor((nextXid % 2 ** 32) / COMMIT_TIMESTAMPS_PER_PAGE);
    const { segment, index } = locate(page);
    if (index >= this.#size(SLRU.commitTs, segment)) this.zeroPage(SLRU.commitTs, page, lsn);
  }

  /** What is left of timestamps that are no longer tracked is of no use (DeactivateCommitTs). */
  dropCommitTimestamps(lsn: Lsn): void {
    for (const segment of this.#segments(SLRU.commitTs)) this.dropSegment(SLRU.commitTs, segment, lsn);
  }

  truncate(slru: number, cutoffPage: number, lsn: Lsn): void {
    for (const segment of this.#segments(slru)) {
      if (slruSegmentIsOld(slru, segment, cutoffPage)) this.dropSegment(slru, segment, lsn);
    }
  }

  dropSegment(slru: number, segment: number, lsn: Lsn): void {
    const size = this.#size(slru, segment);
    if (size === 0) return;
    for (let page = 0; page < size; page++) this.#writer.put(slruPageKey(slru, segment, page), lsn, TOMBSTONE);
    this.#writer.put(slruSizeKey(slru, segment), lsn, TOMBSTONE);
    this.#sizes.set(cacheId(slru, segment), 0);
  }

  #put(slru: number, page: number, lsn: Lsn, value: Buffer): void {
    const segment = Math.floor(page / PAGES_PER_SLRU_SEGMENT);
    const index = page % PAGES_PER_SLRU_SEGMENT;
    if (index >= this.#size(slru, segment)) this.zeroPage(slru, page, lsn);
    this.#writer.put(slruPageKey(slru, segment, index), lsn, value);
  }

  #segments(slru: number): number[] {
    return this.#writer.scan(prefixRange(KEY_KIND.slruSize, 0, slru)).map(([key]) => key.rel);
  }

  #size(slru: number, segment: number): number {
    const id = cacheId(slru, segment);
    let size = this.#sizes.get(id);
    if (size === undefined) {
      size = this.#writer.get(slruSizeKey(slru, segment))?.readUInt32LE(0) ?? 0;
      this.#sizes.set(id, size);
    }
    return size;
  }

  #setSize(slru: number, segment: number, pages: number, lsn: Lsn): void {
    this.#sizes.set(cacheId(slru, segment), pages);
    this.#writer.put(slruSizeKey(slru, segment), lsn, encodeCountImage(pages));
  }
}

function locate(page: number): { segment: number; index: number } {
  return { segment: Math.floor(page / PAGES_PER_SLRU_SEGMENT), index: page % PAGES_PER_SLRU_SEGMENT };
}

function cacheId(slru: number, segment: number): number {
  return slru * 2 ** 24 + segment;
}
