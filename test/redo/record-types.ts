/**
 * Which record types each workload is to make appear, so that together they are all that pg_waldump knows (recordTypes), but for those that
 * are named here with the reason.
 */

import { versionFacts } from '../../src/postgres/version.ts';
import type { PgVersion } from '../../src/postgres/version.ts';

const HEAP_TYPES = [
  'Heap/INSERT',
  'Heap/INSERT+INIT',
  'Heap/DELETE',
  'Heap/UPDATE',
  'Heap/UPDATE+INIT',
  'Heap/HOT_UPDATE',
  'Heap/HEAP_CONFIRM',
  'Heap/LOCK',
  'Heap/INPLACE',
  'Heap2/VISIBLE',
  'Heap2/MULTI_INSERT',
  'Heap2/MULTI_INSERT+INIT',
  'Heap2/LOCK_UPDATED',
  'Sequence/LOG',
  'XLOG/FPI',
];

/** Of heapWorkload. */
export function heapTypes(version: PgVersion): string[] {
  const prune = versionFacts(version).redo.pruneFreezeCombined
    ? ['PRUNE_ON_ACCESS', 'PRUNE_VACUUM_SCAN', 'PRUNE_VACUUM_CLEANUP']
    : ['PRUNE', 'VACUUM', 'FREEZE_PAGE'];
  return [...HEAP_TYPES, ...prune.map((type) => `Heap2/${type}`)];
}

/** Of logicalWorkload, with wal_level = logical and wal_log_hints. */
export const LOGICAL_TYPES = [
  'Heap/TRUNCATE',
  'Heap2/NEW_CID',
  'Heap2/REWRITE',
  'XLOG/FPI_FOR_HINT',
  'Transaction/INVALIDATION',
];

/** Of otherWorkload. */
export function otherTypes(version: PgVersion): string[] {
  return [
    ...['COMMIT', 'ABORT', 'PREPARE', 'COMMIT_PREPARED', 'ABORT_PREPARED', 'ASSIGNMENT'].map((t) => `Transaction/${t}`),
    ...['CREATE', 'TRUNCATE'].map((type) => `Storage/${type}`),
    'CLOG/ZEROPAGE',
    ...['ZEROPAGE', 'TRUNCATE'].map((type) => `CommitTs/${type}`),
    ...['CREATE_FILE_COPY', 'CREATE_WAL_LOG', 'DROP'].map((type) => `Database/${type}`),
    ...['CREATE', 'DROP'].map((type) => `Tablespace/${type}`),
    ...['ZERO_OFF_PAGE', 'ZERO_MEM_PAGE', 'CREATE_ID', 'TRUNCATE_ID'].map((type) => `MultiXact/${type}`),
    'RelMap/UPDATE',
    ...['LOCK', 'RUNNING_XACTS', 'INVALIDATIONS'].map((type) => `Standby/${type}`),
    ...['SET', 'DROP'].map((type) => `ReplicationOrigin/${type}`),
    'LogicalMessage/MESSAGE',
    ...['CHECKPOINT_SHUTDOWN', 'CHECKPOINT_ONLINE', 'NEXTOID', 'SWITCH', 'BACKUP_END'].map((type) => `XLOG/${type}`),
    ...['PARAMETER_CHANGE', 'RESTORE_POINT', 'FPW_CHANGE'].map((type) => `XLOG/${type}`),
    ...(versionFacts(version).redo.checkpointRedo ? ['XLOG/CHECKPOINT_REDO'] : []),
  ];
}

/** What no workload makes, and why. */
export const TYPES_NOT_MADE: Readonly<Record<string, string>> = {
  'XLOG/NOOP': 'no Postgres from 15 on writes it',
  'XLOG/END_OF_RECOVERY': 'only a standby that is promoted writes it',
  'XLOG/OVERWRITE_CONTRECORD':
    'only a crash in the middle of a record leads to it; the reader of WAL is tested with a made one',
  'Heap/HOT_UPDATE+INIT': 'the new version is on the page of the old one, which is never made anew',
  'Gist/ASSIGN_LSN': 'only written with wal_level = minimal',
  'CLOG/TRUNCATE': 'needs more than a million transactions; ingest is tested with a made one',
};
