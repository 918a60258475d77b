/**
 * The routes of the API: Neon's API v2, same paths, bodies and status codes. Only translation: what is done is in projects, branches,
 * endpoints and operations; what is shown in shapes; what is taken in schemas.
 */
import type { FastifyInstance } from 'fastify';
import { StrataError } from '../base/errors.ts';
import type { PointOptions } from './branch-points.ts';
import { branchChanges, type BranchChangesOptions } from './branch-changes.ts';
import type { BranchCreateOptions, BranchSortKey, BranchUpdateOptions } from './branches.ts';
import type { Control } from './control.ts';
import type { EndpointOptions } from './endpoints.ts';
import type { ImportOptions } from './imports.ts';
import type { ProjectCreateOptions, ProjectUpdateOptions } from './projects.ts';
import * as schemas from './schemas.ts';
import * as shapes from './shapes.ts';
import type { BranchRow, EndpointRow, ProjectRow } from './state.ts';

const PROJECTS_LIMIT = { default: 10, max: 400 };
const OPERATIONS_LIMIT = { default: 1000, max: 1000 };
const BRANCHES_LIMIT = { default: 10_000, max: 10_000 };

interface ProjectParams {
  readonly project: string;
}
interface BranchParams extends ProjectParams {
  readonly branch: string;
}
interface RoleParams extends BranchParams {
  readonly role: string;
}
interface DatabaseParams extends BranchParams {
  readonly database: string;
}
interface EndpointParams extends ProjectParams {
  readonly endpoint: string;
}
interface PageQuery {
  readonly cursor?: string;
  readonly limit?: string;
  readonly search?: string;
}

export function registerRoutes(api: FastifyInstance, control: Control): void {
  registerUser(api, control);
  registerProjects(api, control);
  registerBranches(api, control);
  registerRolesAndDatabases(api, control);
  registerEndpoints(api, control);
  registerOperations(api, control);
}

/** There is one user, who owns everything, and no organisation. */
function registerUser(api: FastifyInstance, control: Control): void {
  api.get('/users/me', () => ({
    active_seconds_limit: -1,
    auth_accounts: [],
    email: 'strata@localhost.localdomain',
    id: shapes.USER_ID,
    image: '',
    login: 'strata',
    name: 'Strata',
    last_name: '',
    projects_limit: 1_000_000,
    branches_limit: 1_000_000,
    max_autoscaling_limit: 64,
    plan: 'self-hosted',
  }));
  api.get('/users/me/organizations', () => ({ organizations: [] }));
  api.get('/auth', (request) => {
    const key = control.apiKeys.authenticate(request.headers.authorization, request.ip);
    return { account_id: shapes.USER_ID, auth_method: 'api_key_user', auth_data: String(key.id) };
  });
  api.get('/regions', () => ({
    regions: [{ region_id: shapes.REGION_ID, name: 'This machine', default: true, geo_lat: '0', geo_long: '0' }],
  }));
}

function registerProjects(api: FastifyInstance, control: Control): void {
  const { projects, imports, context } = control;
  const show = (row: ProjectRow) => shapes.project(row, context.config, lastActive(control, row.id));

  api.get<{ Querystring: PageQuery & { recoverable?: string } }>(
    '/projects',
    { schema: { querystring: schemas.pageQuery } },
    (request) => {
      const { search, recoverable } = request.query;
      const page = pageOf(request.query, PROJECTS_LIMIT);
      // Deleted projects cannot be brought back.
      const list =
        recoverable === 'true'
          ? { items: [], cursor: undefined }
          : projects.list({ ...page, ...(search === undefined ? {} : { search }) });
      return {
        projects: list.items.map((row) => shapes.projectListItem(row, context.config, lastActive(control, row.id))),
        unavailable_project_ids: [],
        ...(list.cursor === undefined ? {} : { pagination: { cursor: list.cursor } }),
        applications: {},
        integrations: {},
      };
    },
  );

  api.get('/projects/shared', () => ({ projects: [], unavailable_project_ids: [] }));

  api.post<{ Body: { project: ProjectCreateOptions } }>(
    '/projects',
    { schema: { body: schemas.projectCreateBody } },
    async (request, reply) => {
      const created = await projects.create(request.body.project);
      return reply.code(201).send({
        project: show(created.project),
        connection_uris: connectionDetails(control, created.endpoint),
        roles: rolesWithPasswords(control, created.branch.id),
        databases: control.catalog.databases(created.branch.id).map(shapes.database),
        operations: operationsOf(control, created.operationIds),
        branch: shapes.branch(created.branch),
        endpoints: [shapes.endpoint(created.endpoint, context.config)],
      });
    },
  );

  // Not Neon's: a project from a data directory of this machine. The import goes on after the answer.
  api.post<{ Body: { import: ImportOptions } }>(
    '/projects/import',
    { schema: { body: schemas.importBody } },
    async (request, reply) => {
      const begun = await imports.begin(request.body.import);
      return reply.code(201).send({
        import: shapes.dataImport(begun.row),
        project: show(begun.project),
        operations: operationsOf(control, begun.operationIds),
        branch: shapes.branch(begun.branch),
        endpoints: [shapes.endpoint(begun.endpoint, context.config)],
      });
    },
  );

  api.delete<{ Params: { import: string } }>('/imports/:import', async (request) => ({
    import: shapes.dataImport(await imports.cancel(request.params.import)),
  }));

  api.get<{ Params: { import: string } }>('/imports/:import', async (request) => {
    const row = imports.get(request.params.import);
    // It may end between the two looks.
    const progress = await imports.progress(row).catch(() => undefined);
    const now = imports.get(row.id);
    const [endpoint] = now.state === 'finished' ? control.endpoints.ofBranch(row.branch_id) : [];
    return {
      import: shapes.dataImport(now, progress),
      ...(endpoint === undefined ? {} : { connection_uris: connectionDetails(control, endpoint) }),
    };
  });

  api.get<{ Params: ProjectParams }>('/projects/:project', (request) => ({
    project: show(projects.get(request.params.project)),
  }));

  api.patch<{ Params: ProjectParams; Body: { project: ProjectUpdateOptions } }>(
    '/projects/:project',
    { schema: { body: schemas.projectUpdateBody } },
    async (request) => {
      const row = projects.update(request.params.project, request.body.project);
      if (request.body.project.history_retention_seconds !== undefined) {
        await context.storage.setRetention(row.tenant_id, row.history_retention_seconds);
      }
      return { project: show(row), operations: [] };
    },
  );

  // Not Neon's: how uploads to the object store are doing.
  api.get('/object_store', async () => {
    const status = await context.storage.objectStore();
    return { object_store: status === undefined ? null : shapes.objectStore(status) };
  });

  // Not Neon's: frees now what is below the history window and retained by nobody.
  api.post<{ Params: ProjectParams }>('/projects/:project/storage/collect', async (request) => {
    await context.storage.collectGarbage(projects.get(request.params.project).tenant_id);
    return {};
  });

  // Not Neon's: what each branch takes.
  api.get<{ Params: ProjectParams }>('/projects/:project/storage', async (request) => {
    const rows = control.branches.all(projects.get(request.params.project).id);
    const sizes = await context.storage.sizes(rows.map((row) => row.timeline_id));
    const byTimeline = new Map(sizes.map((each) => [each.timelineId, each]));
    return {
      branches: rows.flatMap((row) => {
        const each = byTimeline.get(row.timeline_id);
        return each === undefined ? [] : [shapes.branchStorage(row, each)];
      }),
    };
  });

  api.delete<{ Params: ProjectParams }>('/projects/:project', (request) => ({
    project: show(projects.delete(request.params.project)),
  }));

  api.get<{
    Params: ProjectParams;
    Querystring: { branch_id?: string; endpoint_id?: string; database_name: string; role_name: string };
  }>('/projects/:project/connection_uri', { schema: { querystring: schemas.connectionUriQuery } }, (request) => {
    const { branch_id, endpoint_id, database_name, role_name } = request.query;
    const projectId = projects.get(request.params.project).id;
    const endpoint = endpointFor(control, projectId, branch_id, endpoint_id);
    return { uri: control.connectionUri(endpoint, role_name, database_name) };
  });
}

function registerBranches(api: FastifyInstance, control: Control): void {
  const { projects, branches, context } = control;
  const changed = (row: BranchRow, operationIds: readonly string[] = []) => ({
    branch: shapes.branch(row),
    operations: operationsOf(control, operationIds),
  });

  api.post<{
    Params: ProjectParams;
    Body: { branch?: BranchCreateOptions; endpoints?: EndpointOptions[] } | null | undefined;
  }>('/projects/:project/branches', { schema: { body: schemas.branchCreateBody } }, async (request, reply) => {
    const project = projects.get(request.params.project);
    const created = await branches.create(project, request.body?.branch ?? {}, request.body?.endpoints ?? []);
    const endpoint = created.endpoints[0];
    return reply.code(201).send({
      ...changed(created.branch, created.operationIds),
      endpoints: created.endpoints.map((row) => shapes.endpoint(row, context.config)),
      roles: rolesWithPasswords(control, created.branch.id),
      databases: control.catalog.databases(created.branch.id).map(shapes.database),
      ...(endpoint === undefined ? {} : { connection_uris: connectionDetails(control, endpoint) }),
    });
  });

  api.get<{ Params: ProjectParams; Querystring: PageQuery & { sort_by?: BranchSortKey; sort_order?: 'asc' | 'desc' } }>(
    '/projects/:project/branches',
    { schema: { querystring: schemas.branchListQuery } },
    (request) => {
      const { search, sort_by = 'updated_at', sort_order = 'desc' } = request.query;
      const page = branches.list(projects.get(request.params.project).id, {
        ...pageOf(request.query, BRANCHES_LIMIT),
        ...(search === undefined ? {} : { search }),
        sortBy: sort_by,
        descending: sort_order === 'desc',
      });
      return {
        branches: page.items.map((row) => shapes.branch(row)),
        annotations: {},
        // Without `next` on the last page: clients go on while there is one.
        pagination: {
          ...(page.cursor === undefined ? {} : { next: page.cursor }),
          sort_by,
          sort_order: sort_order.toUpperCase(),
        },
      };
    },
  );

  api.get<{ Params: ProjectParams; Querystring: PageQuery }>(
    '/projects/:project/branches/count',
    { schema: { querystring: schemas.pageQuery } },
    (request) => ({ count: branches.count(projects.get(request.params.project).id, request.query.search) }),
  );

  api.get<{ Params: BranchParams }>('/projects/:project/branches/:branch', async (request) => {
    const row = branches.get(request.params.project, request.params.branch);
    return {
      branch: shapes.branch(row, await logicalSize(control, row)),
      annotation: { object: { type: 'console/branch', id: row.id }, value: {} },
    };
  });

  // Not Neon's: which LSN a time is, which time an LSN is, and in whose history it lies; without either, of the head.
  api.get<{ Params: BranchParams; Querystring: PointOptions }>(
    '/projects/:project/branches/:branch/point',
    { schema: { querystring: schemas.pointQuery } },
    async (request) => {
      const { project, branch } = request.params;
      const point = await branches.point(project, branch, request.query);
      return shapes.point(point, await branches.points.timestampUs(point));
    },
  );

  // Not Neon's: which pages of which relations changed.
  api.get<{ Params: BranchParams; Querystring: BranchChangesOptions }>(
    '/projects/:project/branches/:branch/changes',
    { schema: { querystring: schemas.changesQuery } },
    async (request) => {
      const { project, branch } = request.params;
      return shapes.branchChanges(await branchChanges(context, branches, project, branch, request.query));
    },
  );

  api.patch<{ Params: BranchParams; Body: { branch: BranchUpdateOptions } }>(
    '/projects/:project/branches/:branch',
    { schema: { body: schemas.branchUpdateBody } },
    (request) => changed(branches.update(request.params.project, request.params.branch, request.body.branch)),
  );

  api.delete<{ Params: BranchParams }>('/projects/:project/branches/:branch', (request) => {
    const deleted = branches.delete(request.params.project, request.params.branch);
    return changed(deleted.branch, deleted.operationIds);
  });

  api.post<{ Params: BranchParams }>('/projects/:project/branches/:branch/set_as_default', (request) =>
    changed(branches.setDefault(request.params.project, request.params.branch)),
  );

  api.get<{ Params: BranchParams }>('/projects/:project/branches/:branch/endpoints', (request) => {
    const row = branches.get(request.params.project, request.params.branch);
    return {
      endpoints: control.endpoints.ofBranch(row.id).map((endpoint) => shapes.endpoint(endpoint, context.config)),
    };
  });
}

function registerRolesAndDatabases(api: FastifyInstance, control: Control): void {
  const { branches, catalog } = control;
  const branchId = (params: BranchParams) => branches.get(params.project, params.branch).id;

  api.get<{ Params: BranchParams }>('/projects/:project/branches/:branch/roles', (request) => ({
    roles: catalog.roles(branchId(request.params)).map((row) => shapes.role(row)),
  }));

  api.get<{ Params: RoleParams }>('/projects/:project/branches/:branch/roles/:role', (request) => ({
    role: shapes.role(catalog.role(branchId(request.params), request.params.role)),
  }));

  api.get<{ Params: RoleParams }>('/projects/:project/branches/:branch/roles/:role/reveal_password', (request) => ({
    password: catalog.password(catalog.role(branchId(request.params), request.params.role)),
  }));

  api.post<{ Params: RoleParams }>(
    '/projects/:project/branches/:branch/roles/:role/reset_password',
    async (request) => {
      const { project, branch, role } = request.params;
      const reset = await control.resetPassword(project, branch, role);
      return {
        role: shapes.role(reset.role, catalog.password(reset.role)),
        operations: operationsOf(control, [reset.operationId]),
      };
    },
  );

  api.get<{ Params: BranchParams }>('/projects/:project/branches/:branch/databases', (request) => ({
    databases: catalog.databases(branchId(request.params)).map(shapes.database),
  }));

  api.get<{ Params: DatabaseParams }>('/projects/:project/branches/:branch/databases/:database', (request) => ({
    database: shapes.database(catalog.database(branchId(request.params), request.params.database)),
  }));
}

function registerEndpoints(api: FastifyInstance, control: Control): void {
  const { projects, branches, endpoints, context } = control;
  const changed = (change: { endpoint: EndpointRow; operationIds: readonly string[] }) => ({
    endpoint: shapes.endpoint(change.endpoint, context.config),
    operations: operationsOf(control, change.operationIds),
  });

  api.get<{ Params: ProjectParams }>('/projects/:project/endpoints', (request) => ({
    endpoints: endpoints
      .list(projects.get(request.params.project).id)
      .map((row) => shapes.endpoint(row, context.config)),
  }));

  api.post<{ Params: ProjectParams; Body: { endpoint: EndpointOptions & { branch_id: string } } }>(
    '/projects/:project/endpoints',
    { schema: { body: schemas.endpointCreateBody } },
    (request, reply) => {
      const project = projects.get(request.params.project);
      const branch = branches.get(project.id, request.body.endpoint.branch_id);
      return reply.code(201).send(changed(endpoints.create(project, branch, request.body.endpoint)));
    },
  );

  api.get<{ Params: EndpointParams }>('/projects/:project/endpoints/:endpoint', (request) => ({
    endpoint: shapes.endpoint(endpoints.get(request.params.project, request.params.endpoint), context.config),
  }));

  api.patch<{ Params: EndpointParams; Body: { endpoint: EndpointOptions & { branch_id?: string } } }>(
    '/projects/:project/endpoints/:endpoint',
    { schema: { body: schemas.endpointUpdateBody } },
    (request) => {
      const { project, endpoint } = request.params;
      const { branch_id: branchId, ...options } = request.body.endpoint;
      const row = endpoints.get(project, endpoint);
      if (branchId !== undefined && branchId !== row.branch_id) {
        throw new StrataError(
          'not-implemented',
          `moving endpoint ${endpoint} to branch ${branchId} is not supported yet`,
        );
      }
      return changed(endpoints.update(project, endpoint, options));
    },
  );

  api.delete<{ Params: EndpointParams }>('/projects/:project/endpoints/:endpoint', (request) =>
    changed(endpoints.delete(request.params.project, request.params.endpoint)),
  );
  api.post<{ Params: EndpointParams }>('/projects/:project/endpoints/:endpoint/start', (request) =>
    changed(endpoints.start(request.params.project, request.params.endpoint)),
  );
  api.post<{ Params: EndpointParams }>('/projects/:project/endpoints/:endpoint/suspend', (request) =>
    changed(endpoints.suspend(request.params.project, request.params.endpoint)),
  );
  api.post<{ Params: EndpointParams }>('/projects/:project/endpoints/:endpoint/restart', (request) =>
    changed(endpoints.restart(request.params.project, request.params.endpoint)),
  );
}

function registerOperations(api: FastifyInstance, control: Control): void {
  const { projects, operations } = control;

  api.get<{ Params: ProjectParams; Querystring: PageQuery }>(
    '/projects/:project/operations',
    { schema: { querystring: schemas.pageQuery } },
    (request) => {
      const page = operations.list(projects.get(request.params.project).id, pageOf(request.query, OPERATIONS_LIMIT));
      return {
        operations: page.items.map(shapes.operation),
        ...(page.cursor === undefined ? {} : { pagination: { cursor: page.cursor } }),
      };
    },
  );

  api.get<{ Params: ProjectParams & { operation: string } }>('/projects/:project/operations/:operation', (request) => ({
    operation: shapes.operation(operations.get(projects.get(request.params.project).id, request.params.operation)),
  }));
}

function pageOf(query: PageQuery, limits: { default: number; max: number }): { limit: number; cursor?: string } {
  const limit = query.limit === undefined ? limits.default : Number(query.limit);
  if (limit < 1 || limit > limits.max) {
    throw new StrataError('bad-request', `limit must be from 1 to ${limits.max}, not ${limit}`);
  }
  return { limit, ...(query.cursor === undefined ? {} : { cursor: query.cursor }) };
}

function operationsOf(control: Control, ids: readonly string[]) {
  return control.operations.byIds(ids).map(shapes.operation);
}

function rolesWithPasswords(control: Control, branchId: string) {
  return control.catalog.roles(branchId).map((row) => shapes.role(row, control.catalog.password(row)));
}

/** One for each pair of a database and its owner. */
function connectionDetails(control: Control, endpoint: EndpointRow) {
  const { config } = control.context;
  return control.catalog.databases(endpoint.branch_id).map((database) => ({
    connection_uri: control.connectionUri(endpoint, database.owner_name, database.name),
    connection_parameters: {
      database: database.name,
      password: control.catalog.password(control.catalog.role(endpoint.branch_id, database.owner_name)),
      role: database.owner_name,
      host: shapes.endpointHost(endpoint.id, config),
      pooler_host: shapes.endpointHost(`${endpoint.id}-pooler`, config),
    },
  }));
}

function endpointFor(control: Control, projectId: string, branchId?: string, endpointId?: string): EndpointRow {
  if (endpointId !== undefined) {
    const endpoint = control.endpoints.get(projectId, endpointId);
    if (branchId === undefined || branchId === endpoint.branch_id) return endpoint;
    throw new StrataError(
      'bad-request',
      `endpoint ${endpointId} belongs to branch ${endpoint.branch_id}, not ${branchId}`,
    );
  }
  const branch =
    branchId === undefined ? control.branches.defaultBranch(projectId) : control.branches.get(projectId, branchId);
  const endpoint = control.endpoints.ofBranch(branch.id)[0];
  if (endpoint === undefined)
    throw new StrataError('not-found', `branch ${branch.name} (${branch.id}) has no endpoint`);
  return endpoint;
}

function lastActive(control: Control, projectId: string): number | undefined {
  const sql = 'SELECT max(last_active) AS last_active FROM endpoints WHERE project_id = ?';
  return control.context.state.get<{ last_active: number | null }>(sql, projectId)?.last_active ?? undefined;
}

/** Nice to have: a storage that does not answer must not hide the branch. */
async function logicalSize(control: Control, branch: BranchRow): Promise<number | undefined> {
  try {
    return (await control.context.storage.status(branch.timeline_id)).logicalSizeBytes;
  } catch (error) {
    control.context.log.debug({ err: error, branchId: branch.id }, 'the size of a branch is not known');
    return undefined;
  }
}
