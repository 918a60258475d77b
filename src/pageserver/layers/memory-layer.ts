/**
 * The newest part of a timeline's history, in memory until it is flushed to a delta layer.
 *
 * A put costs two look-ups and a copy: fork, block, newest entry. Entries stand one after the other in arenas, each a head of five words and its
 * value, so that a head and what it says of cost one look into memory; each names the next older entry of its key. Keys are rows of an array, found by an open
 * hash table (KeyRows). So the garbage collector sees a few large arrays, however many values there are, and the arenas are used again by the next layer
 * (arena.ts). Puts come in the order of the log, so a key's LSNs never fall.
 *
 * An entry is known by its place: the number of its arena times 2^20, plus the word in it where its head begins. Its head:
 *
 *   word 0  the place of the next older entry of its key, or -1
 *   word 1  its key's row, or -1 when it was discarded
 *   word 2  length of the value, in bytes
 *   word 3  low half of the LSN
 *   word 4  high half of the LSN
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
import { ARENA_BYTES_MAX, letGo, takeArena } from './arena.ts';
import type { Arena } from './arena.ts';
import { copyBytes } from './copy-bytes.ts';
import { KEY_ROW_BYTES, KeyRows, NO_ROW } from './key-rows.ts';
import type { ForkKey } from './key-rows.ts';
import type { LayerWriter } from './layer-writer.ts';

/**
 * An image is due after this many changes in a row, if they are as large as it is; after HOT_CHANGES_MAX whatever their size. That is one more than fill
 * a page of the smallest index tuples: a page that is filled once is not hot.
 */
export const HOT_CHANGES = 408;
export const HOT_CHANGES_MAX = 512;
const HOT_BYTES = 8192;

/** The words of an entry's head. */
const OLDER = 0;
const ROW = 1;
const LENGTH = 2;
const LSN_LOW = 3;
const LSN_HIGH = 4;
const HEAD_WORDS = 5;
const CACHE_LINE_WORDS = 16;
/** An entry's place is its arena's number above these bits, and its word in the arena in them. */
const WORD_BITS = 20;
const WORD_MASK = 2 ** WORD_BITS - 1;
const ARENA_COUNT_MAX = 2 ** (31 - WORD_BITS);
const TWO_32 = 2 ** 32;
const NONE = -1;
/** Up to this many bytes are copied one by one more quickly than by a call out of JavaScript. */
const BYTES_LOOP_MAX = 16;

/** A key and where its entries are: at places[start] to places[end], oldest first. */
export interface KeyEntries {
  readonly key: Key;
  readonly places: Int32Array;
  readonly start: number;
  readonly end: number;
}

export class MemoryLayer implements ValueSource {
  /** Every entry's LSN is at or above this. */
  readonly lsnStart: Lsn;
  readonly createdAtMs: number;
  readonly #keys: KeyRows;
  #hot: number[] = [];
  /** Of the layer before this one. */
  readonly #expectedBytes: number;
  #entryCount = 0;
  #discardedCount = 0;
  #arenas: Arena[] = [];
  #arena: Arena = NO_ARENA;
  /** Words of the current arena that are taken, and of those before it. */
  #arenaWords = 0;
  readonly #arenaEnds: number[] = [];
  #newestLsn: Lsn = 0;
  #sizeBytes = 0;
  /** How many go through the keys a step at a time; who gives it up on the way is counted for good. */
  #walkers = 0;

  /** `before` is the layer before this one. */
  constructor(lsnStart: Lsn, nowMs: number, before?: MemoryLayer) {
    this.lsnStart = lsnStart;
    this.createdAtMs = nowMs;
    this.#expectedBytes = before === undefined ? 0 : before.#sizeBytes;
    this.#keys = new KeyRows(before === undefined ? 0 : before.#keys.count);
  }

  get isEmpty(): boolean {
    return this.#entryCount === this.#discardedCount;
  }

  /** Memory in use, near enough. */
  get sizeBytes(): number {
    return this.#sizeBytes;
  }

  get newestLsn(): Lsn {
    return this.#newestLsn;
  }

  /** By how much `sizeBytes` has grown. */
  put(key: Key, lsn: Lsn, value: Buffer): number {
    const { length } = value;
    const before = this.#sizeBytes;
    const row = this.#rowOf(key.kind, key.spc, key.db, key.rel, key.fork, key.blk);
    const offset = this.#addEntry(row, lsn, length);
    if (length <= BYTES_LOOP_MAX) for (let i = 0; i < length; i++) this.#arena.bytes[offset + i] = value[i]!;
    else this.#arena.bytes.set(value, offset);
    if (needsNoPrior(value[0]!)) this.#keys.restart(row);
    else if (holdsPages(key.kind)) this.#count(row, length);
    return this.#sizeBytes - before;
  }

  /** Puts a WAL record as a value of one of its blocks, as encodeRecord (value.ts) would make it, without making it first. By how much `sizeBytes` has grown. */
  putRecord(record: WalRecord, block: WalBlock, isBase: boolean): number {
    const { totalLength } = record;
    const length = RECORD_HEADER_BYTES + totalLength;
    const before = this.#sizeBytes;
    const row = this.#rowOf(KEY_KIND.relationBlock, block.spc, block.db, block.rel, block.fork, block.blk);
    const offset = this.#addEntry(row, record.endLsn, length);
    const { bytes, view } = this.#arena;
    writeRecordHeader(bytes, offset, record.startLsn, block.id, isBase);
    copyBytes(record.sourceView, record.sourceOffset, view, offset + RECORD_HEADER_BYTES, totalLength);
    clearRecordLinks(bytes, offset + RECORD_HEADER_BYTES);
    if (isBase) this.#keys.restart(row);
    this.#count(row, length);
    return this.#sizeBytes - before;
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
    const keys = this.#keys;
    for (let row = 0; row < keys.count; row++) {
      for (let entry = keys.newestOf(row); entry !== NONE && lsnOf(this.#arenas, entry) > lsn;) {
        const older = olderThan(this.#arenas, entry);
        this.#arenas[entry >>> WORD_BITS]!.words[(entry & WORD_MASK) + ROW] = NONE;
        keys.pop(row, older);
        this.#discardedCount++;
        entry = older;
      }
    }
    this.#newestLsn = lsn;
  }

  collect(key: Key, lsn: Lsn, floor: Lsn, chain: Chain): boolean {
    const row = this.#keys.find(key.kind, key.spc, key.db, key.rel, key.fork, key.blk);
    if (row === NO_ROW) return false;
    for (let entry = this.#keys.newestOf(row); entry !== NONE; entry = olderThan(this.#arenas, entry)) {
      const entryLsn = lsnOf(this.#arenas, entry);
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
  keysWithin(range: KeyRange, floor: Lsn, lsn: Lsn): Generator<Key, undefined> {
    this.#walkers++;
    return this.#keysWithin(this.#arenas, range, floor, lsn);
  }

  /** Flushed meanwhile, the layer keeps its memory for whoever is on the way. */
  *#keysWithin(arenas: readonly Arena[], range: KeyRange, floor: Lsn, lsn: Lsn): Generator<Key, undefined> {
    const isWanted = (fork: ForkKey): boolean =>
      compareKeys({ ...fork, blk: 0xffffffff }, range.start) >= 0 && compareKeys({ ...fork, blk: 0 }, range.end) < 0;
    for (const row of this.#keys.sorted(isWanted)) {
      let entry = this.#keys.newestOf(row);
      while (entry !== NONE && lsnOf(arenas, entry) > lsn) entry = olderThan(arenas, entry);
      if (entry === NONE || lsnOf(arenas, entry) <= floor) continue;
      const key = this.#keys.keyOf(row);
      if (compareKeys(key, range.start) >= 0 && compareKeys(key, range.end) < 0) yield key;
    }
    this.#walkers--;
    return undefined;
  }

  /**
   * All keys in order, each with its entries, oldest first. Before them come undefineds: sorting goes over all the memory, and between two of them others
   * may do something. Entries are sorted as they stand, and not key by key along their links, as each of those would be a wait for memory.
   */
  *inOrder(): Generator<KeyEntries | undefined, undefined> {
    const keys = this.#keys;
    const rows = keys.sorted();
    const places = new Int32Array(this.#entryCount - this.#discardedCount);
    /** By row: where its next entry goes. */
    const next = new Int32Array(keys.count);
    let start = 0;
    for (const row of rows) {
      next[row] = start;
      start += keys.entryCountOf(row);
    }
    for (let number = 0; number < this.#arenas.length; number++) {
      const { words } = this.#arenas[number]!;
      const end = number === this.#arenas.length - 1 ? this.#arenaWords : this.#arenaEnds[number]!;
      for (let at = 0; at < end; at += HEAD_WORDS + wordsOf(words[at + LENGTH]!)) {
        const row = words[at + ROW]!;
        if (row !== NONE) places[next[row]!++] = (number << WORD_BITS) | at;
      }
      yield undefined;
    }
    start = 0;
    for (const row of rows) {
      const end = next[row]!;
      if (end > start) yield { key: keys.keyOf(row), places, start, end };
      start = end;
    }
    return undefined;
  }

  /**
   * Looks at entries that are wanted next. They lie far apart, and a look at memory that is in no cache takes as long as writing the entry: here the processor waits
   * for many at once. What is returned means nothing; who keeps it keeps the compiler from leaving out the looks.
   */
  touch(places: Int32Array, start: number, end: number): number {
    let seen = 0;
    for (let i = start; i < end; i++) {
      const { words } = this.#arenas[places[i]! >>> WORD_BITS]!;
      const at = places[i]! & WORD_MASK;
      seen ^= words[at]! ^ words[Math.min(at + CACHE_LINE_WORDS, words.length - 1)]!;
    }
    return seen;
  }

  /** Adds an entry, which is one of `key`, to a layer file. */
  writeTo(writer: LayerWriter, key: Key, entry: number): void {
    const { words, view } = this.#arenas[entry >>> WORD_BITS]!;
    const at = entry & WORD_MASK;
    const start = (at + HEAD_WORDS) * 4;
    const lsn = words[at + LSN_HIGH]! * TWO_32 + (words[at + LSN_LOW]! >>> 0);
    writer.addFrom(key, lsn, view, start, start + words[at + LENGTH]!);
  }

  /** Gives its memory to others: nobody reads the layer any more, or has a view of a value of it. */
  release(): void {
    const arenas = this.#arenas;
    this.#arenas = [];
    this.#arena = NO_ARENA;
    if (this.#walkers === 0) for (const arena of arenas) letGo(arena);
  }

  #rowOf(kind: number, spc: number, db: number, rel: number, fork: number, blk: number): number {
    const keys = this.#keys;
    const before = keys.count;
    const row = keys.rowOf(kind, spc, db, rel, fork, blk);
    this.#sizeBytes += (keys.count - before) * KEY_ROW_BYTES;
    return row;
  }

  /** A new entry, the newest of its key. Where in the current arena its value is to be written. */
  #addEntry(row: number, lsn: Lsn, length: number): number {
    assert(lsn >= this.#newestLsn && lsn >= this.lsnStart, 'puts come in the order of the log');
    this.#newestLsn = lsn;
    const neededWords = HEAD_WORDS + wordsOf(length);
    if (this.#arena.words.length - this.#arenaWords < neededWords) this.#addArena(neededWords * 4);
    const { words } = this.#arena;
    const at = this.#arenaWords;
    words[at + OLDER] = this.#keys.push(row, ((this.#arenas.length - 1) << WORD_BITS) | at);
    words[at + ROW] = row;
    words[at + LENGTH] = length;
    words[at + LSN_LOW] = lsn;
    words[at + LSN_HIGH] = lsn / TWO_32;
    this.#arenaWords = at + neededWords;
    this.#sizeBytes += neededWords * 4;
    this.#entryCount++;
    return (at + HEAD_WORDS) * 4;
  }

  #count(row: number, length: number): void {
    const changes = this.#keys.countChange(row, length);
    if (changes < HOT_CHANGES) return;
    if (changes >= HOT_CHANGES_MAX || this.#keys.changedBytesOf(row) >= HOT_BYTES) {
      this.#keys.restart(row);
      this.#hot.push(row);
    }
  }

  #value(entry: number): Buffer {
    const { words, bytes } = this.#arenas[entry >>> WORD_BITS]!;
    const at = entry & WORD_MASK;
    const start = (at + HEAD_WORDS) * 4;
    return bytes.subarray(start, start + words[at + LENGTH]!);
  }

  #addArena(bytesMin: number): void {
    assert(this.#arenas.length < ARENA_COUNT_MAX, 'a memory layer is flushed long before it has so many arenas');
    const wanted = this.#expectedBytes >= ARENA_BYTES_MAX ? ARENA_BYTES_MAX : this.#arena.bytes.length * 2;
    if (this.#arenas.length > 0) this.#arenaEnds.push(this.#arenaWords);
    this.#arena = takeArena(bytesMin, wanted);
    this.#arenas.push(this.#arena);
    this.#arenaWords = 0;
  }
}

const NO_ARENA: Arena = { bytes: Buffer.alloc(0), view: new DataView(new ArrayBuffer(0)), words: new Int32Array(0) };
const NO_KEYS: readonly Key[] = [];

/** How many words so many bytes take. */
function wordsOf(bytes: number): number {
  return (bytes + 3) >>> 2;
}

function olderThan(arenas: readonly Arena[], entry: number): number {
  return arenas[entry >>> WORD_BITS]!.words[(entry & WORD_MASK) + OLDER]!;
}

function lsnOf(arenas: readonly Arena[], entry: number): Lsn {
  const { words } = arenas[entry >>> WORD_BITS]!;
  const at = entry & WORD_MASK;
  return words[at + LSN_HIGH]! * TWO_32 + (words[at + LSN_LOW]! >>> 0);
}

function holdsPages(kind: number): boolean {
  return kind === KEY_KIND.relationBlock || kind === KEY_KIND.slruPage;
}
