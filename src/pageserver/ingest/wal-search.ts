/**
 * Searches in the WAL index: from an LSN to the last record at it, from a time to an LSN, and from an LSN to a time. Through ancestors: each
 * timeline answers for the WAL after its own start. (wal-index.ts has the format, and what the state of a time is.)
 */

import type { Lsn } from '../../postgres/lsn.ts';
import { formatLsn } from '../../postgres/lsn.ts';
import type { TimelineReader } from '../timeline-access.ts';
import {
  NO_TIME,
  WalIndexError,
  bucketOfChunkKey,
  chunkUpTo,
  clockAfter,
  decodeChunk,
  walIndexBucket,
  walIndexChunkKey,
} from './wal-index.ts';
import type { ClockState, WalIndexChunk } from './wal-index.ts';

/** A timeline with its ancestors, as searches need them. */
export interface IndexedTimeline {
  readonly reader: TimelineReader;
  /** Its own WAL begins here: the branch point, or for a timeline without ancestor the end of the record it was imported at. */
  readonly startLsn: Lsn;
  /** What ingest has not written into the index yet (`Ingest.indexTail`). */
  readonly tail?: WalIndexChunk | undefined;
  readonly ancestor?: IndexedTimeline | undefined;
  /** Where its history is kept from, if that is past its start: the index may lack what is below. */
  readonly horizonLsn?: Lsn | undefined;
}

export interface RecordPosition {
  readonly startLsn: Lsn;
  readonly endLsn: Lsn;
}

/**
 * The record that ends last at or before `lsn`: where a branch "at `lsn`" really begins, and the record before it. An LSN past the
 * last record gives the last record. Throws WalIndexError when `lsn` is before all history.
 */
export function resolveLsn(timeline: IndexedTimeline, lsn: Lsn): RecordPosition {
  let upTo = lsn;
  for (let at: IndexedTimeline | undefined = timeline; at !== undefined; at = at.ancestor) {
    const position = upTo > at.startLsn || at.ancestor === undefined ? lastRecord(at, upTo) : undefined;
    if (position !== undefined && (position.endLsn > at.startLsn || at.ancestor === undefined)) return position;
    upTo = Math.min(upTo, at.startLsn);
  }
  throw new WalIndexError(`${formatLsn(lsn)} is before the first record that is known`);
}

export interface TimestampPosition {
  /**
   * present: `lsn` is just before the first later commit. future: no commit is later, `lsn` is the last record's end. past: every commit
   * that is known is later, `lsn` is where history begins. nodata: no commit is known, `lsn` is the last record's end.
   */
  readonly kind: 'present' | 'future' | 'past' | 'nodata';
  readonly lsn: Lsn;
}

/** The LSN of the state of a time (microseconds since 2000-01-01; wal-index.ts says what that is). */
export function lsnForTimestamp(timeline: IndexedTimeline, timeUs: number): TimestampPosition {
  const headLsn = timeline.reader.lastRecordLsn;
  let endLsn = headLsn;
  for (;;) {
    const { latestUs, setBackLsn } = clockAt(timeline, endLsn);
    if (latestUs === NO_TIME) return { kind: 'nodata', lsn: headLsn };
    const setBackUs = setBackLsn === 0 ? undefined : timeOfCommit(timeline, setBackLsn);
    if (setBackUs === undefined || setBackUs <= timeUs) {
      if (latestUs <= timeUs) return { kind: 'future', lsn: endLsn };
      const { lsn, timeBefore } = firstLater(timeline, setBackUs === undefined ? 0 : setBackLsn, endLsn, timeUs);
      return { kind: timeBefore === NO_TIME || timeBefore > timeUs ? 'past' : 'present', lsn };
    }
    const { horizonLsn } = ownerOf(timeline, setBackLsn + 1);
    if (horizonLsn !== undefined && setBackLsn <= horizonLsn) return { kind: 'past', lsn: horizonLsn };
    endLsn = resolveLsn(timeline, setBackLsn).endLsn;
  }
}

const CHUNKS_SEARCHED = 1000;

/**
 * The time of the state at `lsn`, in microseconds since 2000-01-01: that of the latest commit in it, since the clock was last set back. Undefined
 * when there is no commit that is known. `lsnForTimestamp` of it has everything that the state at `lsn` has, unless the clock was set back after it.
 */
export function timestampOfLsn(timeline: IndexedTimeline, lsn: Lsn): number | undefined {
  const { latestUs } = clockAt(timeline, lsn);
  return latestUs === NO_TIME ? undefined : latestUs;
}

/**
 * The end of the last commit in the state at `lsn`: nothing after it, up to `lsn`, is visible to anybody. `lsn` itself when there is none near, within
 * CHUNKS_SEARCHED pieces of the index.
 */
export function lastCommitEnd(timeline: IndexedTimeline, lsn: Lsn): Lsn {
  let upTo = lsn;
  for (let i = 0; i < CHUNKS_SEARCHED; i++) {
    const chunk = lastChunkWithEndAtMost(ownerOf(timeline, upTo), upTo);
    if (chunk === undefined) return lsn;
    const records = countUpTo(chunk.ends, upTo);
    const commit = chunk.commits.findLast(({ record }) => record < records);
    if (commit !== undefined) return chunk.ends[commit.record]!;
    upTo = chunk.starts[0]!;
  }
  return lsn;
}

/** What ingest goes on from that takes the first record of a timeline after `lsn`: the chunk of the last record at `lsn`, up to it. */
export function chunkAt(timeline: IndexedTimeline, lsn: Lsn): WalIndexChunk | undefined {
  const owner = ownerOf(timeline, lsn);
  const chunk = lastChunkWithEndAtMost(owner, lsn);
  return chunk && chunkUpTo(chunk, lsn);
}

function clockAt(timeline: IndexedTimeline, lsn: Lsn): ClockState {
  const chunk = lastChunkWithEndAtMost(ownerOf(timeline, lsn), lsn);
  if (chunk === undefined) return { latestUs: NO_TIME, setBackLsn: 0 };
  return clockAfter(chunk, countUpTo(chunk.ends, lsn));
}

/** The timeline whose own WAL ends at `lsn`. */
function ownerOf(timeline: IndexedTimeline, lsn: Lsn): IndexedTimeline {
  let owner = timeline;
  while (lsn <= owner.startLsn && owner.ancestor !== undefined) owner = owner.ancestor;
  return owner;
}

/** The time of the commit that starts at `startLsn`; undefined when the index no longer has it. */
function timeOfCommit(timeline: IndexedTimeline, startLsn: Lsn): number | undefined {
  // A record that starts where a timeline does is that timeline's.
  const found = chunkAtOrBefore(ownerOf(timeline, startLsn + 1), walIndexBucket(startLsn));
  const record = found?.chunk.starts.indexOf(startLsn) ?? -1;
  return found?.chunk.commits.find((commit) => commit.record === record)?.timeUs;
}

/** The last record of a timeline, or of what it inherits, that ends at or before `lsn`. */
function lastRecord(timeline: IndexedTimeline, lsn: Lsn): RecordPosition | undefined {
  const { reader } = timeline;
  if (lsn >= reader.lastRecordLsn) return { startLsn: reader.lastRecordStartLsn, endLsn: reader.lastRecordLsn };
  const found = lastChunkWithEndAtMost(timeline, lsn);
  if (found === undefined) return undefined;
  const index = countUpTo(found.ends, lsn) - 1;
  return { startLsn: found.starts[index]!, endLsn: found.ends[index]! };
}

/** The last chunk that has a record that ends at or before `lsn`. */
function lastChunkWithEndAtMost(timeline: IndexedTimeline, lsn: Lsn): WalIndexChunk | undefined {
  for (let bucket = walIndexBucket(lsn); ; bucket--) {
    const found = chunkAtOrBefore(timeline, bucket);
    if (found === undefined || found.chunk.ends[0]! <= lsn) return found?.chunk;
    bucket = found.bucket;
  }
}

/**
 * Where the state before the first commit later than `timeUs` ends, of the commits that start at or after `fromLsn` and end at or before `endLsn`;
 * that there is one, and that the clock was not set back between, is known. `timeBefore` is the latest before it.
 */
function firstLater(
  timeline: IndexedTimeline,
  fromLsn: Lsn,
  endLsn: Lsn,
  timeUs: number,
): { lsn: Lsn; timeBefore: number } {
  // Of a timeline and its ancestors, the oldest that has a later one.
  let owner = timeline;
  let ownEndLsn = endLsn;
  for (let at: IndexedTimeline | undefined = timeline; at !== undefined; at = at.ancestor) {
    if (endLsn <= at.startLsn) continue;
    owner = at;
    ownEndLsn = endLsn;
    endLsn = at.startLsn;
    if (fromLsn >= at.startLsn || at.ancestor === undefined || clockAt(at.ancestor, endLsn).latestUs <= timeUs) break;
  }
  // Of buckets up to `low` it is known that they hold no later commit, of those up to `high` that they do.
  let low = walIndexBucket(Math.max(owner.startLsn, owner.horizonLsn ?? 0, fromLsn)) - 1;
  let high = Math.max(low + 1, walIndexBucket(ownEndLsn));
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    const found = chunkAtOrBefore(owner, middle);
    if (found === undefined || found.bucket <= low || latestIn(found.chunk, fromLsn, ownEndLsn) <= timeUs) low = middle;
    else high = found.bucket;
  }
  const chunk = chunkAtOrBefore(owner, high)?.chunk;
  if (chunk === undefined) throw new WalIndexError(`no chunk of the WAL index is at or before ${formatLsn(ownEndLsn)}`);
  const first = chunk.starts[0]!;
  let latest = first > fromLsn ? chunk.timeBefore : NO_TIME;
  // Only an index begins with a later time: that of an imported cluster, or one that lacks what was before its horizon.
  if (latest > timeUs) return { lsn: Math.max(owner.startLsn, owner.horizonLsn ?? 0), timeBefore: latest };
  for (const { record, timeUs: commitTimeUs } of chunk.commits) {
    if (chunk.starts[record]! < fromLsn) continue;
    if (commitTimeUs > timeUs) {
      const before = record > 0 ? chunk.ends[record - 1]! : (lastRecord(owner, first)?.endLsn ?? first);
      return { lsn: Math.max(before, owner.startLsn), timeBefore: latest };
    }
    latest = Math.max(latest, commitTimeUs);
  }
  throw new WalIndexError(
    `no commit after ${timeUs} in the chunk at ${formatLsn(first)}, whose times say there is one`,
  );
}

/** The latest time up to the end of the chunk, of commits that start at or after `fromLsn` and end at or before `endLsn`. */
function latestIn(chunk: WalIndexChunk, fromLsn: Lsn, endLsn: Lsn): number {
  let latest = chunk.starts[0]! > fromLsn ? chunk.timeBefore : NO_TIME;
  for (const { record, timeUs } of chunk.commits) {
    if (chunk.starts[record]! >= fromLsn && chunk.ends[record]! <= endLsn && timeUs > latest) latest = timeUs;
  }
  return latest;
}

function chunkAtOrBefore(
  timeline: IndexedTimeline,
  bucket: number,
): { bucket: number; chunk: WalIndexChunk } | undefined {
  const { reader, tail } = timeline;
  if (tail !== undefined) {
    const tailBucket = walIndexBucket(tail.starts[0]!);
    if (tailBucket <= bucket) return { bucket: tailBucket, chunk: tail };
  }
  const lsn = reader.lastRecordLsn;
  const direct = reader.getImage(walIndexChunkKey(bucket), lsn);
  if (direct !== undefined) return { bucket, chunk: decodeChunk(direct) };
  // A record that covers whole buckets leaves them without a chunk: look back in growing steps.
  for (let end = bucket, width = 16; end > 0; width *= 16) {
    const start = Math.max(0, end - width);
    const last = reader.scan({ start: walIndexChunkKey(start), end: walIndexChunkKey(end) }, lsn).at(-1);
    if (last !== undefined) return { bucket: bucketOfChunkKey(last[0]), chunk: decodeChunk(last[1]) };
    end = start;
  }
  return undefined;
}

/** How many of the rising `ends` are at or below `lsn`. */
function countUpTo(ends: readonly Lsn[], lsn: Lsn): number {
  let low = 0;
  let high = ends.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (ends[middle]! <= lsn) low = middle + 1;
    else high = middle;
  }
  return low;
}
