/**
 * Names of a pageserver's objects in the object store.
 *
 *   indexes/<tenant>/<timeline>-<generation>-<sequence>            what the timeline is from then on (remote-index.ts)
 *   indexes/<tenant>/<timeline>-<generation>-<sequence>-deleted    that it is deleted: a tombstone
 *   layers/<tenant>/<timeline>/<layer file name>-<generation>      a layer; the bytes of the local file
 *
 * Tenant and timeline are 32 hex digits, generation and sequence 8 hex digits. A name has one content for ever. Indexes lie apart from layers, and their
 * names alone say which is the newest and whether the timeline is deleted: so one list of `indexes/` finds all timelines, however many layers
 * they have.
 */

export interface IndexName {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly generation: number;
  readonly sequence: number;
  readonly isDeleted: boolean;
}

export interface LayerName {
  readonly tenantId: string;
  readonly timelineId: string;
  /** As layerFileName (layers/layer-format.ts) has it. */
  readonly fileName: string;
  readonly generation: number;
}

export const INDEXES_PREFIX = 'indexes/';
export const LAYERS_PREFIX = 'layers/';
export const GENERATION_MAX = 2 ** 32 - 1;

export function indexObjectName(index: IndexName): string {
  const { tenantId, timelineId, generation, sequence, isDeleted } = index;
  const name = `${indexesOf(tenantId, timelineId)}${hex(generation)}-${hex(sequence)}`;
  return isDeleted ? `${name}-deleted` : name;
}

export function layerObjectName(layer: LayerName): string {
  return `${layersOf(layer.tenantId, layer.timelineId)}${layer.fileName}-${hex(layer.generation)}`;
}

/** What the names of a timeline's indexes begin with. */
export function indexesOf(tenantId: string, timelineId: string): string {
  return `${INDEXES_PREFIX}${tenantId}/${timelineId}-`;
}

/** What the names of a timeline's layers begin with. */
export function layersOf(tenantId: string, timelineId: string): string {
  return `${LAYERS_PREFIX}${tenantId}/${timelineId}/`;
}

const INDEX_NAME = /^indexes\/([0-9a-f]{32})\/([0-9a-f]{32})-([0-9a-f]{8})-([0-9a-f]{8})(-deleted)?$/;
const LAYER_NAME = /^layers\/([0-9a-f]{32})\/([0-9a-f]{32})\/(.+)-([0-9a-f]{8})$/;

/** Undefined for what is not the name of an index. */
export function parseIndexName(name: string): IndexName | undefined {
  const match = INDEX_NAME.exec(name);
  if (match === null) return undefined;
  const [, tenantId, timelineId, generation, sequence, deleted] = match;
  return {
    tenantId: tenantId!,
    timelineId: timelineId!,
    generation: parseInt(generation!, 16),
    sequence: parseInt(sequence!, 16),
    isDeleted: deleted !== undefined,
  };
}

/** Undefined for what is not the name of a layer. */
export function parseLayerName(name: string): LayerName | undefined {
  const match = LAYER_NAME.exec(name);
  if (match === null) return undefined;
  const [, tenantId, timelineId, fileName, generation] = match;
  return { tenantId: tenantId!, timelineId: timelineId!, fileName: fileName!, generation: parseInt(generation!, 16) };
}

/** Below 0 when `a` is older than `b`: a higher generation is newer, then a higher sequence. */
export function compareIndexes(
  a: Pick<IndexName, 'generation' | 'sequence'>,
  b: Pick<IndexName, 'generation' | 'sequence'>,
): number {
  return a.generation - b.generation || a.sequence - b.sequence;
}

function hex(value: number): string {
  return value.toString(16).padStart(8, '0');
}
