/**
 * A timeline: one line of history, as ingest writes it and everybody else reads it.
 *
 * Changes go to the open memory layer. When it is large or old enough it is frozen and flushed to a delta layer; then the timeline's
 * index names that layer, and diskConsistentLsn moves up to its end. A process that dies comes back at diskConsistentLsn, and
 * pulls from the safekeepers what came after.
 *
 * Invariants:
 * - A value is visible when `lastRecordLsn` has reached its LSN, and then never changes. (The WAL index is the one exception: its last
 *   chunk is put again, longer, under lastRecordLsn before a flush.)
 * - A memory layer is dropped only when the index that names its layer file is durable.
 * - Reads are synchronous, so that a flush that ends never changes what one read sees.
 */

import assert from 'node:assert/strict';
import { readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { StrataError } from '../base/errors.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import type { PgVersion } from '../postgres/version.ts';
import type { WalBlock, WalRecord } from '../postgres/wal/record.ts';
import { writeBulkLayers } from './bulk-layers.ts';
import { flushMemoryLayer } from './flush.ts';
import { FlushQueue } from './flush-queue.ts';
import type { FrozenLayer } from './flush-queue.ts';
import { Indexed } from './indexed-timeline.ts';
import type { WalIndexChunk } from './ingest/wal-index.ts';
import { chunkAt } from './ingest/wal-search.ts';
import type { Key, KeyRange, RelationFork } from './key.ts';
import { replaceFile } from '../base/durable-file.ts';
import { LayerFile } from './layers/layer-file.ts';
import type { LayerCache } from './layers/layer-file.ts';
import { layerFileName, layerPath } from './layers/layer-format.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { LayerMap } from './layers/layer-map.ts';
import { MemoryLayer } from './layers/memory-layer.ts';
import { makeLineage } from './lineage.ts';
import { LsnWaiters } from './lsn-waiters.ts';
import { candidateKeys } from './read.ts';
import type { History, HistoryReader, KeyImage, Lineage } from './read.ts';
import { historyGone } from './retention.ts';
import type { Horizon } from './retention.ts';
import type { OnStep } from './step.ts';
import type { KeyValue, TimelineReader, TimelineWriter } from './timeline-access.ts';
import { removeTimelineDirectory } from './timeline-directory.ts';
import { decodeTimelineIndex, encodeTimelineIndex, TIMELINE_INDEX_NAME } from './timeline-index.ts';
import type { TimelineIndex } from './timeline-index.ts';
import { encodeImage } from './value.ts';

export interface TimelineOptions {
  readonly reader: HistoryReader;
  readonly layerCache: LayerCache;
  readonly limits: TimelineLimits;
  readonly now: () => number;
  /** Bytes of all timelines' memory layers, kept up to date by each. */
  readonly memory: { bytes: number };
  /** Called after each flush, with the error when it failed; it is tried again. */
  readonly onFlush: (timeline: Timeline, error: unknown) => void;
  /** Points below a timeline's horizon that stay readable. */
  readonly retainedLsns: (timeline: Timeline) => readonly Lsn[];
  /** Called after each change of the index. */
  readonly onIndex?: (timeline: Timeline) => void;
  /** Called when the object store has more of it for good. */
  readonly onRemote?: (timeline: Timeline) => void;
  /** Called when the horizon has moved. */
  readonly onHorizon?: (timeline: Timeline) => void;
  readonly onStep?: OnStep;
}

export interface TimelineLimits {
  /** The open layer is frozen and flushed when it holds this much. */
  readonly flushBytes: number;
  /** … or when so much WAL has come since it was opened, whatever of it became values: safekeepers keep it until it is flushed. */
  readonly flushWalBytes: number;
  /** Frozen layers that may wait for their flush before ingest has to wait. */
  readonly frozenLayersMax: number;
}

/** Above every LSN: reads what was put but is not yet visible. */
const UNCOMMITTED_LSN = Number.MAX_SAFE_INTEGER;
let timelineCount = 0;

export class Timeline implements TimelineWriter, TimelineReader, History {
  readonly number = ++timelineCount;
  readonly directory: string;
  readonly ancestor: Timeline | undefined;
  readonly layerMap = new LayerMap();
  beforeFlush?: () => void;
  indexTail?: () => WalIndexChunk | undefined;
  readonly #options: TimelineOptions;
  #index: TimelineIndex;
  #lastRecordLsn: Lsn;
  #lastRecordStartLsn: Lsn;
  #open: MemoryLayer;
  readonly #frozen: FlushQueue;
  /** The open layer and the frozen ones, newest first. */
  #memoryLayers: MemoryLayer[];
  /** What was put in bulk for the record that comes next. */
  #bulk: { readonly endLsn: Lsn; readonly layers: readonly LayerDescription[] } | undefined;
  #bulkWriting: Promise<void> | undefined;
  #lineage: Lineage | undefined;
  #areAncestorsVisible = false;
  /** For the LSN that ingest has reached. */
  readonly waiters: LsnWaiters;
  #indexWritten: Promise<void> = Promise.resolve();
  #ingestError: Error | undefined;
  #background: { readonly done: Promise<void>; readonly cancel: () => void } | undefined;
  #stopped: 'closed' | 'deleted' | undefined;
  /** In force at once; in the index a little later. */
  #horizon: Horizon | undefined;
  #remoteConsistentLsn: Lsn;

  /** `localFiles`: names of files in the directory; absent, all layers are taken to be there. */
  constructor(
    directory: string,
    index: TimelineIndex,
    ancestor: Timeline | undefined,
    options: TimelineOptions,
    localFiles?: ReadonlySet<string>,
  ) {
    this.directory = directory;
    this.ancestor = ancestor;
    this.#options = options;
    this.#index = index;
    this.#horizon = index.horizon;
    this.waiters = new LsnWaiters(`timeline ${index.timelineId}`);
    this.#remoteConsistentLsn = index.startLsn;
    this.#lastRecordLsn = index.diskConsistentLsn;
    this.#lastRecordStartLsn = index.diskConsistentRecordLsn;
    this.#open = new MemoryLayer(this.#lastRecordLsn + 1, options.now());
    this.#memoryLayers = [this.#open];
    this.#frozen = new FlushQueue({
      write: (frozen) => this.#flush(frozen),
      onFlush: (error) => options.onFlush(this, error),
      layersMax: options.limits.frozenLayersMax,
    });
    for (const layer of index.layers) {
      const file = this.#layerFile(layer);
      file.isLocal = localFiles?.has(layerFileName(layer)) ?? true;
      this.layerMap.insert(file);
    }
  }

  get tenantId(): string {
    return this.#index.tenantId;
  }

  get timelineId(): string {
    return this.#index.timelineId;
  }

  get pgVersion(): PgVersion {
    return this.#index.pgVersion;
  }

  /** The durable state. */
  get index(): TimelineIndex {
    return this.#index;
  }

  get lastRecordLsn(): Lsn {
    return this.#lastRecordLsn;
  }

  get lastRecordStartLsn(): Lsn {
    return this.#lastRecordStartLsn;
  }

  get diskConsistentLsn(): Lsn {
    return this.#index.diskConsistentLsn;
  }

  /** What is in the object store for good: no pageserver will need this timeline's WAL below it again. */
  get remoteConsistentLsn(): Lsn {
    return this.#remoteConsistentLsn;
  }

  setRemoteConsistentLsn(lsn: Lsn): void {
    if (lsn <= this.#remoteConsistentLsn) return;
    this.#remoteConsistentLsn = lsn;
    this.#options.onRemote?.(this);
  }

  get memoryLayers(): readonly MemoryLayer[] {
    return this.#memoryLayers;
  }

  /** Bytes that wait to be flushed. */
  get memoryBytes(): number {
    return this.#memoryLayers.reduce((sum, layer) => sum + layer.sizeBytes, 0);
  }

  /** Bytes of the open layer. */
  get openBytes(): number {
    return this.#open.sizeBytes;
  }

  /** When the oldest put that is not yet in a layer being flushed was made; undefined when there is none. */
  get openSinceMs(): number | undefined {
    return this.#open.isEmpty ? undefined : this.#open.createdAtMs;
  }

  /** Nearest first. */
  ancestors(): Timeline[] {
    const found: Timeline[] = [];
    for (let { ancestor } = this; ancestor !== undefined; { ancestor } = ancestor) found.push(ancestor);
    return found;
  }

  /** The ancestors, nearest first, and up to where this timeline inherits from each. */
  ancestry(): { timeline: Timeline; endLsn: Lsn }[] {
    let endLsn = this.index.startLsn;
    return this.ancestors().map((timeline) => {
      const step = { timeline, endLsn };
      endLsn = Math.min(endLsn, timeline.index.startLsn);
      return step;
    });
  }

  get horizon(): Horizon | undefined {
    return this.#horizon;
  }

  /** The oldest LSN from which on all can be read, here and in the ancestors. */
  get oldestLsn(): Lsn {
    if (this.#horizon !== undefined) return this.#horizon.lsn;
    let oldestLsn = this.#index.startLsn;
    for (const ancestor of this.ancestors()) {
      // An ancestor whose horizon has passed the branch point has that point left, and nothing below it for sure.
      if (ancestor.#horizon !== undefined) return Math.min(oldestLsn, ancestor.#horizon.lsn);
      oldestLsn = ancestor.#index.startLsn;
    }
    return oldestLsn;
  }

  /** The horizon that `oldestLsn` is because of, if it is because of one. */
  get oldestHorizon(): Horizon | undefined {
    const { oldestLsn } = this;
    return [this, ...this.ancestors()].find((timeline) => timeline.horizon?.lsn === oldestLsn)?.horizon;
  }

  /** Points below the horizon that stay readable: children, leases. */
  retainedLsns(): readonly Lsn[] {
    return this.#options.retainedLsns(this);
  }

  /** Throws `history-gone` when the state at `lsn` may no longer be all there. */
  assertReadable(lsn: Lsn): void {
    if (lsn >= (this.#horizon?.lsn ?? this.#index.startLsn)) return;
    const timeline = this.ownerOf(lsn);
    if (lsn >= timeline.#index.startLsn) {
      if (lsn >= (timeline.#horizon?.lsn ?? 0) || timeline.retainedLsns().includes(lsn)) return;
    }
    throw historyGone(this.timelineId, lsn, this.oldestLsn, this.oldestHorizon);
  }

  /** This timeline or the ancestor whose history has the state at `lsn`: below its start a timeline is what the ancestor was. */
  ownerOf(lsn: Lsn): Timeline {
    if (lsn >= this.#index.startLsn) return this;
    const ancestors = this.ancestors();
    return ancestors.find((ancestor) => lsn >= ancestor.#index.startLsn) ?? ancestors.at(-1) ?? this;
  }

  /** Durable when it resolves; in force before. */
  async setHorizon(horizon: Horizon): Promise<void> {
    assert(horizon.lsn >= (this.#horizon?.lsn ?? 0), 'the horizon never goes back');
    assert(horizon.lsn <= this.diskConsistentLsn, 'the horizon is in layers');
    this.#horizon = horizon;
    this.#options.onHorizon?.(this);
    await this.#writeIndex((index) => {
      if (this.#stopped !== undefined) throw this.#stoppedError();
      return { ...index, horizon };
    });
    this.#options.onStep?.('horizon written');
  }

  /** Throws when the timeline is closed or deleted. */
  assertRunning(): void {
    if (this.#stopped !== undefined) throw this.#stoppedError();
  }

  /** True when the timeline is closed or deleted. */
  get isStopped(): boolean {
    return this.#stopped !== undefined;
  }

  /** Why ingest has stopped, if it has. */
  get ingestError(): Error | undefined {
    return this.#ingestError;
  }

  /** Why the last flush failed, if it did. */
  get flushError(): Error | undefined {
    return this.#frozen.error;
  }

  // ---- writing

  put(key: Key, lsn: Lsn, value: Buffer): void {
    assert(lsn >= this.#lastRecordLsn, 'a put is above what is visible');
    this.#options.memory.bytes += this.#open.put(key, lsn, value);
  }

  putRecord(record: WalRecord, block: WalBlock, needsNoPrior: boolean): void {
    assert(record.endLsn >= this.#lastRecordLsn, 'a put is above what is visible');
    this.#options.memory.bytes += this.#open.putRecord(record, block, needsNoPrior);
  }

  /** Writes layers, which the index names when it names what else is put for the record. A crash before that leaves files that it does not name. */
  putBulk(pieces: AsyncIterable<readonly KeyValue[]>, endLsn: Lsn, signal?: AbortSignal): Promise<void> {
    const done = this.#writeBulk(pieces, endLsn, signal);
    this.#bulkWriting = done.catch(() => {});
    return done;
  }

  get(key: Key): Buffer | undefined {
    return this.#options.reader.read(this.lineage, key, UNCOMMITTED_LSN, this.pgVersion);
  }

  inheritedIndex(): WalIndexChunk | undefined {
    if (this.ancestor === undefined || this.#lastRecordLsn > this.#index.startLsn) return undefined;
    // Of a repair: it begins where a flush ended, which has left a whole chunk.
    if (this.ancestor.timelineId === this.timelineId) return undefined;
    return chunkAt(new Indexed(this.ancestor), this.#index.startLsn);
  }

  advance(endLsn: Lsn, recordStartLsn: Lsn): void {
    assert(endLsn > this.#lastRecordLsn, 'the last record LSN rises');
    this.#lastRecordLsn = endLsn;
    this.#lastRecordStartLsn = recordStartLsn;
    const hot = this.#open.takeHot();
    if (hot.length > 0) this.#putImages(hot);
    if (this.#bulk !== undefined) this.#takeBulk(this.#bulk.endLsn, this.#bulk.layers);
    this.waiters.reached(endLsn);
  }

  /** Freezes the open layer when it is large enough, or when much WAL has come. To be called between two records. */
  freezeIfFull(): void {
    const { flushBytes, flushWalBytes } = this.#options.limits;
    const isMuchWal = this.#lastRecordLsn - this.#open.lsnStart >= flushWalBytes;
    if (isMuchWal || this.#open.sizeBytes >= flushBytes) this.freeze();
  }

  discard(): void {
    const before = this.#open.sizeBytes;
    this.#open.discardAbove(this.#lastRecordLsn);
    this.#options.memory.bytes += this.#open.sizeBytes - before;
  }

  /** Resolves when ingest may go on, or the timeline is stopped; undefined when it may at once. While flushes fail it waits: memory is bounded. */
  writable(): Promise<void> | undefined {
    return this.#frozen.isFull ? this.#frozen.room() : undefined;
  }

  // ---- reading

  getImage(key: Key, lsn: Lsn): Buffer | undefined {
    this.assertReadable(lsn);
    return this.#options.reader.read(this.lineage, key, lsn, this.pgVersion);
  }

  getPages(fork: RelationFork, firstBlk: number, count: number, lsn: Lsn): Buffer {
    const pages = Buffer.allocUnsafe(count * BLOCK_SIZE);
    this.readPages(fork, firstBlk, count, lsn, pages, 0);
    return pages;
  }

  /** As getPages, into `out` from `offset` on. */
  readPages(fork: RelationFork, firstBlk: number, count: number, lsn: Lsn, out: Buffer, offset: number): void {
    this.assertReadable(lsn);
    this.#options.reader.readPages(this.lineage, fork, firstBlk, count, lsn, this.pgVersion, out, offset);
  }

  scan(range: KeyRange, lsn: Lsn = UNCOMMITTED_LSN): KeyImage[] {
    this.assertReadable(lsn);
    return this.#options.reader.scan(this.lineage, range, lsn, this.pgVersion);
  }

  /** The keys of the range that may exist at `lsn`, in order. */
  keys(range: KeyRange, lsn: Lsn): Key[] {
    this.assertReadable(lsn);
    return candidateKeys(this.lineage, range, lsn);
  }

  /** Whether `lsn` can be read now: ingested, here and in the ancestors. */
  isVisible(lsn: Lsn): boolean {
    return lsn <= this.#lastRecordLsn && this.#invisibleAncestor(lsn) === undefined && this.#stopped === undefined;
  }

  async waitLsn(lsn: Lsn, timeoutMs: number, signal?: AbortSignal): Promise<void> {
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      const ancestor = this.#invisibleAncestor(lsn);
      if (ancestor === undefined) break;
      await ancestor.timeline.#waitOwn(ancestor.lsn, deadline - performance.now(), signal);
    }
    await this.#waitOwn(lsn, deadline - performance.now(), signal);
  }

  /** This timeline's history and what it inherits. */
  get lineage(): Lineage {
    this.#lineage ??= makeLineage(
      this,
      this.ancestry().map(({ timeline, endLsn }) => ({ history: timeline, endLsn })),
    );
    return this.#lineage;
  }

  // ---- lifetime

  /** Stops ingest of this timeline: its waiters are told why. Undefined: it goes on. */
  setIngestError(error: Error | undefined): void {
    this.#ingestError = error;
    if (error !== undefined) this.waiters.fail(this.#stoppedError());
  }

  /** Starts a new open layer and has the old one flushed. To be called between two records. */
  freeze(): void {
    this.#freeze([]);
  }

  #freeze(bulk: readonly LayerDescription[]): void {
    this.discard();
    if (this.#lastRecordLsn >= this.#open.lsnStart) this.beforeFlush?.();
    if (this.#open.isEmpty && this.#lastRecordLsn === this.#lastFrozenLsn()) return;
    const layer = this.#open;
    this.#open = new MemoryLayer(this.#lastRecordLsn + 1, this.#options.now(), layer);
    this.#memoryLayers = [this.#open, ...this.#memoryLayers];
    const { lastRecordLsn, lastRecordStartLsn } = this;
    this.#frozen.push({ layer, bulk, lastRecordLsn, lastRecordStartLsn });
  }

  /** Makes everything that is visible now durable in layers. Rejects when writing fails; it is tried again in the background. */
  async flush(): Promise<void> {
    this.freeze();
    await this.#frozen.flushed();
  }

  /**
   * Has the index name `added`, which are durable, in the place of `removed`, and then removes the files of those. Reads see the old
   * layers or the new ones, which must have the same to tell of every LSN that may be read. When it rejects, the files of `added` are gone, unless the index on
   * disk names them all the same.
   */
  async replaceLayers(removed: readonly LayerDescription[], added: readonly LayerDescription[]): Promise<void> {
    const names = new Set(removed.map((layer) => layerPath(this.directory, layer)));
    const isRemoved = (layer: LayerDescription): boolean => names.has(layerPath(this.directory, layer));
    try {
      await this.#writeIndex((index) => {
        if (this.#stopped !== undefined) throw this.#stoppedError();
        return { ...index, layers: [...index.layers.filter((layer) => !isRemoved(layer)), ...added] };
      });
    } catch (error) {
      if (!(await this.#mayNameOnDisk(added))) {
        for (const layer of added) await rm(layerPath(this.directory, layer), { force: true });
      }
      throw error;
    }
    this.#options.onStep?.('compacted index written');
    const old = [...this.layerMap.all()].filter((file) => isRemoved(file.description));
    for (const file of old) this.layerMap.remove(file);
    for (const layer of added) this.layerMap.insert(this.#layerFile(layer));
    for (const file of old) {
      file.close();
      file.partial?.remove();
      await rm(file.path, { force: true });
      this.#options.onStep?.('compacted layer removed');
    }
  }

  /** The layer of this timeline's own whose file this is. */
  findLayer(path: string): LayerFile | undefined {
    for (const layer of this.layerMap.all()) if (layer.path === path) return layer;
    return undefined;
  }

  /** Runs work of this timeline in the background, after which `close` and `delete` wait; `cancel` is called when they do. */
  inBackground(work: () => Promise<void>, cancel: () => void): Promise<void> {
    if (this.#stopped !== undefined) return Promise.resolve();
    const done = work().finally(() => (this.#background = undefined));
    this.#background = { done: done.catch(() => {}), cancel };
    return done;
  }

  /** Flushes and closes. What cannot be written comes again from the safekeepers. */
  async close(): Promise<void> {
    if (this.#stopped !== undefined) return;
    try {
      await this.flush();
    } finally {
      await this.#stop('closed');
    }
  }

  /** Forgets everything: a durable tombstone first, then the files. */
  async delete(): Promise<void> {
    await this.#stop('deleted');
    if (!this.#index.isDeleted) await this.#writeIndex((index) => ({ ...index, isDeleted: true, layers: [] }));
    this.#options.onStep?.('timeline deleted');
    await removeTimelineDirectory(this.directory);
    this.#options.onStep?.('timeline folder removed');
  }

  async #stop(how: 'closed' | 'deleted'): Promise<void> {
    this.#stopped = how;
    const flushed = this.#frozen.stop(how === 'deleted');
    this.waiters.fail(this.#stoppedError());
    this.#background?.cancel();
    await this.#background?.done;
    await this.#bulkWriting;
    await flushed;
    for (const layer of this.layerMap.all()) layer.close();
    for (const layer of this.#memoryLayers) this.#options.memory.bytes -= layer.sizeBytes;
    this.#memoryLayers = [];
  }

  // ---- inside

  async #writeBulk(
    pieces: AsyncIterable<readonly KeyValue[]>,
    endLsn: Lsn,
    signal: AbortSignal | undefined,
  ): Promise<void> {
    this.assertRunning();
    // Older values of the same keys are looked for in layers after these, and must not be found in memory before them.
    await this.flush();
    const layers = await writeBulkLayers(pieces, {
      directory: this.directory,
      timelineId: this.timelineId,
      lsnStart: this.#lastRecordLsn + 1,
      lsnEnd: endLsn + 1,
      check: () => {
        this.assertRunning();
        signal?.throwIfAborted();
      },
    });
    this.#options.onStep?.('bulk layers written');
    this.#bulk = { endLsn, layers };
  }

  /** The record of what was put in bulk was taken: all of it becomes visible, and goes to the index together. */
  #takeBulk(endLsn: Lsn, layers: readonly LayerDescription[]): void {
    assert(endLsn === this.#lastRecordLsn, 'what was put in bulk belongs to the record that comes next');
    assert(this.#frozen.layers.length === 0, 'nothing older is in memory');
    for (const layer of layers) {
      assert(layer.lsnStart === this.#open.lsnStart, 'all that belongs to the record is one run');
      this.layerMap.insert(this.#layerFile(layer));
    }
    this.#bulk = undefined;
    this.#freeze(layers);
  }

  /**
   * Puts images of pages under the LSN of the last record. Full page writes are off, so pages that change often would grow long chains
   * of records; a read ends at the image, which replaces nothing. A page that cannot be read now is left as it is: whoever reads it gets the error.
   */
  #putImages(keys: readonly Key[]): void {
    for (const key of keys) {
      let image: Buffer | undefined;
      try {
        image = this.get(key);
      } catch {
        continue;
      }
      if (image !== undefined) this.put(key, this.#lastRecordLsn, encodeImage(image));
    }
  }

  #lastFrozenLsn(): Lsn {
    return this.#frozen.layers.at(-1)?.lastRecordLsn ?? this.diskConsistentLsn;
  }

  async #flush(frozen: FrozenLayer): Promise<void> {
    const { layer, bulk, lastRecordLsn, lastRecordStartLsn } = frozen;
    let written: readonly LayerDescription[] = [];
    if (!layer.isEmpty) {
      this.#options.onStep?.('flush begins');
      written = await flushMemoryLayer(layer, {
        directory: this.directory,
        timelineId: this.timelineId,
        lsnEnd: lastRecordLsn + 1,
        bulk,
      });
      this.#options.onStep?.('layer written');
    }
    await this.#writeIndex((index) => ({
      ...index,
      diskConsistentLsn: lastRecordLsn,
      diskConsistentRecordLsn: lastRecordStartLsn,
      layers: [...index.layers, ...bulk, ...written],
    }));
    this.#options.onStep?.('index written');
    if (this.#stopped === 'deleted') return;
    for (const each of written) this.layerMap.insert(this.#layerFile(each));
    this.#frozen.shift();
    this.#memoryLayers = this.#memoryLayers.filter((other) => other !== layer);
    this.#options.memory.bytes -= layer.sizeBytes;
    layer.release();
  }

  /** Replaces the index by what `change` makes of it; one change at a time. */
  #writeIndex(change: (index: TimelineIndex) => TimelineIndex): Promise<void> {
    const written = this.#indexWritten.then(async () => {
      const index = change(this.#index);
      await replaceFile(join(this.directory, TIMELINE_INDEX_NAME), encodeTimelineIndex(index));
      this.#index = index;
      this.#options.onIndex?.(this);
    });
    this.#indexWritten = written.catch(() => {});
    return written;
  }

  /** Whether the index on disk names one of the layers, or cannot be read. */
  async #mayNameOnDisk(layers: readonly LayerDescription[]): Promise<boolean> {
    const path = join(this.directory, TIMELINE_INDEX_NAME);
    const names = new Set(layers.map((layer) => layerFileName(layer)));
    try {
      const onDisk = decodeTimelineIndex(await readFile(path), path);
      return onDisk.layers.some((layer) => names.has(layerFileName(layer)));
    } catch {
      return true;
    }
  }

  #layerFile(description: LayerDescription): LayerFile {
    return new LayerFile(layerPath(this.directory, description), description, this.#options.layerCache);
  }

  /** The nearest ancestor that has not ingested yet what is inherited of it. */
  #invisibleAncestor(lsn: Lsn): { timeline: Timeline; lsn: Lsn } | undefined {
    if (this.#areAncestorsVisible) return undefined;
    let endLsn = Math.min(lsn, this.index.startLsn);
    for (const ancestor of this.ancestors()) {
      if (ancestor.#lastRecordLsn < endLsn) return { timeline: ancestor, lsn: endLsn };
      endLsn = Math.min(endLsn, ancestor.index.startLsn);
    }
    this.#areAncestorsVisible = lsn >= this.index.startLsn;
    return undefined;
  }

  #waitOwn(lsn: Lsn, timeoutMs: number, signal: AbortSignal | undefined): Promise<void> {
    if (this.#stopped !== undefined) return Promise.reject(this.#stoppedError());
    if (lsn <= this.#lastRecordLsn) return Promise.resolve();
    if (this.#ingestError !== undefined) return Promise.reject(this.#stoppedError());
    return this.waiters.wait(lsn, timeoutMs, signal);
  }

  #stoppedError(): StrataError {
    const what = `timeline ${this.timelineId}`;
    if (this.#stopped === 'deleted') return new StrataError('not-found', `${what} is deleted`);
    if (this.#stopped === 'closed') return new StrataError('unavailable', `${what} is closed`);
    return new StrataError('unavailable', `${what} cannot be ingested: ${this.#ingestError?.message}`);
  }
}
