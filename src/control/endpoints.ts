/**
 * Endpoints and their computes: create, start, suspend, wake, delete.
 *
 * The row's `state` is what users see; whether a compute really runs only Computes knows. All work on one endpoint's compute goes through
 * that endpoint's lane, so a wake that meets a suspend waits for it and starts again. Many clients that wake one endpoint share one start.
 *
 * A client that was sent to a compute is *entering* until its session is ready. A suspend lets those in first, so that none of them finds
 * its Postgres gone in the middle of the password exchange; those that come later wait for the suspend and for the next start.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { ComputeSpec, StartedCompute } from '../api/control.ts';
import type { Admission, EndpointRequest, RunningCompute } from '../api/wake.ts';
import { StrataError } from '../base/errors.ts';
import type { Catalog } from './catalog.ts';
import type { ControlContext } from './context.ts';
import { newEndpointId } from './ids.ts';
import { noteAdoption } from './adoption-notes.ts';
import { Lanes } from './lanes.ts';
import type { BranchRow, EndpointRow, ImportRow, ProjectRow } from './state.ts';

const DEFAULT_COMPUTE_UNITS = 0.25;
const POOLER_SUFFIX = '-pooler';
/** How long a suspend waits for entering clients: one that never sends its password must not keep an endpoint awake. */
const ENTERING_TIMEOUT_MS = 2_000;

export interface EndpointOptions {
  readonly type?: 'read_write' | 'read_only';
  readonly name?: string;
  readonly settings?: Readonly<Record<string, unknown>>;
  readonly autoscaling_limit_min_cu?: number;
  readonly autoscaling_limit_max_cu?: number;
  readonly suspend_timeout_seconds?: number;
  readonly pooler_enabled?: boolean;
  readonly disabled?: boolean;
  readonly passwordless_access?: boolean;
}

interface Entering {
  readonly gone: Promise<void>;
}

/** The entity as it is now, and the operations that were begun for it. */
export interface EndpointChange {
  readonly endpoint: EndpointRow;
  readonly operationIds: readonly string[];
}

export class Endpoints {
  readonly #context: ControlContext;
  readonly #catalog: Catalog;
  readonly #lanes = new Lanes();
  #isClosed = false;
  /** The start that the next wake may wait for: asked, and no suspend asked after it. */
  readonly #starting = new Map<string, Promise<RunningCompute>>();
  /** By endpoint: clients sent to its compute whose sessions are not ready yet. */
  readonly #entering = new Map<string, Set<Entering>>();
  /** Endpoints that are being suspended: nobody may enter. */
  readonly #leaving = new Set<string>();

  constructor(context: ControlContext, catalog: Catalog) {
    this.#context = context;
    this.#catalog = catalog;
    context.computes.onExit((endpointId, reason) => this.#onExit(endpointId, reason));
  }

  /** From now on computes may stop without it being written. */
  close(): void {
    this.#isClosed = true;
  }

  list(projectId: string): EndpointRow[] {
    const sql = 'SELECT * FROM endpoints WHERE project_id = ? AND deleted_at IS NULL ORDER BY created_at, id';
    return this.#context.state.all<EndpointRow>(sql, projectId);
  }

  ofBranch(branchId: string): EndpointRow[] {
    const sql = 'SELECT * FROM endpoints WHERE branch_id = ? AND deleted_at IS NULL ORDER BY created_at, id';
    return this.#context.state.all<EndpointRow>(sql, branchId);
  }

  /** Everything that may run, in all projects. */
  active(): EndpointRow[] {
    return this.#context.state.all<EndpointRow>(
      `SELECT * FROM endpoints WHERE state = 'active' AND deleted_at IS NULL`,
    );
  }

  get(projectId: string, endpointId: string): EndpointRow {
    const row = this.#find(endpointId);
    if (row?.project_id === projectId) return row;
    throw new StrataError('not-found', `endpoint ${endpointId} does not exist in project ${projectId}`);
  }

  /** Writes the row, for use in a transaction. The compute starts when the first client comes, or when `start` is called. */
  insert(project: ProjectRow, branchId: string, options: EndpointOptions): EndpointRow {
    refuseUnsupported(options);
    const { state } = this.#context;
    const existing = this.ofBranch(branchId).find((endpoint) => endpoint.type === 'read_write');
    if (existing !== undefined) {
      throw new StrataError('conflict', `branch ${branchId} already has a read-write endpoint, ${existing.id}`);
    }
    const defaults = JSON.parse(project.default_endpoint_settings) as EndpointOptions;
    const now = this.#context.now();
    const minimum = options.autoscaling_limit_min_cu ?? defaults.autoscaling_limit_min_cu ?? DEFAULT_COMPUTE_UNITS;
    const row: EndpointRow = {
      id: newEndpointId(),
      project_id: project.id,
      branch_id: branchId,
      name: options.name ?? null,
      type: 'read_write',
      state: 'idle',
      pending_state: null,
      settings: JSON.stringify(options.settings ?? {}),
      autoscaling_limit_min_cu: minimum,
      autoscaling_limit_max_cu: options.autoscaling_limit_max_cu ?? defaults.autoscaling_limit_max_cu ?? minimum,
      suspend_timeout_seconds: options.suspend_timeout_seconds ?? defaults.suspend_timeout_seconds ?? 0,
      pooler_enabled: options.pooler_enabled ? 1 : 0,
      disabled: options.disabled ? 1 : 0,
      passwordless_access: options.passwordless_access ? 1 : 0,
      last_active: null,
      started_at: null,
      suspended_at: null,
      creation_source: 'console',
      created_at: now,
      updated_at: now,
      deleted_at: null,
    };
    state.insert('endpoints', row);
    return row;
  }

  create(project: ProjectRow, branch: BranchRow, options: EndpointOptions): EndpointChange {
    return { endpoint: this.insert(project, branch.id, options), operationIds: [] };
  }

  update(projectId: string, endpointId: string, options: EndpointOptions): EndpointChange {
    refuseUnsupported(options);
    const { state, operations, now } = this.#context;
    const flag = (value: boolean | undefined) => (value === undefined ? undefined : value ? 1 : 0);
    const operationId = state.transaction(() => {
      const row = this.get(projectId, endpointId);
      const change = {
        name: options.name,
        settings: options.settings === undefined ? undefined : JSON.stringify(options.settings),
        autoscaling_limit_min_cu: options.autoscaling_limit_min_cu,
        autoscaling_limit_max_cu: options.autoscaling_limit_max_cu,
        suspend_timeout_seconds: options.suspend_timeout_seconds,
        pooler_enabled: flag(options.pooler_enabled),
        disabled: flag(options.disabled),
        passwordless_access: flag(options.passwordless_access),
        updated_at: now(),
      };
      const given = Object.entries(change).filter(([, value]) => value !== undefined);
      state.update('endpoints', row.id, Object.fromEntries(given) as Partial<EndpointRow>);
      return operations.begin('apply_config', { projectId, branchId: row.branch_id, endpointId }, 'finished');
    });
    const stopped = options.disabled ? this.suspend(projectId, endpointId).operationIds : [];
    return { endpoint: this.get(projectId, endpointId), operationIds: [operationId, ...stopped] };
  }

  /** Begins to start the compute; does nothing when it runs or already starts. */
  start(projectId: string, endpointId: string): EndpointChange {
    const row = this.get(projectId, endpointId);
    if (this.#running(endpointId) !== undefined || this.#starting.has(endpointId))
      return { endpoint: row, operationIds: [] };
    const { operationId, done } = this.#beginStart(row);
    this.#context.operations.inBackground(`start of endpoint ${endpointId}`, done);
    return { endpoint: this.get(projectId, endpointId), operationIds: [operationId] };
  }

  /** Begins to suspend the compute. */
  suspend(projectId: string, endpointId: string): EndpointChange {
    const row = this.get(projectId, endpointId);
    if (row.state !== 'active' && !this.#lanes.isBusy(endpointId) && this.#running(endpointId) === undefined) {
      return { endpoint: row, operationIds: [] };
    }
    const operationId = this.#context.state.transaction(() => {
      this.#context.state.update('endpoints', endpointId, { pending_state: 'idle', updated_at: this.#context.now() });
      return this.#context.operations.begin('suspend_compute', refsOf(row));
    });
    this.#starting.delete(endpointId);
    const done = this.#lanes.run(endpointId, () =>
      this.#withDoorClosed(endpointId, () => this.#suspendNow(operationId, endpointId)),
    );
    this.#context.operations.inBackground(`suspend of endpoint ${endpointId}`, done);
    return { endpoint: this.get(projectId, endpointId), operationIds: [operationId] };
  }

  restart(projectId: string, endpointId: string): EndpointChange {
    const suspended = this.suspend(projectId, endpointId);
    const started = this.start(projectId, endpointId);
    return { endpoint: started.endpoint, operationIds: [...suspended.operationIds, ...started.operationIds] };
  }

  /** Suspends when `mayStill`, asked when nothing else is under way, still agrees. Resolves to whether it was suspended. */
  suspendIf(endpointId: string, mayStill: () => Promise<boolean>): Promise<boolean> {
    const suspend = async (): Promise<boolean> => {
      if (!(await mayStill())) return false;
      const { state, operations, now } = this.#context;
      const operationId = state.transaction(() => {
        const row = this.#find(endpointId);
        if (row === undefined || row.state !== 'active') return undefined;
        state.update('endpoints', endpointId, { pending_state: 'idle', updated_at: now() });
        return operations.begin('suspend_compute', refsOf(row));
      });
      if (operationId === undefined) return false;
      await this.#suspendNow(operationId, endpointId);
      return true;
    };
    return this.#lanes.run(endpointId, () => this.#withDoorClosed(endpointId, suspend));
  }

  /** The endpoint that a client means. Messages are for the client. */
  resolve(request: EndpointRequest): EndpointRow {
    const { state } = this.#context;
    if (request.endpointId !== undefined) {
      const id = request.endpointId.endsWith(POOLER_SUFFIX)
        ? request.endpointId.slice(0, -POOLER_SUFFIX.length)
        : request.endpointId;
      const row = this.#find(id);
      if (row === undefined) throw new StrataError('not-found', `endpoint ${JSON.stringify(id)} does not exist`);
      return row;
    }
    const projects = state.all<{ id: string }>('SELECT id FROM projects WHERE deleted_at IS NULL LIMIT 2');
    if (projects.length !== 1) {
      const why = projects.length === 0 ? 'there is no project' : 'there are several projects';
      throw new StrataError(
        'not-found',
        `${why}: name the endpoint with options=endpoint%3D<id> in the connection string`,
      );
    }
    const row = state.get<EndpointRow>(
      `SELECT endpoints.* FROM branches JOIN endpoints ON endpoints.branch_id = branches.id
        WHERE branches.project_id = ? AND branches.is_default = 1 AND endpoints.type = 'read_write' AND endpoints.deleted_at IS NULL`,
      projects[0]!.id,
    );
    if (row === undefined)
      throw new StrataError('not-found', `the default branch of project ${projects[0]!.id} has no endpoint`);
    return row;
  }

  async wake(endpointId: string, signal?: AbortSignal): Promise<RunningCompute> {
    const row = this.#find(endpointId);
    if (row === undefined) throw new StrataError('not-found', `endpoint ${endpointId} does not exist`);
    const running = this.#running(endpointId);
    if (running !== undefined) return running;
    let starting = this.#starting.get(endpointId);
    if (starting === undefined) {
      starting = this.#beginStart(row).done;
      this.#context.operations.inBackground(`wake of endpoint ${endpointId}`, starting);
    }
    return signal === undefined ? starting : abortable(starting, signal);
  }

  /** wake(), for a client that is going to connect. */
  async admit(endpointId: string, signal: AbortSignal): Promise<Admission> {
    for (;;) {
      const compute = await this.wake(endpointId, signal);
      if (!this.#leaving.has(endpointId)) return { ...compute, settled: this.#enter(endpointId) };
    }
  }

  /** Takes the endpoint from users' sight and stops its compute; the row goes when that is done. */
  delete(projectId: string, endpointId: string): EndpointChange {
    const { state, operations, now } = this.#context;
    const operationId = state.transaction(() => {
      const row = this.get(projectId, endpointId);
      state.update('endpoints', row.id, { deleted_at: now(), pending_state: 'idle' });
      return operations.begin('suspend_compute', refsOf(row));
    });
    const endpoint = state.get<EndpointRow>('SELECT * FROM endpoints WHERE id = ?', endpointId)!;
    operations.inBackground(`removal of endpoint ${endpointId}`, this.finishDelete(operationId, endpointId));
    return { endpoint, operationIds: [operationId] };
  }

  finishDelete(operationId: string, endpointId: string): Promise<void> {
    const { operations, state } = this.#context;
    return operations.run(operationId, () => this.destroyCompute(endpointId), {
      retry: true,
      onFinished: () => state.run('DELETE FROM endpoints WHERE id = ?', endpointId),
    });
  }

  /** Stops the compute at once and forgets its files. The row is the caller's. */
  destroyCompute(endpointId: string): Promise<void> {
    this.#starting.delete(endpointId);
    return this.#lanes.run(endpointId, () => this.#context.computes.kill(endpointId, true));
  }

  /** Gives a running compute the branch's roles and databases as they are now; one that does not run gets them when it starts. */
  applyCatalog(branch: BranchRow, operationId: string): Promise<void> {
    const { operations, computes, state } = this.#context;
    const endpoint = this.ofBranch(branch.id).find((each) => each.type === 'read_write');
    const apply = async () => {
      if (endpoint === undefined || computes.running(endpoint.id) === undefined) return undefined;
      const version = state.get<BranchRow>('SELECT * FROM branches WHERE id = ?', branch.id)?.catalog_version;
      await computes.applyCatalog(endpoint.id, this.#catalog.spec(branch.id));
      return version;
    };
    const onFinished = (version: number | undefined) => {
      if (version !== undefined) this.#catalog.markApplied(branch.id, version);
    };
    return this.#lanes
      .run(endpoint?.id ?? branch.id, () => operations.run(operationId, apply, { onFinished }))
      .then(() => undefined);
  }

  /** After a crash of the platform: what the rows say is running is set to what is. */
  reconcile(): void {
    const { state, computes, now } = this.#context;
    state.transaction(() => {
      for (const row of state.all<EndpointRow>('SELECT * FROM endpoints WHERE deleted_at IS NULL')) {
        const actual = computes.running(row.id) === undefined ? 'idle' : 'active';
        if (row.state === actual && row.pending_state === null) continue;
        state.update('endpoints', row.id, { state: actual, pending_state: null, updated_at: now() });
      }
    });
  }

  /** A compute that runs no more, though nobody asked: what users see follows. */
  noteStopped(endpointId: string): void {
    const { state, computes, now } = this.#context;
    if (this.#lanes.isBusy(endpointId) || computes.running(endpointId) !== undefined) return;
    state.update('endpoints', endpointId, { state: 'idle', updated_at: now() });
  }

  #enter(endpointId: string): () => void {
    let left: () => void = () => {};
    const entering: Entering = { gone: new Promise((resolve) => (left = resolve)) };
    const all = this.#entering.get(endpointId) ?? new Set<Entering>();
    this.#entering.set(endpointId, all.add(entering));
    return () => {
      all.delete(entering);
      if (all.size === 0 && this.#entering.get(endpointId) === all) this.#entering.delete(endpointId);
      left();
    };
  }

  /** Does `work` when the clients that were entering are in, and lets nobody enter until it is done. */
  async #withDoorClosed<T>(endpointId: string, work: () => Promise<T>): Promise<T> {
    this.#leaving.add(endpointId);
    try {
      const entering = [...(this.#entering.get(endpointId) ?? [])];
      if (entering.length > 0) {
        const timeout = new AbortController();
        await Promise.race([
          Promise.all(entering.map(({ gone }) => gone)),
          sleep(ENTERING_TIMEOUT_MS, undefined, { signal: timeout.signal }).catch(() => {}),
        ]);
        timeout.abort();
      }
      return await work();
    } finally {
      this.#leaving.delete(endpointId);
    }
  }

  #find(endpointId: string): EndpointRow | undefined {
    return this.#context.state.get<EndpointRow>(
      'SELECT * FROM endpoints WHERE id = ? AND deleted_at IS NULL',
      endpointId,
    );
  }

  /** The compute that a client can be sent to: running, and nothing asked that might end it. */
  #running(endpointId: string): RunningCompute | undefined {
    return this.#lanes.isBusy(endpointId) ? undefined : this.#context.computes.running(endpointId);
  }

  #beginStart(row: EndpointRow): { operationId: string; done: Promise<RunningCompute> } {
    const { state, operations, now } = this.#context;
    if (row.disabled) throw new StrataError('forbidden', `endpoint ${row.id} is disabled`);
    const operationId = state.transaction(() => {
      state.update('endpoints', row.id, { pending_state: 'active', updated_at: now() });
      return operations.begin('start_compute', refsOf(row));
    });
    const done = this.#lanes.run(row.id, () => this.#startNow(operationId, row.id));
    this.#starting.set(row.id, done);
    const forget = () => {
      if (this.#starting.get(row.id) === done) this.#starting.delete(row.id);
    };
    done.then(forget, forget);
    return { operationId, done };
  }

  #startNow(operationId: string, endpointId: string): Promise<StartedCompute> {
    const { state, operations, computes, now } = this.#context;
    let appliedVersion: number | undefined;
    let branchId = '';
    let ownerName = '';
    const work = async () => {
      const { spec, branch } = this.#spec(endpointId);
      branchId = branch.id;
      ownerName = spec.adoption?.ownerName ?? '';
      if (spec.catalog !== undefined) appliedVersion = branch.catalog_version;
      return computes.start(spec);
    };
    return operations.run(operationId, work, {
      onFinished: ({ adoption }) => {
        const at = now();
        state.update('endpoints', endpointId, { state: 'active', started_at: at, last_active: at, updated_at: at });
        this.#clearPending(endpointId, 'active');
        if (appliedVersion !== undefined) this.#catalog.markApplied(branchId, appliedVersion);
        if (adoption === undefined) return;
        this.#catalog.addDatabases(branchId, adoption.databaseNames, ownerName);
        noteAdoption(this.#context, branchId, adoption);
      },
      onFailed: () => this.#clearPending(endpointId, 'active'),
    });
  }

  #suspendNow(operationId: string, endpointId: string): Promise<void> {
    const { operations, computes, state, now } = this.#context;
    return operations.run(operationId, () => computes.suspend(endpointId), {
      onFinished: () => {
        const at = now();
        state.update('endpoints', endpointId, { state: 'idle', suspended_at: at, updated_at: at });
        this.#clearPending(endpointId, 'idle');
      },
      onFailed: () => this.#clearPending(endpointId, 'idle'),
    });
  }

  /** Another change may have been asked meanwhile; its pending state stays. */
  #clearPending(endpointId: string, pending: 'active' | 'idle'): void {
    this.#context.state.run(
      'UPDATE endpoints SET pending_state = NULL WHERE id = ? AND pending_state = ?',
      endpointId,
      pending,
    );
  }

  #spec(endpointId: string): { spec: ComputeSpec; branch: BranchRow } {
    const { state } = this.#context;
    const endpoint = this.#find(endpointId);
    const branch =
      endpoint &&
      state.get<BranchRow>('SELECT * FROM branches WHERE id = ? AND deleted_at IS NULL', endpoint.branch_id);
    const project =
      branch && state.get<ProjectRow>('SELECT * FROM projects WHERE id = ? AND deleted_at IS NULL', branch.project_id);
    if (endpoint === undefined || branch === undefined || project === undefined) {
      throw new StrataError('not-found', `endpoint ${endpointId} was deleted`);
    }
    if (endpoint.disabled) throw new StrataError('forbidden', `endpoint ${endpointId} is disabled`);
    if (branch.state !== 'ready') throw new StrataError('unavailable', `branch ${branch.id} is still being created`);
    const spec: ComputeSpec = {
      endpointId,
      projectId: project.id,
      branchId: branch.id,
      tenantId: project.tenant_id,
      timelineId: branch.timeline_id,
      pgVersion: project.pg_version,
      ...(this.#catalog.isApplied(branch)
        ? {}
        : { catalog: this.#catalog.spec(branch.id), ...this.#adoption(project) }),
    };
    return { spec, branch };
  }

  /** A cluster that lacks the catalog may, in an imported project, also be one of before the adoption. */
  #adoption(project: ProjectRow): Pick<ComputeSpec, 'adoption'> {
    const sql = 'SELECT owner_name FROM imports WHERE project_id = ?';
    const row = this.#context.state.get<ImportRow>(sql, project.id);
    return row === undefined ? {} : { adoption: { ownerName: row.owner_name } };
  }

  #onExit(endpointId: string, reason: string): void {
    if (this.#isClosed) return;
    this.#context.log.warn({ endpointId, reason }, 'a compute stopped by itself; the next connection starts it again');
    this.noteStopped(endpointId);
  }
}

function refsOf(row: EndpointRow): { projectId: string; branchId: string; endpointId: string } {
  return { projectId: row.project_id, branchId: row.branch_id, endpointId: row.id };
}

function refuseUnsupported(options: EndpointOptions): void {
  if (options.type === 'read_only')
    throw new StrataError('not-implemented', 'read-only endpoints are not supported yet');
  const pgSettings = options.settings?.['pg_settings'];
  if (typeof pgSettings === 'object' && pgSettings !== null && Object.keys(pgSettings).length > 0) {
    const names = Object.keys(pgSettings).join(', ');
    throw new StrataError(
      'not-implemented',
      `settings of Postgres by endpoint are not supported yet (pg_settings: ${names})`,
    );
  }
  if (options.pooler_enabled)
    throw new StrataError('not-implemented', 'connection pooling is not supported yet (pooler_enabled: true)');
  if (options.passwordless_access) {
    throw new StrataError('not-implemented', 'passwordless access is not supported yet (passwordless_access: true)');
  }
}

/** Ends the wait, not the work, when the signal aborts. */
function abortable<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  if (signal.aborted) return Promise.reject(signal.reason as Error);
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(signal.reason as Error);
    signal.addEventListener('abort', onAbort, { once: true });
    const settled = () => signal.removeEventListener('abort', onAbort);
    work.then(resolve, reject).finally(settled);
  });
}
