/**
 * A directory of WAL segment files as a stream of bytes with a known first record.
 *
 * Files are named as Postgres names them (24 hex digits); others are ignored. Where several timelines have the same segment, the newest
 * timeline's is taken, as that one has all that the older one had and goes on. The stream begins with the first segment and goes on while
 * the next one is there: a gap ends it.
 */

import { open, readdir } from 'node:fs/promises';
import { join } from 'node:path';

import { StrataError } from '../base/errors.ts';
import { decodeCheckPoint } from '../postgres/checkpoint.ts';
import {
  WAL_LONG_HEADER_SIZE,
  WAL_PAGE_SIZE,
  WAL_SEGMENT_SIZE,
  advanceLsn,
  formatLsn,
  maxAlign,
  pageHeaderSize,
  pageStart,
  parseWalFileName,
  readLsn,
  segmentStart,
} from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { RM_XLOG } from '../postgres/rmgr.ts';
import { versionOfWalMagic } from '../postgres/version.ts';
import type { PgVersion } from '../postgres/version.ts';
import { WalError } from '../postgres/wal/error.ts';
import { pageHeaderRemaining } from '../postgres/wal/page-header.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import { XLR_RMGR_INFO_MASK } from '../postgres/wal/record.ts';
import type { WalRecord } from '../postgres/wal/record.ts';

const CHUNK_BYTES = 1024 * 1024;
const CHECKPOINT_SHUTDOWN = 0x00;
const CHECKPOINT_ONLINE = 0x10;

export interface WalChunk {
  readonly lsn: Lsn;
  /** Never written to again. */
  readonly bytes: Buffer;
}

/** WAL from one position on, as it comes from a directory, a branch or a test. */
export interface WalSource {
  readonly version: PgVersion;
  /** Start of a record. */
  readonly startLsn: Lsn;
  /** The end of what there is, so that progress can be told. */
  readonly endLsn: Lsn;
  /** There is WAL at this LSN, past `endLsn`, but none between: a segment is missing. */
  readonly resumesAtLsn?: Lsn;
  readonly chunks: AsyncIterable<WalChunk>;
}

interface Segment {
  readonly path: string;
  readonly tli: number;
  readonly startLsn: Lsn;
}

/**
 * Opens a directory at the first record that begins at or after `startLsn`; without it, at the first record that begins in the first
 * segment. Throws `not-found` when there is no WAL, WalError when it is of no supported version.
 */
export async function openWalDirectory(directory: string, startLsn?: Lsn): Promise<WalSource> {
  const all = await listSegments(directory);
  const segments = all.filter((segment) => startLsn === undefined || segment.startLsn >= segmentStart(startLsn));
  const first = segments[0];
  if (first === undefined || (startLsn !== undefined && first.startLsn !== segmentStart(startLsn))) {
    const wanted = startLsn === undefined ? 'no WAL segments' : `no segment that holds ${formatLsn(startLsn)}`;
    const partial = (await readdir(directory)).find((name) => name.endsWith('.partial'));
    const advice = partial === undefined ? '' : `; ${partial} is read when it is called so without .partial`;
    throw new StrataError('not-found', `${wanted} in ${directory}${advice}`);
  }
  let count = 1;
  while (segments[count]?.startLsn === first.startLsn + count * WAL_SEGMENT_SIZE) count++;
  const paths = segments.slice(0, count).map((segment) => segment.path);
  const endLsn = first.startLsn + count * WAL_SEGMENT_SIZE;

  const header = await readBytes(first.path, 0, WAL_LONG_HEADER_SIZE);
  const version = header.length < WAL_LONG_HEADER_SIZE ? undefined : versionOfWalMagic(header.readUInt16LE(0));
  if (version === undefined) {
    throw new WalError(first.startLsn, `${first.path} does not begin with a WAL page of a supported Postgres`);
  }
  checkSegmentSize(header, first);
  const start = await firstRecord(paths, first.startLsn, startLsn ?? first.startLsn, version);
  const resumesAtLsn = await findNextWritten(segments.slice(count), version);
  return {
    version,
    startLsn: start,
    endLsn,
    ...(resumesAtLsn === undefined ? {} : { resumesAtLsn }),
    chunks: readSegments(paths, first.startLsn, start),
  };
}

/**
 * Opens a directory at its first checkpoint: at the redo point of the first checkpoint record whose redo point is there too. From there on
 * the first change to each page carries an image. Without such a checkpoint, at the first record.
 */
export async function openWalDirectoryAtCheckpoint(directory: string): Promise<WalSource> {
  const source = await openWalDirectory(directory);
  const reader = new WalReader(source.startLsn, source.version, { anyTimeline: true });
  for await (const chunk of source.chunks) {
    reader.push(chunk.lsn, chunk.bytes);
    try {
      for (let record = reader.next(); record !== undefined; record = reader.next()) {
        const redo = redoPointOf(record, source.version);
        if (redo !== undefined && redo >= source.startLsn) return await openWalDirectory(directory, redo);
      }
    } catch (error) {
      if (!(error instanceof WalError)) throw error;
      break; // Whoever reads it from the first record on meets it again.
    }
  }
  return openWalDirectory(directory);
}

function redoPointOf(record: WalRecord, version: PgVersion): Lsn | undefined {
  if (record.rmid !== RM_XLOG) return undefined;
  const info = record.info & XLR_RMGR_INFO_MASK;
  if (info !== CHECKPOINT_SHUTDOWN && info !== CHECKPOINT_ONLINE) return undefined;
  return decodeCheckPoint(record.bytes, record.mainOffset, version).redo;
}

async function listSegments(directory: string): Promise<Segment[]> {
  const byStart = new Map<Lsn, Segment>();
  for (const name of await readdir(directory)) {
    const position = parseWalFileName(name);
    if (position === undefined) continue;
    const other = byStart.get(position.startLsn);
    if (other === undefined || other.tli < position.tli)
      byStart.set(position.startLsn, { path: join(directory, name), ...position });
  }
  return [...byStart.values()].sort((a, b) => a.startLsn - b.startLsn);
}

function checkSegmentSize(header: Buffer, first: Segment): void {
  const segmentSize = header.readUInt32LE(32);
  const pageSize = header.readUInt32LE(36);
  if (segmentSize === WAL_SEGMENT_SIZE && pageSize === WAL_PAGE_SIZE) return;
  throw new WalError(
    first.startLsn,
    `${first.path} is of a cluster with segments of ${segmentSize} bytes in pages of ${pageSize}; only ${WAL_SEGMENT_SIZE} and ${WAL_PAGE_SIZE} are supported`,
  );
}

/** Start of the first record at or after `wanted`. */
async function firstRecord(paths: readonly string[], baseLsn: Lsn, wanted: Lsn, version: PgVersion): Promise<Lsn> {
  const page = pageStart(wanted);
  const headerSize = pageHeaderSize(page);
  const at = page - baseLsn;
  const header = await readBytes(paths[Math.floor(at / WAL_SEGMENT_SIZE)]!, at % WAL_SEGMENT_SIZE, headerSize);
  if (header.length < headerSize) throw new WalError(page, 'the file ends before this');
  if (versionOfWalMagic(header.readUInt16LE(0)) !== version || readLsn(header, 8) !== page) {
    throw new WalError(page, 'there is no WAL page here');
  }
  const first = maxAlign(advanceLsn(page + headerSize, pageHeaderRemaining(header, 0)));
  if (first >= wanted) return first;
  const reader = new WalReader(first, version, { anyTimeline: true });
  for await (const chunk of readSegments(paths, baseLsn, first)) {
    reader.push(chunk.lsn, chunk.bytes);
    for (let record = reader.next(); record !== undefined; record = reader.next()) {
      if (record.startLsn >= wanted) return record.startLsn;
      if (record.endLsn === wanted) return wanted;
    }
  }
  throw new WalError(wanted, 'no record begins at or after this');
}

/** The first of these segments that has been written, and is not one that waits to be reused under a new name. */
async function findNextWritten(segments: readonly Segment[], version: PgVersion): Promise<Lsn | undefined> {
  for (const { path, startLsn } of segments) {
    const header = await readBytes(path, 0, WAL_LONG_HEADER_SIZE);
    if (header.length < WAL_LONG_HEADER_SIZE || versionOfWalMagic(header.readUInt16LE(0)) !== version) continue;
    if (readLsn(header, 8) === startLsn) return startLsn;
  }
  return undefined;
}

async function readBytes(path: string, position: number, length: number): Promise<Buffer> {
  const file = await open(path);
  try {
    const bytes = Buffer.alloc(length);
    const { bytesRead } = await file.read(bytes, 0, length, position);
    return bytes.subarray(0, bytesRead);
  } finally {
    await file.close();
  }
}

async function* readSegments(paths: readonly string[], firstLsn: Lsn, startLsn: Lsn): AsyncGenerator<WalChunk> {
  for (let i = 0; i < paths.length; i++) {
    const base = firstLsn + i * WAL_SEGMENT_SIZE;
    if (base + WAL_SEGMENT_SIZE <= startLsn) continue;
    const file = await open(paths[i]!);
    try {
      for (let at = Math.max(startLsn - base, 0); at < WAL_SEGMENT_SIZE;) {
        // Whole pages but for the first, so that a page's header is never cut in two.
        const bytes = Buffer.allocUnsafe(CHUNK_BYTES - (at % CHUNK_BYTES));
        const { bytesRead } = await file.read(bytes, 0, bytes.length, at);
        if (bytesRead === 0) return;
        yield { lsn: base + at, bytes: bytes.subarray(0, bytesRead) };
        at += bytesRead;
      }
    } finally {
      await file.close();
    }
  }
}
