/** `strata projects create | list | delete`. */
import { Command } from 'commander';
import { type CliContext, type CommonOptions, openPlatform, platformCommand, show } from './context.ts';
import { type Project, findProject, listProjects } from './entities.ts';
import { CliError } from './errors.ts';
import { formatAgo, formatFields, formatTable } from './format.ts';

interface CreateOptions extends CommonOptions {
  readonly name?: string;
  readonly pgVersion?: string;
  readonly role?: string;
  readonly database?: string;
}

interface CreatedProject {
  readonly project: Project;
  readonly connection_uris: readonly { readonly connection_uri: string }[];
}

export function projectsCommand(context: CliContext): Command {
  const create = platformCommand('create', 'create a project', 'projects create --name shop')
    .option('--name <name>', 'name of the project (default: its id)')
    .option('--pg-version <major>', 'version of Postgres (default: what the platform was started with)')
    .option('--role <name>', 'role that owns the database')
    .option('--database <name>', 'first database')
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

  const remove = platformCommand('delete', 'delete a project with all its branches and data', 'projects delete shop')
    .argument('<project>', 'id or name')
    .action(async (wanted: string, options: CommonOptions) => {
      const { api } = openPlatform(context, options);
      const project = await findProject(api, wanted);
      const deleted = await api.delete<{ project: Project }>(`/projects/${project.id}`);
      show(context, options, deleted.project, () => `deleted project ${project.name} (${project.id})`);
    });

  return new Command('projects')
    .description('create, list and delete projects')
    .addCommand(create)
    .addCommand(list)
    .addCommand(remove)
    .addHelpText('after', '\nExample:\n  $ strata projects create --name shop');
}

function createRequest(options: CreateOptions): object {
  const pgVersion = Number(options.pgVersion);
  if (options.pgVersion !== undefined && !Number.isInteger(pgVersion)) {
    throw new CliError(`--pg-version must be a number such as 17, not ${JSON.stringify(options.pgVersion)}`, 2);
  }
  return {
    name: options.name,
    pg_version: options.pgVersion === undefined ? undefined : pgVersion,
    branch: { role_name: options.role, database_name: options.database },
  };
}
