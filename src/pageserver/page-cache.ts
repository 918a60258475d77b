/**
 * Keeps what reads have made, so that a page with many records is replayed once and afterwards only by what is new.
 *
 * An entry is the value of a key of a timeline from one LSN (that of its newest change) to another, up to which it is known to have no
 * other change. It lasts however the timeline grows: history is only ever added above the timeline's last record.
 * (Not so for the WAL index, which ingest puts again under the last record; it is never kept here.)
 */

import type { Lsn } from '../postgres/lsn.ts';
import { KEY_KIND } from './key.ts';
import type { Key } from './key.ts';
import { GenerationCache } from './layers/generation-cache.ts';

export interface CachedValue {
  readonly timelineNumber: number;
  readonly key: Key;
  readonly fromLsn: Lsn;
  toLsn: Lsn;
  readonly image: Buffer;
}

const ENTRY_BYTES = 200;
/** Values of this size that are stored as they are, are kept too: looking for them costs more than copying them. */
export const SMALL_VALUE_BYTES = 64;

export class PageCache {
  readonly #entries: GenerationCache<CachedValue>;

  constructor(maxBytes: number) {
    this.#entries = new GenerationCache(maxBytes);
  }

  /** The value that the key had at some LSN at or below `lsn`, the newest such that is kept. */
  find(timelineNumber: number, key: Key, lsn: Lsn): CachedValue | undefined {
    const entry = this.#entries.get(hash(timelineNumber, key));
    if (entry === undefined || entry.fromLsn > lsn || entry.timelineNumber !== timelineNumber) return undefined;
    return isSameKey(entry.key, key) ? entry : undefined;
  }

  /** Keeps a value. `image` must never change. */
  put(timelineNumber: number, key: Key, fromLsn: Lsn, toLsn: Lsn, image: Buffer): void {
    if (key.kind === KEY_KIND.walIndex) return;
    const number = hash(timelineNumber, key);
    this.#entries.set(number, { timelineNumber, key, fromLsn, toLsn, image }, image.length + ENTRY_BYTES);
  }
}

/** 53 bits: different keys may share them, so entries name their key. */
function hash(timelineNumber: number, key: Key): number {
  let high = Math.imul(key.rel ^ (key.rel >>> 15), 0x9e3779b1) ^ Math.imul(timelineNumber, 0x27d4eb2f);
  let low = Math.imul(key.blk ^ (key.blk >>> 16), 0x85ebca6b) ^ Math.imul(key.db, 0xc2b2ae35) ^ key.spc;
  high = Math.imul(high ^ (high >>> 13) ^ (key.kind << 4) ^ key.fork, 0x85ebca6b) ^ low;
  low = Math.imul(low ^ (low >>> 13), 0xc2b2ae35) ^ Math.imul(high, 0x9e3779b1);
  return ((high >>> 11) & 0x1fffff) * 2 ** 32 + ((low ^ (low >>> 16)) >>> 0);
}

function isSameKey(a: Key, b: Key): boolean {
  return (
    a.blk === b.blk && a.rel === b.rel && a.kind === b.kind && a.fork === b.fork && a.db === b.db && a.spc === b.spc
  );
}
