/**
 * Values of the page store: one change of one key at one LSN.
 *
 * The first byte is the kind (VALUE_KIND); integers are little-endian:
 *
 *   0 tombstone     nothing follows             the key does not exist from here on
 *   1 image         payload                     the whole value; 8192 bytes for pages
 *   2 record        u8 blockId, u48 start LSN,  a WAL record to be applied to the value as it was before
 *                   the record's bytes
 *                                               (its xl_prev and CRC zeroed: nobody needs them, and they do not compress)
 *   3 init record   as for 2                    a WAL record that needs no prior value: it initialises the block or
 *                                               carries a full page image that is applied
 *   4 derived       u8 subtype, payload         a change that follows from a record that does not reference the block
 *
 * A value is stored under the END LSN of its record, which is therefore not repeated here. The value of a key at LSN L
 * is the newest tombstone, image or init record at or below L, then all the changes after it up to L, in order. Several
 * values of one key may have the same LSN: they apply in the order in which they were put.
 */

import type { Lsn } from '../postgres/lsn.ts';

export const VALUE_KIND = { tombstone: 0, image: 1, record: 2, initRecord: 3, derived: 4 } as const;

export type Value =
  | { readonly kind: 'tombstone' }
  | { readonly kind: 'image'; readonly payload: Buffer }
  | {
      readonly kind: 'record' | 'init-record';
      readonly blockId: number;
      readonly startLsn: Lsn;
      readonly record: Buffer;
    }
  | { readonly kind: 'derived'; readonly subtype: number; readonly payload: Buffer };

/** Bytes before the payload of an image, and before the bytes of a WAL record. */
export const IMAGE_HEADER_BYTES = 1;
export const RECORD_HEADER_BYTES = 8;
const TWO_32 = 2 ** 32;

export class ValueError extends Error {
  override name = 'ValueError';
}

/** True for the values that end the search for a key's history: nothing older is needed. */
export function needsNoPrior(kind: number): boolean {
  return kind === VALUE_KIND.tombstone || kind === VALUE_KIND.image || kind === VALUE_KIND.initRecord;
}

export function encodeTombstone(): Buffer {
  return Buffer.from([VALUE_KIND.tombstone]);
}

export function encodeImage(payload: Uint8Array): Buffer {
  const bytes = Buffer.allocUnsafe(IMAGE_HEADER_BYTES + payload.length);
  bytes[0] = VALUE_KIND.image;
  bytes.set(payload, IMAGE_HEADER_BYTES);
  return bytes;
}

/** An image that is one u32: the sizes of relation forks and SLRU segments. */
export function encodeCountImage(count: number): Buffer {
  const bytes = Buffer.allocUnsafe(IMAGE_HEADER_BYTES + 4);
  bytes[0] = VALUE_KIND.image;
  bytes.writeUInt32LE(count, IMAGE_HEADER_BYTES);
  return bytes;
}

/** `record` is the whole WAL record; `needsNoPriorValue` is true when it initialises the block or restores it from an image. */
export function encodeRecord(record: Uint8Array, startLsn: Lsn, blockId: number, needsNoPriorValue: boolean): Buffer {
  const bytes = Buffer.allocUnsafe(RECORD_HEADER_BYTES + record.length);
  writeRecordHeader(bytes, 0, startLsn, blockId, needsNoPriorValue);
  bytes.set(record, RECORD_HEADER_BYTES);
  clearRecordLinks(bytes, RECORD_HEADER_BYTES);
  return bytes;
}

/** Zeroes what is of no use in a stored record that begins at `offset`: where the one before it starts, and the CRC. */
export function clearRecordLinks(bytes: Buffer, offset: number): void {
  for (let at = offset + 8; at < offset + 16; at++) bytes[at] = 0;
  for (let at = offset + 20; at < offset + 24; at++) bytes[at] = 0;
}

/** What goes before the bytes of a WAL record. */
export function writeRecordHeader(
  bytes: Buffer,
  offset: number,
  startLsn: Lsn,
  blockId: number,
  needsNoPriorValue: boolean,
): void {
  bytes[offset] = needsNoPriorValue ? VALUE_KIND.initRecord : VALUE_KIND.record;
  bytes[offset + 1] = blockId;
  const high = Math.floor(startLsn / TWO_32);
  bytes[offset + 2] = startLsn;
  bytes[offset + 3] = startLsn >>> 8;
  bytes[offset + 4] = startLsn >>> 16;
  bytes[offset + 5] = startLsn >>> 24;
  bytes[offset + 6] = high;
  bytes[offset + 7] = high >>> 8;
}

export function encodeDerived(subtype: number, payload: Uint8Array): Buffer {
  const bytes = Buffer.allocUnsafe(2 + payload.length);
  bytes[0] = VALUE_KIND.derived;
  bytes[1] = subtype;
  bytes.set(payload, 2);
  return bytes;
}

/** The result refers to `bytes`; nothing is copied. */
export function decodeValue(bytes: Buffer): Value {
  switch (bytes[0]) {
    case VALUE_KIND.tombstone:
      return { kind: 'tombstone' };
    case VALUE_KIND.image:
      return { kind: 'image', payload: bytes.subarray(IMAGE_HEADER_BYTES) };
    case VALUE_KIND.record:
    case VALUE_KIND.initRecord:
      if (bytes.length < RECORD_HEADER_BYTES) break;
      return {
        kind: bytes[0] === VALUE_KIND.record ? 'record' : 'init-record',
        blockId: bytes[1]!,
        startLsn: bytes.readUIntLE(2, 6),
        record: bytes.subarray(RECORD_HEADER_BYTES),
      };
    case VALUE_KIND.derived:
      if (bytes.length < 2) break;
      return { kind: 'derived', subtype: bytes[1]!, payload: bytes.subarray(2) };
    default:
      throw new ValueError(`value of ${bytes.length} bytes has kind ${bytes[0]}, expected 0 to 4`);
  }
  throw new ValueError(`value of kind ${bytes[0]} is ${bytes.length} bytes, shorter than its header`);
}
