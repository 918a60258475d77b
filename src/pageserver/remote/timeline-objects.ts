/**
 * What the object store has of timelines: which there are, the newest index of each, and which objects nobody needs.
 *
 * The newest index is the one of the highest generation, then of the highest sequence. A damaged newest index is an error, never a reason to take
 * the one before: that may name what was deleted since.
 */

import { listAll } from '../../object-store/object-store.ts';
import type { ListedObject, ObjectStore } from '../../object-store/object-store.ts';
import type { KnownGeneration } from './generation.ts';
import {
  compareIndexes,
  INDEXES_PREFIX,
  indexesOf,
  indexObjectName,
  layersOf,
  parseIndexName,
  parseLayerName,
} from './object-names.ts';
import type { IndexName, LayerName } from './object-names.ts';
import { decodeRemoteIndex, objectNameOf } from './remote-index.ts';
import type { RemoteIndex } from './remote-index.ts';

export interface IndexObject extends IndexName, ListedObject {}

export interface LayerObject extends LayerName, ListedObject {}

/** All objects of one timeline. */
export interface TimelineObjects {
  readonly tenantId: string;
  readonly timelineId: string;
  /** Oldest first. */
  readonly indexes: readonly IndexObject[];
  readonly layers: readonly LayerObject[];
  /** Names under the timeline's that are no layer's. */
  readonly unknown: readonly ListedObject[];
}

/** How long what may still be on its way to be named is left alone. */
export const ORPHAN_AGE_MS = 24 * 60 * 60_000;
/** How long a tombstone stays, against indexes that a stale pageserver may still write. */
export const TOMBSTONE_AGE_MS = 7 * 24 * 60 * 60_000;

/** All timelines that the store has an index of, each with all its indexes, oldest first; of one tenant, or of all. */
export async function listIndexes(store: ObjectStore, tenantId?: string): Promise<Map<string, IndexObject[]>> {
  const found = new Map<string, IndexObject[]>();
  const prefix = tenantId === undefined ? INDEXES_PREFIX : `${INDEXES_PREFIX}${tenantId}/`;
  for await (const object of listAll(store, prefix)) {
    const name = parseIndexName(object.name);
    if (name === undefined) continue;
    const indexes = found.get(name.timelineId);
    if (indexes === undefined) found.set(name.timelineId, [{ ...name, ...object }]);
    else indexes.push({ ...name, ...object });
  }
  for (const indexes of found.values()) indexes.sort(compareIndexes);
  return found;
}

/** The timeline's indexes, in no order. */
export async function indexesInStore(store: ObjectStore, tenantId: string, timelineId: string): Promise<IndexObject[]> {
  const indexes: IndexObject[] = [];
  for await (const object of listAll(store, indexesOf(tenantId, timelineId))) {
    const name = parseIndexName(object.name);
    if (name !== undefined) indexes.push({ ...name, ...object });
  }
  return indexes;
}

/** Everything that the store has under the timeline's names. */
export async function listTimelineObjects(
  store: ObjectStore,
  tenantId: string,
  timelineId: string,
): Promise<TimelineObjects> {
  const indexes: IndexObject[] = [];
  const layers: LayerObject[] = [];
  const unknown: ListedObject[] = [];
  for await (const object of listAll(store, indexesOf(tenantId, timelineId))) {
    const name = parseIndexName(object.name);
    if (name === undefined) unknown.push(object);
    else indexes.push({ ...name, ...object });
  }
  for await (const object of listAll(store, layersOf(tenantId, timelineId))) {
    const name = parseLayerName(object.name);
    if (name === undefined) unknown.push(object);
    else layers.push({ ...name, ...object });
  }
  indexes.sort(compareIndexes);
  return { tenantId, timelineId, indexes, layers, unknown };
}

/** The newest of the timeline's indexes, or, for a pageserver of a generation, the newest that is not of a later one. */
export function newestIndex<Index extends IndexName>(
  indexes: readonly Index[],
  generationMax = Infinity,
): Index | undefined {
  let newest: Index | undefined;
  for (const index of indexes) {
    if (index.generation > generationMax) continue;
    if (newest === undefined || compareIndexes(newest, index) < 0) newest = index;
  }
  return newest;
}

/** Throws `internal` when the object is damaged, or what the store throws. */
export async function readIndex(store: ObjectStore, name: IndexName): Promise<RemoteIndex> {
  const objectName = indexObjectName(name);
  return decodeRemoteIndex(await store.get(objectName), objectName);
}

/**
 * The objects that the newest index of their timeline does not name and that nobody can be about to name: of generations below the latest, or older
 * than a day. Listed before that index was read. `newest` is undefined when the timeline has no index at all. None when it is of a generation before `since`: the
 * latest pageserver may still go by an older one (generation.ts).
 */
export function orphansOf(
  objects: TimelineObjects,
  newest: RemoteIndex | undefined,
  { generation, since }: KnownGeneration,
  nowMs: number,
): ListedObject[] {
  if (newest !== undefined && newest.generation < since && !newest.timeline.isDeleted) return [];
  const isOver = (layer: LayerName & ListedObject): boolean =>
    layer.generation < generation || nowMs - layer.modifiedMs > ORPHAN_AGE_MS;
  const named = new Set(newest?.layers.map((layer) => objectNameOf(newest.timeline, layer)));
  const orphans: ListedObject[] = objects.layers.filter((layer) => !named.has(layer.name) && isOver(layer));
  if (newest === undefined) return orphans;
  // Older indexes go after what they name.
  orphans.push(...objects.indexes.filter((index) => compareIndexes(index, newest) < 0));
  if (!newest.timeline.isDeleted || orphans.length > 0 || objects.layers.length > 0) return orphans;
  const tombstone = objects.indexes.find((index) => compareIndexes(index, newest) === 0);
  if (tombstone !== undefined && nowMs - tombstone.modifiedMs > TOMBSTONE_AGE_MS) orphans.push(tombstone);
  return orphans;
}
