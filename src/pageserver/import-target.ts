/**
 * Takes the state of a cluster at one LSN, keys in rising order, and makes image layers of it that together cover all keys.
 */

import type { Lsn } from '../postgres/lsn.ts';
import { ALL_KEYS } from './key.ts';
import type { Key } from './key.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { LayerWriter } from './layers/layer-writer.ts';

const LAYER_BYTES = 128 * 1024 * 1024;

export class ImportTarget {
  readonly #directory: string;
  readonly #timelineId: string;
  readonly #lsn: Lsn;
  readonly #layers: LayerDescription[] = [];
  #writer: LayerWriter | undefined;

  constructor(directory: string, timelineId: string, lsn: Lsn) {
    this.#directory = directory;
    this.#timelineId = timelineId;
    this.#lsn = lsn;
  }

  /** Adds a key that exists, with its encoded image (copied). Wait for the promise, if there is one, before the next. */
  put(key: Key, value: Buffer): void | Promise<void> {
    const writer = this.#writer;
    if (writer === undefined || writer.valueBytes >= LAYER_BYTES) return this.#putInNextLayer(key, value);
    writer.add(key, this.#lsn, value);
    return writer.isBusy ? writer.drain() : undefined;
  }

  /** The layers, durable, with all that was put. */
  async finish(): Promise<readonly LayerDescription[]> {
    if (this.#writer !== undefined) this.#layers.push(await this.#writer.finish(ALL_KEYS.end));
    this.#writer = undefined;
    return this.#layers;
  }

  async abort(): Promise<void> {
    await this.#writer?.abort();
  }

  async #putInNextLayer(key: Key, value: Buffer): Promise<void> {
    const previous = this.#writer;
    this.#writer = undefined;
    if (previous !== undefined) this.#layers.push(await previous.finish(key));
    const writer = await LayerWriter.create(this.#directory, {
      kind: 'image',
      timelineId: this.#timelineId,
      lsnStart: this.#lsn,
      lsnEnd: this.#lsn + 1,
      keyStart: previous === undefined ? ALL_KEYS.start : key,
    });
    writer.add(key, this.#lsn, value);
    this.#writer = writer;
  }
}
