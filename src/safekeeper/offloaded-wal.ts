/** The WAL of all timelines in the object store, for who reads what is not on the disk any more. A few segments stay in memory. */
import { StrataError } from '../base/errors.ts';
import type { TimelineIdentity } from '../api/safekeeper.ts';
import { isObjectError, listAll, type ObjectStore } from '../object-store/object-store.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import {
  OFFLOADED_PREFIX,
  decodeOffloaded,
  offloadedName,
  type OffloadedName,
  offloadedPrefix,
  type OffloadedSegment,
  encodeOffloaded,
  parseOffloadedName,
  segmentPrefix,
} from './offloaded-segment.ts';

type Ids = Pick<TimelineIdentity, 'tenantId' | 'timelineId'>;

const CACHED_SEGMENTS = 3;
/** Sorts behind all names of a timeline's objects. */
const AFTER_NAMES = '~';
/** A name that was just listed may be superseded and removed before it is read. */
const FIND_ATTEMPTS = 3;

export class OffloadedWal {
  readonly #store: ObjectStore;
  /** By name, the one used last at the end. */
  readonly #cache = new Map<string, Promise<OffloadedSegment>>();

  constructor(store: ObjectStore) {
    this.#store = store;
  }

  /** At least one byte from `lsn` on, at most up to `endLsn`; all within one segment. Throws `history-gone` when it is not there. */
  async read(timeline: Ids, lsn: Lsn, endLsn: Lsn): Promise<Buffer> {
    const segment = await this.find(timeline, lsn);
    if (segment === undefined) {
      throw new StrataError(
        'history-gone',
        `the WAL of timeline ${timeline.timelineId} at ${formatLsn(lsn)} has been removed: it is not kept for so long`,
      );
    }
    return segment.bytes.subarray(lsn - segment.fromLsn, Math.min(segment.endLsn, endLsn) - segment.fromLsn);
  }

  /** The object that holds the byte at `lsn` and most of what follows it. */
  async find({ tenantId, timelineId }: Ids, lsn: Lsn): Promise<OffloadedSegment | undefined> {
    const cached = [...this.#cache.keys()].find((name) => {
      const known = parseOffloadedName(name)!;
      return name.startsWith(offloadedPrefix(tenantId, timelineId)) && known.fromLsn <= lsn && lsn < known.endLsn;
    });
    if (cached !== undefined) return this.#get(cached);
    for (let attempt = 1; ; attempt++) {
      const best = longest((await this.#list(segmentPrefix(tenantId, timelineId, lsn))).filter(holds(lsn)));
      if (best === undefined) return undefined;
      try {
        return await this.#get(best.name);
      } catch (error) {
        if (!isObjectError(error, 'not-found') || attempt === FIND_ATTEMPTS) throw error;
      }
    }
  }

  /** Whether there is any WAL of the timeline. */
  async hasAny({ tenantId, timelineId }: Ids): Promise<boolean> {
    return (await this.#store.list(offloadedPrefix(tenantId, timelineId), { limit: 1 })).objects.length > 0;
  }

  /** Ids of the timelines of which there is any. A list's page may be of many; one that is larger than a page costs no second. */
  async timelineIds(): Promise<Set<string>> {
    const found = new Set<string>();
    for (let after = ''; ;) {
      const { objects, next } = await this.#store.list(OFFLOADED_PREFIX, after === '' ? {} : { after });
      for (const { name } of objects) {
        const [, tenantId = '', timelineId = ''] = name.split('/');
        found.add(timelineId);
        after = `${offloadedPrefix(tenantId, timelineId)}${AFTER_NAMES}`;
      }
      if (next === undefined) return found;
    }
  }

  /** All objects of a timeline, in order. */
  list({ tenantId, timelineId }: Ids): Promise<OffloadedName[]> {
    return this.#list(offloadedPrefix(tenantId, timelineId));
  }

  /** Whether one object has all of `[fromLsn, endLsn)`, which lies in one segment. */
  async covers({ tenantId, timelineId }: Ids, fromLsn: Lsn, endLsn: Lsn): Promise<boolean> {
    const names = await this.#list(segmentPrefix(tenantId, timelineId, fromLsn));
    return names.some((each) => each.fromLsn <= fromLsn && each.endLsn >= endLsn);
  }

  /** Durable when it resolves; what it supersedes is removed then. */
  async put(segment: OffloadedSegment): Promise<void> {
    await this.#store.put(offloadedName(segment), await encodeOffloaded(segment));
    await this.removeSuperseded(segment);
  }

  async removeSuperseded(segment: Ids & Pick<OffloadedSegment, 'fromLsn' | 'endLsn'>): Promise<void> {
    const { tenantId, timelineId, fromLsn, endLsn } = segment;
    const names = await this.#list(segmentPrefix(tenantId, timelineId, fromLsn));
    await this.#delete(names.filter((each) => each.fromLsn === fromLsn && each.endLsn < endLsn));
  }

  /** Removes what ends at or below `lsn`. */
  async removeBefore(timeline: Ids, lsn: Lsn): Promise<number> {
    const old = (await this.list(timeline)).filter(({ endLsn }) => endLsn <= lsn);
    await this.#delete(old);
    return old.length;
  }

  async #delete(objects: readonly OffloadedName[]): Promise<void> {
    for (const { name } of objects) this.#cache.delete(name);
    if (objects.length > 0) await this.#store.deleteMany(objects.map(({ name }) => name));
  }

  async #list(prefix: string): Promise<OffloadedName[]> {
    const found: OffloadedName[] = [];
    for await (const { name } of listAll(this.#store, prefix)) {
      const parsed = parseOffloadedName(name);
      if (parsed !== undefined) found.push(parsed);
    }
    return found;
  }

  #get(name: string): Promise<OffloadedSegment> {
    const segment =
      this.#cache.get(name) ?? this.#store.get(name).then(async (object) => decodeOffloaded(name, object));
    this.#cache.delete(name);
    this.#cache.set(name, segment);
    segment.catch(() => this.#cache.delete(name));
    for (const oldest of this.#cache.keys()) {
      if (this.#cache.size <= CACHED_SEGMENTS) break;
      this.#cache.delete(oldest);
    }
    return segment;
  }
}

function holds(lsn: Lsn): (object: OffloadedName) => boolean {
  return ({ fromLsn, endLsn }) => fromLsn <= lsn && lsn < endLsn;
}

function longest(objects: readonly OffloadedName[]): OffloadedName | undefined {
  return objects.reduce<OffloadedName | undefined>(
    (best, each) => (best === undefined || each.endLsn > best.endLsn ? each : best),
    undefined,
  );
}
