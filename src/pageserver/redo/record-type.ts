/**
 * Names of record types, as pg_waldump prints them: for errors, counts and dumps. (Sources: the identify functions of rmgrdesc.)
 */

import {
  RM_BRIN,
  RM_CLOG,
  RM_COMMIT_TS,
  RM_DBASE,
  RM_HEAP,
  RM_HEAP2,
  RM_LOGICALMSG,
  RM_MULTIXACT,
  RM_RELMAP,
  RM_REPLORIGIN,
  RM_SEQ,
  RM_SMGR,
  RM_STANDBY,
  RM_TBLSPC,
  RM_XACT,
  RM_XLOG,
  rmgrName,
} from '../../postgres/rmgr.ts';
import { versionFacts } from '../../postgres/version.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { XLR_RMGR_INFO_MASK } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { indexRecordTypes, typeName } from './index-tuple.ts';

const XACT_OPMASK = 0x70;
const BRIN_INIT_PAGE = 0x80;

type Names = Readonly<Record<number, string>>;

const XLOG_NAMES: Names = {
  0x00: 'CHECKPOINT_SHUTDOWN',
  0x10: 'CHECKPOINT_ONLINE',
  0x20: 'NOOP',
  0x30: 'NEXTOID',
  0x40: 'SWITCH',
  0x50: 'BACKUP_END',
  0x60: 'PARAMETER_CHANGE',
  0x70: 'RESTORE_POINT',
  0x80: 'FPW_CHANGE',
  0x90: 'END_OF_RECOVERY',
  0xa0: 'FPI_FOR_HINT',
  0xb0: 'FPI',
  0xd0: 'OVERWRITE_CONTRECORD',
  0xe0: 'CHECKPOINT_REDO',
};

const XACT_NAMES: Names = {
  0x00: 'COMMIT',
  0x10: 'PREPARE',
  0x20: 'ABORT',
  0x30: 'COMMIT_PREPARED',
  0x40: 'ABORT_PREPARED',
  0x50: 'ASSIGNMENT',
  0x60: 'INVALIDATION',
};

const HEAP_NAMES: Names = {
  0x00: 'INSERT',
  0x10: 'DELETE',
  0x20: 'UPDATE',
  0x30: 'TRUNCATE',
  0x40: 'HOT_UPDATE',
  0x50: 'HEAP_CONFIRM',
  0x60: 'LOCK',
  0x70: 'INPLACE',
  0x80: 'INSERT+INIT',
  0xa0: 'UPDATE+INIT',
  0xc0: 'HOT_UPDATE+INIT',
};

const HEAP2_COMMON: Names = {
  0x00: 'REWRITE',
  0x40: 'VISIBLE',
  0x50: 'MULTI_INSERT',
  0x60: 'LOCK_UPDATED',
  0x70: 'NEW_CID',
  0xd0: 'MULTI_INSERT+INIT',
};
/** Until 16. */
const HEAP2_SEPARATE: Names = { ...HEAP2_COMMON, 0x10: 'PRUNE', 0x20: 'VACUUM', 0x30: 'FREEZE_PAGE' };
/** From 17. */
const HEAP2_COMBINED: Names = {
  ...HEAP2_COMMON,
  0x10: 'PRUNE_ON_ACCESS',
  0x20: 'PRUNE_VACUUM_SCAN',
  0x30: 'PRUNE_VACUUM_CLEANUP',
};

const OTHER_NAMES: Readonly<Record<number, Names>> = {
  [RM_XLOG]: XLOG_NAMES,
  [RM_HEAP]: HEAP_NAMES,
  [RM_SMGR]: { 0x10: 'CREATE', 0x20: 'TRUNCATE' },
  [RM_CLOG]: { 0x00: 'ZEROPAGE', 0x10: 'TRUNCATE' },
  [RM_DBASE]: { 0x00: 'CREATE_FILE_COPY', 0x10: 'CREATE_WAL_LOG', 0x20: 'DROP' },
  [RM_TBLSPC]: { 0x00: 'CREATE', 0x10: 'DROP' },
  [RM_MULTIXACT]: { 0x00: 'ZERO_OFF_PAGE', 0x10: 'ZERO_MEM_PAGE', 0x20: 'CREATE_ID', 0x30: 'TRUNCATE_ID' },
  [RM_RELMAP]: { 0x00: 'UPDATE' },
  [RM_STANDBY]: { 0x00: 'LOCK', 0x10: 'RUNNING_XACTS', 0x20: 'INVALIDATIONS' },
  [RM_SEQ]: { 0x00: 'LOG' },
  [RM_COMMIT_TS]: { 0x00: 'ZEROPAGE', 0x10: 'TRUNCATE' },
  [RM_REPLORIGIN]: { 0x00: 'SET', 0x10: 'DROP' },
  [RM_LOGICALMSG]: { 0x00: 'MESSAGE' },
};

/** The record's type, or its info bits in hex where it has no name. */
export function recordTypeName(record: WalRecord, version: PgVersion): string {
  const info = record.info & XLR_RMGR_INFO_MASK;
  if (record.rmid === RM_XACT) return XACT_NAMES[info & XACT_OPMASK] ?? hex(info);
  if (record.rmid === RM_HEAP2) {
    const names = versionFacts(version).redo.pruneFreezeCombined ? HEAP2_COMBINED : HEAP2_SEPARATE;
    return names[info] ?? hex(info);
  }
  if (record.rmid === RM_BRIN) return (info & BRIN_INIT_PAGE) === 0 ? typeName(record) : `${typeName(record)}+INIT`;
  const names = OTHER_NAMES[record.rmid];
  return names === undefined ? typeName(record) : (names[info] ?? hex(info));
}

/** Every type of record that the version has, as `resource manager/type`. */
export function recordTypes(version: PgVersion): string[] {
  const { pruneFreezeCombined, checkpointRedo } = versionFacts(version).redo;
  const heap2 = pruneFreezeCombined ? HEAP2_COMBINED : HEAP2_SEPARATE;
  const named = Object.entries({ ...OTHER_NAMES, [RM_XACT]: XACT_NAMES, [RM_HEAP2]: heap2 });
  const types = named.flatMap(([rmid, names]) =>
    Object.values(names).map((type) => `${rmgrName(Number(rmid))}/${type}`),
  );
  return [...types, ...indexRecordTypes()].filter((type) => checkpointRedo || type !== 'XLOG/CHECKPOINT_REDO');
}

function hex(info: number): string {
  return `0x${info.toString(16).padStart(2, '0')}`;
}
