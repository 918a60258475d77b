/**
 * Keeps the layers on the local disk within a limit: those that were used the longest time ago, and that the object store has, are taken away. A read that needs
 * one again fetches it (repair.ts).
 *
 * What was used since the last look stays, whatever the limit: a read needs all of its layers at once. So does what a merge reads: nothing is evicted while one is under way.
 * The store is asked before a file goes, as it may be the last copy. A file that shares its bytes with the object store (a hard link) takes no space of its own, and stays.
 */

import { statSync, unlinkSync } from 'node:fs';
import type { Logger } from '../base/log.ts';
import type { LayerFile } from './layers/layer-file.ts';
import type { Remote } from './remote/remote.ts';
import type { Timeline } from './timeline.ts';
import type { Timelines } from './timelines.ts';

export interface EvictionOptions {
  readonly timelines: Timelines;
  readonly remote: Remote;
  readonly limitBytes: number;
  /** Told of a timeline of which the store has lost something. */
  readonly restore: (timeline: Timeline) => Promise<unknown>;
  readonly log: Logger;
  /** Between two looks. */
  readonly periodMs?: number;
}

const PERIOD_MS = 2_000;
/** Down to this part of the limit, so that not every period has something to do. */
const LOW_WATER = 0.9;

export class Eviction {
  readonly #options: EvictionOptions;
  #timer: NodeJS.Timeout | undefined;
  #running: Promise<void> | undefined;

  constructor(options: EvictionOptions) {
    this.#options = options;
  }

  start(): void {
    this.#timer = setInterval(() => {
      this.#running ??= this.run().finally(() => (this.#running = undefined));
    }, this.#options.periodMs ?? PERIOD_MS);
  }

  async stop(): Promise<void> {
    clearInterval(this.#timer);
    await this.#running;
  }

  /** Takes away what is too much, when no merge is under way. */
  async run(): Promise<void> {
    const { timelines, limitBytes, log } = this.#options;
    const tick = timelines.layerCache.tick++;
    if (this.#localBytes() <= limitBytes) return;
    await timelines.compaction.exclusively(async () => {
      let localBytes = this.#localBytes();
      let evictedBytes = 0;
      for (const { timeline, layer } of this.#candidates(tick)) {
        if (localBytes <= limitBytes * LOW_WATER) break;
        const bytes = localBytesOf(layer);
        if (!(await this.#evict(timeline, layer, tick))) continue;
        localBytes -= bytes;
        evictedBytes += bytes;
      }
      if (evictedBytes > 0) log.debug({ evictedBytes, localBytes }, 'layers were evicted');
    });
  }

  /** Of all layer files that are here. */
  #localBytes(): number {
    let bytes = 0;
    for (const timeline of this.#options.timelines.all()) {
      for (const layer of timeline.layerMap.all()) bytes += localBytesOf(layer);
    }
    return bytes;
  }

  /** Those used the longest time ago first. */
  #candidates(tick: number): { timeline: Timeline; layer: LayerFile }[] {
    const found: { timeline: Timeline; layer: LayerFile }[] = [];
    for (const timeline of this.#options.timelines.all()) {
      for (const layer of timeline.layerMap.all()) {
        if (localBytesOf(layer) > 0 && layer.usedAtTick < tick) found.push({ timeline, layer });
      }
    }
    return found.sort((a, b) => a.layer.usedAtTick - b.layer.usedAtTick);
  }

  /** False when the layer stays and takes space. */
  async #evict(timeline: Timeline, layer: LayerFile, tick: number): Promise<boolean> {
    const { remote, log } = this.#options;
    if (!remote.isStored(timeline, layer.description)) return false;
    try {
      if (layer.partial !== undefined) {
        layer.close();
        layer.partial.remove();
        layer.partial = undefined;
        return true;
      }
      layer.isShared = statSync(layer.path).nlink > 1;
      if (layer.isShared) return true;
      // It may be the last copy: a store can lose what it had.
      if (!(await remote.isThere(timeline, layer.description))) {
        await this.#options.restore(timeline);
        return false;
      }
      const isWanted = !layer.isLocal || layer.usedAtTick >= tick || timeline.findLayer(layer.path) !== layer;
      if (isWanted) return false;
      layer.close();
      unlinkSync(layer.path);
      layer.isLocal = false;
      return true;
    } catch (error) {
      log.warn({ file: layer.path, err: error }, 'a layer cannot be evicted');
      return false;
    }
  }
}

/** What the layer takes here. */
function localBytesOf(layer: LayerFile): number {
  if (layer.partial !== undefined) return layer.partial.presentBytes;
  return layer.isLocal && !layer.isShared ? layer.description.sizeBytes : 0;
}
