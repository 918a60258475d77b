/**
 * A timeline's lineage: its own history, and those that it inherits with the LSN up to which it does, nearest first.
 *
 * Branches may be nested by the thousand, and a page that is inherited may come from any of them. So that a read does not look into each, a
 * long lineage carries filters (layers/key-filter.ts) of the keys that each ancestor has, and one for each 4, 16, 64 and 256 ancestors together:
 * a read asks the groups' filters and then looks only where the key may be. Groups are counted from the root, so that nearly all of
 * them are shared by all that descend from one ancestor; each is made once, from the keys of layers, when it is first needed.
 *
 * Invariant: a filter is made of a part of history that no longer changes: the ancestor has ingested all that is inherited from it. The
 * exception is the WAL index, of which ingest puts a piece again under the last record's LSN (timeline.ts): no filter is asked about it.
 */

import type { Lsn } from '../postgres/lsn.ts';
import { ALL_KEYS } from './key.ts';
import { KeyFilter } from './layers/key-filter.ts';
import type { History, LineageStep } from './read.ts';

/** From this many ancestors on, filters are worth their memory. */
const FILTERED_FROM = 8;
const GROUP_SIZES = [256, 64, 16, 4];
/** An ancestor of more keys gets no filter, and is always looked into. */
const KEYS_MAX = 200_000;
const ENTRY_BYTES_MIN = 32;
const FILTERS_KEPT_MAX = 64;
const NO_GROUPS: LineageStep['groups'] = [];

export interface Ancestor {
  readonly history: History;
  /** The LSN up to which it counts. */
  readonly endLsn: Lsn;
}

/** `ancestors` are nearest first. */
export function makeLineage(own: History, ancestors: readonly Ancestor[]): LineageStep[] {
  const steps: LineageStep[] = [{ history: own, endLsn: Infinity, filter: undefined, groups: NO_GROUPS }];
  // A timeline that has nothing up to the branch point, and never will, need not be visited.
  const hasValues = ({ history, endLsn }: Ancestor): boolean =>
    history.lastRecordLsn < endLsn || oldestValueLsn(history) <= endLsn;
  if (ancestors.length < FILTERED_FROM) {
    const inherited = ancestors.filter(hasValues);
    return [...steps, ...inherited.map((ancestor) => ({ ...ancestor, filter: undefined, groups: NO_GROUPS }))];
  }
  addSteps(steps, ancestors, ancestors.length, GROUP_SIZES, hasValues);
  return steps;
}

/** Adds steps for ancestors, of which the nearest is `depth` above (and with) the root; in groups of the first size and, in them, of the next. */
function addSteps(
  steps: LineageStep[],
  ancestors: readonly Ancestor[],
  depth: number,
  [size, ...smaller]: readonly number[],
  hasValues: (ancestor: Ancestor) => boolean,
): void {
  for (let i = 0; i < ancestors.length;) {
    const rest = depth - i;
    if (size === undefined) {
      const ancestor = ancestors[i++]!;
      if (!hasValues(ancestor)) continue;
      const { history, endLsn } = ancestor;
      steps.push({ history, endLsn, filter: filterOf([ancestor], 1), groups: NO_GROUPS });
      continue;
    }
    const isWhole = rest % size === 0;
    const members = ancestors.slice(i, i + (isWhole ? size : rest % size));
    const first = steps.length;
    addSteps(steps, members, rest, smaller, hasValues);
    if (isWhole && steps.length > first + 1) {
      const filter = filterOf(members, size);
      if (filter !== undefined) {
        const { history, endLsn, filter: own, groups } = steps[first]!;
        steps[first] = { history, endLsn, filter: own, groups: [{ filter, next: steps.length }, ...groups] };
      }
    }
    i += members.length;
  }
}

function oldestValueLsn({ memoryLayers, layerMap }: History): Lsn {
  const oldest = memoryLayers.findLast((layer) => !layer.isEmpty);
  return Math.min(layerMap.oldestLsn, oldest?.lsnStart ?? Infinity);
}

/** Filters that were made, by the history that they are of (for a group: of its nearest member), the size of the group, and where that ends. */
const made = new WeakMap<History, Map<string, KeyFilter>>();

/** Of all these ancestors together; undefined when there can be none. */
function filterOf(members: readonly Ancestor[], size: number): KeyFilter | undefined {
  const { history, endLsn } = members[0]!;
  const id = `${size} ${endLsn}`;
  let filters = made.get(history);
  const known = filters?.get(id);
  if (known !== undefined) return known;
  const filter = makeFilter(members);
  if (filter === undefined) return undefined;
  if (filters === undefined || filters.size >= FILTERS_KEPT_MAX) made.set(history, (filters = new Map()));
  filters.set(id, filter);
  return filter;
}

function makeFilter(members: readonly Ancestor[]): KeyFilter | undefined {
  const sources = [];
  let keyCountMax = 0;
  for (const { history, endLsn } of members) {
    if (history.lastRecordLsn < endLsn) return undefined;
    const layers = history.layerMap.overlapping(ALL_KEYS, endLsn);
    const memory = history.memoryLayers.filter((layer) => layer.lsnStart <= endLsn);
    for (const layer of layers) keyCountMax += layer.footer.entryCount;
    for (const layer of memory) keyCountMax += layer.sizeBytes / ENTRY_BYTES_MIN;
    sources.push(...layers, ...memory);
    if (keyCountMax > KEYS_MAX) return undefined;
  }
  let keyCount = 0;
  for (const source of sources) source.forEachKey(ALL_KEYS, () => keyCount++);
  const filter = new KeyFilter(keyCount);
  for (const source of sources) source.forEachKey(ALL_KEYS, (key) => filter.add(key));
  return filter;
}
