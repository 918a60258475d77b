/**
 * Writes one layer file (layer-format.ts): entries come sorted, and the file appears
 * under its name only when it is whole and durable.
 */

import assert from 'node:assert/strict';
import { open, rename, rm } from 'node:fs/promises';
import type { FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import type { Lsn } from '../../postgres/lsn.ts';
import { compareKeys, nextKey } from '../key.ts';
import type { Key } from '../key.ts';
import { BLOCK_TYPE, encodeBlock } from './block.ts';
import { copyBytes, viewOf } from './copy-bytes.ts';
import { encodeFooter, encodeHeader, encodeIndex, layerFileName } from './layer-format.ts';
import type { BlockLocation, KeyBlockLocation, LayerDescription, LayerKind } from './layer-format.ts';
import { KeyBlockBuilder } from './key-block.ts';
import { syncDirectory } from './durable.ts';

/** Large enough that setting up zstd does not count, small enough for a read of one page. */
const VALUE_BLOCK_TARGET_BYTES = { delta: 32 * 1024, image: 32 * 1024 } as const;
const KEY_BLOCK_TARGET_BYTES = 16 * 1024;
const WRITE_BYTES = 256 * 1024;

export interface LayerWriterOptions {
  readonly kind: LayerKind;
  readonly timelineId: string;
  readonly lsnStart: Lsn;
  readonly lsnEnd: Lsn;
  /** Where the key range starts; the first entry's key when absent. */
  readonly keyStart?: Key;
  /** See LayerDescription. */
  readonly revision?: number;
  /** Size of value blocks, when it is not that of the layer's kind. */
  readonly valueBlockBytes?: number;
}

let partialCount = 0;

export class LayerWriter {
  readonly #directory: string;
  readonly #options: LayerWriterOptions;
  readonly #file: FileHandle;
  readonly #partialPath: string;
  readonly #keys: KeyBlockBuilder;
  readonly #targetBytes: number;
  readonly #keyBlocks: KeyBlockLocation[] = [];
  readonly #valueBlocks: BlockLocation[] = [];
  #toWrite: Buffer[] = [];
  #toWriteBytes = 0;
  #fileLength = 0;
  #values: Buffer;
  #valuesView: DataView;
  #valuesLength = 0;
  #valueBlockNumber = 0;
  #firstKey: Key | undefined;
  #lastKey: Key | undefined;
  #lastLsn: Lsn = 0;
  #entryCount = 0;
  #valueBytes = 0;

  private constructor(directory: string, options: LayerWriterOptions, file: FileHandle, partialPath: string) {
    this.#directory = directory;
    this.#options = options;
    this.#file = file;
    this.#partialPath = partialPath;
    this.#targetBytes = options.valueBlockBytes ?? VALUE_BLOCK_TARGET_BYTES[options.kind];
    this.#keys = new KeyBlockBuilder(options.lsnStart, KEY_BLOCK_TARGET_BYTES);
    this.#values = Buffer.allocUnsafeSlow(this.#targetBytes * 2);
    this.#valuesView = viewOf(this.#values);
    this.#append(encodeHeader(options.kind));
  }

  static async create(directory: string, options: LayerWriterOptions): Promise<LayerWriter> {
    const partialPath = join(directory, `layer-${process.pid}-${++partialCount}.partial`);
    return new LayerWriter(directory, options, await open(partialPath, 'wx', 0o600), partialPath);
  }

  /** True when `drain` should be awaited before more is added. */
  get isBusy(): boolean {
    return this.#toWriteBytes >= WRITE_BYTES;
  }

  get valueBytes(): number {
    return this.#valueBytes;
  }

  /** Adds a value (copied). Keys rise; LSNs of one key do not fall. */
  add(key: Key, lsn: Lsn, value: Buffer): void {
    this.#begin(key, lsn, value[0]!, value.length);
    this.#values.set(value, this.#valuesLength);
    this.#end(key, lsn, value.length);
  }

  /** As `add`, with the value that is bytes [start, end) of `from`. */
  addFrom(key: Key, lsn: Lsn, from: DataView, start: number, end: number): void {
    const length = end - start;
    this.#begin(key, lsn, from.getUint8(start), length);
    copyBytes(from, start, this.#valuesView, this.#valuesLength, length);
    this.#end(key, lsn, length);
  }

  #begin(key: Key, lsn: Lsn, kind: number, length: number): void {
    const order = this.#lastKey === key ? 0 : this.#lastKey === undefined ? -1 : compareKeys(this.#lastKey, key);
    assert(order < 0 || (order === 0 && this.#lastLsn <= lsn), 'entries of a layer are sorted by key, then LSN');
    assert(lsn >= this.#options.lsnStart && lsn < this.#options.lsnEnd, 'an entry lies in the LSN range of its layer');
    if (this.#valuesLength + length > this.#values.length) {
      if (this.#valuesLength > 0) this.#closeValueBlock();
      if (length > this.#values.length) this.#newValues(length);
    }
    this.#keys.add(key, lsn, kind, this.#valueBlockNumber, this.#valuesLength, length);
  }

  #end(key: Key, lsn: Lsn, length: number): void {
    this.#valuesLength += length;
    this.#valueBytes += length;
    this.#entryCount++;
    this.#firstKey ??= key;
    this.#lastKey = key;
    this.#lastLsn = lsn;
    if (this.#valuesLength >= this.#targetBytes) this.#closeValueBlock();
    if (this.#keys.isFull) this.#closeKeyBlock();
  }

  /**
   * Closes the value block if it holds at least this much. Around a value that is mostly read without those before it, so that reading it does not
   * take decompressing them.
   */
  cutBlock(bytesMin = 1): void {
    if (this.#valuesLength >= bytesMin) this.#closeValueBlock();
  }

  /** Writes what has gathered. */
  async drain(): Promise<void> {
    await this.#write();
  }

  /** Makes the layer durable under its name. `keyEnd` is where its key range ends; just past the last key when absent. */
  async finish(keyEnd?: Key): Promise<LayerDescription> {
    assert(this.#firstKey !== undefined && this.#lastKey !== undefined, 'a layer has entries');
    if (this.#valuesLength > 0) this.#closeValueBlock();
    if (this.#keys.count > 0) this.#closeKeyBlock();
    const { kind, timelineId, lsnStart, lsnEnd } = this.#options;
    const keyStart = this.#options.keyStart ?? this.#firstKey;
    const { revision } = this.#options;
    const range = {
      kind,
      keyStart,
      keyEnd: keyEnd ?? nextKey(this.#lastKey),
      lsnStart,
      lsnEnd,
      ...(revision === undefined ? {} : { revision }),
    };
    const index = this.#appendBlock(BLOCK_TYPE.index, encodeIndex(this.#keyBlocks, this.#valueBlocks));
    const footer = encodeFooter({
      ...range,
      timelineId,
      indexOffset: index.offset,
      indexLength: index.length,
      entryCount: this.#entryCount,
      valueBytes: this.#valueBytes,
    });
    this.#append(footer);
    await this.#write();
    await this.#file.sync();
    await this.#file.close();
    await rename(this.#partialPath, join(this.#directory, layerFileName(range)));
    await syncDirectory(this.#directory);
    return { ...range, sizeBytes: this.#fileLength };
  }

  /** Gives the file up. */
  async abort(): Promise<void> {
    await this.#file.close().catch(() => {});
    await rm(this.#partialPath, { force: true });
  }

  #closeValueBlock(): void {
    const content = this.#values.subarray(0, this.#valuesLength);
    this.#valueBlocks.push(this.#appendBlock(BLOCK_TYPE.values, content));
    // What is not compressed is written from where it is.
    const isKept = this.#toWrite.at(-1) === content;
    if (isKept || this.#values.length > this.#targetBytes * 2) this.#newValues(this.#targetBytes * 2);
    this.#valuesLength = 0;
    this.#valueBlockNumber++;
  }

  #newValues(sizeBytes: number): void {
    this.#values = Buffer.allocUnsafeSlow(sizeBytes);
    this.#valuesView = viewOf(this.#values);
  }

  #closeKeyBlock(): void {
    const { content, firstKey, firstLsn } = this.#keys.finish();
    this.#keyBlocks.push({ firstKey, firstLsn, ...this.#appendBlock(BLOCK_TYPE.keys, content) });
  }

  #appendBlock(type: number, content: Buffer): BlockLocation {
    const offset = this.#fileLength;
    const [header, stored] = encodeBlock(type, content);
    this.#append(header);
    this.#append(stored);
    return { offset, length: header.length + stored.length };
  }

  #append(bytes: Buffer): void {
    this.#toWrite.push(bytes);
    this.#toWriteBytes += bytes.length;
    this.#fileLength += bytes.length;
  }

  async #write(): Promise<void> {
    const buffers = this.#toWrite;
    const length = this.#toWriteBytes;
    this.#toWrite = [];
    this.#toWriteBytes = 0;
    let { bytesWritten: at } = await this.#file.writev(buffers);
    if (at === length) return;
    const bytes = Buffer.concat(buffers, length);
    while (at < length) at += (await this.#file.write(bytes, at)).bytesWritten;
  }
}
