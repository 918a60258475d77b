/** `strata endpoints list | start | suspend`. */
import { setTimeout as sleep } from 'node:timers/promises';
import { Command } from 'commander';
import {
  type CliContext,
  type ProjectOptions,
  type ProjectScope,
  openProject,
  projectCommand,
  show,
} from './context.ts';
import { type Endpoint, type Operation, findBranch, listBranches, listEndpoints } from './entities.ts';
import { CliError } from './errors.ts';
import { formatAgo, formatTable } from './format.ts';

const POLL_INTERVAL_MS = 50;
const OPERATION_DEADLINE_MS = 120_000;

export function endpointsCommand(context: CliContext): Command {
  const list = projectCommand('list', 'list the endpoints of a project', 'endpoints list').action(
    async (options: ProjectOptions) => {
      const { api, project } = await openProject(context, options);
      const [endpoints, branches] = await Promise.all([listEndpoints(api, project), listBranches(api, project)]);
      const names = new Map(branches.map((branch) => [branch.id, branch.name]));
      show(context, options, endpoints, () =>
        formatTable(
          ['ID', 'BRANCH', 'TYPE', 'STATE', 'LAST ACTIVE'],
          endpoints.map((endpoint) => [
            endpoint.id,
            names.get(endpoint.branch_id) ?? endpoint.branch_id,
            endpoint.type.replace('_', '-'),
            endpoint.pending_state === undefined
              ? endpoint.current_state
              : `${endpoint.current_state}, soon ${endpoint.pending_state}`,
            formatAgo(endpoint.last_active, context.now()),
          ]),
        ),
      );
    },
  );

  return new Command('endpoints')
    .description('list, start and suspend endpoints')
    .addCommand(list)
    .addCommand(changeCommand(context, 'start', 'start an endpoint and wait until it takes connections', 'active'))
    .addCommand(changeCommand(context, 'suspend', 'suspend an endpoint and wait until it has stopped', 'idle'))
    .addHelpText('after', '\nExample:\n  $ strata endpoints list');
}

function changeCommand(context: CliContext, verb: 'start' | 'suspend', description: string, state: string): Command {
  return projectCommand(verb, description, `endpoints ${verb} main`)
    .argument('[endpoint]', 'id of the endpoint, or name or id of its branch (default: the default branch)')
    .action(async (wanted: string | undefined, options: ProjectOptions) => {
      const scope = await openProject(context, options);
      const { api, project } = scope;
      const endpoint = await findEndpoint(scope, wanted);
      const path = `/projects/${project.id}/endpoints/${endpoint.id}`;
      const { operations } = await api.post<{ operations: Operation[] }>(`${path}/${verb}`);
      for (const operation of operations) await waitFor(scope, operation, context);
      const changed = (await api.get<{ endpoint: Endpoint }>(path)).endpoint;
      show(context, options, changed, () => {
        return operations.length === 0
          ? `endpoint ${endpoint.id} was ${state} already`
          : `endpoint ${endpoint.id} is ${changed.current_state}`;
      });
    });
}

async function findEndpoint(scope: ProjectScope, wanted: string | undefined): Promise<Endpoint> {
  const [endpoints, branches] = await Promise.all([
    listEndpoints(scope.api, scope.project),
    listBranches(scope.api, scope.project),
  ]);
  const byId = endpoints.find((endpoint) => endpoint.id === wanted);
  if (byId !== undefined) return byId;
  if (wanted?.startsWith('ep-') && !branches.some((branch) => branch.name === wanted)) {
    const ids = endpoints.map((endpoint) => endpoint.id).join(', ');
    throw new CliError(`there is no endpoint ${JSON.stringify(wanted)} (endpoints: ${ids || 'none'})`);
  }
  const branch = findBranch(branches, wanted);
  const endpoint = endpoints.find((each) => each.branch_id === branch.id);
  if (endpoint === undefined) throw new CliError(`branch ${branch.name} has no endpoint`);
  return endpoint;
}

async function waitFor(scope: ProjectScope, operation: Operation, context: CliContext): Promise<void> {
  const path = `/projects/${scope.project.id}/operations/${operation.id}`;
  for (const deadline = context.now() + OPERATION_DEADLINE_MS; ; await sleep(POLL_INTERVAL_MS)) {
    const now = (await scope.api.get<{ operation: Operation }>(path)).operation;
    if (now.status === 'finished') return;
    if (now.status === 'failed') throw new CliError(now.error ?? `operation ${operation.id} failed`);
    if (context.now() > deadline)
      throw new CliError(`operation ${operation.id} is still ${now.status} after ${OPERATION_DEADLINE_MS / 1000} s`);
  }
}
