/**
 * The format of layer files: immutable, sorted pieces of a timeline's history.
 *
 * A *delta* layer holds every value (value.ts) of the keys in its key range under the LSNs in its LSN range. An *image* layer
 * holds, as images, all keys of its key range that exist at one LSN: a key in its range that is not in it does not exist there.
 * Both have the same bytes; integers are little-endian unless said otherwise:
 *
 *   header    16 bytes: "STRATALY", u16 version (3), u8 kind (1 delta, 2 image), 5 zeroes
 *   blocks    value blocks and key blocks, in any order, each as in block.ts, one after the other
 *   index     one block
 *   footer    128 bytes
 *
 * The entries are in two sections, each with value blocks and key blocks of its own: *newest* has, of pages that have it here, the last entry, when
 * that is an image; *history* has everything else. Most reads want the newest image of a page, and of its neighbours; so these lie
 * together, and no history has to be looked through. A page's entry in newest comes after all of its entries in history.
 *
 * Value block: values one after the other, with nothing between them. A value is never split; a block is closed when it has
 * reached its target size (the writer's choice, 16 to 64 KiB) or earlier, so a large value makes a large block. Value blocks are numbered
 * from 0 in the order in which the section's stand in the file.
 *
 * Key block: says which values there are and where. All entries of a section, over all its key blocks in order, are sorted by key, then
 * LSN; entries with equal key and LSN stand in the order in which they were put.
 *
 *   u32  entry count
 *   u32  number of the value block that holds the first entry's value
 *   u32  offset of that value in it
 *   then for each entry:
 *     u8      how many leading bytes of the key (key.ts) are those of the entry before it in this block, 0 to 18; first entry: 0
 *     …       the other bytes of the key
 *     varint  if all 18 are shared: LSN minus that of the entry before; else LSN minus the layer's first LSN
 *     varint  0: the value follows the one before it (first entry: is where the block's start says); n: it is at offset 0 of the
 *             value block n further
 *     varint  length of the value
 *     u8      kind of the value: its first byte, repeated here
 *
 * Varint: 7 bits at a time, least significant first, the top bit set on all but the last byte; below 2^53.
 *
 * Index block, for history and then for newest:
 *   u32  key block count, then for each: first key (18 bytes), u64 first LSN, u64 newest LSN of all entries, u48 file offset, u32 length of the
 *        block as stored
 *   u32  value block count, then for each: u48 file offset, u32 length as stored (header included in both)
 *
 * Footer:
 *   offset  size  field
 *        0     4  CRC32C of the other 124 bytes
 *        4     2  version (3)
 *        6     1  kind
 *        7     1  zero
 *        8    16  timeline id
 *       24    18  first key of the range, big-endian as in key.ts
 *       42    18  end of the key range (not in it)
 *       60     4  length of the index block, header included
 *       64     8  first LSN of the range
 *       72     8  end of the LSN range (not in it); first LSN + 1 for an image layer
 *       80     8  file offset of the index block
 *       88     8  entry count
 *       96     8  bytes of all values before compression
 *      104    16  zero
 *      120     8  "STRATALY"
 *
 * Name: `<first key>-<end key>__<first LSN>-<end LSN>` for delta layers, `<first key>-<end key>__<LSN>` for image layers; keys in 36
 * hex digits, LSNs in 16. A layer that was made from others has `.<revision>` after that, which is above theirs: it may span the same keys
 * and LSNs as one of them. The footer decides; the name is for people and for listings.
 *
 * A file is written under a name that ends in `.partial`, fsynced, renamed, and then counts only once the timeline's index
 * (timeline-index.ts) names it.
 */

import { join } from 'node:path';
import { crc32c } from '../../base/crc32c.ts';
import { lsnToHex, readLsn, writeLsn } from '../../postgres/lsn.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { decodeKey, formatKey, KEY_SIZE_BYTES, writeKey } from '../key.ts';
import type { Key } from '../key.ts';
import { LayerDamagedError } from './block.ts';
import { KeyBlock, KeyColumns } from './key-block.ts';

export const LAYER_MAGIC = 'STRATALY';
export const LAYER_VERSION = 3;
export const LAYER_HEADER_BYTES = 16;
export const LAYER_FOOTER_BYTES = 128;

export type LayerKind = 'delta' | 'image';
const KIND_CODE = { delta: 1, image: 2 } as const;

/** What is known of a layer without opening it. */
export interface LayerDescription {
  readonly kind: LayerKind;
  readonly keyStart: Key;
  readonly keyEnd: Key;
  readonly lsnStart: Lsn;
  readonly lsnEnd: Lsn;
  readonly sizeBytes: number;
  /** Tells layers of one range apart; 0 when absent. */
  readonly revision?: number;
}

export interface LayerFooter {
  readonly kind: LayerKind;
  readonly timelineId: string;
  readonly keyStart: Key;
  readonly keyEnd: Key;
  readonly lsnStart: Lsn;
  readonly lsnEnd: Lsn;
  readonly indexOffset: number;
  readonly indexLength: number;
  readonly entryCount: number;
  readonly valueBytes: number;
}

export interface BlockLocation {
  readonly offset: number;
  readonly length: number;
}

export interface KeyBlockLocation extends BlockLocation {
  readonly firstKey: Key;
  readonly firstLsn: Lsn;
  /** Of all its entries. */
  readonly newestLsn: Lsn;
}

/** A section of the decoded index block, column by column. */
export interface SectionIndex {
  readonly firstKeys: KeyColumns;
  readonly firstLsns: Float64Array;
  readonly newestLsns: Float64Array;
  readonly keyBlockOffsets: Float64Array;
  readonly keyBlockLengths: Uint32Array;
  readonly valueBlockOffsets: Float64Array;
  readonly valueBlockLengths: Uint32Array;
}

export interface LayerIndex {
  readonly history: SectionIndex;
  readonly newest: SectionIndex;
}

export function layerFileName(
  layer: Pick<LayerDescription, 'kind' | 'keyStart' | 'keyEnd' | 'lsnStart' | 'lsnEnd' | 'revision'>,
): string {
  const lsns =
    layer.kind === 'image' ? lsnToHex(layer.lsnStart) : `${lsnToHex(layer.lsnStart)}-${lsnToHex(layer.lsnEnd)}`;
  const revision = layer.revision === undefined || layer.revision === 0 ? '' : `.${layer.revision}`;
  return `${formatKey(layer.keyStart)}-${formatKey(layer.keyEnd)}__${lsns}${revision}`;
}

export function layerPath(directory: string, layer: LayerDescription): string {
  return join(directory, layerFileName(layer));
}

export function encodeHeader(kind: LayerKind): Buffer {
  const bytes = Buffer.alloc(LAYER_HEADER_BYTES);
  bytes.write(LAYER_MAGIC, 0, 'latin1');
  bytes.writeUInt16LE(LAYER_VERSION, 8);
  bytes[10] = KIND_CODE[kind];
  return bytes;
}

export function encodeFooter(footer: LayerFooter): Buffer {
  const bytes = Buffer.alloc(LAYER_FOOTER_BYTES);
  bytes.writeUInt16LE(LAYER_VERSION, 4);
  bytes[6] = KIND_CODE[footer.kind];
  bytes.write(footer.timelineId, 8, 16, 'hex');
  writeKey(footer.keyStart, bytes, 24);
  writeKey(footer.keyEnd, bytes, 42);
  bytes.writeUInt32LE(footer.indexLength, 60);
  writeLsn(bytes, footer.lsnStart, 64);
  writeLsn(bytes, footer.lsnEnd, 72);
  writeLsn(bytes, footer.indexOffset, 80);
  writeLsn(bytes, footer.entryCount, 88);
  writeLsn(bytes, footer.valueBytes, 96);
  bytes.write(LAYER_MAGIC, 120, 'latin1');
  bytes.writeUInt32LE(crc32c(bytes, 4), 0);
  return bytes;
}

/** `bytes` are the last 128 bytes of `file`; `offset` is where they begin. */
export function decodeFooter(bytes: Buffer, file: string, offset: number): LayerFooter {
  const damaged = (reason: string): LayerDamagedError => new LayerDamagedError(file, offset, reason);
  if (bytes.length !== LAYER_FOOTER_BYTES) throw damaged(`footer has ${bytes.length} bytes, expected 128`);
  if (bytes.toString('latin1', 120) !== LAYER_MAGIC) throw damaged('file does not end as a layer file does');
  const checksum = crc32c(bytes, 4);
  if (checksum !== bytes.readUInt32LE(0)) {
    throw damaged(`footer's checksum is ${checksum}, footer says ${bytes.readUInt32LE(0)}`);
  }
  const version = bytes.readUInt16LE(4);
  if (version !== LAYER_VERSION) {
    throw damaged(`its format has version ${version}, this program reads version ${LAYER_VERSION} only`);
  }
  const kind = bytes[6] === KIND_CODE.delta ? 'delta' : bytes[6] === KIND_CODE.image ? 'image' : undefined;
  if (kind === undefined) throw damaged(`layer kind ${bytes[6]} is not known`);
  return {
    kind,
    timelineId: bytes.toString('hex', 8, 24),
    keyStart: decodeKey(bytes, 24),
    keyEnd: decodeKey(bytes, 42),
    indexLength: bytes.readUInt32LE(60),
    lsnStart: readLsn(bytes, 64),
    lsnEnd: readLsn(bytes, 72),
    indexOffset: readLsn(bytes, 80),
    entryCount: readLsn(bytes, 88),
    valueBytes: readLsn(bytes, 96),
  };
}

const KEY_BLOCK_ITEM_BYTES = KEY_SIZE_BYTES + 8 + 8 + 6 + 4;
const VALUE_BLOCK_ITEM_BYTES = 6 + 4;

/** What the index says of a section. */
export interface SectionLocations {
  readonly keyBlocks: readonly KeyBlockLocation[];
  readonly valueBlocks: readonly BlockLocation[];
}

export function encodeIndex(history: SectionLocations, newest: SectionLocations): Buffer {
  return Buffer.concat([encodeSection(history), encodeSection(newest)]);
}

function encodeSection({ keyBlocks, valueBlocks }: SectionLocations): Buffer {
  const bytes = Buffer.allocUnsafe(
    8 + keyBlocks.length * KEY_BLOCK_ITEM_BYTES + valueBlocks.length * VALUE_BLOCK_ITEM_BYTES,
  );
  let at = bytes.writeUInt32LE(keyBlocks.length, 0);
  for (const block of keyBlocks) {
    writeKey(block.firstKey, bytes, at);
    writeLsn(bytes, block.firstLsn, at + 18);
    writeLsn(bytes, block.newestLsn, at + 26);
    bytes.writeUIntLE(block.offset, at + 34, 6);
    at = bytes.writeUInt32LE(block.length, at + 40);
  }
  at = bytes.writeUInt32LE(valueBlocks.length, at);
  for (const block of valueBlocks) {
    bytes.writeUIntLE(block.offset, at, 6);
    at = bytes.writeUInt32LE(block.length, at + 6);
  }
  return bytes;
}

/** `offset` is that of the index block in `file`, for errors. */
export function decodeIndex(bytes: Buffer, file: string, offset: number): LayerIndex {
  const history = decodeSection(bytes, 0);
  const newest = history === undefined ? undefined : decodeSection(bytes, history.end);
  if (history === undefined || newest === undefined || newest.end !== bytes.length) {
    throw new LayerDamagedError(file, offset, `index of ${bytes.length} bytes does not fit the blocks that it counts`);
  }
  return { history: history.index, newest: newest.index };
}

/** The section that begins at `start`, and where it ends; undefined when the bytes are too few. */
function decodeSection(bytes: Buffer, start: number): { index: SectionIndex; end: number } | undefined {
  if (bytes.length < start + 4) return undefined;
  const keyBlockCount = bytes.readUInt32LE(start);
  const valuesAt = start + 4 + keyBlockCount * KEY_BLOCK_ITEM_BYTES;
  if (bytes.length < valuesAt + 4) return undefined;
  const valueBlockCount = bytes.readUInt32LE(valuesAt);
  const end = valuesAt + 4 + valueBlockCount * VALUE_BLOCK_ITEM_BYTES;
  if (bytes.length < end) return undefined;
  const index: SectionIndex = {
    firstKeys: new KeyColumns(keyBlockCount),
    firstLsns: new Float64Array(keyBlockCount),
    newestLsns: new Float64Array(keyBlockCount),
    keyBlockOffsets: new Float64Array(keyBlockCount),
    keyBlockLengths: new Uint32Array(keyBlockCount),
    valueBlockOffsets: new Float64Array(valueBlockCount),
    valueBlockLengths: new Uint32Array(valueBlockCount),
  };
  for (let i = 0, at = start + 4; i < keyBlockCount; i++, at += KEY_BLOCK_ITEM_BYTES) {
    index.firstKeys.decode(i, bytes, at);
    index.firstLsns[i] = readLsn(bytes, at + 18);
    index.newestLsns[i] = readLsn(bytes, at + 26);
    index.keyBlockOffsets[i] = bytes.readUIntLE(at + 34, 6);
    index.keyBlockLengths[i] = bytes.readUInt32LE(at + 40);
  }
  for (let i = 0, at = valuesAt + 4; i < valueBlockCount; i++, at += VALUE_BLOCK_ITEM_BYTES) {
    index.valueBlockOffsets[i] = bytes.readUIntLE(at, 6);
    index.valueBlockLengths[i] = bytes.readUInt32LE(at + 6);
  }
  return { index, end };
}

/** The content of a key block. `offset` is that of the block in `file`, for errors. */
export function decodeKeyBlock(bytes: Buffer, layerLsnStart: Lsn, file: string, offset: number): KeyBlock {
  try {
    return new KeyBlock(bytes, layerLsnStart);
  } catch (error) {
    throw new LayerDamagedError(file, offset, `key block: ${(error as Error).message}`);
  }
}
