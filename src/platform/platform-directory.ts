/**
 * The platform's data directory:
 *
 *   lock            held while the platform runs
 *   secrets.json    platform secret (signs tokens), admin password, encryption key of stored passwords; 0600
 *   api-key         the first API key; 0600
 *   platform.json   where the running platform listens (api/control.ts)
 *   state.db        the control plane's state
 *   tls/            the proxy's certificate and key
 *   logs/           one file per process
 *   pageserver/     safekeeper-N/    what those services keep
 *   object-store/   every branch's history, unless it is elsewhere (platform/object-store.ts)
 *   computes/       one folder per endpoint: a cache (may lie elsewhere, see `computesDir`)
 *
 * Postgres runs unprivileged and its sockets' paths must be short, so sockets, and whatever Postgres must reach that it cannot reach here, lie in a *run
 * directory* in the system's temporary folder. Nothing there is needed after a restart.
 */
import { createHash, randomBytes } from 'node:crypto';
import { chownSync, existsSync, lstatSync, mkdirSync, readFileSync, realpathSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { writeFileDurably } from '../base/durable-file.ts';
import { StrataError } from '../base/errors.ts';
import { STATE_FILE_NAME } from '../control/state.ts';
import { assertWritable, isReachableBy, type UnixUser } from '../compute/installation.ts';

export interface Secrets {
  /** Signs the tokens between the platform's parts; 32 bytes. */
  readonly platformSecret: Buffer;
  /** Password of the platform's superuser in every cluster. */
  readonly adminPassword: string;
}

export interface PlatformDirectory {
  readonly path: string;
  readonly logsDir: string;
  /** Folder for computes' data directories: inside `path` when Postgres can reach it. */
  readonly computesDir: string;
  /** Short path for sockets and staged binaries; Postgres can enter it. */
  readonly runDir: string;
}

const SECRET_BYTES = 32;
const SECRETS_FILE_NAME = 'secrets.json';

/** Creates what is missing. Throws `bad-request` when the directory cannot be used. */
export function openPlatformDirectory(dataDir: string, postgresUser: UnixUser | undefined): PlatformDirectory {
  // Others may pass through (to the computes' folder, which Postgres must reach) but list nothing; every secret inside is 0600 or in a 0700 folder.
  assertWritable(dataDir, postgresUser === undefined ? 0o700 : 0o711);
  const path = realpathSync(resolve(dataDir));
  assertNoCluster(path);
  const runDir = openRunDirectory(path, postgresUser);
  const reachable = postgresUser === undefined || isReachableBy(postgresUser, path);
  const computesDir = join(reachable ? path : runDir, 'computes');
  const logsDir = join(path, 'logs');
  mkdirSync(logsDir, { recursive: true, mode: 0o700 });
  mkdirSync(computesDir, { recursive: true, mode: 0o711 });
  return { path, logsDir, computesDir, runDir };
}

/** The likeliest wrong directory is one of the Postgres whose data is to be brought in. */
function assertNoCluster(path: string): void {
  if (!existsSync(join(path, 'PG_VERSION'))) return;
  throw new StrataError(
    'bad-request',
    `${path} is a data directory of Postgres: choose another with --data-dir; "strata import --pgdata" brings it in then`,
  );
}

/** The secrets, made at first start. Throws `conflict` when they are lost or damaged: with others no branch would wake. */
export function loadOrMakeSecrets(directory: PlatformDirectory): Secrets {
  const file = join(directory.path, SECRETS_FILE_NAME);
  if (!existsSync(file)) {
    if (existsSync(join(directory.path, STATE_FILE_NAME))) throw secretsError(file, 'is missing');
    const made = {
      version: 1,
      platformSecret: randomBytes(SECRET_BYTES).toString('hex'),
      adminPassword: randomBytes(SECRET_BYTES).toString('hex'),
    };
    writeFileDurably(file, `${JSON.stringify(made, undefined, 2)}\n`, 0o600);
  }
  return readSecrets(directory.path);
}

/** The secrets of a platform that has been started before. Only its own user can read them. */
export function readSecrets(dataDirectory: string): Secrets {
  const file = join(dataDirectory, SECRETS_FILE_NAME);
  const text = readFileSync(file, 'utf8');
  let found: { platformSecret?: unknown; adminPassword?: unknown };
  try {
    found = JSON.parse(text) as typeof found;
  } catch (error) {
    throw secretsError(file, 'is damaged', error);
  }
  const { platformSecret, adminPassword } = found;
  if (typeof platformSecret !== 'string' || typeof adminPassword !== 'string') throw secretsError(file, 'is damaged');
  return { platformSecret: Buffer.from(platformSecret, 'hex'), adminPassword };
}

function secretsError(file: string, what: string, cause?: unknown): StrataError {
  const why = 'it has the password that every branch knows, and without it none wakes';
  return new StrataError('conflict', `${file} ${what}: bring it back from a copy (${why})`, { cause });
}

/** The run directory of a platform whose data directory this is. */
export function runDirectoryOf(dataDirectory: string): string {
  const name = createHash('sha256').update(realpathSync(dataDirectory)).digest('hex').slice(0, 12);
  return join(tmpdir(), `strata-${process.geteuid?.() ?? 0}-${name}`);
}

function openRunDirectory(dataDir: string, postgresUser: UnixUser | undefined): string {
  const path = runDirectoryOf(dataDir);
  mkdirSync(path, { recursive: true, mode: 0o711 });
  const status = lstatSync(path);
  if (!status.isDirectory() || status.uid !== process.geteuid?.()) {
    throw new StrataError(
      'bad-request',
      `${path} is not a folder of ours: remove it, or set TMPDIR to a folder of your own`,
    );
  }
  if (postgresUser !== undefined && !isReachableBy(postgresUser, path)) {
    throw new StrataError(
      'bad-request',
      `user ${postgresUser.name}, who runs Postgres, cannot enter ${path}: set TMPDIR to a folder that everybody may enter`,
    );
  }
  return path;
}

/** Creates a folder owned by the user that runs Postgres, mode 0700. */
export function makeFolderFor(user: UnixUser | undefined, path: string): void {
  mkdirSync(path, { recursive: true, mode: 0o700 });
  if (user !== undefined) chownSync(path, user.uid, user.gid);
}

/** What the system says of a disk without space names no place. */
export function withPlace(error: unknown, dataDirectory: string): unknown {
  if (!(error instanceof Error) || !/\b(ENOSPC|EDQUOT)\b/.test(error.message)) return error; // A service's has no other code.
  const where = `${resolve(dataDirectory)} or ${tmpdir()}`;
  const next = 'make room there, or name others with --data-dir and TMPDIR';
  return new StrataError('unavailable', `there is no space left in ${where}: ${next} (${error.message})`, {
    cause: error,
  });
}
