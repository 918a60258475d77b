/**
 * WAL records: decoding one whole record into offsets, without copying it. (Postgres: xlogrecord.h, DecodeXLogRecord in xlogreader.c;
 * the layout is the same in 15, 16, 17 and 18.)
 *
 *   0   u32  total length, of the whole record
 *   4   u32  transaction id
 *   8   u64  start LSN of the previous record
 *   16  u8   info: the high 4 bits belong to the resource manager, the low 4 are XLR_* flags
 *   17  u8   resource manager id
 *   18  u16  zero
 *   20  u32  CRC32C of bytes 24 to the end, then of bytes 0 to 20
 *   24  fragment headers, each beginning with a u8 id:
 *         0..32  block reference: u8 fork | flags, u16 data length;
 *                with an image: u16 image length, u16 hole offset, u8 image info, and u16 hole length when compressed with a hole;
 *                unless BKPBLOCK_SAME_REL: u32 tablespace, u32 database, u32 relation; always: u32 block number
 *         253    u16 replication origin
 *         252    u32 top-level transaction id
 *         255    u8 main data length       } the main data's header is the last
 *         254    u32 main data length      }
 *       then, for each block in order of id: image bytes, data bytes; then the main data.
 *
 * Invariants: block ids rise; every offset and length in a decoded record lies inside `bytes`; what does not add up throws WalError, so
 * that damaged bytes are never read past their end. The CRC is checked by whoever cuts records out of the stream, not here.
 */

import { BLOCK_SIZE } from '../page-size.ts';
import { readLsn } from '../lsn.ts';
import type { Lsn } from '../lsn.ts';
import { WalError } from './error.ts';

export const RECORD_HEADER_SIZE = 24;
export const MAX_RECORD_SIZE = 1020 * 1024 * 1024;

export const BKPBLOCK_FORK_MASK = 0x0f;
export const BKPBLOCK_HAS_IMAGE = 0x10;
export const BKPBLOCK_HAS_DATA = 0x20;
export const BKPBLOCK_WILL_INIT = 0x40;
export const BKPBLOCK_SAME_REL = 0x80;

export const BKPIMAGE_HAS_HOLE = 0x01;
export const BKPIMAGE_APPLY = 0x02;
export const BKPIMAGE_COMPRESS_PGLZ = 0x04;
export const BKPIMAGE_COMPRESS_LZ4 = 0x08;
export const BKPIMAGE_COMPRESS_ZSTD = 0x10;
export const BKPIMAGE_COMPRESSED = BKPIMAGE_COMPRESS_PGLZ | BKPIMAGE_COMPRESS_LZ4 | BKPIMAGE_COMPRESS_ZSTD;

/** The part of `info` that belongs to the resource manager. */
export const XLR_RMGR_INFO_MASK = 0xf0;
export const XLR_SPECIAL_REL_UPDATE = 0x01;
/** The record carries, for wal_consistency_checking, an image of each page as it is after the record. */
export const XLR_CHECK_CONSISTENCY = 0x02;

export const MAX_BLOCK_ID = 32;
const ID_DATA_SHORT = 255;
const ID_DATA_LONG = 254;
const ID_ORIGIN = 253;
const ID_TOP_LEVEL_XID = 252;
const MAX_FORK = 3;

/** A block that a record refers to. Offsets are into WalRecord.bytes. */
export interface WalBlock {
  readonly id: number;
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
  readonly fork: number;
  readonly blk: number;
  /** BKPBLOCK_* flags and, in the low 4 bits, the fork. */
  readonly flags: number;
  /** Redo makes the page anew and needs nothing of what was there. */
  readonly willInit: boolean;
  readonly hasImage: boolean;
  /** The image is to be restored in redo; an image without this serves wal_consistency_checking only. */
  readonly applyImage: boolean;
  readonly imageOffset: number;
  readonly imageLength: number;
  readonly holeOffset: number;
  readonly holeLength: number;
  /** BKPIMAGE_* flags. */
  readonly imageInfo: number;
  readonly dataOffset: number;
  readonly dataLength: number;
}

export interface WalRecord {
  readonly startLsn: Lsn;
  /** LSN after the record, MAXALIGNed: what a page changed by it carries, and where the next record begins (save for page headers). */
  readonly endLsn: Lsn;
  readonly prevLsn: Lsn;
  readonly totalLength: number;
  readonly xid: number;
  readonly info: number;
  readonly rmid: number;
  readonly blocks: readonly WalBlock[];
  readonly mainOffset: number;
  readonly mainLength: number;
  readonly originId: number;
  readonly topLevelXid: number;
  /** The whole record: a view, made when it is first asked for. */
  readonly bytes: Buffer;
  /** Where the record stands: `totalLength` bytes from `sourceOffset` on of `source`. For who looks at many records and wants no views. */
  readonly source: Buffer;
  readonly sourceView: DataView;
  readonly sourceOffset: number;
}

const NO_BLOCKS: readonly WalBlock[] = [];

/** Decodes one whole record. `bytes` is exactly the record, without WAL page headers; throws WalError when it does not add up. */
export function decodeWalRecord(bytes: Buffer, startLsn: Lsn, endLsn: Lsn): WalRecord {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return decodeWalRecordAt(bytes, view, 0, bytes.length, startLsn, endLsn);
}

/**
 * Decodes the record of `length` bytes at `base` of `bytes`, all of which `view` shows: it makes one load of a number of four bytes. Views of the record
 * alone are made when somebody first asks for them.
 */
export function decodeWalRecordAt(
  bytes: Buffer,
  view: DataView,
  base: number,
  length: number,
  startLsn: Lsn,
  endLsn: Lsn,
): WalRecord {
  if (length < RECORD_HEADER_SIZE) throw new WalError(startLsn, `record of ${length} bytes is shorter than its header`);
  const totalLength = view.getUint32(base, true);
  if (totalLength !== length)
    throw new WalError(startLsn, `record says it has ${totalLength} bytes, ${length} are here`);

  const end = base + length;
  let at = base + RECORD_HEADER_SIZE;
  let dataTotal = 0;
  let mainLength = 0;
  let originId = 0;
  let topLevelXid = 0;
  let blocks: MutableBlock[] | undefined;
  let previous: MutableBlock | undefined;

  while (end - at > dataTotal) {
    const id = bytes[at]!;
    if (id <= MAX_BLOCK_ID) {
      const block = decodeBlockHeader(view, at, end, previous, startLsn);
      at = block.imageOffset;
      dataTotal += block.imageLength + block.dataLength;
      if (blocks === undefined) blocks = [block];
      else blocks.push(block);
      previous = block;
    } else if (id === ID_DATA_SHORT) {
      need(at, 2, end, startLsn);
      mainLength = bytes[at + 1]!;
      at += 2;
      dataTotal += mainLength;
      break;
    } else if (id === ID_DATA_LONG) {
      need(at, 5, end, startLsn);
      mainLength = view.getUint32(at + 1, true);
      at += 5;
      dataTotal += mainLength;
      break;
    } else if (id === ID_ORIGIN) {
      need(at, 3, end, startLsn);
      originId = view.getUint16(at + 1, true);
      at += 3;
    } else if (id === ID_TOP_LEVEL_XID) {
      need(at, 5, end, startLsn);
      topLevelXid = view.getUint32(at + 1, true);
      at += 5;
    } else {
      throw new WalError(startLsn, `unknown fragment ${id} at byte ${at - base} of the record`);
    }
  }
  if (end - at !== dataTotal) {
    throw new WalError(startLsn, `record has ${end - at} bytes of data, its headers say ${dataTotal}`);
  }

  at -= base;
  if (blocks !== undefined) {
    for (let i = 0; i < blocks.length; i++) {
      const block = blocks[i]!;
      block.imageOffset = at;
      at += block.imageLength;
      block.dataOffset = at;
      at += block.dataLength;
    }
  }
  return new DecodedRecord(
    bytes,
    view,
    base,
    totalLength,
    startLsn,
    endLsn,
    blocks ?? NO_BLOCKS,
    at,
    mainLength,
    originId,
    topLevelXid,
  );
}

/** A record as a place in the bytes that it came in: most of those who look at records need no view of them. */
class DecodedRecord implements WalRecord {
  readonly source: Buffer;
  readonly sourceView: DataView;
  readonly sourceOffset: number;
  #bytes: Buffer | undefined;
  readonly totalLength: number;
  readonly startLsn: Lsn;
  readonly endLsn: Lsn;
  readonly xid: number;
  readonly info: number;
  readonly rmid: number;
  readonly blocks: readonly WalBlock[];
  readonly mainOffset: number;
  readonly mainLength: number;
  readonly originId: number;
  readonly topLevelXid: number;

  constructor(
    source: Buffer,
    sourceView: DataView,
    base: number,
    totalLength: number,
    startLsn: Lsn,
    endLsn: Lsn,
    blocks: readonly WalBlock[],
    mainOffset: number,
    mainLength: number,
    originId: number,
    topLevelXid: number,
  ) {
    this.source = source;
    this.sourceView = sourceView;
    this.sourceOffset = base;
    this.#bytes = undefined;
    this.totalLength = totalLength;
    this.startLsn = startLsn;
    this.endLsn = endLsn;
    this.xid = sourceView.getUint32(base + 4, true);
    this.info = source[base + 16]!;
    this.rmid = source[base + 17]!;
    this.blocks = blocks;
    this.mainOffset = mainOffset;
    this.mainLength = mainLength;
    this.originId = originId;
    this.topLevelXid = topLevelXid;
  }

  get prevLsn(): Lsn {
    return readLsn(this.source, this.sourceOffset + 8);
  }

  get bytes(): Buffer {
    return (this.#bytes ??= this.source.subarray(this.sourceOffset, this.sourceOffset + this.totalLength));
  }
}

/** The main data of a record: a view of its bytes. */
export function mainData(record: WalRecord): Buffer {
  return record.bytes.subarray(record.mainOffset, record.mainOffset + record.mainLength);
}

/** The data that a record carries for a block: a view of its bytes, empty when there is none. */
export function blockData(record: WalRecord, block: WalBlock): Buffer {
  return record.bytes.subarray(block.dataOffset, block.dataOffset + block.dataLength);
}

/** The block reference with this id, if the record has it (ids may have gaps). */
export function findBlock(record: WalRecord, id: number): WalBlock | undefined {
  const blocks = record.blocks;
  for (let i = 0; i < blocks.length; i++) if (blocks[i]!.id === id) return blocks[i];
  return undefined;
}

interface MutableBlock extends WalBlock {
  imageOffset: number;
  dataOffset: number;
}

/** Decodes the block reference at `start`; for the time being its imageOffset holds where the header ends. */
function decodeBlockHeader(
  view: DataView,
  start: number,
  end: number,
  previous: MutableBlock | undefined,
  lsn: Lsn,
): MutableBlock {
  need(start, 4, end, lsn);
  const id = view.getUint8(start);
  const flags = view.getUint8(start + 1);
  const dataLength = view.getUint16(start + 2, true);
  let at = start + 4;
  if (previous !== undefined && id <= previous.id)
    throw new WalError(lsn, `block ${id} comes after block ${previous.id}`);
  if ((flags & BKPBLOCK_FORK_MASK) > MAX_FORK)
    throw new WalError(lsn, `block ${id} names fork ${flags & BKPBLOCK_FORK_MASK}`);
  if (((flags & BKPBLOCK_HAS_DATA) !== 0) !== dataLength > 0) {
    throw new WalError(lsn, `block ${id} has flags 0x${flags.toString(16)} and ${dataLength} bytes of data`);
  }

  let imageLength = 0;
  let holeOffset = 0;
  let holeLength = 0;
  let imageInfo = 0;
  const hasImage = (flags & BKPBLOCK_HAS_IMAGE) !== 0;
  if (hasImage) {
    need(at, 5, end, lsn);
    imageLength = view.getUint16(at, true);
    holeOffset = view.getUint16(at + 2, true);
    imageInfo = view.getUint8(at + 4);
    at += 5;
    if ((imageInfo & BKPIMAGE_COMPRESSED) === 0) {
      holeLength = BLOCK_SIZE - imageLength;
    } else if ((imageInfo & BKPIMAGE_HAS_HOLE) !== 0) {
      need(at, 2, end, lsn);
      holeLength = view.getUint16(at, true);
      at += 2;
    }
    checkImage(id, imageLength, holeOffset, holeLength, imageInfo, lsn);
  }

  let spc: number;
  let db: number;
  let rel: number;
  if ((flags & BKPBLOCK_SAME_REL) === 0) {
    need(at, 12, end, lsn);
    spc = view.getUint32(at, true);
    db = view.getUint32(at + 4, true);
    rel = view.getUint32(at + 8, true);
    at += 12;
  } else {
    if (previous === undefined)
      throw new WalError(lsn, `block ${id} says "same relation" but no block comes before it`);
    spc = previous.spc;
    db = previous.db;
    rel = previous.rel;
  }
  need(at, 4, end, lsn);
  const blk = view.getUint32(at, true);
  return {
    id,
    spc,
    db,
    rel,
    fork: flags & BKPBLOCK_FORK_MASK,
    blk,
    flags,
    willInit: (flags & BKPBLOCK_WILL_INIT) !== 0,
    hasImage,
    applyImage: (imageInfo & BKPIMAGE_APPLY) !== 0,
    imageOffset: at + 4,
    imageLength,
    holeOffset,
    holeLength,
    imageInfo,
    dataOffset: 0,
    dataLength,
  };
}

/** The hole and the image must make up one page, and the flags must say the same. */
function checkImage(id: number, length: number, holeOffset: number, holeLength: number, info: number, lsn: Lsn): void {
  const hasHole = (info & BKPIMAGE_HAS_HOLE) !== 0;
  const compressed = (info & BKPIMAGE_COMPRESSED) !== 0;
  const holeFits = hasHole
    ? holeOffset > 0 && holeLength > 0 && holeOffset + holeLength <= BLOCK_SIZE
    : holeOffset === 0 && holeLength === 0;
  if (!holeFits || length > BLOCK_SIZE || (compressed && length === BLOCK_SIZE)) {
    throw new WalError(
      lsn,
      `block ${id} has an image of ${length} bytes, info 0x${info.toString(16)}, with a hole of ${holeLength} at ${holeOffset}`,
    );
  }
}

function need(at: number, count: number, end: number, lsn: Lsn): void {
  if (at + count > end) throw new WalError(lsn, `record ends inside a header, ${end - at} bytes before its end`);
}
