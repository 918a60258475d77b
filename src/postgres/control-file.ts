/**
 * The control file, global/pg_control (ControlFileData in pg_control.h). 8192 bytes, of which the first few hundred are used:
 *
 *   0    u64  system identifier
 *   8    u32  control file version: 1300 in 15 and 16, 1700 in 17, 1800 in 18
 *   12   u32  catalog version
 *   16   u32  state (DB_*)
 *   24   i64  time of the last change, in seconds since 1970
 *   32   u64  LSN of the last checkpoint record
 *   40        copy of that checkpoint, 88 bytes (checkpoint.ts)
 *   128  u64  fake LSN counter of unlogged relations
 *   136  u64  minimum recovery point     144  u32  its timeline
 *   152  u64  backup start               160  u64  backup end           168  u8  backup end required
 *   172  i32  wal_level                  176  u8   wal_log_hints        180  i32 max_connections
 *   184  i32  max_worker_processes       188  i32  max_wal_senders      192  i32 max_prepared_transactions
 *   196  i32  max_locks_per_transaction  200  u8   track_commit_timestamp
 *   204  u32  maximum alignment          208  f64  1234567.0
 *   216  u32  page size                  220  u32  pages in a relation segment
 *   224  u32  WAL page size              228  u32  WAL segment size
 *   232  u32  name length                236  u32  index columns
 *   240  u32  TOAST chunk size           244  u32  large object chunk size
 *   248  u8   float8 by value            252  u32  data checksum version
 *   15, 16, 17:                                    256  32 bytes of nonce, 288  u32  CRC32C of all before it
 *   18:        256  u8  default char signedness,   257  32 bytes of nonce, 292  u32  CRC32C of all before it
 *
 * What a build fixes (alignment, sizes) is checked when decoding, not kept: only builds with the usual ones are supported.
 */

import { crc32c } from '../base/crc32c.ts';
import { CHECKPOINT_SIZE, decodeCheckPoint, encodeCheckPoint } from './checkpoint.ts';
import type { CheckPoint } from './checkpoint.ts';
import { readLsn, WAL_PAGE_SIZE, WAL_SEGMENT_SIZE, writeLsn } from './lsn.ts';
import type { Lsn } from './lsn.ts';
import { BLOCK_SIZE } from './page-size.ts';
import { BLOCKS_PER_SEGMENT } from './relation.ts';
import { versionFacts, versionOfCatalog } from './version.ts';
import type { PgVersion } from './version.ts';

export const CONTROL_FILE_SIZE = 8192;
export const CONTROL_FILE_PATH = 'global/pg_control';

export const DB_STARTUP = 0;
export const DB_SHUTDOWNED = 1;
export const DB_SHUTDOWNED_IN_RECOVERY = 2;
export const DB_SHUTDOWNING = 3;
export const DB_IN_CRASH_RECOVERY = 4;
export const DB_IN_ARCHIVE_RECOVERY = 5;
export const DB_IN_PRODUCTION = 6;

/** Settings that the control file repeats, so that a standby can see that its own suffice. */
export interface ControlFileParameters {
  /** WAL_LEVEL_*. */
  readonly walLevel: number;
  readonly walLogHints: boolean;
  readonly maxConnections: number;
  readonly maxWorkerProcesses: number;
  readonly maxWalSenders: number;
  readonly maxPreparedTransactions: number;
  readonly maxLocksPerTransaction: number;
  readonly trackCommitTimestamp: boolean;
}

export interface ControlFile extends ControlFileParameters {
  readonly version: PgVersion;
  readonly systemId: bigint;
  /** DB_*. */
  readonly state: number;
  /** Seconds since 1970. */
  readonly time: number;
  readonly checkPoint: Lsn;
  readonly checkPointCopy: CheckPoint;
  readonly unloggedLsn: Lsn;
  readonly minRecoveryPoint: Lsn;
  readonly minRecoveryPointTli: number;
  readonly backupStartPoint: Lsn;
  readonly backupEndPoint: Lsn;
  readonly backupEndRequired: boolean;
  readonly dataChecksumVersion: number;
  /** 18 only; true elsewhere. */
  readonly defaultCharSignedness: boolean;
  /** 32 bytes. */
  readonly mockAuthenticationNonce: Buffer;
}

/** A control file that is damaged, of another version, or of a build with other sizes. */
export class ControlFileError extends Error {
  override readonly name = 'ControlFileError';
}

/** Decodes a control file of any supported version; the catalog version tells which. Throws ControlFileError naming what is wrong. */
export function decodeControlFile(bytes: Buffer): ControlFile {
  if (bytes.length < 512) throw new ControlFileError(`control file of ${bytes.length} bytes`);
  const catalogVersion = bytes.readUInt32LE(12);
  const version = versionOfCatalog(catalogVersion);
  if (version === undefined || bytes.readUInt32LE(8) !== versionFacts(version).controlVersion) {
    throw new ControlFileError(
      `control file version ${bytes.readUInt32LE(8)}, catalog version ${catalogVersion} is no supported Postgres`,
    );
  }
  const crcAt = crcOffset(version);
  const computed = crc32c(bytes, 0, crcAt);
  if (bytes.readUInt32LE(crcAt) !== computed) {
    throw new ControlFileError(`control file has CRC ${bytes.readUInt32LE(crcAt)}, its bytes give ${computed}`);
  }
  for (const [at, expected, what] of BUILD_CONSTANTS) {
    const found = bytes.readUInt32LE(at);
    if (found !== expected)
      throw new ControlFileError(`${what} is ${found} in this build of Postgres, ${expected} is supported`);
  }
  return {
    version,
    systemId: bytes.readBigUInt64LE(0),
    state: bytes.readUInt32LE(16),
    time: Number(bytes.readBigInt64LE(24)),
    checkPoint: readLsn(bytes, 32),
    checkPointCopy: decodeCheckPoint(bytes, 40, version),
    unloggedLsn: readLsn(bytes, 128),
    minRecoveryPoint: readLsn(bytes, 136),
    minRecoveryPointTli: bytes.readUInt32LE(144),
    backupStartPoint: readLsn(bytes, 152),
    backupEndPoint: readLsn(bytes, 160),
    backupEndRequired: bytes[168] !== 0,
    walLevel: bytes.readInt32LE(172),
    walLogHints: bytes[176] !== 0,
    maxConnections: bytes.readInt32LE(180),
    maxWorkerProcesses: bytes.readInt32LE(184),
    maxWalSenders: bytes.readInt32LE(188),
    maxPreparedTransactions: bytes.readInt32LE(192),
    maxLocksPerTransaction: bytes.readInt32LE(196),
    trackCommitTimestamp: bytes[200] !== 0,
    dataChecksumVersion: bytes.readUInt32LE(252),
    defaultCharSignedness: version < 18 || bytes[256] !== 0,
    mockAuthenticationNonce: Buffer.from(bytes.subarray(nonceOffset(version), nonceOffset(version) + 32)),
  };
}

/** The 8192 bytes of the file. */
export function encodeControlFile(file: ControlFile): Buffer {
  const facts = versionFacts(file.version);
  const bytes = Buffer.alloc(CONTROL_FILE_SIZE);
  bytes.writeBigUInt64LE(file.systemId, 0);
  bytes.writeUInt32LE(facts.controlVersion, 8);
  bytes.writeUInt32LE(facts.catalogVersion, 12);
  bytes.writeUInt32LE(file.state, 16);
  bytes.writeBigInt64LE(BigInt(file.time), 24);
  writeLsn(bytes, file.checkPoint, 32);
  encodeCheckPoint(file.checkPointCopy, file.version).copy(bytes, 40, 0, CHECKPOINT_SIZE);
  writeLsn(bytes, file.unloggedLsn, 128);
  writeLsn(bytes, file.minRecoveryPoint, 136);
  bytes.writeUInt32LE(file.minRecoveryPointTli, 144);
  writeLsn(bytes, file.backupStartPoint, 152);
  writeLsn(bytes, file.backupEndPoint, 160);
  bytes[168] = file.backupEndRequired ? 1 : 0;
  bytes.writeInt32LE(file.walLevel, 172);
  bytes[176] = file.walLogHints ? 1 : 0;
  bytes.writeInt32LE(file.maxConnections, 180);
  bytes.writeInt32LE(file.maxWorkerProcesses, 184);
  bytes.writeInt32LE(file.maxWalSenders, 188);
  bytes.writeInt32LE(file.maxPreparedTransactions, 192);
  bytes.writeInt32LE(file.maxLocksPerTransaction, 196);
  bytes[200] = file.trackCommitTimestamp ? 1 : 0;
  bytes.writeDoubleLE(FLOAT_FORMAT, 208);
  for (const [at, value] of BUILD_CONSTANTS) bytes.writeUInt32LE(value, at);
  bytes.writeUInt32LE(file.dataChecksumVersion, 252);
  if (file.version >= 18) bytes[256] = file.defaultCharSignedness ? 1 : 0;
  file.mockAuthenticationNonce.copy(bytes, nonceOffset(file.version), 0, 32);
  const crcAt = crcOffset(file.version);
  bytes.writeUInt32LE(crc32c(bytes, 0, crcAt), crcAt);
  return bytes;
}

const FLOAT_FORMAT = 1234567;

/** What a usual build has at these offsets. The double at 208 is checked as its two halves. */
const BUILD_CONSTANTS: readonly (readonly [at: number, value: number, what: string])[] = [
  [204, 8, 'maximum alignment'],
  [208, 0, 'floating point format'],
  [212, 0x4132d687, 'floating point format'],
  [216, BLOCK_SIZE, 'page size'],
  [220, BLOCKS_PER_SEGMENT, 'relation segment size'],
  [224, WAL_PAGE_SIZE, 'WAL page size'],
  [228, WAL_SEGMENT_SIZE, 'WAL segment size'],
  [232, 64, 'name length'],
  [236, 32, 'number of index columns'],
  [240, 1996, 'TOAST chunk size'],
  [244, 2048, 'large object chunk size'],
  [248, 1, 'float8 by value'],
];

function nonceOffset(version: PgVersion): number {
  return version >= 18 ? 257 : 256;
}

function crcOffset(version: PgVersion): number {
  return version >= 18 ? 292 : 288;
}
