/**
 * The checkpoint state: what a shutdown checkpoint at any LSN would say, kept up to date record by record, so that one can be forged
 * there, and the settings that pg_control has to show.
 *
 * Stored as an image under CHECKPOINT_STATE_KEY, rewritten when it changes. Bytes, little-endian:
 *
 *   offset  size  field
 *        0     1  version, 1
 *        1     1  flags: 1 wal_log_hints, 2 track_commit_timestamp
 *        2     2  u16 wal_level: 0 minimal, 1 replica, 2 logical
 *        4    20  u32 each: max_connections, max_worker_processes, max_wal_senders, max_prepared_transactions,
 *                 max_locks_per_transaction
 *       24     8  u64 LSN where the record of the last checkpoint starts
 *       32     8  u64 LSN where that record ends when it is a shutdown checkpoint; 0 after an online one
 *       40    88  CheckPoint struct as from Postgres 17 on (postgres/checkpoint.ts)
 *
 * Invariants:
 * - nextXid is past every xid in the WAL so far. It is stored rounded up to a multiple of 128, so that it is rewritten once in 128
 *   transactions and not in each; a shutdown checkpoint, which is to be believed, sets it exactly. 128 divides the number of xids on
 *   a clog and a subtrans page, so that rounding never steps over the first xid of one, at which Postgres begins it.
 * - The other counters follow Postgres' redo (xlog_redo, multixact_redo): exact in a shutdown checkpoint, only forward otherwise.
 */

import { CHECKPOINT_SIZE, decodeCheckPoint, encodeCheckPoint } from '../../postgres/checkpoint.ts';
import type { CheckPoint } from '../../postgres/checkpoint.ts';
import type { ControlFileParameters } from '../../postgres/control-file.ts';
import { readLsn, writeLsn } from '../../postgres/lsn.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { idPrecedes } from './slru.ts';

const STATE_VERSION = 1;
const STATE_HEADER_SIZE = 40;
const STATE_SIZE = STATE_HEADER_SIZE + CHECKPOINT_SIZE;
const FLAG_WAL_LOG_HINTS = 1;
const FLAG_TRACK_COMMIT_TIMESTAMP = 2;
/** Any version whose CheckPoint has all the fields. */
const LAYOUT_VERSION = 17;

const TWO_32 = 2 ** 32;
const FIRST_NORMAL_XID = 3;
const XID_ROUNDING = 128;

export interface CheckpointState {
  /** Redo, timelines, time and oldestActiveXid are those of the last checkpoint; the rest is as of the last record. */
  readonly checkPoint: CheckPoint;
  readonly parameters: ControlFileParameters;
  /** Where the record of the last checkpoint starts. */
  readonly checkpointLsn: Lsn;
  /** Where that record ends when it is a shutdown checkpoint: at this LSN the cluster is cleanly stopped. 0 after an online checkpoint. */
  readonly shutdownLsn: Lsn;
}

export class CheckpointStateError extends Error {
  override name = 'CheckpointStateError';
}

export function encodeCheckpointState(state: CheckpointState): Buffer {
  const { parameters } = state;
  const bytes = Buffer.alloc(STATE_SIZE);
  bytes[0] = STATE_VERSION;
  bytes[1] =
    (parameters.walLogHints ? FLAG_WAL_LOG_HINTS : 0) |
    (parameters.trackCommitTimestamp ? FLAG_TRACK_COMMIT_TIMESTAMP : 0);
  bytes.writeUInt16LE(parameters.walLevel, 2);
  bytes.writeUInt32LE(parameters.maxConnections, 4);
  bytes.writeUInt32LE(parameters.maxWorkerProcesses, 8);
  bytes.writeUInt32LE(parameters.maxWalSenders, 12);
  bytes.writeUInt32LE(parameters.maxPreparedTransactions, 16);
  bytes.writeUInt32LE(parameters.maxLocksPerTransaction, 20);
  writeLsn(bytes, state.checkpointLsn, 24);
  writeLsn(bytes, state.shutdownLsn, 32);
  encodeCheckPoint(state.checkPoint, LAYOUT_VERSION).copy(bytes, STATE_HEADER_SIZE);
  return bytes;
}

export function decodeCheckpointState(bytes: Buffer): CheckpointState {
  if (bytes.length !== STATE_SIZE || bytes[0] !== STATE_VERSION) {
    throw new CheckpointStateError(
      `checkpoint state of ${bytes.length} bytes has version ${bytes[0]}, expected ${STATE_SIZE} bytes of version ${STATE_VERSION}`,
    );
  }
  return {
    parameters: {
      walLogHints: (bytes[1]! & FLAG_WAL_LOG_HINTS) !== 0,
      trackCommitTimestamp: (bytes[1]! & FLAG_TRACK_COMMIT_TIMESTAMP) !== 0,
      walLevel: bytes.readUInt16LE(2),
      maxConnections: bytes.readUInt32LE(4),
      maxWorkerProcesses: bytes.readUInt32LE(8),
      maxWalSenders: bytes.readUInt32LE(12),
      maxPreparedTransactions: bytes.readUInt32LE(16),
      maxLocksPerTransaction: bytes.readUInt32LE(20),
    },
    checkpointLsn: readLsn(bytes, 24),
    shutdownLsn: readLsn(bytes, 32),
    checkPoint: decodeCheckPoint(bytes, STATE_HEADER_SIZE, LAYOUT_VERSION),
  };
}

type Mutable<T> = { -readonly [F in keyof T]: T[F] };

/** Follows the log. `changed` says that the state has to be stored; whoever does so clears it. */
export class CheckpointTracker {
  changed = false;
  readonly #checkPoint: Mutable<CheckPoint>;
  #parameters: ControlFileParameters;
  #checkpointLsn: Lsn;
  #shutdownLsn: Lsn;

  constructor(state: CheckpointState) {
    this.#checkPoint = { ...state.checkPoint };
    this.#parameters = state.parameters;
    this.#checkpointLsn = state.checkpointLsn;
    this.#shutdownLsn = state.shutdownLsn;
  }

  /** The state as it is now; it changes with what comes. */
  get state(): CheckpointState {
    return {
      checkPoint: this.#checkPoint,
      parameters: this.#parameters,
      checkpointLsn: this.#checkpointLsn,
      shutdownLsn: this.#shutdownLsn,
    };
  }

  get nextXid(): number {
    return this.#checkPoint.nextXid;
  }

  get trackCommitTimestamp(): boolean {
    return this.#parameters.trackCommitTimestamp;
  }

  /** Makes sure that nextXid is past `xid`, which is within 2^31 of it (AdvanceNextFullTransactionIdPastXid). */
  sawXid(xid: number): void {
    const { nextXid } = this.#checkPoint;
    if (xid < FIRST_NORMAL_XID || idPrecedes(xid, nextXid)) return;
    const rounded = Math.ceil((fullXid(xid, nextXid) + 1) / XID_ROUNDING) * XID_ROUNDING;
    this.#set('nextXid', rounded % TWO_32 < FIRST_NORMAL_XID ? rounded + FIRST_NORMAL_XID : rounded);
  }

  setNextOid(nextOid: number): void {
    this.#set('nextOid', nextOid);
  }

  sawMultixact(nextMulti: number, nextOffset: number): void {
    if (idPrecedes(this.#checkPoint.nextMulti, nextMulti)) this.#set('nextMulti', nextMulti);
    if (idPrecedes(this.#checkPoint.nextMultiOffset, nextOffset)) this.#set('nextMultiOffset', nextOffset);
  }

  advanceOldestXid(xid: number, db: number): void {
    if (!idPrecedes(this.#checkPoint.oldestXid, xid)) return;
    this.#set('oldestXid', xid);
    this.#set('oldestXidDb', db);
  }

  advanceOldestMultixact(multi: number, db: number): void {
    if (!idPrecedes(this.#checkPoint.oldestMulti, multi)) return;
    this.#set('oldestMulti', multi);
    this.#set('oldestMultiDb', db);
  }

  advanceOldestCommitTs(xid: number): void {
    const oldest = this.#checkPoint.oldestCommitTsXid;
    if (oldest !== 0 && idPrecedes(oldest, xid)) this.#set('oldestCommitTsXid', xid);
  }

  setOldestActiveXid(xid: number): void {
    this.#set('oldestActiveXid', xid);
  }

  setWalLevel(walLevel: number): void {
    if (this.#parameters.walLevel !== walLevel) this.#setParameters({ ...this.#parameters, walLevel });
  }

  setFullPageWrites(on: boolean): void {
    this.#set('fullPageWrites', on);
  }

  /** Takes over changed settings. Commit timestamps begin with the next xid where they were not tracked before (CommitTsParameterChange). */
  setParameters(parameters: ControlFileParameters): void {
    const tracked = this.#parameters.trackCommitTimestamp;
    this.#setParameters(parameters);
    if (!parameters.trackCommitTimestamp) {
      this.#set('oldestCommitTsXid', 0);
      this.#set('newestCommitTsXid', 0);
    } else if (!tracked && this.#checkPoint.oldestCommitTsXid === 0) {
      this.#set('oldestCommitTsXid', this.#checkPoint.nextXid % TWO_32);
      this.#set('newestCommitTsXid', this.#checkPoint.nextXid % TWO_32);
    }
  }

  setCheckpoint(from: CheckPoint, shutdown: boolean, startLsn: Lsn, endLsn: Lsn): void {
    this.changed = true;
    this.#checkpointLsn = startLsn;
    this.#shutdownLsn = shutdown ? endLsn : 0;
    const to = this.#checkPoint;
    const { nextXid, nextOid, nextMulti, nextMultiOffset, oldestXid, oldestXidDb, oldestMulti, oldestMultiDb } = to;
    const { oldestCommitTsXid, newestCommitTsXid } = to;
    Object.assign(to, from, { oldestMulti, oldestMultiDb });
    this.advanceOldestMultixact(from.oldestMulti, from.oldestMultiDb);
    if (shutdown) return;
    // What an online checkpoint says was true when it began.
    Object.assign(to, { nextOid, nextMulti, nextMultiOffset, oldestXid, oldestXidDb });
    Object.assign(to, { oldestCommitTsXid, newestCommitTsXid });
    to.nextXid = Math.max(nextXid, from.nextXid);
    this.sawMultixact(from.nextMulti, from.nextMultiOffset);
    this.advanceOldestXid(from.oldestXid, from.oldestXidDb);
  }

  #setParameters(parameters: ControlFileParameters): void {
    this.#parameters = parameters;
    this.changed = true;
  }

  #set<F extends keyof CheckPoint>(field: F, value: CheckPoint[F]): void {
    if (this.#checkPoint[field] === value) return;
    this.#checkPoint[field] = value;
    this.changed = true;
  }
}

/** The full xid of `xid`, which is less than 2^31 away from the full xid `near`. */
export function fullXid(xid: number, near: number): number {
  return near + ((xid - near) | 0);
}
