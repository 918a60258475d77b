/**
 * Full page images: restoring the page that a WAL record carries for one of its blocks.
 *
 * An image is the page without its hole (the unused bytes between pd_lower and pd_upper, which are zero), as it is or compressed as a
 * whole by one of three methods. What Postgres compressed with may differ from what this machine's Postgres was built with, so all are
 * decoded here. (Source: RestoreBlockImage in xlogreader.c, pg_lzcompress.c, the LZ4 block format.)
 *
 * Invariant: a decompressor writes exactly the bytes of the page without its hole, or throws ImageError. It never reads or writes
 * outside its buffers, whatever the input.
 */

import { zstdDecompressSync } from 'node:zlib';

import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import {
  BKPIMAGE_COMPRESSED,
  BKPIMAGE_COMPRESS_LZ4,
  BKPIMAGE_COMPRESS_PGLZ,
  BKPIMAGE_COMPRESS_ZSTD,
} from '../../postgres/wal/record.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';

export class ImageError extends Error {
  override readonly name = 'ImageError';
}

const scratch = Buffer.alloc(BLOCK_SIZE);

/** Overwrites `page` with the image that the record carries for the block. The page's LSN is the image's own. */
export function restoreImage(page: Buffer, record: WalRecord, block: WalBlock): void {
  if (!block.hasImage) throw new ImageError(`block ${block.id} has no image`);
  const size = BLOCK_SIZE - block.holeLength;
  let source = record.bytes;
  let start = block.imageOffset;
  if ((block.imageInfo & BKPIMAGE_COMPRESSED) !== 0) {
    const compressed = record.bytes.subarray(block.imageOffset, block.imageOffset + block.imageLength);
    decompress(compressed, scratch.subarray(0, size), block.imageInfo);
    source = scratch;
    start = 0;
  } else if (block.imageLength !== size) {
    throw new ImageError(`image of ${block.imageLength} bytes with a hole of ${block.holeLength}`);
  }
  if (block.holeLength === 0) {
    source.copy(page, 0, start, start + BLOCK_SIZE);
    return;
  }
  const holeEnd = block.holeOffset + block.holeLength;
  source.copy(page, 0, start, start + block.holeOffset);
  page.fill(0, block.holeOffset, holeEnd);
  source.copy(page, holeEnd, start + block.holeOffset, start + size);
}

function decompress(source: Buffer, target: Buffer, info: number): void {
  if ((info & BKPIMAGE_COMPRESS_PGLZ) !== 0) pglzDecompress(source, target);
  else if ((info & BKPIMAGE_COMPRESS_LZ4) !== 0) lz4Decompress(source, target);
  else if ((info & BKPIMAGE_COMPRESS_ZSTD) !== 0) zstdDecompress(source, target);
  else throw new ImageError(`image compressed in an unknown way, info 0x${info.toString(16)}`);
}

/**
 * pglz: a control byte, whose bits from the lowest say what each of the next eight items is: 0 a literal byte, 1 a match of two bytes
 * (length - 3 in the low 4 bits, distance in the high 4 bits and the second byte; a third byte adds to a length of 18).
 */
export function pglzDecompress(source: Buffer, target: Buffer): void {
  let from = 0;
  let to = 0;
  while (from < source.length && to < target.length) {
    let control = source[from++]!;
    for (let item = 0; item < 8 && from < source.length && to < target.length; item++, control >>= 1) {
      if ((control & 1) === 0) {
        target[to++] = source[from++]!;
        continue;
      }
      const first = source[from]!;
      if (from + 2 > source.length) throw new ImageError('pglz image ends inside a match');
      let length = (first & 0x0f) + 3;
      const distance = ((first & 0xf0) << 4) | source[from + 1]!;
      from += 2;
      if (length === 18) {
        if (from >= source.length) throw new ImageError('pglz image ends inside a match');
        length += source[from++]!;
      }
      if (distance === 0 || distance > to)
        throw new ImageError(`pglz image has a match ${distance} bytes back at ${to}`);
      to = copyMatch(target, to, distance, Math.min(length, target.length - to));
    }
  }
  if (from !== source.length || to !== target.length) {
    throw new ImageError(`pglz image gives ${to} bytes from ${from} of ${source.length}, expected ${target.length}`);
  }
}

/**
 * LZ4 block: sequences of a token (literal count in the high 4 bits, match length - 4 in the low 4 bits, 15 in either means that bytes
 * follow that add to it until one is not 255), the literals, and a match's distance as u16. The last sequence is literals only.
 */
export function lz4Decompress(source: Buffer, target: Buffer): void {
  let from = 0;
  let to = 0;
  for (;;) {
    if (from >= source.length) throw new ImageError('lz4 image ends without its last literals');
    const token = source[from++]!;
    let literals = token >> 4;
    if (literals === 15) {
      let more = 255;
      while (more === 255) {
        if (from >= source.length) throw new ImageError('lz4 image ends inside a length');
        more = source[from++]!;
        literals += more;
      }
    }
    if (from + literals > source.length || to + literals > target.length) {
      throw new ImageError(`lz4 image has ${literals} literals at ${from}, which do not fit`);
    }
    source.copy(target, to, from, from + literals);
    from += literals;
    to += literals;
    if (from === source.length) break;

    if (from + 2 > source.length) throw new ImageError('lz4 image ends inside a match');
    const distance = source.readUInt16LE(from);
    from += 2;
    let length = (token & 15) + 4;
    if ((token & 15) === 15) {
      let more = 255;
      while (more === 255) {
        if (from >= source.length) throw new ImageError('lz4 image ends inside a length');
        more = source[from++]!;
        length += more;
      }
    }
    if (distance === 0 || distance > to || to + length > target.length) {
      throw new ImageError(`lz4 image has a match of ${length} bytes ${distance} back at ${to}, which does not fit`);
    }
    to = copyMatch(target, to, distance, length);
  }
  if (to !== target.length) throw new ImageError(`lz4 image gives ${to} bytes, expected ${target.length}`);
}

function zstdDecompress(source: Buffer, target: Buffer): void {
  let bytes: Buffer;
  try {
    bytes = zstdDecompressSync(source, { maxOutputLength: BLOCK_SIZE });
  } catch (cause) {
    throw new ImageError('zstd image cannot be decompressed', { cause });
  }
  if (bytes.length !== target.length) {
    throw new ImageError(`zstd image gives ${bytes.length} bytes, expected ${target.length}`);
  }
  bytes.copy(target);
}

/** Repeats what stands `distance` bytes back; a match may overlap itself. Returns where it ends. */
function copyMatch(target: Buffer, to: number, distance: number, length: number): number {
  if (distance >= length) {
    target.copyWithin(to, to - distance, to - distance + length);
    return to + length;
  }
  const end = to + length;
  for (let at = to; at < end; at++) target[at] = target[at - distance]!;
  return end;
}
