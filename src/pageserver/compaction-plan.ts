/**
 * Which layers to merge, and when: decided from sizes alone.
 *
 * Delta layers with one LSN range are a *run*; a flush makes a run of one layer. The runs of a timeline follow each other in LSN. A merge
 * takes a suffix of them, the newest `n` runs, and makes one run of it: it begins at the oldest run that is no larger than all the
 * newer ones together. So each run that stays is larger than all the newer ones together, sizes at least double from run to run, and a value is
 * rewritten about once for each doubling of the history.
 *
 * Invariant, when nothing is left to merge: there are at most RUNS_TO_MERGE - 1 + log2(bytes of all deltas / RUN_BYTES_MIN) runs.
 */

import type { Lsn } from '../postgres/lsn.ts';
import type { LayerDescription, LayerKind } from './layers/layer-format.ts';

/** A merge is worth its while from this many runs on. */
export const RUNS_TO_MERGE = 4;
/** Smaller runs count as being of this size. */
export const RUN_BYTES_MIN = 1024 * 1024;

export interface LayerRun {
  readonly lsnStart: Lsn;
  readonly lsnEnd: Lsn;
  readonly sizeBytes: number;
  readonly layers: readonly LayerDescription[];
}

/** The runs of the delta layers, oldest first. */
export function deltaRuns(layers: readonly LayerDescription[]): LayerRun[] {
  return runsOf(layers, 'delta');
}

/** The same of image layers: what an import made. A merge can take them as if they were deltas of one LSN. */
export function imageRuns(layers: readonly LayerDescription[]): LayerRun[] {
  return runsOf(layers, 'image');
}

function runsOf(layers: readonly LayerDescription[], kind: LayerKind): LayerRun[] {
  const runs = new Map<Lsn, LayerDescription[]>();
  for (const layer of layers) {
    if (layer.kind !== kind) continue;
    const run = runs.get(layer.lsnStart);
    if (run === undefined) runs.set(layer.lsnStart, [layer]);
    else run.push(layer);
  }
  return [...runs.values()]
    .map((run) => ({
      lsnStart: run[0]!.lsnStart,
      lsnEnd: run[0]!.lsnEnd,
      sizeBytes: run.reduce((sum, layer) => sum + layer.sizeBytes, 0),
      layers: run,
    }))
    .sort((a, b) => a.lsnStart - b.lsnStart);
}

/** The runs to merge into one, oldest first; undefined when reads are cheap enough as it is. */
export function planMerge(runs: readonly LayerRun[]): readonly LayerRun[] | undefined {
  let newerBytes = 0;
  let first = runs.length;
  for (let i = runs.length - 1; i >= 0; i--) {
    const sizeBytes = Math.max(runs[i]!.sizeBytes, RUN_BYTES_MIN);
    if (sizeBytes <= newerBytes) first = i;
    newerBytes += sizeBytes;
  }
  return runs.length - first >= RUNS_TO_MERGE ? runs.slice(first) : undefined;
}

/** How many runs there can be when nothing is left to merge. */
export function runCountMax(deltaBytes: number): number {
  return RUNS_TO_MERGE + Math.ceil(Math.log2(Math.max(1, deltaBytes / RUN_BYTES_MIN)));
}
