/**
 * `strata import`: a new project from a data directory of a stopped Postgres (import-pgdata.ts), or a database of a running one into a new
 * project or a branch (import-from.ts).
 */
import type { Command } from 'commander';
import { type CliContext, type CommonOptions, platformCommand } from './context.ts';
import { CliError } from './errors.ts';
import { importFromServer } from './import-from.ts';
import { importDataDirectory } from './import-pgdata.ts';

export interface ImportOptions extends CommonOptions {
  readonly pgdata?: string;
  readonly from?: string;
  readonly name?: string;
  readonly pgVersion?: string;
  readonly role?: string;
  readonly project?: string;
  readonly branch?: string;
  readonly database?: string;
  readonly intoNonempty: boolean;
  readonly pgDump?: string;
  readonly keep: boolean;
}

const NOTES = `
--from copies one database of any server that pg_dump reads into a new project, or into --project and --branch. pg_dump must be of the server's version
or a later one. Everything belongs to the project's owner then; roles are not copied. What an owner who is no superuser cannot have (some
extensions, event triggers, grants to roles that do not exist, …) is listed at the end; lost data is an error, and the new project is removed
again. Leave the password to PGPASSWORD or ~/.pgpass, or give the connection string on standard input (--from -).

--pgdata takes a cluster of Postgres 15 to 18 that was stopped cleanly, and reads its pages as they are; the directory is not changed. All of
its databases and roles are in the new project. Roles keep their passwords (SCRAM); the project's owner (--role) gets a new one. The
superusers of the cluster have the rights of an owner there: the platform's own role is the only superuser. What is not as it was is listed at the end.

Examples:
  $ strata import --from postgresql://me@db.example.com/shop --name shop
  $ strata import --pgdata /var/lib/postgresql/17/main --name shop`;

export function importCommand(context: CliContext): Command {
  return platformCommand('import', 'bring in a Postgres that was elsewhere', 'import --pgdata ./data')
    .option('--from <connection string>', 'database to dump and restore; - reads it from standard input')
    .option('--pgdata <directory>', 'data directory of a Postgres that was stopped cleanly')
    .option('--name <name>', 'name of the new project (default: its id)')
    .option('--role <name>', 'role that owns the project (default: stratadb_owner)')
    .option('--pg-version <major>', 'with --from: Postgres of the new project (default: the server’s)')
    .option('--project <project>', 'with --from: restore into this project')
    .option('--branch <branch>', 'with --from: restore into this branch')
    .option('--database <name>', 'with --from: database to restore into (default: as it is called there)')
    .option('--into-nonempty', 'with --from: restore into a database that is not empty', false)
    .option('--pg-dump <path>', 'with --from: pg_dump to use, with its pg_restore and psql beside it')
    .option('--keep', 'leave what there is of the new project when the import fails', false)
    .addHelpText('after', NOTES)
    .action(async (options: ImportOptions) => {
      const { pgdata, from } = options;
      if (pgdata !== undefined && from !== undefined) {
        throw new CliError('--from and --pgdata exclude each other: give one of them', 2);
      }
      if (pgdata !== undefined) {
        refuseForPgdata(options);
        await importDataDirectory(context, { ...options, pgdata });
      } else if (from !== undefined) {
        await importFromServer(context, { ...options, from: from === '-' ? await readLine() : from });
      } else {
        throw new CliError('say what to import: --from <connection string> or --pgdata <directory>', 2);
      }
    });
}

function refuseForPgdata(options: ImportOptions): void {
  for (const name of ['pgVersion', 'project', 'branch', 'database', 'pgDump'] as const) {
    if (options[name] === undefined) continue;
    const flag = name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
    throw new CliError(`--${flag} is for --from: a data directory is always a new project, of its own version`, 2);
  }
}

async function readLine(): Promise<string> {
  let text = '';
  for await (const chunk of process.stdin.setEncoding('utf8')) text += String(chunk);
  return text.trim();
}
