/**
 * A Bloom filter over keys: says of a key that it is not there, or that it may be. Ten to twenty bits for each key and five of them set
 * make less than one wrong "may be" in a hundred.
 */

import type { Key } from '../key.ts';

const BITS_PER_KEY = 10;
const HASHES = 5;

export class KeyFilter {
  readonly #bits: Uint32Array;
  /** The number of bits, a power of two, less one. */
  readonly #mask: number;

  constructor(keyCountMax: number) {
    const bitCount = 2 ** Math.max(6, Math.ceil(Math.log2(keyCountMax * BITS_PER_KEY + 1)));
    this.#bits = new Uint32Array(bitCount / 32);
    this.#mask = bitCount - 1;
  }

  add(key: Key): void {
    const step = secondHash(key);
    let hash = firstHash(key);
    for (let i = 0; i < HASHES; i++, hash = (hash + step) | 0) {
      const bit = hash & this.#mask;
      this.#bits[bit >>> 5]! |= 1 << (bit & 31);
    }
  }

  /** The hashes are firstHash and secondHash of the key: many filters are asked about one key. */
  mayHave(first: number, second: number): boolean {
    let hash = first;
    for (let i = 0; i < HASHES; i++, hash = (hash + second) | 0) {
      const bit = hash & this.#mask;
      if ((this.#bits[bit >>> 5]! & (1 << (bit & 31))) === 0) return false;
    }
    return true;
  }
}

export function firstHash(key: Key): number {
  let hash = Math.imul(key.rel, 0x9e3779b1) ^ Math.imul(key.db, 0x85ebca6b) ^ Math.imul(key.spc, 0xc2b2ae35);
  hash = Math.imul(hash ^ (hash >>> 15) ^ (key.kind << 8) ^ key.fork, 0x2c1b3c6d) ^ Math.imul(key.blk, 0x27d4eb2f);
  hash = Math.imul(hash ^ (hash >>> 13), 0x297a2d39);
  return hash ^ (hash >>> 16);
}

/** Odd, so that its multiples reach everywhere. */
export function secondHash(key: Key): number {
  let hash = Math.imul(key.blk ^ (key.rel << 7), 0x85ebca6b) ^ Math.imul(key.db ^ (key.kind << 3), 0x9e3779b1);
  hash = Math.imul(hash ^ (hash >>> 15) ^ key.fork, 0xc2b2ae35);
  return (hash ^ (hash >>> 14)) | 1;
}
