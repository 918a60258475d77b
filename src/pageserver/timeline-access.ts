/** A timeline as ingest writes it, and as readers see it; timeline.ts is the one that lasts. */

import type { Lsn } from '../postgres/lsn.ts';
import type { PgVersion } from '../postgres/version.ts';
import type { WalBlock, WalRecord } from '../postgres/wal/record.ts';
import type { WalIndexChunk } from './ingest/wal-index.ts';
import type { Key, KeyRange, RelationFork } from './key.ts';
import type { KeyImage } from './read.ts';

/** A key and an encoded value (value.ts). */
export type KeyValue = readonly [key: Key, value: Buffer];

/**
 * Takes the changes of WAL records, in the order of the log. Everything but `putBulk` is synchronous: a record is taken whole or,
 * after `discard`, not at all.
 */
export interface TimelineWriter extends Pick<TimelineReader, 'pgVersion' | 'lastRecordLsn' | 'getPages'> {
  /** Stores an encoded value (value.ts; copied) of `key` under `lsn`, the end of the record it comes from. Not visible before `advance`. */
  put(key: Key, lsn: Lsn, value: Buffer): void;
  /** Stores a record as a change of one of its blocks, as if it were encoded (value.ts) and put under its end. */
  putRecord(record: WalRecord, block: WalBlock, needsNoPrior: boolean): void;
  /**
   * Stores more values under `endLsn` than memory should hold: what belongs to the record that ends there and is taken next, before it is. Keys rise, each once,
   * and the record itself puts none between the first and the last. They are visible with the `advance` to `endLsn`, and never were when that does
   * not come. A second call is instead of the first.
   */
  putBulk(pieces: AsyncIterable<readonly KeyValue[]>, endLsn: Lsn, signal?: AbortSignal): Promise<void>;
  /** The newest image of `key`, puts that are not yet visible included; undefined when the key does not exist. Not to be changed by the caller. */
  get(key: Key): Buffer | undefined;
  /** The keys that exist, sorted, puts that are not yet visible included. */
  scan(range: KeyRange): KeyImage[];
  /** Makes everything up to `endLsn` visible and wakes who waits for it. `recordStartLsn` is where the record that ends at `endLsn` starts. */
  advance(endLsn: Lsn, recordStartLsn: Lsn): void;
  /** Forgets the puts since the last `advance`: for a record that could not be taken. */
  discard(): void;
  /**
   * Set by ingest. To be called, between two records, before what was put is written out as a layer: ingest then puts, under
   * `lastRecordLsn`, what it still gathers in memory (the last piece of the WAL index), so that the layer is complete without it.
   */
  beforeFlush?: () => void;
  /** Set by ingest: the part of the WAL index that it still gathers in memory. To be used at once: it changes with the next record. */
  indexTail?: () => WalIndexChunk | undefined;
  /** For a branch that has no record of its own yet: the last chunk of the WAL index up to where it begins. Undefined for every other timeline. */
  inheritedIndex?(): WalIndexChunk | undefined;
}

/** Reads a timeline as it was at an LSN, through its ancestors. An LSN above `lastRecordLsn` has to be waited for first. */
export interface TimelineReader {
  readonly pgVersion: PgVersion;
  /** End of the last record that is visible. */
  readonly lastRecordLsn: Lsn;
  /** Start of that record: what the next record's xl_prev has to be. */
  readonly lastRecordStartLsn: Lsn;
  /** The value as it was at `lsn`; undefined when the key did not exist. Not to be changed by the caller. */
  getImage(key: Key, lsn: Lsn): Buffer | undefined;
  /** `count` pages from `firstBlk` on, one after the other; zeroes for those that have no value or lie past the fork's end. */
  getPages(fork: RelationFork, firstBlk: number, count: number, lsn: Lsn): Buffer;
  /** The keys that existed at `lsn`, sorted. */
  scan(range: KeyRange, lsn: Lsn): KeyImage[];
  /** Resolves when `lsn` is visible; rejects with `timeout`, or `unavailable` on abort and when ingest has stopped. */
  waitLsn(lsn: Lsn, timeoutMs: number, signal?: AbortSignal): Promise<void>;
}
