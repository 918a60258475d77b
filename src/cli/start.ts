/**
 * `strata start`: its options, checked. What starting is, the caller of the program says.
 */
import { Command, InvalidArgumentError } from 'commander';
import { MIN_WAL_LIMIT_BYTES } from '../api/backpressure-limits.ts';
import { PG_VERSIONS } from '../postgres/version.ts';
import { DEFAULT_SUSPEND_TIMEOUT_SECONDS } from '../api/control.ts';
import { CliError } from './errors.ts';
import { wholeNumber } from './numbers.ts';
import { chooseDataDirectory } from './platform.ts';

export interface StartOptions {
  readonly dataDir: string;
  readonly pgPort: number;
  readonly httpPort: number;
  /** Undefined: as many as there are, 3 at the first start. */
  readonly safekeeperCount?: number;
  /** Of new projects; undefined: that of pgBinDir, else the platform's default. */
  readonly pgVersion: number | undefined;
  readonly pgBinDir: string | undefined;
  /** -1: never. */
  readonly suspendTimeoutSeconds: number;
  /** Path or URL; undefined: the one that was used before, else in the data directory. */
  readonly objectStore?: string;
  /** An empty object store takes the place of one whose content is lost. */
  readonly refillObjectStore: boolean;
  /** How much of the object store the pageserver keeps on the local disk; undefined: its default. */
  readonly cacheBytes?: number;
  /** How much WAL of one branch may wait on safekeepers' disks before its commits do; undefined: the default. */
  readonly walLimitBytes?: number;
}

export const DEFAULT_PG_PORT = 55432;
export const DEFAULT_HTTP_PORT = 55480;
const MAX_SUSPEND_TIMEOUT_SECONDS = 604_800;
const SAFEKEEPER_COUNTS = [1, 3, 5, 7];

interface GivenOptions {
  readonly dataDir?: string;
  readonly pgPort: number;
  readonly httpPort: number;
  readonly safekeepers?: number;
  readonly pgVersion?: number;
  readonly pgBinDir?: string;
  readonly suspendTimeout: number;
  readonly objectStore?: string;
  readonly refillObjectStore: boolean;
  readonly cacheSize?: number;
  readonly walLimit?: number;
}

export function startCommand(environment: NodeJS.ProcessEnv, start: (options: StartOptions) => Promise<void>): Command {
  return new Command('start')
    .description('start the platform in the foreground; Ctrl-C stops it, the data stays')
    .option('--data-dir <directory>', 'where everything is kept (default: STRATA_DATA_DIR, else .strata)')
    .option('--pg-port <port>', 'port for Postgres clients', wholeNumber(1, 65_535), DEFAULT_PG_PORT)
    .option('--http-port <port>', 'port of the API', wholeNumber(1, 65_535), DEFAULT_HTTP_PORT)
    .option(
      '--safekeepers <count>',
      'how many processes keep the WAL; a majority makes a commit (default: as many as there are, 3 at the first start)',
      oneOf(SAFEKEEPER_COUNTS),
    )
    .option(
      '--pg-version <major>',
      `Postgres of new projects: ${PG_VERSIONS.join(', ')} (default: 17, or that of --pg-bin-dir)`,
      oneOf(PG_VERSIONS),
    )
    .option('--pg-bin-dir <directory>', 'use the Postgres installed there instead of the one from npm')
    .option(
      '--suspend-timeout <seconds>',
      'suspend an endpoint that is idle for so long; -1: never',
      suspendTimeout,
      DEFAULT_SUSPEND_TIMEOUT_SECONDS,
    )
    .option(
      '--object-store <url>',
      'where history is kept for good: a directory, or s3://bucket/prefix?endpoint=… (default: the one used before, else in the data directory)',
      notEmpty,
    )
    .option(
      '--refill-object-store',
      'the object store’s content is lost: take the empty one that is there, and fill it with what the local disk still has',
      false,
    )
    .option(
      '--cache-size <size>',
      'local disk for what is in the object store, for example 20GB (default: 64GB)',
      sizeInBytes,
    )
    .option(
      '--wal-limit <size>',
      'WAL of one branch that may wait on the safekeepers’ disks until its pages are in the object store, for example 4GB; its commits are slowed from a quarter of it on, and wait at it (default: 16GB)',
      walLimit,
    )
    .addHelpText('after', '\nExample:\n  $ strata start --data-dir ~/strata --pg-port 5433')
    .action(async (given: GivenOptions) => {
      if (given.pgPort === given.httpPort) {
        throw new CliError(`--pg-port and --http-port are both ${given.pgPort}: choose two ports`, 2);
      }
      await start({
        dataDir: chooseDataDirectory(given.dataDir, environment),
        pgPort: given.pgPort,
        httpPort: given.httpPort,
        ...(given.safekeepers === undefined ? {} : { safekeeperCount: given.safekeepers }),
        pgVersion: given.pgVersion,
        pgBinDir: given.pgBinDir,
        suspendTimeoutSeconds: given.suspendTimeout,
        ...(given.objectStore === undefined ? {} : { objectStore: given.objectStore }),
        refillObjectStore: given.refillObjectStore,
        ...(given.cacheSize === undefined ? {} : { cacheBytes: given.cacheSize }),
        ...(given.walLimit === undefined ? {} : { walLimitBytes: given.walLimit }),
      });
    });
}

function oneOf(values: readonly number[]): (text: string) => number {
  return (text) => {
    const value = values.find((each) => String(each) === text);
    if (value !== undefined) return value;
    throw new InvalidArgumentError(`It must be one of ${values.join(', ')}.`);
  };
}

function notEmpty(text: string): string {
  if (text !== '') return text;
  throw new InvalidArgumentError('It must not be empty.');
}

const UNITS = { KB: 1024, MB: 1024 ** 2, GB: 1024 ** 3, TB: 1024 ** 4 } as const;

function sizeInBytes(text: string): number {
  const match = /^(\d+) ?([KMGT]B)$/i.exec(text);
  if (match === null) throw new InvalidArgumentError('It must be a number with a unit, for example 500MB or 20GB.');
  const bytes = Number(match[1]) * UNITS[match[2]!.toUpperCase() as keyof typeof UNITS];
  if (!Number.isSafeInteger(bytes)) throw new InvalidArgumentError('That is more than any disk has.');
  return bytes;
}

function walLimit(text: string): number {
  const bytes = sizeInBytes(text);
  if (bytes >= MIN_WAL_LIMIT_BYTES) return bytes;
  const minimum = `${MIN_WAL_LIMIT_BYTES / UNITS.GB}GB`;
  throw new InvalidArgumentError(
    `It must be at least ${minimum}: less would slow a branch that only waits for its next upload.`,
  );
}

function suspendTimeout(text: string): number {
  const value = wholeNumber(-1, MAX_SUSPEND_TIMEOUT_SECONDS)(text);
  if (value !== 0) return value;
  throw new InvalidArgumentError('It must be 1 or more, or -1 for never.');
}
