/**
 * The pageserver's side of the object store: all timelines' uploads, the confirmation of what they brought, deletions, and what is fetched.
 * The rules and why: docs/decisions/object-store.md.
 *
 *   changed → a pass of the timeline (timeline-upload.ts) → the generation is asked for → remoteConsistentLsn moves up, and what no index
 *   names any more is deleted
 *
 * Bounded: passes at a time (those that somebody waits for have places of their own), uploads of layers at a time, and what waits: a timeline
 * waits once, however often it has changed. Who cannot be asked or reached is tried again; meanwhile everything is served as before.
 *
 * When a later generation was given out, another pageserver has taken over: nothing is written any more.
 */

import { rename, rm, stat } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Generations } from '../../api/generations.ts';
import type { ObjectStoreStatus } from '../../api/pageserver.ts';
import { StrataError } from '../../base/errors.ts';
import type { Logger } from '../../base/log.ts';
import { SingleRun } from '../../base/single-run.ts';
import { isObjectError, ObjectStoreError } from '../../object-store/object-store.ts';
import type { ObjectStore } from '../../object-store/object-store.ts';
import { LayerAbsentError } from '../layers/block.ts';
import { layerPath } from '../layers/layer-format.ts';
import type { LayerDescription } from '../layers/layer-format.ts';
import type { OnStep } from '../step.ts';
import { DeletionQueue } from './deletion-queue.ts';
import type { Deletion } from './deletion-queue.ts';
import { GenerationCheck } from './generation.ts';
import { indexesOf, indexObjectName, layersOf } from './object-names.ts';
import { objectNameOf } from './remote-index.ts';
import { indexesInStore, newestIndex, readIndex } from './timeline-objects.ts';
import { GenerationTakenError, TimelineUpload } from './timeline-upload.ts';
import type { Loss, Pass, UploadedTimeline } from './timeline-upload.ts';
import { TurnQueue } from './turn-queue.ts';

export interface RemoteOptions {
  readonly store: ObjectStore;
  readonly generations: Generations;
  readonly generation: number;
  /** From this generation on all pageservers had this disk (generation.ts). */
  readonly since: number;
  readonly log: Logger;
  /** After a failure. */
  readonly retryDelayMs?: number;
  /** How long somebody waits for a timeline to be in a store that fails. */
  readonly storedWaitMs?: number;
  readonly onStep?: OnStep;
}

const PASSES_MAX = 4;
/** Those that somebody waits for: many branches that are made at once. */
const URGENT_PASSES_MAX = 16;
const LAYER_UPLOADS_MAX = 4;
const FETCHES_MAX = 16;
const RETRY_DELAY_MS = 1_000;
const RETRY_DELAY_MAX_MS = 15_000;
const STORED_WAIT_MS = 25_000;
const FETCH_TIMEOUT_MS = 120_000;
/** Of one timeline. */
const UNCONFIRMED_DELETIONS_MAX = 10_000;

interface Waiter {
  readonly sinceMs: number;
  readonly resolve: () => void;
  readonly reject: (error: Error) => void;
}

interface Confirmable {
  lsn: number;
  deletions: Deletion[];
}

export class Remote {
  readonly #options: RemoteOptions;
  readonly #check: GenerationCheck;
  readonly #stop = new AbortController();
  readonly #layerTurns = new TurnQueue(LAYER_UPLOADS_MAX);
  readonly #fetchTurns = new TurnQueue(FETCHES_MAX);
  readonly #deletions: DeletionQueue;
  readonly #uploads = new WeakMap<UploadedTimeline, TimelineUpload>();
  /** Have changed; in the order in which it is their turn. */
  readonly #waiting = new Set<TimelineUpload>();
  /** Somebody waits for them: they have places of their own. */
  readonly #urgent = new Set<TimelineUpload>();
  readonly #running = new Map<TimelineUpload, { readonly done: Promise<void>; readonly isUrgent: boolean }>();
  readonly #deleting = new Set<TimelineUpload>();
  readonly #waiters = new Map<TimelineUpload, Waiter[]>();
  readonly #unconfirmed = new Map<TimelineUpload, Confirmable>();
  readonly #fetches = new Map<string, Promise<void>>();
  readonly #confirming = new SingleRun(
    () => this.#confirmAll().catch((error: unknown) => this.#options.log.error({ err: error }, 'confirmation ended')),
    () => this.#isConfirmationWanted,
  );
  #failure: { readonly message: string; readonly sinceMs: number } | undefined;
  #failureCount = 0;
  #isStale = false;
  /** Has layers made anew that are neither here nor in the store. */
  onLost: ((error: LayerAbsentError) => void) | undefined;

  constructor(options: RemoteOptions) {
    this.#options = options;
    this.#check = new GenerationCheck(options.generations, options.generation);
    const { store, log, retryDelayMs = RETRY_DELAY_MS, onStep } = options;
    this.#deletions = new DeletionQueue(
      { store, log, retryDelayMs, ...(onStep === undefined ? {} : { onStep }) },
      this.#stop.signal,
    );
  }

  get generation(): number {
    return this.#options.generation;
  }

  get status(): ObjectStoreStatus {
    const pending = new Set([...this.#waiting, ...this.#urgent, ...this.#running.keys()]);
    let pendingBytes = 0;
    for (const upload of pending) pendingBytes += upload.pendingBytes;
    const failure = this.#failure;
    return {
      store: this.#options.store.description,
      generation: this.generation,
      since: this.#options.since,
      isStale: this.#isStale,
      pendingTimelines: pending.size,
      pendingBytes,
      pendingDeletions: this.#deletions.length,
      ...(failure === undefined ? {} : { failure: failure.message, failingSinceMs: failure.sinceMs }),
    };
  }

  /** Not stale, and the last upload succeeded. */
  get isWorking(): boolean {
    return !this.#isStale && this.#failure === undefined;
  }

  /** To be called when a timeline's index has changed, and for each after a start. */
  changed(timeline: UploadedTimeline): void {
    const upload = this.#of(timeline);
    if (this.#deleting.has(upload) || this.#urgent.has(upload)) return;
    this.#waiting.add(upload);
    this.#pump();
  }

  /** Of a timeline that was just made, before anything else: nothing of it can be in the store. */
  created(timeline: UploadedTimeline): void {
    this.#of(timeline).isNew();
  }

  /** Resolves when the timeline as it is now, or later, is in the store; rejects with `unavailable` when the store does not take it. */
  stored(timeline: UploadedTimeline): Promise<void> {
    const upload = this.#of(timeline);
    if (upload.isUpToDate) return Promise.resolve();
    if (this.#isStale) return Promise.reject(this.#staleError());
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const waiters = this.#waiters.get(upload) ?? [];
    waiters.push({ sinceMs: performance.now(), resolve, reject });
    this.#waiters.set(upload, waiters);
    this.#waiting.delete(upload);
    this.#urgent.add(upload);
    this.#pump();
    return promise;
  }

  /** Resolves when the store's newest index of the timeline is of our own, so that whoever takes over sees what it says; rejects as `stored` does. */
  async owned(timeline: UploadedTimeline): Promise<void> {
    const upload = this.#of(timeline);
    await upload.load();
    if (!upload.isOwn) await this.stored(timeline);
  }

  /** Durably says in the store that the timeline is deleted. Nothing of it is uploaded any more, even when this fails; it may be tried again. */
  async delete(timeline: UploadedTimeline): Promise<void> {
    if (this.#isStale) throw this.#staleError();
    const upload = this.#of(timeline);
    this.#deleting.add(upload);
    this.#waiting.delete(upload);
    this.#urgent.delete(upload);
    this.#settleWaiters(upload, new StrataError('not-found', `timeline ${timeline.timelineId} is being deleted`));
    await this.#running.get(upload)?.done;
    const name = await upload.putTombstone(this.#stop.signal).catch((error: unknown) => {
      throw this.#unavailable(error);
    });
    const { tenantId, timelineId } = timeline;
    this.#confirmLater(upload, {
      lsn: 0,
      deletions: [
        { kind: 'prefix', prefix: layersOf(tenantId, timelineId), except: undefined },
        { kind: 'prefix', prefix: indexesOf(tenantId, timelineId), except: indexObjectName(name) },
      ],
    });
  }

  /** As `delete`, of a timeline that is not on the local disk; nothing is done when the store does not have it either. */
  async deleteUnknown(timeline: Pick<UploadedTimeline, 'tenantId' | 'timelineId' | 'directory'>): Promise<void> {
    const { store, generation } = this.#options;
    const { tenantId, timelineId } = timeline;
    const indexes = await indexesInStore(store, tenantId, timelineId).catch((error: unknown) => {
      throw this.#unavailable(error);
    });
    const newest = newestIndex(indexes, generation);
    if (newest === undefined || newest.isDeleted) return;
    const { timeline: index } = await readIndex(store, newest);
    await this.delete({ ...timeline, index, setRemoteConsistentLsn: () => {} });
  }

  /** What the store has lost (timeline-upload.ts); it is brought there again, soon, as far as it is here. Throws what the store throws. */
  async findLoss(timeline: UploadedTimeline, damaged: ReadonlySet<string>): Promise<Loss> {
    if (this.#isStale) throw this.#staleError();
    const upload = this.#of(timeline);
    const loss = await upload.findLoss(damaged);
    if (!upload.isUpToDate) this.changed(timeline);
    return loss;
  }

  /** The newest index of the timeline that is known to be in the store. */
  async storedIndexName(timeline: UploadedTimeline): Promise<string | undefined> {
    const upload = this.#of(timeline);
    await upload.load();
    return upload.storedIndexName;
  }

  /** Nothing is written any more. */
  get isOver(): boolean {
    return this.#isStale || this.#stop.signal.aborted;
  }

  /** Whether the store says that it has the layer, in its full length. Throws what the store throws. */
  async isThere(timeline: UploadedTimeline, layer: LayerDescription): Promise<boolean> {
    const stored = await this.#of(timeline).storedLayer(layer);
    if (stored === undefined) return false;
    try {
      const { sizeBytes } = await this.#options.store.head(objectNameOf(timeline.index, stored), {
        signal: this.#stop.signal,
      });
      return sizeBytes === layer.sizeBytes;
    } catch (error) {
      if (isObjectError(error, 'not-found')) return false;
      throw error;
    }
  }

  /** Whether the layer's file may be taken away: it can be fetched again. */
  isStored(timeline: UploadedTimeline, layer: LayerDescription): boolean {
    return this.#uploads.get(timeline)?.isStored(layer) ?? false;
  }

  /**
   * Puts the layer's file in its place, from the store; false when the store does not have it. Throws what the store throws: `damaged` when it has other
   * bytes, transient errors when it does not answer.
   */
  async fetch(timeline: UploadedTimeline, layer: LayerDescription): Promise<boolean> {
    const upload = this.#of(timeline);
    const stored = await upload.storedLayer(layer);
    if (stored === undefined) return false;
    const path = layerPath(timeline.directory, layer);
    let fetching = this.#fetches.get(path);
    if (fetching === undefined) {
      const name = objectNameOf(timeline.index, stored);
      fetching = this.#fetchTurns
        .inTurn(() => this.#download(name, path, layer.sizeBytes, stored.crc32))
        .finally(() => this.#fetches.delete(path));
      this.#fetches.set(path, fetching);
    }
    await fetching;
    return true;
  }

  /** A part of the layer's bytes; undefined when the store does not have it. Throws what the store throws. */
  async fetchRange(
    timeline: UploadedTimeline,
    layer: LayerDescription,
    start: number,
    end: number,
  ): Promise<Buffer | undefined> {
    const stored = await this.#of(timeline).storedLayer(layer);
    if (stored === undefined) return undefined;
    const name = objectNameOf(timeline.index, stored);
    const options = { signal: this.#stop.signal, timeoutMs: FETCH_TIMEOUT_MS };
    return this.#fetchTurns.inTurn(() => this.#options.store.getRange(name, start, end, options));
  }

  /** Resolves when everything is in the store and confirmed, and all is deleted that may be; or after `timeoutMs`. False when something was left. */
  async settled(timeoutMs = 60_000): Promise<boolean> {
    const deadline = performance.now() + timeoutMs;
    const isBusy = (): boolean =>
      !this.#isStale &&
      this.#waiting.size + this.#urgent.size + this.#running.size + this.#unconfirmed.size + this.#deletions.length > 0;
    while (isBusy() && performance.now() < deadline) await sleep(5);
    return !isBusy();
  }

  /** Gives up what is under way. What is not in the store is uploaded after the next start. */
  async close(): Promise<void> {
    this.#stop.abort(new StrataError('unavailable', 'the pageserver is stopping'));
    this.#waiting.clear();
    this.#urgent.clear();
    for (const upload of this.#waiters.keys()) {
      this.#settleWaiters(upload, new StrataError('unavailable', 'the pageserver is stopping'));
    }
    await Promise.allSettled([...this.#running.values()].map(({ done }) => done));
    await this.#confirming.current;
    await this.#deletions.settled();
    await Promise.allSettled(this.#fetches.values());
  }

  #of(timeline: UploadedTimeline): TimelineUpload {
    let upload = this.#uploads.get(timeline);
    if (upload === undefined) {
      const { store, generation, since, onStep } = this.#options;
      upload = new TimelineUpload(timeline, {
        store,
        generation,
        since,
        inTurn: (work) => this.#layerTurns.inTurn(work),
        ...(onStep === undefined ? {} : { onStep }),
      });
      this.#uploads.set(timeline, upload);
    }
    return upload;
  }

  // ---- uploads

  #pump(): void {
    if (this.#isStale || this.#stop.signal.aborted) return;
    for (const [queue, isUrgent] of [
      [this.#urgent, true],
      [this.#waiting, false],
    ] as const) {
      // prettier-ignore
      let runningCount = [...this.#running.values()].filter((each) => each.isUrgent === isUrgent).length;
      for (const upload of queue) {
        if (runningCount >= (isUrgent ? URGENT_PASSES_MAX : PASSES_MAX)) break;
        if (this.#running.has(upload)) continue;
        queue.delete(upload);
        runningCount++;
        const done = this.#run(upload, isUrgent).finally(() => {
          this.#running.delete(upload);
          this.#pump();
        });
        this.#running.set(upload, { done, isUrgent });
      }
    }
  }

  async #run(upload: TimelineUpload, isUrgent: boolean): Promise<void> {
    const waiters = this.#waiters.get(upload) ?? [];
    this.#waiters.delete(upload);
    try {
      const isKnown = upload.isUpToDate;
      const pass = (await upload.pass(this.#stop.signal)) ?? (isKnown ? undefined : upload.storedPass);
      this.#succeeded();
      if (pass !== undefined) this.#confirmLater(upload, confirmable(pass));
      for (const waiter of waiters) waiter.resolve();
      if (!upload.isUpToDate && !this.#deleting.has(upload)) this.#waiting.add(upload);
    } catch (error) {
      if (this.#stop.signal.aborted || this.#deleting.has(upload)) {
        for (const { reject } of waiters) reject(this.#unavailable(error));
        return;
      }
      if (error instanceof GenerationTakenError) this.#becomeStale(error.message);
      if (error instanceof LayerAbsentError) this.onLost?.(error);
      this.#failed(upload, error);
      const now = performance.now();
      const left = waiters.filter(({ sinceMs, reject }) => {
        const isOver = this.#isStale || now - sinceMs > (this.#options.storedWaitMs ?? STORED_WAIT_MS);
        if (isOver) reject(this.#unavailable(error));
        return !isOver;
      });
      if (this.#isStale) return;
      // The next may fare better; and this one has a pause.
      await this.#pause(Math.min(RETRY_DELAY_MAX_MS, this.#retryDelayMs * 2 ** Math.min(4, this.#failureCount - 1)));
      if (this.#stop.signal.aborted || this.#deleting.has(upload)) {
        for (const { reject } of left) reject(this.#unavailable(error));
        return;
      }
      if (left.length > 0) this.#waiters.set(upload, [...left, ...(this.#waiters.get(upload) ?? [])]);
      (isUrgent && left.length > 0 ? this.#urgent : this.#waiting).add(upload);
    }
  }

  get #retryDelayMs(): number {
    return this.#options.retryDelayMs ?? RETRY_DELAY_MS;
  }

  #succeeded(): void {
    this.#failureCount = 0;
    if (this.#failure === undefined) return;
    const { sinceMs } = this.#failure;
    this.#failure = undefined;
    this.#options.log.info(
      { store: this.#options.store.description, failedMs: Date.now() - sinceMs },
      'uploads work again',
    );
  }

  #failed(upload: TimelineUpload, error: unknown): void {
    this.#failureCount++;
    const message = error instanceof Error ? error.message : String(error);
    if (this.#failure === undefined) {
      this.#options.log.error(
        { timelineId: upload.timeline.timelineId, err: error },
        'an upload failed; it is tried again',
      );
    }
    this.#failure = { message, sinceMs: this.#failure?.sinceMs ?? Date.now() };
  }

  #settleWaiters(upload: TimelineUpload, error: Error): void {
    for (const { reject } of this.#waiters.get(upload) ?? []) reject(error);
    this.#waiters.delete(upload);
  }

  // ---- confirmation

  #confirmLater(upload: TimelineUpload, more: Confirmable): void {
    const known = this.#unconfirmed.get(upload);
    if (known === undefined) this.#unconfirmed.set(upload, more);
    else {
      known.lsn = Math.max(known.lsn, more.lsn);
      // Beyond it they stay as orphans, which scrub finds.
      known.deletions.push(...more.deletions.slice(0, Math.max(0, UNCONFIRMED_DELETIONS_MAX - known.deletions.length)));
    }
    if (this.#isConfirmationWanted) this.#confirming.start();
  }

  get #isConfirmationWanted(): boolean {
    return this.#unconfirmed.size > 0 && !this.#stop.signal.aborted;
  }

  async #confirmAll(): Promise<void> {
    const { log } = this.#options;
    let isFailing = false;
    while (this.#unconfirmed.size > 0 && !this.#stop.signal.aborted) {
      const asked = [...this.#unconfirmed];
      this.#unconfirmed.clear();
      let isLatest: boolean;
      try {
        isLatest = await this.#check.isLatest();
      } catch (error) {
        if (!isFailing)
          log.warn({ err: error }, 'whether this is the latest pageserver cannot be asked; it is tried again');
        isFailing = true;
        for (const [upload, { lsn, deletions }] of asked) {
          const newer = this.#unconfirmed.get(upload);
          this.#unconfirmed.set(upload, {
            lsn: Math.max(lsn, newer?.lsn ?? 0),
            deletions: [...deletions, ...(newer?.deletions ?? [])],
          });
        }
        await this.#pause(this.#retryDelayMs);
        continue;
      }
      if (!isLatest) {
        this.#becomeStale('a later pageserver was started');
        return;
      }
      if (isFailing) log.info('this is the latest pageserver');
      isFailing = false;
      this.#options.onStep?.('generation confirmed');
      for (const [upload, { lsn, deletions }] of asked) {
        if (lsn > 0) upload.timeline.setRemoteConsistentLsn(lsn);
        if (deletions.length === 0) continue;
        // What was not needed when it was put here may be again.
        const needed = upload.neededObjects();
        this.#deletions.add(deletions.filter((each) => each.kind === 'prefix' || !needed.has(each.name)));
      }
    }
  }

  #becomeStale(reason: string): void {
    if (this.#isStale) return;
    this.#isStale = true;
    this.#unconfirmed.clear();
    this.#waiting.clear();
    this.#urgent.clear();
    for (const upload of this.#waiters.keys()) this.#settleWaiters(upload, this.#staleError());
    this.#options.log.error(
      { generation: this.generation, reason },
      'this pageserver writes to the object store no more',
    );
  }

  #staleError(): StrataError {
    return new StrataError('unavailable', 'a later pageserver has taken over');
  }

  #unavailable(error: unknown): StrataError {
    if (this.#isStale) return this.#staleError();
    const { description } = this.#options.store;
    const reason = error instanceof Error ? error.message : String(error);
    return new StrataError('unavailable', `the object store ${description} does not take it: ${reason}`, {
      cause: error,
    });
  }

  // ---- what is fetched

  async #download(name: string, path: string, sizeBytes: number, crc32: number): Promise<void> {
    const { store, onStep } = this.#options;
    const { signal } = this.#stop;
    const partial = `${path}.fetched`;
    try {
      const received = await store.getToFile(name, partial, { signal, share: true, timeoutMs: FETCH_TIMEOUT_MS });
      const { size } = await stat(partial);
      if (size !== sizeBytes || received.crc32 !== crc32) {
        const found = `${size} bytes with CRC32 ${received.crc32.toString(16)}`;
        const message = `object ${name} has ${found}, the index says ${sizeBytes} with ${crc32.toString(16)}`;
        throw new ObjectStoreError('damaged', message);
      }
      await rename(partial, path);
      onStep?.('layer fetched');
    } finally {
      await rm(partial, { force: true });
    }
  }

  #pause(ms: number): Promise<void> {
    return sleep(ms, undefined, { signal: this.#stop.signal }).catch(() => {});
  }
}

function confirmable({ lsn, deleted }: Pass): Confirmable {
  return { lsn, deletions: deleted.map((name) => ({ kind: 'object', name })) };
}
