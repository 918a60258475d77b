/**
 * Records of the transaction resource manager: how transactions end, and how they are prepared. (xact.h, ParseCommitRecord and the like in
 * xactdesc.c.)
 *
 * The operation is in bits 4 to 6 of the record's info. The main data of a commit or abort:
 *   i64 time; with bit 7 of info (XLOG_XACT_HAS_INFO) u32 xinfo; then, each when its bit of xinfo is set, unaligned:
 *   0x001 u32 database, u32 tablespace         0x002 u32 count, u32 xids of subtransactions
 *   0x004 u32 count, relations of 12 bytes     0x100 u32 count, dropped statistics of 12 bytes (16 from version 18 on)
 *   0x008 u32 count, invalidations of 16 bytes (commits only)
 *   0x010 u32 xid of the prepared transaction  0x080 its name, ended by a zero byte (only with 0x010)
 *   0x020 u64 LSN, i64 time at the replication origin
 * The main data of a prepare is the state file less its CRC: a header of 72 bytes, then each part at a multiple of 8.
 *
 * Times are microseconds since 2000-01-01 (TimestampTz), exact as numbers until the year 2285.
 */

import { crc32c } from '../base/crc32c.ts';
import { maxAlign } from './lsn.ts';
import type { Lsn } from './lsn.ts';
import type { RelationKey } from './relation.ts';
import { RM_XACT } from './rmgr.ts';
import { versionFacts } from './version.ts';
import type { PgVersion } from './version.ts';
import { WalError } from './wal/error.ts';
import type { WalRecord } from './wal/record.ts';

export const XLOG_XACT_COMMIT = 0x00;
export const XLOG_XACT_PREPARE = 0x10;
export const XLOG_XACT_ABORT = 0x20;
export const XLOG_XACT_COMMIT_PREPARED = 0x30;
export const XLOG_XACT_ABORT_PREPARED = 0x40;
export const XLOG_XACT_ASSIGNMENT = 0x50;
export const XLOG_XACT_INVALIDATIONS = 0x60;
export const XLOG_XACT_OPMASK = 0x70;
const XLOG_XACT_HAS_INFO = 0x80;

const HAS_DBINFO = 0x001;
const HAS_SUBXACTS = 0x002;
const HAS_RELFILELOCATORS = 0x004;
const HAS_INVALS = 0x008;
const HAS_TWOPHASE = 0x010;
const HAS_ORIGIN = 0x020;
const HAS_GID = 0x080;
const HAS_DROPPED_STATS = 0x100;

const RELATION_SIZE = 12;
const INVALIDATION_SIZE = 16;
const PREPARE_HEADER_SIZE = 72;
const TWOPHASE_MAGIC = 0x57f94534;

/** Microseconds from 1970-01-01 to 2000-01-01. */
const POSTGRES_EPOCH_US = 946_684_800_000_000;

export interface DroppedStats {
  readonly kind: number;
  readonly db: number;
  readonly objectId: number;
}

/** A transaction that ended. */
export interface XactEnd {
  readonly kind: 'commit' | 'abort';
  /** The transaction had been prepared: its state file goes away. */
  readonly prepared: boolean;
  /** The transaction that ended: the prepared one, or the record's own. */
  readonly xid: number;
  /** Microseconds since 2000-01-01. */
  readonly timeUs: number;
  readonly xinfo: number;
  readonly db: number;
  readonly spc: number;
  readonly subxacts: readonly number[];
  /** Relations whose files go away with this. */
  readonly droppedRelations: readonly RelationKey[];
  readonly droppedStats: readonly DroppedStats[];
  readonly invalidationCount: number;
  readonly gid: string | undefined;
  readonly originLsn: Lsn;
  readonly originTimeUs: number;
}

/** A transaction that was prepared for a commit in two phases. */
export interface XactPrepare {
  readonly kind: 'prepare';
  readonly xid: number;
  readonly db: number;
  readonly owner: number;
  /** Microseconds since 2000-01-01. */
  readonly timeUs: number;
  readonly gid: string;
  readonly subxacts: readonly number[];
  readonly commitRelations: readonly RelationKey[];
  readonly abortRelations: readonly RelationKey[];
  readonly invalidationCount: number;
  readonly originLsn: Lsn;
  readonly originTimeUs: number;
}

/** What a record of the transaction resource manager says of a transaction's end; undefined for assignments and invalidations. */
export function parseXactRecord(record: WalRecord, version: PgVersion): XactEnd | XactPrepare | undefined {
  switch (record.info & XLOG_XACT_OPMASK) {
    case XLOG_XACT_COMMIT:
      return parseEnd(record, 'commit', false, version);
    case XLOG_XACT_COMMIT_PREPARED:
      return parseEnd(record, 'commit', true, version);
    case XLOG_XACT_ABORT:
      return parseEnd(record, 'abort', false, version);
    case XLOG_XACT_ABORT_PREPARED:
      return parseEnd(record, 'abort', true, version);
    case XLOG_XACT_PREPARE:
      return parsePrepare(record);
    case XLOG_XACT_ASSIGNMENT:
    case XLOG_XACT_INVALIDATIONS:
      return undefined;
    default:
      throw new WalError(record.startLsn, `transaction record with info 0x${record.info.toString(16)}`);
  }
}

/** A commit without any of the optional parts: its main data is its time. */
export function isPlainCommit(record: WalRecord): boolean {
  const mask = XLOG_XACT_OPMASK | XLOG_XACT_HAS_INFO;
  return record.rmid === RM_XACT && (record.info & mask) === XLOG_XACT_COMMIT && record.mainLength === 8;
}

/** Microseconds since 2000-01-01, of a plain commit. Makes no view of its bytes. */
export function plainCommitTimeUs({ sourceView, sourceOffset, mainOffset }: WalRecord): number {
  const at = sourceOffset + mainOffset;
  return sourceView.getInt32(at + 4, true) * 0x100000000 + sourceView.getUint32(at, true);
}

/** The bytes of a prepared transaction's file in pg_twophase: the prepare record's main data and its CRC. */
export function twoPhaseFileBytes(record: WalRecord): Buffer {
  const bytes = Buffer.alloc(record.mainLength + 4);
  record.bytes.copy(bytes, 0, record.mainOffset, record.mainOffset + record.mainLength);
  bytes.writeUInt32LE(crc32c(bytes, 0, record.mainLength), record.mainLength);
  if (bytes.length < PREPARE_HEADER_SIZE || bytes.readUInt32LE(4) !== bytes.length) {
    throw new WalError(
      record.startLsn,
      `prepare record of ${record.mainLength} bytes does not make the file it describes`,
    );
  }
  return bytes;
}

/** Microseconds since 2000 as a point in time, to the millisecond before it. */
export function timestampToDate(timeUs: number): Date {
  return new Date(Math.floor((timeUs + POSTGRES_EPOCH_US) / 1000));
}

/** A point in time as microseconds since 2000. */
export function dateToTimestamp(date: Date): number {
  return date.getTime() * 1000 - POSTGRES_EPOCH_US;
}

function parseEnd(record: WalRecord, kind: 'commit' | 'abort', prepared: boolean, version: PgVersion): XactEnd {
  const from = new Cursor(record);
  const timeUs = from.i64();
  const xinfo = (record.info & XLOG_XACT_HAS_INFO) !== 0 ? from.u32() : 0;
  const hasDb = (xinfo & HAS_DBINFO) !== 0;
  const db = hasDb ? from.u32() : 0;
  const spc = hasDb ? from.u32() : 0;
  const subxacts = (xinfo & HAS_SUBXACTS) !== 0 ? from.xids(from.u32()) : NONE;
  const droppedRelations = (xinfo & HAS_RELFILELOCATORS) !== 0 ? from.relations(from.u32()) : NO_RELATIONS;
  const droppedStats = (xinfo & HAS_DROPPED_STATS) !== 0 ? from.stats(from.u32(), version) : [];
  const invalidationCount = kind === 'commit' && (xinfo & HAS_INVALS) !== 0 ? from.u32() : 0;
  from.skip(invalidationCount * INVALIDATION_SIZE);
  const hasTwophase = (xinfo & HAS_TWOPHASE) !== 0;
  if (prepared && !hasTwophase)
    throw new WalError(record.startLsn, `end of a prepared transaction does not name its xid`);
  const xid = hasTwophase ? from.u32() : record.xid;
  const gid = hasTwophase && (xinfo & HAS_GID) !== 0 ? from.cstring() : undefined;
  const hasOrigin = (xinfo & HAS_ORIGIN) !== 0;
  const originLsn = hasOrigin ? from.i64() : 0;
  const originTimeUs = hasOrigin ? from.i64() : 0;
  return {
    kind,
    prepared,
    xid,
    timeUs,
    xinfo,
    db,
    spc,
    subxacts,
    droppedRelations,
    droppedStats,
    invalidationCount,
    gid,
    originLsn,
    originTimeUs,
  };
}

function parsePrepare(record: WalRecord): XactPrepare {
  const from = new Cursor(record);
  const magic = from.u32();
  if (magic !== TWOPHASE_MAGIC) throw new WalError(record.startLsn, `prepare record has magic 0x${magic.toString(16)}`);
  from.skip(4);
  const xid = from.u32();
  const db = from.u32();
  const timeUs = from.i64();
  const owner = from.u32();
  const subxactCount = from.u32();
  const commitRelationCount = from.u32();
  const abortRelationCount = from.u32();
  from.skip(8);
  const invalidationCount = from.u32();
  from.skip(2);
  const gidLength = from.u16();
  const originLsn = from.i64();
  const originTimeUs = from.i64();
  const gid = from.text(gidLength);
  from.align();
  const subxacts = from.xids(subxactCount);
  from.align();
  const commitRelations = from.relations(commitRelationCount);
  from.align();
  const abortRelations = from.relations(abortRelationCount);
  return {
    kind: 'prepare',
    xid,
    db,
    owner,
    timeUs,
    gid,
    subxacts,
    commitRelations,
    abortRelations,
    invalidationCount,
    originLsn,
    originTimeUs,
  };
}

const NONE: readonly number[] = [];
const NO_RELATIONS: readonly RelationKey[] = [];

/** Reads a record's main data from its start on; what goes past the end throws WalError. */
class Cursor {
  readonly #record: WalRecord;
  readonly #bytes: Buffer;
  #at: number;
  readonly #end: number;

  constructor(record: WalRecord) {
    this.#record = record;
    this.#bytes = record.bytes;
    this.#at = record.mainOffset;
    this.#end = record.mainOffset + record.mainLength;
  }

  u16(): number {
    return this.#bytes.readUInt16LE(this.#take(2));
  }

  u32(): number {
    return this.#bytes.readUInt32LE(this.#take(4));
  }

  /** Exact to 2^53. */
  i64(): number {
    const at = this.#take(8);
    return this.#bytes.readInt32LE(at + 4) * 0x100000000 + this.#bytes.readUInt32LE(at);
  }

  xids(count: number): readonly number[] {
    const start = this.#take(count * 4);
    return Array.from({ length: count }, (_, i) => this.#bytes.readUInt32LE(start + i * 4));
  }

  relations(count: number): readonly RelationKey[] {
    const start = this.#take(count * RELATION_SIZE);
    return Array.from({ length: count }, (_, i) => {
      const at = start + i * RELATION_SIZE;
      return {
        spc: this.#bytes.readUInt32LE(at),
        db: this.#bytes.readUInt32LE(at + 4),
        rel: this.#bytes.readUInt32LE(at + 8),
      };
    });
  }

  stats(count: number, version: PgVersion): readonly DroppedStats[] {
    const size = versionFacts(version).redo.statsItemBytes;
    const start = this.#take(count * size);
    return Array.from({ length: count }, (_, i) => {
      const at = start + i * size;
      const high = size === 16 ? this.#bytes.readUInt32LE(at + 12) : 0;
      return {
        kind: this.#bytes.readUInt32LE(at),
        db: this.#bytes.readUInt32LE(at + 4),
        objectId: high * 0x100000000 + this.#bytes.readUInt32LE(at + 8),
      };
    });
  }

  /** A text of `length` bytes, of which the last is zero. */
  text(length: number): string {
    const start = this.#take(length);
    return this.#bytes.toString('utf8', start, start + Math.max(0, length - 1));
  }

  cstring(): string {
    const start = this.#at;
    const zero = this.#bytes.indexOf(0, start);
    if (zero < 0) throw new WalError(this.#record.startLsn, `name in a transaction record has no end`);
    this.#take(zero + 1 - start);
    return this.#bytes.toString('utf8', start, zero);
  }

  skip(count: number): void {
    this.#take(count);
  }

  /** Goes to the next multiple of 8 of the main data; the end of the data will do. */
  align(): void {
    const offset = this.#at - this.#record.mainOffset;
    this.#at = Math.min(this.#record.mainOffset + maxAlign(offset), this.#end);
  }

  #take(count: number): number {
    const at = this.#at;
    if (at + count > this.#end) {
      throw new WalError(
        this.#record.startLsn,
        `transaction record of ${this.#record.mainLength} bytes ends ${at + count - this.#end} too early`,
      );
    }
    this.#at = at + count;
    return at;
  }
}
