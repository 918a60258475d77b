/**
 * Layers of a record that says more than memory should hold: its values are written as they come, and a timeline names the layers when it takes the
 * record (timeline.ts). What is put otherwise for the record has the same LSN range and other keys, so that all of it is one run.
 */

import { setImmediate as yieldToOthers } from 'node:timers/promises';
import { rm } from 'node:fs/promises';
import type { Lsn } from '../postgres/lsn.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { layerPath } from './layers/layer-format.ts';
import { LAYER_BYTES, LayerWriter } from './layers/layer-writer.ts';
import type { KeyValue } from './timeline-access.ts';
import { VALUE_KIND } from './value.ts';

const SLICE_MS = 2;

export interface BulkOptions {
  readonly directory: string;
  readonly timelineId: string;
  /** Of the run; the values are under its last LSN. */
  readonly lsnStart: Lsn;
  readonly lsnEnd: Lsn;
  /** Called now and then: what it throws ends the writing. */
  readonly check: () => void;
}

/** The layers are durable under their names when this resolves, by key; nothing refers to them yet. What was written is removed when it rejects. */
export async function writeBulkLayers(
  pieces: AsyncIterable<readonly KeyValue[]>,
  { directory, timelineId, lsnStart, lsnEnd, check }: BulkOptions,
): Promise<LayerDescription[]> {
  const written: LayerDescription[] = [];
  let writer: LayerWriter | undefined;
  try {
    let sliceStartMs = performance.now();
    for await (const piece of pieces) {
      for (const [key, value] of piece) {
        writer ??= await LayerWriter.create(directory, { kind: 'delta', timelineId, lsnStart, lsnEnd });
        if (value[0] === VALUE_KIND.image) writer.addNewest(key, lsnEnd - 1, value);
        else writer.add(key, lsnEnd - 1, value);
        if (writer.isBusy) await writer.drain();
        if (performance.now() - sliceStartMs <= SLICE_MS) continue;
        check();
        await yieldToOthers();
        sliceStartMs = performance.now();
      }
      if (writer === undefined || writer.valueBytes < LAYER_BYTES) continue;
      written.push(await writer.finish());
      writer = undefined;
    }
    if (writer !== undefined) written.push(await writer.finish());
    check();
    return written;
  } catch (error) {
    await writer?.abort();
    for (const layer of written) await rm(layerPath(directory, layer), { force: true });
    throw error;
  }
}
