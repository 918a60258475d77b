/**
 * A timeline's WAL on disk: segment files of 16 MiB with Postgres' own names and bytes, so that Postgres' tools read them.
 *
 * A segment has its full size from the start, sparse, and zeroes after the end of the WAL. The first segment begins before the timeline does: its
 * first page, and the page in which the timeline begins, get headers that say "what is before this belongs to a record from elsewhere".
 *
 * Invariants:
 *   - When `write` resolves, the bytes are on disk: files are opened with O_DSYNC, so a write is its own fdatasync. Small writes have
 *     zeroes written ahead of them, so that most need no change of the file's block map.
 *   - After `recover` and `truncate` nothing but zeroes follows the end, durably. Otherwise an old record left behind could one day stand exactly
 *     where newer WAL ends and be taken for its continuation.
 *   - After an error nothing may be written any more: the caller stops using the store.
 * Calls of write, recover and truncate do not overlap.
 */
import { close, constants, fsync, ftruncate, open, writev, writevSync } from 'node:fs';
import { copyFile, open as openHandle, readdir, rename, stat, unlink } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { TimelineIdentity } from '../api/safekeeper.ts';
import {
  formatLsn,
  type Lsn,
  pageHeaderSize,
  pageOffset,
  pageStart,
  parseWalFileName,
  segmentOffset,
  segmentStart,
  WAL_SEGMENT_SIZE,
  walFileName,
} from '../postgres/lsn.ts';
import { toPgVersion } from '../postgres/version.ts';
import { WAL_TIMELINE_ID, writePageHeader } from '../postgres/wal/page-header.ts';
import { findEndOfWal } from '../postgres/wal/reader.ts';
import { syncDirectory } from '../base/durable-file.ts';

const openFile = promisify(open);
const closeFile = promisify(close);
const truncateFile = promisify(ftruncate);
const syncFile = promisify(fsync);

/** Of the copy of a segment from which WAL was cut that had been acknowledged: for people who know how to use it. */
const CUT_SUFFIX = '.cut';
/** Writes of at least this size are their own preallocation. */
const LARGE_WRITE_BYTES = 64 * 1024;
const ZERO_AHEAD = Buffer.alloc(256 * 1024);
/** Buffers in one writev call (IOV_MAX is 1024). */
const MAX_BUFFERS = 512;
const FIRST_SCAN_BYTES = 64 * 1024;
const SCAN_BYTES = 1024 * 1024;

/**
 * The folder of the store that wrote last in this process. As long as it is the only one that writes, it does so in the main thread: handing a write to another
 * thread and being woken by it costs about as much as half a flush of a fast disk, and nobody else is kept waiting.
 */
let lastWriter: string | undefined;
/** After a write that took so long the next one is handed over, so that a disk that is stuck holds up nothing else. */
const SLOW_WRITE_MS = 20;

export function segmentPath(directory: string, lsn: Lsn): string {
  return join(directory, walFileName(WAL_TIMELINE_ID, lsn));
}

export class WalStore {
  readonly #directory: string;
  readonly #identity: TimelineIdentity;
  readonly #logStartLsn: Lsn;
  /** The segment being written. */
  #file: number | undefined;
  #fileStart: Lsn = 0;
  #zeroedLsn: Lsn = 0;
  #isDiskSlow = false;

  /** `logStartLsn` is the log's first byte: the timeline's start, or a later one of a log whose beginning is elsewhere. */
  constructor(directory: string, identity: TimelineIdentity, logStartLsn = identity.startLsn) {
    this.#directory = directory;
    this.#identity = identity;
    this.#logStartLsn = logStartLsn;
  }

  /**
   * Makes the first segment, with the page headers that precede the timeline's start. Its content is durable when this resolves; its name is once
   * the folder was synced.
   */
  async create(): Promise<void> {
    const startLsn = this.#logStartLsn;
    if (segmentOffset(startLsn) === 0) return; // The first page header comes with the stream.
    const handle = await openHandle(segmentPath(this.#directory, startLsn), 'w', 0o600);
    try {
      // What is between is a hole: a log that begins late in its segment would else take megabytes of zeroes, for each branch.
      for (const { offset, bytes } of firstPageHeaders(this.#identity, startLsn)) {
        await handle.write(bytes, 0, bytes.length, offset);
      }
      await handle.truncate(WAL_SEGMENT_SIZE);
      await handle.sync();
    } finally {
      await handle.close();
    }
  }

  /**
   * The end of the last whole record that follows `commitLsn` without a gap; everything before it is durable when this resolves and everything
   * after it is gone, or, if `isLoss` says so of the end, in copies of the segments, beside them, until it says otherwise. Throws when not even `commitLsn` is here.
   */
  async recover(commitLsn: Lsn, isLoss: (endLsn: Lsn) => boolean = () => false): Promise<Lsn> {
    const { pgVersion } = this.#identity;
    if (commitLsn > this.#logStartLsn && (await this.#segmentSize(commitLsn - 1)) !== WAL_SEGMENT_SIZE) {
      throw new Error(`the WAL before the commit LSN ${formatLsn(commitLsn)} is not in ${this.#directory}`);
    }
    const { endLsn } = await findEndOfWal(commitLsn, toPgVersion(pgVersion), this.#chunks(commitLsn));
    for (let lsn = segmentStart(commitLsn); lsn < segmentStart(endLsn); lsn += WAL_SEGMENT_SIZE) {
      const handle = await openHandle(segmentPath(this.#directory, lsn), 'r+');
      await handle.sync().finally(() => handle.close());
    }
    if (isLoss(endLsn)) await this.#keepCut(endLsn);
    else await this.#removeCut();
    await this.truncate(endLsn);
    return endLsn;
  }

  /** Copies that are there are of an attempt at the same, which may have cut already. */
  async #keepCut(endLsn: Lsn): Promise<void> {
    const segments = await this.#segments();
    for (const start of segments.filter((each) => each + WAL_SEGMENT_SIZE > endLsn)) {
      const path = segmentPath(this.#directory, start);
      const [partial, copy] = [`${path}${CUT_SUFFIX}.partial`, `${path}${CUT_SUFFIX}`];
      if ((await stat(copy).catch(() => undefined)) !== undefined) continue;
      await copyFile(path, partial, constants.COPYFILE_FICLONE);
      const handle = await openHandle(partial, 'r+');
      await handle.sync().finally(() => handle.close());
      await rename(partial, copy);
    }
    await syncDirectory(this.#directory);
  }

  async #removeCut(): Promise<void> {
    for (const name of (await readdir(this.#directory)).filter((each) => each.includes(CUT_SUFFIX)))
      await unlink(join(this.#directory, name));
  }

  /** Writes the chunks one after the other from `lsn` on; durable when it resolves, or when it returns nothing to wait for. */
  write(lsn: Lsn, chunks: readonly Buffer[]): Promise<void> | undefined {
    let bytes = 0;
    for (const chunk of chunks) bytes += chunk.length;
    const isHere = this.#file !== undefined && this.#fileStart === segmentStart(lsn);
    if (!isHere || bytes > this.#fileStart + WAL_SEGMENT_SIZE - lsn || !this.#mayBlock(chunks, bytes)) {
      return this.#writeParts(lsn, chunks);
    }
    return this.#writeNow(lsn, chunks, bytes);
  }

  async #writeParts(lsn: Lsn, chunks: readonly Buffer[]): Promise<void> {
    let at = lsn;
    let part: Buffer[] = [];
    let partBytes = 0;
    for (let chunk of chunks) {
      for (;;) {
        const room = WAL_SEGMENT_SIZE - segmentOffset(at) - partBytes;
        if (chunk.length < room) break;
        part.push(chunk.subarray(0, room));
        await this.#writePart(at, part, partBytes + room);
        at += partBytes + room;
        chunk = chunk.subarray(room);
        part = [];
        partBytes = 0;
      }
      if (chunk.length === 0) continue;
      part.push(chunk);
      partBytes += chunk.length;
    }
    if (partBytes > 0) await this.#writePart(at, part, partBytes);
  }

  /** Cuts the WAL at `lsn`: durable when it resolves. */
  async truncate(lsn: Lsn): Promise<void> {
    await this.release();
    const segments = (await this.#segments()).filter((start) => start >= lsn).reverse();
    for (const start of segments) await unlink(segmentPath(this.#directory, start));
    await syncDirectory(this.#directory);
    if (segmentOffset(lsn) === 0) return;
    const file = await this.#segment(lsn);
    await truncateFile(file, segmentOffset(lsn));
    await truncateFile(file, WAL_SEGMENT_SIZE);
    await syncFile(file);
    this.#zeroedLsn = 0;
  }

  /** Takes over WAL from elsewhere, from a segment's start or the log's on, into a log that has none; durable when it resolves. */
  async fill(lsn: Lsn, bytes: Buffer): Promise<void> {
    await this.write(lsn, [bytes]);
    await this.release();
    await syncDirectory(this.#directory);
  }

  /** Closes the file that is open, if any; the next write opens it anew. */
  async release(): Promise<void> {
    const file = this.#file;
    this.#file = undefined;
    if (file !== undefined) await closeFile(file);
  }

  /** Removes all segments; durable when it resolves. */
  async remove(): Promise<void> {
    await this.release();
    await this.#removeCut();
    for (const start of await this.#segments()) await unlink(segmentPath(this.#directory, start));
    await syncDirectory(this.#directory);
  }

  /** Within one segment. */
  async #writePart(lsn: Lsn, buffers: readonly Buffer[], bytes: number): Promise<void> {
    const file =
      this.#file !== undefined && this.#fileStart === segmentStart(lsn) ? this.#file : await this.#segment(lsn);
    if (this.#mayBlock(buffers, bytes)) {
      await this.#writeNow(lsn, buffers, bytes);
      return;
    }
    lastWriter = this.#directory;
    const startedAtMs = performance.now();
    await writeFully(file, this.#withZeroes(lsn, buffers, bytes), segmentOffset(lsn));
    this.#isDiskSlow = performance.now() - startedAtMs > SLOW_WRITE_MS;
  }

  /** Whether the write is small and nobody else is kept waiting by it. */
  #mayBlock(buffers: readonly Buffer[], bytes: number): boolean {
    const isAlone = lastWriter === this.#directory;
    return isAlone && !this.#isDiskSlow && bytes < LARGE_WRITE_BYTES && buffers.length < MAX_BUFFERS;
  }

  /** To the segment that is open. */
  #writeNow(lsn: Lsn, buffers: readonly Buffer[], bytes: number): Promise<void> | undefined {
    const startedAtMs = performance.now();
    const written = writevSync(this.#file!, this.#withZeroes(lsn, buffers, bytes), segmentOffset(lsn));
    // A disk that is nearly full takes a part, and says why when it is given the rest.
    if (written < bytes) return writeFully(this.#file!, withoutFirst(buffers, written), segmentOffset(lsn) + written);
    this.#isDiskSlow = performance.now() - startedAtMs > SLOW_WRITE_MS;
    return undefined;
  }

  /** What is to be written there, with zeroes after it when there are none yet. */
  #withZeroes(lsn: Lsn, buffers: readonly Buffer[], bytes: number): readonly Buffer[] {
    const endLsn = lsn + bytes;
    if (endLsn <= this.#zeroedLsn || bytes >= LARGE_WRITE_BYTES) return buffers;
    const zeroes = ZERO_AHEAD.subarray(0, Math.min(ZERO_AHEAD.length, this.#fileStart + WAL_SEGMENT_SIZE - endLsn));
    this.#zeroedLsn = endLsn + zeroes.length;
    return zeroes.length > 0 ? [...buffers, zeroes] : buffers;
  }

  /** The file of the segment that holds `lsn`, made when it does not exist. */
  async #segment(lsn: Lsn): Promise<number> {
    await this.release();
    const path = segmentPath(this.#directory, lsn);
    const { O_RDWR, O_CREAT, O_DSYNC } = constants;
    const isNew = (await this.#segmentSize(lsn)) === undefined;
    const file = await openFile(path, O_RDWR | O_CREAT | O_DSYNC, 0o600);
    this.#file = file;
    this.#fileStart = segmentStart(lsn);
    this.#zeroedLsn = 0;
    if (isNew) {
      await truncateFile(file, WAL_SEGMENT_SIZE);
      await syncFile(file);
      await syncDirectory(this.#directory);
    }
    return file;
  }

  async *#chunks(fromLsn: Lsn): AsyncGenerator<Buffer, void, void> {
    let lsn = fromLsn;
    let size = FIRST_SCAN_BYTES;
    while ((await this.#segmentSize(lsn)) !== undefined) {
      const handle = await openHandle(segmentPath(this.#directory, lsn), 'r');
      try {
        const endLsn = segmentStart(lsn) + WAL_SEGMENT_SIZE;
        while (lsn < endLsn) {
          const buffer = Buffer.allocUnsafe(Math.min(size, endLsn - lsn));
          const { bytesRead } = await handle.read(buffer, 0, buffer.length, segmentOffset(lsn));
          if (bytesRead === 0) return;
          lsn += bytesRead;
          size = SCAN_BYTES;
          yield buffer.subarray(0, bytesRead);
        }
      } finally {
        await handle.close();
      }
    }
  }

  async #segmentSize(lsn: Lsn): Promise<number | undefined> {
    try {
      const handle = await openHandle(segmentPath(this.#directory, lsn), 'r');
      return await handle
        .stat()
        .then((status) => status.size)
        .finally(() => handle.close());
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
      throw error;
    }
  }

  /** First LSNs of the segments on disk, ascending. */
  async #segments(): Promise<Lsn[]> {
    const starts: Lsn[] = [];
    for (const name of await readdir(this.#directory)) {
      const segment = parseWalFileName(name);
      if (segment !== undefined) starts.push(segment.startLsn);
    }
    return starts.sort((a, b) => a - b);
  }
}

/** What is before `startLsn`, where a log begins, in its segment: zeroes, and the headers of the first page and of the page in which it begins. */
export function firstSegmentHead(identity: TimelineIdentity, startLsn: Lsn): Buffer {
  const head = Buffer.alloc(segmentOffset(startLsn));
  for (const { offset, bytes } of firstPageHeaders(identity, startLsn)) bytes.copy(head, offset);
  return head;
}

function firstPageHeaders(
  { pgVersion, systemId }: TimelineIdentity,
  startLsn: Lsn,
): { readonly offset: number; readonly bytes: Buffer }[] {
  const pages = new Set([segmentStart(startLsn), pageStart(startLsn)]);
  pages.delete(startLsn);
  return Array.from(pages, (pageLsn) => {
    const size = pageHeaderSize(pageLsn);
    const bytes = Buffer.alloc(size);
    const remaining = pageLsn === pageStart(startLsn) ? pageOffset(startLsn) - size : 0;
    const version = toPgVersion(pgVersion);
    writePageHeader(bytes, 0, { pageLsn, remaining, systemId: BigInt(systemId), version });
    return { offset: segmentOffset(pageLsn), bytes };
  });
}

/** Reads WAL for one reader, with one file open at most. What is read must be known to be there. */
export class WalFileReader {
  readonly #directory: string;
  #file: { readonly startLsn: Lsn; readonly handle: Awaited<ReturnType<typeof openHandle>> } | undefined;

  constructor(directory: string) {
    this.#directory = directory;
  }

  /** Bytes from `lsn` on, at least one and at most up to `endLsn` and the segment's end. */
  async read(lsn: Lsn, endLsn: Lsn): Promise<Buffer> {
    const startLsn = segmentStart(lsn);
    if (this.#file?.startLsn !== startLsn) {
      await this.close();
      this.#file = { startLsn, handle: await openHandle(segmentPath(this.#directory, lsn), 'r') };
    }
    const length = Math.min(endLsn, startLsn + WAL_SEGMENT_SIZE) - lsn;
    const buffer = Buffer.allocUnsafe(length);
    const { bytesRead } = await this.#file.handle.read(buffer, 0, length, segmentOffset(lsn));
    if (bytesRead === 0) throw new Error(`${segmentPath(this.#directory, lsn)} ends before ${formatLsn(lsn)}`);
    return buffer.subarray(0, bytesRead);
  }

  /** All bytes from `lsn` to `endLsn`. */
  async readAll(lsn: Lsn, endLsn: Lsn): Promise<Buffer> {
    const parts: Buffer[] = [];
    for (let at = lsn; at < endLsn; at += parts.at(-1)!.length) parts.push(await this.read(at, endLsn));
    return Buffer.concat(parts);
  }

  async close(): Promise<void> {
    const file = this.#file;
    this.#file = undefined;
    await file?.handle.close();
  }
}

async function writeFully(file: number, buffers: readonly Buffer[], position: number): Promise<void> {
  let left = [...buffers];
  let at = position;
  while (left.length > 0) {
    const written = await writeOnce(file, left.slice(0, MAX_BUFFERS), at);
    at += written;
    left = withoutFirst(left, written);
  }
}

function withoutFirst(buffers: readonly Buffer[], bytes: number): Buffer[] {
  let done = 0;
  while (done < buffers.length && bytes >= buffers[done]!.length) bytes -= buffers[done++]!.length;
  const left = buffers.slice(done);
  if (bytes > 0) left[0] = left[0]!.subarray(bytes);
  return left;
}

function writeOnce(file: number, buffers: readonly Buffer[], position: number): Promise<number> {
  return new Promise((resolve, reject) => {
    writev(file, buffers, position, (error, written) => (error === null ? resolve(written) : reject(error)));
  });
}
