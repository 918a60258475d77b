/** Writes a frozen memory layer to delta layer files. A little at a time: between slices the process does other things. */

import assert from 'node:assert/strict';
import { setImmediate as yieldToOthers } from 'node:timers/promises';
import type { Lsn } from '../postgres/lsn.ts';
import { compareKeys } from './key.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { LayerWriter } from './layers/layer-writer.ts';
import type { MemoryLayer } from './layers/memory-layer.ts';

const SLICE_MS = 2;
const TOUCHED_AT_ONCE = 32;
/** Larger than in merged layers: compressing costs less, and most of what is flushed is merged before it is read. */
const VALUE_BLOCK_BYTES = 64 * 1024;

export interface FlushOptions {
  readonly directory: string;
  readonly timelineId: string;
  /** End of the layers' LSN range. */
  readonly lsnEnd: Lsn;
  /** Layers of the same LSN range, which have all keys between the first and the last of theirs: these are in no layer that is made here. */
  readonly bulk: readonly LayerDescription[];
}

/** The layers are durable under their names when this resolves; nothing refers to them yet. */
export async function flushMemoryLayer(layer: MemoryLayer, options: FlushOptions): Promise<LayerDescription[]> {
  const { directory, timelineId, lsnEnd, bulk } = options;
  const { lsnStart } = layer;
  const valueBlockBytes = VALUE_BLOCK_BYTES;
  const create = (): Promise<LayerWriter> =>
    LayerWriter.create(directory, { kind: 'delta', timelineId, lsnStart, lsnEnd, valueBlockBytes });
  const written: LayerDescription[] = [];
  let writer = await create();
  let splitAt = bulk[0]?.keyStart;
  try {
    let sliceStartMs = performance.now();
    const pauseWhenDue = async (): Promise<void> => {
      if (performance.now() - sliceStartMs <= SLICE_MS) return;
      await yieldToOthers();
      sliceStartMs = performance.now();
    };
    let valueCount = 0;
    let touched = 0;
    let seen = 0;
    for (const each of layer.inOrder()) {
      if (each === undefined) {
        await pauseWhenDue();
        continue;
      }
      const { key, places, start, end } = each;
      if (splitAt !== undefined && compareKeys(key, splitAt) >= 0) {
        assert(compareKeys(key, bulk.at(-1)!.keyEnd) >= 0, 'what is in bulk is not put otherwise');
        if (valueCount > 0) {
          written.push(await writer.finish());
          writer = await create();
        }
        splitAt = undefined;
      }
      for (let i = start; i < end; i++) {
        if (i === touched) {
          touched = Math.min(i + TOUCHED_AT_ONCE, places.length);
          seen ^= layer.touch(places, i, touched);
        }
        layer.writeTo(writer, key, places[i]!);
        if (writer.isBusy) await writer.drain();
        if ((++valueCount & 63) === 0) await pauseWhenDue();
      }
    }
    assert(Number.isInteger(seen), 'what is touched is there');
    written.push(await writer.finish());
    return written;
  } catch (error) {
    await writer.abort();
    throw error;
  }
}
