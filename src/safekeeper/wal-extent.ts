/**
 * Which part of a timeline's log is on this disk, and which is in the object store. A small file beside the control file:
 *
 *   offset  size  field
 *        0     8  magic "STRATAWX"
 *        8     4  version, u32 little-endian: 1
 *       12     4  length n of the payload, u32
 *       16     n  payload, JSON: WalExtent
 *     16+n     4  CRC32C of bytes 0 to 16+n, u32
 *
 * Written whole to `extent.partial`, fsynced, renamed to `extent`, and the folder fsynced. Without it the log is whole and none of it known to be offloaded.
 *
 * Invariant: nothing is removed before this says so, durably; so what it says is here is here.
 */
import { join } from 'node:path';
import { crc32c } from '../base/crc32c.ts';
import { readDecoded, replaceFile } from '../base/durable-file.ts';
import type { Lsn } from '../postgres/lsn.ts';

export interface WalExtent {
  /** The log's first byte: the timeline's start, or later for a log that was rebuilt without its beginning. */
  readonly logStartLsn: Lsn;
  /** The first byte on this disk: logStartLsn, or a segment's start above it. */
  readonly localStartLsn: Lsn;
  /** Everything from logStartLsn to here was seen in the object store. */
  readonly offloadedLsn: Lsn;
}

export const EXTENT_FILE_NAME = 'extent';

const MAGIC = Buffer.from('STRATAWX');
const VERSION = 1;
const HEADER_BYTES = 16;
const CRC_BYTES = 4;

/** Of a log that is whole here. */
export function wholeExtent(startLsn: Lsn): WalExtent {
  return { logStartLsn: startLsn, localStartLsn: startLsn, offloadedLsn: startLsn };
}

export function encodeWalExtent(extent: WalExtent): Buffer {
  const payload = Buffer.from(JSON.stringify(extent));
  const file = Buffer.alloc(HEADER_BYTES + payload.length + CRC_BYTES);
  MAGIC.copy(file);
  file.writeUInt32LE(VERSION, 8);
  file.writeUInt32LE(payload.length, 12);
  payload.copy(file, HEADER_BYTES);
  file.writeUInt32LE(crc32c(file, 0, HEADER_BYTES + payload.length), HEADER_BYTES + payload.length);
  return file;
}

/** Throws an Error that says what is wrong with the bytes. */
export function decodeWalExtent(file: Buffer): WalExtent {
  const end = file.length - CRC_BYTES;
  const isSound =
    file.length >= HEADER_BYTES + CRC_BYTES &&
    file.subarray(0, MAGIC.length).equals(MAGIC) &&
    file.readUInt32LE(8) === VERSION &&
    HEADER_BYTES + file.readUInt32LE(12) === end;
  if (!isSound) throw new Error(`${file.length} bytes are no extent of a log, of version ${VERSION}`);
  const [stored, computed] = [file.readUInt32LE(end), crc32c(file, 0, end)];
  if (stored !== computed) {
    throw new Error(`extent has CRC ${stored.toString(16)}, its bytes give ${computed.toString(16)}`);
  }
  return JSON.parse(file.toString('utf8', HEADER_BYTES, end)) as WalExtent;
}

/** Durable when it resolves. */
export async function writeWalExtent(directory: string, extent: WalExtent): Promise<void> {
  await replaceFile(join(directory, EXTENT_FILE_NAME), encodeWalExtent(extent));
}

/** Undefined when there is none. */
export async function readWalExtent(directory: string): Promise<WalExtent | undefined> {
  return readDecoded(join(directory, EXTENT_FILE_NAME), decodeWalExtent);
}
