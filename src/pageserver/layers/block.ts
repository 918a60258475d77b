/**
 * Blocks: the unit in which a layer file is compressed, checksummed and read.
 *
 *   offset  size  field (little-endian)
 *        0     4  checksum of everything after this field
 *        4     1  type: 1 values, 2 keys, 3 index
 *        5     1  compression: 0 none, 1 zstd (one frame)
 *        6     1  what the checksum is: 0 CRC32C (older blocks), 1 CRC-32 as zlib has it
 *        7     1  zero
 *        8     4  raw length: of the content
 *       12     4  stored length: of the bytes that follow
 *       16     …  the content, compressed or not
 *
 * A block says itself how long it is, so that a file can be walked from its first block on without its index.
 * A block whose checksum, type or lengths are not as expected is damaged: it is never used, and the error names file and offset.
 *
 * CRC-32, because Node has it in native code, which takes half the time of CRC32C in JavaScript.
 */

import { crc32 } from 'node:zlib';
import { crc32c } from '../../base/crc32c.ts';
import { StrataError } from '../../base/errors.ts';
import type { ByteRange } from './partial-layer.ts';
import { compressedLengthMax, compressTo, decompress, mayHave, SPARE_BYTES } from '../../base/zstd.ts';
import type { WriteBuffer } from './write-buffer.ts';

export const BLOCK_HEADER_BYTES = 16;
export const BLOCK_TYPE = { values: 1, keys: 2, index: 3 } as const;
export const MAX_BLOCK_BYTES = 1024 * 1024 * 1024 + 65536;

const COMPRESSION_NONE = 0;
const COMPRESSION_ZSTD = 1;
const CHECKSUM_CRC32C = 0;
const CHECKSUM_CRC32 = 1;
/** A block that would not get smaller than this is kept as it is, and costs no decompression. */
const WORTHWHILE_FRACTION = 0.9;

export class LayerDamagedError extends StrataError {
  readonly file: string;
  readonly offset: number;
  readonly reason: string;

  constructor(file: string, offset: number, reason: string) {
    super('internal', `layer file ${file} is damaged at offset ${offset}: ${reason}`);
    this.name = 'LayerDamagedError';
    this.file = file;
    this.offset = offset;
    this.reason = reason;
  }
}

/** The file is not here, or not all of it. It may have been taken away to save space: then the object store has it. */
export class LayerAbsentError extends LayerDamagedError {
  /** What of it is not; undefined: nothing is known to be here. */
  readonly missing: ByteRange | undefined;

  constructor(file: string, missing?: ByteRange) {
    super(file, missing?.start ?? 0, missing === undefined ? 'the file is not there' : 'this piece is not there');
    this.name = 'LayerAbsentError';
    this.missing = missing;
  }
}

/**
 * Writes a whole block to `out`, header and what follows; its length. At once and not on the thread pool: with streams and
 * wake-ups around them, blocks of this size take twice the processor time there.
 */
export function appendBlock(out: WriteBuffer, type: number, raw: Buffer): number {
  out.ensure(BLOCK_HEADER_BYTES + compressedLengthMax(raw.length));
  const { bytes, view, length: start } = out;
  const contentAt = start + BLOCK_HEADER_BYTES;
  let compression = COMPRESSION_ZSTD;
  let storedLength = compressTo(raw, bytes, contentAt);
  if (storedLength >= raw.length * WORTHWHILE_FRACTION) {
    compression = COMPRESSION_NONE;
    storedLength = raw.length;
    bytes.set(raw, contentAt);
  }
  view.setUint8(start + 4, type);
  view.setUint8(start + 5, compression);
  view.setUint8(start + 6, CHECKSUM_CRC32);
  view.setUint8(start + 7, 0);
  view.setUint32(start + 8, raw.length, true);
  view.setUint32(start + 12, storedLength, true);
  const end = contentAt + storedLength;
  view.setUint32(start, crc32(bytes.subarray(start + 4, end)), true);
  out.length = end;
  return end - start;
}

/** Gives memory of `sizeBytes`. */
export type Memory = (sizeBytes: number) => Buffer;

/**
 * The content of a whole block that was read at `offset` of `file`. It is put at the start of what `memory` gives, which is asked once at most; without
 * that it may refer to `block`.
 */
export function decodeBlock(block: Buffer, type: number, file: string, offset: number, memory?: Memory): Buffer {
  if (block.length < BLOCK_HEADER_BYTES) {
    throw new LayerDamagedError(file, offset, `${block.length} bytes are too few for a block`);
  }
  const storedLength = block.readUInt32LE(12);
  if (BLOCK_HEADER_BYTES + storedLength !== block.length) {
    throw new LayerDamagedError(file, offset, `block has ${block.length} bytes, its header says ${storedLength} + 16`);
  }
  const checksumKind = block[6]!;
  if (checksumKind > CHECKSUM_CRC32) {
    throw new LayerDamagedError(file, offset, `checksum of kind ${checksumKind} is not known`);
  }
  const checksum = checksumKind === CHECKSUM_CRC32C ? crc32c(block, 4) : crc32(block.subarray(4));
  if (checksum !== block.readUInt32LE(0)) {
    throw new LayerDamagedError(file, offset, `checksum is ${hex(checksum)}, block says ${hex(block.readUInt32LE(0))}`);
  }
  if (block[4] !== type) throw new LayerDamagedError(file, offset, `block has type ${block[4]}, expected ${type}`);
  const rawLength = block.readUInt32LE(8);
  let raw: Buffer;
  if (block[5] === COMPRESSION_NONE) {
    const stored = block.subarray(BLOCK_HEADER_BYTES);
    raw = memory === undefined ? stored : copied(stored, memory(stored.length));
  } else if (block[5] === COMPRESSION_ZSTD && rawLength <= MAX_BLOCK_BYTES) {
    if (!mayHave(block, BLOCK_HEADER_BYTES, rawLength)) {
      throw new LayerDamagedError(file, offset, `${storedLength} compressed bytes do not have ${rawLength}`);
    }
    raw = decompressBlock(block, rawLength, file, offset, memory?.(rawLength + SPARE_BYTES));
  } else {
    throw new LayerDamagedError(file, offset, `compression ${block[5]} of ${rawLength} bytes is not known`);
  }
  if (raw.length !== rawLength) {
    throw new LayerDamagedError(file, offset, `content has ${raw.length} bytes, block says ${rawLength}`);
  }
  return raw;
}

function copied(from: Buffer, to: Buffer): Buffer {
  from.copy(to);
  return to;
}

function decompressBlock(
  block: Buffer,
  rawLength: number,
  file: string,
  offset: number,
  memory: Buffer | undefined,
): Buffer {
  try {
    return decompress(block, BLOCK_HEADER_BYTES, rawLength, memory);
  } catch (error) {
    throw new LayerDamagedError(file, offset, `zstd: ${(error as Error).message}`);
  }
}

function hex(value: number): string {
  return value.toString(16).padStart(8, '0');
}
