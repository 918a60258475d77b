/**
 * The WAL index of a timeline: where every record ends, and when every commit happened.
 *
 * It answers two questions exactly: which record is the last at an LSN (a branch can only begin where a record ends, and a forged
 * checkpoint has to name the record before it), and which LSN is the state of a time.
 *
 * WAL is divided into buckets of 64 KiB; all records that start in a bucket make one chunk, an image under the key
 * { kind: WAL index, spc: high half, db: low half of the bucket's number }. A bucket in which no record starts has no chunk. Bytes of a
 * chunk, little-endian, varint as in LEB128:
 *
 *   offset  size  field
 *        0     1  version, 2
 *        1     6  LSN where the first record starts
 *        7     8  f64: the latest commit time before this chunk since the clock was last set back, in microseconds since 2000-01-01;
 *                 NaN when there is no commit
 *       15     6  where the clock was last set back before this chunk: the LSN where that commit's record starts; 0 when it never was
 *       21     -  varint number of records, varint number of commits
 *        -     -  each record: varint (end - end of the record before) / 8; for the first, counted from where it starts.
 *                 Where a record does not start right behind the one before (save for a page header), a 0 and
 *                 varint (start - end of the record before) / 8 come first, and its length is counted from its start.
 *        -     -  each commit: varint index of its record, less that of the commit before; zigzag varint of its time, less that of the
 *                 commit before (the first: less the latest time before the chunk, or 0)
 *
 * One byte for a record of up to 1 KiB and about five for a commit: 1 to 2 % of the WAL, less where records are large.
 *
 * Times are compared in the order of the log, as Postgres' recovery_target_time does it: the state of time t ends just before the first commit
 * that is later than t. Postgres reads a commit's time before it puts the commit into the log, so of commits that ran at once the log's order may
 * not be that of their times. Then no state has every commit up to t and none after; this one has every commit that was in the log, so every
 * one that a client was told of, at t, and none that is later than t.
 *
 * A commit that is SET_BACK_US or more earlier than the latest before it shows that the clock was set back. A clock that is set back was ahead:
 * the times after it are the true ones. So the log is divided there, times are compared within a division, and t is looked up in the newest one
 * that began at or before t. What a clock that was ahead gave a time to that came again later is reached by its LSN only.
 *
 * What makes this a binary search is that within a division each chunk has the latest time before it, which never decreases; each chunk says where
 * its division began, so divisions are found from the newest to the oldest.
 *
 * Invariants: records enter in the order of the log. The chunk of the last bucket is in memory (the tail) until a record starts in a
 * later bucket or the timeline is flushed; `flush` writes it as it is, and it is written again, longer, later. A timeline's index answers for the
 * WAL after the timeline's start only: before it, its ancestor's does, since what the ancestor had in memory at the branch point is
 * not in the history that the child inherits. The child's first chunk goes on from the ancestor's as it was at the branch point.
 *
 * Sources: XLogReadRecord in xlogreader.c (where a record ends), RecordTransactionCommit in xact.c (commit times).
 */

import assert from 'node:assert/strict';

import { skipPageHeader } from '../../postgres/lsn.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { walIndexKey } from '../key.ts';
import type { Key } from '../key.ts';

const BUCKET_SIZE = 65536;
const CHUNK_VERSION = 2;
const CHUNK_HEADER_SIZE = 21;
/** Version 1 had no LSN of a clock that was set back. */
const CHUNK_HEADER_SIZE_1 = 15;
/** Far above the time for which a backend may be held up between reading the clock and writing its commit, below what people set clocks by. */
export const SET_BACK_US = 10_000_000;
/** The time before any commit: less than every time. */
export const NO_TIME = -Infinity;

export class WalIndexError extends Error {
  override name = 'WalIndexError';
}

/** A decoded chunk. Record i starts at `starts[i]` and ends at `ends[i]`. */
export interface WalIndexChunk {
  /** Latest commit time before the chunk since the clock was last set back, or NO_TIME. */
  readonly timeBefore: number;
  /** Where the commit starts at which the clock was last set back before the chunk; 0 when it never was. */
  readonly setBackLsn: Lsn;
  readonly starts: readonly Lsn[];
  readonly ends: readonly Lsn[];
  /** Index of the record and time of each commit, in order. */
  readonly commits: readonly { readonly record: number; readonly timeUs: number }[];
}

export function walIndexBucket(startLsn: Lsn): number {
  return Math.floor(startLsn / BUCKET_SIZE);
}

export function walIndexChunkKey(bucket: number): Key {
  return walIndexKey(Math.floor(bucket / 2 ** 32), bucket >>> 0, 0, 0, 0);
}

export function bucketOfChunkKey(key: Key): number {
  return key.spc * 2 ** 32 + key.db;
}

/** How the times of commits stand at a place in the log. */
export interface ClockState {
  /** The latest commit time since the clock was last set back; NO_TIME before any commit. */
  readonly latestUs: number;
  /** As in WalIndexChunk. */
  readonly setBackLsn: Lsn;
}

export function isSetBack(latestUs: number, commitTimeUs: number): boolean {
  return commitTimeUs <= latestUs - SET_BACK_US;
}

/** After the chunk's first `recordCount` records. */
export function clockAfter(chunk: WalIndexChunk, recordCount = chunk.ends.length): ClockState {
  let { timeBefore: latestUs, setBackLsn } = chunk;
  for (const { record, timeUs } of chunk.commits) {
    if (record >= recordCount) break;
    if (isSetBack(latestUs, timeUs)) setBackLsn = chunk.starts[record]!;
    else if (timeUs <= latestUs) continue;
    latestUs = timeUs;
  }
  return { latestUs, setBackLsn };
}

/** The chunk as it was when its last record was the last that ends at or before `lsn`; undefined when there is none. */
export function chunkUpTo(chunk: WalIndexChunk, lsn: Lsn): WalIndexChunk | undefined {
  const count = chunk.ends.findLastIndex((end) => end <= lsn) + 1;
  if (count === 0) return undefined;
  return {
    ...chunk,
    starts: chunk.starts.slice(0, count),
    ends: chunk.ends.slice(0, count),
    commits: chunk.commits.filter(({ record }) => record < count),
  };
}

/** Collects the records of the last bucket, as the bytes that they are in its chunk: one or two for most of them. */
export class WalIndexTail {
  #before: ClockState;
  #now: ClockState;
  #bucketEnd: Lsn = 0;
  readonly #chunk = new ChunkEncoder();

  /** Goes on where `chunk`, the last that was written, ends. */
  constructor(chunk: WalIndexChunk | undefined) {
    this.#before = { latestUs: chunk?.timeBefore ?? NO_TIME, setBackLsn: chunk?.setBackLsn ?? 0 };
    this.#now = chunk === undefined ? this.#before : clockAfter(chunk);
    if (chunk !== undefined) {
      this.#chunk.addAll(chunk);
      this.#bucketEnd = (walIndexBucket(chunk.starts[0]!) + 1) * BUCKET_SIZE;
    }
  }

  /** Adds a record; `commitTimeUs` when it is a commit. Returns the chunk before it, with its key's bucket, when the record begins another. */
  append(startLsn: Lsn, endLsn: Lsn, commitTimeUs?: number): { bucket: number; bytes: Buffer } | undefined {
    let complete: { bucket: number; bytes: Buffer } | undefined;
    const chunk = this.#chunk;
    assert(chunk.count === 0 || startLsn >= chunk.lastEnd, 'records enter the index in the order of the log');
    if (startLsn >= this.#bucketEnd) {
      complete = this.encode();
      this.#before = this.#now;
      this.#bucketEnd = (walIndexBucket(startLsn) + 1) * BUCKET_SIZE;
      chunk.begin();
    }
    if (commitTimeUs !== undefined) {
      chunk.addCommit(commitTimeUs, this.#before.latestUs);
      const { latestUs, setBackLsn } = this.#now;
      if (isSetBack(latestUs, commitTimeUs)) this.#now = { latestUs: commitTimeUs, setBackLsn: startLsn };
      else if (commitTimeUs > latestUs) this.#now = { latestUs: commitTimeUs, setBackLsn };
    }
    chunk.add(startLsn, endLsn);
    return complete;
  }

  /** Where the last record ends; undefined when there is none. */
  get lastEnd(): Lsn | undefined {
    return this.#chunk.count === 0 ? undefined : this.#chunk.lastEnd;
  }

  /** What a chunk of the records so far decodes to; undefined when there are none. */
  get chunk(): WalIndexChunk | undefined {
    const encoded = this.encode();
    return encoded && decodeChunk(encoded.bytes);
  }

  /** The chunk of the records so far. */
  encode(): { bucket: number; bytes: Buffer } | undefined {
    if (this.#chunk.count === 0) return undefined;
    const { latestUs, setBackLsn } = this.#before;
    return { bucket: walIndexBucket(this.#chunk.firstStart), bytes: this.#chunk.encode(latestUs, setBackLsn) };
  }
}

export function encodeChunk(chunk: WalIndexChunk): Buffer {
  const encoder = new ChunkEncoder();
  encoder.addAll(chunk);
  return encoder.encode(chunk.timeBefore, chunk.setBackLsn);
}

/** Makes the bytes of a chunk, a record at a time. */
class ChunkEncoder {
  count = 0;
  firstStart: Lsn = 0;
  lastEnd: Lsn = 0;
  readonly #records = new VarintWriter();
  readonly #commits = new VarintWriter();
  #commitCount = 0;
  #lastCommit = 0;
  #lastTimeUs = 0;

  /** Forgets everything, for the next chunk. */
  begin(): void {
    this.count = 0;
    this.#records.at = 0;
    this.#commits.at = 0;
    this.#commitCount = 0;
  }

  add(startLsn: Lsn, endLsn: Lsn): void {
    let lastEnd = this.lastEnd;
    if (this.count === 0) {
      this.firstStart = lastEnd = startLsn;
    } else if (startLsn !== lastEnd && startLsn !== skipPageHeader(lastEnd)) {
      this.#records.put(0);
      this.#records.put((startLsn - lastEnd) / 8);
      lastEnd = startLsn;
    }
    this.#records.put((endLsn - lastEnd) / 8);
    this.lastEnd = endLsn;
    this.count++;
  }

  /** The record that is added next is a commit. `timeBefore` is that of the chunk. */
  addCommit(timeUs: number, timeBefore: number): void {
    if (this.#commitCount === 0) {
      this.#lastCommit = 0;
      this.#lastTimeUs = timeBefore === NO_TIME ? 0 : timeBefore;
    }
    const delta = timeUs - this.#lastTimeUs;
    this.#commits.put(this.count - this.#lastCommit);
    this.#commits.put(delta < 0 ? -delta * 2 - 1 : delta * 2);
    this.#commitCount++;
    this.#lastCommit = this.count;
    this.#lastTimeUs = timeUs;
  }

  addAll({ starts, ends, commits, timeBefore }: WalIndexChunk): void {
    let commit = 0;
    for (let record = 0; record < starts.length; record++) {
      if (commits[commit]?.record === record) this.addCommit(commits[commit++]!.timeUs, timeBefore);
      this.add(starts[record]!, ends[record]!);
    }
  }

  encode(timeBefore: number, setBackLsn: Lsn): Buffer {
    const counts = new VarintWriter();
    counts.put(this.count);
    counts.put(this.#commitCount);
    const recordsAt = CHUNK_HEADER_SIZE + counts.at;
    const commitsAt = recordsAt + this.#records.at;
    const bytes = Buffer.allocUnsafe(commitsAt + this.#commits.at);
    bytes[0] = CHUNK_VERSION;
    bytes.writeUIntLE(this.firstStart, 1, 6);
    bytes.writeDoubleLE(timeBefore === NO_TIME ? NaN : timeBefore, 7);
    bytes.writeUIntLE(setBackLsn, 15, 6);
    counts.bytes.copy(bytes, CHUNK_HEADER_SIZE, 0, counts.at);
    this.#records.bytes.copy(bytes, recordsAt, 0, this.#records.at);
    this.#commits.bytes.copy(bytes, commitsAt, 0, this.#commits.at);
    return bytes;
  }
}

export function decodeChunk(bytes: Buffer): WalIndexChunk {
  const headerSize = bytes[0] === 1 ? CHUNK_HEADER_SIZE_1 : CHUNK_HEADER_SIZE;
  if (bytes.length < headerSize + 2 || (bytes[0] !== CHUNK_VERSION && bytes[0] !== 1)) {
    throw new WalIndexError(`chunk of ${bytes.length} bytes has version ${bytes[0]}, expected ${CHUNK_VERSION}`);
  }
  const timeBefore = bytes.readDoubleLE(7);
  const setBackLsn = bytes[0] === 1 ? 0 : bytes.readUIntLE(15, 6);
  const input = new VarintReader(bytes, headerSize);
  const recordCount = input.get();
  const commitCount = input.get();
  const starts: Lsn[] = [];
  const ends: Lsn[] = [];
  const commits: { record: number; timeUs: number }[] = [];
  let start = bytes.readUIntLE(1, 6);
  let previousEnd = start;
  for (let i = 0; i < recordCount; i++) {
    if (i > 0) start = skipPageHeader(previousEnd);
    let length = input.get();
    if (length === 0) {
      start = previousEnd += input.get() * 8;
      length = input.get();
    }
    previousEnd += length * 8;
    starts.push(start);
    ends.push(previousEnd);
  }
  let record = 0;
  let timeUs = Number.isNaN(timeBefore) ? 0 : timeBefore;
  for (let i = 0; i < commitCount; i++) {
    record += input.get();
    const zigzag = input.get();
    timeUs += zigzag % 2 === 0 ? zigzag / 2 : -(zigzag + 1) / 2;
    commits.push({ record, timeUs });
  }
  if (input.at !== bytes.length) {
    throw new WalIndexError(`chunk of ${bytes.length} bytes has ${bytes.length - input.at} bytes after its commits`);
  }
  return { timeBefore: Number.isNaN(timeBefore) ? NO_TIME : timeBefore, setBackLsn, starts, ends, commits };
}

/** LEB128, exact up to 2^53: bit operators would stop at 2^32. */
class VarintWriter {
  bytes: Buffer = Buffer.alloc(64);
  at = 0;

  put(value: number): void {
    if (this.at + 8 > this.bytes.length) this.bytes = Buffer.concat([this.bytes, Buffer.alloc(this.bytes.length)]);
    const { bytes } = this;
    let rest = value;
    for (; rest >= 2 ** 31; rest = Math.floor(rest / 0x80)) bytes[this.at++] = (rest & 0x7f) | 0x80;
    let small = rest | 0;
    for (; small >= 0x80; small >>>= 7) bytes[this.at++] = (small & 0x7f) | 0x80;
    bytes[this.at++] = small;
  }
}

class VarintReader {
  readonly #bytes: Buffer;
  at: number;

  constructor(bytes: Buffer, at: number) {
    this.#bytes = bytes;
    this.at = at;
  }

  get(): number {
    let value = 0;
    let scale = 1;
    for (;;) {
      const byte = this.#bytes[this.at++];
      if (byte === undefined) throw new WalIndexError(`chunk of ${this.#bytes.length} bytes ends inside a number`);
      value += (byte & 0x7f) * scale;
      if (byte < 0x80) return value;
      scale *= 0x80;
    }
  }
}
