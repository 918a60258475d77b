/** Makes WAL records for tests, as bytes that are decoded again. */

import { maxAlign, writeLsn } from '../../src/postgres/lsn.ts';
import type { Lsn } from '../../src/postgres/lsn.ts';
import {
  BKPBLOCK_HAS_DATA,
  BKPBLOCK_HAS_IMAGE,
  BKPBLOCK_WILL_INIT,
  BKPIMAGE_APPLY,
  RECORD_HEADER_SIZE,
  decodeWalRecord,
} from '../../src/postgres/wal/record.ts';
import type { WalRecord } from '../../src/postgres/wal/record.ts';

export interface BlockToMake {
  readonly rel?: number;
  readonly spc?: number;
  readonly db?: number;
  readonly fork?: number;
  readonly blk: number;
  readonly willInit?: boolean;
  /** A whole page, to be restored. */
  readonly image?: Buffer;
  readonly data?: Buffer;
}

export interface RecordToMake {
  readonly lsn: Lsn;
  readonly rmid: number;
  readonly info?: number;
  readonly xid?: number;
  readonly main?: Buffer;
  readonly blocks?: readonly BlockToMake[];
}

export function makeRecord(make: RecordToMake): WalRecord {
  const headers: Buffer[] = [];
  const data: Buffer[] = [];
  for (const [id, block] of (make.blocks ?? []).entries()) {
    const { blk, image, fork = 0, spc = 1663, db = 5, rel = 16384 } = block;
    const flags =
      fork |
      (block.willInit === true ? BKPBLOCK_WILL_INIT : 0) |
      (image === undefined ? 0 : BKPBLOCK_HAS_IMAGE) |
      (block.data === undefined ? 0 : BKPBLOCK_HAS_DATA);
    headers.push(Buffer.from([id, flags]), u16(block.data?.length ?? 0));
    if (image !== undefined) headers.push(u16(image.length), u16(0), Buffer.from([BKPIMAGE_APPLY]));
    headers.push(u32(spc), u32(db), u32(rel), u32(blk));
    data.push(image ?? Buffer.alloc(0), block.data ?? Buffer.alloc(0));
  }
  const main = make.main ?? Buffer.alloc(0);
  if (main.length > 0) headers.push(Buffer.from([254]), u32(main.length));
  const header = Buffer.alloc(RECORD_HEADER_SIZE);
  const bytes = Buffer.concat([header, ...headers, ...data, main]);
  bytes.writeUInt32LE(bytes.length, 0);
  bytes.writeUInt32LE(make.xid ?? 0, 4);
  writeLsn(bytes, make.lsn - 64, 8);
  bytes[16] = make.info ?? 0;
  bytes[17] = make.rmid;
  return decodeWalRecord(bytes, make.lsn, maxAlign(make.lsn + bytes.length));
}

export function u32(...values: number[]): Buffer {
  const bytes = Buffer.alloc(values.length * 4);
  values.forEach((value, i) => bytes.writeUInt32LE(value >>> 0, i * 4));
  return bytes;
}

function u16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16LE(value);
  return bytes;
}
