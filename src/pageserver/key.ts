/**
 * Keys of the page store: what a value in a timeline's history is about.
 *
 * A key is six numbers, and 18 bytes wherever it is stored or sent; integers are big-endian there, so that comparing
 * bytes is comparing keys:
 *
 *   offset  size  field
 *        0     1  kind   KEY_KIND
 *        1     4  spc    tablespace
 *        5     4  db     database
 *        9     4  rel    relation file number
 *       13     1  fork   0 main, 1 free space map, 2 visibility map, 3 init
 *       14     4  blk    block number
 *
 * What the fields mean for each kind (fields not named are 0), and what the value is:
 *
 *   0x00 singleton         blk: SINGLETON               checkpoint state; the control file that initdb wrote
 *   0x01 database          spc, db                      bytes of pg_filenode.map; the key is there while the database's
 *                                                       directory is. spc 1664, db 0 is the global directory
 *   0x02 relation size     spc, db, rel, fork           u32 LE, blocks
 *   0x03 relation block    spc, db, rel, fork, blk      page of 8192 bytes
 *   0x04 SLRU size         db: SLRU, rel: segment       u32 LE, pages
 *   0x05 SLRU page         db: SLRU, rel: segment, blk  page of 8192 bytes
 *   0x06 two-phase file    db, rel: high, low 32 bits   the file's bytes
 *                          of the full transaction id
 *   0x07 WAL index         as the index wants           record boundaries, commit timestamps
 */

export interface Key {
  readonly kind: number;
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
  readonly fork: number;
  readonly blk: number;
}

/** One fork of one relation. */
export interface RelationFork {
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
  readonly fork: number;
}

/** Keys `start <= key < end`. */
export interface KeyRange {
  readonly start: Key;
  readonly end: Key;
}

export const KEY_SIZE_BYTES = 18;

export const KEY_KIND = {
  singleton: 0x00,
  database: 0x01,
  relationSize: 0x02,
  relationBlock: 0x03,
  slruSize: 0x04,
  slruPage: 0x05,
  twoPhase: 0x06,
  walIndex: 0x07,
} as const;

/** `blk` of the singleton keys. */
export const SINGLETON = { checkpointState: 0, controlFile: 1 } as const;

/** `db` of the SLRU keys. */
export const SLRU = { clog: 0, multixactOffsets: 1, multixactMembers: 2, commitTs: 3 } as const;

export const CHECKPOINT_STATE_KEY: Key = makeKey(KEY_KIND.singleton, 0, 0, 0, 0, SINGLETON.checkpointState);
export const CONTROL_FILE_KEY: Key = makeKey(KEY_KIND.singleton, 0, 0, 0, 0, SINGLETON.controlFile);

/** Every key. No key has kind 0xff. */
export const ALL_KEYS: KeyRange = { start: makeKey(0, 0, 0, 0, 0, 0), end: makeKey(0xff, 0, 0, 0, 0, 0) };

export function makeKey(kind: number, spc: number, db: number, rel: number, fork: number, blk: number): Key {
  return { kind, spc, db, rel, fork, blk };
}

export function databaseKey(spc: number, db: number): Key {
  return makeKey(KEY_KIND.database, spc, db, 0, 0, 0);
}

export function relationSizeKey(spc: number, db: number, rel: number, fork: number): Key {
  return makeKey(KEY_KIND.relationSize, spc, db, rel, fork, 0);
}

export function relationBlockKey(spc: number, db: number, rel: number, fork: number, blk: number): Key {
  return makeKey(KEY_KIND.relationBlock, spc, db, rel, fork, blk);
}

export function slruSizeKey(slru: number, segment: number): Key {
  return makeKey(KEY_KIND.slruSize, 0, slru, segment, 0, 0);
}

export function slruPageKey(slru: number, segment: number, page: number): Key {
  return makeKey(KEY_KIND.slruPage, 0, slru, segment, 0, page);
}

export function twoPhaseKey(fxidHigh: number, fxidLow: number): Key {
  return makeKey(KEY_KIND.twoPhase, 0, fxidHigh, fxidLow, 0, 0);
}

export function walIndexKey(spc: number, db: number, rel: number, fork: number, blk: number): Key {
  return makeKey(KEY_KIND.walIndex, spc, db, rel, fork, blk);
}

/**
 * Every key that has the given leading fields: `prefixRange(KEY_KIND.relationSize, spc, db)` is the sizes of all forks
 * of all relations of one database.
 */
export function prefixRange(kind: number, ...prefix: number[]): KeyRange {
  const start = [kind, 0, 0, 0, 0, 0];
  prefix.forEach((value, i) => (start[i + 1] = value));
  const end = [...start];
  for (let i = prefix.length; i >= 0; i--) {
    const limit = i === 0 || i === 4 ? 0xff : 0xffffffff;
    if (end[i]! < limit) {
      end[i]!++;
      break;
    }
    end[i] = 0;
  }
  return { start: keyOfFields(start), end: keyOfFields(end) };
}

function keyOfFields(fields: number[]): Key {
  return makeKey(fields[0]!, fields[1]!, fields[2]!, fields[3]!, fields[4]!, fields[5]!);
}

/** Negative, zero or positive, in the order of the encoded bytes. */
export function compareKeys(a: Key, b: Key): number {
  return a.kind - b.kind || a.spc - b.spc || a.db - b.db || a.rel - b.rel || a.fork - b.fork || a.blk - b.blk;
}

export function encodeKey(key: Key): Buffer {
  const bytes = Buffer.allocUnsafe(KEY_SIZE_BYTES);
  writeKey(key, bytes, 0);
  return bytes;
}

/** Writes 18 bytes at `offset`. */
export function writeKey(key: Key, bytes: Buffer, offset: number): void {
  bytes[offset] = key.kind;
  writeU32(bytes, offset + 1, key.spc);
  writeU32(bytes, offset + 5, key.db);
  writeU32(bytes, offset + 9, key.rel);
  bytes[offset + 13] = key.fork;
  writeU32(bytes, offset + 14, key.blk);
}

function writeU32(bytes: Buffer, offset: number, value: number): void {
  bytes[offset] = value >>> 24;
  bytes[offset + 1] = value >>> 16;
  bytes[offset + 2] = value >>> 8;
  bytes[offset + 3] = value;
}

export function decodeKey(bytes: Buffer, offset = 0): Key {
  return makeKey(
    bytes.readUInt8(offset),
    bytes.readUInt32BE(offset + 1),
    bytes.readUInt32BE(offset + 5),
    bytes.readUInt32BE(offset + 9),
    bytes.readUInt8(offset + 13),
    bytes.readUInt32BE(offset + 14),
  );
}

/** 36 hex digits, as in layer file names and error messages. */
export function formatKey(key: Key): string {
  return encodeKey(key).toString('hex');
}

/** The smallest key above `key`. */
export function nextKey(key: Key): Key {
  const { kind, spc, db, rel, fork, blk } = key;
  return blk < 0xffffffff ? makeKey(kind, spc, db, rel, fork, blk + 1) : prefixRange(kind, spc, db, rel, fork).end;
}
