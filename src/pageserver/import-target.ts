/**
 * Takes the state of a cluster at one LSN, keys in rising order, and makes image layers of it that together cover all keys.
 */

import type { Lsn } from '../postgres/lsn.ts';
import { ALL_KEYS, nextKey } from './key.ts';
import type { Key } from './key.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { LAYER_BYTES, LayerWriter } from './layers/layer-writer.ts';
import { encodeImage } from './value.ts';

export class ImportTarget {
  readonly #directory: string;
  readonly #timelineId: string;
  readonly #lsn: Lsn;
  readonly #layers: LayerDescription[] = [];
  #writer: LayerWriter;
  #lastKey: Key | undefined;

  private constructor(directory: string, timelineId: string, lsn: Lsn, writer: LayerWriter) {
    this.#directory = directory;
    this.#timelineId = timelineId;
    this.#lsn = lsn;
    this.#writer = writer;
  }

  static async create(directory: string, timelineId: string, lsn: Lsn): Promise<ImportTarget> {
    return new ImportTarget(directory, timelineId, lsn, await nextWriter(directory, timelineId, lsn, ALL_KEYS.start));
  }

  /** Adds a key that exists, with its value (copied). */
  put(key: Key, image: Uint8Array): void {
    this.#writer.add(key, this.#lsn, encodeImage(image));
    this.#lastKey = key;
  }

  /** To be awaited after every so many puts. */
  async drain(): Promise<void> {
    if (this.#writer.isBusy) await this.#writer.drain();
    if (this.#lastKey === undefined || this.#writer.valueBytes < LAYER_BYTES) return;
    const keyEnd = nextKey(this.#lastKey);
    this.#layers.push(await this.#writer.finish(keyEnd));
    this.#writer = await nextWriter(this.#directory, this.#timelineId, this.#lsn, keyEnd);
  }

  /** The layers, durable, with all that was put. */
  async finish(): Promise<readonly LayerDescription[]> {
    if (this.#writer.valueBytes > 0) this.#layers.push(await this.#writer.finish(ALL_KEYS.end));
    else await this.#writer.abort();
    return this.#layers;
  }

  async abort(): Promise<void> {
    await this.#writer.abort();
  }
}

function nextWriter(directory: string, timelineId: string, lsn: Lsn, keyStart: Key): Promise<LayerWriter> {
  return LayerWriter.create(directory, { kind: 'image', timelineId, lsnStart: lsn, lsnEnd: lsn + 1, keyStart });
}
