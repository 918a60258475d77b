/**
 * Branches: create (from the head, an LSN or a time of the parent), rename, set as default, delete.
 *
 * Creating is metadata only: rows here and one timeline in storage. Steps, and what a crash between them leaves:
 *   1 find the branch point (nothing written)
 *   2 transaction: branch `init`, its endpoint, roles and databases, operation `running`
 *   3 storage makes the timeline                       → a restart does step 3 again: it is repeatable
 *   4 transaction: branch `ready`, operation `finished`
 * Failing at 3 removes it again. Deleting hides the rows first, then stops computes, removes the timeline, and last the rows; a restart goes on where it stopped.
 */
import { StrataError } from '../base/errors.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { BranchPoints, type PointInHistory, type PointOptions } from './branch-points.ts';
import type { Catalog } from './catalog.ts';
import type { ControlContext } from './context.ts';
import type { EndpointOptions, Endpoints } from './endpoints.ts';
import { newBranchId, newTimelineId } from './ids.ts';
import { Lanes } from './lanes.ts';
import { type Page, type PageRequest, decodeCursor, encodeCursor } from './pagination.ts';
import type { BranchRow, EndpointRow, ImportRow, ProjectRow, State } from './state.ts';

export interface BranchCreateOptions {
  readonly parent_id?: string;
  readonly name?: string;
  readonly parent_lsn?: string;
  readonly parent_timestamp?: string;
  readonly protected?: boolean;
  readonly archived?: boolean;
  readonly init_source?: string;
  readonly expires_at?: string | null;
}

export interface BranchUpdateOptions {
  readonly name?: string;
  readonly protected?: boolean;
  readonly expires_at?: string | null;
}

export interface BranchChange {
  readonly branch: BranchRow;
  readonly endpoints: readonly EndpointRow[];
  readonly operationIds: readonly string[];
}

export type BranchSortKey = 'name' | 'created_at' | 'updated_at';

export interface BranchListOptions extends PageRequest {
  readonly search?: string;
  readonly sortBy: BranchSortKey;
  readonly descending: boolean;
}

export class Branches {
  readonly #context: ControlContext;
  readonly #catalog: Catalog;
  readonly #endpoints: Endpoints;
  readonly points: BranchPoints;
  /** One lane per project: a child's timeline goes before its parent's. */
  readonly #removals = new Lanes();

  constructor(context: ControlContext, catalog: Catalog, endpoints: Endpoints) {
    this.#context = context;
    this.#catalog = catalog;
    this.#endpoints = endpoints;
    this.points = new BranchPoints(context);
  }

  get(projectId: string, branchId: string): BranchRow {
    const row = this.#find(branchId);
    if (row?.project_id === projectId) return row;
    throw new StrataError('not-found', `branch ${branchId} does not exist in project ${projectId}`);
  }

  all(projectId: string): BranchRow[] {
    const sql = 'SELECT * FROM branches WHERE project_id = ? AND deleted_at IS NULL ORDER BY created_at, id';
    return this.#context.state.all<BranchRow>(sql, projectId);
  }

  list(projectId: string, options: BranchListOptions): Page<BranchRow> {
    const key = options.sortBy;
    const [compare, direction] = options.descending ? ['<', 'DESC'] : ['>', 'ASC'];
    const after = options.cursor === undefined ? undefined : decodeCursor(options.cursor);
    if (after !== undefined && (after.length !== 2 || (key === 'name') !== (typeof after[0] === 'string'))) {
      throw new StrataError(
        'bad-request',
        `cursor does not belong to a list sorted by ${key}: ${JSON.stringify(options.cursor)}`,
      );
    }
    const pattern = likePattern(options.search);
    const rows = this.#context.state.all<BranchRow>(
      `SELECT * FROM branches WHERE project_id = ? AND deleted_at IS NULL AND (name LIKE ? ESCAPE '\\' OR id LIKE ? ESCAPE '\\')
        ${after === undefined ? '' : `AND (${key}, id) ${compare} (?, ?)`} ORDER BY ${key} ${direction}, id ${direction} LIMIT ?`,
      projectId,
      pattern,
      pattern,
      ...(after ?? []),
      options.limit + 1,
    );
    const items = rows.slice(0, options.limit);
    const last = items.at(-1);
    return { items, ...(rows.length > items.length && last ? { cursor: encodeCursor([last[key], last.id]) } : {}) };
  }

  count(projectId: string, search?: string): number {
    const pattern = likePattern(search);
    const sql = `SELECT count(*) AS count FROM branches
      WHERE project_id = ? AND deleted_at IS NULL AND (name LIKE ? ESCAPE '\\' OR id LIKE ? ESCAPE '\\')`;
    return this.#context.state.get<{ count: number }>(sql, projectId, pattern, pattern)!.count;
  }

  defaultBranch(projectId: string): BranchRow {
    const row = this.#context.state.get<BranchRow>(
      'SELECT * FROM branches WHERE project_id = ? AND is_default = 1',
      projectId,
    );
    if (row === undefined) throw new StrataError('not-found', `project ${projectId} has no default branch`);
    return row;
  }

  /** A place in the branch's history: its head, an LSN or a time. */
  /** `locked` while it is being created. */
  ready(projectId: string, branchId: string): BranchRow {
    return this.#readyParent(projectId, branchId);
  }

  async point(projectId: string, branchId: string, at: PointOptions): Promise<PointInHistory> {
    return this.points.find(this.#readyParent(projectId, branchId), at);
  }

  async create(
    project: ProjectRow,
    options: BranchCreateOptions,
    endpointOptions: readonly EndpointOptions[],
  ): Promise<BranchChange> {
    refuseUnsupported(options, endpointOptions);
    const { state, operations, now } = this.#context;
    this.#refuseNameInUse(project.id, options.name);
    const asked = this.#readyParent(project.id, options.parent_id);
    // Read before the head is: a catalog that is applied by now is below that head.
    const catalogApplied = asked.catalog_applied;
    const point = await this.points.find(asked, { lsn: options.parent_lsn, timestamp: options.parent_timestamp });
    const parent = point.branch;

    const id = newBranchId();
    const createdAt = now();
    const begun = state.transaction(() => {
      const parentNow = this.#readyParent(project.id, parent.id);
      this.#refuseNameInUse(project.id, options.name);
      const branch: BranchRow = {
        id,
        project_id: project.id,
        timeline_id: newTimelineId(),
        ancestor_timeline_id: parent.timeline_id,
        ancestor_lsn: point.lsn,
        parent_id: parent.id,
        parent_timestamp_us: point.timestampUs ?? null,
        name: options.name ?? id,
        state: 'init',
        is_default: 0,
        protected: options.protected ? 1 : 0,
        catalog_version: Math.max(parentNow.catalog_version, 1),
        // The past may lack what was made or changed since.
        catalog_applied: point.isHead ? catalogApplied : 0,
        creation_source: 'console',
        state_changed_at: createdAt,
        created_at: createdAt,
        updated_at: createdAt,
        deleted_at: null,
      };
      state.insert('branches', branch);
      this.#catalog.copy(parent.id, id);
      const endpoints = endpointOptions.map((each) => this.#endpoints.insert(project, id, each));
      const operationId = operations.begin('create_branch', { projectId: project.id, branchId: id });
      return { endpoints, operationId };
    });
    await this.finishCreate(begun.operationId, id);
    return { branch: this.get(project.id, id), endpoints: begun.endpoints, operationIds: [begun.operationId] };
  }

  /**
   * Makes the branch's timeline and closes the operation. On failure the branch (and a project whose first it is) is removed. With `giveUp` it fails
   * with that.
   */
  finishCreate(operationId: string, branchId: string, giveUp?: StrataError): Promise<Lsn> {
    const { state, operations, storage, now } = this.#context;
    const branch = state.get<BranchRow>('SELECT * FROM branches WHERE id = ?', branchId)!;
    const project = state.get<ProjectRow>('SELECT * FROM projects WHERE id = ?', branch.project_id)!;
    const imported = state.get<ImportRow>(`SELECT * FROM imports WHERE branch_id = ?`, branchId);
    const timeline = { tenantId: project.tenant_id, timelineId: branch.timeline_id, pgVersion: project.pg_version };
    const work = async (): Promise<Lsn> => {
      if (giveUp !== undefined) throw giveUp;
      if (branch.parent_id === null) {
        await storage.setRetention(project.tenant_id, project.history_retention_seconds);
      }
      if (imported !== undefined)
        return storage.importTimeline({ ...timeline, dataDirectory: imported.data_directory });
      const ancestor = { timelineId: branch.ancestor_timeline_id, lsn: branch.ancestor_lsn };
      await storage.createTimeline({ ...timeline, ancestor });
      return branch.ancestor_lsn;
    };
    const noteImport = (importState: ImportRow['state'], error: string | null) =>
      state.run(
        'UPDATE imports SET state = ?, error = ?, updated_at = ? WHERE branch_id = ?',
        importState,
        error,
        now(),
        branchId,
      );
    return operations.run(operationId, work, {
      onFinished: (lsn) => {
        const at = now();
        state.update('branches', branchId, { state: 'ready', ancestor_lsn: lsn, state_changed_at: at, updated_at: at });
        if (imported !== undefined) noteImport('starting', null);
      },
      onFailed: (error) => {
        if (imported !== undefined) noteImport('failed', error.message);
        // Storage may have made the timeline all the same, so it is removed like any other.
        if (branch.parent_id === null) state.update('projects', project.id, { deleted_at: now() });
        const removal = this.finishDelete(this.hide(branch), branch);
        operations.inBackground(`removal of branch ${branchId}, which could not be created,`, removal);
      },
    });
  }

  update(projectId: string, branchId: string, options: BranchUpdateOptions): BranchRow {
    refuseExpiry(options.expires_at);
    const { state, now } = this.#context;
    return state.transaction(() => {
      const branch = this.get(projectId, branchId);
      if (options.name !== branch.name) this.#refuseNameInUse(projectId, options.name);
      state.update('branches', branchId, {
        ...(options.name === undefined ? {} : { name: options.name }),
        ...(options.protected === undefined ? {} : { protected: options.protected ? 1 : 0 }),
        updated_at: now(),
      });
      return this.get(projectId, branchId);
    });
  }

  setDefault(projectId: string, branchId: string): BranchRow {
    const { state, now } = this.#context;
    return state.transaction(() => {
      this.get(projectId, branchId);
      state.run('UPDATE branches SET is_default = 0 WHERE project_id = ? AND is_default = 1', projectId);
      state.update('branches', branchId, { is_default: 1, updated_at: now() });
      return this.get(projectId, branchId);
    });
  }

  /** Hides the branch at once; its computes and timeline are removed in the background. */
  delete(projectId: string, branchId: string): BranchChange {
    const { state, operations } = this.#context;
    const endpoints = this.#endpoints.ofBranch(branchId);
    const { branch, operationId } = state.transaction(() => {
      const row = this.get(projectId, branchId);
      this.#refuseDelete(row);
      return { branch: row, operationId: this.hide(row) };
    });
    operations.inBackground(`deletion of branch ${branchId}`, this.finishDelete(operationId, branch));
    return { branch, endpoints, operationIds: [operationId] };
  }

  /** The rows' part of a deletion, for use in a transaction. Returns the operation's id. */
  hide(branch: BranchRow): string {
    const { state, operations, now } = this.#context;
    state.update('branches', branch.id, { deleted_at: now(), is_default: 0 });
    state.run('UPDATE endpoints SET deleted_at = ? WHERE branch_id = ? AND deleted_at IS NULL', now(), branch.id);
    return operations.begin('delete_timeline', { projectId: branch.project_id, branchId: branch.id });
  }

  /** The world's part of a deletion; the rows go when it is done. */
  finishDelete(operationId: string, branch: BranchRow): Promise<void> {
    const { state, operations, storage } = this.#context;
    const work = async () => {
      const endpoints = state.all<{ id: string }>('SELECT id FROM endpoints WHERE branch_id = ?', branch.id);
      await Promise.all(endpoints.map((endpoint) => this.#endpoints.destroyCompute(endpoint.id)));
      const project = state.get<ProjectRow>('SELECT * FROM projects WHERE id = ?', branch.project_id)!;
      await storage.deleteTimeline(project.tenant_id, branch.timeline_id);
    };
    const onFinished = () => {
      state.run('DELETE FROM endpoints WHERE branch_id = ?', branch.id);
      state.run('DELETE FROM branches WHERE id = ?', branch.id); // Roles and databases go with it.
      purgeProject(state, branch.project_id);
    };
    return this.#removals.run(branch.project_id, () => operations.run(operationId, work, { retry: true, onFinished }));
  }

  #find(branchId: string): BranchRow | undefined {
    return this.#context.state.get<BranchRow>('SELECT * FROM branches WHERE id = ? AND deleted_at IS NULL', branchId);
  }

  #readyParent(projectId: string, parentId: string | undefined): BranchRow {
    const parent = parentId === undefined ? this.defaultBranch(projectId) : this.get(projectId, parentId);
    if (parent.state !== 'ready') throw new StrataError('locked', `branch ${parent.name} is still being created`);
    return parent;
  }

  #refuseNameInUse(projectId: string, name: string | undefined): void {
    if (name === undefined) return;
    const sql = 'SELECT * FROM branches WHERE project_id = ? AND name = ? AND deleted_at IS NULL';
    const holder = this.#context.state.get<BranchRow>(sql, projectId, name);
    if (holder === undefined) return;
    throw new StrataError('conflict', `branch name ${JSON.stringify(name)} is already in use by ${holder.id}`);
  }

  #refuseDelete(branch: BranchRow): void {
    if (branch.is_default) {
      const advice = 'set another branch as default first';
      throw new StrataError('conflict', `branch ${branch.name} is the default branch and cannot be deleted: ${advice}`);
    }
    if (branch.protected) throw new StrataError('conflict', `branch ${branch.name} is protected and cannot be deleted`);
    if (branch.state !== 'ready') throw new StrataError('locked', `branch ${branch.name} is still being created`);
    const children = this.#context.state.all<{ name: string }>(
      'SELECT name FROM branches WHERE parent_id = ? AND deleted_at IS NULL ORDER BY created_at LIMIT 5',
      branch.id,
    );
    if (children.length === 0) return;
    const names = children.map((child) => child.name).join(', ');
    throw new StrataError(
      'conflict',
      `branch ${branch.name} has child branches and cannot be deleted: delete ${names} first`,
    );
  }
}

function refuseUnsupported(options: BranchCreateOptions, endpoints: readonly EndpointOptions[]): void {
  if (endpoints.length > 1) {
    throw new StrataError('not-implemented', `a branch can have one endpoint yet, the request has ${endpoints.length}`);
  }
  if (options.archived)
    throw new StrataError('not-implemented', 'archived branches are not supported yet (archived: true)');
  if (options.init_source !== undefined && options.init_source !== 'parent-data') {
    const given = JSON.stringify(options.init_source);
    throw new StrataError('not-implemented', `init_source ${given} is not supported yet, only "parent-data" is`);
  }
  refuseExpiry(options.expires_at);
}

function refuseExpiry(expiresAt: string | null | undefined): void {
  if (expiresAt === undefined || expiresAt === null) return;
  throw new StrataError(
    'not-implemented',
    `branches that expire are not supported yet (expires_at: ${JSON.stringify(expiresAt)})`,
  );
}

/** Removes a deleted project's last rows once no branch of it is left. */
export function purgeProject(state: State, projectId: string): void {
  const kept = state.get(
    'SELECT 1 FROM projects WHERE id = ?1 AND (deleted_at IS NULL OR EXISTS (SELECT 1 FROM branches WHERE project_id = ?1))',
    projectId,
  );
  if (kept !== undefined) return;
  state.run('DELETE FROM operations WHERE project_id = ?', projectId);
  state.run(`DELETE FROM imports WHERE project_id = ? AND state <> 'failed'`, projectId);
  state.run('DELETE FROM projects WHERE id = ?', projectId);
}

/** Anything that contains the text, whatever the case. */
export function likePattern(search: string | undefined): string {
  return `%${(search ?? '').replace(/[\\%_]/g, '\\$&')}%`;
}
