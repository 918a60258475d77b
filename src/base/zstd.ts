/**
 * zstd for many small pieces, one frame each.
 *
 * Node's zstdCompressSync and zstdDecompressSync make a stream and a zstd context for each call, which for pieces of 8 to 64 KiB costs as much
 * as the work itself. Here one context of each kind is kept and called as Node's own synchronous functions call it: `writeSync` of the
 * stream's handle, which then says in `_writeState` how much of output and input is left. A context that has ended a frame begins the next one
 * by itself.
 *
 * Those two are not part of Node's documented interface. So they are tried once at the start, and whatever is not as expected, then or
 * later, means that the documented functions do the work; an error is always theirs.
 */

import assert from 'node:assert/strict';
import { constants, createZstdCompress, createZstdDecompress, zstdCompressSync, zstdDecompressSync } from 'node:zlib';

const ZSTD_E_END = constants.ZSTD_e_end;
/**
 * What Postgres stores begins at multiples of four and eight bytes: shorter matches, which zstd would look for in pieces of up to 16 KiB, are mostly chance,
 * save nothing and take time on both sides.
 */
const OPTIONS = { params: { [constants.ZSTD_c_compressionLevel]: 1, [constants.ZSTD_c_minMatch]: 6 } };

interface Handle {
  writeSync(
    flush: number,
    input: Uint8Array,
    inputAt: number,
    inputLength: number,
    output: Uint8Array,
    outputAt: number,
    outputLength: number,
  ): void;
}

interface Context {
  readonly handle: Handle;
  /** Bytes left of the output, and of the input. */
  readonly left: Uint32Array;
  readonly hasFailed: () => boolean;
}

let compressor: Context | undefined;
let decompressor: Context | undefined;

/** More room than zstd ever needs for this much (ZSTD_COMPRESSBOUND). */
export function compressedLengthMax(length: number): number {
  return length + (length >>> 8) + 1024;
}

/** Writes one frame to `out` from `at` on, where there has to be room for compressedLengthMax. Its length. */
export function compressTo(raw: Buffer, out: Buffer, at: number): number {
  assert(out.length - at >= compressedLengthMax(raw.length), 'there is room for the frame');
  if (compressor !== undefined) {
    const length = run(compressor, raw, 0, out, at);
    if (length !== undefined && length > 0) return length;
    compressor = undefined;
  }
  return zstdCompressSync(raw, OPTIONS).copy(out, at);
}

/** What a block of a frame has at most, and takes at least: so a frame has no more than so many times its own length. */
const EXPANSION_MAX = (128 * 1024) / 4;
/** Of the fields of a frame's header, by what its descriptor says (RFC 8878, 3.1.1.1). */
const CONTENT_SIZE_BYTES = [0, 2, 4, 8] as const;
const DICTIONARY_ID_BYTES = [0, 1, 2, 4] as const;

/** Whether the frame that is `stored` from `at` on may have `rawLength` bytes of content, by its length and what its header says: to be asked before memory is taken for it. */
export function mayHave(stored: Buffer, at: number, rawLength: number): boolean {
  const length = stored.length - at;
  if (length < 6 || rawLength > length * EXPANSION_MAX) return false;
  const descriptor = stored[at + 4]!;
  const isSingleSegment = (descriptor & 0x20) !== 0;
  const sizeBytes = descriptor < 0x40 && isSingleSegment ? 1 : CONTENT_SIZE_BYTES[descriptor >>> 6]!;
  const sizeAt = at + 5 + (isSingleSegment ? 0 : 1) + DICTIONARY_ID_BYTES[descriptor & 3]!;
  if (sizeBytes === 0 || sizeAt + sizeBytes > stored.length) return sizeBytes === 0;
  const size = stored.readUIntLE(sizeAt, Math.min(sizeBytes, 6)) + (sizeBytes === 2 ? 256 : 0);
  return size === rawLength;
}

/** With one byte to spare, a frame that has more than it should shows. */
export const SPARE_BYTES = 1;

/**
 * The content of the frame that is `stored` from `at` on, which has `rawLength` bytes, at the start of `memory`, which has SPARE_BYTES more. Throws when
 * it is none, or has more; what is returned may be shorter.
 */
export function decompress(
  stored: Buffer,
  at: number,
  rawLength: number,
  memory: Buffer = Buffer.allocUnsafeSlow(rawLength + SPARE_BYTES),
): Buffer {
  if (decompressor !== undefined) {
    if (run(decompressor, stored, at, memory, 0) === rawLength) return memory.subarray(0, rawLength);
    // It may be in the middle of a frame.
    decompressor = makeContext(createZstdDecompress());
  }
  const raw = zstdDecompressSync(stored.subarray(at), {
    chunkSize: Math.max(rawLength, 64),
    maxOutputLength: Math.max(rawLength, 64),
  });
  if (raw.length > rawLength) throw new RangeError(`the content has ${raw.length} bytes`);
  return memory.subarray(0, raw.copy(memory));
}

/** How much was written; undefined when that is not all that there was. */
function run(
  { handle, left, hasFailed }: Context,
  input: Uint8Array,
  inputAt: number,
  output: Uint8Array,
  outputAt: number,
): number | undefined {
  handle.writeSync(ZSTD_E_END, input, inputAt, input.length - inputAt, output, outputAt, output.length - outputAt);
  const [outputLeft, inputLeft] = left;
  if (hasFailed() || inputLeft !== 0 || outputLeft === undefined || outputLeft === 0) return undefined;
  return output.length - outputAt - outputLeft;
}

function makeContext(stream: object): Context | undefined {
  if (!('_handle' in stream) || !('_writeState' in stream) || !('on' in stream) || !('destroyed' in stream)) return;
  const { _handle: handle, _writeState: left } = stream;
  if (!isHandle(handle) || !(left instanceof Uint32Array) || left.length !== 2) return undefined;
  // What goes wrong is told to the stream, which would otherwise end the process.
  if (typeof stream.on === 'function') stream.on('error', () => {});
  return { handle, left, hasFailed: () => stream.destroyed !== false };
}

function isHandle(handle: unknown): handle is Handle {
  return (
    typeof handle === 'object' && handle !== null && 'writeSync' in handle && typeof handle.writeSync === 'function'
  );
}

/** Both contexts, if they do as the documented functions do. */
function start(): void {
  compressor = makeContext(createZstdCompress(OPTIONS));
  decompressor = makeContext(createZstdDecompress());
  const pieces = ['', 'a', 'strata '.repeat(3000)].map((text) => Buffer.from(text));
  const isRight = pieces.every((piece) => {
    const out = Buffer.alloc(compressedLengthMax(piece.length));
    const frame = out.subarray(0, compressTo(piece, out, 0));
    return zstdDecompressSync(frame).equals(piece) && decompress(frame, 0, piece.length).equals(piece);
  });
  if (!isRight) compressor = decompressor = undefined;
}

start();
