/**
 * Writes a frozen memory layer to a delta layer file. A little at a time: compression runs on the thread pool, and between blocks the
 * process does other things.
 *
 * Full page writes are off, so pages that change often would grow long chains of records. Where a chain passes CHAIN_RECORDS_MAX, a page
 * image made here goes in after it, under the LSN of its last record: it replaces nothing, and reads end at it.
 */

import type { Lsn } from '../postgres/lsn.ts';
import { setImmediate as yieldToOthers } from 'node:timers/promises';
import { KEY_KIND } from './key.ts';
import type { Key } from './key.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { LayerWriter } from './layers/layer-writer.ts';
import type { MemoryLayer } from './layers/memory-layer.ts';
import { encodeImage, needsNoPrior } from './value.ts';

export const CHAIN_RECORDS_MAX = 100;
const SLICE_MS = 5;

export interface FlushOptions {
  readonly directory: string;
  readonly timelineId: string;
  /** End of the layer's LSN range. */
  readonly lsnEnd: Lsn;
  /** The value of a key at an LSN; may throw. */
  readonly read: (key: Key, lsn: Lsn) => Buffer | undefined;
}

/** The layer is durable under its name when this resolves; nothing refers to it yet. */
export async function flushMemoryLayer(layer: MemoryLayer, options: FlushOptions): Promise<LayerDescription> {
  const { directory, timelineId, lsnEnd, read } = options;
  const writer = await LayerWriter.create(directory, { kind: 'delta', timelineId, lsnStart: layer.lsnStart, lsnEnd });
  try {
    let sliceStartMs = performance.now();
    let valueCount = 0;
    for (const { key, entries } of layer.keys()) {
      let recordCount = 0;
      for (let i = 0; i < entries.length; i++) {
        const entry = entries[i]!;
        layer.writeTo(writer, key, entry);
        recordCount = needsNoPrior(layer.kindOf(entry)) ? 0 : recordCount + 1;
        if (recordCount >= CHAIN_RECORDS_MAX && holdsPages(key)) {
          const lsn = layer.lsnOf(entry);
          const next = entries[i + 1];
          if (next === undefined || layer.lsnOf(next) !== lsn) {
            const image = readOrSkip(read, key, lsn);
            if (image !== undefined) writer.add(key, lsn, encodeImage(image));
            recordCount = 0;
          }
        }
        if (writer.isBusy) await writer.drain();
        if ((++valueCount & 63) === 0 && performance.now() - sliceStartMs > SLICE_MS) {
          await yieldToOthers();
          sliceStartMs = performance.now();
        }
      }
    }
    return await writer.finish();
  } catch (error) {
    await writer.abort();
    throw error;
  }
}

function holdsPages(key: Key): boolean {
  return key.kind === KEY_KIND.relationBlock || key.kind === KEY_KIND.slruPage;
}

/** A page that cannot be made is not served either; its records are kept as they are, and who reads it gets the error. */
function readOrSkip(read: FlushOptions['read'], key: Key, lsn: Lsn): Buffer | undefined {
  try {
    return read(key, lsn);
  } catch {
    return undefined;
  }
}
