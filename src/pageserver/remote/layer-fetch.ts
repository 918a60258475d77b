/**
 * Brings layers from the object store to the local disk: whole; or, for a read of a large one, only the pieces that it wants (layers/partial-layer.ts), until it has wanted so
 * many that the rest may come as well.
 */

import { LayerAbsentError } from '../layers/block.ts';
import type { LayerDamagedError } from '../layers/block.ts';
import type { LayerFile } from '../layers/layer-file.ts';
import { PartialLayer } from '../layers/partial-layer.ts';
import type { Remote } from './remote.ts';
import type { UploadedTimeline } from './timeline-upload.ts';

/** A smaller layer comes whole. */
export const PIECES_FROM_BYTES = 8 * 1024 * 1024;
/** How many times pieces are fetched of a layer before all of it is. */
const FILLS_MAX = 8;

/** Makes the layer whole here; false when the store does not have it. Throws what the store throws. */
export async function fetchWhole(remote: Remote, timeline: UploadedTimeline, layer: LayerFile): Promise<boolean> {
  if (!(await remote.fetch(timeline, layer.description))) return false;
  layer.becomeWhole();
  return true;
}

/** Makes what a read has missed be here; false when the store does not have it. Throws what the store throws. */
export async function fetchWanted(
  remote: Remote,
  timeline: UploadedTimeline,
  layer: LayerFile,
  damage: LayerDamagedError,
  piecesFromBytes = PIECES_FROM_BYTES,
): Promise<boolean> {
  const { sizeBytes } = layer.description;
  const isRest = (layer.partial?.fillCount ?? 0) >= FILLS_MAX;
  if (!(damage instanceof LayerAbsentError) || sizeBytes < piecesFromBytes || isRest) {
    return fetchWhole(remote, timeline, layer);
  }
  const partial = layer.partial ?? (await PartialLayer.create(layer.path, sizeBytes));
  const range = damage.missing ?? partial.lastChunk;
  const bytes = await remote.fetchRange(timeline, layer.description, range.start, range.end);
  if (bytes === undefined) {
    if (layer.partial === undefined) partial.remove();
    return false;
  }
  const isFilled = await partial.fill(range, bytes);
  if (layer.isLocal)
    partial.remove(); // Somebody wanted all of it meanwhile.
  else if (isFilled) layer.partial = partial;
  return true;
}
