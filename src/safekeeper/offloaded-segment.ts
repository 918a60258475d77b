/**
 * WAL as it lies in the object store: committed bytes of one timeline, within one segment, from the segment's first byte (or the log's) on.
 *
 *   wal/<tenant id>/<timeline id>/<first LSN>-<end LSN>        16 hex digits each
 *
 *   offset  size  field
 *        0     8  magic "STRATAWL"
 *        8     4  version, u32 little-endian: 1
 *       12     4  length n of the head, u32
 *       16     4  length m of the WAL, u32
 *       20     n  head, JSON: OffloadedHead
 *     20+n     k  the WAL, zstd; its length is that of the object
 *   20+n+k     4  CRC32C of everything before, u32
 *
 * Names say all: what is committed never changes, so whoever writes an object of that name writes the same WAL, once or again, early or late; no
 * safekeeper can harm another's. An object that ends inside its segment is superseded by any that begins where it does and ends later, and is
 * removed some time after that is there.
 */
import { promisify } from 'node:util';
import { zstdCompress, zstdDecompress, constants } from 'node:zlib';
import { crc32c } from '../base/crc32c.ts';
import type { TimelineIdentity } from '../api/safekeeper.ts';
import type { TermHistory } from '../consensus/messages.ts';
import { formatLsn, type Lsn, lsnFromHex, lsnToHex, segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';

export interface OffloadedHead extends TimelineIdentity {
  readonly fromLsn: Lsn;
  readonly endLsn: Lsn;
  /** Who wrote the log up to endLsn: entries that start before it. */
  readonly history: TermHistory;
}

export interface OffloadedSegment extends OffloadedHead {
  readonly bytes: Buffer;
}

export interface OffloadedName {
  readonly name: string;
  readonly fromLsn: Lsn;
  readonly endLsn: Lsn;
}

const MAGIC = Buffer.from('STRATAWL');
const VERSION = 1;
const FIXED_BYTES = 20;
const CRC_BYTES = 4;
const ZSTD_LEVEL = 1;
/** Hex digits of an LSN that all of a segment have in common. */
const SEGMENT_DIGITS = 10;

const compress = promisify(zstdCompress);
const decompress = promisify(zstdDecompress);

export const OFFLOADED_PREFIX = 'wal/';

export function offloadedPrefix(tenantId: string, timelineId: string): string {
  return `${OFFLOADED_PREFIX}${tenantId}/${timelineId}/`;
}

/** The beginning of the names of all objects of the segment that holds `lsn`. */
export function segmentPrefix(tenantId: string, timelineId: string, lsn: Lsn): string {
  return offloadedPrefix(tenantId, timelineId) + lsnToHex(segmentStart(lsn)).slice(0, SEGMENT_DIGITS);
}

export function offloadedName({
  tenantId,
  timelineId,
  fromLsn,
  endLsn,
}: Pick<OffloadedHead, 'tenantId' | 'timelineId' | 'fromLsn' | 'endLsn'>): string {
  return `${offloadedPrefix(tenantId, timelineId)}${lsnToHex(fromLsn)}-${lsnToHex(endLsn)}`;
}

/** Undefined for what is none of ours. */
export function parseOffloadedName(name: string): OffloadedName | undefined {
  const match = /\/([0-9A-F]{16})-([0-9A-F]{16})$/i.exec(name);
  if (match === null) return undefined;
  const [fromLsn, endLsn] = [lsnFromHex(match[1]!), lsnFromHex(match[2]!)];
  if (fromLsn >= endLsn || endLsn > segmentStart(fromLsn) + WAL_SEGMENT_SIZE) return undefined;
  return { name, fromLsn, endLsn };
}

export async function encodeOffloaded({ bytes, ...head }: OffloadedSegment): Promise<Buffer> {
  const payload = Buffer.from(JSON.stringify(head));
  const packed = await compress(bytes, { params: { [constants.ZSTD_c_compressionLevel]: ZSTD_LEVEL } });
  const fixed = Buffer.alloc(FIXED_BYTES);
  MAGIC.copy(fixed);
  fixed.writeUInt32LE(VERSION, 8);
  fixed.writeUInt32LE(payload.length, 12);
  fixed.writeUInt32LE(bytes.length, 16);
  const object = Buffer.concat([fixed, payload, packed, Buffer.alloc(CRC_BYTES)]);
  object.writeUInt32LE(crc32c(object, 0, object.length - CRC_BYTES), object.length - CRC_BYTES);
  return object;
}

/** Throws an Error that says what is wrong with the object. */
export async function decodeOffloaded(name: string, object: Buffer): Promise<OffloadedSegment> {
  const expected = parseOffloadedName(name);
  if (object.length < FIXED_BYTES + CRC_BYTES || !object.subarray(0, MAGIC.length).equals(MAGIC)) {
    throw new Error(`${name}: ${object.length} bytes are no WAL of a safekeeper`);
  }
  const end = object.length - CRC_BYTES;
  const [stored, computed] = [object.readUInt32LE(end), crc32c(object, 0, end)];
  if (stored !== computed) {
    throw new Error(`${name}: CRC ${stored.toString(16)}, its bytes give ${computed.toString(16)}`);
  }
  const version = object.readUInt32LE(8);
  if (version !== VERSION) throw new Error(`${name}: version ${version}, this program knows ${VERSION}`);
  const headEnd = FIXED_BYTES + object.readUInt32LE(12);
  const head = JSON.parse(object.toString('utf8', FIXED_BYTES, headEnd)) as OffloadedHead;
  const bytes = await decompress(object.subarray(headEnd, end));
  const isWhole = bytes.length === object.readUInt32LE(16) && bytes.length === head.endLsn - head.fromLsn;
  if (!isWhole || head.fromLsn !== expected?.fromLsn || head.endLsn !== expected.endLsn) {
    throw new Error(
      `${name}: holds ${bytes.length} bytes, ${formatLsn(head.fromLsn)} to ${formatLsn(head.endLsn)}: not what its name says`,
    );
  }
  return { ...head, bytes };
}
