/**
 * Key blocks of layer files, whose bytes layer-format.ts describes: building them, and what they are in memory.
 */

import type { Lsn } from '../../postgres/lsn.ts';
import { KEY_SIZE_BYTES, makeKey, writeKey } from '../key.ts';
import type { Key } from '../key.ts';

const TWO_32 = 2 ** 32;
const HEADER_BYTES = 12;
const MAX_ENTRY_BYTES = 1 + KEY_SIZE_BYTES + 8 + 5 + 5 + 1;

/** Sorted keys as columns of numbers: quick to compare, and small. */
export class KeyColumns {
  readonly count: number;
  /** kind * 2^32 + spc */
  readonly #space: Float64Array;
  readonly #db: Uint32Array;
  /** rel * 2^8 + fork */
  readonly #fork: Float64Array;
  readonly #blk: Uint32Array;

  constructor(count: number) {
    this.count = count;
    this.#space = new Float64Array(count);
    this.#db = new Uint32Array(count);
    this.#fork = new Float64Array(count);
    this.#blk = new Uint32Array(count);
  }

  /** Sets key `i` from its 18 bytes. */
  decode(i: number, bytes: Buffer, offset: number): void {
    this.#space[i] = bytes[offset]! * TWO_32 + bytes.readUInt32BE(offset + 1);
    this.#db[i] = bytes.readUInt32BE(offset + 5);
    this.#fork[i] = bytes.readUInt32BE(offset + 9) * 256 + bytes[offset + 13]!;
    this.#blk[i] = bytes.readUInt32BE(offset + 14);
  }

  get(i: number): Key {
    const space = this.#space[i]!;
    const fork = this.#fork[i]!;
    return makeKey(
      Math.floor(space / TWO_32),
      space % TWO_32,
      this.#db[i]!,
      Math.floor(fork / 256),
      fork % 256,
      this.#blk[i]!,
    );
  }

  /** Key `i` compared with `key`. */
  compare(i: number, key: Key): number {
    return (
      this.#space[i]! - (key.kind * TWO_32 + key.spc) ||
      this.#db[i]! - key.db ||
      this.#fork[i]! - (key.rel * 256 + key.fork) ||
      this.#blk[i]! - key.blk
    );
  }

  /** How many keys are below `key`: the place of `key`, or where it would be. */
  lowerBound(key: Key): number {
    let low = 0;
    let high = this.count;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.compare(middle, key) < 0) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** A copy of the first `count` keys. */
  truncated(count: number): KeyColumns {
    const shorter = new KeyColumns(count);
    shorter.#space.set(this.#space.subarray(0, count));
    shorter.#db.set(this.#db.subarray(0, count));
    shorter.#fork.set(this.#fork.subarray(0, count));
    shorter.#blk.set(this.#blk.subarray(0, count));
    return shorter;
  }
}

/** A decoded key block: distinct keys, and for key `i` the entries `entryStart[i]` to `entryStart[i + 1]`, oldest first. */
export class KeyBlock {
  readonly keys: KeyColumns;
  readonly entryStart: Uint32Array;
  readonly lsns: Float64Array;
  readonly kinds: Uint8Array;
  readonly valueBlocks: Uint32Array;
  readonly valueOffsets: Uint32Array;
  readonly valueLengths: Uint32Array;

  /** Throws a RangeError when the bytes do not add up. */
  constructor(bytes: Buffer, layerLsnStart: Lsn) {
    const count = bytes.readUInt32LE(0);
    if (count * 5 > bytes.length) throw new RangeError(`${count} entries in ${bytes.length} bytes`);
    const keys = new KeyColumns(count);
    const entryStart = new Uint32Array(count + 1);
    this.lsns = new Float64Array(count);
    this.kinds = new Uint8Array(count);
    this.valueBlocks = new Uint32Array(count);
    this.valueOffsets = new Uint32Array(count);
    this.valueLengths = new Uint32Array(count);

    const key = Buffer.alloc(KEY_SIZE_BYTES);
    let valueBlock = bytes.readUInt32LE(4);
    let valueOffset = bytes.readUInt32LE(8);
    let keyCount = 0;
    let lsn = 0;
    let at = HEADER_BYTES;
    const varint = (): number => {
      let value = 0;
      for (let scale = 1; ; scale *= 128) {
        const byte = bytes[at++];
        if (byte === undefined || scale > 2 ** 49) throw new RangeError(`number that does not end at byte ${at}`);
        value += (byte & 127) * scale;
        if (byte < 128) return value;
      }
    };
    for (let i = 0; i < count; i++) {
      const shared = bytes[at++]!;
      if (shared > KEY_SIZE_BYTES || (i === 0 && shared !== 0))
        throw new RangeError(`entry ${i} shares ${shared} bytes`);
      if (shared < KEY_SIZE_BYTES) {
        bytes.copy(key, shared, at, at + KEY_SIZE_BYTES - shared);
        at += KEY_SIZE_BYTES - shared;
        keys.decode(keyCount, key, 0);
        entryStart[keyCount++] = i;
        lsn = layerLsnStart + varint();
      } else {
        lsn += varint();
      }
      const blocksFurther = varint();
      if (blocksFurther > 0) {
        valueBlock += blocksFurther;
        valueOffset = 0;
      }
      const length = varint();
      this.lsns[i] = lsn;
      this.valueBlocks[i] = valueBlock;
      this.valueOffsets[i] = valueOffset;
      this.valueLengths[i] = length;
      this.kinds[i] = bytes[at++]!;
      valueOffset += length;
    }
    if (at !== bytes.length) throw new RangeError(`${count} entries end at byte ${at} of ${bytes.length}`);
    this.keys = keys.truncated(keyCount);
    this.entryStart = entryStart.slice(0, keyCount + 1);
    this.entryStart[keyCount] = count;
  }

  /** Whether key `i` has an entry with `floor < LSN <= lsn`. */
  hasEntryWithin(i: number, floor: Lsn, lsn: Lsn): boolean {
    const start = this.entryStart[i]!;
    let entry = this.entryStart[i + 1]! - 1;
    while (entry >= start && this.lsns[entry]! > lsn) entry--;
    return entry >= start && this.lsns[entry]! > floor;
  }

  get sizeBytes(): number {
    return this.keys.count * 28 + this.lsns.length * 21 + 256;
  }
}

/** Collects entries, in order, into the bytes of one key block after the other. */
export class KeyBlockBuilder {
  readonly #layerLsnStart: Lsn;
  readonly #targetBytes: number;
  readonly #bytes: Buffer;
  #length = HEADER_BYTES;
  #count = 0;
  #firstLsn: Lsn = 0;
  #newestLsn: Lsn = 0;
  #firstKey: Key | undefined;
  #lastKey: Key | undefined;
  #previousLsn: Lsn = 0;
  #previousValueBlock = 0;
  readonly #previousKey = Buffer.alloc(KEY_SIZE_BYTES);
  readonly #key = Buffer.alloc(KEY_SIZE_BYTES);

  constructor(layerLsnStart: Lsn, targetBytes: number) {
    this.#layerLsnStart = layerLsnStart;
    this.#targetBytes = targetBytes;
    this.#bytes = Buffer.allocUnsafe(targetBytes + MAX_ENTRY_BYTES);
  }

  get count(): number {
    return this.#count;
  }

  get isFull(): boolean {
    return this.#length >= this.#targetBytes;
  }

  add(key: Key, lsn: Lsn, kind: number, valueBlock: number, valueOffset: number, valueLength: number): void {
    const bytes = this.#bytes;
    let shared = 0;
    if (this.#count > 0 && key === this.#lastKey) {
      shared = KEY_SIZE_BYTES;
    } else {
      this.#lastKey = key;
      writeKey(key, this.#key, 0);
    }
    if (this.#count === 0) {
      this.#firstKey = key;
      this.#firstLsn = lsn;
      this.#newestLsn = lsn;
      this.#previousValueBlock = valueBlock;
      bytes.writeUInt32LE(valueBlock, 4);
      bytes.writeUInt32LE(valueOffset, 8);
    } else {
      while (shared < KEY_SIZE_BYTES && this.#key[shared] === this.#previousKey[shared]) shared++;
    }
    bytes[this.#length++] = shared;
    for (let i = shared; i < KEY_SIZE_BYTES; i++) bytes[this.#length++] = this.#previousKey[i] = this.#key[i]!;
    this.#varint(lsn - (shared === KEY_SIZE_BYTES ? this.#previousLsn : this.#layerLsnStart));
    this.#varint(valueBlock - this.#previousValueBlock);
    this.#varint(valueLength);
    bytes[this.#length++] = kind;
    if (lsn > this.#newestLsn) this.#newestLsn = lsn;
    this.#previousLsn = lsn;
    this.#previousValueBlock = valueBlock;
    this.#count++;
  }

  /** The block's content, which is good until the next `add`, and what the index says of it. The builder begins a new block. */
  finish(): { content: Buffer; firstKey: Key; firstLsn: Lsn; newestLsn: Lsn } {
    const content = this.#bytes.subarray(0, this.#length);
    content.writeUInt32LE(this.#count, 0);
    const firstKey = this.#firstKey!;
    this.#length = HEADER_BYTES;
    this.#count = 0;
    return { content, firstKey, firstLsn: this.#firstLsn, newestLsn: this.#newestLsn };
  }

  #varint(value: number): void {
    const bytes = this.#bytes;
    let at = this.#length;
    let rest = value;
    // Above 2^31 bit operators would not do.
    for (; rest >= 2 ** 31; rest = Math.floor(rest / 128)) bytes[at++] = (rest & 127) | 128;
    let small = rest | 0;
    for (; small >= 128; small >>>= 7) bytes[at++] = (small & 127) | 128;
    bytes[at++] = small;
    this.#length = at;
  }
}
