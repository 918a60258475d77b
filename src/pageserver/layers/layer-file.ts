/**
 * Reads layer files (layer-format.ts). Everything is synchronous: what is asked for is nearly always in the cache or in the operating
 * system's, and a page read that does not yield needs no promise and sees one state of the layer map.
 *
 * Bounded: how many files are open, and the bytes of decoded blocks kept, over all layers of the process (LayerCache).
 */

import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import type { Lsn } from '../../postgres/lsn.ts';
import { compareKeys } from '../key.ts';
import type { Key, KeyRange } from '../key.ts';
import { BLOCK_TYPE, decodeBlock, LayerAbsentError, LayerDamagedError } from './block.ts';
import type { Chain, ValueSource } from './chain.ts';
import { GenerationCache } from './generation-cache.ts';
import type { KeyBlock } from './key-block.ts';
import { decodeFooter, decodeIndex, decodeKeyBlock, LAYER_FOOTER_BYTES } from './layer-format.ts';
import type { LayerDescription, LayerFooter, LayerIndex } from './layer-format.ts';

const BLOCKS_PER_LAYER_MAX = 2 ** 24;

export interface LayerCacheOptions {
  readonly blockBytesMax: number;
  readonly openFilesMax: number;
}

/** What all layers of a process share. */
export class LayerCache {
  readonly blocks: GenerationCache<Buffer>;
  readonly keyBlocks: GenerationCache<KeyBlock>;
  readonly #openFilesMax: number;
  readonly #open = new Set<LayerFile>();
  /** Counted up from time to time (eviction.ts), so that a layer can tell cheaply when it was used. */
  tick = 0;
  #layerCount = 0;

  constructor(options: LayerCacheOptions) {
    this.blocks = new GenerationCache(options.blockBytesMax * 0.75);
    this.keyBlocks = new GenerationCache(options.blockBytesMax * 0.25);
    this.#openFilesMax = options.openFilesMax;
  }

  nextLayerNumber(): number {
    return ++this.#layerCount;
  }

  opened(layer: LayerFile): void {
    this.#open.add(layer);
    if (this.#open.size <= this.#openFilesMax) return;
    // A second chance for those that were used since they were last looked at; the set keeps the order.
    for (const candidate of this.#open) {
      if (candidate === layer) continue;
      this.#open.delete(candidate);
      if (!candidate.closeUnlessUsed()) this.#open.add(candidate);
      else if (this.#open.size <= this.#openFilesMax) break;
    }
  }

  closed(layer: LayerFile): void {
    this.#open.delete(layer);
  }
}

interface OpenLayer {
  readonly file: number;
  readonly index: LayerIndex;
  readonly footer: LayerFooter;
}

export interface LayerEntry {
  readonly key: Key;
  readonly lsn: Lsn;
  /** Shares memory with a cached block. */
  readonly value: Buffer;
}

export class LayerFile implements ValueSource {
  readonly description: LayerDescription;
  readonly path: string;
  /** The file is here, as far as is known. */
  isLocal = true;
  /** The file is one with an object of the object store: it takes no space of its own. */
  isShared = false;
  /** The cache's tick when it was used last. */
  usedAtTick: number;
  readonly #number: number;
  readonly #cache: LayerCache;
  #open: OpenLayer | undefined;
  #wasUsed = false;
  #lastKeyBlock: KeyBlock | undefined;
  #lastKeyBlockNumber = -1;

  constructor(path: string, description: LayerDescription, cache: LayerCache) {
    this.path = path;
    this.description = description;
    this.#cache = cache;
    this.#number = cache.nextLayerNumber();
    this.usedAtTick = cache.tick;
  }

  collect(key: Key, lsn: Lsn, floor: Lsn, chain: Chain): boolean {
    const { firstKeys, firstLsns } = this.#opened().index;
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
        if (chain.push(this.#value(block, entry), entryLsn)) return true;
      }
      if (at > 0) return false;
    }
    return false;
  }

  forEachKey(range: KeyRange, visit: (key: Key) => void): void {
    const { firstKeys } = this.#opened().index;
    let previous: Key | undefined;
    for (let number = Math.max(0, firstKeys.lowerBound(range.start) - 1); number < firstKeys.count; number++) {
      if (firstKeys.compare(number, range.end) >= 0) return;
      const { keys } = this.#keyBlock(number);
      for (let i = keys.lowerBound(range.start); i < keys.count && keys.compare(i, range.end) < 0; i++) {
        const key = keys.get(i);
        if (previous === undefined || compareKeys(previous, key) !== 0) visit(key);
        previous = key;
      }
    }
  }

  /**
   * The keys of the range that have an entry with `floor < LSN <= lsn`, in order, by the index alone: values are not read. Gives undefined for
   * each key block that it reads, so that whoever asks may do other things in between. Leaves the cache as it is.
   */
  *keysWithin(range: KeyRange, floor: Lsn, lsn: Lsn): Generator<Key | undefined, undefined> {
    const { firstKeys } = this.#opened().index;
    const { lsnStart, lsnEnd } = this.description;
    const isWholly = floor < lsnStart && lsnEnd - 1 <= lsn;
    let last: Key | undefined;
    for (let number = Math.max(0, firstKeys.lowerBound(range.start) - 1); number < firstKeys.count; number++) {
      if (firstKeys.compare(number, range.end) >= 0) return undefined;
      const block = this.#keyBlock(number, false);
      yield undefined;
      const { keys } = block;
      for (let i = keys.lowerBound(range.start); i < keys.count && keys.compare(i, range.end) < 0; i++) {
        if (!isWholly && !block.hasEntryWithin(i, floor, lsn)) continue;
        if (last !== undefined && keys.compare(i, last) === 0) continue;
        yield (last = keys.get(i));
      }
    }
    return undefined;
  }

  /** Every value in the layer's order, for merges. */
  *entries(): Generator<LayerEntry> {
    const { firstKeys } = this.#opened().index;
    let key: Key | undefined;
    for (let number = 0; number < firstKeys.count; number++) {
      const block = this.#keyBlock(number);
      for (let i = 0; i < block.keys.count; i++) {
        // One object for all entries of a key, though they may lie in two blocks.
        if (key === undefined || block.keys.compare(i, key) !== 0) key = block.keys.get(i);
        for (let entry = block.entryStart[i]!; entry < block.entryStart[i + 1]!; entry++) {
          yield { key, lsn: block.lsns[entry]!, value: this.#value(block, entry) };
        }
      }
    }
  }

  /** Every value in the layer's order, for verification and tests. */
  forEachValue(visit: (key: Key, lsn: Lsn, value: Buffer) => void): void {
    const { firstKeys } = this.#opened().index;
    for (let number = 0; number < firstKeys.count; number++) {
      const block = this.#keyBlock(number);
      for (let i = 0; i < block.keys.count; i++) {
        const key = block.keys.get(i);
        for (let entry = block.entryStart[i]!; entry < block.entryStart[i + 1]!; entry++) {
          visit(key, block.lsns[entry]!, this.#value(block, entry));
        }
      }
    }
  }

  /** What the file says of itself. */
  get footer(): LayerFooter {
    return this.#opened().footer;
  }

  /** Closes the file; it is opened again when it is needed. */
  close(): void {
    if (this.#open === undefined) return;
    closeSync(this.#open.file);
    this.#open = undefined;
    this.#lastKeyBlock = undefined;
    this.#lastKeyBlockNumber = -1;
    this.#cache.closed(this);
  }

  /** For LayerCache: closes the file if it was not used since the last time this was asked. */
  closeUnlessUsed(): boolean {
    if (this.#wasUsed) {
      this.#wasUsed = false;
      return false;
    }
    this.close();
    return true;
  }

  #opened(): OpenLayer {
    this.#wasUsed = true;
    this.usedAtTick = this.#cache.tick;
    if (this.#open !== undefined) return this.#open;
    const file = this.#openFile();
    try {
      const { sizeBytes } = this.description;
      const length = fstatSync(file).size;
      if (length !== sizeBytes) {
        throw new LayerDamagedError(this.path, 0, `file has ${length} bytes, the timeline's index says ${sizeBytes}`);
      }
      const footerOffset = length - LAYER_FOOTER_BYTES;
      const footer = decodeFooter(this.#read(file, footerOffset, LAYER_FOOTER_BYTES), this.path, footerOffset);
      if (footer.indexOffset + footer.indexLength !== footerOffset) {
        throw new LayerDamagedError(this.path, footerOffset, `the index does not end where the footer begins`);
      }
      const block = this.#read(file, footer.indexOffset, footer.indexLength);
      const content = decodeBlock(block, BLOCK_TYPE.index, this.path, footer.indexOffset);
      this.#open = { file, footer, index: decodeIndex(content, this.path, footer.indexOffset) };
    } catch (error) {
      closeSync(file);
      throw error;
    }
    this.#cache.opened(this);
    return this.#open;
  }

  #openFile(): number {
    try {
      return openSync(this.path, 'r');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
      this.isLocal = false;
      throw new LayerAbsentError(this.path);
    }
  }

  #keyBlock(number: number, isKept = true): KeyBlock {
    if (number === this.#lastKeyBlockNumber) return this.#lastKeyBlock!;
    const cacheKey = this.#number * BLOCKS_PER_LAYER_MAX + number;
    let block = this.#cache.keyBlocks.get(cacheKey);
    if (block === undefined) {
      const { index, file } = this.#opened();
      const offset = index.keyBlockOffsets[number]!;
      const content = decodeBlock(
        this.#read(file, offset, index.keyBlockLengths[number]!),
        BLOCK_TYPE.keys,
        this.path,
        offset,
      );
      block = decodeKeyBlock(content, this.description.lsnStart, this.path, offset);
      if (!isKept) return block;
      this.#cache.keyBlocks.set(cacheKey, block, block.sizeBytes);
    }
    this.#lastKeyBlock = block;
    this.#lastKeyBlockNumber = number;
    return block;
  }

  #value(block: KeyBlock, entry: number): Buffer {
    const number = block.valueBlocks[entry]!;
    const start = block.valueOffsets[entry]!;
    const end = start + block.valueLengths[entry]!;
    const cacheKey = this.#number * BLOCKS_PER_LAYER_MAX + number;
    let values = this.#cache.blocks.get(cacheKey);
    const { index, file } = this.#opened();
    const offset = index.valueBlockOffsets[number];
    if (offset === undefined) {
      throw new LayerDamagedError(
        this.path,
        0,
        `an entry names value block ${number} of ${index.valueBlockOffsets.length}`,
      );
    }
    if (values === undefined) {
      const length = index.valueBlockLengths[number]!;
      values = decodeBlock(this.#read(file, offset, length), BLOCK_TYPE.values, this.path, offset);
      this.#cache.blocks.set(cacheKey, values, values.length + 128);
    }
    if (end > values.length || block.kinds[entry] !== values[start]) {
      throw new LayerDamagedError(this.path, offset, `no value of kind ${block.kinds[entry]} at [${start}, ${end})`);
    }
    return values.subarray(start, end);
  }

  #read(file: number, offset: number, length: number): Buffer {
    if (offset < 0) throw new LayerDamagedError(this.path, 0, 'file is too short to be a layer');
    const bytes = Buffer.allocUnsafe(length);
    let done = 0;
    while (done < length) {
      const count = this.#readSome(file, bytes, done, length - done, offset + done);
      if (count === 0) throw new LayerDamagedError(this.path, offset, `file ends ${length - done} bytes too early`);
      done += count;
    }
    return bytes;
  }

  /** A disk that cannot read a file has damaged it as much as one that gives back something else. */
  #readSome(file: number, bytes: Buffer, at: number, length: number, offset: number): number {
    try {
      return readSync(file, bytes, at, length, offset);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EIO') throw error;
      throw new LayerDamagedError(this.path, offset, 'the disk reports an error (EIO)');
    }
  }
}

/** The last block whose first entry is at or before (key, lsn); -1 when all are after it. */
function lastBlockAtOrBelow(firstKeys: LayerIndex['firstKeys'], firstLsns: Float64Array, key: Key, lsn: Lsn): number {
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
