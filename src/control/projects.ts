/**
 * Projects: each is a tenant with a default branch, a read-write endpoint, a role and a database.
 *
 * A project's first branch is a branch of the template, the freshly initialised cluster of its Postgres version, so creating one costs what a
 * branch costs. Its role and database are made inside the cluster by the first start of its compute, which begins at once. The first branch of an
 * imported project (imports.ts) has no ancestor.
 */
import type { BranchPoint } from '../api/control.ts';
import { RETENTION_MS } from '../api/retention.ts';
import { StrataError } from '../base/errors.ts';
import type { Branches } from './branches.ts';
import { likePattern } from './branches.ts';
import { type Catalog, type NewRole, prepareRole } from './catalog.ts';
import type { ControlContext } from './context.ts';
import type { EndpointOptions, Endpoints } from './endpoints.ts';
import { assertDatabaseName, assertRoleName } from './identifiers.ts';
import { newBranchId, newProjectId, newTenantId, newTimelineId } from './ids.ts';
import { type Page, type PageRequest, decodeCursor, encodeCursor } from './pagination.ts';
import type { BranchRow, EndpointRow, OperationAction, ProjectRow } from './state.ts';

export const DEFAULT_ROLE_NAME = 'stratadb_owner';
export const DEFAULT_DATABASE_NAME = 'stratadb';
const DEFAULT_BRANCH_NAME = 'main';
const DEFAULT_HISTORY_RETENTION_SECONDS = RETENTION_MS.default / 1000;

export interface ProjectCreateOptions {
  readonly name?: string;
  readonly pg_version?: number;
  readonly settings?: Readonly<Record<string, unknown>>;
  readonly default_endpoint_settings?: EndpointOptions;
  readonly autoscaling_limit_min_cu?: number;
  readonly autoscaling_limit_max_cu?: number;
  readonly store_passwords?: boolean;
  readonly history_retention_seconds?: number;
  readonly branch?: { readonly name?: string; readonly role_name?: string; readonly database_name?: string };
}

export interface ProjectUpdateOptions {
  readonly name?: string;
  readonly settings?: Readonly<Record<string, unknown>>;
  readonly default_endpoint_settings?: EndpointOptions;
  readonly history_retention_seconds?: number;
}

export interface CreatedProject {
  readonly project: ProjectRow;
  readonly branch: BranchRow;
  readonly endpoint: EndpointRow;
  readonly operationIds: readonly string[];
}

export interface InsertedProject {
  readonly project: ProjectRow;
  readonly branch: BranchRow;
  readonly endpoint: EndpointRow;
  readonly operationId: string;
}

export class Projects {
  readonly #context: ControlContext;
  readonly #catalog: Catalog;
  readonly #branches: Branches;
  readonly #endpoints: Endpoints;

  constructor(context: ControlContext, catalog: Catalog, branches: Branches, endpoints: Endpoints) {
    this.#context = context;
    this.#catalog = catalog;
    this.#branches = branches;
    this.#endpoints = endpoints;
  }

  get(projectId: string): ProjectRow {
    const row = this.#context.state.get<ProjectRow>(
      'SELECT * FROM projects WHERE id = ? AND deleted_at IS NULL',
      projectId,
    );
    if (row === undefined) throw new StrataError('not-found', `project ${projectId} does not exist`);
    return row;
  }

  count(): number {
    const sql = 'SELECT count(*) AS count FROM projects WHERE deleted_at IS NULL';
    return this.#context.state.get<{ count: number }>(sql)!.count;
  }

  /** Newest first. */
  list(page: PageRequest & { readonly search?: string }): Page<ProjectRow> {
    const after = page.cursor === undefined ? [Number.MAX_SAFE_INTEGER, ''] : decodeCursor(page.cursor);
    if (after.length !== 2 || typeof after[0] !== 'number') {
      throw new StrataError('bad-request', `cursor is not one of ours: ${JSON.stringify(page.cursor)}`);
    }
    const pattern = likePattern(page.search);
    const items = this.#context.state.all<ProjectRow>(
      `SELECT * FROM projects WHERE deleted_at IS NULL AND (name LIKE ? ESCAPE '\\' OR id LIKE ? ESCAPE '\\')
        AND (created_at, id) < (?, ?) ORDER BY created_at DESC, id DESC LIMIT ?`,
      pattern,
      pattern,
      ...after,
      page.limit,
    );
    const last = items.at(-1);
    return { items, ...(last === undefined ? {} : { cursor: encodeCursor([last.created_at, last.id]) }) };
  }

  async create(options: ProjectCreateOptions): Promise<CreatedProject> {
    const { storage, config } = this.#context;
    const pgVersion = options.pg_version ?? config.defaultPgVersion;
    const { role_name: roleName = DEFAULT_ROLE_NAME, database_name: databaseName = DEFAULT_DATABASE_NAME } =
      options.branch ?? {};
    this.#refusePgVersion(pgVersion);
    assertRoleName(roleName);
    assertDatabaseName(databaseName);
    const [template, role] = await Promise.all([storage.ensureTemplate(pgVersion), prepareRole(roleName)]);
    const begun = this.#context.state.transaction(() => {
      const inserted = this.#insert(options, pgVersion, role, 'create_timeline', template);
      this.#catalog.insertDatabase(inserted.branch.id, databaseName, role.name);
      return inserted;
    });
    const { project, branch } = begun;
    await this.#branches.finishCreate(begun.operationId, branch.id);
    const started = this.#endpoints.start(project.id, begun.endpoint.id);
    return {
      project: this.get(project.id),
      branch: this.#branches.get(project.id, branch.id),
      endpoint: started.endpoint,
      operationIds: [begun.operationId, ...started.operationIds],
    };
  }

  /**
   * Writes down a project whose first branch storage is still to import; `also` is called in the same transaction. Its databases are known when the cluster was
   * adopted.
   */
  async insertImported(
    options: ProjectCreateOptions & { readonly pg_version: number },
    also: (inserted: InsertedProject & { readonly ownerName: string }) => void,
  ): Promise<InsertedProject> {
    this.#refusePgVersion(options.pg_version);
    const roleName = options.branch?.role_name ?? DEFAULT_ROLE_NAME;
    assertRoleName(roleName);
    const role = await prepareRole(roleName);
    return this.#context.state.transaction(() => {
      const inserted = this.#insert(options, options.pg_version, role, 'import_data', undefined);
      also({ ...inserted, ownerName: role.name });
      return inserted;
    });
  }

  /** In a transaction. Without an ancestor the timeline is its own, from an LSN that is not known yet. */
  #insert(
    options: ProjectCreateOptions,
    pgVersion: number,
    role: NewRole,
    action: OperationAction,
    ancestor: BranchPoint | undefined,
  ): InsertedProject {
    const { state, operations, now } = this.#context;
    const projectId = newProjectId();
    const branchId = newBranchId();
    const timelineId = newTimelineId();
    const createdAt = now();
    const project: ProjectRow = {
      id: projectId,
      tenant_id: newTenantId(),
      name: options.name ?? projectId,
      pg_version: pgVersion,
      settings: JSON.stringify(options.settings ?? {}),
      default_endpoint_settings: JSON.stringify(endpointDefaults(options)),
      store_passwords: 1,
      history_retention_seconds: options.history_retention_seconds ?? DEFAULT_HISTORY_RETENTION_SECONDS,
      created_at: createdAt,
      updated_at: createdAt,
      deleted_at: null,
    };
    const branch: BranchRow = {
      id: branchId,
      project_id: projectId,
      timeline_id: timelineId,
      ancestor_timeline_id: ancestor?.timelineId ?? timelineId,
      ancestor_lsn: ancestor?.lsn ?? 0,
      parent_id: null,
      parent_timestamp_us: null,
      name: options.branch?.name ?? DEFAULT_BRANCH_NAME,
      state: 'init',
      is_default: 1,
      protected: 0,
      catalog_version: 1,
      catalog_applied: 0,
      creation_source: 'console',
      state_changed_at: createdAt,
      created_at: createdAt,
      updated_at: createdAt,
      deleted_at: null,
    };
    state.insert('projects', project);
    state.insert('branches', branch);
    this.#catalog.insertRole(branchId, role);
    const endpoint = this.#endpoints.insert(project, branchId, {});
    return { project, branch, endpoint, operationId: operations.begin(action, { projectId, branchId }) };
  }

  update(projectId: string, options: ProjectUpdateOptions): ProjectRow {
    const { state, now } = this.#context;
    return state.transaction(() => {
      const project = this.get(projectId);
      const merge = (stored: string, change: object | undefined) =>
        JSON.stringify({ ...(JSON.parse(stored) as object), ...change });
      state.update('projects', projectId, {
        ...(options.name === undefined ? {} : { name: options.name }),
        ...(options.history_retention_seconds === undefined
          ? {}
          : { history_retention_seconds: options.history_retention_seconds }),
        settings: merge(project.settings, options.settings),
        default_endpoint_settings: merge(project.default_endpoint_settings, options.default_endpoint_settings),
        updated_at: now(),
      });
      return this.get(projectId);
    });
  }

  /** Hides the project with all it has; computes and timelines are removed in the background. Returns what it was. */
  delete(projectId: string): ProjectRow {
    const { state, operations, now } = this.#context;
    const { project, removals } = state.transaction(() => {
      const row = this.get(projectId);
      const unready = this.#branches.all(projectId).find((branch) => branch.state !== 'ready');
      if (unready !== undefined) {
        throw new StrataError('locked', `branch ${unready.name} of project ${projectId} is still being created`);
      }
      state.update('projects', projectId, { deleted_at: now() });
      const branches = childrenFirst(this.#branches.all(projectId));
      return {
        project: row,
        removals: branches.map((branch) => ({ branch, operationId: this.#branches.hide(branch) })),
      };
    });
    for (const { branch, operationId } of removals) {
      operations.inBackground(`deletion of branch ${branch.id}`, this.#branches.finishDelete(operationId, branch));
    }
    return project;
  }

  #refusePgVersion(version: number): void {
    const available = this.#context.config.availablePgVersions;
    if (available.includes(version)) return;
    const have = `available: ${available.join(', ')}`;
    throw new StrataError(
      'bad-request',
      `pg_version ${version} is not available: this platform has no binaries of Postgres ${version} (${have})`,
    );
  }
}

function endpointDefaults(options: ProjectCreateOptions): EndpointOptions {
  return {
    ...(options.autoscaling_limit_min_cu === undefined
      ? {}
      : { autoscaling_limit_min_cu: options.autoscaling_limit_min_cu }),
    ...(options.autoscaling_limit_max_cu === undefined
      ? {}
      : { autoscaling_limit_max_cu: options.autoscaling_limit_max_cu }),
    ...options.default_endpoint_settings,
  };
}

/** Ordered so that each branch comes before its parent. */
export function childrenFirst(branches: readonly BranchRow[]): BranchRow[] {
  const byId = new Map(branches.map((branch) => [branch.id, branch]));
  const depths = new Map<string, number>();
  const depthOf = (branch: BranchRow): number => {
    // Without recursion: branch chains may be thousands deep.
    const chain: BranchRow[] = [];
    let at: BranchRow | undefined = branch;
    while (at !== undefined && !depths.has(at.id)) {
      chain.push(at);
      at = at.parent_id === null ? undefined : byId.get(at.parent_id);
    }
    let depth = at === undefined ? -1 : depths.get(at.id)!;
    for (const each of chain.reverse()) depths.set(each.id, ++depth);
    return depths.get(branch.id)!;
  };
  return [...branches].sort((a, b) => depthOf(b) - depthOf(a));
}
