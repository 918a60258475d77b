/**
 * A compute's data directory from a basebackup: everything that Postgres reads at its start, and a forged shutdown checkpoint (DESIGN 2.1), so
 * that it starts without recovery. The shim makes relation files when their names are first used, and their pages come on first read: to
 * make all of them here would cost many times the start of Postgres.
 *
 *   <instance>/data/       the data directory
 *   <instance>/pages.map   which pages are here (page-map.ts)
 *   <instance>/token       the compute's token for the pageserver, 0600
 */
import {
  chownSync,
  closeSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readFileSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import type { Basebackup } from '../api/basebackup.ts';
import { decodeControlFile, CONTROL_FILE_PATH } from '../postgres/control-file.ts';
import { forgeShutdownCheckpoint } from '../postgres/forge-checkpoint.ts';
import { type Lsn, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import type { PgVersion } from '../postgres/version.ts';
import type { SparseSegment } from '../postgres/wal/writer.ts';
import type { UnixUser } from './installation.ts';
import { createPageMap, createRelationFolders, type RelationFork, reusePageMap } from './page-map.ts';
import { computeSettings, encodeSettings, hbaFile, type Settings } from './settings.ts';

export interface InstanceTarget {
  readonly instanceDir: string;
  readonly timelineId: string;
  readonly user: UnixUser | undefined;
  readonly token: string;
  readonly settings: { readonly pgVersion: PgVersion; readonly socketDir: string; readonly extra?: Settings };
}

/** Folders that initdb makes (src/bin/initdb/initdb.c, subdirs) and the server expects. */
export const DATA_DIRECTORY_FOLDERS = [
  ...['base', 'global', 'pg_commit_ts', 'pg_dynshmem', 'pg_logical', 'pg_logical/mappings', 'pg_logical/snapshots'],
  ...['pg_multixact', 'pg_multixact/members', 'pg_multixact/offsets', 'pg_notify', 'pg_replslot', 'pg_serial'],
  ...['pg_snapshots', 'pg_stat', 'pg_stat_tmp', 'pg_subtrans', 'pg_tblspc', 'pg_twophase', 'pg_wal'],
  ...['pg_wal/archive_status', 'pg_wal/summaries', 'pg_xact'],
];

/** Makes the data directory, the page map and the token in an empty instance folder. */
export function writeDataDirectory(target: InstanceTarget, basebackup: Basebackup): void {
  const { instanceDir, user, settings } = target;
  const dataDir = join(instanceDir, 'data');
  const owned = new OwnedFiles(user);
  owned.adopt(instanceDir);
  owned.folder(dataDir);
  for (const folder of DATA_DIRECTORY_FOLDERS) owned.folder(join(dataDir, folder));
  for (const { db } of basebackup.databases) if (db !== 0) owned.folder(join(dataDir, 'base', String(db)));
  for (const { path, bytes } of basebackup.files) owned.file(join(dataDir, path), bytes);

  const relations = basebackup.relations.map(toRelationFork);
  createRelationFolders(dataDir, settings.pgVersion, relations, user);
  createPageMap(join(instanceDir, 'pages.map'), {
    startLsn: basebackup.lsn,
    timelineId: target.timelineId,
    relations,
    filesOnFirstUse: true,
    owner: user,
  });

  const forged = forgeShutdownCheckpoint({
    controlFile: decodeControlFile(basebackup.controlFile),
    state: basebackup.checkPoint,
    lsn: basebackup.lsn,
    prevLsn: basebackup.prevRecordLsn,
    time: Math.floor(Date.now() / 1000),
    parameters: basebackup.parameters,
  });
  for (const segment of forged.segments) owned.segment(join(dataDir, 'pg_wal', segment.name), segment);
  owned.file(join(dataDir, CONTROL_FILE_PATH), forged.controlFile);
  writeConfiguration(target, owned);
}

/**
 * Makes a kept instance ready for another start: configuration and token anew, claims on pages that were cut short released. Gives the LSN at
 * which its absent pages are fetched; undefined when it cannot be used.
 */
export function refreshDataDirectory(target: InstanceTarget): Lsn | undefined {
  const reuse = reusePageMap(join(target.instanceDir, 'pages.map'), { timelineId: target.timelineId });
  if (reuse.kind === 'unusable') return undefined;
  writeConfiguration(target, new OwnedFiles(target.user));
  return reuse.map.startLsn;
}

function writeConfiguration(target: InstanceTarget, owned: OwnedFiles): void {
  const dataDir = join(target.instanceDir, 'data');
  const files = {
    'postgresql.conf': encodeSettings(computeSettings(target.settings)),
    'postgresql.auto.conf': '',
    'pg_hba.conf': hbaFile,
    'pg_ident.conf': '',
  };
  for (const [name, content] of Object.entries(files)) {
    const path = join(dataDir, name);
    if (!holds(path, content)) owned.file(path, content);
  }
  owned.file(join(target.instanceDir, 'token'), target.token);
}

function toRelationFork(relation: Basebackup['relations'][number]): RelationFork {
  const { spc, db, rel, fork, sourceFork, blocks } = relation;
  return fork === sourceFork
    ? { spc, db, rel, fork, blocks }
    : { spc, db, rel, fork, blocks, source: { rel, fork: sourceFork } };
}

/** True when the file is there with these bytes: a kept cache's configuration is nearly always as it has to be, and reading is cheaper. */
function holds(path: string, content: string): boolean {
  try {
    return readFileSync(path, 'utf8') === content;
  } catch {
    return false;
  }
}

/** Files and folders of the user that runs Postgres, 0600 and 0700. Nothing is synced: a compute's disk is a cache. */
class OwnedFiles {
  readonly #user: UnixUser | undefined;

  constructor(user: UnixUser | undefined) {
    this.#user = user;
  }

  adopt(path: string): void {
    if (this.#user !== undefined) chownSync(path, this.#user.uid, this.#user.gid);
  }

  folder(path: string): void {
    mkdirSync(path, { mode: 0o700 });
    this.adopt(path);
  }

  file(path: string, content: string | Buffer): void {
    writeFileSync(path, content, { mode: 0o600 });
    this.adopt(path);
  }

  segment(path: string, segment: SparseSegment): void {
    const file = openSync(path, 'w', 0o600);
    try {
      ftruncateSync(file, WAL_SEGMENT_SIZE);
      for (const { offset, bytes } of segment.writes) writeSync(file, bytes, 0, bytes.length, offset);
    } finally {
      closeSync(file);
    }
    this.adopt(path);
  }
}
