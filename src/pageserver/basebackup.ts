/**
 * Basebackups: what a compute starts from at an LSN, gathered from the timeline's keys.
 *
 * No relation data is in it. Unlogged relations are empty, as after a crash: their main fork is a copy of their init fork and the other
 * forks are left out. Temporary relations have no keys.
 */

import type { Basebackup, BasebackupFile, BasebackupRelation } from '../api/basebackup.ts';
import type { CheckPoint } from '../postgres/checkpoint.ts';
import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { FORK_INIT, FORK_MAIN, GLOBAL_TABLESPACE, databasePath } from '../postgres/relation.ts';
import { toPgVersion, twoPhaseFileName } from '../postgres/version.ts';
import type { PgVersion } from '../postgres/version.ts';
import { decodeCheckpointState } from './ingest/checkpoint-state.ts';
import type { CheckpointState } from './ingest/checkpoint-state.ts';
import { slruSegmentPath } from './ingest/slru.ts';
import { resolveLsn } from './ingest/wal-search.ts';
import type { IndexedTimeline } from './ingest/wal-search.ts';
import { CHECKPOINT_STATE_KEY, CONTROL_FILE_KEY, KEY_KIND, prefixRange, slruPageKey } from './key.ts';
import type { TimelineReader } from './timeline-access.ts';

export class BasebackupError extends Error {
  override name = 'BasebackupError';
}

/**
 * `lsn` is the end of a record (resolveLsn finds one) and visible. Throws BasebackupError when it is not, or when the timeline lacks what
 * every timeline has.
 */
export function takeBasebackup(timeline: IndexedTimeline, lsn: Lsn): Basebackup {
  const { reader } = timeline;
  const position = resolveLsn(timeline, lsn);
  if (position.endLsn !== lsn) {
    throw new BasebackupError(
      `no record ends at ${formatLsn(lsn)}; the last before it ends at ${formatLsn(position.endLsn)}`,
    );
  }
  const controlFile = reader.getImage(CONTROL_FILE_KEY, lsn);
  const stateBytes = reader.getImage(CHECKPOINT_STATE_KEY, lsn);
  if (controlFile === undefined || stateBytes === undefined) {
    throw new BasebackupError(`the timeline has no control file or checkpoint state at ${formatLsn(lsn)}`);
  }
  const version = toPgVersion(reader.pgVersion);
  const state = decodeCheckpointState(stateBytes);
  return {
    ...state,
    checkPoint: withNewestCommitTimestamp(state),
    lsn,
    prevRecordLsn: position.startLsn,
    pgVersion: version,
    controlFile,
    ...filesAt(reader, lsn),
  };
}

/** The part of a basebackup that is in files, and the forks of all relations. */
export function filesAt(
  reader: Pick<TimelineReader, 'pgVersion' | 'getImage' | 'scan'>,
  lsn: Lsn,
): Pick<Basebackup, 'databases' | 'files' | 'relations'> {
  const version = toPgVersion(reader.pgVersion);
  const maps = reader.scan(prefixRange(KEY_KIND.database), lsn);
  return {
    databases: maps.map(([{ spc, db }]) => ({ spc, db })),
    files: [
      { path: 'PG_VERSION', bytes: versionFile(version) },
      ...maps.flatMap(([{ spc, db }, map]) => databaseFiles(spc, db, map, version)),
      ...slruFiles(reader, lsn),
      ...reader.scan(prefixRange(KEY_KIND.twoPhase), lsn).map(([key, bytes]) => ({
        path: `pg_twophase/${twoPhaseFileName(version, key.db, key.rel)}`,
        bytes,
      })),
    ],
    relations: relationForks(reader, lsn),
  };
}

/** The newest xid with a timestamp is not followed commit by commit: any up to the last one will do, as those without have none set. */
function withNewestCommitTimestamp({ checkPoint, parameters }: CheckpointState): CheckPoint {
  if (!parameters.trackCommitTimestamp || checkPoint.oldestCommitTsXid === 0) return checkPoint;
  return { ...checkPoint, newestCommitTsXid: (checkPoint.nextXid - 1) % 2 ** 32 };
}

function versionFile(version: PgVersion): Buffer {
  return Buffer.from(`${version}\n`);
}

function databaseFiles(spc: number, db: number, map: Buffer, version: PgVersion): BasebackupFile[] {
  const directory = databasePath(spc, db, version);
  const files: BasebackupFile[] = [];
  if (spc !== GLOBAL_TABLESPACE) files.push({ path: `${directory}/PG_VERSION`, bytes: versionFile(version) });
  if (map.length > 0) files.push({ path: `${directory}/pg_filenode.map`, bytes: map });
  return files;
}

function slruFiles(reader: Pick<TimelineReader, 'getImage' | 'scan'>, lsn: Lsn): BasebackupFile[] {
  return reader.scan(prefixRange(KEY_KIND.slruSize), lsn).map(([{ db: slru, rel: segment }, size]) => {
    const pages = size.readUInt32LE(0);
    const bytes = Buffer.alloc(pages * BLOCK_SIZE);
    for (let page = 0; page < pages; page++) {
      reader.getImage(slruPageKey(slru, segment, page), lsn)?.copy(bytes, page * BLOCK_SIZE);
    }
    return { path: slruSegmentPath(slru, segment), bytes };
  });
}

function relationForks(reader: Pick<TimelineReader, 'scan'>, lsn: Lsn): BasebackupRelation[] {
  const found = reader.scan(prefixRange(KEY_KIND.relationSize), lsn).map(([{ spc, db, rel, fork }, size]) => ({
    spc,
    db,
    rel,
    fork,
    sourceFork: fork,
    blocks: size.readUInt32LE(0),
  }));
  // Sorted: the forks of a relation stand together, the init fork last.
  const relations: BasebackupRelation[] = [];
  for (const fork of found) {
    if (fork.fork === FORK_INIT) {
      while (isSameRelation(relations.at(-1), fork)) relations.pop();
      relations.push({ ...fork, fork: FORK_MAIN, sourceFork: FORK_INIT });
    }
    relations.push(fork);
  }
  return relations;
}

function isSameRelation(a: BasebackupRelation | undefined, b: BasebackupRelation): boolean {
  return a !== undefined && a.spc === b.spc && a.db === b.db && a.rel === b.rel;
}
