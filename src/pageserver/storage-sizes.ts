/** What a timeline takes and shares, in bytes: for people who wonder what their branches cost. */

import type { TimelineSizes } from '../api/pageserver.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { KEY_KIND, prefixRange } from './key.ts';
import { KeyFilter, firstHash, secondHash } from './layers/key-filter.ts';
import type { Timeline } from './timeline.ts';

const BLOCKS = prefixRange(KEY_KIND.relationBlock);
/** Beyond it a branch counts as having changed everything. */
const CHANGED_BLOCKS_MAX = 2_000_000;

export function sizesOf(timeline: Timeline, childCount: number): TimelineSizes {
  let logicalBytes = 0;
  for (const [, size] of timeline.scan(prefixRange(KEY_KIND.relationSize), timeline.lastRecordLsn)) {
    logicalBytes += size.readUInt32LE(0) * BLOCK_SIZE;
  }
  const layerBytes = timeline.index.layers.reduce((sum, layer) => sum + layer.sizeBytes, 0);
  const changedBytes = timeline.ancestor === undefined ? logicalBytes : changedBlocks(timeline) * BLOCK_SIZE;
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

/** How many blocks have a value of the timeline's own, nearly enough. */
function changedBlocks(timeline: Timeline): number {
  const sources = [...timeline.memoryLayers, ...timeline.layerMap.overlapping(BLOCKS, Infinity)];
  let entryCount = 0;
  for (const source of sources) source.forEachKey(BLOCKS, () => entryCount++);
  if (entryCount > CHANGED_BLOCKS_MAX) return CHANGED_BLOCKS_MAX;
  const seen = new KeyFilter(entryCount);
  let count = 0;
  for (const source of sources) {
    source.forEachKey(BLOCKS, (key) => {
      if (seen.mayHave(firstHash(key), secondHash(key))) return;
      seen.add(key);
      count++;
    });
  }
  return count;
}
