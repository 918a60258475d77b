/**
 * The log of the simulation: like WAL in what matters to consensus. Records of varying length, aligned to 8, each with a checksum and a link to the
 * start of the one before it.
 *
 *   0  u32 length, of the whole record    4  u32 checksum of all else    8  u32 start of the record before    12  filling
 */
import type { BoundaryTracker } from '../../src/consensus/acceptor.ts';
import type { Random } from './random.ts';

export const LOG_START = 4096;
const HEADER_BYTES = 16;
/** Few lengths, so that records of different leaders often end at the same place. */
const RECORD_BYTES = [24, 24, 24, 24, 24, 24, 24, 104];
const MAX_RECORD_BYTES = 104;

export function makeRecord(previousStart: number, random: Random): Buffer {
  const record = Buffer.alloc(random.pick(RECORD_BYTES));
  record.writeUInt32LE(record.length, 0);
  record.writeUInt32LE(previousStart, 8);
  for (let at = 12; at < record.length; at++) record[at] = random.between(1, 255);
  record.writeUInt32LE(checksum(record, 0, record.length), 4);
  return record;
}

export interface LogEnd {
  readonly endLsn: number;
  /** Start of the last record, `previousStart` when there is none. */
  readonly lastStart: number;
}

/** Follows whole, right records from `fromLsn` on. `image[0]` is at LOG_START. */
export function findEnd(image: Buffer, fromLsn: number, limitLsn: number, previousStart?: number): LogEnd {
  let lsn = fromLsn;
  let lastStart = previousStart;
  for (;;) {
    const at = lsn - LOG_START;
    if (lsn + HEADER_BYTES > limitLsn || at + HEADER_BYTES > image.length) break;
    const length = image.readUInt32LE(at);
    if (length < HEADER_BYTES || length > MAX_RECORD_BYTES || length % 8 !== 0) break;
    if (lsn + length > limitLsn || at + length > image.length) break;
    const link = image.readUInt32LE(at + 8);
    if (lastStart === undefined ? link >= lsn : link !== lastStart) break;
    if (image.readUInt32LE(at + 4) !== checksum(image, at, length)) break;
    lastStart = lsn;
    lsn += length;
  }
  return { endLsn: lsn, lastStart: lastStart ?? 0 };
}

/** The first end of a record at or after `lsn`, and not after `limitLsn`. `image[0]` is at LOG_START. */
export function boundaryFrom(image: Buffer, lsn: number, limitLsn: number): number | undefined {
  let at = LOG_START;
  while (at < lsn) {
    const length = image.readUInt32LE(at - LOG_START);
    if (length < HEADER_BYTES || at + length > limitLsn) return undefined;
    at += length;
  }
  return at <= limitLsn ? at : undefined;
}

export class RecordBoundaries implements BoundaryTracker {
  #lsn: number;
  #boundaryLsn: number;
  #header: number[] = [];

  constructor(startLsn: number) {
    this.#lsn = startLsn;
    this.#boundaryLsn = startLsn;
  }

  /** End of the last whole record. */
  get boundaryLsn(): number {
    return this.#boundaryLsn;
  }

  push(_lsn: number, bytes: Buffer): void {
    for (const byte of bytes) {
      this.#lsn++;
      if (this.#header.length < 4) this.#header.push(byte);
      if (this.#header.length < 4) continue;
      const length = this.#header[0]! | (this.#header[1]! << 8) | (this.#header[2]! << 16) | (this.#header[3]! << 24);
      if (length < HEADER_BYTES || length > MAX_RECORD_BYTES) throw new Error(`record length ${length}`);
      if (this.#lsn < this.#boundaryLsn + length) continue;
      this.#boundaryLsn = this.#lsn;
      this.#header = [];
    }
  }
}

function checksum(bytes: Buffer, at: number, length: number): number {
  let sum = 0x811c9dc5;
  for (let index = at; index < at + length; index++) {
    const byte = index >= at + 4 && index < at + 8 ? 0 : bytes[index]!;
    sum = Math.imul(sum ^ byte, 0x01000193);
  }
  return sum >>> 0;
}
