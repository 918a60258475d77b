/**
 * Whether a layer is whole: every block's checksum, and that footer, index, keys and values fit each other and the layer's name (layers/layer-format.ts).
 *
 * Reads each block once and keeps one of keys and one of values, so memory is bounded by the largest block. Shares nothing with the read path but
 * the decoders of the format: no cache is filled by it.
 */

import { compareKeys, formatKey } from './key.ts';
import type { Key } from './key.ts';
import { BLOCK_TYPE, decodeBlock, LayerDamagedError } from './layers/block.ts';
import {
  decodeFooter,
  decodeIndex,
  decodeKeyBlock,
  encodeHeader,
  LAYER_FOOTER_BYTES,
  LAYER_HEADER_BYTES,
} from './layers/layer-format.ts';
import type { LayerDescription, LayerFooter, LayerIndex, SectionIndex } from './layers/layer-format.ts';
import { VALUE_KIND } from './value.ts';

export interface Damage {
  /** In the file. */
  readonly offset: number;
  readonly reason: string;
}

export interface LayerBytes {
  readonly sizeBytes: number;
  /** Exactly so many; fewer are damage. */
  read(offset: number, length: number): Promise<Buffer>;
}

/** Of one layer, after which it is not looked at any further. */
const DAMAGES_MAX = 20;

/** Everything that is wrong with it, as far as one damage does not hide another. `name` is for messages. */
export async function verifyLayer(
  layer: LayerDescription,
  timelineId: string,
  bytes: LayerBytes,
  name: string,
): Promise<Damage[]> {
  const check = new LayerCheck(layer, timelineId, bytes, name);
  await check.run();
  return check.damages;
}

class LayerCheck {
  readonly damages: Damage[] = [];
  readonly #layer: LayerDescription;
  readonly #timelineId: string;
  readonly #bytes: LayerBytes;
  readonly #name: string;

  constructor(layer: LayerDescription, timelineId: string, bytes: LayerBytes, name: string) {
    this.#layer = layer;
    this.#timelineId = timelineId;
    this.#bytes = bytes;
    this.#name = name;
  }

  async run(): Promise<void> {
    const { sizeBytes } = this.#bytes;
    if (sizeBytes !== this.#layer.sizeBytes) {
      this.#add(0, `it has ${sizeBytes} bytes, the timeline's index says ${this.#layer.sizeBytes}`);
    }
    if (sizeBytes < LAYER_HEADER_BYTES + LAYER_FOOTER_BYTES) return this.#add(0, 'it is too short to be a layer');
    const header = await this.#bytes.read(0, LAYER_HEADER_BYTES);
    if (!header.equals(encodeHeader(this.#layer.kind)))
      this.#add(0, `it does not begin as a ${this.#layer.kind} layer`);
    const footerOffset = sizeBytes - LAYER_FOOTER_BYTES;
    const found = await this.#trying(footerOffset, async () => {
      const footer = decodeFooter(await this.#bytes.read(footerOffset, LAYER_FOOTER_BYTES), this.#name, footerOffset);
      this.#checkFooter(footer, footerOffset);
      const { indexOffset, indexLength } = footer;
      if (indexOffset + indexLength !== footerOffset)
        throw this.#damage(footerOffset, 'the index does not end where the footer begins');
      const content = decodeBlock(
        await this.#bytes.read(indexOffset, indexLength),
        BLOCK_TYPE.index,
        this.#name,
        indexOffset,
      );
      return { footer, index: decodeIndex(content, this.#name, indexOffset) };
    });
    if (found === undefined) return;
    this.#checkPlaces(found.footer, found.index);
    if (this.damages.length > 0 && found.footer.indexOffset > sizeBytes) return;
    await this.#checkContent(found.footer, found.index);
  }

  #checkFooter(footer: LayerFooter, offset: number): void {
    const { kind, keyStart, keyEnd, lsnStart, lsnEnd } = this.#layer;
    const isAsNamed =
      footer.kind === kind &&
      compareKeys(footer.keyStart, keyStart) === 0 &&
      compareKeys(footer.keyEnd, keyEnd) === 0 &&
      footer.lsnStart === lsnStart &&
      footer.lsnEnd === lsnEnd;
    if (!isAsNamed) this.#add(offset, 'its footer says another kind or range than its name');
    if (footer.timelineId !== this.#timelineId) this.#add(offset, `it is of timeline ${footer.timelineId}`);
  }

  /** The blocks fill the file from header to index, without gaps. */
  #checkPlaces({ indexOffset }: LayerFooter, index: LayerIndex): void {
    const places: (readonly [offset: number, length: number])[] = [];
    for (const section of [index.history, index.newest]) {
      section.keyBlockOffsets.forEach((offset, i) => places.push([offset, section.keyBlockLengths[i]!]));
      section.valueBlockOffsets.forEach((offset, i) => places.push([offset, section.valueBlockLengths[i]!]));
    }
    places.sort((a, b) => a[0] - b[0]);
    let end = LAYER_HEADER_BYTES;
    for (const [offset, length] of places) {
      if (offset !== end) return this.#add(end, `the index has no block there, and one at ${offset}`);
      end = offset + length;
    }
    if (end !== indexOffset) this.#add(end, `blocks end there, the index begins at ${indexOffset}`);
  }

  async #checkContent(footer: LayerFooter, index: LayerIndex): Promise<void> {
    const history = await this.#checkSection(footer, index.history, false);
    const newest = await this.#checkSection(footer, index.newest, true);
    if (this.damages.length > 0 || history === undefined || newest === undefined) return;
    const entryCount = history.entryCount + newest.entryCount;
    const valueBytes = history.valueBytes + newest.valueBytes;
    const { indexOffset } = footer;
    if (entryCount !== footer.entryCount) {
      this.#add(indexOffset, `it has ${entryCount} entries, its footer says ${footer.entryCount}`);
    }
    if (valueBytes !== footer.valueBytes) {
      this.#add(indexOffset, `its values have ${valueBytes} bytes, its footer says ${footer.valueBytes}`);
    }
  }

  /** What a section has; undefined when that is not all known. */
  async #checkSection(
    footer: LayerFooter,
    section: SectionIndex,
    isNewest: boolean,
  ): Promise<{ entryCount: number; valueBytes: number } | undefined> {
    const values = new ValueBlocks(section, (offset, length) => this.#block(offset, length, BLOCK_TYPE.values));
    let entryCount = 0;
    let valueBytes = 0;
    let lastKey: Key | undefined;
    let lastLsn = 0;
    let isComplete = true;
    for (let number = 0; number < section.firstKeys.count && this.damages.length < DAMAGES_MAX; number++) {
      const offset = section.keyBlockOffsets[number]!;
      const content = await this.#block(offset, section.keyBlockLengths[number]!, BLOCK_TYPE.keys);
      const block = await this.#trying(offset, async () =>
        content === undefined ? undefined : decodeKeyBlock(content, footer.lsnStart, this.#name, offset),
      );
      if (block === undefined) {
        isComplete = false;
        values.lost();
        continue;
      }
      const beginsSo =
        block.keys.count > 0 &&
        section.firstKeys.compare(number, block.keys.get(0)) === 0 &&
        section.firstLsns[number] === block.lsns[0];
      if (!beginsSo) this.#add(offset, 'the key block begins with another entry than the index says');
      const newestLsn = block.lsns.reduce((newest, lsn) => Math.max(newest, lsn), 0);
      if (newestLsn !== section.newestLsns[number])
        this.#add(offset, 'the key block’s newest LSN is not what the index says');
      for (let i = 0; i < block.keys.count; i++) {
        const key = block.keys.get(i);
        const order = lastKey === undefined ? -1 : compareKeys(lastKey, key);
        if (order > 0) this.#add(offset, `key ${formatKey(key)} comes after ${formatKey(lastKey!)}`);
        if (compareKeys(key, footer.keyStart) < 0 || compareKeys(key, footer.keyEnd) >= 0) {
          this.#add(offset, `key ${formatKey(key)} is not in the layer's range`);
        }
        if (order !== 0) lastLsn = 0;
        lastKey = key;
        for (let entry = block.entryStart[i]!; entry < block.entryStart[i + 1]!; entry++) {
          const lsn = block.lsns[entry]!;
          const kind = block.kinds[entry]!;
          const length = block.valueLengths[entry]!;
          if (lsn < lastLsn || lsn < footer.lsnStart || lsn >= footer.lsnEnd) {
            this.#add(offset, `an LSN of key ${formatKey(key)} is out of order, or not in the layer's range`);
          }
          if (isNewest && (lastLsn !== 0 || kind !== VALUE_KIND.image)) {
            this.#add(offset, `key ${formatKey(key)} has more than one image among the newest`);
          }
          lastLsn = lsn;
          const wrong = await values.take(block.valueBlocks[entry]!, block.valueOffsets[entry]!, length, kind);
          if (wrong !== undefined) this.#add(offset, `${wrong} (key ${formatKey(key)})`);
          entryCount++;
          valueBytes += length;
          if (this.damages.length >= DAMAGES_MAX) return undefined;
        }
      }
    }
    // What no readable entry names is looked at all the same.
    const hasUnused = await values.rest();
    if (!isComplete) return undefined;
    if (hasUnused && this.damages.length === 0) this.#add(footer.indexOffset, 'there are values that no entry names');
    return { entryCount, valueBytes };
  }

  async #block(offset: number, length: number, type: number): Promise<Buffer | undefined> {
    return this.#trying(offset, async () =>
      decodeBlock(await this.#bytes.read(offset, length), type, this.#name, offset),
    );
  }

  async #trying<T>(offset: number, work: () => Promise<T>): Promise<T | undefined> {
    try {
      return await work();
    } catch (error) {
      if (error instanceof LayerDamagedError) this.#add(error.offset, error.reason);
      else if (error instanceof RangeError) this.#add(offset, error.message);
      else throw error;
      return undefined;
    }
  }

  #damage(offset: number, reason: string): LayerDamagedError {
    return new LayerDamagedError(this.#name, offset, reason);
  }

  #add(offset: number, reason: string): void {
    if (this.damages.length < DAMAGES_MAX) this.damages.push({ offset, reason });
  }
}

/** Value blocks of a section, taken one after the other as their values are named. */
class ValueBlocks {
  readonly #index: SectionIndex;
  readonly #read: (offset: number, length: number) => Promise<Buffer | undefined>;
  #number = -1;
  #content: Buffer | undefined;
  #at = 0;
  /** Values before this are not all known. */
  #isLost = false;

  constructor(index: SectionIndex, read: (offset: number, length: number) => Promise<Buffer | undefined>) {
    this.#index = index;
    this.#read = read;
  }

  /** A block of keys cannot be read: what follows need not follow. */
  lost(): void {
    this.#isLost = true;
  }

  /** What is wrong with a value; undefined when it is well, or its block is known to be damaged. */
  async take(number: number, offset: number, length: number, kind: number): Promise<string | undefined> {
    if (number >= this.#index.valueBlockOffsets.length) {
      return `an entry names value block ${number} of ${this.#index.valueBlockOffsets.length}`;
    }
    if (number < this.#number) return `an entry names value block ${number} after ${this.#number}`;
    let wrong: string | undefined;
    while (this.#number < number) {
      if (this.#content !== undefined && this.#at !== this.#content.length && !this.#isLost) {
        wrong = `value block ${this.#number} has bytes that no entry names`;
      }
      await this.#next();
    }
    if (this.#content === undefined) return wrong;
    if (offset !== this.#at && !this.#isLost)
      wrong = `a value is at ${offset} of its block, the one before it ends at ${this.#at}`;
    this.#isLost = false;
    this.#at = offset + length;
    if (this.#at > this.#content.length)
      return `a value ends at ${this.#at} of a block of ${this.#content.length} bytes`;
    if (this.#content[offset] !== kind) return `a value of kind ${this.#content[offset]} is named as of kind ${kind}`;
    return wrong;
  }

  /** Reads the blocks that were not named; true when there are any, or any bytes. */
  async rest(): Promise<boolean> {
    let hasRest = this.#content !== undefined && this.#at !== this.#content.length;
    while (this.#number + 1 < this.#index.valueBlockOffsets.length) {
      hasRest = true;
      await this.#next();
    }
    return hasRest;
  }

  async #next(): Promise<void> {
    this.#number++;
    this.#at = 0;
    this.#content = await this.#read(
      this.#index.valueBlockOffsets[this.#number]!,
      this.#index.valueBlockLengths[this.#number]!,
    );
  }
}
