/**
 * The newest part of a timeline's history, in memory until it is flushed to a delta layer.
 *
 * A put costs two map look-ups and a copy: fork → block → newest entry. Entries are rows of typed arrays, each with the row of the next
 * older entry of its key; their bytes lie in arenas. Puts come in the order of the log, so a key's LSNs never fall.
 */

import assert from 'node:assert/strict';
import type { Lsn } from '../../postgres/lsn.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { compareKeys, makeKey } from '../key.ts';
import type { Key, KeyRange } from '../key.ts';
import { RECORD_HEADER_BYTES, writeRecordHeader } from '../value.ts';
import type { Chain, ValueSource } from './chain.ts';
import { copyBytes } from './copy-bytes.ts';
import type { LayerWriter } from './layer-writer.ts';

const ARENA_BYTES_MIN = 16 * 1024;
const ARENA_BYTES_MAX = 4 * 1024 * 1024;
const ENTRIES_MIN = 16;
const ENTRY_BYTES = 24;
const NONE = -1;

/** The newest entries of one fork's blocks. Most keys that are not relation blocks have only block 0. */
interface ForkEntries {
  readonly kind: number;
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
  readonly fork: number;
  newestOfBlock0: number;
  readonly newest: Map<number, number>;
  /** The next fork with the same hash. */
  readonly next: ForkEntries | undefined;
}

export class MemoryLayer implements ValueSource {
  /** Every entry's LSN is at or above this. */
  readonly lsnStart: Lsn;
  readonly createdAtMs: number;
  readonly #forks = new Map<number, ForkEntries>();
  #lastFork: ForkEntries | undefined;
  #entryCount = 0;
  #discardedCount = 0;
  #lsns = new Float64Array(ENTRIES_MIN);
  #older = new Int32Array(ENTRIES_MIN);
  #arenas = new Uint32Array(ENTRIES_MIN);
  #offsets = new Uint32Array(ENTRIES_MIN);
  #lengths = new Uint32Array(ENTRIES_MIN);
  readonly #arenaBytes: Buffer[] = [];
  #arenaFree = 0;
  #newestLsn: Lsn = 0;
  #valueBytes = 0;

  constructor(lsnStart: Lsn, nowMs: number) {
    this.lsnStart = lsnStart;
    this.createdAtMs = nowMs;
  }

  get isEmpty(): boolean {
    return this.#entryCount === this.#discardedCount;
  }

  /** Memory in use, near enough. */
  get sizeBytes(): number {
    return this.#valueBytes + this.#entryCount * ENTRY_BYTES;
  }

  get newestLsn(): Lsn {
    return this.#newestLsn;
  }

  put(key: Key, lsn: Lsn, value: Buffer): void {
    const entry = this.#addEntry(key, lsn);
    const arena = this.#reserve(entry, value.length);
    copyBytes(value, 0, arena, this.#offsets[entry]!, value.length);
  }

  /** Puts a WAL record as a value of `key`, as encodeRecord (value.ts) would make it, without making it first. */
  putRecord(key: Key, record: WalRecord, blockId: number, needsNoPrior: boolean): void {
    const { bytes } = record;
    const entry = this.#addEntry(key, record.endLsn);
    const arena = this.#reserve(entry, RECORD_HEADER_BYTES + bytes.length);
    const offset = this.#offsets[entry]!;
    writeRecordHeader(arena, offset, record.startLsn, blockId, needsNoPrior);
    copyBytes(bytes, 0, arena, offset + RECORD_HEADER_BYTES, bytes.length);
  }

  #addEntry(key: Key, lsn: Lsn): number {
    assert(lsn >= this.#newestLsn && lsn >= this.lsnStart, 'puts come in the order of the log');
    this.#newestLsn = lsn;
    const fork = this.#forkOf(key);
    const entry = this.#entryCount;
    if (entry === this.#lsns.length) this.#growEntries();
    this.#lsns[entry] = lsn;
    if (key.blk === 0) {
      this.#older[entry] = fork.newestOfBlock0;
      fork.newestOfBlock0 = entry;
    } else {
      this.#older[entry] = fork.newest.get(key.blk) ?? NONE;
      fork.newest.set(key.blk, entry);
    }
    this.#entryCount++;
    return entry;
  }

  /** Forgets the entries above `lsn`. */
  discardAbove(lsn: Lsn): void {
    if (this.#newestLsn <= lsn) return;
    for (const bucket of this.#forks.values()) {
      for (let fork: ForkEntries | undefined = bucket; fork !== undefined; fork = fork.next) {
        fork.newestOfBlock0 = this.#atOrBelow(fork.newestOfBlock0, lsn);
        for (const [blk, entry] of fork.newest) {
          const kept = this.#atOrBelow(entry, lsn);
          if (kept === NONE) fork.newest.delete(blk);
          else if (kept !== entry) fork.newest.set(blk, kept);
        }
      }
    }
    this.#newestLsn = lsn;
  }

  collect(key: Key, lsn: Lsn, floor: Lsn, chain: Chain): boolean {
    let entry = this.#newestEntry(key);
    for (; entry !== NONE; entry = this.#older[entry]!) {
      const entryLsn = this.#lsns[entry]!;
      if (entryLsn > lsn) continue;
      if (entryLsn <= floor) return chain.reachFloor();
      if (chain.push(this.#value(entry), entryLsn)) return true;
    }
    return false;
  }

  forEachKey(range: KeyRange, visit: (key: Key) => void): void {
    const keys: Key[] = [];
    for (const fork of this.#sortedForks()) {
      for (const blk of blocksOf(fork)) {
        const key = makeKey(fork.kind, fork.spc, fork.db, fork.rel, fork.fork, blk);
        if (compareKeys(key, range.start) >= 0 && compareKeys(key, range.end) < 0) keys.push(key);
      }
    }
    for (const key of keys) visit(key);
  }

  /** All keys in order, each with its entries, oldest first. The array is used again for the next key. */
  *keys(): Generator<{ readonly key: Key; readonly entries: readonly number[] }> {
    const entries: number[] = [];
    for (const fork of this.#sortedForks()) {
      for (const blk of blocksOf(fork)) {
        entries.length = 0;
        let entry = blk === 0 ? fork.newestOfBlock0 : fork.newest.get(blk)!;
        for (; entry !== NONE; entry = this.#older[entry]!) entries.push(entry);
        entries.reverse();
        yield { key: makeKey(fork.kind, fork.spc, fork.db, fork.rel, fork.fork, blk), entries };
      }
    }
  }

  lsnOf(entry: number): Lsn {
    return this.#lsns[entry]!;
  }

  /** The kind of an entry's value (VALUE_KIND). */
  kindOf(entry: number): number {
    return this.#arenaBytes[this.#arenas[entry]!]![this.#offsets[entry]!]!;
  }

  /** Adds an entry, which is one of `key`, to a layer file. */
  writeTo(writer: LayerWriter, key: Key, entry: number): void {
    const offset = this.#offsets[entry]!;
    const end = offset + this.#lengths[entry]!;
    writer.add(key, this.#lsns[entry]!, this.#arenaBytes[this.#arenas[entry]!]!, offset, end);
  }

  #newestEntry(key: Key): number {
    const fork = this.#findFork(key, forkHash(key));
    if (fork === undefined) return NONE;
    return key.blk === 0 ? fork.newestOfBlock0 : (fork.newest.get(key.blk) ?? NONE);
  }

  #forkOf(key: Key): ForkEntries {
    const last = this.#lastFork;
    if (last !== undefined && isForkOf(last, key)) return last;
    const hash = forkHash(key);
    let fork = this.#findFork(key, hash);
    if (fork === undefined) {
      const { kind, spc, db, rel, fork: number } = key;
      const next = this.#forks.get(hash);
      fork = { kind, spc, db, rel, fork: number, newestOfBlock0: NONE, newest: new Map(), next };
      this.#forks.set(hash, fork);
    }
    this.#lastFork = fork;
    return fork;
  }

  #findFork(key: Key, hash: number): ForkEntries | undefined {
    let fork = this.#forks.get(hash);
    while (fork !== undefined && !isForkOf(fork, key)) fork = fork.next;
    return fork;
  }

  #sortedForks(): ForkEntries[] {
    const forks: ForkEntries[] = [];
    for (const bucket of this.#forks.values()) {
      for (let fork: ForkEntries | undefined = bucket; fork !== undefined; fork = fork.next) forks.push(fork);
    }
    return forks.sort((a, b) => a.kind - b.kind || a.spc - b.spc || a.db - b.db || a.rel - b.rel || a.fork - b.fork);
  }

  /** The newest entry of a key that is not to be discarded. */
  #atOrBelow(newest: number, lsn: Lsn): number {
    let entry = newest;
    while (entry !== NONE && this.#lsns[entry]! > lsn) {
      entry = this.#older[entry]!;
      this.#discardedCount++;
    }
    return entry;
  }

  #value(entry: number): Buffer {
    const offset = this.#offsets[entry]!;
    return this.#arenaBytes[this.#arenas[entry]!]!.subarray(offset, offset + this.#lengths[entry]!);
  }

  /** Room for an entry's value, at its offset in the arena that is returned. */
  #reserve(entry: number, length: number): Buffer {
    let arena = this.#arenaBytes.at(-1);
    if (arena === undefined || arena.length - this.#arenaFree < length) {
      const size = Math.min(ARENA_BYTES_MAX, Math.max(ARENA_BYTES_MIN, (arena?.length ?? 0) * 2));
      arena = Buffer.allocUnsafeSlow(Math.max(size, length));
      this.#arenaBytes.push(arena);
      this.#arenaFree = 0;
    }
    this.#arenas[entry] = this.#arenaBytes.length - 1;
    this.#offsets[entry] = this.#arenaFree;
    this.#lengths[entry] = length;
    this.#arenaFree += length;
    this.#valueBytes += length;
    return arena;
  }

  #growEntries(): void {
    const grown = <T extends Float64Array | Int32Array | Uint32Array>(from: T, to: T): T => {
      to.set(from);
      return to;
    };
    const count = this.#lsns.length * 2;
    this.#lsns = grown(this.#lsns, new Float64Array(count));
    this.#older = grown(this.#older, new Int32Array(count));
    this.#arenas = grown(this.#arenas, new Uint32Array(count));
    this.#offsets = grown(this.#offsets, new Uint32Array(count));
    this.#lengths = grown(this.#lengths, new Uint32Array(count));
  }
}

function forkHash(key: Key): number {
  let hash = Math.imul(key.rel, 0x9e3779b1) ^ Math.imul(key.db, 0x85ebca6b) ^ Math.imul(key.spc, 0xc2b2ae35);
  hash ^= (key.kind << 8) | key.fork;
  return hash ^ (hash >>> 15);
}

function isForkOf(fork: ForkEntries, key: Key): boolean {
  return (
    fork.rel === key.rel &&
    fork.kind === key.kind &&
    fork.fork === key.fork &&
    fork.db === key.db &&
    fork.spc === key.spc
  );
}

function blocksOf(fork: ForkEntries): Uint32Array {
  const blocks = new Uint32Array(fork.newest.size + (fork.newestOfBlock0 === NONE ? 0 : 1));
  let count = blocks.length - fork.newest.size;
  for (const blk of fork.newest.keys()) blocks[count++] = blk;
  return blocks.sort();
}
