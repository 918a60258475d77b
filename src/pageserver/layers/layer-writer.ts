/**
 * Writes one layer file (layer-format.ts): entries come sorted, blocks are compressed on the thread pool, and the file appears
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
import { encodeFooter, encodeHeader, encodeIndex, layerFileName } from './layer-format.ts';
import type { BlockLocation, KeyBlockLocation, LayerDescription, LayerKind } from './layer-format.ts';
import { KeyBlockBuilder } from './key-block.ts';
import { syncDirectory } from './durable.ts';

const VALUE_BLOCK_TARGET_BYTES = { delta: 32 * 1024, image: 16 * 1024 } as const;
const KEY_BLOCK_TARGET_BYTES = 16 * 1024;
const BLOCKS_IN_FLIGHT_MAX = 8;
const WRITE_BYTES = 256 * 1024;

export interface LayerWriterOptions {
  readonly kind: LayerKind;
  readonly timelineId: string;
  readonly lsnStart: Lsn;
  readonly lsnEnd: Lsn;
  /** Where the key range starts; the first entry's key when absent. */
  readonly keyStart?: Key;
}

interface BlockInFlight {
  readonly encoded: Promise<Buffer>;
  readonly keyBlock?: { readonly firstKey: Key; readonly firstLsn: Lsn };
}

let partialCount = 0;

export class LayerWriter {
  readonly #directory: string;
  readonly #options: LayerWriterOptions;
  readonly #file: FileHandle;
  readonly #partialPath: string;
  readonly #keys: KeyBlockBuilder;
  readonly #targetBytes: number;
  readonly #inFlight: BlockInFlight[] = [];
  readonly #keyBlocks: KeyBlockLocation[] = [];
  readonly #valueBlocks: BlockLocation[] = [];
  #toWrite: Buffer[] = [];
  #toWriteBytes = 0;
  #fileLength = 0;
  #values: Buffer;
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
    this.#targetBytes = VALUE_BLOCK_TARGET_BYTES[options.kind];
    this.#keys = new KeyBlockBuilder(options.lsnStart, KEY_BLOCK_TARGET_BYTES);
    this.#values = Buffer.allocUnsafe(this.#targetBytes * 2);
    this.#append(encodeHeader(options.kind));
  }

  static async create(directory: string, options: LayerWriterOptions): Promise<LayerWriter> {
    const partialPath = join(directory, `layer-${process.pid}-${++partialCount}.partial`);
    return new LayerWriter(directory, options, await open(partialPath, 'wx', 0o600), partialPath);
  }

  /** True when `drain` should be awaited before more is added. */
  get isBusy(): boolean {
    return this.#inFlight.length >= BLOCKS_IN_FLIGHT_MAX;
  }

  get valueBytes(): number {
    return this.#valueBytes;
  }

  /** Adds a value (copied). Keys rise; LSNs of one key do not fall. */
  add(key: Key, lsn: Lsn, value: Buffer): void {
    const order = this.#lastKey === undefined ? -1 : compareKeys(this.#lastKey, key);
    assert(order < 0 || (order === 0 && this.#lastLsn <= lsn), 'entries of a layer are sorted by key, then LSN');
    assert(lsn >= this.#options.lsnStart && lsn < this.#options.lsnEnd, 'an entry lies in the LSN range of its layer');
    if (this.#valuesLength + value.length > this.#values.length) {
      if (this.#valuesLength > 0) this.#closeValueBlock();
      if (value.length > this.#values.length) this.#values = Buffer.allocUnsafe(value.length);
    }
    this.#keys.add(key, lsn, value[0]!, this.#valueBlockNumber, this.#valuesLength, value.length);
    value.copy(this.#values, this.#valuesLength);
    this.#valuesLength += value.length;
    this.#valueBytes += value.length;
    this.#entryCount++;
    this.#firstKey ??= key;
    this.#lastKey = key;
    this.#lastLsn = lsn;
    if (this.#valuesLength >= this.#targetBytes) this.#closeValueBlock();
    if (this.#keys.isFull) this.#closeKeyBlock();
  }

  /** Waits until few blocks are in flight. */
  async drain(): Promise<void> {
    await this.#settle(BLOCKS_IN_FLIGHT_MAX / 2);
  }

  /** Makes the layer durable under its name. `keyEnd` is where its key range ends; just past the last key when absent. */
  async finish(keyEnd?: Key): Promise<LayerDescription> {
    assert(this.#firstKey !== undefined && this.#lastKey !== undefined, 'a layer has entries');
    if (this.#valuesLength > 0) this.#closeValueBlock();
    if (this.#keys.count > 0) this.#closeKeyBlock();
    await this.#settle(0);
    const index = await encodeBlock(BLOCK_TYPE.index, encodeIndex(this.#keyBlocks, this.#valueBlocks));
    const { kind, timelineId, lsnStart, lsnEnd } = this.#options;
    const keyStart = this.#options.keyStart ?? this.#firstKey;
    const range = { kind, keyStart, keyEnd: keyEnd ?? nextKey(this.#lastKey), lsnStart, lsnEnd };
    const footer = encodeFooter({
      ...range,
      timelineId,
      indexOffset: this.#fileLength,
      indexLength: index.length,
      entryCount: this.#entryCount,
      valueBytes: this.#valueBytes,
    });
    this.#append(index);
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
    await Promise.allSettled(this.#inFlight.map((block) => block.encoded));
    await this.#file.close().catch(() => {});
    await rm(this.#partialPath, { force: true });
  }

  #closeValueBlock(): void {
    const raw = this.#values.subarray(0, this.#valuesLength);
    this.#push({ encoded: encodeBlock(BLOCK_TYPE.values, raw) });
    this.#values = Buffer.allocUnsafe(this.#targetBytes * 2);
    this.#valuesLength = 0;
    this.#valueBlockNumber++;
  }

  #closeKeyBlock(): void {
    const { content, firstKey, firstLsn } = this.#keys.finish();
    this.#push({ encoded: encodeBlock(BLOCK_TYPE.keys, content), keyBlock: { firstKey, firstLsn } });
  }

  #push(block: BlockInFlight): void {
    block.encoded.catch(() => {}); // Reported where it is awaited.
    this.#inFlight.push(block);
  }

  async #settle(leave: number): Promise<void> {
    while (this.#inFlight.length > leave) {
      const { encoded, keyBlock } = this.#inFlight[0]!;
      const bytes = await encoded;
      this.#inFlight.shift();
      const location = { offset: this.#fileLength, length: bytes.length };
      if (keyBlock === undefined) this.#valueBlocks.push(location);
      else this.#keyBlocks.push({ ...keyBlock, ...location });
      this.#append(bytes);
      if (this.#toWriteBytes >= WRITE_BYTES) await this.#write();
    }
  }

  #append(bytes: Buffer): void {
    this.#toWrite.push(bytes);
    this.#toWriteBytes += bytes.length;
    this.#fileLength += bytes.length;
  }

  async #write(): Promise<void> {
    const bytes = Buffer.concat(this.#toWrite, this.#toWriteBytes);
    this.#toWrite = [];
    this.#toWriteBytes = 0;
    for (let at = 0; at < bytes.length;) at += (await this.#file.write(bytes, at)).bytesWritten;
  }
}
