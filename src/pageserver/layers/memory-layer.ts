/**
 * The newest part of a timeline's history, in memory until it is flushed to a delta layer.
 *
 * A put costs two look-ups and a copy: fork, block, newest entry. Entries are rows of six words in one array, so that one costs one cache line;
 * each names the next older entry of its key. Their bytes lie in arenas; keys are rows too, found by an open hash table (KeyRows). So the garbage collector sees a few large
 * arrays, however many values there are. Puts come in the order of the log, so a key's LSNs never fall.
 *
 * Of each page it counts what has to be replayed since the last value that needs nothing before it; `takeHot` gives the pages for
 * which an image is due.
 */

import assert from 'node:assert/strict';
import type { Lsn } from '../../postgres/lsn.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import { compareKeys, KEY_KIND } from '../key.ts';
import type { Key, KeyRange } from '../key.ts';
import { clearRecordLinks, needsNoPrior, RECORD_HEADER_BYTES, writeRecordHeader } from '../value.ts';
import type { Chain, ValueSource } from './chain.ts';
import { copyBytes, viewOf } from './copy-bytes.ts';
import { KeyRows, NO_ROW } from './key-rows.ts';
import type { ForkKey } from './key-rows.ts';
import type { LayerWriter } from './layer-writer.ts';

/**
 * An image is due after this many changes in a row, if they are as large as it is; after HOT_CHANGES_MAX whatever their size. That is one more than fill
 * a page of the smallest index tuples: a page that is filled once is not hot.
 */
export const HOT_CHANGES = 408;
export const HOT_CHANGES_MAX = 512;
const HOT_BYTES = 8192;

const ARENA_BYTES_MIN = 16 * 1024;
const ARENA_BYTES_MAX = 4 * 1024 * 1024;
const ENTRIES_MIN = 16;
/** A layer that has come to this many will become as large as the one before it. */
const ENTRIES_EXPECTING = 4096;
/** The words of an entry. */
const OLDER = 0;
const ARENA = 1;
const OFFSET = 2;
const LENGTH = 3;
const LSN_LOW = 4;
const LSN_HIGH = 5;
const ENTRY_WORDS = 6;
const ENTRY_BYTES = ENTRY_WORDS * 4;
const TWO_32 = 2 ** 32;
const NONE = -1;

export class MemoryLayer implements ValueSource {
  /** Every entry's LSN is at or above this. */
  readonly lsnStart: Lsn;
  readonly createdAtMs: number;
  readonly #keys = new KeyRows();
  #hot: number[] = [];
  readonly #expectedCount: number;
  #entryCount = 0;
  #discardedCount = 0;
  #entries = new Int32Array(ENTRIES_MIN * ENTRY_WORDS);
  readonly #arenaBytes: Buffer[] = [];
  readonly #arenaViews: DataView[] = [];
  #arena: Buffer = Buffer.alloc(0);
  #arenaView = viewOf(this.#arena);
  #arenaFree = 0;
  #newestLsn: Lsn = 0;
  #valueBytes = 0;

  /** `before` is the layer before this one. */
  constructor(lsnStart: Lsn, nowMs: number, before?: MemoryLayer) {
    this.lsnStart = lsnStart;
    this.createdAtMs = nowMs;
    this.#expectedCount = before === undefined ? 0 : before.#entryCount;
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

  /** By how much `sizeBytes` has grown. */
  put(key: Key, lsn: Lsn, value: Buffer): number {
    const { length } = value;
    const row = this.#keys.rowOf(key.kind, key.spc, key.db, key.rel, key.fork, key.blk);
    this.#addEntry(row, lsn, length);
    this.#arena.set(value, this.#arenaFree - length);
    if (needsNoPrior(value[0]!)) this.#keys.restart(row);
    else if (holdsPages(key.kind)) this.#count(row, length);
    return length + ENTRY_BYTES;
  }

  /** Puts a WAL record as a value of one of its blocks, as encodeRecord (value.ts) would make it, without making it first. By how much `sizeBytes` has grown. */
  putRecord(record: WalRecord, block: WalBlock, isBase: boolean): number {
    const { totalLength } = record;
    const length = RECORD_HEADER_BYTES + totalLength;
    const row = this.#keys.rowOf(KEY_KIND.relationBlock, block.spc, block.db, block.rel, block.fork, block.blk);
    this.#addEntry(row, record.endLsn, length);
    const arena = this.#arena;
    const offset = this.#arenaFree - length;
    writeRecordHeader(arena, offset, record.startLsn, block.id, isBase);
    copyBytes(record.sourceView, record.sourceOffset, this.#arenaView, offset + RECORD_HEADER_BYTES, totalLength);
    clearRecordLinks(arena, offset + RECORD_HEADER_BYTES);
    if (isBase) this.#keys.restart(row);
    this.#count(row, length);
    return length + ENTRY_BYTES;
  }

  /** Pages for which an image is due; each is given once, and again when as much has come as made it due. */
  takeHot(): readonly Key[] {
    if (this.#hot.length === 0) return NO_KEYS;
    const rows = this.#hot;
    this.#hot = [];
    for (const row of rows) this.#keys.restart(row);
    return rows.filter((row) => this.#keys.newestOf(row) !== NONE).map((row) => this.#keys.keyOf(row));
  }

  /** Forgets the entries above `lsn`. */
  discardAbove(lsn: Lsn): void {
    if (this.#newestLsn <= lsn) return;
    for (let row = 0; row < this.#keys.count; row++) {
      this.#keys.setNewest(row, this.#atOrBelow(this.#keys.newestOf(row), lsn));
    }
    this.#newestLsn = lsn;
  }

  collect(key: Key, lsn: Lsn, floor: Lsn, chain: Chain): boolean {
    const row = this.#keys.find(key.kind, key.spc, key.db, key.rel, key.fork, key.blk);
    if (row === NO_ROW) return false;
    for (let entry = this.#keys.newestOf(row); entry !== NONE; entry = this.#entries[entry + OLDER]!) {
      const entryLsn = this.#lsnOf(entry);
      if (entryLsn > lsn) continue;
      if (entryLsn <= floor) return chain.reachFloor();
      if (chain.push(this.#value(entry), entryLsn)) return true;
    }
    return false;
  }

  forEachKey(range: KeyRange, visit: (key: Key) => void): void {
    const keys: Key[] = [];
    for (const row of this.#keys.sorted((fork) => compareKeys({ ...fork, blk: 0 }, range.end) < 0)) {
      if (this.#keys.newestOf(row) === NONE) continue;
      const key = this.#keys.keyOf(row);
      if (compareKeys(key, range.start) >= 0 && compareKeys(key, range.end) < 0) keys.push(key);
    }
    for (const key of keys) visit(key);
  }

  /** The keys of the range that have an entry with `floor < LSN <= lsn`, in order. Entries above `lsn` may come and go meanwhile. */
  *keysWithin(range: KeyRange, floor: Lsn, lsn: Lsn): Generator<Key, undefined> {
    const isWanted = (fork: ForkKey): boolean =>
      compareKeys({ ...fork, blk: 0xffffffff }, range.start) >= 0 && compareKeys({ ...fork, blk: 0 }, range.end) < 0;
    for (const row of this.#keys.sorted(isWanted)) {
      let entry = this.#keys.newestOf(row);
      while (entry !== NONE && this.#lsnOf(entry) > lsn) entry = this.#entries[entry + OLDER]!;
      if (entry === NONE || this.#lsnOf(entry) <= floor) continue;
      const key = this.#keys.keyOf(row);
      if (compareKeys(key, range.start) >= 0 && compareKeys(key, range.end) < 0) yield key;
    }
    return undefined;
  }

  /** All keys in order, each with its entries, oldest first. The array is used again for the next key. */
  *keys(): Generator<{ readonly key: Key; readonly entries: readonly number[] }> {
    const entries: number[] = [];
    for (const row of this.#keys.sorted()) {
      entries.length = 0;
      for (let entry = this.#keys.newestOf(row); entry !== NONE; entry = this.#entries[entry + OLDER]!)
        entries.push(entry);
      if (entries.length === 0) continue;
      yield { key: this.#keys.keyOf(row), entries: entries.reverse() };
    }
  }

  /** Adds an entry, which is one of `key`, to a layer file. */
  writeTo(writer: LayerWriter, key: Key, entry: number): void {
    const entries = this.#entries;
    const offset = entries[entry + OFFSET]!;
    const from = this.#arenaViews[entries[entry + ARENA]!]!;
    writer.addFrom(key, this.#lsnOf(entry), from, offset, offset + entries[entry + LENGTH]!);
  }

  /** A new entry, the newest of its key, whose value is to be written at the end of what is taken of the current arena. */
  #addEntry(row: number, lsn: Lsn, length: number): void {
    assert(lsn >= this.#newestLsn && lsn >= this.lsnStart, 'puts come in the order of the log');
    this.#newestLsn = lsn;
    const entry = this.#entryCount * ENTRY_WORDS;
    if (entry === this.#entries.length) this.#growEntries();
    if (this.#arena.length - this.#arenaFree < length) this.#addArena(length);
    const entries = this.#entries;
    entries[entry + OLDER] = this.#keys.newestOf(row);
    entries[entry + ARENA] = this.#arenaBytes.length - 1;
    entries[entry + OFFSET] = this.#arenaFree;
    entries[entry + LENGTH] = length;
    entries[entry + LSN_LOW] = lsn;
    entries[entry + LSN_HIGH] = Math.floor(lsn / TWO_32);
    this.#keys.setNewest(row, entry);
    this.#arenaFree += length;
    this.#valueBytes += length;
    this.#entryCount++;
  }

  #lsnOf(entry: number): Lsn {
    return this.#entries[entry + LSN_HIGH]! * TWO_32 + (this.#entries[entry + LSN_LOW]! >>> 0);
  }

  #count(row: number, length: number): void {
    const changes = this.#keys.countChange(row, length);
    if (changes < HOT_CHANGES) return;
    if (changes >= HOT_CHANGES_MAX || this.#keys.changedBytesOf(row) >= HOT_BYTES) {
      this.#keys.restart(row);
      this.#hot.push(row);
    }
  }

  /** The newest entry of a key that is not to be discarded. */
  #atOrBelow(newest: number, lsn: Lsn): number {
    let entry = newest;
    while (entry !== NONE && this.#lsnOf(entry) > lsn) {
      entry = this.#entries[entry + OLDER]!;
      this.#discardedCount++;
    }
    return entry;
  }

  #value(entry: number): Buffer {
    const entries = this.#entries;
    const offset = entries[entry + OFFSET]!;
    return this.#arenaBytes[entries[entry + ARENA]!]!.subarray(offset, offset + entries[entry + LENGTH]!);
  }

  #addArena(bytesMin: number): void {
    const size = Math.min(ARENA_BYTES_MAX, Math.max(ARENA_BYTES_MIN, this.#arena.length * 2));
    this.#arena = Buffer.allocUnsafeSlow(Math.max(size, bytesMin));
    this.#arenaView = viewOf(this.#arena);
    this.#arenaBytes.push(this.#arena);
    this.#arenaViews.push(this.#arenaView);
    this.#arenaFree = 0;
  }

  #growEntries(): void {
    const count = this.#entries.length / ENTRY_WORDS;
    // Growing by doubling copies everything, and leaves as much again to the garbage collector.
    const expected = count >= ENTRIES_EXPECTING ? Math.ceil(this.#expectedCount * 1.1) : 0;
    const larger = new Int32Array(Math.max(count * 2, expected) * ENTRY_WORDS);
    larger.set(this.#entries);
    this.#entries = larger;
  }
}

const NO_KEYS: readonly Key[] = [];

function holdsPages(kind: number): boolean {
  return kind === KEY_KIND.relationBlock || kind === KEY_KIND.slruPage;
}
