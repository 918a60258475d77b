/** Writes a frozen memory layer to a delta layer file. A little at a time: between slices the process does other things. */

import assert from 'node:assert/strict';
import { setImmediate as yieldToOthers } from 'node:timers/promises';
import type { Lsn } from '../postgres/lsn.ts';
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
  /** End of the layer's LSN range. */
  readonly lsnEnd: Lsn;
}

/** The layer is durable under its name when this resolves; nothing refers to it yet. */
export async function flushMemoryLayer(layer: MemoryLayer, options: FlushOptions): Promise<LayerDescription> {
  const { directory, timelineId, lsnEnd } = options;
  const { lsnStart } = layer;
  const valueBlockBytes = VALUE_BLOCK_BYTES;
  const writer = await LayerWriter.create(directory, { kind: 'delta', timelineId, lsnStart, lsnEnd, valueBlockBytes });
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
    return await writer.finish();
  } catch (error) {
    await writer.abort();
    throw error;
  }
}
