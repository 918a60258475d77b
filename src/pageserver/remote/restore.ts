/**
 * Brings to the object store again what it has lost (a disk that died, a bucket that was emptied, a copy of before): from the local disk where that has it with the
 * bytes that were uploaded, else from WAL.
 *
 * What is lost is found by comparing with the newest index that the store had acknowledged, of which the timeline's folder has a copy (kept-index.ts). It is looked for
 * after each start, by one list; when a layer is about to be evicted, as its file may be the last copy; and when scrub says so.
 */

import { setTimeout as sleep } from 'node:timers/promises';
import type { LostObject } from '../../api/pageserver.ts';
import type { Logger } from '../../base/log.ts';
import type { ObjectStore } from '../../object-store/object-store.ts';
import { LayerAbsentError } from '../layers/block.ts';
import { layerPath } from '../layers/layer-format.ts';
import type { Repair } from '../whole-reads.ts';
import type { Remote } from './remote.ts';
import { objectNameOf } from './remote-index.ts';
import { listIndexes, ORPHAN_AGE_MS } from './timeline-objects.ts';
import type { UploadedTimeline } from './timeline-upload.ts';

export interface RestoreOptions {
  readonly remote: Remote;
  /** Makes a layer anew. */
  readonly repair: Repair;
  readonly log: Logger;
}

const RETRY_MS = 1_000;

/** `damaged`: names of objects of which it is known that they cannot be used. What is lost for good is told; the rest is uploaded soon. Throws what the store throws. */
export async function restoreTimeline(
  { remote, repair, log }: RestoreOptions,
  timeline: UploadedTimeline,
  damaged: ReadonlySet<string> = new Set(),
): Promise<LostObject[]> {
  const { againCount, lost } = await remote.findLoss(timeline, damaged);
  const { timelineId } = timeline;
  if (againCount > 0) {
    log.warn({ timelineId, count: againCount }, 'the object store has lost objects: they are uploaded again');
  }
  const gone: LostObject[] = [];
  for (const layer of lost) {
    const name = objectNameOf(timeline.index, layer);
    await repair(new LayerAbsentError(layerPath(timeline.directory, layer.description))).catch((error: unknown) => {
      gone.push({ name, reason: error instanceof Error ? error.message : String(error) });
    });
  }
  if (gone.length > 0) {
    log.error({ timelineId, count: gone.length, ...gone[0] }, 'objects are lost: nothing else has what was in them');
  }
  return gone;
}

/** What fails here is of no importance: it takes space. */
async function removeUnfinished({ store, log }: StartLook): Promise<void> {
  try {
    const count = await store.removeUnfinished(ORPHAN_AGE_MS);
    if (count > 0) log.info({ count }, 'uploads that never ended were removed from the object store');
  } catch (error) {
    log.warn({ err: error }, 'uploads that never ended cannot be removed from the object store');
  }
}

export interface StartLook extends RestoreOptions {
  readonly store: ObjectStore;
  readonly timelines: () => Iterable<UploadedTimeline>;
}

/**
 * After a start: restores each timeline whose newest index the store does not have, and removes what uploads that died long ago have left there. Resolves to whether
 * that was done before the remote was closed or stale.
 */
export async function restoreAtStart(options: StartLook): Promise<boolean> {
  const { remote, store, timelines, log } = options;
  let isFailing = false;
  while (!remote.isOver) {
    try {
      const found = await listIndexes(store);
      for (const timeline of timelines()) {
        if (remote.isOver) return false;
        const name = await remote.storedIndexName(timeline);
        if (name === undefined) continue;
        const isThere = found.get(timeline.timelineId)?.some((index) => index.name === name) === true;
        if (!isThere) await restoreTimeline(options, timeline);
      }
      await removeUnfinished(options);
      return true;
    } catch (error) {
      if (remote.isOver) return false;
      if (!isFailing) {
        log.warn({ err: error }, 'whether the object store is complete cannot be seen yet; it is tried again');
      }
      isFailing = true;
      await sleep(RETRY_MS, undefined, { ref: false });
    }
  }
  return false;
}
