/**
 * XLOG and Standby: checkpoints, counters and settings.
 *
 *   next oid            u32
 *   parameter change    i32 max_connections, i32 max_worker_processes, i32 max_wal_senders, i32 max_prepared_transactions,
 *                       i32 max_locks_per_transaction, i32 wal_level, u8 wal_log_hints, u8 track_commit_timestamp
 *   full page writes    u8
 *   end of recovery     i64 time, u32 timeline, u32 previous timeline, from 17 i32 wal_level
 *   running xacts       i32 count, i32 subtransactions, u8 overflowed, at 12 u32 next xid, u32 oldest running xid
 *
 * (Postgres: pg_control.h, xlog_internal.h, standbydefs.h, xlog_redo.)
 */

import { decodeCheckPoint } from '../../postgres/checkpoint.ts';
import { RM_STANDBY } from '../../postgres/rmgr.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { XLR_RMGR_INFO_MASK, mainData } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { IngestError } from './ingest-error.ts';
import { NO_CHANGES } from './change.ts';
import type { Change } from './change.ts';

const CHECKPOINT_SHUTDOWN = 0x00;
const CHECKPOINT_ONLINE = 0x10;
const NOOP = 0x20;
const NEXTOID = 0x30;
const SWITCH = 0x40;
const BACKUP_END = 0x50;
const PARAMETER_CHANGE = 0x60;
const RESTORE_POINT = 0x70;
const FPW_CHANGE = 0x80;
const END_OF_RECOVERY = 0x90;
const FPI_FOR_HINT = 0xa0;
const FPI = 0xb0;
const OVERWRITE_CONTRECORD = 0xd0;
const CHECKPOINT_REDO = 0xe0;

const RUNNING_XACTS = 0x10;

export function xlogChanges(record: WalRecord, version: PgVersion): readonly Change[] {
  const main = mainData(record);
  const info = record.info & XLR_RMGR_INFO_MASK;
  switch (info) {
    case CHECKPOINT_SHUTDOWN:
    case CHECKPOINT_ONLINE:
      return [
        { kind: 'checkpoint', shutdown: info === CHECKPOINT_SHUTDOWN, checkPoint: decodeCheckPoint(main, 0, version) },
      ];
    case NEXTOID:
      return [{ kind: 'next-oid', nextOid: main.readUInt32LE(0) }];
    case PARAMETER_CHANGE:
      return [
        {
          kind: 'parameters',
          parameters: {
            maxConnections: main.readInt32LE(0),
            maxWorkerProcesses: main.readInt32LE(4),
            maxWalSenders: main.readInt32LE(8),
            maxPreparedTransactions: main.readInt32LE(12),
            maxLocksPerTransaction: main.readInt32LE(16),
            walLevel: main.readInt32LE(20),
            walLogHints: main.readUInt8(24) !== 0,
            trackCommitTimestamp: main.readUInt8(25) !== 0,
          },
        },
      ];
    case FPW_CHANGE:
      return [{ kind: 'full-page-writes', on: main.readUInt8(0) !== 0 }];
    case END_OF_RECOVERY:
      return version >= 17 ? [{ kind: 'wal-level', walLevel: main.readInt32LE(16) }] : NO_CHANGES;
    case NOOP:
    case SWITCH:
    case BACKUP_END:
    case RESTORE_POINT:
    case FPI_FOR_HINT:
    case FPI:
    case OVERWRITE_CONTRECORD:
    case CHECKPOINT_REDO:
      return NO_CHANGES;
    default:
      throw IngestError.unknownRecord(record);
  }
}

export function standbyChanges(record: WalRecord): readonly Change[] {
  if (record.rmid !== RM_STANDBY || (record.info & XLR_RMGR_INFO_MASK) !== RUNNING_XACTS) return NO_CHANGES;
  const main = mainData(record);
  const nextXid = main.readUInt32LE(12);
  return [
    { kind: 'xids', xids: [(nextXid - 1) >>> 0] },
    { kind: 'oldest-active-xid', xid: main.readUInt32LE(16) },
  ];
}
