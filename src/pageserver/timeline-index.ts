/**
 * A timeline's index: the file that says what the timeline is and which layers it consists of. What it does not name does not exist.
 *
 *   line 1   `strata-timeline-index 1 <length of the rest in bytes> <CRC32C of the rest, 8 hex digits>`
 *   rest     JSON: TimelineIndex, where LSNs are text of 16 hex digits, and each layer is [file name, size in bytes]
 *
 * The file is only ever replaced whole: written beside it, fsynced, renamed, and the folder fsynced. So a crash leaves the old or
 * the new; layer files that it does not name are remains of a flush that did not end, and are removed at start.
 *
 * Invariant: with the layers, and the ancestor's history up to ancestor.lsn, every LSN from the horizon (without one: from ancestor.lsn, or
 * from startLsn for a timeline without an ancestor) to diskConsistentLsn can be read. What came later must be pulled from the safekeepers again.
 */

import { crc32c } from '../base/crc32c.ts';
import { StrataError } from '../base/errors.ts';
import { lsnFromHex, lsnToHex } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { toPgVersion } from '../postgres/version.ts';
import type { PgVersion } from '../postgres/version.ts';
import { decodeKey } from './key.ts';
import { layerFileName } from './layers/layer-format.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import type { Horizon } from './retention.ts';

export const TIMELINE_INDEX_NAME = 'index';
const MAGIC = 'strata-timeline-index';
const VERSION = 1;

export interface TimelineIndex {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly pgVersion: PgVersion;
  readonly ancestor: { readonly timelineId: string; readonly lsn: Lsn } | undefined;
  /** Where the timeline's own WAL begins: its ancestor.lsn, or the end of the last record of the cluster that was imported. */
  readonly startLsn: Lsn;
  /** Start of the record that ends at startLsn. */
  readonly startRecordLsn: Lsn;
  readonly diskConsistentLsn: Lsn;
  /** Start of the record that ends at diskConsistentLsn. */
  readonly diskConsistentRecordLsn: Lsn;
  /** Below it, history is gone, save for points that are retained (retention.ts). */
  readonly horizon?: Horizon | undefined;
  /** Set before anything is removed: from then on the timeline does not exist, whatever files are left. */
  readonly isDeleted: boolean;
  readonly layers: readonly LayerDescription[];
}

/** The index as JSON; remote/remote-index.ts has it as well. */
export interface TimelineIndexJson {
  tenantId: string;
  timelineId: string;
  pgVersion: number;
  ancestor: { timelineId: string; lsn: string } | null;
  startLsn: string;
  startRecordLsn: string;
  diskConsistentLsn: string;
  diskConsistentRecordLsn: string;
  horizon?: { lsn: string; timeMs: number };
  isDeleted: boolean;
  layers: [string, number][];
}

export function encodeTimelineIndex(index: TimelineIndex): Buffer {
  return encodeChecked(MAGIC, VERSION, timelineIndexToJson(index));
}

/** Throws `internal`, naming the file, when the bytes are not a whole index of a known version. */
export function decodeTimelineIndex(bytes: Buffer, file: string): TimelineIndex {
  const damaged = (reason: string): StrataError =>
    new StrataError('internal', `timeline index ${file} is damaged: ${reason}`);
  return decodeChecked(bytes, MAGIC, VERSION, damaged, (json) =>
    timelineIndexFromJson(json as TimelineIndexJson, damaged),
  );
}

export function timelineIndexToJson(index: TimelineIndex): TimelineIndexJson {
  const { ancestor, horizon } = index;
  return {
    tenantId: index.tenantId,
    timelineId: index.timelineId,
    pgVersion: index.pgVersion,
    ancestor: ancestor === undefined ? null : { timelineId: ancestor.timelineId, lsn: lsnToHex(ancestor.lsn) },
    startLsn: lsnToHex(index.startLsn),
    startRecordLsn: lsnToHex(index.startRecordLsn),
    diskConsistentLsn: lsnToHex(index.diskConsistentLsn),
    diskConsistentRecordLsn: lsnToHex(index.diskConsistentRecordLsn),
    ...(horizon === undefined ? {} : { horizon: { lsn: lsnToHex(horizon.lsn), timeMs: horizon.timeMs } }),
    isDeleted: index.isDeleted,
    layers: index.layers.map((layer) => [layerFileName(layer), layer.sizeBytes]),
  };
}

/** JSON after a line that says what it is, its length and its CRC32C. */
export function encodeChecked(magic: string, version: number, json: unknown): Buffer {
  const rest = Buffer.from(`${JSON.stringify(json)}\n`);
  const checksum = crc32c(rest).toString(16).padStart(8, '0');
  return Buffer.concat([Buffer.from(`${magic} ${version} ${rest.length} ${checksum}\n`), rest]);
}

/** What `read` makes of the JSON. Throws what `damaged` makes of the reason when the bytes are not what encodeChecked makes, or `read` throws. */
export function decodeChecked<T>(
  bytes: Buffer,
  magic: string,
  version: number,
  damaged: (reason: string) => StrataError,
  read: (json: unknown) => T,
): T {
  const lineEnd = bytes.indexOf(0x0a);
  const head = /^([a-z-]+) (\d+) (\d+) ([0-9a-f]{8})$/.exec(bytes.toString('latin1', 0, Math.max(0, lineEnd)));
  if (head === null || head[1] !== magic) throw damaged('it does not begin as an index');
  if (Number(head[2]) !== version) throw damaged(`format version ${head[2]} is not known`);
  const rest = bytes.subarray(lineEnd + 1);
  if (rest.length !== Number(head[3])) throw damaged(`it has ${rest.length} bytes, its first line says ${head[3]}`);
  const checksum = crc32c(rest);
  if (checksum !== parseInt(head[4]!, 16)) throw damaged(`checksum is ${checksum.toString(16)}, not ${head[4]}`);
  try {
    return read(JSON.parse(rest.toString('utf8')));
  } catch (error) {
    if (error instanceof StrataError) throw error;
    throw damaged(`what it says cannot be: ${(error as Error).message}`);
  }
}

export function timelineIndexFromJson(
  json: TimelineIndexJson,
  damaged: (reason: string) => StrataError,
): TimelineIndex {
  return {
    tenantId: json.tenantId,
    timelineId: json.timelineId,
    pgVersion: toPgVersion(json.pgVersion),
    ancestor:
      json.ancestor === null ? undefined : { timelineId: json.ancestor.timelineId, lsn: lsnFromHex(json.ancestor.lsn) },
    startLsn: lsnFromHex(json.startLsn),
    startRecordLsn: lsnFromHex(json.startRecordLsn),
    diskConsistentLsn: lsnFromHex(json.diskConsistentLsn),
    diskConsistentRecordLsn: lsnFromHex(json.diskConsistentRecordLsn),
    ...(json.horizon === undefined
      ? {}
      : { horizon: { lsn: lsnFromHex(json.horizon.lsn), timeMs: json.horizon.timeMs } }),
    isDeleted: json.isDeleted,
    layers: json.layers.map(([name, sizeBytes]) => parseLayer(name, sizeBytes, damaged)),
  };
}

const LAYER_NAME = /^([0-9a-f]{36})-([0-9a-f]{36})__([0-9A-F]{16})(?:-([0-9A-F]{16}))?(?:\.(\d+))?$/;

/** The layer that has this file name. */
export function parseLayer(
  name: string,
  sizeBytes: number,
  damaged: (reason: string) => StrataError,
): LayerDescription {
  const match = LAYER_NAME.exec(name);
  if (match === null) throw damaged(`"${name}" is not the name of a layer`);
  const lsnStart = lsnFromHex(match[3]!);
  return {
    kind: match[4] === undefined ? 'image' : 'delta',
    keyStart: decodeKey(Buffer.from(match[1]!, 'hex')),
    keyEnd: decodeKey(Buffer.from(match[2]!, 'hex')),
    lsnStart,
    lsnEnd: match[4] === undefined ? lsnStart + 1 : lsnFromHex(match[4]),
    sizeBytes,
    ...(match[5] === undefined ? {} : { revision: Number(match[5]) }),
  };
}
