/**
 * Compaction of all timelines of a pageserver: which one is next, its merge, and the switch to the merged layers.
 *
 * A timeline is looked at after each of its flushes. One merge at a time, each timeline in its turn; but beside a large one, which takes minutes, small ones
 * of timelines that have nothing to do with it. A merge that fails is tried again after the timeline's next flush, and
 * harms nothing, as its layers count only once the timeline's index names them.
 *
 * Steps, between any two of which a crash may fall: 'compaction begins', new layers durable ('compacted layers written'), the index names them
 * instead of the old ones ('compacted index written'), each old file is removed ('compacted layer removed'). What a crash leaves without
 * a name in the index is removed at start.
 */

import type { Logger } from '../base/log.ts';
import { SingleRun } from '../base/single-run.ts';
import { formatLsn } from '../postgres/lsn.ts';
import { deltaRuns, planMerge } from './compaction-plan.ts';
import type { LayerRun } from './compaction-plan.ts';
import type { Compactor } from './compactor.ts';
import { compareKeys } from './key.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { LayerDamagedError } from './layers/block.ts';
import { MergeCancelled } from './merge.ts';
import type { MergeJob, Retention } from './merge.ts';
import type { OnStep } from './step.ts';
import type { Timeline } from './timeline.ts';
import { RepairBound } from './whole-reads.ts';
import type { Repair } from './whole-reads.ts';
import { LayerAbsentError } from './layers/block.ts';
import { layerPath } from './layers/layer-format.ts';

export interface CompactionOptions {
  readonly compactor: Compactor;
  readonly log: Logger;
  /** What of a timeline's history must stay readable; undefined: all of it. */
  readonly retentionOf: (timeline: Timeline) => Retention | undefined;
  /** Fetches a layer that is not here. */
  readonly fetch: Repair;
  /** Makes a damaged layer whole that a merge has met. */
  readonly repair?: (damage: LayerDamagedError) => Promise<void>;
  readonly onStep?: OnStep;
  /** More than this is a large merge. */
  readonly largeBytes: number;
}

export class Compaction {
  readonly #options: CompactionOptions;
  readonly #largeBytes: number;
  readonly #waiting = new Set<Timeline>();
  readonly #runs = new SingleRun(
    () => this.#run(),
    () => this.#waiting.size > 0,
  );
  /** The timeline of which a large merge is under way, and the small ones beside it: they begin while it runs, and whatever comes next waits for them. */
  #large: Timeline | undefined;
  #small: Promise<void> | undefined;
  /** What was asked for last. */
  #last: Promise<unknown> = Promise.resolve();
  /** The highest that a merge of the timeline has had. */
  readonly #revisions = new WeakMap<Timeline, number>();
  #isClosed = false;

  constructor(options: CompactionOptions) {
    this.#options = options;
    this.#largeBytes = options.largeBytes;
  }

  /** Has the timeline looked at, soon. */
  request(timeline: Timeline): void {
    if (this.#isClosed || planMerge(deltaRuns(timeline.index.layers)) === undefined) return;
    this.#waiting.add(timeline);
    this.#runs.start();
    this.#startSmall();
  }

  /** Resolves when no merge is under way or wanted. */
  async settled(): Promise<void> {
    await this.#runs.settled();
    await this.#last;
    await this.#small;
  }

  /** No merge begins any more; the one under way ends with its timeline. */
  close(): void {
    this.#isClosed = true;
    this.#waiting.clear();
  }

  /** Merges runs of the timeline into one, when it is its turn: those that `choose` then takes of all runs, oldest first. False when it takes none. */
  merge(timeline: Timeline, choose: (runs: readonly LayerRun[]) => readonly LayerRun[] | undefined): Promise<boolean> {
    return this.exclusively(async () => {
      const runs = timeline.isStopped || this.#isClosed ? undefined : choose(deltaRuns(timeline.index.layers));
      if (runs === undefined || runs.length === 0) return false;
      try {
        if (bytesOf(runs) > this.#largeBytes) this.#large = timeline;
        this.#startSmall();
        await this.#mergeRuns(timeline, runs);
      } finally {
        this.#large = undefined;
      }
      return true;
    });
  }

  /** Does what replaces layers, after all that was asked for before: one such thing at a time. */
  exclusively<T>(work: () => Promise<T>): Promise<T> {
    const done = this.#last.then(() => this.#small).then(work);
    this.#last = done.catch(() => {});
    return done;
  }

  async #run(): Promise<void> {
    for (const timeline of this.#waiting) {
      this.#waiting.delete(timeline);
      // What it needs beyond one merge comes after the others'.
      await this.merge(timeline, planMerge)
        .then((isMerged) => isMerged && this.request(timeline))
        .catch((error: unknown) => this.#failed(timeline, error));
    }
  }

  #startSmall(): void {
    if (this.#large === undefined || this.#small !== undefined) return;
    this.#small = this.#runSmall().finally(() => (this.#small = undefined));
  }

  /** Never rejects. */
  async #runSmall(): Promise<void> {
    for (let next = this.#nextSmall(); next !== undefined; next = this.#nextSmall()) {
      const { timeline, runs } = next;
      this.#waiting.delete(timeline);
      await this.#mergeRuns(timeline, runs)
        .then(() => this.request(timeline))
        .catch((error: unknown) => this.#failed(timeline, error));
    }
  }

  /** A merge reads what is inherited, so none runs beside that of an ancestor or a descendant. */
  #nextSmall(): { readonly timeline: Timeline; readonly runs: readonly LayerRun[] } | undefined {
    const large = this.#large;
    if (large === undefined || this.#isClosed) return undefined;
    const above = new Set(large.ancestors());
    for (const timeline of this.#waiting) {
      if (timeline === large || timeline.isStopped || above.has(timeline)) continue;
      const runs = planMerge(deltaRuns(timeline.index.layers));
      if (runs === undefined || bytesOf(runs) > this.#largeBytes || timeline.ancestors().includes(large)) continue;
      return { timeline, runs };
    }
    return undefined;
  }

  async #mergeRuns(timeline: Timeline, runs: readonly LayerRun[]): Promise<void> {
    const cancel = new Int32Array(new SharedArrayBuffer(4));
    const work = (): Promise<void> => this.#merge(timeline, runs, cancel);
    try {
      await timeline.inBackground(work, () => Atomics.store(cancel, 0, 1));
    } catch (error) {
      if (error instanceof LayerDamagedError) this.#repair(timeline, error);
      throw error;
    }
  }

  #failed(timeline: Timeline, error: unknown): void {
    if (error instanceof MergeCancelled || timeline.isStopped) return;
    this.#options.log.error({ timelineId: timeline.timelineId, err: error }, 'compaction failed');
  }

  /** Not waited for: it is done when it is its turn, and the merge tried again. */
  #repair(timeline: Timeline, damage: LayerDamagedError): void {
    this.#options.repair?.(damage).then(
      () => this.request(timeline),
      () => {}, // Who repairs has said why.
    );
  }

  async #merge(timeline: Timeline, runs: readonly LayerRun[], cancel: Int32Array): Promise<void> {
    const { log, retentionOf, onStep } = this.#options;
    const startMs = performance.now();
    // The merge reads files only: what is inherited must be in files.
    for (const { timeline: ancestor, endLsn } of timeline.ancestry()) {
      if (ancestor.diskConsistentLsn < endLsn) await ancestor.flush();
    }
    onStep?.('compaction begins');
    const job: MergeJob = {
      directory: timeline.directory,
      timelineId: timeline.timelineId,
      pgVersion: timeline.pgVersion,
      runs: runs.map((run) => [...run.layers].sort(byKey)),
      lineage: [
        { directory: timeline.directory, layers: timeline.index.layers, endLsn: Infinity },
        ...timeline.ancestry().map(({ timeline: { directory, index }, endLsn }) => {
          return { directory, layers: index.layers, endLsn };
        }),
      ],
      retention: retentionOf(timeline),
      revision: this.#nextRevision(timeline, runs),
      cancel,
    };
    const merged = await this.#mergeWhole(timeline, job);
    onStep?.('compacted layers written');
    const old = runs.flatMap((run) => run.layers);
    await timeline.replaceLayers(old, merged);
    const bytes = (layers: readonly { sizeBytes: number }[]): number => layers.reduce((sum, l) => sum + l.sizeBytes, 0);
    log.debug(
      {
        timelineId: timeline.timelineId,
        lsnStart: formatLsn(runs[0]!.lsnStart),
        lsnEnd: formatLsn(runs.at(-1)!.lsnEnd),
        layersBefore: old.length,
        layersAfter: merged.length,
        bytesBefore: bytes(old),
        bytesAfter: bytes(merged),
        tookMs: Math.round(performance.now() - startMs),
      },
      'compacted',
    );
  }

  /**
   * No two merges have the same: when the index could not be replaced for certain, the one on disk may name what a merge has written, and the next one
   * must neither overwrite nor remove that.
   */
  #nextRevision(timeline: Timeline, runs: readonly LayerRun[]): number {
    const revisions = runs.flatMap((run) => run.layers.map((layer) => layer.revision ?? 0));
    const revision = 1 + Math.max(this.#revisions.get(timeline) ?? 0, ...revisions);
    this.#revisions.set(timeline, revision);
    return revision;
  }

  /** The merge reads files: those of its runs that are not here are fetched first, others when it comes upon them. Nothing is evicted meanwhile. */
  async #mergeWhole(timeline: Timeline, job: MergeJob): Promise<LayerDescription[]> {
    const { compactor, fetch } = this.#options;
    const bound = new RepairBound(fetch);
    const merged = new Set(job.runs.flat().map((layer) => layerPath(timeline.directory, layer)));
    for (const { isLocal, path } of timeline.layerMap.all()) {
      if (!isLocal && merged.has(path)) await bound.repair(new LayerAbsentError(path));
    }
    for (;;) {
      try {
        return await compactor.merge(job);
      } catch (error) {
        if (!(error instanceof LayerAbsentError)) throw error;
        await bound.repair(error);
      }
    }
  }
}

function bytesOf(runs: readonly LayerRun[]): number {
  return runs.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
}

function byKey(a: LayerRun['layers'][number], b: LayerRun['layers'][number]): number {
  return compareKeys(a.keyStart, b.keyStart);
}
