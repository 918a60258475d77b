/**
 * A timeline's lineage: its own history, and those that it inherits with the LSN up to which it does, nearest first.
 *
 * Branches may be nested by the thousand, and a page that is inherited may come from any of them. So that a read does not look into each, a
 * long lineage carries filters (layers/key-filter.ts) of the keys that each ancestor has, and one for each GROUP_SIZE ancestors together:
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
const GROUP_SIZE = 16;
/** An ancestor of more keys gets no filter, and is always looked into. */
const KEYS_MAX = 200_000;
const ENTRY_BYTES_MIN = 32;
const FILTERS_KEPT_MAX = 64;

export interface Ancestor {
  readonly history: History;
  /** The LSN up to which it counts. */
  readonly endLsn: Lsn;
}

/** `ancestors` are nearest first. */
export function makeLineage(own: History, ancestors: readonly Ancestor[]): LineageStep[] {
  const steps: LineageStep[] = [{ history: own, endLsn: Infinity }];
  // A timeline that has nothing up to the branch point, and never will, need not be visited.
  const hasValues = ({ history, endLsn }: Ancestor): boolean =>
    history.lastRecordLsn < endLsn || oldestValueLsn(history) <= endLsn;
  if (ancestors.length < FILTERED_FROM) return [...steps, ...ancestors.filter(hasValues)];
  for (let i = 0; i < ancestors.length;) {
    const depth = ancestors.length - 1 - i;
    const isWhole = depth % GROUP_SIZE === GROUP_SIZE - 1;
    const group = ancestors.slice(i, i + (isWhole ? GROUP_SIZE : 1));
    const members = group.filter(hasValues);
    const first = steps.length;
    for (const member of members) {
      const filter = filterOf(member.history, member.endLsn, [member], 'own');
      steps.push({ ...member, ...(filter === undefined ? {} : { filter }) });
    }
    if (members.length > 1) {
      const filter = filterOf(group[0]!.history, group[0]!.endLsn, members, 'group');
      if (filter !== undefined) steps[first] = { ...steps[first]!, group: { filter, next: steps.length } };
    }
    i += group.length;
  }
  return steps;
}

function oldestValueLsn({ memoryLayers, layerMap }: History): Lsn {
  const oldest = memoryLayers.findLast((layer) => !layer.isEmpty);
  return Math.min(layerMap.oldestLsn, oldest?.lsnStart ?? Infinity);
}

/** Filters that were made, by the history that they are of (for a group: of its nearest member) and where that ends. */
const made = { own: new WeakMap<History, Map<Lsn, KeyFilter>>(), group: new WeakMap<History, Map<Lsn, KeyFilter>>() };

function filterOf(
  history: History,
  endLsn: Lsn,
  members: readonly Ancestor[],
  kind: keyof typeof made,
): KeyFilter | undefined {
  let filters = made[kind].get(history);
  const known = filters?.get(endLsn);
  if (known !== undefined) return known;
  const filter = makeFilter(members);
  if (filter === undefined) return undefined;
  if (filters === undefined || filters.size >= FILTERS_KEPT_MAX) made[kind].set(history, (filters = new Map()));
  filters.set(endLsn, filter);
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
