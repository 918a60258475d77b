/**
 * Garbage collection: moves each timeline's horizon up with time, and rewrites layers that hold much that nobody can read any more.
 *
 *   1. The horizon is where the history window of the timeline's project begins. It never goes back. It counts at once for who reads or branches,
 *      and is durable in the index before anything is removed because of it.
 *   2. Runs of layers that lie wholly at or below the horizon are merged into one (merge.ts leaves out what is not needed), when those that were
 *      not collected before are a fair part of them. Other merges leave it out as well, as they come. The image layers of an import count as the
 *      oldest run: what of them is still needed becomes part of the merged one.
 *
 * Nothing is collected until a lease's time after the start, when everybody who held one has taken it again. The clock is believed as far as it agrees
 * with the time that has passed since the start.
 */

import { setImmediate as yieldToOthers } from 'node:timers/promises';
import type { Logger } from '../base/log.ts';
import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import type { Compaction } from './compaction.ts';
import { imageRuns } from './compaction-plan.ts';
import type { LayerRun } from './compaction-plan.ts';
import { compareKeys } from './key.ts';
import type { Retention } from './merge.ts';
import type { Timeline } from './timeline.ts';
import { readWhole } from './whole-reads.ts';
import type { Repair } from './whole-reads.ts';

export interface GarbageCollectionOptions {
  readonly compaction: Compaction;
  readonly log: Logger;
  /** Milliseconds since 1970. */
  readonly now: () => number;
  /** Milliseconds since any moment; it never steps. */
  readonly steadyNow: () => number;
  readonly leaseMs: number;
  readonly retentionMsOf: (timeline: Timeline) => number;
  /** The LSN of a timeline's state at a time; undefined when it is not known, or before the timeline began. */
  readonly lsnAt: (timeline: Timeline, timeMs: number) => Lsn | undefined;
  readonly repair: Repair;
  /** Collected when this much, and half of what is kept, has come below the horizon. */
  readonly collectBytesMin: number;
}

/** How far the clock may get ahead of the time that passed, by being set right, before it is no longer followed. */
const CLOCK_AHEAD_MAX_MS = 10 * 60_000;
/** Most of thousands of timelines have nothing to collect; all the same, reads do not wait for the look at them. */
const SLICE_MS = 5;

export class GarbageCollection {
  readonly #options: GarbageCollectionOptions;
  readonly #startedAtMs: number;
  readonly #steadyStartMs: number;
  /** Up to where each timeline's layers were collected. */
  readonly #collectedLsns = new WeakMap<Timeline, Lsn>();

  constructor(options: GarbageCollectionOptions) {
    this.#options = options;
    this.#startedAtMs = options.now();
    this.#steadyStartMs = options.steadyNow();
  }

  /** False while there may be leases that are not yet taken again. */
  get isAllowed(): boolean {
    return this.allowedInMs <= 0;
  }

  get allowedInMs(): number {
    return this.#options.leaseMs - this.#elapsedMs;
  }

  get #elapsedMs(): number {
    return this.#options.steadyNow() - this.#steadyStartMs;
  }

  /** What has to stay readable of a timeline, for merges; undefined: everything. */
  retentionOf(timeline: Timeline): Retention | undefined {
    // What is durable: a merge must not leave out what a restart would offer again.
    const { horizon } = timeline.index;
    if (horizon === undefined || !this.isAllowed) return undefined;
    const lsns = [...new Set(timeline.retainedLsns())].filter((lsn) => lsn < horizon.lsn);
    return { horizonLsn: horizon.lsn, lsns: lsns.sort((a, b) => a - b) };
  }

  /** To be called when something that was retained of the timeline no longer is: it is looked at anew. */
  released(timeline: Timeline): void {
    this.#collectedLsns.delete(timeline);
  }

  /** Goes through all timelines once. `isForced`: what can go goes, however little it is. */
  async run(timelines: Iterable<Timeline>, isForced = false): Promise<void> {
    if (!this.isAllowed) return;
    let sliceStartMs = performance.now();
    for (const timeline of [...timelines]) {
      if (performance.now() - sliceStartMs > SLICE_MS) {
        await yieldToOthers();
        sliceStartMs = performance.now();
      }
      try {
        if (!timeline.isStopped) await this.#collect(timeline, isForced);
      } catch (error) {
        if (timeline.isStopped) continue;
        this.#options.log.error({ timelineId: timeline.timelineId, err: error }, 'garbage collection failed');
      }
    }
  }

  async #collect(timeline: Timeline, isForced: boolean): Promise<void> {
    const { now, retentionMsOf, lsnAt, compaction, collectBytesMin, repair, log } = this.#options;
    // A clock that is set forward by mistake would take history with it.
    const nowMs = Math.min(now(), this.#startedAtMs + this.#elapsedMs + CLOCK_AHEAD_MAX_MS);
    const timeMs = nowMs - retentionMsOf(timeline);
    const found = await readWhole(() => lsnAt(timeline, timeMs), repair);
    const lsn = Math.min(found ?? 0, timeline.diskConsistentLsn);
    if (lsn > (timeline.horizon?.lsn ?? timeline.index.startLsn)) await timeline.setHorizon({ lsn, timeMs });
    else if (timeline.horizon !== timeline.index.horizon) await timeline.setHorizon(timeline.horizon!);
    const { horizon } = timeline.index;
    if (horizon === undefined) return;
    const collectedLsn = this.#collectedLsns.get(timeline) ?? 0;
    const bytesMin = isForced ? 1 : collectBytesMin;
    const isMerged = await compaction.merge(timeline, (runs) =>
      runsToCollect(runs, imageRuns(timeline.index.layers), horizon.lsn, collectedLsn, bytesMin),
    );
    if (!isMerged) return;
    log.debug({ timelineId: timeline.timelineId, horizon: formatLsn(horizon.lsn) }, 'garbage was collected');
    this.#collectedLsns.set(timeline, horizon.lsn);
  }
}

/**
 * The runs at or below the horizon, when it is worth rewriting them; with what was imported, once that may be for a third a thing of the past. An
 * import of several layers with overlapping keys (many parts) is left as it is.
 */
export function runsToCollect(
  runs: readonly LayerRun[],
  images: readonly LayerRun[],
  horizonLsn: Lsn,
  collectedLsn: Lsn,
  bytesMin: number,
): readonly LayerRun[] | undefined {
  const old = runs.filter((run) => run.lsnEnd - 1 <= horizonLsn);
  let newBytes = 0;
  let collectedBytes = 0;
  for (const run of old) {
    if (run.lsnEnd - 1 > collectedLsn) newBytes += run.sizeBytes;
    else collectedBytes += run.sizeBytes;
  }
  if (newBytes < bytesMin || (newBytes < collectedBytes / 2 && bytesMin > 1)) return undefined;
  const imported = images.filter((run) => run.lsnEnd - 1 <= horizonLsn && !hasOverlaps(run));
  const importedBytes = imported.reduce((sum, run) => sum + run.sizeBytes, 0);
  return newBytes + collectedBytes >= importedBytes / 2 || bytesMin === 1 ? [...imported, ...old] : old;
}

function hasOverlaps({ layers }: LayerRun): boolean {
  const sorted = layers.toSorted((a, b) => compareKeys(a.keyStart, b.keyStart));
  return sorted.some((layer, i) => i > 0 && compareKeys(sorted[i - 1]!.keyEnd, layer.keyStart) > 0);
}
