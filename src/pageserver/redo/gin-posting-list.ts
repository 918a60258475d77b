/**
 * Posting lists of gin, and the changes that records make to the lists of a posting tree's leaf (Postgres: ginpostinglist.c,
 * ginRedoRecompress in ginxlog.c).
 *
 * Posting list, of an even number of bytes:
 *   0  6 bytes  the first item pointer
 *   6  u16      n, bytes that follow, without padding
 *   8  n bytes  for each further item its distance from the one before, in groups of 7 bits, lowest first, the high bit of a byte says
 *               that more follow; an item counts as block number * 2048 + offset number
 *   8 + n       one zero byte when n is odd
 *
 * Changes: u16 number of actions; each action: u8 index of the segment, counted as the segments were before, u8 kind:
 *   1 delete     the segment goes
 *   2 insert     a posting list comes before the segment, or at the end
 *   3 replace    a posting list takes the segment's place
 *   4 add items  u16 count, that many item pointers, which join those of the segment
 * The indexes rise (equal for insertions before the same segment). Posting lists in actions are padded to 2 bytes.
 */

import { ITEM_POINTER_SIZE, readBlockId, writeItemPointer } from './index-tuple.ts';

const DELETE = 1;
const INSERT = 2;
const REPLACE = 3;
const ADD_ITEMS = 4;

const LIST_HEADER_SIZE = 8;
const OFFSET_NUMBERS = 2048;

const scratch = Buffer.alloc(8192);

/**
 * Applies the actions at `at` in `bytes` to the posting lists in the first `size` bytes of `area`, in place; `area` goes to the end of
 * what the page has for them. Returns their new size, or undefined when the actions do not fit the lists.
 */
export function recompressLeaf(area: Buffer, size: number, bytes: Buffer, at: number): number | undefined {
  const old = scratch;
  area.copy(old, 0, 0, size);
  const actions = bytes.readUInt16LE(at);
  at += 2;
  let from = 0;
  let to = 0;
  let segment = 0;
  for (let i = 0; i < actions; i++) {
    const index = bytes[at]!;
    const kind = bytes[at + 1]!;
    at += 2;
    for (; segment < index && from < size; segment++) {
      const length = listSize(old, from);
      to = append(area, to, old, from, length);
      from += length;
    }
    if (segment !== index || (from >= size && kind !== INSERT)) return undefined;
    if (kind === INSERT || kind === REPLACE) {
      const length = listSize(bytes, at);
      to = append(area, to, bytes, at, length);
      at += length;
    } else if (kind === ADD_ITEMS) {
      const count = bytes.readUInt16LE(at);
      const list = encodeList(merge(decodeItems(bytes, at + 2, count), decodeList(old, from)));
      to = append(area, to, list, 0, list.length);
      at += 2 + count * ITEM_POINTER_SIZE;
    } else if (kind !== DELETE) return undefined;
    if (kind !== INSERT) {
      from += listSize(old, from);
      segment++;
    }
    if (to > area.length) return undefined;
  }
  to = append(area, to, old, from, size - from);
  return from > size || to > area.length ? undefined : to;
}

/** Turns the `count` item pointers at `start`, as pages from before 9.4 have them, into one posting list there; returns its size. */
export function compressUncompressedLeaf(page: Buffer, start: number, count: number): number {
  if (count === 0) return 0;
  const list = encodeList(decodeItems(page, start, count));
  list.copy(page, start);
  return list.length;
}

/** Items are numbers: block number * 2048 + offset number, below 2^43. */
export function decodeList(bytes: Buffer, start: number): number[] {
  let item = readItem(bytes, start);
  const items = [item];
  let at = start + LIST_HEADER_SIZE;
  const end = at + bytes.readUInt16LE(start + 6);
  while (at < end) {
    let factor = 1;
    let byte: number;
    do {
      byte = bytes[at++]!;
      item += (byte & 0x7f) * factor;
      factor *= 128;
    } while ((byte & 0x80) !== 0 && at < end);
    items.push(item);
  }
  return items;
}

export function encodeList(items: readonly number[]): Buffer {
  const list = Buffer.alloc(LIST_HEADER_SIZE + items.length * 7 + 1);
  let previous = items[0]!;
  writeItemPointer(list, Math.floor(previous / OFFSET_NUMBERS), previous % OFFSET_NUMBERS, 0);
  let at = LIST_HEADER_SIZE;
  for (let i = 1; i < items.length; i++) {
    const item = items[i]!;
    let distance = item - previous;
    for (; distance > 0x7f; distance = Math.floor(distance / 128)) list[at++] = 0x80 | (distance % 128);
    list[at++] = distance;
    previous = item;
  }
  list.writeUInt16LE(at - LIST_HEADER_SIZE, 6);
  return list.subarray(0, at + (at & 1));
}

function decodeItems(bytes: Buffer, at: number, count: number): number[] {
  const items: number[] = [];
  for (let i = 0; i < count; i++) items.push(readItem(bytes, at + i * ITEM_POINTER_SIZE));
  return items;
}

function readItem(bytes: Buffer, at: number): number {
  return readBlockId(bytes, at) * OFFSET_NUMBERS + bytes.readUInt16LE(at + 4);
}

/** Merges two rising lists; what both have appears once. */
function merge(a: readonly number[], b: readonly number[]): number[] {
  const merged: number[] = [];
  let i = 0;
  let j = 0;
  while (i < a.length && j < b.length) {
    const x = a[i]!;
    const y = b[j]!;
    merged.push(Math.min(x, y));
    if (x <= y) i++;
    if (y <= x) j++;
  }
  while (i < a.length) merged.push(a[i++]!);
  while (j < b.length) merged.push(b[j++]!);
  return merged;
}

function listSize(bytes: Buffer, at: number): number {
  const length = bytes.readUInt16LE(at + 6);
  return LIST_HEADER_SIZE + length + (length & 1);
}

function append(area: Buffer, to: number, source: Buffer, from: number, length: number): number {
  if (to + length <= area.length) source.copy(area, to, from, from + length);
  return to + length;
}
