/**
 * Decoded value blocks, near to least-recently-used, in memory that is used again: memory outside of V8's heap that is given up for each block makes V8
 * collect garbage for every few megabytes that are read, which costs more than reading them.
 *
 * What a scan loads does not push out what others come back for: it goes through a little memory of its own, which the processor's caches have room for
 * too.
 *
 * Invariant: what `get` and `load` gave is good until the next `recycle`, however much is loaded meanwhile; memory of blocks that have left the
 * cache is used again only after it. Who reads calls it before each read, and keeps no view of a block beyond the read.
 */

import assert from 'node:assert/strict';
import type { Memory } from './block.ts';
import { GenerationCache } from './generation-cache.ts';

/** Memory comes in multiples of this, so that what one block leaves fits another. */
const STEP_BYTES = 2048;
/** Room for the blocks of all layers that a page may be in, which are those of the pages after it. */
const SCANNED_BYTES = 2 * 1024 * 1024;

export class BlockCache {
  readonly #maxBytes: number;
  readonly #blocks: GenerationCache<Buffer>;
  readonly #scanned: GenerationCache<Buffer>;
  /** Memory that may be used again, by its size. */
  readonly #free = new Map<number, ArrayBufferLike[]>();
  /** Memory of blocks that have left the cache since the last `recycle`. */
  #left: ArrayBufferLike[] = [];
  /** Of all memory: of blocks, free, and left. */
  #bytes = 0;
  #isScan = false;

  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
    const onDrop = (block: Buffer): unknown => this.#left.push(block.buffer);
    const scannedBytes = Math.min(SCANNED_BYTES, maxBytes / 4);
    this.#blocks = new GenerationCache(maxBytes - scannedBytes, onDrop);
    this.#scanned = new GenerationCache(scannedBytes, onDrop);
  }

  get maxBytes(): number {
    return this.#maxBytes;
  }

  get(key: number): Buffer | undefined {
    return this.#blocks.get(key) ?? this.#scanned.get(key);
  }

  /** Keeps what `decode` makes, in memory that it asks for once. */
  load(key: number, decode: (memory: Memory) => Buffer): Buffer {
    let memory: Buffer | undefined;
    try {
      const block = decode((sizeBytes) => (memory = this.#take(sizeBytes)));
      assert(block.buffer === memory?.buffer, 'a block is in the memory that was given for it');
      (this.#isScan ? this.#scanned : this.#blocks).set(key, block, block.buffer.byteLength);
      return block;
    } catch (error) {
      if (memory !== undefined) this.#left.push(memory.buffer);
      throw error;
    }
  }

  /** Nobody looks any more at what was given before. What is loaded until the next time is for a scan, or not. */
  recycle(isScan = false): void {
    this.#isScan = isScan;
    if (this.#left.length === 0) return;
    for (const memory of this.#left) {
      const alike = this.#free.get(memory.byteLength);
      if (alike === undefined) this.#free.set(memory.byteLength, [memory]);
      else alike.push(memory);
    }
    this.#left = [];
  }

  #take(sizeBytes: number): Buffer {
    const roundBytes = Math.ceil(sizeBytes / STEP_BYTES) * STEP_BYTES;
    const free = this.#free.get(roundBytes)?.pop();
    if (free !== undefined) return Buffer.from(free, 0, sizeBytes);
    this.#bytes += roundBytes;
    this.#giveUpFree();
    return Buffer.allocUnsafeSlow(roundBytes).subarray(0, sizeBytes);
  }

  /** Free memory of other sizes goes while there is too much in all. */
  #giveUpFree(): void {
    for (const [sizeBytes, alike] of this.#free) {
      for (; this.#bytes > this.#maxBytes && alike.length > 0; alike.pop()) this.#bytes -= sizeBytes;
      if (this.#bytes <= this.#maxBytes) return;
      this.#free.delete(sizeBytes);
    }
  }
}
