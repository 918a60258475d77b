/**
 * A timeline's index in the object store: what the timeline is, and every layer that it consists of.
 *
 *   line 1   `strata-remote-index 1 <length of the rest in bytes> <CRC32C of the rest, 8 hex digits>`
 *   rest     JSON: { generation, sequence,                      as in the object's name
 *                    timeline,                                  as in the local index (timeline-index.ts), with layers: []
 *                    layers: [[file name, bytes, CRC32 as 8 hex digits, generation in the object's name], …] }
 *
 * Invariant: when an index is in the store, so is every layer that it names, until a newer index is there.
 */

import { StrataError } from '../../base/errors.ts';
import { layerFileName } from '../layers/layer-format.ts';
import type { LayerDescription } from '../layers/layer-format.ts';
import {
  decodeChecked,
  encodeChecked,
  parseLayer,
  timelineIndexFromJson,
  timelineIndexToJson,
} from '../timeline-index.ts';
import type { TimelineIndex, TimelineIndexJson } from '../timeline-index.ts';
import { layerObjectName } from './object-names.ts';

export interface RemoteIndex {
  readonly generation: number;
  readonly sequence: number;
  /** Its layers are those of `layers`. */
  readonly timeline: TimelineIndex;
  readonly layers: readonly RemoteLayer[];
}

/** A layer as it lies in the store. */
export interface RemoteLayer {
  readonly description: LayerDescription;
  /** CRC32 (not CRC32C) of the whole object. */
  readonly crc32: number;
  /** Of who uploaded it. */
  readonly generation: number;
}

const MAGIC = 'strata-remote-index';
const VERSION = 1;

interface RemoteIndexJson {
  generation: number;
  sequence: number;
  timeline: TimelineIndexJson;
  layers: [fileName: string, sizeBytes: number, crc32: string, generation: number][];
}

export function encodeRemoteIndex(index: RemoteIndex): Buffer {
  const { generation, sequence, timeline, layers } = index;
  const json: RemoteIndexJson = {
    generation,
    sequence,
    timeline: timelineIndexToJson({ ...timeline, layers: [] }),
    layers: layers.map((layer) => [
      layerFileName(layer.description),
      layer.description.sizeBytes,
      layer.crc32.toString(16).padStart(8, '0'),
      layer.generation,
    ]),
  };
  return encodeChecked(MAGIC, VERSION, json);
}

/** Throws `internal`, naming the object, when the bytes are not a whole index of a known version. */
export function decodeRemoteIndex(bytes: Buffer, name: string): RemoteIndex {
  const damaged = (reason: string): StrataError =>
    new StrataError('internal', `index object ${name} is damaged: ${reason}`);
  return decodeChecked(bytes, MAGIC, VERSION, damaged, (json) => remoteIndexFromJson(json as RemoteIndexJson, damaged));
}

function remoteIndexFromJson(json: RemoteIndexJson, damaged: (reason: string) => StrataError): RemoteIndex {
  const layers = json.layers.map(([fileName, sizeBytes, crc32, generation]): RemoteLayer => {
    return { description: parseLayer(fileName, sizeBytes, damaged), crc32: parseInt(crc32, 16), generation };
  });
  const timeline = timelineIndexFromJson(json.timeline, damaged);
  return {
    generation: json.generation,
    sequence: json.sequence,
    timeline: { ...timeline, layers: layers.map(({ description }) => description) },
    layers,
  };
}

/** The object that a layer of the timeline is. */
export function objectNameOf({ tenantId, timelineId }: TimelineIndex, layer: RemoteLayer): string {
  const fileName = layerFileName(layer.description);
  return layerObjectName({ tenantId, timelineId, fileName, generation: layer.generation });
}
