/**
 * A timeline's control file: who it is and what its acceptor must not forget. Small, and replaced as a whole.
 *
 *   offset  size  field
 *        0     8  magic "STRATASK"
 *        8     4  version, u32 little-endian: 3 (1 had no generations and is read as generation 0; 2 had no configurations and is read as version 0)
 *       12     4  length n of the payload, u32
 *       16     n  payload, JSON: ControlFile
 *     16+n     4  CRC32C of bytes 0 to 16+n, u32
 *
 * Written to `control.partial`, fsynced, renamed to `control`, and the folder fsynced. A folder without `control` is a timeline whose creation
 * never finished, unless it has a flush mark. The tombstone of a deleted timeline is a control file too; it stays for ever.
 */
import { join } from 'node:path';
import type { TimelineIdentity } from '../api/safekeeper.ts';
import { crc32c } from '../base/crc32c.ts';
import { readDecoded, replaceFile } from '../base/durable-file.ts';
import type { AcceptorState } from '../consensus/acceptor.ts';
import { type Configuration, NO_CONFIGURATION } from '../consensus/configuration.ts';

export type ControlFile =
  | { readonly kind: 'timeline'; readonly identity: TimelineIdentity; readonly acceptor: AcceptorState }
  | { readonly kind: 'deleted'; readonly tenantId: string; readonly timelineId: string }
  /** Of the safekeeper itself, beside the folders of its tenants: the newest configuration that it was told. */
  | { readonly kind: 'safekeeper'; readonly configuration: Configuration };

export const CONTROL_FILE_NAME = 'control';

const MAGIC = Buffer.from('STRATASK');
const VERSION = 3;
const OLDEST_VERSION = 1;
const HEADER_BYTES = 16;
const CRC_BYTES = 4;

export function encodeControlFile(control: ControlFile): Buffer {
  const payload = Buffer.from(JSON.stringify(control));
  const file = Buffer.alloc(HEADER_BYTES + payload.length + CRC_BYTES);
  MAGIC.copy(file);
  file.writeUInt32LE(VERSION, 8);
  file.writeUInt32LE(payload.length, 12);
  payload.copy(file, HEADER_BYTES);
  file.writeUInt32LE(crc32c(file, 0, HEADER_BYTES + payload.length), HEADER_BYTES + payload.length);
  return file;
}

/** Throws an Error that says what is wrong with the bytes. */
export function decodeControlFile(file: Buffer): ControlFile {
  if (file.length < HEADER_BYTES + CRC_BYTES || !file.subarray(0, MAGIC.length).equals(MAGIC)) {
    throw new Error(`${file.length} bytes are no control file of a safekeeper`);
  }
  const version = file.readUInt32LE(8);
  if (version < OLDEST_VERSION || version > VERSION)
    throw new Error(`control file has version ${version}, this program knows ${VERSION}`);
  const end = HEADER_BYTES + file.readUInt32LE(12);
  if (end + CRC_BYTES !== file.length)
    throw new Error(`control file has ${file.length} bytes, it says ${end + CRC_BYTES}`);
  const stored = file.readUInt32LE(end);
  const computed = crc32c(file, 0, end);
  if (stored !== computed) {
    throw new Error(`control file has CRC ${stored.toString(16)}, its bytes give ${computed.toString(16)}`);
  }
  const control = JSON.parse(file.toString('utf8', HEADER_BYTES, end)) as ControlFile;
  if (control.kind !== 'timeline') return control;
  const acceptor: Partial<AcceptorState> = control.acceptor;
  const { generation = 0, configuration = NO_CONFIGURATION } = acceptor;
  return { ...control, acceptor: { ...control.acceptor, generation, configuration } };
}

/** Durable when it resolves. After a rejection it is not known which content the disk holds. */
export async function writeControlFile(directory: string, control: ControlFile): Promise<void> {
  await replaceFile(join(directory, CONTROL_FILE_NAME), encodeControlFile(control));
}

/** Undefined when there is none. */
export async function readControlFile(directory: string): Promise<ControlFile | undefined> {
  return readDecoded(join(directory, CONTROL_FILE_NAME), decodeControlFile);
}
