/**
 * Export: a vanilla data directory of a branch at an LSN, from which a stock Postgres starts. It is written by a process of the platform's
 * user that asks the running pageserver, whether the branch's compute runs or sleeps.
 *
 *   <target>/unfinished-export/    where the directory grows
 *   <target>/                      where its entries are moved when all of it is durable, PG_VERSION last
 *
 * Without PG_VERSION no Postgres takes a directory for a cluster, so what was interrupted never looks like one that is whole. The LSN is held by
 * a lease meanwhile. Memory is bounded by a few requests for pages and the cluster's small files (SLRUs, maps).
 */
import {
  chmodSync,
  chownSync,
  closeSync,
  existsSync,
  fsync,
  fsyncSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  realpathSync,
  renameSync,
  rmdirSync,
  rmSync,
  statfsSync,
  statSync,
  writeSync,
} from 'node:fs';
import { userInfo } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { Basebackup, BasebackupRelation } from '../api/basebackup.ts';
import type { PlatformFile } from '../api/control.ts';
import { PageserverClient } from '../api/pageserver.ts';
import { forEachLimited } from '../base/all-done.ts';
import { makeDirectories } from '../base/directories.ts';
import { fsyncDirectory } from '../base/durable-file.ts';
import { errorTable, StrataError, toStrataError } from '../base/errors.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { DATA_DIRECTORY_FOLDERS } from '../compute/data-directory.ts';
import {
  isReachableBy,
  type PostgresInstallation,
  reachableInstallation,
  unprivilegedUser,
  type UnixUser,
} from '../compute/installation.ts';
import type { ExportedDirectory } from '../cli/export.ts';
import { LsnLease } from '../compute/lsn-lease.ts';
import { CONTROL_FILE_PATH, decodeControlFile } from '../postgres/control-file.ts';
import { forgeShutdownCheckpoint } from '../postgres/forge-checkpoint.ts';
import { type Lsn, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import { stampPageChecksum } from '../postgres/page-checksum.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { BLOCKS_PER_SEGMENT, relationSegmentPath } from '../postgres/relation.ts';
import { type PgVersion, toPgVersion } from '../postgres/version.ts';
import { readSecrets, runDirectoryOf } from './platform-directory.ts';
import { releaseSuperuser, vanillaConfiguration } from './vanilla-directory.ts';

export interface BranchExportOptions {
  /** The platform's. */
  readonly dataDirectory: string;
  readonly file: PlatformFile;
  readonly timelineId: string;
  readonly lsn: Lsn;
  /** Empty or not there. */
  readonly target: string;
  readonly dataChecksums: boolean;
  readonly superuser: string;
  readonly signal: AbortSignal;
  readonly onProgress: (progress: ExportProgress) => void;
}

export interface ExportProgress {
  readonly doneBytes: number;
  readonly totalBytes: number;
}

export const UNFINISHED_EXPORT = 'unfinished-export';

const BASEBACKUP_TIMEOUT_MS = 5 * 60_000;
/** Pages of one request: enough to make requests cheap, few enough that the pageserver does not keep others waiting. */
const PAGES_PER_REQUEST = 128;
/** Files that are written side by side. */
const FILES_AT_ONCE = 8;
/** Of each file; together they bound what is in memory, to 64 MiB. */
const REQUESTS_AHEAD = 8;
const fsyncFile = promisify(fsync);
const PREPARED_TRANSACTIONS_MIN = 64;
const RETRY_DELAYS_MS = [100, 500, 1_000, 2_000, 5_000, 10_000];
/** Beyond the relations: WAL, configuration, file system's own. */
const SPACE_MARGIN_BYTES = 64 * 1024 * 1024;

/**
 * Durable when it resolves. Throws coded errors (`bad-request` for a target that cannot be one, `history-gone` for an LSN that cannot be read
 * any more); what it had written is removed then.
 */
export async function exportBranch(options: BranchExportOptions): Promise<ExportedDirectory> {
  const user = unprivilegedUser();
  const { path: target, isNew } = openTarget(options.target, user);
  const staging = join(target, UNFINISHED_EXPORT);
  mkdirSync(staging, { mode: 0o700 });
  const { platformSecret } = readSecrets(options.dataDirectory);
  const token = await signToken(platformSecret, { scope: 'platform' });
  const pageserver = new PageserverClient({ ...options.file.pageserver, token });
  try {
    const exported = await exportInto({ ...options, target, staging, user, pageserver });
    publish(staging, target);
    return { path: target, ...exported };
  } catch (error) {
    // Should somebody have put a file into the directory meanwhile, it stays.
    rmSync(staging, { recursive: true, force: true });
    if (isNew && readdirSync(target).length === 0) rmdirSync(target);
    throw error;
  } finally {
    await pageserver.close();
  }
}

interface ExportJob extends BranchExportOptions {
  readonly staging: string;
  readonly user: UnixUser | undefined;
  readonly pageserver: PageserverClient;
}

async function exportInto(job: ExportJob): Promise<Omit<ExportedDirectory, 'path'>> {
  const { pageserver, timelineId, lsn, user, staging, superuser, signal } = job;
  const log = createLog({ name: 'export', level: 'silent' });
  const lease = await LsnLease.take(pageserver, timelineId, lsn, { signal, log, kind: 'export' });
  try {
    const lost = lease.lost.then((reason) => {
      throw new StrataError('history-gone', `the branch can no longer be read there: ${reason}`);
    });
    lost.catch(() => {});
    const basebackup = await pageserver.basebackup(timelineId, lsn, BASEBACKUP_TIMEOUT_MS, signal);
    const pgVersion = toPgVersion(basebackup.pgVersion);
    const installation = installationFor(job, pgVersion);
    const totalBytes = basebackup.relations.reduce((sum, { blocks }) => sum + blocks * BLOCK_SIZE, 0);
    assertSpace(staging, totalBytes);
    const systemUsers = systemUsersOf(user);
    const files = new FileWriter(user);
    const controlFile = decodeControlFile(basebackup.controlFile);

    writeSmallFiles(job, basebackup, files);
    const progress = { doneBytes: 0, totalBytes };
    await Promise.race([writeRelations(job, basebackup, pgVersion, files, progress), lost]);
    const prepared = basebackup.files.filter(({ path }) => path.startsWith('pg_twophase/')).length;
    const configuration = vanillaConfiguration({
      pgVersion,
      superuser,
      systemUsers,
      preparedTransactionsMax: Math.max(PREPARED_TRANSACTIONS_MIN, prepared),
      trackCommitTimestamp: basebackup.parameters.trackCommitTimestamp,
    });
    for (const [name, text] of Object.entries(configuration)) files.write(join(staging, name), Buffer.from(text));
    fsyncFolders(staging);
    const settings = {
      max_prepared_transactions: String(Math.max(PREPARED_TRANSACTIONS_MIN, prepared)),
      unix_socket_directories: '',
    };
    await releaseSuperuser({ installation, dataDir: staging, user, settings, signal }, superuser);
    fsyncFolders(staging);
    return {
      pgVersion,
      systemId: controlFile.systemId.toString(),
      relationBytes: totalBytes,
      fileCount: files.count,
      systemUsers,
    };
  } finally {
    lease.release();
  }
}

/** Everything but relations and configuration. */
function writeSmallFiles(job: ExportJob, basebackup: Basebackup, files: FileWriter): void {
  const { staging, user, dataChecksums } = job;
  if (user !== undefined) chownSync(staging, user.uid, user.gid);
  for (const folder of DATA_DIRECTORY_FOLDERS) files.folder(join(staging, folder));
  for (const { db } of basebackup.databases) if (db !== 0) files.folder(join(staging, 'base', String(db)));
  for (const { path, bytes } of basebackup.files) files.write(join(staging, path), bytes);
  const forged = forgeShutdownCheckpoint({
    controlFile: { ...decodeControlFile(basebackup.controlFile), dataChecksumVersion: dataChecksums ? 1 : 0 },
    state: basebackup.checkPoint,
    lsn: basebackup.lsn,
    prevLsn: basebackup.prevRecordLsn,
    time: Math.floor(Date.now() / 1000),
    parameters: basebackup.parameters,
  });
  for (const { name, writes } of forged.segments) {
    files.writeSparse(join(staging, 'pg_wal', name), WAL_SEGMENT_SIZE, writes);
  }
  files.write(join(staging, CONTROL_FILE_PATH), forged.controlFile);
}

async function writeRelations(
  job: ExportJob,
  basebackup: Basebackup,
  pgVersion: PgVersion,
  files: FileWriter,
  progress: { doneBytes: number; readonly totalBytes: number },
): Promise<void> {
  job.onProgress(progress);
  await forEachLimited(relationFiles(basebackup.relations), FILES_AT_ONCE, async ({ relation, segment, blocks }) => {
    const path = join(job.staging, relationSegmentPath({ ...relation, segment }, pgVersion));
    await writeRelationFile(job, path, relation, segment * BLOCKS_PER_SEGMENT, blocks, files, (bytes) => {
      progress.doneBytes += bytes;
      job.onProgress(progress);
    });
  });
}

/** One for each segment; of empty forks their one empty file. */
function* relationFiles(
  relations: readonly BasebackupRelation[],
): Generator<{ relation: BasebackupRelation; segment: number; blocks: number }> {
  for (const relation of relations) {
    let segment = 0;
    do {
      const blocks = Math.min(BLOCKS_PER_SEGMENT, relation.blocks - segment * BLOCKS_PER_SEGMENT);
      yield { relation, segment, blocks };
      segment++;
    } while (segment * BLOCKS_PER_SEGMENT < relation.blocks);
  }
}

async function writeRelationFile(
  job: ExportJob,
  path: string,
  relation: BasebackupRelation,
  firstBlk: number,
  blocks: number,
  files: FileWriter,
  onWritten: (bytes: number) => void,
): Promise<void> {
  const file = files.create(path);
  const request = (at: number): Promise<Buffer> => {
    const pages = readPages(job, relation, firstBlk + at, Math.min(PAGES_PER_REQUEST, blocks - at));
    pages.catch(() => {}); // it is awaited in its turn, or not at all when an earlier one has failed
    return pages;
  };
  try {
    const ahead: Promise<Buffer>[] = [];
    for (let at = 0, asked = 0; at < blocks; at += PAGES_PER_REQUEST) {
      for (; asked < blocks && ahead.length < REQUESTS_AHEAD; asked += PAGES_PER_REQUEST) ahead.push(request(asked));
      const pages = await ahead.shift()!;
      job.signal.throwIfAborted();
      if (job.dataChecksums) {
        for (let page = 0; page * BLOCK_SIZE < pages.length; page++) {
          stampPageChecksum(pages.subarray(page * BLOCK_SIZE, (page + 1) * BLOCK_SIZE), firstBlk + at + page);
        }
      }
      writeFully(file, pages, at * BLOCK_SIZE);
      onWritten(pages.length);
    }
    await fsyncFile(file);
  } finally {
    closeSync(file);
  }
}

/** The pageserver may be started anew meanwhile; reading is repeatable. */
async function readPages(job: ExportJob, relation: BasebackupRelation, blk: number, count: number): Promise<Buffer> {
  const { spc, db, rel, sourceFork } = relation;
  for (let attempt = 0; ; attempt++) {
    try {
      const fork = { spc, db, rel, fork: sourceFork };
      const pages = await job.pageserver.getPages(job.timelineId, fork, blk, count, job.lsn);
      if (pages.length === count * BLOCK_SIZE) return pages;
      throw new StrataError('internal', `${count} pages were asked for, ${pages.length} bytes came`);
    } catch (error) {
      const delayMs = errorTable[toStrataError(error).code].retry ? RETRY_DELAYS_MS[attempt] : undefined;
      if (delayMs === undefined) throw error;
      await sleep(delayMs, undefined, { signal: job.signal });
    }
  }
}

/** Moves what is whole and durable to where it belongs. */
function publish(staging: string, target: string): void {
  const names = readdirSync(staging).filter((name) => name !== 'PG_VERSION');
  for (const name of names) renameSync(join(staging, name), join(target, name));
  fsyncDirectory(target);
  renameSync(join(staging, 'PG_VERSION'), join(target, 'PG_VERSION'));
  rmdirSync(staging);
  fsyncDirectory(target);
}

function openTarget(wanted: string, user: UnixUser | undefined): { path: string; isNew: boolean } {
  const path = resolve(wanted);
  const status = statSync(path, { throwIfNoEntry: false });
  if (status !== undefined && !status.isDirectory()) throw new StrataError('bad-request', `${path} is no directory`);
  if (status !== undefined && readdirSync(path).length > 0) {
    const what = existsSync(join(path, UNFINISHED_EXPORT))
      ? `holds an export that was interrupted: remove it (rm -r ${join(path, UNFINISHED_EXPORT)})`
      : 'is not empty: choose a directory that is empty or not there';
    throw new StrataError('bad-request', `${path} ${what}`);
  }
  if (user !== undefined && !isReachableBy(user, dirname(path))) {
    throw new StrataError(
      'bad-request',
      `Postgres must not run as root, and user ${user.name} cannot enter ${dirname(path)}: choose a directory below one that everybody may enter`,
    );
  }
  try {
    if (status === undefined) makeDirectories(path, 0o700);
    else chmodSync(path, 0o700);
  } catch (error) {
    throw new StrataError('bad-request', `${path} cannot be made: ${toStrataError(error).message}`, { cause: error });
  }
  // Postgres runs as this user when the superuser is made.
  if (user !== undefined) chownSync(path, user.uid, user.gid);
  return { path: realpathSync(path), isNew: status === undefined };
}

function assertSpace(directory: string, bytes: number): void {
  const { bavail, bsize } = statfsSync(directory);
  const needed = bytes + SPACE_MARGIN_BYTES;
  if (bavail * bsize >= needed) return;
  throw new StrataError(
    'bad-request',
    `the export takes ${needed} bytes, and ${directory} has ${bavail * bsize} bytes left`,
  );
}

/** The very binaries that the branch's computes run on. */
function installationFor(job: ExportJob, pgVersion: PgVersion): PostgresInstallation {
  const found = job.file.installations.find((each) => each.pgVersion === pgVersion);
  if (found === undefined) {
    throw new StrataError(
      'bad-request',
      `the platform has no binaries of Postgres ${pgVersion}, which the branch is of`,
    );
  }
  return reachableInstallation({ ...found, pgVersion }, job.user, runDirectoryOf(job.dataDirectory));
}

/** Who runs the exported Postgres; root may become that user anyway. */
function systemUsersOf(user: UnixUser | undefined): readonly string[] {
  return user === undefined ? [userInfo().username] : [user.name, 'root'];
}

function fsyncFolders(root: string): void {
  for (const entry of readdirSync(root, { recursive: true, withFileTypes: true })) {
    if (entry.isDirectory()) fsyncDirectory(join(entry.parentPath, entry.name));
  }
  fsyncDirectory(root);
}

function writeFully(file: number, bytes: Buffer, position: number): void {
  for (let at = 0; at < bytes.length;) at += writeSync(file, bytes, at, bytes.length - at, position + at);
}

/** Durable files and folders of the user that runs Postgres, 0600 and 0700. Folders are synced at the end. */
class FileWriter {
  readonly #user: UnixUser | undefined;
  count = 0;

  constructor(user: UnixUser | undefined) {
    this.#user = user;
  }

  folder(path: string): void {
    mkdirSync(path, { mode: 0o700 });
    if (this.#user !== undefined) chownSync(path, this.#user.uid, this.#user.gid);
  }

  /** An empty file, open; the caller syncs and closes it. */
  create(path: string): number {
    const file = openSync(path, 'wx', 0o600);
    this.count++;
    if (this.#user !== undefined) chownSync(path, this.#user.uid, this.#user.gid);
    return file;
  }

  write(path: string, bytes: Buffer): void {
    this.writeSparse(path, bytes.length, [{ offset: 0, bytes }]);
  }

  writeSparse(
    path: string,
    length: number,
    writes: readonly { readonly offset: number; readonly bytes: Buffer }[],
  ): void {
    const file = this.create(path);
    try {
      ftruncateSync(file, length);
      for (const { offset, bytes } of writes) writeFully(file, bytes, offset);
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
  }
}
