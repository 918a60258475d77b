/**
 * What timelines take and share, in bytes: for people who wonder what their branches cost.
 *
 * A timeline's logical size is that of its ancestor at the branch point and what its own history has done to sizes since, and what is its own is what changed since:
 * so the cost is that of the changes (changes.ts), and a branch that nobody has written to costs next to nothing, however many there are. What was
 * counted last of each timeline is kept, and counted on from. All of it works in slices, between which others do their work.
 */

import { setImmediate as yieldToOthers } from 'node:timers/promises';
import type { TimelineSizes } from '../api/pageserver.ts';
import { toStrataError } from '../base/errors.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { ChangeScan } from './changes.ts';
import { KEY_KIND, prefixRange } from './key.ts';
import type { Timeline } from './timeline.ts';

const SIZES = prefixRange(KEY_KIND.relationSize);
const SLICE_MS = 5;

interface Counted {
  readonly lsn: Lsn;
  readonly blocks: number;
}

export class StorageSizes {
  /** Of all relations, in blocks. */
  readonly #counted = new WeakMap<Timeline, Counted>();

  async of(timeline: Timeline, childCount: number): Promise<TimelineSizes> {
    const lsn = timeline.lastRecordLsn;
    const logicalBytes = (await this.#blocksAt(timeline, lsn)) * BLOCK_SIZE;
    const changedBytes =
      timeline.ancestor === undefined ? logicalBytes : (await changedBlocks(timeline, lsn)) * BLOCK_SIZE;
    const layerBytes = timeline.index.layers.reduce((sum, layer) => sum + layer.sizeBytes, 0);
    return {
      timelineId: timeline.timelineId,
      logicalBytes,
      historyBytes: layerBytes,
      memoryBytes: timeline.memoryBytes,
      sharedBytes: Math.max(0, logicalBytes - changedBytes),
      freedByDeletionBytes: childCount === 0 ? layerBytes : 0,
      childCount,
      oldestLsn: timeline.oldestLsn,
      ...(timeline.horizon === undefined ? {} : { oldestTimeMs: timeline.horizon.timeMs }),
      retainedLsns: timeline.retainedLsns().length,
    };
  }

  /** Without recursion: ancestors may be thousands. */
  async #blocksAt(timeline: Timeline, atLsn: Lsn): Promise<number> {
    const path: { timeline: Timeline; lsn: Lsn }[] = [];
    let blocks: number | undefined;
    let next: Timeline | undefined = timeline;
    let lsn = atLsn;
    for (; next !== undefined && blocks === undefined; next = next.ancestor) {
      // After a start an ancestor may not have ingested all again that is inherited from it.
      lsn = Math.min(lsn, next.lastRecordLsn);
      blocks = await this.#countOn(next, lsn);
      if (blocks === undefined) path.push({ timeline: next, lsn });
      lsn = next.index.startLsn;
    }
    for (const { timeline: each, lsn: end } of path.reverse()) {
      blocks =
        blocks === undefined
          ? await countAll(each, end)
          : blocks + (await growth(each, Math.min(each.index.startLsn, end), end));
      this.#counted.set(each, { lsn: end, blocks });
    }
    return blocks ?? 0;
  }

  /** From what was counted before; undefined when nothing was, or it is no longer kept. */
  async #countOn(timeline: Timeline, lsn: Lsn): Promise<number | undefined> {
    const counted = this.#counted.get(timeline);
    if (counted === undefined || counted.lsn === lsn) return counted?.blocks;
    try {
      const blocks =
        counted.lsn < lsn
          ? counted.blocks + (await growth(timeline, counted.lsn, lsn))
          : counted.blocks - (await growth(timeline, lsn, counted.lsn));
      this.#counted.set(timeline, { lsn, blocks });
      return blocks;
    } catch (error) {
      if (toStrataError(error).code === 'history-gone') return undefined;
      throw error;
    }
  }
}

/** By how many blocks all relations together have grown. */
async function growth(timeline: Timeline, fromLsn: Lsn, toLsn: Lsn): Promise<number> {
  if (fromLsn === toLsn) return 0;
  const scan = new ChangeScan(timeline, { fromLsn, toLsn, sliceMs: SLICE_MS });
  let blocks = 0;
  for (let size = await scan.nextSize(); size !== undefined; size = await scan.nextSize()) {
    blocks += (size.after ?? 0) - (size.before ?? 0);
  }
  return blocks;
}

/** Of a timeline of which nothing is known. */
async function countAll(timeline: Timeline, lsn: Lsn): Promise<number> {
  let blocks = 0;
  let sliceStartMs = performance.now();
  for (const key of timeline.keys(SIZES, lsn)) {
    blocks += timeline.getImage(key, lsn)?.readUInt32LE(0) ?? 0;
    if (performance.now() - sliceStartMs < SLICE_MS) continue;
    await yieldToOthers();
    sliceStartMs = performance.now();
  }
  return blocks;
}

/** How many blocks are not the ancestor's. */
async function changedBlocks(timeline: Timeline, lsn: Lsn): Promise<number> {
  const { startLsn } = timeline.index;
  if (lsn === startLsn) return 0;
  const scan = new ChangeScan(timeline, { fromLsn: startLsn, toLsn: lsn, sliceMs: SLICE_MS });
  let blocks = 0;
  for (let piece = await scan.next(); piece !== undefined; piece = await scan.next()) {
    for (const [start, end] of piece.ranges) blocks += end - start;
  }
  return blocks;
}
