/** One section of a layer file (layer-format.ts), for writing: gathers values and what says where they are, block by block. */

import type { Lsn } from '../../postgres/lsn.ts';
import type { Key } from '../key.ts';
import { BLOCK_TYPE } from './block.ts';
import { copyBytes, viewOf } from './copy-bytes.ts';
import { KeyBlockBuilder } from './key-block.ts';
import type { BlockLocation, KeyBlockLocation } from './layer-format.ts';

const KEY_BLOCK_TARGET_BYTES = 16 * 1024;

/** Appends a block to the file. The content may be changed afterwards. */
export type AppendBlock = (type: number, content: Buffer) => BlockLocation;

export class SectionWriter {
  readonly keyBlocks: KeyBlockLocation[] = [];
  readonly valueBlocks: BlockLocation[] = [];
  readonly #append: AppendBlock;
  readonly #keys: KeyBlockBuilder;
  readonly #targetBytes: number;
  #values: Buffer;
  #valuesView: DataView;
  #valuesLength = 0;

  constructor(lsnStart: Lsn, valueBlockBytes: number, append: AppendBlock) {
    this.#append = append;
    this.#keys = new KeyBlockBuilder(lsnStart, KEY_BLOCK_TARGET_BYTES);
    this.#targetBytes = valueBlockBytes;
    this.#values = Buffer.alloc(0);
    this.#valuesView = viewOf(this.#values);
  }

  add(key: Key, lsn: Lsn, value: Buffer): void {
    this.#begin(key, lsn, value[0]!, value.length);
    this.#values.set(value, this.#valuesLength);
    this.#end(value.length);
  }

  /** As `add`, with the value that is bytes [start, end) of `from`. */
  addFrom(key: Key, lsn: Lsn, from: DataView, start: number, end: number): void {
    const length = end - start;
    this.#begin(key, lsn, from.getUint8(start), length);
    copyBytes(from, start, this.#valuesView, this.#valuesLength, length);
    this.#end(length);
  }

  /** Appends what has gathered. */
  finish(): void {
    if (this.#valuesLength > 0) this.#closeValueBlock();
    if (this.#keys.count > 0) this.#closeKeyBlock();
  }

  #begin(key: Key, lsn: Lsn, kind: number, length: number): void {
    if (this.#valuesLength + length > this.#values.length) {
      if (this.#valuesLength > 0) this.#closeValueBlock();
      if (length > this.#values.length) this.#newValues(Math.max(length, this.#targetBytes * 2));
    }
    this.#keys.add(key, lsn, kind, this.valueBlocks.length, this.#valuesLength, length);
  }

  #end(length: number): void {
    this.#valuesLength += length;
    if (this.#valuesLength >= this.#targetBytes) this.#closeValueBlock();
    if (this.#keys.isFull) this.#closeKeyBlock();
  }

  #closeValueBlock(): void {
    this.valueBlocks.push(this.#append(BLOCK_TYPE.values, this.#values.subarray(0, this.#valuesLength)));
    if (this.#values.length > this.#targetBytes * 2) this.#newValues(this.#targetBytes * 2);
    this.#valuesLength = 0;
  }

  #newValues(sizeBytes: number): void {
    this.#values = Buffer.allocUnsafeSlow(sizeBytes);
    this.#valuesView = viewOf(this.#values);
  }

  #closeKeyBlock(): void {
    const { content, ...known } = this.#keys.finish();
    this.keyBlocks.push({ ...known, ...this.#append(BLOCK_TYPE.keys, content) });
  }
}
