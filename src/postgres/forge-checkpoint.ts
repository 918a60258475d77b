/**
 * A forged shutdown checkpoint: the record and the control file that make an unmodified Postgres start at an LSN without any recovery, as
 * after a clean shutdown at that LSN.
 *
 * The record is placed at the end of the branch's WAL, linked to the true record before it, and is thereby the first record of the new
 * compute's WAL. It is its own redo point, as in every shutdown checkpoint.
 */

import { encodeCheckPoint } from './checkpoint.ts';
import type { CheckPoint } from './checkpoint.ts';
import { DB_SHUTDOWNED, encodeControlFile } from './control-file.ts';
import type { ControlFile, ControlFileParameters } from './control-file.ts';
import { skipPageHeader } from './lsn.ts';
import type { Lsn } from './lsn.ts';
import { RM_XLOG } from './rmgr.ts';
import { WAL_TIMELINE_ID } from './wal/page-header.ts';
import { encodeRecordAt, walSegmentWithTail } from './wal/writer.ts';
import type { SparseSegment } from './wal/writer.ts';

const XLOG_CHECKPOINT_SHUTDOWN = 0x00;
const FIRST_NORMAL_XID = 3;

export interface ForgeCheckpoint {
  /** The cluster's control file, from initdb or any later one: version, system identifier and parameters are taken from it. */
  readonly controlFile: ControlFile;
  /** What the checkpoint is to say. Redo, timeline, wal_level, time and running xids are set here. */
  readonly state: CheckPoint;
  /** End of the last whole record. */
  readonly lsn: Lsn;
  /** Start of the last whole record. */
  readonly prevLsn: Lsn;
  /** Seconds since 1970. */
  readonly time: number;
  /** Settings of the server that will start, so that it need not log that they changed. */
  readonly parameters?: Partial<ControlFileParameters>;
}

export interface ForgedCheckpoint {
  /** The 8192 bytes of global/pg_control. */
  readonly controlFile: Buffer;
  /** WAL from `lsn` to `endLsn`. */
  readonly wal: Buffer;
  /** Start of the record, which is also its redo point. */
  readonly startLsn: Lsn;
  readonly endLsn: Lsn;
  readonly checkPoint: CheckPoint;
  /** The files of pg_wal that Postgres starts from. */
  readonly segments: readonly SparseSegment[];
}

export function forgeShutdownCheckpoint(forge: ForgeCheckpoint): ForgedCheckpoint {
  const { lsn, prevLsn, time, state } = forge;
  const { version, systemId } = forge.controlFile;
  if (state.nextXid % 0x100000000 < FIRST_NORMAL_XID)
    throw new RangeError(`next transaction id ${state.nextXid} is not a normal one`);
  const startLsn = skipPageHeader(lsn);
  const walLevel = forge.parameters?.walLevel ?? forge.controlFile.walLevel;
  const checkPoint: CheckPoint = {
    ...state,
    redo: startLsn,
    timelineId: WAL_TIMELINE_ID,
    prevTimelineId: WAL_TIMELINE_ID,
    walLevel: version >= 17 ? walLevel : 0,
    time,
    oldestActiveXid: 0,
  };
  const record = encodeRecordAt({
    lsn,
    prevLsn,
    rmid: RM_XLOG,
    info: XLOG_CHECKPOINT_SHUTDOWN,
    xid: 0,
    mainData: encodeCheckPoint(checkPoint, version),
    version,
    systemId,
  });
  const controlFile = encodeControlFile({
    ...forge.controlFile,
    ...forge.parameters,
    state: DB_SHUTDOWNED,
    time,
    checkPoint: startLsn,
    checkPointCopy: checkPoint,
    minRecoveryPoint: 0,
    minRecoveryPointTli: 0,
    backupStartPoint: 0,
    backupEndPoint: 0,
    backupEndRequired: false,
  });
  const segments = walSegmentWithTail(lsn, record.bytes, version, systemId);
  return { controlFile, wal: record.bytes, startLsn, endLsn: record.endLsn, checkPoint, segments };
}
