/**
 * Searches in the WAL index: from an LSN to the last record at it, and from a time to an LSN. Through ancestors: each timeline
 * answers for the WAL after its own start. (wal-index.ts has the format and what is exact about it.)
 */

import type { Lsn } from '../../postgres/lsn.ts';
import { formatLsn } from '../../postgres/lsn.ts';
import type { TimelineReader } from '../timeline-access.ts';
import {
  NO_TIME,
  WalIndexError,
  bucketOfChunkKey,
  decodeChunk,
  latestTime,
  walIndexBucket,
  walIndexChunkKey,
} from './wal-index.ts';
import type { WalIndexChunk } from './wal-index.ts';

/** A timeline with its ancestors, as searches need them. */
export interface IndexedTimeline {
  readonly reader: TimelineReader;
  /** Its own WAL begins here: the branch point, or for a timeline without ancestor the end of the record it was imported at. */
  readonly startLsn: Lsn;
  /** What ingest has not written into the index yet (`Ingest.indexTail`). */
  readonly tail?: WalIndexChunk | undefined;
  readonly ancestor?: IndexedTimeline | undefined;
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

/** The LSN whose state has every commit up to `timeUs` (microseconds since 2000-01-01) that comes before the first later one in the log. */
export function lsnForTimestamp(timeline: IndexedTimeline, timeUs: number): TimestampPosition {
  const path: { timeline: IndexedTimeline; endLsn: Lsn }[] = [];
  let endLsn = timeline.reader.lastRecordLsn;
  for (let at: IndexedTimeline | undefined = timeline; at !== undefined; at = at.ancestor) {
    path.unshift({ timeline: at, endLsn });
    endLsn = Math.min(endLsn, at.startLsn);
  }
  let latest = NO_TIME;
  for (const step of path) {
    // What a child inherits of its ancestors' index may lack their latest commits, but never has one that they lack: a time that is
    // later here and was in no ancestor is the timeline's own.
    const latestHere = latestTimeAt(step.timeline, step.endLsn);
    if (latestHere > timeUs) {
      const found = firstLater(step.timeline, step.endLsn, timeUs);
      const nothingBefore = latest === NO_TIME && found.timeBefore === NO_TIME;
      return { kind: nothingBefore || found.timeBefore > timeUs ? 'past' : 'present', lsn: found.lsn };
    }
    latest = Math.max(latest, latestHere);
  }
  return { kind: latest === NO_TIME ? 'nodata' : 'future', lsn: timeline.reader.lastRecordLsn };
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

function latestTimeAt(timeline: IndexedTimeline, lsn: Lsn): number {
  const chunk = lastChunkWithEndAtMost(timeline, lsn);
  if (chunk === undefined) return NO_TIME;
  const records = countUpTo(chunk.ends, lsn);
  let latest = chunk.timeBefore;
  for (const { record, timeUs } of chunk.commits) if (record < records && timeUs > latest) latest = timeUs;
  return latest;
}

/** Where the state before the first commit later than `timeUs` ends; that there is one, before `endLsn`, is known. */
function firstLater(timeline: IndexedTimeline, endLsn: Lsn, timeUs: number): { lsn: Lsn; timeBefore: number } {
  // Of buckets up to `low` it is known that they hold no later commit, of those up to `high` that they do.
  let low = walIndexBucket(timeline.startLsn) - 1;
  let high = walIndexBucket(endLsn);
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    const found = chunkAtOrBefore(timeline, middle);
    if (found === undefined || found.bucket <= low || latestTime(found.chunk) <= timeUs) low = middle;
    else high = found.bucket;
  }
  const found = chunkAtOrBefore(timeline, high);
  const chunk = found!.chunk;
  const first = chunk.starts[0]!;
  // Only the index of an imported cluster begins with a time, the one at which it was stopped: history begins there.
  if (chunk.timeBefore > timeUs) return { lsn: timeline.startLsn, timeBefore: chunk.timeBefore };
  let latest = chunk.timeBefore;
  for (const { record, timeUs: commitTimeUs } of chunk.commits) {
    if (commitTimeUs > timeUs) {
      const before = record > 0 ? chunk.ends[record - 1]! : (lastRecord(timeline, first)?.endLsn ?? first);
      // What a child inherits may lack the last records before it begins.
      return { lsn: Math.max(before, timeline.startLsn), timeBefore: latest };
    }
    latest = Math.max(latest, commitTimeUs);
  }
  throw new WalIndexError(
    `no commit after ${timeUs} in the chunk at ${formatLsn(first)}, whose times say there is one`,
  );
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
