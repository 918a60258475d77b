/**
 * The keys of a memory layer as rows of typed arrays: for each the newest entry, how many there are, and what has come since the last image.
 *
 * A key is found in two steps: its fork (everything but the block number) gets a small number, looked up in a short cache and then in a
 * map; fork number and block are looked up in an open hash table with linear probing. A key's row lies together, so that a look-up touches two cache
 * lines: 24 bytes for each key, and 8 to 16 in the table.
 */

import { makeKey } from '../key.ts';
import type { Key } from '../key.ts';

export const NO_ROW = -1;
const NONE = -1;
const ROWS_MIN = 16;
const FORK_CACHE_SIZE = 64;
/** A layer that has come to this many will become as large as the one before it. */
const ROWS_EXPECTING = 4096;
/** The words of a row. */
const FORK = 0;
const BLOCK = 1;
const NEWEST = 2;
const CHANGES = 3;
const CHANGED_BYTES = 4;
const ENTRIES = 5;
const ROW_WORDS = 6;
/** Memory for each key, near enough. */
export const KEY_ROW_BYTES = ROW_WORDS * 4 + 12;

/** A key without its block number. */
export interface ForkKey {
  readonly kind: number;
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
  readonly fork: number;
}

interface Fork extends ForkKey {
  readonly number: number;
  readonly hash: number;
  /** The next fork with the same hash. */
  readonly next: Fork | undefined;
}

export class KeyRows {
  #count = 0;
  #rows = new Int32Array(ROWS_MIN * ROW_WORDS);
  /** Rows + 1, 0 for none; twice as many places as rows at least. */
  #table = new Int32Array(ROWS_MIN * 2);
  readonly #expectedCount: number;
  readonly #forkList: Fork[] = [];
  readonly #forkMap = new Map<number, Fork>();
  readonly #forkCache: (Fork | undefined)[] = Array.from({ length: FORK_CACHE_SIZE }, () => undefined);

  /** `expectedCount`: how many there may become, once they are not few. */
  constructor(expectedCount: number) {
    this.#expectedCount = expectedCount;
  }

  get count(): number {
    return this.#count;
  }

  /** The key's row; NO_ROW when it has none. */
  find(kind: number, spc: number, db: number, rel: number, fork: number, blk: number): number {
    const found = this.#findFork(forkHash(kind, spc, db, rel, fork), kind, spc, db, rel, fork);
    return found === undefined ? NO_ROW : this.#table[this.#place(found.number, blk)]! - 1;
  }

  /** The key's row, a new one if need be. */
  rowOf(kind: number, spc: number, db: number, rel: number, fork: number, blk: number): number {
    const { number } = this.#forkOf(kind, spc, db, rel, fork);
    const place = this.#place(number, blk);
    const row = this.#table[place]! - 1;
    return row === NO_ROW ? this.#add(number, blk, place) : row;
  }

  keyOf(row: number): Key {
    const { kind, spc, db, rel, fork } = this.#forkList[this.#rows[row * ROW_WORDS + FORK]!]!;
    return makeKey(kind, spc, db, rel, fork, this.#blockOf(row));
  }

  newestOf(row: number): number {
    return this.#rows[row * ROW_WORDS + NEWEST]!;
  }

  entryCountOf(row: number): number {
    return this.#rows[row * ROW_WORDS + ENTRIES]!;
  }

  /** Gives the key a new entry; the one that was its newest is returned. */
  push(row: number, entry: number): number {
    const at = row * ROW_WORDS;
    const older = this.#rows[at + NEWEST]!;
    this.#rows[at + NEWEST] = entry;
    this.#rows[at + ENTRIES]!++;
    return older;
  }

  /** Takes the key's newest entry away. `older` is the one before it. */
  pop(row: number, older: number): void {
    const at = row * ROW_WORDS;
    this.#rows[at + NEWEST] = older;
    this.#rows[at + ENTRIES]!--;
  }

  /** How many changes there are with this one since `restart`. */
  countChange(row: number, bytes: number): number {
    const at = row * ROW_WORDS;
    this.#rows[at + CHANGED_BYTES]! += bytes;
    return ++this.#rows[at + CHANGES]!;
  }

  changedBytesOf(row: number): number {
    return this.#rows[row * ROW_WORDS + CHANGED_BYTES]!;
  }

  restart(row: number): void {
    const at = row * ROW_WORDS;
    this.#rows[at + CHANGES] = 0;
    this.#rows[at + CHANGED_BYTES] = 0;
  }

  /** The rows in the order of their keys; only of the forks that are wanted. */
  sorted(isWanted: (fork: ForkKey) => boolean = () => true): Int32Array {
    const forks = this.#forkList
      .filter(isWanted)
      .sort((a, b) => a.kind - b.kind || a.spc - b.spc || a.db - b.db || a.rel - b.rel || a.fork - b.fork);
    const ranks = new Int32Array(this.#forkList.length).fill(NONE);
    for (const [rank, fork] of forks.entries()) ranks[fork.number] = rank;
    // Numbers sort as numbers, natively; which row one belongs to is looked up again.
    const places = new Float64Array(this.#count);
    let count = 0;
    for (let row = 0; row < this.#count; row++) {
      const rank = ranks[this.#rows[row * ROW_WORDS + FORK]!]!;
      if (rank !== NONE) places[count++] = rank * 2 ** 32 + this.#blockOf(row);
    }
    const sorted = places.subarray(0, count).sort();
    const rows = new Int32Array(count);
    for (let i = 0; i < count; i++) {
      const rank = Math.floor(sorted[i]! / 2 ** 32);
      rows[i] = this.#table[this.#place(forks[rank]!.number, sorted[i]! - rank * 2 ** 32)]! - 1;
    }
    return rows;
  }

  #blockOf(row: number): number {
    return this.#rows[row * ROW_WORDS + BLOCK]! >>> 0;
  }

  #add(fork: number, blk: number, place: number): number {
    const row = this.#count;
    const at = row * ROW_WORDS;
    if (at === this.#rows.length) this.#grow();
    const rows = this.#rows;
    rows[at + FORK] = fork;
    rows[at + BLOCK] = blk;
    rows[at + NEWEST] = NONE;
    this.#count = row + 1;
    if (this.#count * 2 > this.#table.length) this.#rehash();
    else this.#table[place] = row + 1;
    return row;
  }

  /** Where the key is in the table, or the free place where it would be. */
  #place(fork: number, blk: number): number {
    const table = this.#table;
    const rows = this.#rows;
    const mask = table.length - 1;
    const block = blk | 0;
    let hash = Math.imul(block ^ Math.imul(fork, 0x85ebca6b), 0x9e3779b1);
    hash ^= hash >>> 15;
    for (let place = hash & mask; ; place = (place + 1) & mask) {
      const row = table[place]! - 1;
      if (row < 0) return place;
      const at = row * ROW_WORDS;
      if (rows[at + BLOCK] === block && rows[at + FORK] === fork) return place;
    }
  }

  #rehash(): void {
    this.#table = new Int32Array(2 ** Math.ceil(Math.log2(this.#largerCount() * 2)));
    for (let row = 0; row < this.#count; row++) {
      this.#table[this.#place(this.#rows[row * ROW_WORDS + FORK]!, this.#blockOf(row))] = row + 1;
    }
  }

  /** How many rows there is to be room for when there is none. Growing by doubling copies everything, and leaves as much again to the garbage collector. */
  #largerCount(): number {
    return Math.max(this.#count * 2, this.#count >= ROWS_EXPECTING ? Math.ceil(this.#expectedCount * 1.1) : 0);
  }

  #forkOf(kind: number, spc: number, db: number, rel: number, fork: number): Fork {
    const hash = forkHash(kind, spc, db, rel, fork);
    const found = this.#findFork(hash, kind, spc, db, rel, fork);
    if (found !== undefined) return found;
    const next = this.#forkMap.get(hash);
    const added: Fork = { kind, spc, db, rel, fork, number: this.#forkList.length, hash, next };
    this.#forkMap.set(hash, added);
    this.#forkList.push(added);
    return added;
  }

  #findFork(hash: number, kind: number, spc: number, db: number, rel: number, fork: number): Fork | undefined {
    const cached = this.#forkCache[hash & (FORK_CACHE_SIZE - 1)];
    if (cached !== undefined && isFork(cached, kind, spc, db, rel, fork)) return cached;
    let found = this.#forkMap.get(hash);
    while (found !== undefined && !isFork(found, kind, spc, db, rel, fork)) found = found.next;
    if (found !== undefined) this.#forkCache[hash & (FORK_CACHE_SIZE - 1)] = found;
    return found;
  }

  #grow(): void {
    const larger = new Int32Array(this.#largerCount() * ROW_WORDS);
    larger.set(this.#rows);
    this.#rows = larger;
  }
}

function forkHash(kind: number, spc: number, db: number, rel: number, fork: number): number {
  let hash = Math.imul(rel, 0x9e3779b1) ^ Math.imul(db, 0x85ebca6b) ^ Math.imul(spc, 0xc2b2ae35);
  hash ^= (kind << 8) | fork;
  return hash ^ (hash >>> 15);
}

function isFork(found: ForkKey, kind: number, spc: number, db: number, rel: number, fork: number): boolean {
  return found.rel === rel && found.kind === kind && found.fork === fork && found.db === db && found.spc === spc;
}
