/** `strata connection-string` and `strata psql`. */
import type { Command } from 'commander';
import {
  type CliContext,
  type ProjectOptions,
  type ProjectScope,
  openProject,
  projectCommand,
  show,
} from './context.ts';
import { type Database, findBranch, listBranches } from './entities.ts';
import { CliError } from './errors.ts';

interface ConnectOptions extends ProjectOptions {
  readonly role?: string;
  readonly database?: string;
}

export function connectionStringCommand(context: CliContext): Command {
  const command = projectCommand(
    'connection-string',
    'print the connection string of a branch',
    'connection-string dev',
  );
  return withTarget(command).action(async (wanted: string | undefined, options: ConnectOptions) => {
    const uri = await connectionUri(await openProject(context, options), wanted, options);
    show(context, options, { connection_uri: uri }, () => uri);
  });
}

/** `psqlArguments`: what stood after `--` on the command line. Resolves to psql's exit code through `setExitCode`. */
export function psqlCommand(
  context: CliContext,
  psqlArguments: readonly string[],
  setExitCode: (code: number) => void,
): Command {
  const command = projectCommand('psql', 'open psql on a branch', "psql dev -- -c 'SELECT 1'");
  return withTarget(command)
    .usage('[options] [branch] [-- psql arguments]')
    .configureOutput({
      outputError: (text, write) => {
        const isUnknown = text.startsWith('error: unknown option');
        write(isUnknown ? `${text}(what is for psql comes after "--": strata psql main -- -c 'SELECT 1')\n` : text);
      },
    })
    .action(async (wanted: string | undefined, options: ConnectOptions) => {
      const uri = await connectionUri(await openProject(context, options), wanted, options);
      // In the environment, as everybody on the machine can read arguments.
      const environment = { ...context.environment, ...psqlEnvironment(uri) };
      const code = await context.runProgram('psql', psqlArguments, environment);
      if (code === undefined) {
        throw new CliError(
          'psql is not on PATH: install it ("apt install postgresql-client", "brew install libpq"), or use another client with "strata connection-string"',
        );
      }
      setExitCode(code);
    });
}

function withTarget(command: Command): Command {
  return command
    .argument('[branch]', 'name or id (default: the default branch)')
    .option('--role <name>', 'role to connect as (default: the owner of the database)')
    .option('--database <name>', 'database to connect to (default: the first one)');
}

export async function connectionUri(
  scope: ProjectScope,
  wanted: string | undefined,
  options: Pick<ConnectOptions, 'role' | 'database'>,
): Promise<string> {
  const { api, project } = scope;
  const branch = findBranch(await listBranches(api, project), wanted);
  const { databases } = await api.get<{ databases: Database[] }>(
    `/projects/${project.id}/branches/${branch.id}/databases`,
  );
  const known = databases.find((each) => each.name === options.database) ?? databases[0];
  const databaseName = options.database ?? known?.name;
  const roleName = options.role ?? known?.owner_name;
  if (databaseName === undefined || roleName === undefined) {
    throw new CliError(`branch ${branch.name} has no database: say --database and --role`);
  }
  const query = new URLSearchParams({ branch_id: branch.id, database_name: databaseName, role_name: roleName });
  return (await api.get<{ uri: string }>(`/projects/${project.id}/connection_uri?${query.toString()}`)).uri;
}

/** A connection string as libpq's environment variables. */
export function psqlEnvironment(uri: string): Record<string, string> {
  const url = new URL(uri);
  return {
    PGHOST: url.hostname.replace(/^\[|\]$/g, ''),
    PGPORT: url.port,
    PGUSER: decodeURIComponent(url.username),
    PGPASSWORD: decodeURIComponent(url.password),
    PGDATABASE: decodeURIComponent(url.pathname.slice(1)),
    PGSSLMODE: url.searchParams.get('sslmode') ?? 'require',
    PGOPTIONS: url.searchParams.get('options') ?? '',
  };
}
