/** `strata branches create | at | list | rename | set-default | delete`; `changes` is in changes.ts. */
import { Command } from 'commander';
import { changesCommand } from './changes.ts';
import { type CliContext, type ProjectOptions, openProject, projectCommand, show } from './context.ts';
import { type Branch, type Endpoint, findBranch, listBranches, listEndpoints } from './entities.ts';
import { formatAgo, formatFields, formatTable } from './format.ts';
import { parsePoint } from './point.ts';

interface CreateOptions extends ProjectOptions {
  readonly name?: string;
  readonly parent?: string;
  readonly at?: string;
  readonly endpoint: boolean;
}

interface CreatedBranch {
  readonly branch: Branch;
  readonly endpoints: readonly Endpoint[];
  readonly connection_uris?: readonly { readonly connection_uri: string }[];
}

interface Point {
  readonly branch_id: string;
  readonly branch_name: string;
  readonly lsn: string;
  readonly last_commit_at?: string;
}

export function branchesCommand(context: CliContext): Command {
  const create = projectCommand(
    'create',
    'create a branch',
    "branches create --name before-delete --at '2026-01-31 12:00:00+00'",
  )
    .option('--name <name>', 'name of the branch (default: its id)')
    .option('--parent <branch>', 'name or id of the branch to begin from (default: the default branch)')
    .option(
      '--at <point>',
      'begin at an LSN (0/16B3748) or at a time with its zone (2026-01-31T12:00:00.5Z) instead of now',
    )
    .option('--no-endpoint', 'without an endpoint: nothing can connect to it')
    .action(async (options: CreateOptions) => {
      const { api, project } = await openProject(context, options);
      const point = options.at === undefined ? {} : parsePoint(options.at);
      const branches = await listBranches(api, project);
      const parent = findBranch(branches, options.parent);
      const created = await api.post<CreatedBranch>(`/projects/${project.id}/branches`, {
        branch: { name: options.name, parent_id: parent.id, ...point },
        endpoints: options.endpoint ? [{ type: 'read_write' }] : [],
      });
      const { branch } = created;
      // A point of before the parent began is one of the parent's parent.
      const owner = branches.find(({ id }) => id === branch.parent_id) ?? parent;
      show(context, options, created, () =>
        formatFields([
          ['branch', branch.name],
          ['id', branch.id],
          ['parent', `${owner.name} at ${branch.parent_lsn ?? '-'}`],
          ['endpoint', created.endpoints[0]?.id ?? '-'],
          ['connection', created.connection_uris?.[0]?.connection_uri ?? '-'],
        ]),
      );
    });

  const list = projectCommand('list', 'list the branches of a project', 'branches list').action(
    async (options: ProjectOptions) => {
      const { api, project } = await openProject(context, options);
      const [branches, endpoints] = await Promise.all([listBranches(api, project), listEndpoints(api, project)]);
      const names = new Map(branches.map((branch) => [branch.id, branch.name]));
      const states = new Map(endpoints.map((endpoint) => [endpoint.branch_id, endpoint.current_state]));
      show(context, options, branches, () =>
        formatTable(
          ['NAME', 'ID', 'PARENT', 'AT', 'ENDPOINT', 'CREATED'],
          branches.map((branch) => [
            branch.default ? `${branch.name} (default)` : branch.name,
            branch.id,
            branch.parent_id === undefined ? '-' : (names.get(branch.parent_id) ?? branch.parent_id),
            branch.parent_timestamp ?? branch.parent_lsn ?? '-',
            states.get(branch.id) ?? 'none',
            formatAgo(branch.created_at, context.now()),
          ]),
        ),
      );
    },
  );

  const rename = projectCommand('rename', 'give a branch another name', 'branches rename dev review')
    .argument('<branch>', 'name or id')
    .argument('<name>', 'its new name')
    .action(async (wanted: string, name: string, options: ProjectOptions) => {
      const { api, project } = await openProject(context, options);
      const branch = findBranch(await listBranches(api, project), wanted);
      const path = `/projects/${project.id}/branches/${branch.id}`;
      const renamed = await api.patch<{ branch: Branch }>(path, { branch: { name } });
      show(
        context,
        options,
        renamed.branch,
        () => `branch ${branch.name} (${branch.id}) is ${renamed.branch.name} now`,
      );
    });

  const setDefault = projectCommand(
    'set-default',
    'make a branch the one that is meant when none is named, by clients too',
    'branches set-default dev',
  )
    .argument('<branch>', 'name or id')
    .action(async (wanted: string, options: ProjectOptions) => {
      const { api, project } = await openProject(context, options);
      const branch = findBranch(await listBranches(api, project), wanted);
      const path = `/projects/${project.id}/branches/${branch.id}/set_as_default`;
      const changed = await api.post<{ branch: Branch }>(path);
      show(context, options, changed.branch, () => `branch ${branch.name} (${branch.id}) is the default now`);
    });

  const remove = projectCommand('delete', 'delete a branch with its data', 'branches delete before-delete')
    .argument('<branch>', 'name or id')
    .action(async (wanted: string, options: ProjectOptions) => {
      const { api, project } = await openProject(context, options);
      const branch = findBranch(await listBranches(api, project), wanted);
      const deleted = await api.delete<{ branch: Branch }>(`/projects/${project.id}/branches/${branch.id}`);
      show(context, options, deleted.branch, () => `deleted branch ${branch.name} (${branch.id})`);
    });

  const at = projectCommand(
    'at',
    'show which LSN a time is, or which time an LSN is',
    "branches at '2026-01-31 12:00:00+00'",
  )
    .argument('[point]', 'an LSN (0/16B3748) or a time with its zone (2026-01-31T12:00:00.5Z) (default: the head)')
    .option('--branch <branch>', 'name or id of the branch (default: the default branch)')
    .action(async (wanted: string | undefined, options: ProjectOptions & { readonly branch?: string }) => {
      const { api, project } = await openProject(context, options);
      const asked = wanted === undefined ? undefined : parsePoint(wanted, 'the point');
      const branch = findBranch(await listBranches(api, project), options.branch);
      const query = new URLSearchParams();
      if (asked !== undefined && 'parent_lsn' in asked) query.set('lsn', asked.parent_lsn);
      if (asked !== undefined && 'parent_timestamp' in asked) query.set('timestamp', asked.parent_timestamp);
      const point = await api.get<Point>(`/projects/${project.id}/branches/${branch.id}/point?${query.toString()}`);
      show(context, options, point, () =>
        formatFields([
          ['lsn', point.lsn],
          ['last commit', point.last_commit_at ?? 'none yet'],
          [
            'branch',
            point.branch_name === branch.name ? branch.name : `${point.branch_name}, which ${branch.name} comes from`,
          ],
        ]),
      );
    });

  return new Command('branches')
    .description('create, list, rename, compare and delete branches, and find points in their history')
    .addCommand(create)
    .addCommand(at)
    .addCommand(list)
    .addCommand(rename)
    .addCommand(setDefault)
    .addCommand(remove)
    .addCommand(changesCommand(context))
    .addHelpText('after', '\nExample:\n  $ strata branches create --name dev');
}
