/**
 * Merges runs of delta layers into one run of larger layers, sorted by key: what a compaction does away from the main thread. It reads
 * immutable files and writes new ones; nothing refers to those until the timeline's index does.
 *
 * Chains of changes are kept short: where a page has CHAIN_RECORDS_MAX changes in a row, or its newest changes in this run are
 * TAIL_RECORDS_MAX or more, or CHAIN_BYTES_MAX large, an image made by replaying them goes in after them, under the LSN of the last one.
 *
 * History that nobody can read any more is left out (`retention`). A value is read at LSN p when it is at or below p and no value that
 * needs nothing before it lies between; so it is needed when there is such a p among the retained LSNs or at or above the horizon. A
 * block at or past the end of its fork is zeroes to every reader, and ingest gives it a value that ends the search when the fork grows over it
 * again: so values of it up to p are not needed for p either. A long chain of changes that only the horizon needs becomes an image. Of the WAL index, the chunks from the one on that has the last record at the
 * horizon are needed, and below it those that have the last record at a retained LSN: searches go there (ingest/wal-search.ts).
 */

import assert from 'node:assert/strict';
import { rm } from 'node:fs/promises';
import { setImmediate as yieldToOthers } from 'node:timers/promises';
import type { Lsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import type { PgVersion } from '../postgres/version.ts';
import { bucketOfChunkKey, walIndexBucket, walIndexChunkKey } from './ingest/wal-index.ts';
import { compareKeys, KEY_KIND, relationSizeKey } from './key.ts';
import type { Key } from './key.ts';
import { LayerAbsentError } from './layers/block.ts';
import { LayerDamagedError } from './layers/block.ts';
import type { Memory } from './layers/block.ts';
import { LayerCache, LayerFile } from './layers/layer-file.ts';
import type { KeyEntries, LayerEntry } from './layers/layer-section.ts';
import { layerPath } from './layers/layer-format.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { LayerMap } from './layers/layer-map.ts';
import { LAYER_BYTES, LayerWriter } from './layers/layer-writer.ts';
import { PageCache } from './page-cache.ts';
import { HistoryReader } from './read.ts';
import type { LineageStep, Replay } from './read.ts';
import { encodeImage, IMAGE_HEADER_BYTES, needsNoPrior, VALUE_KIND } from './value.ts';

export const CHAIN_RECORDS_MAX = 200;
export const TAIL_RECORDS_MAX = 20;
const CHAIN_BYTES_MAX = 64 * 1024;
const SLICE_MS = 5;
/** Memory for blocks comes in multiples of this, so that what one leaves fits another; so many of each size are kept. */
const MEMORY_STEP_BYTES = 16 * 1024;
const FREE_COUNT_MAX = 4;

/** What a merge needs to know; it can be sent to another thread. */
export interface MergeJob {
  readonly directory: string;
  readonly timelineId: string;
  readonly pgVersion: PgVersion;
  /** Oldest first, each by key. */
  readonly runs: readonly (readonly LayerDescription[])[];
  /** All layers of the timeline, then of its ancestors, and up to where they count: for pages whose history begins before these runs. */
  readonly lineage: readonly MergeLineageStep[];
  readonly retention: Retention | undefined;
  /** Of the new layers: above that of the runs' layers. */
  readonly revision: number;
  /** Its first element becomes 1 when the merge is to be given up. */
  readonly cancel: Int32Array;
}

export interface MergeLineageStep {
  readonly directory: string;
  readonly layers: readonly LayerDescription[];
  readonly endLsn: Lsn;
}

/** What has to stay readable: every LSN from `horizonLsn` on, and each of `lsns` below it (rising). */
export interface Retention {
  readonly horizonLsn: Lsn;
  readonly lsns: readonly Lsn[];
}

export class MergeCancelled extends Error {
  override name = 'MergeCancelled';
}

/** The new layers, durable under their names. */
export async function mergeLayers(job: MergeJob, replay: Replay): Promise<LayerDescription[]> {
  const merge = new Merge(job, replay);
  try {
    return await merge.run();
  } finally {
    merge.close();
  }
}

class Merge {
  readonly #job: MergeJob;
  readonly #replay: Replay;
  readonly #cache = new LayerCache({ blockBytesMax: 32 * 1024 * 1024, openFilesMax: 64 });
  readonly #reader: HistoryReader;
  readonly #files: LayerFile[] = [];
  readonly #lineage: readonly LineageStep[];
  readonly #lsnStart: Lsn;
  readonly #lsnEnd: Lsn;
  readonly #written: LayerDescription[] = [];
  #writer: LayerWriter | undefined;
  /** The value of the image that was made last: memory that is given up for each costs more than making it. */
  readonly image = newImage();
  /** Sizes at the retained LSNs and at the horizon of the fork that was looked at last. */
  #sizesOf: Key | undefined;
  #sizes: number[] = [];
  /** Of the WAL index. */
  #oldestBucket: number | undefined;
  #retainedBuckets: ReadonlySet<number> | undefined;

  constructor(job: MergeJob, replay: Replay) {
    this.#job = job;
    this.#replay = replay;
    this.#reader = new HistoryReader(new PageCache(8 * 1024 * 1024), this.#cache.blocks, replay);
    this.#lsnStart = job.runs[0]![0]!.lsnStart;
    this.#lsnEnd = job.runs.at(-1)![0]!.lsnEnd;
    this.#lineage = job.lineage.map(({ directory, layers, endLsn }, number) => {
      const layerMap = new LayerMap();
      for (const layer of layers) layerMap.insert(this.#file(directory, layer));
      const history = { number, lastRecordLsn: Infinity, memoryLayers: [], layerMap };
      return { history, endLsn, filter: undefined, groups: [] };
    });
  }

  async run(): Promise<LayerDescription[]> {
    const { runs, directory, cancel } = this.#job;
    const sources = runs.map((run) => new RunCursor(run.map((layer) => this.#file(directory, layer))));
    let sliceStartMs = performance.now();
    try {
      for (;;) {
        let key: Key | undefined;
        for (const source of sources) {
          const { current } = source;
          if (current !== undefined && (key === undefined || compareKeys(current.key, key) < 0)) key = current.key;
        }
        if (key === undefined) break;
        const entries: LayerEntry[] = [];
        for (const source of sources) source.take(key, entries);
        await this.#writeKey(key, entries);
        for (const source of sources) source.recycle();
        if (performance.now() - sliceStartMs > SLICE_MS) {
          if (Atomics.load(cancel, 0) !== 0) throw new MergeCancelled('the merge was given up');
          await yieldToOthers();
          sliceStartMs = performance.now();
        }
      }
      await this.#finishLayer();
      return this.#written;
    } catch (error) {
      await this.#writer?.abort();
      // Nothing names them; on a full disk they would be in the way of the next attempt.
      for (const layer of this.#written) await rm(layerPath(directory, layer), { force: true });
      throw error;
    }
  }

  close(): void {
    for (const file of this.#files) file.close();
  }

  async #writeKey(key: Key, all: readonly LayerEntry[]): Promise<void> {
    const entries = this.#job.retention === undefined ? all : this.#needed(key, all, this.#job.retention);
    if (entries.length === 0) return;
    if (this.#writer !== undefined && this.#writer.valueBytes >= LAYER_BYTES) await this.#finishLayer();
    const { directory, timelineId } = this.#job;
    const writer = (this.#writer ??= await LayerWriter.create(directory, {
      kind: 'delta',
      timelineId,
      lsnStart: this.#lsnStart,
      lsnEnd: this.#lsnEnd,
      revision: this.#job.revision,
    }));
    const chain = holdsPages(key) ? new ImageChain(this, key) : undefined;
    for (let i = 0; i < entries.length; i++) {
      const { lsn, value } = entries[i]!;
      const nextLsn = entries[i + 1]?.lsn;
      // The newest image of a page is what most reads want.
      const isNewest = chain !== undefined && nextLsn === undefined;
      if (isNewest && value[0] === VALUE_KIND.image) writer.addNewest(key, lsn, value);
      else writer.add(key, lsn, value);
      const image = chain?.add(value, lsn, nextLsn);
      if (image !== undefined && isNewest) writer.addNewest(key, lsn, image);
      else if (image !== undefined) writer.add(key, lsn, image);
      if (writer.isBusy) await writer.drain();
    }
  }

  async #finishLayer(): Promise<void> {
    if (this.#writer === undefined) return;
    const writer = this.#writer;
    this.#written.push(await writer.finish());
    this.#writer = undefined;
  }

  #needed(key: Key, entries: readonly LayerEntry[], retention: Retention): readonly LayerEntry[] {
    const { horizonLsn, lsns } = retention;
    if (entries[0]!.lsn >= horizonLsn) return entries;
    if (key.kind === KEY_KIND.walIndex && !this.#isChunkNeeded(bucketOfChunkKey(key), retention)) return [];
    const sizes = key.kind === KEY_KIND.relationBlock ? this.#sizesAt(key, retention) : undefined;
    const isVisibleAt = (point: number): boolean => sizes === undefined || key.blk < sizes[point]!;
    const kept: LayerEntry[] = [];
    /** Of those, what only the horizon needs. */
    const ofHorizon = new Set<LayerEntry>();
    let ofHorizonBytes = 0;
    let lastOfHorizon: LayerEntry | undefined;
    /** Of the next newer value that needs nothing before it. */
    let nextBaseLsn: Lsn = Infinity;
    for (let i = entries.length - 1; i >= 0; i--) {
      const entry = entries[i]!;
      const { lsn } = entry;
      let isNeeded = nextBaseLsn > horizonLsn && lsn > horizonLsn;
      for (let point = 0; !isNeeded && point < lsns.length; point++) {
        isNeeded = lsn <= lsns[point]! && lsns[point]! < nextBaseLsn && isVisibleAt(point);
      }
      // Of all LSNs from the horizon on, the horizon itself is the one at which an older value is still to be seen, if at any.
      if (lsn <= horizonLsn && nextBaseLsn > horizonLsn && isVisibleAt(lsns.length)) {
        lastOfHorizon ??= entry;
        if (!isNeeded) {
          ofHorizon.add(entry);
          ofHorizonBytes += entry.value.length;
        }
        isNeeded = true;
      }
      if (isNeeded) kept.push(entry);
      if (needsNoPrior(entry.value[0]!)) nextBaseLsn = lsn;
    }
    kept.reverse();
    const isChainLong = ofHorizon.size > TAIL_RECORDS_MAX || ofHorizonBytes > 2 * BLOCK_SIZE;
    if (!isChainLong || lastOfHorizon === undefined || !holdsPages(key)) return kept;
    return this.#endAtHorizon(key, kept, ofHorizon, lastOfHorizon);
  }

  /** An image of the page as it is at the horizon in the place of what makes it. */
  #endAtHorizon(
    key: Key,
    kept: readonly LayerEntry[],
    ofHorizon: ReadonlySet<LayerEntry>,
    last: LayerEntry,
  ): readonly LayerEntry[] {
    let image: Buffer | undefined;
    try {
      image = this.read(key, last.lsn);
    } catch (error) {
      if (error instanceof LayerDamagedError) throw error;
      return kept; // A page that cannot be made keeps its records, and who reads it gets the error.
    }
    if (image === undefined) return kept;
    const value = encodeImage(image);
    return kept.flatMap((entry) => {
      const left = ofHorizon.has(entry) ? [] : [entry];
      return entry === last ? [...left, { lsn: last.lsn, value }] : left;
    });
  }

  /** Sizes of the block's fork at each retained LSN, the horizon's last. 0 where there is none. */
  #sizesAt(key: Key, { horizonLsn, lsns }: Retention): readonly number[] {
    const of = this.#sizesOf;
    if (of?.rel === key.rel && of.fork === key.fork && of.db === key.db && of.spc === key.spc) return this.#sizes;
    const sizeKey = relationSizeKey(key.spc, key.db, key.rel, key.fork);
    this.#sizesOf = key;
    this.#sizes = [...lsns, horizonLsn].map((lsn) => this.read(sizeKey, lsn)?.readUInt32LE(0) ?? 0);
    return this.#sizes;
  }

  #isChunkNeeded(bucket: number, { horizonLsn, lsns }: Retention): boolean {
    this.#oldestBucket ??= this.#bucketBefore(horizonLsn);
    if (bucket >= this.#oldestBucket) return true;
    this.#retainedBuckets ??= new Set(lsns.flatMap((lsn) => [walIndexBucket(lsn), this.#bucketBefore(lsn)]));
    return this.#retainedBuckets.has(bucket);
  }

  /** The newest bucket below that of `lsn` which has a chunk, so a record that ends at or before `lsn`; the bucket of `lsn` when there is none. */
  #bucketBefore(lsn: Lsn): number {
    const { pgVersion } = this.#job;
    const own = walIndexBucket(lsn);
    for (let end = own, width = 16; end > 0; width *= 16) {
      const start = Math.max(0, end - width);
      const range = { start: walIndexChunkKey(start), end: walIndexChunkKey(end) };
      const last = this.#reader.scan(this.#lineage, range, lsn, pgVersion).at(-1);
      if (last !== undefined) return bucketOfChunkKey(last[0]);
      end = start;
    }
    return own;
  }

  read(key: Key, lsn: Lsn): Buffer | undefined {
    return this.#reader.read(this.#lineage, key, lsn, this.#job.pgVersion);
  }

  apply(page: Buffer, value: Buffer, lsn: Lsn): void {
    this.#replay(page, value, lsn, this.#job.pgVersion);
  }

  get lsnStart(): Lsn {
    return this.#lsnStart;
  }

  #file(directory: string, layer: LayerDescription): LayerFile {
    const file = new LayerFile(layerPath(directory, layer), layer, this.#cache);
    this.#files.push(file);
    return file;
  }
}

/** Follows one page through its values, and makes an image when it is time. */
class ImageChain {
  readonly #merge: Merge;
  readonly #key: Key;
  /** The page as it was before `#values`; undefined: as it was before the run, or, when there is a base in the run, what that makes. */
  #page: Buffer | undefined;
  #isBaseKnown = false;
  #values: { value: Buffer; lsn: Lsn }[] = [];
  #bytes = 0;
  #isBroken = false;

  constructor(merge: Merge, key: Key) {
    this.#merge = merge;
    this.#key = key;
  }

  /** Takes the next value; gives the value of an image to be put after it, to be copied at once, or undefined. `nextLsn` is that of the value after it. */
  add(value: Buffer, lsn: Lsn, nextLsn: Lsn | undefined): Buffer | undefined {
    const kind = value[0]!;
    if (needsNoPrior(kind)) {
      this.#page = kind === VALUE_KIND.image ? value.subarray(IMAGE_HEADER_BYTES) : undefined;
      this.#isBaseKnown = true;
      this.#values = kind === VALUE_KIND.initRecord ? [{ value, lsn }] : [];
      this.#bytes = 0;
      return undefined;
    }
    this.#values.push({ value, lsn });
    this.#bytes += value.length;
    if (this.#isBroken || lsn === nextLsn) return undefined;
    const isLong = this.#values.length >= CHAIN_RECORDS_MAX || this.#bytes >= CHAIN_BYTES_MAX;
    if (!isLong && (nextLsn !== undefined || this.#values.length < TAIL_RECORDS_MAX)) return undefined;
    try {
      return this.#image();
    } catch (error) {
      if (error instanceof LayerAbsentError) throw error;
      // A page that cannot be made is not served either; its records are kept as they are, and who reads it gets the error.
      this.#isBroken = true;
      return undefined;
    }
  }

  #image(): Buffer {
    const image = this.#merge.image;
    const page = image.subarray(IMAGE_HEADER_BYTES);
    const base = this.#isBaseKnown ? this.#page : this.#merge.read(this.#key, this.#merge.lsnStart - 1);
    assert(base === undefined || base.length === BLOCK_SIZE, 'what is replayed on is a page');
    if (base === undefined) page.fill(0);
    else if (base.buffer !== page.buffer) base.copy(page);
    for (const { value, lsn } of this.#values) this.#merge.apply(page, value, lsn);
    this.#page = page;
    this.#isBaseKnown = true;
    this.#values = [];
    this.#bytes = 0;
    return image;
  }
}

/** Goes through the entries of a run in order, in memory that is used again: what was taken is good until `recycle`. */
class RunCursor {
  readonly #entries: Iterator<KeyEntries, undefined>;
  /** By its size. */
  readonly #free = new Map<number, ArrayBufferLike[]>();
  /** Has only values that were taken. */
  readonly #left: ArrayBufferLike[] = [];
  current: KeyEntries | undefined;

  constructor(layers: readonly LayerFile[]) {
    this.#entries = entriesOf(layers, (sizeBytes) => this.#memory(sizeBytes));
    this.current = this.#entries.next().value;
  }

  /** Adds the entries of `key` to `to`. */
  take(key: Key, to: LayerEntry[]): void {
    while (this.current !== undefined && compareKeys(this.current.key, key) === 0) {
      const { entries, left } = this.current;
      for (let i = 0; i < entries.length; i++) to.push(entries[i]!);
      this.#left.push(...left);
      this.current = this.#entries.next().value;
    }
  }

  /** Nobody looks any more at what was taken. */
  recycle(): void {
    for (let memory = this.#left.pop(); memory !== undefined; memory = this.#left.pop()) {
      const alike = this.#free.get(memory.byteLength);
      if (alike === undefined) this.#free.set(memory.byteLength, [memory]);
      else if (alike.length < FREE_COUNT_MAX) alike.push(memory);
    }
  }

  #memory(sizeBytes: number): Buffer {
    const roundBytes = Math.ceil(sizeBytes / MEMORY_STEP_BYTES) * MEMORY_STEP_BYTES;
    const free = this.#free.get(roundBytes)?.pop();
    return free === undefined
      ? Buffer.allocUnsafeSlow(roundBytes).subarray(0, sizeBytes)
      : Buffer.from(free, 0, sizeBytes);
  }
}

function* entriesOf(layers: readonly LayerFile[], memory: Memory): Generator<KeyEntries, undefined> {
  for (const layer of layers) yield* layer.entries(memory);
  return undefined;
}

function newImage(): Buffer {
  const image = Buffer.allocUnsafeSlow(IMAGE_HEADER_BYTES + BLOCK_SIZE);
  image[0] = VALUE_KIND.image;
  return image;
}

function holdsPages(key: Key): boolean {
  return key.kind === KEY_KIND.relationBlock || key.kind === KEY_KIND.slruPage;
}
