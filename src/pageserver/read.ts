/**
 * Reading history: a key's value at an LSN is the newest image at or below it plus the changes after that, replayed.
 *
 * The way goes from new to old: what is in memory, then the layers, then the ancestor at the branch point, until something needs nothing
 * older. It ends early at a value that an earlier read has made (PageCache). All of it is synchronous: a read sees one state.
 *
 * A change that cannot be replayed fails the read; nothing of it is kept or served.
 *
 * Pages are made where they are wanted, in the memory that goes to the client. Only what took many changes is kept in the cache: the rest is made again as
 * quickly as it is copied, and a scan would push out what is worth keeping.
 */

import type { Lsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import type { PgVersion } from '../postgres/version.ts';
import { compareKeys, makeKey, KEY_KIND, relationSizeKey } from './key.ts';
import type { Key, KeyRange, RelationFork } from './key.ts';
import type { BlockCache } from './layers/block-cache.ts';
import { Chain } from './layers/chain.ts';
import { firstHash, secondHash } from './layers/key-filter.ts';
import type { KeyFilter } from './layers/key-filter.ts';
import type { LayerMap } from './layers/layer-map.ts';
import type { MemoryLayer } from './layers/memory-layer.ts';
import { SMALL_VALUE_BYTES } from './page-cache.ts';
import type { PageCache } from './page-cache.ts';
import { IMAGE_HEADER_BYTES, VALUE_KIND } from './value.ts';

/** One timeline's own part of history. */
export interface History {
  /** Never used again for another timeline by this process. */
  readonly number: number;
  /** What is read above this LSN is not yet visible to others, and may still be discarded. */
  readonly lastRecordLsn: Lsn;
  /** Newest first. */
  readonly memoryLayers: readonly MemoryLayer[];
  readonly layerMap: LayerMap;
}

/** A history and up to where it counts. All have all fields, in one order: reads go over them by the hundred. */
export interface LineageStep {
  readonly history: History;
  /** The branch point of the step before; Infinity for the timeline that is read. */
  readonly endLsn: Lsn;
  /** Of the keys that the history has up to endLsn; undefined: it may have any. */
  readonly filter: KeyFilter | undefined;
  /** Of this step and those after it up to (not including) step `next`; the largest group first. */
  readonly groups: readonly { readonly filter: KeyFilter; readonly next: number }[];
}

/** A timeline's history and those that it inherits, nearest first. */
export type Lineage = readonly LineageStep[];

/**
 * Applies a value of kind record, init record or derived, whose LSN is `lsn`, to a page in place. Throws when it cannot. An init record makes the
 * whole page: what was there before may be anything.
 */
export type Replay = (page: Buffer, value: Buffer, lsn: Lsn, pgVersion: PgVersion) => void;

/** What a scan finds: a key that exists, and its value as an image. */
export type KeyImage = [key: Key, image: Buffer];

/** The size of a fork at an LSN of a timeline that is visible: it stays so. */
interface KnownSize extends RelationFork {
  readonly number: number;
  readonly lsn: Lsn;
  readonly blocks: number;
}

/** A page that took at least so many changes is kept. */
const KEPT_CHANGES_MIN = 8;
/** Who wants so many pages at once is scanning. */
const SCAN_COUNT_MIN = 16;

export class HistoryReader {
  readonly #cache: PageCache;
  readonly #blocks: BlockCache;
  readonly #replay: Replay;
  // What #find found: what is to be replayed, and on what. One read at a time, so one of each.
  readonly #chain = new Chain();
  #base: Buffer | undefined;
  #owner: History | undefined;
  #ownerLsn: Lsn = 0;
  readonly #sizes: (KnownSize | undefined)[] = Array.from({ length: 256 }, () => undefined);

  /** `blocks` are those of all layers that it is to read. */
  constructor(cache: PageCache, blocks: BlockCache, replay: Replay) {
    this.#cache = cache;
    this.#blocks = blocks;
    this.#replay = replay;
  }

  /** The value at `lsn`; undefined when the key does not exist there. May be shared: not to be changed. */
  read(lineage: Lineage, key: Key, lsn: Lsn, pgVersion: PgVersion): Buffer | undefined {
    this.#blocks.recycle();
    if (!this.#find(lineage, key, lsn)) return this.#base;
    let image = this.#oldestImage();
    if (image === undefined || this.#chain.values.length > 1) {
      if (this.#isGone()) return undefined;
      image = Buffer.allocUnsafeSlow(BLOCK_SIZE);
      this.#makePage(image, pgVersion);
      this.#keep(key, image);
    } else {
      // It was a view of a block, or of a memory layer, whose memory is used again.
      image = Buffer.from(image);
      if (image.length <= SMALL_VALUE_BYTES) this.#keep(key, image);
    }
    return image;
  }

  /** Writes the page at `lsn` to `out`; zeroes when it does not exist there. */
  #readPage(
    lineage: Lineage,
    key: Key,
    lsn: Lsn,
    pgVersion: PgVersion,
    out: Buffer,
    offset: number,
    isScan: boolean,
  ): void {
    this.#blocks.recycle(isScan);
    const isToBeMade = this.#find(lineage, key, lsn);
    const { values, end } = this.#chain;
    if (isToBeMade && values.length === 1 && values[0]![0] === VALUE_KIND.image && end !== 'floor') {
      values[0]!.copy(out, offset, IMAGE_HEADER_BYTES);
    } else if (isToBeMade && !this.#isGone()) {
      const page = out.subarray(offset, offset + BLOCK_SIZE);
      this.#makePage(page, pgVersion);
      if (values.length >= KEPT_CHANGES_MIN) this.#keep(key, Buffer.from(page));
    } else if (!isToBeMade && this.#base !== undefined) {
      this.#base.copy(out, offset);
    } else {
      out.fill(0, offset, offset + BLOCK_SIZE);
    }
  }

  /**
   * Looks for what makes the key's value. False when nothing has to be made: the value is #base, or there is none. True: #chain has the changes,
   * to be replayed on #base or what the chain ends with.
   */
  #find(lineage: Lineage, key: Key, lsn: Lsn): boolean {
    const chain = this.#chain;
    chain.clear();
    let owner: History | undefined;
    let ownerLsn: Lsn = 0;
    let base: Buffer | undefined;
    this.#base = undefined;
    const isFiltered = lineage.length > 2 && key.kind !== KEY_KIND.walIndex;
    const first = isFiltered ? firstHash(key) : 0;
    const second = isFiltered ? secondHash(key) : 0;
    for (let i = 0; i < lineage.length; i++) {
      const { history, endLsn, filter, groups } = lineage[i]!;
      if (isFiltered) {
        const next = groups.length === 0 ? i : skipGroups(groups, i, first, second);
        if (next > i) {
          i = next - 1;
          continue;
        }
        if (filter !== undefined && !filter.mayHave(first, second)) continue;
      }
      const at = lsn < endLsn ? lsn : endLsn;
      const cached = this.#cache.find(history.number, key, at);
      if (cached !== undefined && cached.toLsn >= at) {
        if (owner === undefined) {
          this.#base = cached.image;
          return false;
        }
        base = cached.image;
        chain.end = 'floor';
      } else {
        const isOver = collect(history, key, at, cached === undefined ? -1 : cached.toLsn, chain);
        if (owner === undefined && chain.values.length > 0) {
          owner = history;
          ownerLsn = at;
        }
        if (cached !== undefined && (!isOver || chain.end === 'floor')) {
          base = cached.image;
          chain.end = 'floor';
          if (owner === undefined) {
            cached.toLsn = Math.min(at, history.lastRecordLsn);
            this.#base = base;
            return false;
          }
        }
      }
      if (chain.end !== undefined) break;
    }
    this.#base = base;
    this.#owner = owner;
    this.#ownerLsn = ownerLsn;
    return owner !== undefined;
  }

  /** The payload of the oldest value, when that is an image. */
  #oldestImage(): Buffer | undefined {
    const oldest = this.#chain.values.at(-1);
    return oldest?.[0] === VALUE_KIND.image ? oldest.subarray(IMAGE_HEADER_BYTES) : undefined;
  }

  /** The key does not exist: the newest value says so. */
  #isGone(): boolean {
    return this.#chain.values[0]![0] === VALUE_KIND.tombstone;
  }

  #makePage(page: Buffer, pgVersion: PgVersion): void {
    const { values, lsns, end } = this.#chain;
    let next = values.length - 1;
    const oldestKind = values[next]![0];
    const image = this.#oldestImage();
    const base = end === 'floor' ? this.#base : image;
    if (base !== undefined) base.copy(page);
    // A block below its fork's end that was never written is a page of zeroes.
    else if (oldestKind !== VALUE_KIND.initRecord) page.fill(0);
    if (image !== undefined || oldestKind === VALUE_KIND.tombstone) next--;
    for (; next >= 0; next--) this.#replay(page, values[next]!, lsns[next]!, pgVersion);
  }

  /** Keeps the value that was found; `image` must never change. */
  #keep(key: Key, image: Buffer): void {
    const owner = this.#owner!;
    const fromLsn = this.#chain.lsns[0]!;
    if (fromLsn > owner.lastRecordLsn) return;
    this.#cache.put(owner.number, key, fromLsn, Math.min(this.#ownerLsn, owner.lastRecordLsn), image);
  }

  /** Writes `count` pages to `out` from `offset` on. Pages past the fork's end at `lsn` are zeroes. */
  readPages(
    lineage: Lineage,
    fork: RelationFork,
    firstBlk: number,
    count: number,
    lsn: Lsn,
    pgVersion: PgVersion,
    out: Buffer,
    offset: number,
  ): void {
    const { spc, db, rel, fork: forkNumber } = fork;
    const size = this.#sizeOf(lineage, fork, lsn, pgVersion);
    const end = Math.max(firstBlk, Math.min(firstBlk + count, size));
    // As Postgres does with its buffers: a scan of what would fill a quarter of the cache keeps nothing there.
    const isScan = count >= SCAN_COUNT_MIN && size * BLOCK_SIZE > this.#blocks.maxBytes / 4;
    let at = offset;
    for (let blk = firstBlk; blk < end; blk++, at += BLOCK_SIZE) {
      const key = makeKey(KEY_KIND.relationBlock, spc, db, rel, forkNumber, blk);
      this.#readPage(lineage, key, lsn, pgVersion, out, at, isScan);
    }
    out.fill(0, at, offset + count * BLOCK_SIZE);
  }

  /**
   * Blocks of the fork at `lsn`; 0 when it does not exist. Kept for the forks that were asked for last: a compute asks page after page at one
   * LSN, at which the size is what it was.
   */
  #sizeOf(lineage: Lineage, { spc, db, rel, fork }: RelationFork, lsn: Lsn, pgVersion: PgVersion): number {
    const { number } = lineage[0]!.history;
    const slot = (Math.imul(rel ^ (number << 5), 0x9e3779b1) >>> 24) ^ fork;
    const kept = this.#sizes[slot];
    if (
      kept !== undefined &&
      kept.rel === rel &&
      kept.lsn === lsn &&
      kept.number === number &&
      kept.fork === fork &&
      kept.db === db &&
      kept.spc === spc
    ) {
      return kept.blocks;
    }
    const blocks = this.read(lineage, relationSizeKey(spc, db, rel, fork), lsn, pgVersion)?.readUInt32LE(0) ?? 0;
    const isVisible = lineage.every(({ history, endLsn }) => Math.min(lsn, endLsn) <= history.lastRecordLsn);
    if (isVisible) this.#sizes[slot] = { number, spc, db, rel, fork, lsn, blocks };
    return blocks;
  }

  /** The keys of the range that exist at `lsn`, sorted. */
  scan(lineage: Lineage, range: KeyRange, lsn: Lsn, pgVersion: PgVersion): KeyImage[] {
    const found: KeyImage[] = [];
    for (const key of candidateKeys(lineage, range, lsn)) {
      const image = this.read(lineage, key, lsn, pgVersion);
      if (image !== undefined) found.push([key, image]);
    }
    return found;
  }
}

/** The step after the largest group that does not have the key; `step` when all may have it. */
function skipGroups(groups: LineageStep['groups'], step: number, first: number, second: number): number {
  for (let i = 0; i < groups.length; i++) {
    const { filter, next } = groups[i]!;
    if (!filter.mayHave(first, second)) return next;
  }
  return step;
}

function collect(history: History, key: Key, lsn: Lsn, floor: Lsn, chain: Chain): boolean {
  for (const layer of history.memoryLayers) {
    if (layer.lsnStart <= lsn && layer.collect(key, lsn, floor, chain)) return true;
  }
  return history.layerMap.collect(key, lsn, floor, chain);
}

/** Every key of the range that may exist at `lsn`, sorted, each once; some do not exist there. */
export function candidateKeys(lineage: Lineage, range: KeyRange, lsn: Lsn): Key[] {
  const keys: Key[] = [];
  let sourceCount = 0;
  for (const { history, endLsn } of lineage) {
    const at = Math.min(lsn, endLsn);
    const sources = [
      ...history.memoryLayers.filter((layer) => layer.lsnStart <= at),
      ...history.layerMap.overlapping(range, at),
    ];
    for (const source of sources) source.forEachKey(range, (key) => keys.push(key));
    sourceCount += sources.length;
  }
  if (sourceCount <= 1) return keys;
  keys.sort(compareKeys);
  return keys.filter((key, i) => i === 0 || compareKeys(keys[i - 1]!, key) !== 0);
}
