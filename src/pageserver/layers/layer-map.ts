/**
 * Which layers of a timeline a read has to look into.
 *
 * Layers with the same LSN range form a *run*: their key ranges do not overlap, so a key is in at most one of them, which binary search
 * finds. Runs of deltas and runs of images are kept apart, each newest first. A read at LSN L of a key
 *   1. finds the newest image layer at or below L that covers the key: its LSN is the floor;
 *   2. visits the delta layers that cover the key and have LSNs in (floor, L], newest first, until a value needs nothing older;
 *   3. ends in the image layer.
 * That costs a few comparisons for each run between L and the floor, whatever the number of layers below it.
 *
 * Invariant: of the delta layers that cover one key, no two have overlapping LSN ranges. Image layers may lie anywhere.
 */

import assert from 'node:assert/strict';
import type { Lsn } from '../../postgres/lsn.ts';
import { compareKeys } from '../key.ts';
import type { Key, KeyRange } from '../key.ts';
import type { Chain } from './chain.ts';
import type { LayerFile } from './layer-file.ts';

interface Run {
  readonly lsnStart: Lsn;
  readonly lsnEnd: Lsn;
  /** By key. */
  readonly layers: LayerFile[];
}

export class LayerMap {
  /** By descending end, then start. */
  readonly #deltas: Run[] = [];
  readonly #images: Run[] = [];
  #minStarts: Float64Array | undefined;
  #count = 0;
  #changeCount = 0;

  /** How many layers there are. */
  get count(): number {
    return this.#count;
  }

  /** Rises with each layer that comes or goes. */
  get changeCount(): number {
    return this.#changeCount;
  }

  /** The first LSN of any layer; Infinity when there is none. */
  get oldestLsn(): Lsn {
    return Math.min(this.#deltaMinStarts.at(-1) ?? Infinity, this.#images.at(-1)?.lsnStart ?? Infinity);
  }

  insert(layer: LayerFile): void {
    const { kind, lsnStart, lsnEnd, keyStart } = layer.description;
    const runs = kind === 'image' ? this.#images : this.#deltas;
    let at = firstRun(runs, (run) => run.lsnEnd < lsnEnd || (run.lsnEnd === lsnEnd && run.lsnStart <= lsnStart));
    // Layers of one LSN range may overlap in keys when they come from an import of many parts: those go to another run.
    for (; runs[at]?.lsnStart === lsnStart && runs[at]?.lsnEnd === lsnEnd; at++) {
      const { layers } = runs[at]!;
      const place = layersBelow(layers, keyStart);
      const before = layers[place - 1];
      const after = layers[place];
      const fits =
        (before === undefined || compareKeys(before.description.keyEnd, keyStart) <= 0) &&
        (after === undefined || compareKeys(layer.description.keyEnd, after.description.keyStart) <= 0);
      if (!fits) continue;
      layers.splice(place, 0, layer);
      this.#changed(1);
      return;
    }
    runs.splice(at, 0, { lsnStart, lsnEnd, layers: [layer] });
    this.#changed(1);
  }

  remove(layer: LayerFile): void {
    const runs = layer.description.kind === 'image' ? this.#images : this.#deltas;
    const at = runs.findIndex((run) => run.layers.includes(layer));
    assert(at >= 0, 'a layer that is removed is in the map');
    const { layers } = runs[at]!;
    layers.splice(layers.indexOf(layer), 1);
    if (layers.length === 0) runs.splice(at, 1);
    this.#changed(-1);
  }

  /** As ValueSource.collect, over all layers. */
  collect(key: Key, lsn: Lsn, floor: Lsn, chain: Chain): boolean {
    const image = this.#imageAtOrBelow(key, lsn, floor);
    const deltaFloor = image === undefined ? floor : image.description.lsnStart;
    const deltas = this.#deltas;
    for (let i = firstAtOrBelow(this.#deltaMinStarts, lsn); i < deltas.length; i++) {
      const run = deltas[i]!;
      if (run.lsnEnd <= deltaFloor + 1) break;
      if (run.lsnStart > lsn) continue;
      const layer = covering(run, key);
      if (layer === undefined || !layer.collect(key, lsn, deltaFloor, chain)) continue;
      if (chain.end !== 'floor' || image === undefined) return true;
      chain.end = undefined; // It was the image's LSN, not the caller's floor.
      break;
    }
    if (image === undefined) return false;
    if (!image.collect(key, lsn, floor, chain)) chain.end = 'absent';
    return true;
  }

  /** All layers that have keys of the range and LSNs at or below `lsn`. */
  overlapping(range: KeyRange, lsn: Lsn): LayerFile[] {
    const found: LayerFile[] = [];
    for (const runs of [this.#deltas, this.#images]) {
      for (const run of runs) {
        if (run.lsnStart > lsn) continue;
        for (let i = Math.max(0, layersBelow(run.layers, range.start) - 1); i < run.layers.length; i++) {
          const { keyStart, keyEnd } = run.layers[i]!.description;
          if (compareKeys(keyStart, range.end) >= 0) break;
          if (compareKeys(keyEnd, range.start) > 0) found.push(run.layers[i]!);
        }
      }
    }
    return found;
  }

  /** The delta layers that may have values with `floor < LSN <= lsn`, each run by key. Image layers do not say when something changed. */
  runsWithin(floor: Lsn, lsn: Lsn): (readonly LayerFile[])[] {
    return this.#deltas.filter((run) => run.lsnStart <= lsn && run.lsnEnd > floor + 1).map((run) => [...run.layers]);
  }

  *all(): Generator<LayerFile> {
    for (const runs of [this.#deltas, this.#images]) for (const run of runs) yield* run.layers;
  }

  /** The newest image layer with an LSN in (floor, lsn] that covers the key. */
  #imageAtOrBelow(key: Key, lsn: Lsn, floor: Lsn): LayerFile | undefined {
    for (let i = firstRun(this.#images, (run) => run.lsnStart <= lsn); i < this.#images.length; i++) {
      const run = this.#images[i]!;
      if (run.lsnStart <= floor) return undefined;
      const layer = covering(run, key);
      if (layer !== undefined) return layer;
    }
    return undefined;
  }

  #changed(count: number): void {
    this.#count += count;
    this.#changeCount++;
    this.#minStarts = undefined;
  }

  /** At i: the lowest start of the delta runs 0 to i. Runs before the first that is at or below an LSN have nothing for it. */
  get #deltaMinStarts(): Float64Array {
    let minStart = Infinity;
    this.#minStarts ??= Float64Array.from(this.#deltas, (run) => (minStart = Math.min(minStart, run.lsnStart)));
    return this.#minStarts;
  }
}

/** The first place of an array that does not rise at which it is at or below `lsn`. */
function firstAtOrBelow(minStarts: Float64Array, lsn: Lsn): number {
  let low = 0;
  let high = minStarts.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (minStarts[middle]! <= lsn) high = middle;
    else low = middle + 1;
  }
  return low;
}

function covering(run: Run, key: Key): LayerFile | undefined {
  const { layers } = run;
  let at: number;
  if (layers.length === 1) at = 0;
  else {
    at = layersBelow(layers, key);
    if (at === layers.length || compareKeys(layers[at]!.description.keyStart, key) !== 0) at--;
    if (at < 0) return undefined;
  }
  const { keyStart, keyEnd } = layers[at]!.description;
  return compareKeys(keyStart, key) <= 0 && compareKeys(key, keyEnd) < 0 ? layers[at] : undefined;
}

/** How many layers begin below `key`. */
function layersBelow(layers: readonly LayerFile[], key: Key): number {
  let low = 0;
  let high = layers.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (compareKeys(layers[middle]!.description.keyStart, key) < 0) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The first run for which the condition holds; it holds for all after it. */
function firstRun(runs: readonly Run[], condition: (run: Run) => boolean): number {
  let low = 0;
  let high = runs.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (condition(runs[middle]!)) high = middle;
    else low = middle + 1;
  }
  return low;
}
