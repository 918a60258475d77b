/**
 * CRC32C (Castagnoli, reflected polynomial 0x82F63B78): the checksum of WAL records, of the control file and of our own durable formats.
 *
 * 16 bytes are folded at a time with 16 tables ("slicing by 16"): T[0] is the table of the byte-wise algorithm, and T[k][b] is the state
 * of T[0][b] after k more zero bytes. Plain byte loads, so that any offset of any Uint8Array will do; above 1 GB/s.
 *
 * The state that is carried between calls is inverted, as usual: begin with CRC32C_INIT, extend as often as wanted, finish once.
 */

/** State before the first byte. */
export const CRC32C_INIT = -1;

const T = makeTables();

/** CRC32C of `bytes[start, end)`, as an unsigned 32-bit number. */
export function crc32c(bytes: Uint8Array, start = 0, end: number = bytes.length): number {
  return crc32cFinish(crc32cExtend(CRC32C_INIT, bytes, start, end));
}

/** The state after the bytes `[start, end)`. */
export function crc32cExtend(state: number, bytes: Uint8Array, start: number, end: number): number {
  if (start < 0 || end > bytes.length) throw new RangeError(`bytes [${start}, ${end}) of ${bytes.length}`);
  let crc = state | 0;
  let at = start;
  for (const last = end - 16; at <= last; at += 16) {
    crc =
      T[3840 + ((crc ^ bytes[at]!) & 255)]! ^
      T[3584 + (((crc >>> 8) ^ bytes[at + 1]!) & 255)]! ^
      T[3328 + (((crc >>> 16) ^ bytes[at + 2]!) & 255)]! ^
      T[3072 + ((crc >>> 24) ^ bytes[at + 3]!)]! ^
      T[2816 + bytes[at + 4]!]! ^
      T[2560 + bytes[at + 5]!]! ^
      T[2304 + bytes[at + 6]!]! ^
      T[2048 + bytes[at + 7]!]! ^
      T[1792 + bytes[at + 8]!]! ^
      T[1536 + bytes[at + 9]!]! ^
      T[1280 + bytes[at + 10]!]! ^
      T[1024 + bytes[at + 11]!]! ^
      T[768 + bytes[at + 12]!]! ^
      T[512 + bytes[at + 13]!]! ^
      T[256 + bytes[at + 14]!]! ^
      T[bytes[at + 15]!]!;
  }
  if (at <= end - 8) {
    crc =
      T[1792 + ((crc ^ bytes[at]!) & 255)]! ^
      T[1536 + (((crc >>> 8) ^ bytes[at + 1]!) & 255)]! ^
      T[1280 + (((crc >>> 16) ^ bytes[at + 2]!) & 255)]! ^
      T[1024 + ((crc >>> 24) ^ bytes[at + 3]!)]! ^
      T[768 + bytes[at + 4]!]! ^
      T[512 + bytes[at + 5]!]! ^
      T[256 + bytes[at + 6]!]! ^
      T[bytes[at + 7]!]!;
    at += 8;
  }
  if (at <= end - 4) {
    crc =
      T[768 + ((crc ^ bytes[at]!) & 255)]! ^
      T[512 + (((crc >>> 8) ^ bytes[at + 1]!) & 255)]! ^
      T[256 + (((crc >>> 16) ^ bytes[at + 2]!) & 255)]! ^
      T[(crc >>> 24) ^ bytes[at + 3]!]!;
    at += 4;
  }
  for (; at < end; at++) crc = (crc >>> 8) ^ T[(crc ^ bytes[at]!) & 255]!;
  return crc;
}

/** The checksum of a state: an unsigned 32-bit number. */
export function crc32cFinish(state: number): number {
  return ~state >>> 0;
}

function makeTables(): Int32Array {
  const tables = new Int32Array(16 * 256);
  for (let byte = 0; byte < 256; byte++) {
    let crc = byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc & 1) === 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
    tables[byte] = crc;
  }
  for (let i = 256; i < tables.length; i++) {
    const shorter = tables[i - 256]!;
    tables[i] = (shorter >>> 8) ^ tables[shorter & 255]!;
  }
  return tables;
}
