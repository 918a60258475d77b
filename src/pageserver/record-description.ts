/**
 * What a record says besides its blocks, in the words of pg_waldump of the record's version: the most used types. (Sources: the
 * desc functions of rmgrdesc.)
 *
 * 16 has other words than 15 for heap and btree. Left out: the lists of offsets that 16 prints besides their counts, what pruning says
 * from 16 on, the invalidation messages of commits, and the statistics that a prepared transaction drops. Times are in UTC.
 */

import { decodeCheckPoint } from '../postgres/checkpoint.ts';
import { formatLsn, readLsn } from '../postgres/lsn.ts';
import { relationPath } from '../postgres/relation.ts';
import type { RelationKey } from '../postgres/relation.ts';
import { RM_XACT, rmgrName } from '../postgres/rmgr.ts';
import type { PgVersion } from '../postgres/version.ts';
import { WalError } from '../postgres/wal/error.ts';
import { blockData, findBlock, mainData } from '../postgres/wal/record.ts';
import type { WalRecord } from '../postgres/wal/record.ts';
import { parseXactRecord, timestampToDate } from '../postgres/xact-record.ts';
import type { XactEnd, XactPrepare } from '../postgres/xact-record.ts';
import { recordTypeName } from './redo/record-type.ts';

/** Empty when there is nothing to say, or nothing known of the type. */
export function describeRecord(record: WalRecord, version: PgVersion): string {
  try {
    if (record.rmid === RM_XACT) return describeTransaction(record, version);
    const type = `${rmgrName(record.rmid)}/${recordTypeName(record, version)}`.replace('+INIT', '');
    return (
      (version === 15 ? WORDS_15[type] : WORDS_16[type])?.(mainData(record), version, record) ??
      WORDS[type]?.(mainData(record), version, record) ??
      ''
    );
  } catch (error) {
    // A record that is shorter than its type.
    if (error instanceof RangeError || error instanceof WalError) return '';
    throw error;
  }
}

type Describe = (main: Buffer, version: PgVersion, record: WalRecord) => string;

const INFOBITS = ['IS_MULTI', 'LOCK_ONLY', 'EXCL_LOCK', 'KEYSHR_LOCK', 'KEYS_UPDATED'];
const WAL_LEVELS = ['minimal', 'replica', 'logical'];
const COMPLETION_APPLY_FEEDBACK = 2 ** 29;
const COMPLETION_FORCE_SYNC = 2 ** 31;

/** Types whose words are the same in all versions, but for a word or two. */
const WORDS: Readonly<Record<string, Describe>> = {
  'XLOG/CHECKPOINT_SHUTDOWN': (main, version) => describeCheckpoint(main, version, 'shutdown'),
  'XLOG/CHECKPOINT_ONLINE': (main, version) => describeCheckpoint(main, version, 'online'),
  'XLOG/CHECKPOINT_REDO': (main) => `wal_level ${walLevel(main.readInt32LE(0))}`,
  'XLOG/NEXTOID': (main) => `${u32(main, 0)}`,
  'XLOG/RESTORE_POINT': (main) => text(main, 8),
  'XLOG/BACKUP_END': (main) => formatLsn(readLsn(main, 0)),
  'XLOG/FPW_CHANGE': (main) => bool(main, 0, 'true', 'false'),
  'XLOG/PARAMETER_CHANGE': (main) =>
    `max_connections=${u32(main, 0)} max_worker_processes=${u32(main, 4)} max_wal_senders=${u32(main, 8)} ` +
    `max_prepared_xacts=${u32(main, 12)} max_locks_per_xact=${u32(main, 16)} wal_level=${walLevel(u32(main, 20))} ` +
    `wal_log_hints=${bool(main, 24, 'on', 'off')} track_commit_timestamp=${bool(main, 25, 'on', 'off')}`,
  'Storage/CREATE': (main, version) => relationPath({ ...relation(main, 0), fork: u32(main, 12) }, version),
  'Storage/TRUNCATE': (main, version) =>
    `${path(relation(main, 4), version)} to ${u32(main, 0)} blocks flags ${u32(main, 16)}`,
  'Standby/LOCK': (main) =>
    Array.from({ length: u32(main, 0) }, (_, i) => {
      return `xid ${u32(main, 4 + 12 * i)} db ${u32(main, 8 + 12 * i)} rel ${u32(main, 12 + 12 * i)} `;
    }).join(''),
  'Standby/RUNNING_XACTS': describeRunning,
};

/** 15 ends lists of flags with a space. */
const WORDS_15: Readonly<Record<string, Describe>> = {
  'Heap/INSERT': (main) => `off ${u16(main, 0)} flags ${hex(main, 2)}`,
  'Heap/DELETE': (main) => `off ${u16(main, 4)} flags ${hex(main, 7)} ${infobits15(main, 6)}`,
  'Heap/UPDATE': update15,
  'Heap/HOT_UPDATE': update15,
  'Heap/HEAP_CONFIRM': (main) => `off ${u16(main, 0)}`,
  'Heap/INPLACE': (main) => `off ${u16(main, 0)}`,
  'Heap/LOCK': (main) => `off ${u16(main, 4)}: xid ${u32(main, 0)}: flags ${hex(main, 7)} ${infobits15(main, 6)}`,
  'Heap2/PRUNE': (main) => `latestRemovedXid ${u32(main, 0)} nredirected ${u16(main, 4)} ndead ${u16(main, 6)}`,
  'Heap2/VACUUM': (main) => `nunused ${u16(main, 0)}`,
  'Heap2/FREEZE_PAGE': (main) => `cutoff xid ${u32(main, 0)} ntuples ${u16(main, 4)}`,
  'Heap2/VISIBLE': (main) => `cutoff xid ${u32(main, 0)} flags ${hex(main, 4)}`,
  'Heap2/MULTI_INSERT': (main) => `${u16(main, 2)} tuples flags ${hex(main, 0)}`,
  'Heap2/LOCK_UPDATED': (main) =>
    `off ${u16(main, 4)}: xmax ${u32(main, 0)}: flags ${hex(main, 7)} ${infobits15(main, 6)}`,
  'Btree/INSERT_LEAF': offset15,
  'Btree/INSERT_UPPER': offset15,
  'Btree/INSERT_META': offset15,
  'Btree/INSERT_POST': offset15,
  'Btree/SPLIT_L': split15,
  'Btree/SPLIT_R': split15,
  'Btree/DEDUP': (main) => `nintervals ${u16(main, 0)}`,
  'Btree/VACUUM': (main) => `ndeleted ${u16(main, 0)}; nupdated ${u16(main, 2)}`,
  'Btree/DELETE': (main) => `latestRemovedXid ${u32(main, 0)}; ndeleted ${u16(main, 4)}; nupdated ${u16(main, 6)}`,
  'Btree/MARK_PAGE_HALFDEAD': (main) =>
    `topparent ${u32(main, 16)}; leaf ${u32(main, 4)}; left ${u32(main, 8)}; right ${u32(main, 12)}`,
  'Btree/UNLINK_PAGE': unlink15,
  'Btree/UNLINK_PAGE_META': unlink15,
  'Btree/NEWROOT': (main) => `lev ${u32(main, 4)}`,
  'Btree/REUSE_PAGE': (main) => `rel ${slashes(relation(main, 0))}; latestRemovedXid ${u32(main, 20)}:${u32(main, 16)}`,
  'Btree/META_CLEANUP': (_main, _version, record) => `last_cleanup_num_delpages ${deletedPages(record)}`,
};

const WORDS_16: Readonly<Record<string, Describe>> = {
  'Heap/INSERT': (main) => `off: ${u16(main, 0)}, flags: ${hex(main, 2)}`,
  'Heap/DELETE': lock16,
  'Heap/UPDATE': update16,
  'Heap/HOT_UPDATE': update16,
  'Heap/HEAP_CONFIRM': (main) => `off: ${u16(main, 0)}`,
  'Heap/INPLACE': (main) => `off: ${u16(main, 0)}`,
  'Heap/LOCK': lock16,
  'Heap2/VISIBLE': (main) => `snapshotConflictHorizon: ${u32(main, 0)}, flags: ${hex(main, 4)}`,
  'Heap2/MULTI_INSERT': (main) => `ntuples: ${u16(main, 2)}, flags: ${hex(main, 0)}`,
  'Heap2/LOCK_UPDATED': lock16,
  'Btree/INSERT_LEAF': offset16,
  'Btree/INSERT_UPPER': offset16,
  'Btree/INSERT_META': offset16,
  'Btree/INSERT_POST': offset16,
  'Btree/SPLIT_L': split16,
  'Btree/SPLIT_R': split16,
  'Btree/DEDUP': (main) => `nintervals: ${u16(main, 0)}`,
  'Btree/VACUUM': (main) => `ndeleted: ${u16(main, 0)}, nupdated: ${u16(main, 2)}`,
  'Btree/DELETE': (main, version) =>
    `snapshotConflictHorizon: ${u32(main, 0)}, ndeleted: ${u16(main, 4)}, nupdated: ${u16(main, 6)}` +
    catalogFlag(main, 8, version),
  'Btree/MARK_PAGE_HALFDEAD': (main) =>
    `topparent: ${u32(main, 16)}, leaf: ${u32(main, 4)}, left: ${u32(main, 8)}, right: ${u32(main, 12)}`,
  'Btree/UNLINK_PAGE': unlink16,
  'Btree/UNLINK_PAGE_META': unlink16,
  'Btree/NEWROOT': (main) => `level: ${u32(main, 4)}`,
  'Btree/REUSE_PAGE': (main, version) =>
    `rel: ${slashes(relation(main, 0))}, snapshotConflictHorizon: ${u32(main, 20)}:${u32(main, 16)}` +
    catalogFlag(main, 24, version),
  'Btree/META_CLEANUP': (_main, _version, record) => `last_cleanup_num_delpages: ${deletedPages(record)}`,
};

function update15(main: Buffer): string {
  const old = `off ${u16(main, 4)} xmax ${u32(main, 0)} flags ${hex(main, 7)} ${infobits15(main, 6)}`;
  return `${old}; new off ${u16(main, 12)} xmax ${u32(main, 8)}`;
}

function update16(main: Buffer): string {
  const old = `old_xmax: ${u32(main, 0)}, old_off: ${u16(main, 4)}, old_infobits: ${infobits16(main, 6)}`;
  return `${old}, flags: ${hex(main, 7)}, new_xmax: ${u32(main, 8)}, new_off: ${u16(main, 12)}`;
}

function lock16(main: Buffer): string {
  return `xmax: ${u32(main, 0)}, off: ${u16(main, 4)}, infobits: ${infobits16(main, 6)}, flags: ${hex(main, 7)}`;
}

function offset15(main: Buffer): string {
  return `off ${u16(main, 0)}`;
}

function offset16(main: Buffer): string {
  return `off: ${u16(main, 0)}`;
}

function split15(main: Buffer): string {
  const offsets = `firstrightoff ${u16(main, 4)}, newitemoff ${u16(main, 6)}, postingoff ${u16(main, 8)}`;
  return `level ${u32(main, 0)}, ${offsets}`;
}

function split16(main: Buffer): string {
  const offsets = `firstrightoff: ${u16(main, 4)}, newitemoff: ${u16(main, 6)}, postingoff: ${u16(main, 8)}`;
  return `level: ${u32(main, 0)}, ${offsets}`;
}

function unlink15(main: Buffer): string {
  const target = `left ${u32(main, 0)}; right ${u32(main, 4)}; level ${u32(main, 8)}; safexid ${u32(main, 20)}:${u32(main, 16)}`;
  return `${target}; leafleft ${u32(main, 24)}; leafright ${u32(main, 28)}; leaftopparent ${u32(main, 32)}`;
}

function unlink16(main: Buffer): string {
  const target = `left: ${u32(main, 0)}, right: ${u32(main, 4)}, level: ${u32(main, 8)}, safexid: ${u32(main, 20)}:${u32(main, 16)}`;
  return `${target}, leafleft: ${u32(main, 24)}, leafright: ${u32(main, 28)}, leaftopparent: ${u32(main, 32)}`;
}

function deletedPages(record: WalRecord): number {
  const block = findBlock(record, 0);
  return block === undefined ? 0 : u32(blockData(record, block), 20);
}

/** The field came with 16, the words with 17. */
function catalogFlag(main: Buffer, at: number, version: PgVersion): string {
  return version < 17 ? '' : `, isCatalogRel: ${bool(main, at, 'T', 'F')}`;
}

function describeCheckpoint(main: Buffer, version: PgVersion, kind: string): string {
  const state = decodeCheckPoint(main, 0, version);
  return [
    `redo ${formatLsn(state.redo)}`,
    `tli ${state.timelineId}`,
    `prev tli ${state.prevTimelineId}`,
    `fpw ${state.fullPageWrites}`,
    ...(version < 17 ? [] : [`wal_level ${walLevel(state.walLevel)}`]),
    `xid ${Math.floor(state.nextXid / 2 ** 32)}:${state.nextXid % 2 ** 32}`,
    `oid ${state.nextOid}`,
    `multi ${state.nextMulti}`,
    `offset ${state.nextMultiOffset}`,
    `oldest xid ${state.oldestXid} in DB ${state.oldestXidDb}`,
    `oldest multi ${state.oldestMulti} in DB ${state.oldestMultiDb}`,
    `oldest/newest commit timestamp xid: ${state.oldestCommitTsXid}/${state.newestCommitTsXid}`,
    `oldest running xid ${state.oldestActiveXid}`,
    kind,
  ].join('; ');
}

function describeRunning(main: Buffer, version: PgVersion): string {
  const xidCount = u32(main, 0);
  const subxidCount = u32(main, 4);
  const xids = (from: number, count: number): string =>
    Array.from({ length: count }, (_, i) => ` ${u32(main, 24 + 4 * (from + i))}`).join('');
  let words = `nextXid ${u32(main, 12)} latestCompletedXid ${u32(main, 20)} oldestRunningXid ${u32(main, 16)}`;
  if (xidCount > 0) words += `; ${xidCount} xacts:${xids(0, xidCount)}`;
  if (main.readUInt8(8) !== 0) words += version === 15 ? '; subxid ovf' : '; subxid overflowed';
  if (version > 15 && subxidCount > 0) words += `; ${subxidCount} subxacts:${xids(xidCount, subxidCount)}`;
  return words;
}

function describeTransaction(record: WalRecord, version: PgVersion): string {
  const parsed = parseXactRecord(record, version);
  if (parsed === undefined) return '';
  return parsed.kind === 'prepare' ? describePrepare(parsed, version) : describeEnd(parsed, version);
}

function describeEnd(end: XactEnd, version: PgVersion): string {
  const stats = end.droppedStats.map(({ kind, db, objectId }) => ` ${kind}/${db}/${objectId}`);
  let words = (end.prepared ? `${end.xid}: ` : '') + timestamp(end.timeUs);
  words += relations('rels', end.droppedRelations, version) + subtransactions(end.subxacts);
  if (stats.length > 0) words += `; dropped stats:${stats.join('')}`;
  if (end.kind === 'commit' && hasFlag(end.xinfo, COMPLETION_APPLY_FEEDBACK)) words += '; apply_feedback';
  if (end.kind === 'commit' && hasFlag(end.xinfo, COMPLETION_FORCE_SYNC)) words += '; sync';
  return words;
}

function describePrepare(prepare: XactPrepare, version: PgVersion): string {
  const commit = relations('rels(commit)', prepare.commitRelations, version);
  const abort = relations('rels(abort)', prepare.abortRelations, version);
  return `gid ${prepare.gid}: ${timestamp(prepare.timeUs)}${commit}${abort}${subtransactions(prepare.subxacts)}`;
}

function relations(label: string, dropped: readonly RelationKey[], version: PgVersion): string {
  return dropped.length === 0 ? '' : `; ${label}: ${dropped.map((each) => path(each, version)).join(' ')}`;
}

function subtransactions(xids: readonly number[]): string {
  return xids.length === 0 ? '' : `; subxacts: ${xids.join(' ')}`;
}

/** As Postgres writes a time in the zone UTC. */
function timestamp(timeUs: number): string {
  const seconds = timestampToDate(timeUs).toISOString().slice(0, 19).replace('T', ' ');
  const microseconds = ((timeUs % 1_000_000) + 1_000_000) % 1_000_000;
  return `${seconds}.${String(microseconds).padStart(6, '0')} UTC`;
}

function relation(bytes: Buffer, at: number): RelationKey {
  return { spc: u32(bytes, at), db: u32(bytes, at + 4), rel: u32(bytes, at + 8) };
}

function path(key: RelationKey, version: PgVersion): string {
  return relationPath({ ...key, fork: 0 }, version);
}

function slashes({ spc, db, rel }: RelationKey): string {
  return `${spc}/${db}/${rel}`;
}

function infobits15(bytes: Buffer, at: number): string {
  return infobits(bytes, at)
    .map((name) => `${name} `)
    .join('');
}

function infobits16(bytes: Buffer, at: number): string {
  return `[${infobits(bytes, at).join(', ')}]`;
}

function infobits(bytes: Buffer, at: number): string[] {
  const bits = bytes.readUInt8(at);
  return INFOBITS.filter((_, bit) => (bits & (1 << bit)) !== 0);
}

function hasFlag(flags: number, flag: number): boolean {
  return (flags & flag) !== 0;
}

function walLevel(level: number): string {
  return WAL_LEVELS[level] ?? '?';
}

function bool(bytes: Buffer, at: number, yes: string, no: string): string {
  return bytes.readUInt8(at) === 0 ? no : yes;
}

function hex(bytes: Buffer, at: number): string {
  return `0x${bytes.readUInt8(at).toString(16).toUpperCase().padStart(2, '0')}`;
}

function text(bytes: Buffer, at: number): string {
  const end = bytes.indexOf(0, at);
  return bytes.toString('utf8', at, end === -1 ? bytes.length : end);
}

function u16(bytes: Buffer, at: number): number {
  return bytes.readUInt16LE(at);
}

function u32(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at);
}
