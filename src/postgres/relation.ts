/**
 * Relation files: how a relation fork is named, and which file and offset hold a block of it. (Postgres: relpath.c, md.c.)
 *
 *   global/<rel>                                    tablespace 1664, database 0: relations shared by all databases
 *   base/<db>/<rel>                                 tablespace 1663, the default
 *   pg_tblspc/<spc>/PG_<major>_<catalog>/<db>/<rel> any other tablespace
 *
 * followed by `_fsm`, `_vm` or `_init` for forks other than the main one, and by `.<n>` for segments from the second on. A segment
 * holds 131072 blocks (1 GiB). Files of temporary relations (`t<backend>_<rel>`) are local to a session and have no key here.
 */

import { BLOCK_SIZE } from './page-size.ts';
import { versionFacts } from './version.ts';
import type { PgVersion } from './version.ts';

export const FORK_MAIN = 0;
export const FORK_FSM = 1;
export const FORK_VM = 2;
export const FORK_INIT = 3;

export const DEFAULT_TABLESPACE = 1663;
export const GLOBAL_TABLESPACE = 1664;

export const BLOCKS_PER_SEGMENT = 131072;
export const RELATION_SEGMENT_SIZE = BLOCKS_PER_SEGMENT * BLOCK_SIZE;

/** A relation of a cluster (RelFileLocator): `rel` is its file number, not its oid. */
export interface RelationKey {
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
}

/** One fork of a relation. */
export interface RelationForkKey extends RelationKey {
  readonly fork: number;
}

/** A file of a relation fork. */
export interface RelationFile extends RelationForkKey {
  /** 0 for the first GiB. */
  readonly segment: number;
}

const FORK_NAMES = ['main', 'fsm', 'vm', 'init'] as const;
const FORK_SUFFIXES = ['', '_fsm', '_vm', '_init'] as const;

export function forkName(fork: number): string {
  const name = FORK_NAMES[fork];
  if (name === undefined) throw new RangeError(`fork ${fork} does not exist`);
  return name;
}

/** `base/5/16384`, `global/1262_vm`, …: the path of the fork's first segment, relative to the data directory. */
export function relationPath(key: RelationForkKey, version: PgVersion): string {
  const suffix = FORK_SUFFIXES[key.fork];
  if (suffix === undefined) throw new RangeError(`fork ${key.fork} does not exist`);
  return `${databasePath(key.spc, key.db, version)}/${key.rel}${suffix}`;
}

/** The path of a segment of a fork, relative to the data directory. */
export function relationSegmentPath(file: RelationFile, version: PgVersion): string {
  const path = relationPath(file, version);
  return file.segment === 0 ? path : `${path}.${file.segment}`;
}

/** The directory of a database in a tablespace (GetDatabasePath). */
export function databasePath(spc: number, db: number, version: PgVersion): string {
  if (spc === GLOBAL_TABLESPACE) return 'global';
  if (spc === DEFAULT_TABLESPACE) return `base/${db}`;
  return `pg_tblspc/${spc}/${tablespaceVersionDirectory(version)}/${db}`;
}

/** `PG_17_202406281`: the directory inside a tablespace that belongs to a major version. */
export function tablespaceVersionDirectory(version: PgVersion): string {
  return `PG_${version}_${versionFacts(version).catalogVersion}`;
}

const FILE_NAME = /^(\d{1,10})(?:_(fsm|vm|init))?(?:\.(\d{1,5}))?$/;
const DIRECTORY = /^(?:(global)|base\/(\d{1,10})|pg_tblspc\/(\d{1,10})\/PG_\d+_\d+\/(\d{1,10}))$/;

/** What a path relative to the data directory is, or undefined when it is no relation file (other files, temporary relations). */
export function parseRelationPath(path: string): RelationFile | undefined {
  const slash = path.lastIndexOf('/');
  if (slash < 0) return undefined;
  const file = FILE_NAME.exec(path.slice(slash + 1));
  const directory = DIRECTORY.exec(path.slice(0, slash));
  if (file === null || directory === null) return undefined;
  const rel = Number(file[1]);
  const fork = file[2] === undefined ? FORK_MAIN : FORK_NAMES.findIndex((name) => name === file[2]);
  const segment = file[3] === undefined ? 0 : Number(file[3]);
  if (rel === 0 || rel > 0xffffffff || String(rel) !== file[1]) return undefined;
  if (file[3] !== undefined && (segment === 0 || String(segment) !== file[3])) return undefined;
  if (directory[1] !== undefined) return { spc: GLOBAL_TABLESPACE, db: 0, rel, fork, segment };
  if (directory[2] !== undefined) return { spc: DEFAULT_TABLESPACE, db: Number(directory[2]), rel, fork, segment };
  return { spc: Number(directory[3]), db: Number(directory[4]), rel, fork, segment };
}

export function segmentOfBlock(blk: number): number {
  return Math.floor(blk / BLOCKS_PER_SEGMENT);
}

export function blockInSegment(blk: number): number {
  return blk % BLOCKS_PER_SEGMENT;
}
