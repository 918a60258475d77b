/**
 * Postgres' own client programs, as the machine has them: pg_dump, pg_restore and psql of one version, side by side. (npm's builds of Postgres
 * bring the server only.) A pg_dump reads servers of its own version and older ones.
 */
import { execFile } from 'node:child_process';
import { existsSync, readdirSync, realpathSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { CliError } from './errors.ts';

export interface PgPrograms {
  readonly binDir: string;
  readonly major: number;
}

const PROGRAMS = ['pg_dump', 'pg_restore', 'psql'];
/** Where distributions put each version by itself. */
const VERSION_FOLDERS = [
  { parent: '/usr/lib/postgresql', bin: (name: string) => `${name}/bin` },
  { parent: '/usr', bin: (name: string) => (/^pgsql-\d+$/.test(name) ? `${name}/bin` : undefined) },
];
const run = promisify(execFile);

/** All that are found, oldest first. `named`: a pg_dump, or its folder; then that is the only one. Throws with the next step when there is none. */
export async function findPgPrograms(named: string | undefined, path: string | undefined): Promise<PgPrograms[]> {
  if (named !== undefined) {
    const binDir = statSync(named, { throwIfNoEntry: false })?.isDirectory() === true ? named : dirname(named);
    const missing = PROGRAMS.find((name) => !existsSync(join(binDir, name)));
    if (missing !== undefined) {
      throw new CliError(
        `${binDir} has no ${missing}: --pg-dump must name a pg_dump beside its pg_restore and psql`,
        2,
      );
    }
    return [await versionOf(binDir)];
  }
  const folders = VERSION_FOLDERS.flatMap(({ parent, bin }) =>
    existsSync(parent)
      ? readdirSync(parent)
          .flatMap((name) => bin(name) ?? [])
          .map((name) => join(parent, name))
      : [],
  );
  const all = [...folders, ...(path ?? '').split(':').filter((folder) => folder !== '')];
  const withPrograms = all.filter((folder) => PROGRAMS.every((name) => existsSync(join(folder, name))));
  const found = await Promise.all([...new Set(withPrograms.map((folder) => realpathSync(folder)))].map(versionOf));
  if (found.length === 0) {
    throw new CliError(
      'importing from a server needs pg_dump, pg_restore and psql: install them ("apt install postgresql-client"), or name a pg_dump with --pg-dump',
    );
  }
  return found.sort((a, b) => a.major - b.major);
}

/** The oldest that reads servers of that major. */
export function programsFor(found: readonly PgPrograms[], serverMajor: number): PgPrograms {
  const fitting = found.find(({ major }) => major >= serverMajor);
  if (fitting !== undefined) return fitting;
  const have = found.map(({ major, binDir }) => `${major} in ${binDir}`).join(', ');
  throw new CliError(
    `the server is Postgres ${serverMajor}, and pg_dump of that or a later version is needed (found: ${have}): install it ("apt install postgresql-client-${serverMajor}"; where Debian has none, add the repository of apt.postgresql.org), or name one with --pg-dump; or stop the server and import its directory with --pgdata`,
  );
}

async function versionOf(binDir: string): Promise<PgPrograms> {
  const program = join(binDir, 'pg_dump');
  const { stdout } = await run(program, ['--version']).catch((error: unknown) => {
    throw new CliError(`${program} cannot be run: ${error instanceof Error ? error.message : String(error)}`);
  });
  const major = Number(/\(PostgreSQL\) (\d+)/.exec(stdout)?.[1]);
  if (!Number.isInteger(major)) throw new CliError(`${program} does not say its version: ${stdout.trim()}`);
  return { binDir, major };
}
