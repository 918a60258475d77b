/** Writes a timeline's WAL index as its records are taken (wal-index.ts has the format). */

import type { Lsn } from '../../postgres/lsn.ts';
import type { TimelineWriter } from '../timeline-access.ts';
import { encodeImage } from '../value.ts';
import { WalIndexTail, decodeChunk, walIndexBucket, walIndexChunkKey } from './wal-index.ts';
import type { WalIndexChunk } from './wal-index.ts';

/** How many buckets are looked through at once for the last chunk; twice as many in each step. */
const FIRST_LOOK_BACK = 64;

export class WalIndexWriter {
  readonly #writer: TimelineWriter;
  readonly #tail: WalIndexTail;
  /** Whether the tail has records that are in no chunk of the timeline. */
  #unwritten = false;

  constructor(writer: TimelineWriter) {
    this.#writer = writer;
    this.#tail = new WalIndexTail(writer.inheritedIndex?.() ?? lastChunk(writer));
  }

  get tail(): WalIndexChunk | undefined {
    return this.#tail.chunk;
  }

  /** Adds a record to the index. A chunk that it completes is stored under the record's LSN. */
  append(startLsn: Lsn, endLsn: Lsn, commitTimeUs: number | undefined): void {
    const complete = this.#tail.append(startLsn, endLsn, commitTimeUs);
    if (complete !== undefined && this.#unwritten) {
      this.#writer.put(walIndexChunkKey(complete.bucket), endLsn, encodeImage(complete.bytes));
    }
    this.#unwritten = true;
  }

  /** Stores the tail as it is, under the last record's LSN, which is visible already: so is the chunk at once. */
  flush(): void {
    const endLsn = this.#tail.lastEnd;
    const part = this.#unwritten ? this.#tail.encode() : undefined;
    if (endLsn === undefined || part === undefined) return;
    this.#writer.put(walIndexChunkKey(part.bucket), endLsn, encodeImage(part.bytes));
    this.#unwritten = false;
  }
}

function lastChunk(writer: TimelineWriter): WalIndexChunk | undefined {
  let end = walIndexBucket(writer.lastRecordLsn) + 1;
  for (let width = FIRST_LOOK_BACK; end > 0; width *= 2) {
    const start = Math.max(0, end - width);
    const last = writer.scan({ start: walIndexChunkKey(start), end: walIndexChunkKey(end) }).at(-1);
    if (last !== undefined) return decodeChunk(last[1]);
    end = start;
  }
  return undefined;
}
