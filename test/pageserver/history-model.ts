/**
 * For tests: the page store as simply as it can be. Every value is kept in a list, and a read replays all of it.
 * Pages change by "pokes": a poke sets one byte at an offset, adds one to the byte after it, and so shows order, loss and repetition.
 */

import { BLOCK_SIZE } from '../../src/postgres/page-size.ts';
import type { Lsn } from '../../src/postgres/lsn.ts';
import { compareKeys, formatKey } from '../../src/pageserver/key.ts';
import type { Key, KeyRange } from '../../src/pageserver/key.ts';
import { decodeValue, encodeDerived, encodeRecord } from '../../src/pageserver/value.ts';

interface Put {
  readonly key: Key;
  readonly lsn: Lsn;
  readonly value: Buffer;
}

/** A change of a page, as derived change, as record, or as record that begins with a page of zeroes. */
export function encodePoke(how: 'derived' | 'record' | 'init', offset: number, byte: number): Buffer {
  const poke = Buffer.from([offset & 0xff, offset >> 8, byte]);
  return how === 'derived' ? encodeDerived(1, poke) : encodeRecord(poke, 1, 0, how === 'init');
}

/** The Replay of pokes. */
export function replayPoke(page: Buffer, value: Buffer): void {
  const change = decodeValue(value);
  if (change.kind === 'image' || change.kind === 'tombstone') throw new Error('not a poke');
  if (change.kind === 'init-record') page.fill(0);
  const poke = change.kind === 'derived' ? change.payload : change.record;
  const offset = poke.readUInt16LE(0);
  if (poke[2] === 255) throw new Error('a poke that cannot be replayed');
  page[offset] = poke[2]!;
  page[offset + 1] = (page[offset + 1]! + 1) % 256;
}

export class ModelTimeline {
  readonly ancestor: ModelTimeline | undefined;
  readonly ancestorLsn: Lsn;
  /** In order; only added to. */
  readonly puts: Put[] = [];
  readonly #byKey = new Map<string, Put[]>();
  #sortedCount = 0;
  lastRecordLsn: Lsn;

  constructor(startLsn: Lsn, ancestor?: ModelTimeline) {
    this.lastRecordLsn = startLsn;
    this.ancestorLsn = startLsn;
    this.ancestor = ancestor;
  }

  read(key: Key, lsn: Lsn): Buffer | undefined {
    let image: Buffer | undefined;
    for (const value of this.#values(key, lsn)) {
      const change = decodeValue(value);
      if (change.kind === 'tombstone') image = undefined;
      else if (change.kind === 'image') image = Buffer.from(change.payload);
      else replayPoke((image ??= Buffer.alloc(BLOCK_SIZE)), value);
    }
    return image;
  }

  scan(range: KeyRange, lsn: Lsn): [Key, Buffer][] {
    return [...this.#keys().values()]
      .filter((key) => compareKeys(range.start, key) <= 0 && compareKeys(key, range.end) < 0)
      .sort(compareKeys)
      .map((key): [Key, Buffer | undefined] => [key, this.read(key, lsn)])
      .filter((entry): entry is [Key, Buffer] => entry[1] !== undefined);
  }

  #keys(): Map<string, Key> {
    const { ancestor } = this;
    const keys = ancestor === undefined ? new Map<string, Key>() : ancestor.#keys();
    for (const [id, [first]] of this.#putsByKey()) keys.set(id, first!.key);
    return keys;
  }

  #values(key: Key, lsn: Lsn): Buffer[] {
    const { ancestor } = this;
    const inherited = ancestor === undefined ? [] : ancestor.#values(key, Math.min(lsn, this.ancestorLsn));
    const own = (this.#putsByKey().get(formatKey(key)) ?? []).filter((put) => put.lsn <= lsn).map((put) => put.value);
    return [...inherited, ...own];
  }

  #putsByKey(): ReadonlyMap<string, readonly Put[]> {
    for (; this.#sortedCount < this.puts.length; this.#sortedCount++) {
      const put = this.puts[this.#sortedCount]!;
      const id = formatKey(put.key);
      const puts = this.#byKey.get(id);
      if (puts === undefined) this.#byKey.set(id, [put]);
      else puts.push(put);
    }
    return this.#byKey;
  }
}
