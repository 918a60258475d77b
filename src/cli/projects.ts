/** `strata projects create | list | update | delete`. */
import { Command, InvalidArgumentError } from 'commander';
import { RETENTION_MS } from '../api/retention.ts';
import { type CliContext, type CommonOptions, openPlatform, platformCommand, show } from './context.ts';
import { type Project, findProject, listProjects } from './entities.ts';
import { CliError } from './errors.ts';
import { formatAgo, formatFields, formatTable } from './format.ts';

const HISTORY = 'for how long its history is kept, from 6h to 30d';
const HOUR_SECONDS = 3600;

interface CreateOptions extends CommonOptions {
  readonly name?: string;
  readonly history?: number;
  readonly pgVersion?: string;
  readonly role?: string;
  readonly database?: string;
}

interface CreatedProject {
  readonly project: Project;
  readonly connection_uris: readonly { readonly connection_uri: string }[];
}

interface UpdateOptions extends CommonOptions {
  readonly name?: string;
  readonly history?: number;
}

export function projectsCommand(context: CliContext): Command {
  const create = platformCommand('create', 'create a project', 'projects create --name shop')
    .option('--name <name>', 'name of the project (default: its id)')
    .option('--pg-version <major>', 'version of Postgres (default: what the platform was started with)')
    .option('--role <name>', 'role that owns the database (default: stratadb_owner)')
    .option('--database <name>', 'first database (default: stratadb)')
    .option('--history <time>', `${HISTORY} (default: 7d)`, historySeconds)
    .action(async (options: CreateOptions) => {
      const { api } = openPlatform(context, options);
      const created = await api.post<CreatedProject>('/projects', { project: createRequest(options) });
      show(context, options, created, () =>
        formatFields([
          ['project', created.project.name],
          ['id', created.project.id],
          ['Postgres', String(created.project.pg_version)],
          ['connection', created.connection_uris[0]?.connection_uri ?? '-'],
        ]),
      );
    });

  const list = platformCommand('list', 'list the projects', 'projects list').action(async (options: CommonOptions) => {
    const { api } = openPlatform(context, options);
    const projects = await listProjects(api);
    show(context, options, projects, () =>
      formatTable(
        ['ID', 'NAME', 'POSTGRES', 'CREATED'],
        projects.map((project) => [
          project.id,
          project.name,
          String(project.pg_version),
          formatAgo(project.created_at, context.now()),
        ]),
      ),
    );
  });

  const update = platformCommand('update', 'change a project', 'projects update shop --history 24h')
    .argument('<project>', 'id or name')
    .option('--name <name>', 'its new name')
    .option('--history <time>', HISTORY, historySeconds)
    .action(async (wanted: string, { name, history, ...options }: UpdateOptions) => {
      if (name === undefined && history === undefined) throw new CliError('say what to change: --name or --history', 2);
      const { api } = openPlatform(context, options);
      const { id } = await findProject(api, wanted);
      const changes = { name, history_retention_seconds: history };
      const { project } = await api.patch<{ project: Project }>(`/projects/${id}`, { project: changes });
      show(context, options, project, () =>
        formatFields([
          ['project', project.name],
          ['id', project.id],
          ['history', formatHours(project.history_retention_seconds / HOUR_SECONDS)],
        ]),
      );
    });

  const remove = platformCommand('delete', 'delete a project with all its branches and data', 'projects delete shop')
    .argument('<project>', 'id or name')
    .action(async (wanted: string, options: CommonOptions) => {
      const { api } = openPlatform(context, options);
      const project = await findProject(api, wanted);
      const deleted = await api.delete<{ project: Project }>(`/projects/${project.id}`);
      show(context, options, deleted.project, () => `deleted project ${project.name} (${project.id})`);
    });

  return new Command('projects')
    .description('create, list, change and delete projects')
    .addCommand(create)
    .addCommand(list)
    .addCommand(update)
    .addCommand(remove)
    .addHelpText('after', '\nExample:\n  $ strata projects create --name shop');
}

function historySeconds(text: string): number {
  const match = /^(\d{1,4})(h|d)$/.exec(text);
  const hours = match === null ? NaN : Number(match[1]) * (match[2] === 'd' ? 24 : 1);
  const seconds = hours * HOUR_SECONDS;
  if (seconds * 1000 >= RETENTION_MS.min && seconds * 1000 <= RETENTION_MS.max) return seconds;
  throw new InvalidArgumentError('It must be from 6h to 30d, in hours (36h) or days (7d).');
}

function formatHours(hours: number): string {
  const [count, unit] = hours % 24 === 0 ? [hours / 24, 'day'] : [hours, 'hour'];
  return `${count} ${unit}${count === 1 ? '' : 's'}`;
}

function createRequest(options: CreateOptions): object {
  const pgVersion = Number(options.pgVersion);
  if (options.pgVersion !== undefined && !Number.isInteger(pgVersion)) {
    throw new CliError(`--pg-version must be a number such as 17, not ${JSON.stringify(options.pgVersion)}`, 2);
  }
  return {
    name: options.name,
    history_retention_seconds: options.history,
    pg_version: options.pgVersion === undefined ? undefined : pgVersion,
    branch: { role_name: options.role, database_name: options.database },
  };
}
