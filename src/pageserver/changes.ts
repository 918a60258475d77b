/**
 * What changed between two LSNs of a timeline: for each fork of a relation the blocks that have a value in the window, as ranges, in key order.
 *
 * The answer comes from the indexes of layers and from the maps of memory layers; pages are not read, and of values only the sizes of forks whose
 * size was set in the window. The layer map leaves out layers without LSNs in the window, a layer's index leaves out key blocks without (each says its newest
 * LSN), and in the others the LSN of each entry decides. So the cost is that of the key blocks with changes in the window or after it, whatever the size of the
 * database and of its history.
 * Image layers say nothing about when something changed, and are not looked at; images inside of delta layers stand at the LSN of a change.
 *
 * What it means:
 * - Blocks that are not named are the same at both LSNs, byte for byte, for a reader of the store. (No false negatives.)
 * - Blocks that are named were written in between. They may have been written back to what they were.
 * - Only blocks that exist at the end of the window are named. What a truncation or a drop took away shows in the sizes.
 *
 * Garbage collection does not lose the answer: a merge keeps, for every LSN that may be read, each key's newest value at or below it, save for blocks
 * that do not exist there; so a key that changed up to a readable LSN still has a value in the window. The start of the window has to be readable for
 * its sizes, and because whoever asks wants to compare with it.
 *
 * Bounded: a block of keys for each layer in the window, and the ranges of one piece. Between slices of work the process does other things; layers
 * that are flushed or compacted meanwhile are taken in the place of those they replace, at the key that was reached.
 */

import { setImmediate as yieldToOthers } from 'node:timers/promises';
import type { BlockPosition } from '../api/pageserver.ts';
import { StrataError } from '../base/errors.ts';
import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { compareKeys, KEY_KIND, nextKey, prefixRange, relationBlockKey, relationSizeKey } from './key.ts';
import type { Key, KeyRange, RelationFork } from './key.ts';
import type { LayerFile } from './layers/layer-file.ts';
import type { Timeline } from './timeline.ts';

/** Blocks `[start, end)`. */
export type BlockRange = readonly [start: number, end: number];

export interface ForkChanges {
  readonly fork: RelationFork;
  /** Rising and apart from each other; of blocks that exist at the end of the window. */
  readonly ranges: readonly BlockRange[];
  /** In blocks, undefined where the fork does not exist; absent when the size was not set in the window. */
  readonly size?: { readonly before: number | undefined; readonly after: number | undefined };
  /** More ranges of this fork follow in the next piece. */
  readonly isContinued: boolean;
}

export interface ChangesOptions {
  readonly fromLsn: Lsn;
  /** Has to be visible (Timeline.waitLsn). */
  readonly toLsn: Lsn;
  /** Goes on after this block: the end of a piece that was given before. */
  readonly after?: BlockPosition;
  /** Ranges in one piece. */
  readonly rangesMax?: number;
  /** How long it works before it lets others; 0, for tests: as short as can be. */
  readonly sliceMs?: number;
}

/** A part of history that changes are looked for in: LSNs `floor < LSN <= lsn`. */
interface Window {
  readonly history: Timeline;
  readonly floor: Lsn;
  readonly lsn: Lsn;
}

const RANGES_MAX = 4096;
const SLICE_MS = 5;
const NO_RANGE = -1;
const SEARCHING = Symbol('searching');
const BLOCKS = prefixRange(KEY_KIND.relationBlock);
const SIZES = prefixRange(KEY_KIND.relationSize);
const SLRU_PAGES = prefixRange(KEY_KIND.slruPage);

/** Throws `history-gone` when one of the LSNs is no longer kept, `bad-request` when they are no window of the timeline. */
export class ChangeScan {
  readonly #timeline: Timeline;
  readonly #fromLsn: Lsn;
  readonly #toLsn: Lsn;
  readonly #rangesMax: number;
  readonly #windows: readonly Window[];
  readonly #clock: SliceClock;
  readonly #sizes: ChangedKeys;
  readonly #blocks: ChangedKeys;
  /** The fork of the last piece, when more of it follows, and what its size does. */
  #open: { readonly fork: RelationFork; readonly size: ForkChanges['size'] } | undefined;

  constructor(timeline: Timeline, options: ChangesOptions) {
    const { fromLsn, toLsn, after, rangesMax = RANGES_MAX, sliceMs = SLICE_MS } = options;
    assertWindow(timeline, fromLsn, toLsn);
    this.#timeline = timeline;
    this.#fromLsn = fromLsn;
    this.#toLsn = toLsn;
    this.#rangesMax = rangesMax;
    this.#clock = new SliceClock(sliceMs);
    this.#windows = windowsOf(timeline, fromLsn, toLsn);
    this.#sizes = new ChangedKeys(this.#windows, after === undefined ? SIZES : sizesAfter(after), this.#clock);
    this.#blocks = new ChangedKeys(this.#windows, after === undefined ? BLOCKS : blocksAfter(after), this.#clock);
  }

  /** Blocks of layers' indexes that were read. */
  get keyBlocksRead(): number {
    return this.#sizes.keyBlocksRead + this.#blocks.keyBlocksRead;
  }

  /** The next piece, in the order of forks; undefined at the end. */
  async next(): Promise<ForkChanges | undefined> {
    for (;;) {
      const open = this.#open ?? (await this.#nextFork());
      if (open === undefined) return undefined;
      const { fork, size } = open;
      const ranges: BlockRange[] = [];
      const isContinued = await this.#collect(fork, size === undefined ? Infinity : (size.after ?? 0), ranges);
      this.#open = isContinued ? open : undefined;
      if (ranges.length === 0 && !isContinued && size?.before === size?.after) continue;
      return { fork, ranges, ...(size === undefined ? {} : { size }), isContinued };
    }
  }

  /** The next size that was set in the window, in the order of forks; undefined at the end. For who wants sizes alone: not to be mixed with `next`. */
  async nextSize(): Promise<NonNullable<ForkChanges['size']> | undefined> {
    const sizes = this.#sizes;
    if (!sizes.isReady) await sizes.prepare();
    const key = sizes.current;
    if (key === undefined) return undefined;
    sizes.advance();
    return { before: this.#sizeAt(key, this.#fromLsn), after: this.#sizeAt(key, this.#toLsn) };
  }

  /** How many pages of transaction status and the like (SLRUs) have values in the window. */
  async slruPageCount(): Promise<number> {
    const pages = new ChangedKeys(this.#windows, SLRU_PAGES, this.#clock);
    let count = 0;
    for (;;) {
      if (!pages.isReady) await pages.prepare();
      if (pages.current === undefined) return count;
      count++;
      pages.advance();
    }
  }

  async #nextFork(): Promise<{ fork: RelationFork; size: ForkChanges['size'] } | undefined> {
    const sizes = this.#sizes;
    const blocks = this.#blocks;
    if (!sizes.isReady) await sizes.prepare();
    if (!blocks.isReady) await blocks.prepare();
    const { current } = sizes;
    const isSized =
      current !== undefined && (blocks.current === undefined || compareForks(current, blocks.current) <= 0);
    const key = isSized ? current : blocks.current;
    if (key === undefined) return undefined;
    const fork: RelationFork = { spc: key.spc, db: key.db, rel: key.rel, fork: key.fork };
    if (!isSized) return { fork, size: undefined };
    sizes.advance();
    return { fork, size: { before: this.#sizeAt(key, this.#fromLsn), after: this.#sizeAt(key, this.#toLsn) } };
  }

  #sizeAt(key: Key, lsn: Lsn): number | undefined {
    return ownerOf(this.#timeline, lsn).getImage(key, lsn)?.readUInt32LE(0);
  }

  /** Takes the fork's blocks below `end`; true when not all that follows fits. */
  async #collect(fork: RelationFork, end: number, ranges: BlockRange[]): Promise<boolean> {
    const blocks = this.#blocks;
    let start = NO_RANGE;
    let next = 0;
    for (;;) {
      if (!blocks.isReady) await blocks.prepare();
      const key = blocks.current;
      const blk = key !== undefined && compareForks(key, fork) === 0 ? key.blk : undefined;
      if (start !== NO_RANGE && blk === next && blk < end) {
        next++;
      } else {
        if (start !== NO_RANGE) ranges.push([start, next]);
        start = NO_RANGE;
        if (blk === undefined) return false;
        if (ranges.length >= this.#rangesMax) return true;
        if (blk < end) {
          start = blk;
          next = blk + 1;
        }
      }
      blocks.advance();
    }
  }
}

/** Where the histories of two timelines, each up to its LSN, part; undefined when they have no ancestor in common. */
export function commonPoint(
  a: Timeline,
  aLsn: Lsn,
  b: Timeline,
  bLsn: Lsn,
): { readonly timeline: Timeline; readonly lsn: Lsn } | undefined {
  const ofB = new Map(pathOf(b, bLsn).map(({ timeline, lsn }) => [timeline, lsn]));
  for (const { timeline, lsn } of pathOf(a, aLsn)) {
    const other = ofB.get(timeline);
    if (other !== undefined) return { timeline, lsn: Math.min(lsn, other) };
  }
  return undefined;
}

/** The timeline and its ancestors, nearest first, and up to where each counts. */
function pathOf(timeline: Timeline, lsn: Lsn): { timeline: Timeline; lsn: Lsn }[] {
  const inherited = timeline.ancestry().map((step) => ({ timeline: step.timeline, lsn: Math.min(lsn, step.endLsn) }));
  return [{ timeline, lsn }, ...inherited];
}

function windowsOf(timeline: Timeline, fromLsn: Lsn, toLsn: Lsn): Window[] {
  const windows: Window[] = [];
  for (const { timeline: history, lsn } of pathOf(timeline, toLsn)) {
    const floor = Math.max(fromLsn, history.index.startLsn);
    if (floor < lsn) windows.push({ history, floor, lsn });
  }
  return windows;
}

/** Whose state a timeline's is at an LSN. At a branch point both have it, and it is the ancestor that keeps it. */
export function ownerOf(timeline: Timeline, lsn: Lsn): Timeline {
  let owner = timeline;
  while (owner.ancestor !== undefined && lsn <= owner.index.startLsn) owner = owner.ancestor;
  return owner;
}

function assertWindow(timeline: Timeline, fromLsn: Lsn, toLsn: Lsn): void {
  if (fromLsn > toLsn) {
    throw new StrataError('bad-request', `changes from ${formatLsn(fromLsn)} to ${formatLsn(toLsn)} go backwards`);
  }
  if (toLsn > timeline.lastRecordLsn) {
    const end = formatLsn(timeline.lastRecordLsn);
    throw new StrataError(
      'bad-request',
      `${formatLsn(toLsn)} is after the end of timeline ${timeline.timelineId}, ${end}`,
    );
  }
  for (const lsn of [fromLsn, toLsn]) ownerOf(timeline, lsn).assertReadable(lsn);
}

function sizesAfter({ fork: { spc, db, rel, fork }, blk }: BlockPosition): KeyRange {
  const key = relationSizeKey(spc, db, rel, fork);
  return { start: blk === undefined ? nextKey(key) : key, end: SIZES.end };
}

function blocksAfter({ fork: { spc, db, rel, fork }, blk }: BlockPosition): KeyRange {
  return { start: nextKey(relationBlockKey(spc, db, rel, fork, blk ?? 0xffffffff)), end: BLOCKS.end };
}

function compareForks(a: RelationFork, b: RelationFork): number {
  return a.spc - b.spc || a.db - b.db || a.rel - b.rel || a.fork - b.fork;
}

/** Says when it is time to let others work. */
class SliceClock {
  readonly #sliceMs: number;
  #startMs = performance.now();
  #asked = 0;

  constructor(sliceMs: number) {
    this.#sliceMs = sliceMs;
  }

  get isOver(): boolean {
    return performance.now() - this.#startMs >= this.#sliceMs;
  }

  /** As isOver, for those who ask for each of very many keys. */
  isOverNow(): boolean {
    return (this.#sliceMs === 0 || (++this.#asked & 255) === 0) && this.isOver;
  }

  async pause(): Promise<void> {
    await yieldToOthers();
    this.#startMs = performance.now();
  }
}

interface Source {
  readonly keys: Iterator<Key | undefined, undefined>;
  /** Where it stands. */
  key: Key;
}

/** The keys of a range that have values in the windows, in order, each once. */
class ChangedKeys {
  readonly #windows: readonly Window[];
  readonly #range: KeyRange;
  readonly #clock: SliceClock;
  /** The key that was taken last. */
  #taken: Key | undefined;
  /** Sources by their key: a heap. */
  #heap: Source[] = [];
  /** Sources that do not know yet where they stand. */
  #searching: Iterator<Key | undefined, undefined>[] = [];
  /** What the histories consisted of when the sources were made. */
  #version: readonly unknown[] = [];
  #isReady = false;
  keyBlocksRead = 0;

  constructor(windows: readonly Window[], range: KeyRange, clock: SliceClock) {
    this.#windows = windows;
    this.#range = range;
    this.#clock = clock;
  }

  /** Whether `current` may be asked for; else `prepare` has to be awaited first. */
  get isReady(): boolean {
    return this.#isReady;
  }

  /** The smallest key that was not taken; undefined at the end. */
  get current(): Key | undefined {
    return this.#heap[0]?.key;
  }

  /** Takes the current key. */
  advance(): void {
    const taken = this.current;
    if (taken === undefined) return;
    this.#taken = taken;
    const heap = this.#heap;
    for (let top = heap[0]; top !== undefined && compareKeys(top.key, taken) === 0; top = heap[0]) {
      const key = this.#nextOf(top.keys);
      if (key === undefined || key === SEARCHING) {
        if (key === SEARCHING) this.#searching.push(top.keys);
        const last = heap.pop()!;
        if (heap.length > 0 && last !== top) heap[0] = last;
      } else {
        top.key = key;
      }
      sink(heap);
    }
    if (this.#searching.length > 0 || this.#clock.isOverNow()) this.#isReady = false;
  }

  async prepare(): Promise<void> {
    do {
      if (this.#clock.isOver) await this.#clock.pause();
      if (!this.#isUpToDate()) this.#begin();
      const searching = this.#searching;
      do {
        const keys = searching.pop();
        if (keys === undefined) break;
        const key = this.#nextOf(keys);
        if (key === SEARCHING) searching.push(keys);
        else if (key !== undefined) rise(this.#heap, { keys, key });
      } while (!this.#clock.isOver);
    } while (this.#searching.length > 0);
    this.#isReady = true;
  }

  /** The next key of a source; SEARCHING when the slice is over before it has come to one. */
  #nextOf(keys: Iterator<Key | undefined, undefined>): Key | typeof SEARCHING | undefined {
    for (;;) {
      const { value, done } = keys.next();
      if (value !== undefined) return value;
      if (done === true) return undefined;
      this.keyBlocksRead++;
      if (this.#clock.isOver) return SEARCHING;
    }
  }

  #begin(): void {
    const start = this.#taken === undefined ? this.#range.start : nextKey(this.#taken);
    const range = { start, end: this.#range.end };
    this.#version = this.#versionNow();
    this.#heap = [];
    this.#searching = [];
    for (const { history, floor, lsn } of this.#windows) {
      for (const layer of history.memoryLayers) {
        if (layer.lsnStart <= lsn && layer.newestLsn > floor) this.#searching.push(layer.keysWithin(range, floor, lsn));
      }
      for (const run of history.layerMap.runsWithin(floor, lsn)) {
        this.#searching.push(keysOfRun(run, range, floor, lsn));
      }
    }
  }

  #isUpToDate(): boolean {
    for (const { history } of this.#windows) history.assertRunning();
    const now = this.#versionNow();
    return now.length === this.#version.length && now.every((each, i) => each === this.#version[i]);
  }

  #versionNow(): unknown[] {
    return this.#windows.flatMap(({ history }) => [history.memoryLayers, history.layerMap.changeCount]);
  }
}

function* keysOfRun(
  layers: readonly LayerFile[],
  range: KeyRange,
  floor: Lsn,
  lsn: Lsn,
): Generator<Key | undefined, undefined> {
  for (const layer of layers) {
    const { keyStart, keyEnd } = layer.description;
    if (compareKeys(keyEnd, range.start) > 0 && compareKeys(keyStart, range.end) < 0) {
      yield* layer.keysWithin(range, floor, lsn);
    }
  }
  return undefined;
}

/** Puts a source into the heap. */
function rise(heap: Source[], source: Source): void {
  let at = heap.push(source) - 1;
  while (at > 0) {
    const parent = (at - 1) >> 1;
    if (compareKeys(heap[parent]!.key, source.key) <= 0) break;
    heap[at] = heap[parent]!;
    at = parent;
  }
  heap[at] = source;
}

/** Brings the first source of the heap to its place. */
function sink(heap: Source[]): void {
  const source = heap[0];
  if (source === undefined) return;
  let at = 0;
  for (;;) {
    let child = at * 2 + 1;
    if (child >= heap.length) break;
    if (child + 1 < heap.length && compareKeys(heap[child + 1]!.key, heap[child]!.key) < 0) child++;
    if (compareKeys(source.key, heap[child]!.key) <= 0) break;
    heap[at] = heap[child]!;
    at = child;
  }
  heap[at] = source;
}
