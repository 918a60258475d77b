/**
 * Real Postgres clusters for the shim's tests: a full data directory, and others made from it that have everything but the relations' pages.
 */
import { execFileSync } from 'node:child_process';
import {
  appendFileSync,
  chmodSync,
  chownSync,
  copyFileSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { Client } from 'pg';
import type { PageRange } from '../../api/pages.ts';
import { type Lsn, readLsn } from '../../postgres/lsn.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import {
  BLOCKS_PER_SEGMENT,
  FORK_INIT,
  FORK_MAIN,
  parseRelationPath,
  relationSegmentPath,
} from '../../postgres/relation.ts';
import {
  findInstallation,
  type PostgresInstallation,
  reachableInstallation,
  type UnixUser,
  unprivilegedUser,
} from '../installation.ts';
import { createPageMap, createRelationFolders, createSparseRelationFiles, type RelationFork } from '../page-map.ts';
import { PostgresProcess } from '../postgres-process.ts';

export const TEST_TIMELINE = '0123456789abcdef0123456789abcdef';
export const TEST_TOKEN = 'a token for tests';

/** Offset of checkPoint in pg_control (ControlFileData, the same in 15 to 18). */
const CHECKPOINT_OFFSET = 32;

export interface Cluster {
  readonly installation: PostgresInstallation;
  readonly user: UnixUser | undefined;
  readonly dataDir: string;
}

/** The npm package's Postgres, or the one whose bin folder STRATA_TEST_PG_BIN_DIR names. */
export function installationForTests(root: string): { installation: PostgresInstallation; user: UnixUser | undefined } {
  const user = unprivilegedUser();
  const pgBinDir = process.env['STRATA_TEST_PG_BIN_DIR'];
  return {
    installation: reachableInstallation(
      findInstallation(pgBinDir === undefined ? {} : { pgBinDir }),
      user,
      join(root, 'postgres'),
    ),
    user,
  };
}

/** A fresh cluster by initdb, without durability and without background work that tests do not ask for. */
export function initCluster(root: string): Cluster {
  const { installation, user } = installationForTests(root);
  const dataDir = join(root, 'full');
  makeFolder(dataDir, user);
  execFileSync(
    join(installation.binDir, 'initdb'),
    ['-D', dataDir, '-U', 'postgres', '-A', 'trust', '-N', '--locale=C', '-E', 'UTF8'],
    {
      stdio: 'ignore',
      env: { PATH: '/usr/bin:/bin', LD_LIBRARY_PATH: join(dirname(installation.binDir), 'lib'), TZ: 'UTC' },
      cwd: dataDir,
      ...(user === undefined ? {} : { uid: user.uid, gid: user.gid }),
    },
  );
  appendFileSync(
    join(dataDir, 'postgresql.conf'),
    `listen_addresses = ''\nunix_socket_directories = '.'\nunix_socket_permissions = 0777\nfsync = off\nfull_page_writes = off\n` +
      `autovacuum = off\nshared_buffers = '4MB'\nmax_wal_size = '4GB'\nlog_min_messages = log\nrestart_after_crash = off\n`,
  );
  return { installation, user, dataDir };
}

export async function startCluster(
  cluster: Cluster,
  env: Readonly<Record<string, string>> = {},
): Promise<PostgresProcess> {
  const { installation, user, dataDir } = cluster;
  return PostgresProcess.start({ installation, user, dataDir, logFile: logFileOf(cluster), env });
}

export function logFileOf(cluster: Cluster): string {
  return `${cluster.dataDir}.log`;
}

export async function connectTo(cluster: Cluster, database = 'postgres'): Promise<Client> {
  const client = new Client({ host: cluster.dataDir, user: 'postgres', database });
  client.on('error', () => {});
  await client.connect();
  return client;
}

export interface ColdCluster extends Cluster {
  readonly pageMap: string;
  readonly startLsn: Lsn;
  readonly relations: readonly RelationFork[];
  readonly makeFilesMs: number;
}

/** A data directory made from a cleanly stopped one: the same but for the relations, whose files are sparse, or made on first use. */
export function makeColdCluster(full: Cluster, dataDir: string, filesOnFirstUse = true): ColdCluster {
  makeFolder(dataDir, full.user);
  const forks = new Map<string, { -readonly [K in keyof RelationFork]: RelationFork[K] }>();
  for (const entry of readdirSync(full.dataDir, { recursive: true, withFileTypes: true })) {
    const path = join(entry.parentPath, entry.name);
    const relative = path.slice(full.dataDir.length + 1);
    const target = join(dataDir, relative);
    if (entry.isDirectory()) {
      makeFolder(target, full.user);
      continue;
    }
    const file = parseRelationPath(relative);
    if (file === undefined) {
      if (!entry.isFile()) continue;
      copyFileSync(path, target);
      own(target, full.user);
      continue;
    }
    const { segment, ...fork } = file;
    const key = Object.values(fork).join('/');
    const known = forks.get(key) ?? { ...fork, blocks: 0 };
    known.blocks = Math.max(known.blocks, segment * BLOCKS_PER_SEGMENT + statSync(path).size / BLOCK_SIZE);
    forks.set(key, known);
  }
  const relations = [...forks.values()].filter((fork) => {
    const init = forks.get(`${fork.spc}/${fork.db}/${fork.rel}/${FORK_INIT}`);
    if (init === undefined || fork.fork === FORK_INIT) return true;
    if (fork.fork !== FORK_MAIN) return false;
    fork.blocks = init.blocks;
    fork.source = { rel: fork.rel, fork: FORK_INIT };
    return true;
  });
  const startLsn = readLsn(readFileSync(join(full.dataDir, 'global/pg_control')), CHECKPOINT_OFFSET);
  const pageMap = `${dataDir}.map`;
  const before = performance.now();
  createPageMap(pageMap, { startLsn, timelineId: TEST_TIMELINE, relations, filesOnFirstUse, owner: full.user });
  const createFiles = filesOnFirstUse ? createRelationFolders : createSparseRelationFiles;
  createFiles(dataDir, full.installation.pgVersion, relations, full.user);
  return { ...full, dataDir, pageMap, startLsn, relations, makeFilesMs: performance.now() - before };
}

/** What a Postgres needs in its environment to run on the shim. */
export function shimEnvironment(options: {
  readonly shim: string;
  readonly dataDir: string;
  readonly pageMap: string;
  readonly port: number;
  readonly user?: UnixUser | undefined;
  readonly extra?: Readonly<Record<string, string>>;
}): Record<string, string> {
  const tokenFile = `${options.pageMap}.token`;
  writeFileSync(tokenFile, TEST_TOKEN, { mode: 0o600 });
  own(tokenFile, options.user);
  return {
    LD_PRELOAD: options.shim,
    STRATA_PAGE_MAP: options.pageMap,
    STRATA_DATA_DIR: options.dataDir,
    STRATA_PAGESERVER: `127.0.0.1:${options.port}`,
    STRATA_TOKEN_FILE: tokenFile,
    STRATA_TIMELINE: TEST_TIMELINE,
    ...options.extra,
  };
}

/** Pages as the files of a stopped cluster have them; zeroes past the end. */
export function pagesOfCluster(cluster: Cluster): (range: PageRange) => Buffer {
  const files = new Map<string, number>();
  return (range) => {
    const pages = Buffer.alloc(range.count * BLOCK_SIZE);
    for (let done = 0; done < range.count;) {
      const blk = range.blk + done;
      const segment = Math.floor(blk / BLOCKS_PER_SEGMENT);
      const count = Math.min(range.count - done, (segment + 1) * BLOCKS_PER_SEGMENT - blk);
      const path = join(cluster.dataDir, relationSegmentPath({ ...range, segment }, cluster.installation.pgVersion));
      let file = files.get(path);
      if (file === undefined) files.set(path, (file = openSync(path, 'r')));
      readSync(file, pages, done * BLOCK_SIZE, count * BLOCK_SIZE, (blk % BLOCKS_PER_SEGMENT) * BLOCK_SIZE);
      done += count;
    }
    return pages;
  };
}

function makeFolder(folder: string, user: UnixUser | undefined): void {
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  chmodSync(folder, 0o700);
  own(folder, user);
}

function own(path: string, user: UnixUser | undefined): void {
  if (user !== undefined) chownSync(path, user.uid, user.gid);
}
