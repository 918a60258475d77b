/**
 * The part of scrub that is about offloaded WAL: every object is read, and must be what its name says under its checksum; and together the objects of a timeline must have
 * all WAL from the oldest LSN that may be read up to where the safekeepers saw it in the object store.
 *
 * A damaged or missing object can be had again while a safekeeper has that WAL on its disk: it is told to look again. Pages do not depend on it; what does is
 * making a damaged layer anew, and readers of old WAL.
 *
 * Objects are superseded and removed meanwhile: what seems wrong is looked at again under the newest list.
 */

import { setTimeout as sleep } from 'node:timers/promises';
import type { Finding } from '../api/scrub.ts';
import { SafekeeperClient, type SafekeeperEndpoint } from '../api/safekeeper.ts';
import type { TimelineWalStatus } from '../api/safekeeper-protocol.ts';
import { toStrataError } from '../base/errors.ts';
import { isObjectError, listAll, type ObjectStore } from '../object-store/object-store.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import {
  decodeOffloaded,
  OFFLOADED_PREFIX,
  type OffloadedName,
  offloadedPrefix,
  parseOffloadedName,
} from '../safekeeper/offloaded-segment.ts';

export interface WalScrubOptions {
  readonly store: ObjectStore;
  readonly safekeepers: readonly SafekeeperEndpoint[];
  readonly isWanted: (timelineId: string) => boolean;
  /** Where each timeline's log begins, unless it was made anew. */
  readonly startLsns: ReadonlyMap<string, Lsn>;
  /** Timelines whose logs were made anew, and may begin later than they do. */
  readonly rebuilt: ReadonlySet<string>;
  readonly onProgress: (objects: number, bytes: number) => void;
  readonly signal: AbortSignal;
}

export interface WalScrub {
  readonly findings: WalFinding[];
  objects: number;
  bytes: number;
}

/** What is wrong with the WAL of `[fromLsn, endLsn)`. */
export interface WalFinding extends Finding {
  readonly tenantId: string;
  readonly fromLsn: Lsn;
  readonly endLsn: Lsn;
  /** The object is there, and damaged. */
  readonly isDamaged: boolean;
}

/** What safekeepers say of one timeline; none where none answers. */
type Statuses = readonly TimelineWalStatus[];

const RESTORE_MS = 90_000;
const LOOK_MS = 500;
const ATTEMPTS = 3;

export async function scrubWal(options: WalScrubOptions): Promise<WalScrub> {
  const { store, isWanted, onProgress, signal } = options;
  const result: WalScrub = { findings: [], objects: 0, bytes: 0 };
  const known = await statusesOf(options);
  const tenants = new Map<string, string>();
  for (const [timelineId, [status]] of known) tenants.set(timelineId, status!.tenantId);
  for await (const { name } of listAll(store, OFFLOADED_PREFIX)) {
    const [, tenantId, timelineId] = name.split('/');
    if (tenantId !== undefined && timelineId !== undefined) tenants.set(timelineId, tenantId);
  }
  for (const [timelineId, tenantId] of tenants) {
    if (!isWanted(timelineId)) continue;
    for (const object of await objectsOf(store, tenantId, timelineId)) {
      signal.throwIfAborted();
      const found = await look(store, tenantId, timelineId, object, result);
      if (found !== undefined) result.findings.push(found);
      onProgress(result.objects, result.bytes);
    }
    if (
      holesIn(options, timelineId, known.get(timelineId) ?? [], await objectsOf(store, tenantId, timelineId)).length ===
      0
    )
      continue;
    result.findings.push(...(await holesOf(options, tenantId, timelineId)));
  }
  return result;
}

/** Has safekeepers offload again what was found wrong, where they have it; resolves to what is right then. */
export async function restoreWal(options: WalScrubOptions, findings: readonly WalFinding[]): Promise<WalFinding[]> {
  const { store, safekeepers, signal } = options;
  const wanted: WalFinding[] = [];
  const known = findings.length === 0 ? new Map<string, Statuses>() : await statusesOf(options);
  for (const finding of findings) {
    const has = ({ localStartLsn }: TimelineWalStatus): boolean => localStartLsn <= finding.fromLsn;
    if (!(known.get(finding.timelineId) ?? []).some(has)) continue;
    if (finding.isDamaged) await store.delete(finding.name);
    wanted.push(finding);
  }
  for (const { tenantId, timelineId } of wanted) {
    for (const endpoint of safekeepers) {
      const client = new SafekeeperClient(endpoint);
      await client.offloadAgain(tenantId, timelineId).catch(() => {}); // One of them is enough.
      client.close();
    }
  }
  const restored: WalFinding[] = [];
  const deadline = performance.now() + RESTORE_MS;
  for (const finding of wanted) {
    const { tenantId, timelineId, fromLsn, endLsn } = finding;
    for (;;) {
      const left = uncovered(await objectsOf(store, tenantId, timelineId), fromLsn, endLsn);
      if (left.length === 0) restored.push(finding);
      if (left.length === 0 || performance.now() > deadline) break;
      await sleep(LOOK_MS, undefined, { signal });
    }
  }
  return restored;
}

/** By timeline. */
async function statusesOf({ safekeepers }: WalScrubOptions): Promise<Map<string, Statuses>> {
  const found = new Map<string, TimelineWalStatus[]>();
  for (const endpoint of safekeepers) {
    const client = new SafekeeperClient(endpoint);
    const statuses = await client.walStatus().catch(() => []);
    client.close();
    for (const status of statuses.filter(({ damage }) => damage === undefined))
      found.set(status.timelineId, [...(found.get(status.timelineId) ?? []), status]);
  }
  return found;
}

async function objectsOf(store: ObjectStore, tenantId: string, timelineId: string): Promise<OffloadedName[]> {
  const found: OffloadedName[] = [];
  for await (const { name } of listAll(store, offloadedPrefix(tenantId, timelineId))) {
    const parsed = parseOffloadedName(name);
    if (parsed !== undefined) found.push(parsed);
  }
  return found;
}

async function look(
  store: ObjectStore,
  tenantId: string,
  timelineId: string,
  { name, fromLsn, endLsn }: OffloadedName,
  result: WalScrub,
): Promise<WalFinding | undefined> {
  try {
    const bytes = await store.get(name);
    result.objects++;
    result.bytes += bytes.length;
    await decodeOffloaded(name, bytes);
    return undefined;
  } catch (error) {
    if (isObjectError(error, 'not-found')) return undefined; // It was superseded, or its hole is seen.
    if (isObjectError(error, 'transient') || isObjectError(error, 'denied')) throw error;
    const reason = toStrataError(error).message;
    const place = { where: 'object store', name, offset: 0, reason } as const;
    return { ...place, timelineId, tenantId, fromLsn, endLsn, isDamaged: true };
  }
}

/** Looked for again when there seem to be some: what nobody needs is removed meanwhile. */
async function holesOf(options: WalScrubOptions, tenantId: string, timelineId: string): Promise<WalFinding[]> {
  let holes: { fromLsn: Lsn; endLsn: Lsn }[] = [];
  for (let attempt = 1; attempt <= ATTEMPTS; attempt++) {
    const statuses = (await statusesOf(options)).get(timelineId) ?? [];
    holes = holesIn(options, timelineId, statuses, await objectsOf(options.store, tenantId, timelineId));
    if (holes.length === 0) return [];
  }
  return holes.map((hole) => {
    const reason = `no object has the WAL from ${formatLsn(hole.fromLsn)} to ${formatLsn(hole.endLsn)}`;
    const name = offloadedPrefix(tenantId, timelineId);
    return { where: 'object store', name, offset: 0, reason, ...hole, timelineId, tenantId, isDamaged: false };
  });
}

function holesIn(
  { startLsns, rebuilt }: WalScrubOptions,
  timelineId: string,
  statuses: Statuses,
  objects: readonly OffloadedName[],
): { fromLsn: Lsn; endLsn: Lsn }[] {
  const offloadedLsn = Math.max(0, ...statuses.map((status) => status.offloadedLsn));
  const oldestLsns = statuses.flatMap(({ feedback }) => (feedback === undefined ? [] : [feedback.oldestLsn]));
  const startLsn = startLsns.get(timelineId);
  // A log that was made anew may begin later; and without feedback nobody says what was removed because nobody needs it.
  const isBeginKnown = startLsn !== undefined && oldestLsns.length > 0 && !rebuilt.has(timelineId);
  const firstLsn = Math.min(offloadedLsn, ...objects.map(({ fromLsn }) => fromLsn));
  return uncovered(objects, isBeginKnown ? Math.max(startLsn, ...oldestLsns) : firstLsn, offloadedLsn);
}

/** The parts of `[fromLsn, endLsn)` that no object has. */
export function uncovered(
  objects: readonly Pick<OffloadedName, 'fromLsn' | 'endLsn'>[],
  fromLsn: Lsn,
  endLsn: Lsn,
): { fromLsn: Lsn; endLsn: Lsn }[] {
  const holes: { fromLsn: Lsn; endLsn: Lsn }[] = [];
  let at = fromLsn;
  for (const object of [...objects].sort((a, b) => a.fromLsn - b.fromLsn)) {
    if (object.fromLsn >= endLsn) break;
    if (object.fromLsn > at) holes.push({ fromLsn: at, endLsn: object.fromLsn });
    at = Math.max(at, object.endLsn);
  }
  if (at < endLsn) holes.push({ fromLsn: at, endLsn });
  return holes;
}
