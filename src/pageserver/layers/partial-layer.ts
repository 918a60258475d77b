/**
 * A layer of which only pieces are here: a sparse file as long as the layer, `<layer>.pieces`, and in memory which chunks of it are filled. So a read that wants a few blocks of a
 * large layer need not wait for all of it.
 *
 * What is in such a file is known to this process only; a start removes it. No checksum is over pieces: those of the blocks are judge of what is read.
 */

import { unlinkSync } from 'node:fs';
import { open } from 'node:fs/promises';

export interface ByteRange {
  readonly start: number;
  readonly end: number;
}

const CHUNK_BYTES = 256 * 1024;

export class PartialLayer {
  readonly path: string;
  readonly #sizeBytes: number;
  readonly #filled: Uint8Array;
  #presentBytes = 0;
  #fillCount = 0;

  private constructor(path: string, sizeBytes: number) {
    this.path = path;
    this.#sizeBytes = sizeBytes;
    this.#filled = new Uint8Array(Math.ceil(sizeBytes / CHUNK_BYTES));
  }

  /** Makes the file, without pieces. */
  static async create(layerPath: string, sizeBytes: number): Promise<PartialLayer> {
    const partial = new PartialLayer(`${layerPath}.pieces`, sizeBytes);
    await using file = await open(partial.path, 'w', 0o600);
    await file.truncate(sizeBytes);
    return partial;
  }

  get presentBytes(): number {
    return this.#presentBytes;
  }

  /** How often something was filled in. */
  get fillCount(): number {
    return this.#fillCount;
  }

  /** Whole chunks that the range needs and that are not here, as one range; undefined when all are. */
  missing(offset: number, length: number): ByteRange | undefined {
    let first: number | undefined;
    let last = 0;
    for (let chunk = Math.floor(offset / CHUNK_BYTES); chunk * CHUNK_BYTES < offset + length; chunk++) {
      if (this.#filled[chunk] !== 0) continue;
      first ??= chunk;
      last = chunk;
    }
    if (first === undefined) return undefined;
    return { start: first * CHUNK_BYTES, end: Math.min(this.#sizeBytes, (last + 1) * CHUNK_BYTES) };
  }

  /** The chunk in which a layer's footer is, with which every read begins. */
  get lastChunk(): ByteRange {
    return this.missing(this.#sizeBytes - 1, 1) ?? { start: this.#sizeBytes, end: this.#sizeBytes };
  }

  /** Takes a range that `missing` gave; false when the file is gone, as by eviction. */
  async fill({ start, end }: ByteRange, bytes: Buffer): Promise<boolean> {
    await using file = await open(this.path, 'r+').catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'ENOENT') throw error;
      return undefined;
    });
    if (file === undefined) return false;
    for (let at = 0; at < bytes.length;)
      at += (await file.write(bytes, at, bytes.length - at, start + at)).bytesWritten;
    for (let chunk = start / CHUNK_BYTES; chunk * CHUNK_BYTES < end; chunk++) this.#filled[chunk] = 1;
    this.#presentBytes += end - start;
    this.#fillCount++;
    return true;
  }

  remove(): void {
    try {
      unlinkSync(this.path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    }
  }
}
