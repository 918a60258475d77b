/**
 * The timelines of a pageserver: a folder for each, with its index and its layers.
 *
 *   <data dir>/timelines/<timeline id>/index                 what the timeline is (timeline-index.ts)
 *   <data dir>/timelines/<timeline id>/<key>-<key>__<lsn>…   layers (layers/layer-format.ts); with an object store, those that are here
 *   <data dir>/timelines/<timeline id>/remote                what the object store has (remote/kept-index.ts)
 *
 * A folder without an index is the remains of a creation or import that did not end, and is removed at start; so are files that an index
 * does not name. Creating a timeline writes its index and nothing else, whatever the size of what it inherits.
 */

import assert from 'node:assert/strict';
import { mkdir, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { allDone } from '../base/all-done.ts';
import { StrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import type { PgVersion } from '../postgres/version.ts';
import { Compaction } from './compaction.ts';
import { inlineCompactor } from './compactor.ts';
import type { Compactor } from './compactor.ts';
import { GarbageCollection } from './garbage-collection.ts';
import { ImportTarget } from './import-target.ts';
import { replaceFile, syncDirectory } from '../base/durable-file.ts';
import type { LayerDamagedError } from './layers/block.ts';
import { LayerCache } from './layers/layer-file.ts';
import { PageCache } from './page-cache.ts';
import { HistoryReader } from './read.ts';
import type { Replay } from './read.ts';
import { LEASE_MS, Leases } from './retention.ts';
import { RetentionWindows } from './retention-windows.ts';
import type { OnStep } from './step.ts';
import { Timeline } from './timeline.ts';
import type { TimelineOptions } from './timeline.ts';
import { removeTimelineDirectory } from './timeline-directory.ts';
import { findTimelineFolders, isTimelineId, SHADOW_SUFFIX } from './timeline-folders.ts';
import type { FoundTimeline, TimelineFolders } from './timeline-folders.ts';
import { encodeTimelineIndex, TIMELINE_INDEX_NAME } from './timeline-index.ts';
import type { TimelineIndex } from './timeline-index.ts';
import type { Remote } from './remote/remote.ts';
import type { Repair } from './whole-reads.ts';

export interface StoreLimits {
  /** An open memory layer is flushed at this size. */
  readonly flushBytes: number;
  /** … or when so much WAL has come since it was opened: that must not be what slows commits (api/backpressure-limits.ts). */
  readonly flushWalBytes: number;
  /** … or at this age. */
  readonly flushAgeMs: number;
  /** All memory layers together; beyond it the largest is flushed, whatever its size. */
  readonly memoryBytesMax: number;
  /** Frozen layers of one timeline that may wait for their flush before its ingest has to wait. */
  readonly frozenLayersMax: number;
  readonly blockCacheBytes: number;
  readonly pageCacheBytes: number;
  readonly openFilesMax: number;
  /** Layers below the horizon are rewritten when this much has come there. */
  readonly collectBytesMin: number;
  /** A merge of more than this does not hold up smaller ones. */
  readonly largeMergeBytes: number;
  /** How long a lease on an LSN lasts that is not renewed. */
  readonly leaseMs: number;
}

export const DEFAULT_LIMITS: StoreLimits = {
  flushBytes: 64 * 1024 * 1024,
  flushWalBytes: 128 * 1024 * 1024,
  flushAgeMs: 5 * 60_000,
  memoryBytesMax: 384 * 1024 * 1024,
  frozenLayersMax: 1,
  blockCacheBytes: 96 * 1024 * 1024,
  pageCacheBytes: 128 * 1024 * 1024,
  openFilesMax: 512,
  collectBytesMin: 16 * 1024 * 1024,
  largeMergeBytes: 256 * 1024 * 1024,
  leaseMs: LEASE_MS,
};

export interface TimelinesOptions {
  readonly replay: Replay;
  readonly log: Logger;
  readonly limits?: Partial<StoreLimits>;
  /** Where merges run; in this thread when absent. It is closed with the store. */
  readonly compactor?: Compactor;
  /** The LSN of a timeline's state at a time (milliseconds since 1970), for garbage collection; without it none is collected. */
  readonly lsnAt?: (timeline: Timeline, timeMs: number) => Lsn | undefined;
  readonly now?: () => number;
  /** Where timelines are kept for good; without it only here. */
  readonly remote?: Remote;
  /** By timeline, why the object store's newest index of it cannot be used. */
  readonly brokenInStore?: ReadonlyMap<string, string>;
  /** Takes timelines whose index is damaged here from the object store, as far as that can be. */
  readonly takeDamaged?: (timelineIds: readonly string[]) => Promise<void>;
  /** Called when a merge meets a damaged layer; to resolve when it is whole again. */
  readonly repair?: (damage: LayerDamagedError) => Promise<void>;
  readonly onStep?: OnStep;
}

export interface NewTimeline {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly ancestorTimelineId: string;
  /** The end of a record of the ancestor. */
  readonly ancestorLsn: Lsn;
  /** Where that record starts. */
  readonly ancestorRecordLsn: Lsn;
}

export interface NewImport {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly pgVersion: PgVersion;
  /** The end of the cluster's last record: the state that is imported, and where the timeline's WAL begins. */
  readonly lsn: Lsn;
  /** Where that record starts. */
  readonly recordLsn: Lsn;
}

const CLOSE_CONCURRENCY = 8;
const MEMORY_CHECK_MS = 50;

export class Timelines {
  readonly #directory: string;
  readonly #options: TimelineOptions;
  readonly #limits: StoreLimits;
  readonly #log: Logger;
  readonly #timelines = new Map<string, Timeline>();
  /** Timelines that could not be loaded, and why. */
  readonly #broken = new Map<string, string>();
  /** Ids of timelines being created, imported or deleted. */
  readonly #busy = new Set<string>();
  /** Deleted since the start. The object store's tombstone of one, and deletions that wait, would take a new timeline of that id with them. */
  readonly #deleted = new Set<string>();
  /** By timeline, the points where its children branch off. */
  readonly #children = new Map<string, Map<string, Lsn>>();
  readonly leases: Leases;
  /** Of which safekeepers have to be told something. */
  #moved = new Set<Timeline>();
  readonly #flushFailing = new Set<Timeline>();
  readonly #compactor: Compactor;
  readonly compaction: Compaction;
  readonly garbage: GarbageCollection;
  readonly retention: RetentionWindows;
  readonly #remote: Remote | undefined;
  readonly #brokenInStore: ReadonlyMap<string, string>;
  /** Brings layers back that are damaged or not here; to be set by who can. */
  repair: Repair = (damage) => Promise.reject(damage);
  /** As `repair`, from the object store alone. */
  fetch: Repair = (damage) => Promise.reject(damage);

  private constructor(directory: string, options: TimelinesOptions) {
    const limits = { ...DEFAULT_LIMITS, ...options.limits };
    this.#directory = directory;
    this.#limits = limits;
    this.#log = options.log;
    this.#remote = options.remote;
    this.#brokenInStore = options.brokenInStore ?? new Map();
    const layerCache = new LayerCache({ blockBytesMax: limits.blockCacheBytes, openFilesMax: limits.openFilesMax });
    this.#options = {
      reader: new HistoryReader(new PageCache(limits.pageCacheBytes), layerCache.blocks, options.replay),
      layerCache,
      limits,
      now: options.now ?? Date.now,
      memory: { bytes: 0 },
      retainedLsns: ({ timelineId }) => [
        ...(this.#children.get(timelineId)?.values() ?? []),
        ...this.leases.lsnsOf(timelineId),
      ],
      onFlush: (timeline, error) => this.#flushed(timeline, error),
      onIndex: (timeline) => {
        this.moved(timeline);
        this.#remote?.changed(timeline);
      },
      onRemote: (timeline) => this.moved(timeline),
      onHorizon: (timeline) => this.#horizonMoved(timeline),
      ...(options.onStep === undefined ? {} : { onStep: options.onStep }),
    };
    const steadyNow = options.now ?? ((): number => performance.now());
    this.leases = new Leases(steadyNow, limits.leaseMs);
    this.#compactor = options.compactor ?? inlineCompactor(options.replay);
    this.compaction = new Compaction({
      compactor: this.#compactor,
      log: options.log,
      largeBytes: limits.largeMergeBytes,
      retentionOf: (timeline) => this.garbage.retentionOf(timeline),
      fetch: (damage) => this.fetch(damage),
      ...(options.repair === undefined ? {} : { repair: options.repair }),
      ...(options.onStep === undefined ? {} : { onStep: options.onStep }),
    });
    this.garbage = new GarbageCollection({
      compaction: this.compaction,
      log: options.log,
      now: this.#options.now,
      steadyNow,
      leaseMs: limits.leaseMs,
      retentionMsOf: ({ tenantId }) => this.retention.of(tenantId),
      lsnAt: options.lsnAt ?? (() => undefined),
      repair: (damage) => this.repair(damage),
      collectBytesMin: limits.collectBytesMin,
    });
    this.retention = new RetentionWindows(join(dirname(directory), 'retention'), options.log);
  }

  /** Loads what is there; removes what creations, flushes and deletions have left behind. Layers are opened when they are first read. */
  static async open(dataDir: string, options: TimelinesOptions): Promise<Timelines> {
    const timelines = new Timelines(join(dataDir, 'timelines'), options);
    let folders = findTimelineFolders(timelines.#directory);
    if (options.takeDamaged !== undefined && folders.broken.size > 0) {
      await options.takeDamaged([...folders.broken.keys()]);
      folders = findTimelineFolders(timelines.#directory);
    }
    for (const directory of timelines.#load(folders)) await removeTimelineDirectory(directory);
    for (const timeline of timelines.all()) options.remote?.changed(timeline);
    return timelines;
  }

  /** Throws `not-found`, or `internal` for a timeline whose files are damaged. */
  get(timelineId: string): Timeline {
    const timeline = this.#timelines.get(timelineId);
    if (timeline !== undefined) return timeline;
    const reason = this.#broken.get(timelineId);
    if (reason !== undefined) throw new StrataError('internal', reason);
    throw new StrataError('not-found', `timeline ${timelineId} does not exist on this pageserver`);
  }

  find(timelineId: string): Timeline | undefined {
    return this.#timelines.get(timelineId);
  }

  all(): IterableIterator<Timeline> {
    return this.#timelines.values();
  }

  /** To be called when WAL of the timeline was ingested. */
  moved(timeline: Timeline): void {
    this.#moved.add(timeline);
  }

  /** Those of which since the last call something has changed that safekeepers are told. */
  takeMoved(): ReadonlySet<Timeline> {
    const moved = this.#moved;
    if (moved.size > 0) this.#moved = new Set();
    return moved;
  }

  childCount(timelineId: string): number {
    return this.#children.get(timelineId)?.size ?? 0;
  }

  get broken(): ReadonlyMap<string, string> {
    return this.#broken;
  }

  get layerCache(): LayerCache {
    return this.#options.layerCache;
  }

  /** Bytes in memory that wait to be flushed, over all timelines. */
  get memoryBytes(): number {
    return this.#options.memory.bytes;
  }

  /** Durable when it resolves, in the object store too. Repeatable with the same parameters; `conflict` with others. */
  async create(request: NewTimeline): Promise<Timeline> {
    const { timeline, stored } = await this.#create(request);
    await stored;
    return timeline;
  }

  /** Resolves when the object store has the timeline as it is now; `unavailable` when it does not take it. */
  async stored(timeline: Timeline): Promise<void> {
    await this.#remote?.stored(timeline);
  }

  /** Resolves when the object store has the new timeline, and has its ancestor as it must stay for it. */
  async #storedWith(timeline: Timeline, ancestor: Timeline): Promise<void> {
    if (this.#remote === undefined) return;
    await allDone([this.#remote.stored(timeline), this.#remote.owned(ancestor)]);
  }

  async #create(request: NewTimeline): Promise<{ timeline: Timeline; stored: Promise<void> }> {
    const { tenantId, timelineId, ancestorTimelineId, ancestorLsn, ancestorRecordLsn } = request;
    const existing = this.#existing(timelineId);
    if (existing !== undefined) {
      const { ancestor } = existing.index;
      if (
        existing.tenantId === tenantId &&
        ancestor?.timelineId === ancestorTimelineId &&
        ancestor.lsn === ancestorLsn
      ) {
        return { timeline: existing, stored: this.#storedWith(existing, existing.ancestor!) };
      }
      throw new StrataError('conflict', `timeline ${timelineId} exists with another tenant, ancestor or LSN`);
    }
    this.#assertIdIsUnused(timelineId);
    const ancestor = this.get(ancestorTimelineId);
    if (ancestorLsn < ancestor.index.startLsn || ancestorLsn > ancestor.lastRecordLsn) {
      const { startLsn } = ancestor.index;
      throw new StrataError(
        'bad-request',
        `${formatLsn(ancestorLsn)} is not in timeline ${ancestorTimelineId}, which has ${formatLsn(startLsn)} to ${formatLsn(ancestor.lastRecordLsn)}`,
      );
    }
    ancestor.assertReadable(ancestorLsn);
    return this.#exclusively(timelineId, async () => {
      // Before the first await: the ancestor cannot be deleted meanwhile, and keeps the branch point.
      this.#addChild(ancestorTimelineId, timelineId, ancestorLsn);
      const index: TimelineIndex = {
        tenantId,
        timelineId,
        pgVersion: ancestor.pgVersion,
        ancestor: { timelineId: ancestorTimelineId, lsn: ancestorLsn },
        startLsn: ancestorLsn,
        startRecordLsn: ancestorRecordLsn,
        diskConsistentLsn: ancestorLsn,
        diskConsistentRecordLsn: ancestorRecordLsn,
        isDeleted: false,
        layers: [],
      };
      const timeline = this.#make(index, ancestor);
      // Here and in the store at the same time, as somebody waits. Who asked does so again after a crash, so it is no harm when only the store has it then.
      this.#remote?.created(timeline);
      const stored = this.#storedWith(timeline, ancestor);
      stored.catch(() => {}); // Looked at by who waits for it.
      try {
        await this.#install(timeline);
        return { timeline, stored };
      } catch (error) {
        this.#removeChild(ancestorTimelineId, timelineId);
        await this.#undoCreation(timeline);
        throw error;
      }
    });
  }

  /** Of a timeline that could not be made here: what is left of it would hold its branch point for ever, and nobody would know of it. */
  async #undoCreation(timeline: Timeline): Promise<void> {
    const { timelineId, directory } = timeline;
    const warn = (failure: unknown): void =>
      this.#log.error(
        { timelineId, err: failure },
        'what is left of a timeline that was not created cannot be removed',
      );
    if (this.#remote !== undefined) {
      this.#deleted.add(timelineId);
      await this.#remote.delete(timeline).catch(warn);
    }
    await removeTimelineDirectory(directory).catch(warn);
  }

  /**
   * A new timeline without ancestor, whose state `write` puts into the target. Nothing of it is there when that fails. Durable when it resolves, in the object
   * store too; when only that does not take it, the timeline is here, and is uploaded later.
   */
  async import(request: NewImport, write: (target: ImportTarget) => Promise<void>): Promise<Timeline> {
    const timeline = await this.#import(request, write);
    await this.stored(timeline);
    return timeline;
  }

  async #import(request: NewImport, write: (target: ImportTarget) => Promise<void>): Promise<Timeline> {
    const { tenantId, timelineId, pgVersion, lsn, recordLsn } = request;
    const existing = this.#existing(timelineId);
    if (existing !== undefined) {
      throw new StrataError('conflict', `timeline ${timelineId} exists`);
    }
    this.#assertIdIsUnused(timelineId);
    return this.#exclusively(timelineId, async () => {
      const directory = join(this.#directory, timelineId);
      await mkdir(directory, { mode: 0o700 });
      this.#options.onStep?.('import folder made');
      const target = await ImportTarget.create(directory, timelineId, lsn);
      try {
        await write(target);
        const layers = await target.finish();
        this.#options.onStep?.('imported layers written');
        const index: TimelineIndex = {
          tenantId,
          timelineId,
          pgVersion,
          ancestor: undefined,
          startLsn: lsn,
          startRecordLsn: recordLsn,
          diskConsistentLsn: lsn,
          diskConsistentRecordLsn: recordLsn,
          isDeleted: false,
          layers,
        };
        const timeline = this.#make(index, undefined);
        await this.#install(timeline);
        this.#remote?.created(timeline);
        this.#remote?.changed(timeline);
        return timeline;
      } catch (error) {
        await target.abort();
        await rm(directory, { recursive: true, force: true });
        throw error;
      }
    });
  }

  /**
   * Durable when it resolves. Repeatable: what does not exist is success. `conflict` when the timeline has children. `tenantId`: whose it is if it is not here,
   * but in the object store, as a crash in the middle of a creation may leave it.
   */
  async delete(timelineId: string, tenantId?: string): Promise<void> {
    const timeline = this.#existing(timelineId);
    if (timeline === undefined) {
      if (tenantId === undefined || this.#deleted.has(timelineId)) return;
      const directory = join(this.#directory, timelineId);
      await this.#exclusively(timelineId, async () => this.#remote?.deleteUnknown({ tenantId, timelineId, directory }));
      this.#deleted.add(timelineId);
      return;
    }
    const childCount = this.childCount(timelineId);
    if (childCount > 0) throw new StrataError('conflict', `timeline ${timelineId} has ${childCount} children`);
    await this.#exclusively(timelineId, async () => {
      await this.#remote?.delete(timeline);
      await timeline.delete();
      this.#timelines.delete(timelineId);
      this.#deleted.add(timelineId);
      this.leases.forget(timelineId);
      if (timeline.ancestor === undefined) return;
      this.#removeChild(timeline.ancestor.timelineId, timelineId);
      this.garbage.released(timeline.ancestor);
    });
  }

  /** For repairs: a timeline that nobody knows, in a folder of its own, which continues another from `lsn` on. */
  async makeShadow(of: Timeline, lsn: Lsn): Promise<Timeline> {
    const directory = `${of.directory}${SHADOW_SUFFIX}`;
    await rm(directory, { recursive: true, force: true });
    await mkdir(directory, { mode: 0o700 });
    const index: TimelineIndex = {
      tenantId: of.tenantId,
      timelineId: of.timelineId,
      pgVersion: of.pgVersion,
      ancestor: { timelineId: of.timelineId, lsn },
      startLsn: lsn,
      startRecordLsn: lsn,
      diskConsistentLsn: lsn,
      diskConsistentRecordLsn: lsn,
      isDeleted: false,
      layers: [],
    };
    const hooks = { onFlush: () => {}, onIndex: () => {}, retainedLsns: () => [] };
    return new Timeline(directory, index, of, { ...this.#options, ...hooks });
  }

  /** Flushes what is old. To be called from time to time. */
  flushAged(): void {
    const now = this.#options.now();
    for (const timeline of this.#timelines.values()) {
      if (timeline.openSinceMs !== undefined && now - timeline.openSinceMs >= this.#limits.flushAgeMs)
        timeline.freeze();
    }
  }

  /** Has the largest open layer flushed while all together are too large. To be called between two records, when much was put. */
  relieveMemory(): void {
    const { memoryBytesMax } = this.#limits;
    if (this.memoryBytes <= memoryBytesMax) return;
    let largest: Timeline | undefined;
    let openBytes = 0;
    for (const timeline of this.#timelines.values()) {
      openBytes += timeline.openBytes;
      if (timeline.openBytes > (largest?.openBytes ?? 0)) largest = timeline;
    }
    // What is frozen already is on its way out.
    if (openBytes > memoryBytesMax / 2) largest?.freeze();
  }

  /** Resolves when there is room in memory; undefined when there is now. There is none for long only while flushes fail, on a full disk for example. */
  memoryRoom(signal: AbortSignal): Promise<void> | undefined {
    const isFull = (): boolean => this.memoryBytes > 2 * this.#limits.memoryBytesMax;
    if (!isFull()) return undefined;
    const wait = async (): Promise<void> => {
      while (isFull() && !signal.aborted) await sleep(MEMORY_CHECK_MS);
    };
    return wait();
  }

  /** Flushes and closes all. What cannot be written is logged; it comes again from the safekeepers. */
  async close(): Promise<void> {
    this.compaction.close();
    const left = [...this.#timelines.values()];
    const closeOneAfterTheOther = async (): Promise<void> => {
      for (let timeline = left.pop(); timeline !== undefined; timeline = left.pop()) {
        const { timelineId } = timeline;
        await timeline.close().catch((error: unknown) => {
          this.#log.error({ timelineId, err: error }, 'timeline was closed without its last flush');
        });
      }
    };
    await Promise.all(Array.from({ length: CLOSE_CONCURRENCY }, closeOneAfterTheOther));
    await this.compaction.settled();
    await this.#compactor.close();
  }

  #existing(timelineId: string): Timeline | undefined {
    if (!isTimelineId(timelineId)) throw new StrataError('bad-request', `"${timelineId}" is not a timeline id`);
    if (this.#busy.has(timelineId)) throw new StrataError('locked', `timeline ${timelineId} is being changed`);
    if (this.#broken.has(timelineId)) return this.get(timelineId);
    return this.#timelines.get(timelineId);
  }

  #assertIdIsUnused(timelineId: string): void {
    if (!this.#deleted.has(timelineId)) return;
    throw new StrataError('conflict', `timeline ${timelineId} was deleted: a new one needs a new id`);
  }

  async #exclusively<T>(timelineId: string, action: () => Promise<T>): Promise<T> {
    assert(!this.#busy.has(timelineId), 'one change of a timeline at a time');
    this.#busy.add(timelineId);
    try {
      return await action();
    } finally {
      this.#busy.delete(timelineId);
    }
  }

  #make(index: TimelineIndex, ancestor: Timeline | undefined): Timeline {
    return new Timeline(join(this.#directory, index.timelineId), index, ancestor, this.#options);
  }

  /** Durable on the local disk when it resolves, and known from then on. */
  async #install(timeline: Timeline): Promise<void> {
    const { directory, index, timelineId } = timeline;
    await mkdir(directory, { recursive: true, mode: 0o700 });
    this.#options.onStep?.('timeline folder made');
    // At once: an index in a folder that a power cut removes is none, and so is a folder without an index.
    await allDone([
      syncDirectory(this.#directory),
      replaceFile(join(directory, TIMELINE_INDEX_NAME), encodeTimelineIndex(index)),
    ]);
    this.#options.onStep?.('timeline created');
    this.#timelines.set(timelineId, timeline);
  }

  /** What descendants inherit has moved with it, as far as they have no horizon of their own. */
  #horizonMoved(timeline: Timeline): void {
    const left = [timeline];
    for (let next = left.pop(); next !== undefined; next = left.pop()) {
      this.moved(next);
      for (const childId of this.#children.get(next.timelineId)?.keys() ?? []) {
        const child = this.#timelines.get(childId);
        if (child !== undefined && child.horizon === undefined) left.push(child);
      }
    }
  }

  #addChild(timelineId: string, childId: string, lsn: Lsn): void {
    const children = this.#children.get(timelineId);
    if (children === undefined) this.#children.set(timelineId, new Map([[childId, lsn]]));
    else children.set(childId, lsn);
  }

  #removeChild(timelineId: string, childId: string): void {
    this.#children.get(timelineId)?.delete(childId);
  }

  #flushed(timeline: Timeline, error: unknown): void {
    const { timelineId } = timeline;
    if (error === undefined) {
      this.compaction.request(timeline);
      if (this.#flushFailing.delete(timeline)) this.#log.info({ timelineId }, 'flush works again');
    } else if (!this.#flushFailing.has(timeline)) {
      this.#flushFailing.add(timeline);
      this.#log.error({ timelineId, err: error }, 'flush failed; it is tried again every second');
    }
  }

  /** The folders of deleted timelines are left to be removed. */
  #load({ indexes, deleted, broken }: TimelineFolders): readonly string[] {
    for (const [timelineId, reason] of [...broken, ...this.#brokenInStore]) this.#breaks(timelineId, reason);
    for (const timelineId of indexes.keys()) {
      if (!this.#broken.has(timelineId)) this.#loadWithAncestors(timelineId, indexes);
    }
    return deleted;
  }

  /** Makes the timeline, after its ancestors; without recursion, as they may be thousands. */
  #loadWithAncestors(timelineId: string, indexes: ReadonlyMap<string, FoundTimeline>): void {
    const path: FoundTimeline[] = [];
    for (let id: string | undefined = timelineId; id !== undefined && !this.#timelines.has(id);) {
      const found: FoundTimeline | undefined = indexes.get(id);
      if (found === undefined || this.#broken.has(id)) {
        const missing = id;
        for (const { index } of path) {
          const child = index.timelineId;
          this.#breaks(child, `timeline ${child} cannot be read: its ancestor ${missing} is damaged or not there`);
        }
        return;
      }
      path.push(found);
      id = found.index.ancestor?.timelineId;
    }
    for (const { index, files } of path.reverse()) {
      const ancestor = index.ancestor === undefined ? undefined : this.#timelines.get(index.ancestor.timelineId);
      const directory = join(this.#directory, index.timelineId);
      this.#timelines.set(index.timelineId, new Timeline(directory, index, ancestor, this.#options, files));
      if (index.ancestor !== undefined) this.#addChild(index.ancestor.timelineId, index.timelineId, index.ancestor.lsn);
    }
  }

  #breaks(timelineId: string, reason: string): void {
    if (this.#broken.has(timelineId)) return;
    this.#broken.set(timelineId, reason);
    this.#log.error({ timelineId, reason }, 'timeline cannot be loaded');
  }
}
