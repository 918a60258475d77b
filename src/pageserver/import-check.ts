/**
 * What a directory must be to be imported: a data directory of a supported vanilla Postgres, stopped cleanly, that nobody starts meanwhile. Each
 * refusal says what to do. What can be imported but will not be as it was is a note.
 */

import { lstatSync, readFileSync, readdirSync, readlinkSync, statSync } from 'node:fs';
import { join } from 'node:path';

import {
  CONTROL_FILE_PATH,
  ControlFileError,
  DB_SHUTDOWNED,
  DB_SHUTDOWNED_IN_RECOVERY,
  decodeControlFile,
} from '../postgres/control-file.ts';
import type { ControlFile } from '../postgres/control-file.ts';
import { WAL_SEGMENT_SIZE, formatLsn, segmentOffset, segmentStart, walFileName } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { parseRelationPath } from '../postgres/relation.ts';
import { PG_VERSIONS } from '../postgres/version.ts';
import type { PgVersion } from '../postgres/version.ts';
import { WalError } from '../postgres/wal/error.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import type { WalRecord } from '../postgres/wal/record.ts';

export interface StoppedCluster {
  /** Where the shutdown checkpoint's record ends: the LSN of all keys. */
  readonly lsn: Lsn;
  /** Where that record starts. */
  readonly recordStartLsn: Lsn;
  readonly pgVersion: PgVersion;
  readonly systemId: bigint;
  readonly controlFile: ControlFile;
  /** The file global/pg_control. */
  readonly controlBytes: Buffer;
  /** Of its relation files. */
  readonly relationBytes: number;
  /** What will not be as it was, for people. */
  readonly notes: readonly string[];
}

/** The data directory cannot be imported; the message says why. */
export class ImportError extends Error {
  override name = 'ImportError';
}

/** What Postgres reads at its start instead of, or after, the control file's checkpoint. */
const RECOVERY_FILES = ['backup_label', 'tablespace_map', 'recovery.signal', 'standby.signal'];
const BOOTSTRAP_SUPERUSER_OID = 10;
const STOP_CLEANLY = 'start it once with its own Postgres and stop it (pg_ctl stop -m fast)';

/** Reads what says whether the directory can be imported; nothing of its size but the names of its files. Throws ImportError. */
export function inspectDataDirectory(dataDir: string): StoppedCluster {
  try {
    return inspect(dataDir);
  } catch (error) {
    const { code, path } = error as NodeJS.ErrnoException;
    if (code === 'EACCES' || code === 'EPERM') {
      throw new ImportError(`${path ?? dataDir} cannot be read: let the user that runs the platform read it`, {
        cause: error,
      });
    }
    if (code === 'ENOENT') throw new ImportError(`${path ?? dataDir} is missing`, { cause: error });
    throw error;
  }
}

/** Throws ImportError when the cluster was started since it was inspected. */
export function assertStillStopped(dataDir: string, cluster: StoppedCluster): void {
  assertNotRunning(dataDir);
  if (readFileSync(join(dataDir, CONTROL_FILE_PATH)).equals(cluster.controlBytes)) return;
  throw new ImportError(`${dataDir} was started while it was imported: stop it and import it again`);
}

function inspect(dataDir: string): StoppedCluster {
  const version = readVersion(dataDir);
  if (!PG_VERSIONS.some((supported) => String(supported) === version)) {
    const next = 'import it by its connection string (--from), or pg_upgrade it first';
    throw new ImportError(
      `${dataDir} is of Postgres ${version}; data directories of ${PG_VERSIONS.join(', ')} can be imported: ${next}`,
    );
  }
  assertNotRunning(dataDir);
  const controlBytes = readFileSync(join(dataDir, CONTROL_FILE_PATH));
  const controlFile = readControlFile(dataDir, controlBytes);
  if (controlFile.state === DB_SHUTDOWNED_IN_RECOVERY) {
    throw new ImportError(`${dataDir} is a standby: promote it (pg_ctl promote), and stop it then`);
  }
  if (controlFile.state !== DB_SHUTDOWNED) {
    throw new ImportError(
      `${dataDir} was not stopped cleanly (its control file says state ${controlFile.state}): ${STOP_CLEANLY}`,
    );
  }
  for (const name of RECOVERY_FILES) {
    if (!exists(join(dataDir, name))) continue;
    throw new ImportError(
      `${dataDir} has a file ${name}, so its next start would be a recovery: ${STOP_CLEANLY} before it is imported`,
    );
  }
  refuseTablespaces(dataDir);
  refusePreparedBySuperuser(dataDir);
  return {
    ...checkpointPosition(dataDir, controlFile),
    pgVersion: controlFile.version,
    systemId: controlFile.systemId,
    controlFile,
    controlBytes,
    relationBytes: relationBytes(dataDir),
    notes: notesOf(dataDir, controlFile),
  };
}

function readVersion(dataDir: string): string {
  if (statSync(dataDir, { throwIfNoEntry: false })?.isDirectory() !== true) {
    throw new ImportError(`there is no directory ${dataDir}`);
  }
  if (!exists(join(dataDir, 'PG_VERSION'))) {
    throw new ImportError(`${dataDir} is no data directory of Postgres: it has no file PG_VERSION`);
  }
  return readFileSync(join(dataDir, 'PG_VERSION'), 'utf8').trim();
}

function assertNotRunning(dataDir: string): void {
  const path = join(dataDir, 'postmaster.pid');
  if (!exists(path)) return;
  const pid = Number(readFileSync(path, 'utf8').split('\n')[0]);
  const stop = `stop it first (pg_ctl -D ${dataDir} stop -m fast)`;
  if (Number.isInteger(pid) && pid > 0 && isAlive(pid)) {
    throw new ImportError(`a Postgres runs on ${dataDir} (process ${pid}): ${stop}`);
  }
  throw new ImportError(
    `${dataDir} has a postmaster.pid of process ${pid}, which is gone: it was not stopped cleanly; ${STOP_CLEANLY}`,
  );
}

function readControlFile(dataDir: string, bytes: Buffer): ControlFile {
  try {
    return decodeControlFile(bytes);
  } catch (error) {
    if (error instanceof ControlFileError) throw new ImportError(`${dataDir}: ${error.message}`, { cause: error });
    throw error;
  }
}

function refuseTablespaces(dataDir: string): void {
  const directory = join(dataDir, 'pg_tblspc');
  const found = readdirSync(directory).map((name) => {
    const isLink = lstatSync(join(directory, name)).isSymbolicLink();
    return isLink ? `${name} in ${readlinkSync(join(directory, name))}` : name;
  });
  if (found.length === 0) return;
  throw new ImportError(
    `${dataDir} has tablespaces of its own (${found.join(', ')}), which are not supported: move what is in them to pg_default (ALTER DATABASE … SET TABLESPACE, ALTER TABLE ALL IN TABLESPACE …) and drop them`,
  );
}

/**
 * A prepared transaction can be finished by who prepared it, or by a superuser. The bootstrap superuser is nobody's to be here. (xl_xact_prepare in
 * src/include/access/xact.h: owner is at byte 24, the length of the gid at 54, the gid at 72.)
 */
function refusePreparedBySuperuser(dataDir: string): void {
  const directory = join(dataDir, 'pg_twophase');
  const gids = readdirSync(directory).flatMap((name) => {
    const bytes = readFileSync(join(directory, name));
    if (bytes.length < 72 || bytes.readUInt32LE(24) !== BOOTSTRAP_SUPERUSER_OID) return [];
    return [bytes.toString('utf8', 72, 72 + Math.max(0, bytes.readUInt16LE(54) - 1))];
  });
  if (gids.length === 0) return;
  throw new ImportError(
    `${dataDir} has transactions that its superuser has prepared (${gids.join(', ')}), which nobody could finish here: start it, COMMIT PREPARED or ROLLBACK PREPARED them, and stop it`,
  );
}

function checkpointPosition(dataDir: string, controlFile: ControlFile): { lsn: Lsn; recordStartLsn: Lsn } {
  const { version, checkPoint, checkPointCopy } = controlFile;
  const reader = new WalReader(checkPoint, version, { anyTimeline: true });
  let record: WalRecord | undefined;
  try {
    for (let lsn = checkPoint; record === undefined; lsn = segmentStart(lsn) + WAL_SEGMENT_SIZE) {
      const path = join(dataDir, 'pg_wal', walFileName(checkPointCopy.timelineId, lsn));
      reader.push(lsn, readFileSync(path).subarray(segmentOffset(lsn)));
      record = reader.next();
    }
  } catch (error) {
    if (!(error instanceof WalError)) throw error;
    throw new ImportError(`the WAL of ${dataDir} is damaged: ${error.message}`, { cause: error });
  }
  if (record.startLsn !== checkPoint) {
    throw new ImportError(`${dataDir} has no checkpoint record at ${formatLsn(checkPoint)}`);
  }
  return { lsn: record.endLsn, recordStartLsn: record.startLsn };
}

function relationBytes(dataDir: string): number {
  let bytes = 0;
  const directories = readdirSync(join(dataDir, 'base'))
    .filter((name) => /^\d+$/.test(name))
    .map((name) => `base/${name}`);
  for (const directory of ['global', ...directories]) {
    for (const name of readdirSync(join(dataDir, directory))) {
      if (parseRelationPath(`${directory}/${name}`) === undefined) continue;
      bytes += statSync(join(dataDir, directory, name)).size;
    }
  }
  return bytes;
}

function notesOf(dataDir: string, controlFile: ControlFile): string[] {
  const notes: string[] = [];
  if (controlFile.dataChecksumVersion !== 0) {
    notes.push('data checksums: every page is verified, and then carries none (layers have checksums of their own)');
  }
  const libraries = preloadedLibraries(dataDir);
  if (libraries.length > 0) {
    notes.push(`shared_preload_libraries is not carried over: ${libraries.join(', ')}`);
  }
  const slots = readdirSync(join(dataDir, 'pg_replslot'));
  if (slots.length > 0) notes.push(`replication slots are not carried over: ${slots.join(', ')}`);
  notes.push(
    'settings (postgresql.conf, ALTER SYSTEM) and pg_hba.conf are not carried over; those of roles and databases are',
  );
  return notes;
}

/** As far as the files in the directory say. */
function preloadedLibraries(dataDir: string): string[] {
  let value = '';
  for (const name of ['postgresql.conf', 'postgresql.auto.conf']) {
    const path = join(dataDir, name);
    if (!exists(path)) continue;
    for (const [, text] of readFileSync(path, 'utf8').matchAll(
      /^\s*shared_preload_libraries\s*=?\s*('[^']*'|[^\s#]*)/gim,
    )) {
      value = text!.replaceAll("'", '');
    }
  }
  return value
    .split(',')
    .map((library) => library.trim())
    .filter((library) => library !== '');
}

function exists(path: string): boolean {
  return lstatSync(path, { throwIfNoEntry: false }) !== undefined;
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
