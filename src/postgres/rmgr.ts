/**
 * Resource managers: who wrote a WAL record and who replays it. Ids and names are Postgres' (rmgrlist.h), the same in 15, 16, 17 and 18.
 * Ids from 128 on belong to extensions (custom resource managers).
 */

export const RM_XLOG = 0;
export const RM_XACT = 1;
export const RM_SMGR = 2;
export const RM_CLOG = 3;
export const RM_DBASE = 4;
export const RM_TBLSPC = 5;
export const RM_MULTIXACT = 6;
export const RM_RELMAP = 7;
export const RM_STANDBY = 8;
export const RM_HEAP2 = 9;
export const RM_HEAP = 10;
export const RM_BTREE = 11;
export const RM_HASH = 12;
export const RM_GIN = 13;
export const RM_GIST = 14;
export const RM_SEQ = 15;
export const RM_SPGIST = 16;
export const RM_BRIN = 17;
export const RM_COMMIT_TS = 18;
export const RM_REPLORIGIN = 19;
export const RM_GENERIC = 20;
export const RM_LOGICALMSG = 21;
export const RM_MAX_BUILTIN = RM_LOGICALMSG;
export const RM_MIN_CUSTOM = 128;

const NAMES = [
  'XLOG',
  'Transaction',
  'Storage',
  'CLOG',
  'Database',
  'Tablespace',
  'MultiXact',
  'RelMap',
  'Standby',
  'Heap2',
  'Heap',
  'Btree',
  'Hash',
  'Gin',
  'Gist',
  'Sequence',
  'SPGist',
  'BRIN',
  'CommitTs',
  'ReplicationOrigin',
  'Generic',
  'LogicalMessage',
] as const;

/** The name pg_waldump prints; custom and unknown ids as `custom177` and `unknown40`. */
export function rmgrName(rmid: number): string {
  return NAMES[rmid] ?? (rmid >= RM_MIN_CUSTOM ? `custom${String(rmid).padStart(3, '0')}` : `unknown${rmid}`);
}

/** True for an id that a record may carry (RmgrIdIsValid). */
export function isValidRmgr(rmid: number): boolean {
  return rmid <= RM_MAX_BUILTIN || (rmid >= RM_MIN_CUSTOM && rmid <= 255);
}
