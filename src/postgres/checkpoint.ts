/**
 * The CheckPoint struct: the main data of a checkpoint record, and part of the control file (pg_control.h). 88 bytes in 15, 16, 17, 18.
 *
 *   0   u64  redo LSN
 *   8   u32  timeline id
 *   12  u32  previous timeline id
 *   16  u8   full_page_writes
 *   20  i32  wal_level, from 17 on (zero padding before)
 *   24  u64  next full transaction id (epoch in the high half)
 *   32  u32  next oid
 *   36  u32  next multixact
 *   40  u32  next multixact offset
 *   44  u32  oldest xid
 *   48  u32  database of the oldest xid
 *   52  u32  oldest multixact
 *   56  u32  database of the oldest multixact
 *   64  i64  time, in seconds since 1970
 *   72  u32  oldest xid with a commit timestamp
 *   76  u32  newest xid with a commit timestamp
 *   80  u32  oldest running xid (online checkpoints only)
 */

import { readLsn, writeLsn } from './lsn.ts';
import type { Lsn } from './lsn.ts';
import type { PgVersion } from './version.ts';

export const CHECKPOINT_SIZE = 88;

export const WAL_LEVEL_MINIMAL = 0;
export const WAL_LEVEL_REPLICA = 1;
export const WAL_LEVEL_LOGICAL = 2;

export interface CheckPoint {
  readonly redo: Lsn;
  readonly timelineId: number;
  readonly prevTimelineId: number;
  readonly fullPageWrites: boolean;
  /** WAL_LEVEL_*; in 15 and 16, whose struct has no such field, always 0. */
  readonly walLevel: number;
  /** Full transaction id: epoch * 2^32 + xid. */
  readonly nextXid: number;
  readonly nextOid: number;
  readonly nextMulti: number;
  readonly nextMultiOffset: number;
  readonly oldestXid: number;
  readonly oldestXidDb: number;
  readonly oldestMulti: number;
  readonly oldestMultiDb: number;
  /** Seconds since 1970. */
  readonly time: number;
  readonly oldestCommitTsXid: number;
  readonly newestCommitTsXid: number;
  readonly oldestActiveXid: number;
}

/** Decodes the 88 bytes at `offset`; throws a RangeError when they are not there. */
export function decodeCheckPoint(bytes: Buffer, offset: number, version: PgVersion): CheckPoint {
  if (offset + CHECKPOINT_SIZE > bytes.length) {
    throw new RangeError(`checkpoint of ${CHECKPOINT_SIZE} bytes at ${offset} of ${bytes.length}`);
  }
  const u32 = (at: number): number => bytes.readUInt32LE(offset + at);
  return {
    redo: readLsn(bytes, offset),
    timelineId: u32(8),
    prevTimelineId: u32(12),
    fullPageWrites: bytes[offset + 16] !== 0,
    walLevel: hasWalLevel(version) ? bytes.readInt32LE(offset + 20) : 0,
    nextXid: readLsn(bytes, offset + 24),
    nextOid: u32(32),
    nextMulti: u32(36),
    nextMultiOffset: u32(40),
    oldestXid: u32(44),
    oldestXidDb: u32(48),
    oldestMulti: u32(52),
    oldestMultiDb: u32(56),
    time: Number(bytes.readBigInt64LE(offset + 64)),
    oldestCommitTsXid: u32(72),
    newestCommitTsXid: u32(76),
    oldestActiveXid: u32(80),
  };
}

export function encodeCheckPoint(checkPoint: CheckPoint, version: PgVersion): Buffer {
  const bytes = Buffer.alloc(CHECKPOINT_SIZE);
  writeLsn(bytes, checkPoint.redo, 0);
  bytes.writeUInt32LE(checkPoint.timelineId, 8);
  bytes.writeUInt32LE(checkPoint.prevTimelineId, 12);
  bytes[16] = checkPoint.fullPageWrites ? 1 : 0;
  if (hasWalLevel(version)) bytes.writeInt32LE(checkPoint.walLevel, 20);
  writeLsn(bytes, checkPoint.nextXid, 24);
  bytes.writeUInt32LE(checkPoint.nextOid, 32);
  bytes.writeUInt32LE(checkPoint.nextMulti, 36);
  bytes.writeUInt32LE(checkPoint.nextMultiOffset, 40);
  bytes.writeUInt32LE(checkPoint.oldestXid, 44);
  bytes.writeUInt32LE(checkPoint.oldestXidDb, 48);
  bytes.writeUInt32LE(checkPoint.oldestMulti, 52);
  bytes.writeUInt32LE(checkPoint.oldestMultiDb, 56);
  bytes.writeBigInt64LE(BigInt(checkPoint.time), 64);
  bytes.writeUInt32LE(checkPoint.oldestCommitTsXid, 72);
  bytes.writeUInt32LE(checkPoint.newestCommitTsXid, 76);
  bytes.writeUInt32LE(checkPoint.oldestActiveXid, 80);
  return bytes;
}

function hasWalLevel(version: PgVersion): boolean {
  return version >= 17;
}
