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
import { BlockCache } from './block-cache.ts';
import { BLOCK_TYPE, decodeBlock, LayerAbsentError, LayerDamagedError } from './block.ts';
import type { Memory } from './block.ts';
import type { Chain, ValueSource } from './chain.ts';
import { GenerationCache } from './generation-cache.ts';
import type { KeyBlock } from './key-block.ts';
import { decodeFooter, decodeIndex, LAYER_FOOTER_BYTES } from './layer-format.ts';
import type { LayerDescription, LayerFooter } from './layer-format.ts';
import { LayerSection, mergeByKey } from './layer-section.ts';
import type { KeyEntries, SectionSource } from './layer-section.ts';
import type { PartialLayer } from './partial-layer.ts';

const BLOCKS_PER_LAYER_MAX = 2 ** 24;
/** A stored block is looked at once: all up to this size come to the same memory, one after the other. */
const READ_MEMORY_BYTES = 256 * 1024;

export interface LayerCacheOptions {
  readonly blockBytesMax: number;
  readonly openFilesMax: number;
}

/** What all layers of a process share. */
export class LayerCache {
  readonly blocks: BlockCache;
  readonly keyBlocks: GenerationCache<KeyBlock>;
  /** Where stored blocks are read to. */
  readonly readMemory: Buffer = Buffer.allocUnsafeSlow(READ_MEMORY_BYTES);
  readonly #openFilesMax: number;
  readonly #open = new Set<LayerFile>();
  /** Counted up from time to time (eviction.ts), so that a layer can tell cheaply when it was used. */
  tick = 0;
  #layerCount = 0;

  constructor(options: LayerCacheOptions) {
    this.blocks = new BlockCache(options.blockBytesMax * 0.75);
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
  readonly history: LayerSection;
  readonly newest: LayerSection;
  readonly footer: LayerFooter;
}

export class LayerFile implements ValueSource {
  readonly description: LayerDescription;
  readonly path: string;
  /** The file is here, as far as is known. */
  isLocal = true;
  /** What is here of a layer that is not here whole. */
  partial: PartialLayer | undefined;
  /** The file is one with an object of the object store: it takes no space of its own. */
  isShared = false;
  /** The cache's tick when it was used last. */
  usedAtTick: number;
  readonly #number: number;
  readonly #cache: LayerCache;
  #open: OpenLayer | undefined;
  #wasUsed = false;

  constructor(path: string, description: LayerDescription, cache: LayerCache) {
    this.path = path;
    this.description = description;
    this.#cache = cache;
    this.#number = cache.nextLayerNumber();
    this.usedAtTick = cache.tick;
  }

  collect(key: Key, lsn: Lsn, floor: Lsn, chain: Chain): boolean {
    const { history, newest } = this.#opened();
    if (!newest.isEmpty && newest.collect(key, lsn, floor, chain)) return true;
    return history.collect(key, lsn, floor, chain);
  }

  forEachKey(range: KeyRange, visit: (key: Key) => void): void {
    for (const key of this.#keysWithin(range, -Infinity, Infinity, true)) if (key !== undefined) visit(key);
  }

  /**
   * The keys of the range that have an entry with `floor < LSN <= lsn`, in order, by the index alone: values are not read. Gives undefined for
   * each key block that it reads, so that whoever asks may do other things in between. Leaves the cache as it is.
   */
  keysWithin(range: KeyRange, floor: Lsn, lsn: Lsn): Generator<Key | undefined, undefined> {
    return this.#keysWithin(range, floor, lsn, false);
  }

  *#keysWithin(range: KeyRange, floor: Lsn, lsn: Lsn, isKept: boolean): Generator<Key | undefined, undefined> {
    const { history, newest } = this.#opened();
    const both = mergeByKey(
      history.keysWithin(range, floor, lsn, isKept),
      newest.keysWithin(range, floor, lsn, isKept),
      (key) => key,
    );
    let last: Key | undefined;
    for (const key of both) {
      if (key !== undefined && last !== undefined && compareKeys(last, key) === 0) continue;
      yield key;
      last = key ?? last;
    }
    return undefined;
  }

  /** Every value in the layer's order, for merges; some keys come twice in a row. `memory` is asked for each block. */
  entries(memory: Memory): Generator<KeyEntries, undefined> {
    const { history, newest } = this.#opened();
    return mergeByKey(history.entries(memory), newest.entries(memory), ({ key }) => key);
  }

  /** Every value in the layer's order, for verification and tests. */
  forEachValue(visit: (key: Key, lsn: Lsn, value: Buffer) => void): void {
    for (const { key, entries } of this.entries((sizeBytes) => Buffer.allocUnsafeSlow(sizeBytes))) {
      for (const { lsn, value } of entries) visit(key, lsn, value);
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
    this.#cache.closed(this);
  }

  /** The whole file is in its place, for the first time or anew. */
  becomeWhole(): void {
    this.close();
    this.partial?.remove();
    this.partial = undefined;
    this.isLocal = true;
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
      const { history, newest } = decodeIndex(content, this.path, footer.indexOffset);
      const source: SectionSource = {
        path: this.path,
        lsnStart: this.description.lsnStart,
        blocks: this.#cache.blocks,
        keyBlocks: this.#cache.keyBlocks,
        // It may have been closed since.
        read: (at, bytes) => this.#read(this.#opened().file, at, bytes),
      };
      const firstBlock = this.#number * BLOCKS_PER_LAYER_MAX;
      this.#open = {
        file,
        footer,
        history: new LayerSection(history, source, firstBlock),
        newest: new LayerSection(newest, source, firstBlock + BLOCKS_PER_LAYER_MAX / 2),
      };
    } catch (error) {
      closeSync(file);
      throw error;
    }
    this.#cache.opened(this);
    return this.#open;
  }

  #openFile(): number {
    try {
      return openSync(this.partial?.path ?? this.path, 'r');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
      this.isLocal = false;
      this.partial = undefined;
      throw new LayerAbsentError(this.path);
    }
  }

  #read(file: number, offset: number, length: number): Buffer {
    if (offset < 0) throw new LayerDamagedError(this.path, 0, 'file is too short to be a layer');
    const { sizeBytes } = this.description;
    if (offset + length > sizeBytes) {
      throw new LayerDamagedError(this.path, offset, `${length} bytes are wanted there, and it has ${sizeBytes}`);
    }
    const missing = this.partial?.missing(offset, length);
    if (missing !== undefined) throw new LayerAbsentError(this.path, missing);
    const bytes = length <= READ_MEMORY_BYTES ? this.#cache.readMemory.subarray(0, length) : Buffer.allocUnsafe(length);
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
