/**
 * One section of a layer file (layer-format.ts), for reading: its key blocks, which say where values are, and its value blocks.
 */

import type { Lsn } from '../../postgres/lsn.ts';
import { compareKeys } from '../key.ts';
import type { Key, KeyRange } from '../key.ts';
import { BLOCK_TYPE, decodeBlock, LayerDamagedError } from './block.ts';
import type { Memory } from './block.ts';
import type { Chain } from './chain.ts';
import type { BlockCache } from './block-cache.ts';
import type { GenerationCache } from './generation-cache.ts';
import type { KeyBlock } from './key-block.ts';
import { decodeKeyBlock } from './layer-format.ts';
import type { SectionIndex } from './layer-format.ts';

export interface LayerEntry {
  readonly lsn: Lsn;
  readonly value: Buffer;
}

/** Entries of one key, oldest first: those that one key block has. */
export interface KeyEntries {
  readonly key: Key;
  readonly entries: readonly LayerEntry[];
  /** Memory in which no values are but those of these entries and of what came before. */
  readonly left: readonly ArrayBufferLike[];
}

/** The layer file as its sections see it. */
export interface SectionSource {
  readonly path: string;
  readonly lsnStart: Lsn;
  readonly blocks: BlockCache;
  readonly keyBlocks: GenerationCache<KeyBlock>;
  /** Opens the file if it is not open. What it gives is good until it is called again. */
  readonly read: (offset: number, length: number) => Buffer;
}

export class LayerSection {
  readonly #index: SectionIndex;
  readonly #source: SectionSource;
  /** Block n is known to the caches as this + n. */
  readonly #cacheKeyStart: number;
  #lastKeyBlock: KeyBlock | undefined;
  #lastKeyBlockNumber = -1;

  constructor(index: SectionIndex, source: SectionSource, cacheKeyStart: number) {
    this.#index = index;
    this.#source = source;
    this.#cacheKeyStart = cacheKeyStart;
  }

  get isEmpty(): boolean {
    return this.#index.firstKeys.count === 0;
  }

  /** As ValueSource.collect. */
  collect(key: Key, lsn: Lsn, floor: Lsn, chain: Chain): boolean {
    const { firstKeys, firstLsns } = this.#index;
    let number = lastBlockAtOrBelow(firstKeys, firstLsns, key, lsn);
    for (; number >= 0; number--) {
      const block = this.#keyBlock(number);
      const at = block.keys.lowerBound(key);
      if (at === block.keys.count || block.keys.compare(at, key) !== 0) return false;
      const start = block.entryStart[at]!;
      for (let entry = block.entryStart[at + 1]! - 1; entry >= start; entry--) {
        const entryLsn = block.lsns[entry]!;
        if (entryLsn > lsn) continue;
        if (entryLsn <= floor) return chain.reachFloor();
        if (chain.push(this.#value(block, entry, this.#valueBlock(block, entry)), entryLsn)) return true;
      }
      if (at > 0) return false;
    }
    return false;
  }

  /**
   * The keys of the range that have an entry with `floor < LSN <= lsn`, in order. Gives undefined for each key block that it reads: those
   * that have nothing after `floor` are passed over. Without
   * `isKept` it leaves the cache as it is.
   */
  *keysWithin(range: KeyRange, floor: Lsn, lsn: Lsn, isKept: boolean): Generator<Key | undefined, undefined> {
    const { firstKeys, newestLsns } = this.#index;
    let last: Key | undefined;
    for (let number = Math.max(0, firstKeys.lowerBound(range.start) - 1); number < firstKeys.count; number++) {
      if (firstKeys.compare(number, range.end) >= 0) return undefined;
      if (newestLsns[number]! <= floor) continue;
      const block = this.#keyBlock(number, isKept);
      yield undefined;
      const { keys } = block;
      for (let i = keys.lowerBound(range.start); i < keys.count && keys.compare(i, range.end) < 0; i++) {
        if (!block.hasEntryWithin(i, floor, lsn)) continue;
        if (last !== undefined && keys.compare(i, last) === 0) continue;
        yield (last = keys.get(i));
      }
    }
    return undefined;
  }

  /** Every entry, in order. Leaves the cache of value blocks as it is: values are in memory that is asked for, for each block. */
  *entries(memory: Memory): Generator<KeyEntries, undefined> {
    let values: Buffer | undefined;
    let valuesNumber = -1;
    for (let number = 0; number < this.#index.firstKeys.count; number++) {
      const block = this.#keyBlock(number);
      for (let i = 0; i < block.keys.count; i++) {
        const entries: LayerEntry[] = [];
        let left: ArrayBufferLike[] = NO_MEMORY;
        for (let entry = block.entryStart[i]!; entry < block.entryStart[i + 1]!; entry++) {
          if (values === undefined || block.valueBlocks[entry] !== valuesNumber) {
            if (values !== undefined) left = [...left, values.buffer];
            valuesNumber = block.valueBlocks[entry]!;
            values = this.#readValueBlock(valuesNumber, memory);
          }
          entries.push({ lsn: block.lsns[entry]!, value: this.#value(block, entry, values) });
        }
        yield { key: block.keys.get(i), entries, left };
      }
    }
    return undefined;
  }

  #keyBlock(number: number, isKept = true): KeyBlock {
    if (number === this.#lastKeyBlockNumber) return this.#lastKeyBlock!;
    const { keyBlocks, path, lsnStart, read } = this.#source;
    const cacheKey = this.#cacheKeyStart + number;
    let block = keyBlocks.get(cacheKey);
    if (block === undefined) {
      const offset = this.#index.keyBlockOffsets[number]!;
      const bytes = read(offset, this.#index.keyBlockLengths[number]!);
      block = decodeKeyBlock(decodeBlock(bytes, BLOCK_TYPE.keys, path, offset), lsnStart, path, offset);
      if (!isKept) return block;
      keyBlocks.set(cacheKey, block, block.sizeBytes);
    }
    this.#lastKeyBlock = block;
    this.#lastKeyBlockNumber = number;
    return block;
  }

  #value(block: KeyBlock, entry: number, values: Buffer): Buffer {
    const start = block.valueOffsets[entry]!;
    const end = start + block.valueLengths[entry]!;
    if (end > values.length || block.kinds[entry] !== values[start]) {
      const offset = this.#index.valueBlockOffsets[block.valueBlocks[entry]!]!;
      const reason = `no value of kind ${block.kinds[entry]} at [${start}, ${end})`;
      throw new LayerDamagedError(this.#source.path, offset, reason);
    }
    return values.subarray(start, end);
  }

  /** The block that has the entry's value. */
  #valueBlock(block: KeyBlock, entry: number): Buffer {
    const number = block.valueBlocks[entry]!;
    const { blocks } = this.#source;
    const cacheKey = this.#cacheKeyStart + number;
    return blocks.get(cacheKey) ?? blocks.load(cacheKey, (memory) => this.#readValueBlock(number, memory));
  }

  #readValueBlock(number: number, memory: Memory): Buffer {
    const { path, read } = this.#source;
    const { valueBlockOffsets, valueBlockLengths } = this.#index;
    const offset = valueBlockOffsets[number];
    if (offset === undefined) {
      throw new LayerDamagedError(path, 0, `an entry names value block ${number} of ${valueBlockOffsets.length}`);
    }
    return decodeBlock(read(offset, valueBlockLengths[number]!), BLOCK_TYPE.values, path, offset, memory);
  }
}

const NO_MEMORY: ArrayBufferLike[] = [];

/** Two generators in the order of keys as one; of equal keys the first one's comes first. What has no key is passed on at once. */
export function* mergeByKey<T>(
  first: Generator<T, undefined>,
  second: Generator<T, undefined>,
  keyOf: (item: T) => Key | undefined,
): Generator<T, undefined> {
  let a = first.next();
  let b = second.next();
  while (a.done !== true && b.done !== true) {
    const keyA = keyOf(a.value);
    const keyB = keyOf(b.value);
    if (keyA === undefined || (keyB !== undefined && compareKeys(keyA, keyB) <= 0)) {
      yield a.value;
      a = first.next();
    } else {
      yield b.value;
      b = second.next();
    }
  }
  for (; a.done !== true; a = first.next()) yield a.value;
  for (; b.done !== true; b = second.next()) yield b.value;
  return undefined;
}

/** The last block whose first entry is at or before (key, lsn); -1 when all are after it. */
function lastBlockAtOrBelow(firstKeys: SectionIndex['firstKeys'], firstLsns: Float64Array, key: Key, lsn: Lsn): number {
  let low = 0;
  let high = firstKeys.count;
  while (low < high) {
    const middle = (low + high) >>> 1;
    const order = firstKeys.compare(middle, key) || firstLsns[middle]! - lsn;
    if (order <= 0) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
