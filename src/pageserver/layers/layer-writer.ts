/**
 * Writes one layer file (layer-format.ts): entries come sorted, and the file appears
 * under its name only when it is whole and durable.
 */

import assert from 'node:assert/strict';
import { open, rename, rm } from 'node:fs/promises';
import type { FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import { threadId } from 'node:worker_threads';
import type { Lsn } from '../../postgres/lsn.ts';
import { compareKeys, nextKey } from '../key.ts';
import type { Key } from '../key.ts';
import { VALUE_KIND } from '../value.ts';
import { appendBlock, BLOCK_TYPE } from './block.ts';
import { encodeFooter, encodeHeader, encodeIndex, layerFileName } from './layer-format.ts';
import type { BlockLocation, LayerDescription, LayerKind } from './layer-format.ts';
import { SectionWriter } from './section-writer.ts';
import type { AppendBlock } from './section-writer.ts';
import { WriteBuffer } from './write-buffer.ts';
import { syncDirectory } from '../../base/durable-file.ts';

/** Bytes of values after which whoever writes many layers begins another one. */
export const LAYER_BYTES = 128 * 1024 * 1024;
/** Large enough that setting up zstd does not count, small enough for a read of one page. */
const VALUE_BLOCK_BYTES = 32 * 1024;
/** Of images. Two pages take little more room than four, and one of them is there in little more than half the time. */
const IMAGE_BLOCK_BYTES = 16 * 1024;
const WRITE_BYTES = 256 * 1024;
const FIRST_BUFFER_BYTES = 64 * 1024;

export interface LayerWriterOptions {
  readonly kind: LayerKind;
  readonly timelineId: string;
  readonly lsnStart: Lsn;
  readonly lsnEnd: Lsn;
  /** Where the key range starts; the first entry's key when absent. */
  readonly keyStart?: Key;
  /** See LayerDescription. */
  readonly revision?: number;
  /** Size of the value blocks of the history, when it is not the usual one. */
  readonly valueBlockBytes?: number;
}

/** Of this thread: another one may write layers to the same directory. */
let partialCount = 0;

export class LayerWriter {
  readonly #directory: string;
  readonly #options: LayerWriterOptions;
  readonly #file: FileHandle;
  readonly #partialPath: string;
  readonly #history: SectionWriter;
  readonly #newest: SectionWriter;
  readonly #toWrite = new WriteBuffer(FIRST_BUFFER_BYTES);
  /** What is in the file already. */
  #writtenBytes = 0;
  #isWriting = false;
  #firstKey: Key | undefined;
  #lastKey: Key | undefined;
  #lastLsn: Lsn = 0;
  #isNewestTaken = false;
  #entryCount = 0;
  #valueBytes = 0;

  private constructor(directory: string, options: LayerWriterOptions, file: FileHandle, partialPath: string) {
    this.#directory = directory;
    this.#options = options;
    this.#file = file;
    this.#partialPath = partialPath;
    const append: AppendBlock = (type, content) => this.#appendBlock(type, content);
    const usualBytes = options.kind === 'image' ? IMAGE_BLOCK_BYTES : VALUE_BLOCK_BYTES;
    this.#history = new SectionWriter(options.lsnStart, options.valueBlockBytes ?? usualBytes, append);
    this.#newest = new SectionWriter(options.lsnStart, IMAGE_BLOCK_BYTES, append);
    this.#toWrite.append(encodeHeader(options.kind));
  }

  static async create(directory: string, options: LayerWriterOptions): Promise<LayerWriter> {
    const partialPath = join(directory, `layer-${process.pid}-${threadId}-${++partialCount}.partial`);
    return new LayerWriter(directory, options, await open(partialPath, 'wx', 0o600), partialPath);
  }

  /** True when `drain` should be awaited before more is added. */
  get isBusy(): boolean {
    return this.#toWrite.length >= WRITE_BYTES;
  }

  get valueBytes(): number {
    return this.#valueBytes;
  }

  /** Adds a value (copied). Keys rise; LSNs of one key do not fall. */
  add(key: Key, lsn: Lsn, value: Buffer): void {
    this.#took(key, lsn, value.length);
    this.#history.add(key, lsn, value);
  }

  /** As `add`, with the value that is bytes [start, end) of `from`. */
  addFrom(key: Key, lsn: Lsn, from: DataView, start: number, end: number): void {
    this.#took(key, lsn, end - start);
    this.#history.addFrom(key, lsn, from, start, end);
  }

  /** Adds the newest value of the key in this layer, which is the image of a page. */
  addNewest(key: Key, lsn: Lsn, value: Buffer): void {
    assert(value[0] === VALUE_KIND.image, 'the newest section has images');
    this.#took(key, lsn, value.length);
    this.#isNewestTaken = true;
    this.#newest.add(key, lsn, value);
  }

  #took(key: Key, lsn: Lsn, length: number): void {
    const order = this.#lastKey === key ? 0 : this.#lastKey === undefined ? -1 : compareKeys(this.#lastKey, key);
    assert(order < 0 || (order === 0 && this.#lastLsn <= lsn), 'entries of a layer are sorted by key, then LSN');
    assert(order < 0 || !this.#isNewestTaken, 'nothing of a key comes after its newest value');
    assert(lsn >= this.#options.lsnStart && lsn < this.#options.lsnEnd, 'an entry lies in the LSN range of its layer');
    this.#isNewestTaken = false;
    this.#valueBytes += length;
    this.#entryCount++;
    this.#firstKey ??= key;
    this.#lastKey = key;
    this.#lastLsn = lsn;
  }

  /** Writes what has gathered. Nothing is to be added before it resolves. */
  async drain(): Promise<void> {
    await this.#write();
  }

  /** Makes the layer durable under its name. `keyEnd` is where its key range ends; just past the last key when absent. */
  async finish(keyEnd?: Key): Promise<LayerDescription> {
    assert(this.#firstKey !== undefined && this.#lastKey !== undefined, 'a layer has entries');
    this.#history.finish();
    this.#newest.finish();
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
    const index = this.#appendBlock(BLOCK_TYPE.index, encodeIndex(this.#history, this.#newest));
    const footer = encodeFooter({
      ...range,
      timelineId,
      indexOffset: index.offset,
      indexLength: index.length,
      entryCount: this.#entryCount,
      valueBytes: this.#valueBytes,
    });
    this.#toWrite.append(footer);
    await this.#write();
    await this.#file.sync();
    await this.#file.close();
    await rename(this.#partialPath, join(this.#directory, layerFileName(range)));
    await syncDirectory(this.#directory);
    return { ...range, sizeBytes: this.#writtenBytes };
  }

  /** Gives the file up. */
  async abort(): Promise<void> {
    await this.#file.close().catch(() => {});
    await rm(this.#partialPath, { force: true });
  }

  #appendBlock(type: number, content: Buffer): BlockLocation {
    assert(!this.#isWriting, 'nothing is added while what has gathered is written');
    const offset = this.#writtenBytes + this.#toWrite.length;
    return { offset, length: appendBlock(this.#toWrite, type, content) };
  }

  async #write(): Promise<void> {
    const { bytes, length } = this.#toWrite;
    this.#isWriting = true;
    for (let at = 0; at < length;) at += (await this.#file.write(bytes, at, length - at)).bytesWritten;
    this.#isWriting = false;
    this.#writtenBytes += length;
    this.#toWrite.length = 0;
  }
}
