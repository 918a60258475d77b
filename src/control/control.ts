/**
 * The control plane, put together: state and world in, projects, branches, endpoints and the wake service out.
 *
 * Life: open → recover (when storage can be asked) → startIdleMonitor → … → close. Before `recover` resolved, nothing else may be called.
 */
import { join } from 'node:path';
import { API_KEY_FILE_NAME, type Computes, type Storage } from '../api/control.ts';
import type { Admission, EndpointRequest, WakeService } from '../api/wake.ts';
import { StrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { ApiKeys } from './api-keys.ts';
import { Branches, purgeProject } from './branches.ts';
import { Catalog, prepareRole } from './catalog.ts';
import type { ControlConfig, ControlContext } from './context.ts';
import { connectionUri } from './connection-uri.ts';
import { Endpoints } from './endpoints.ts';
import { IdleMonitor } from './idle-monitor.ts';
import { Imports } from './imports.ts';
import { Operations } from './operations.ts';
import { childrenFirst, Projects } from './projects.ts';
import { SecretBox } from './secrets.ts';
import {
  type BranchRow,
  type EndpointRow,
  type OperationRow,
  type ProjectRow,
  type RoleRow,
  State,
  STATE_FILE_NAME,
} from './state.ts';

const PASSWORD_KEY_FILE_NAME = 'password-key';
/** The directory may have changed meanwhile, and whoever asked is gone. */
const IMPORT_GIVEN_UP = new StrataError(
  'unavailable',
  'the platform stopped before the import had ended: nothing is left of it, run it again',
);

export interface ControlOptions {
  readonly dataDirectory: string;
  readonly storage: Storage;
  readonly computes: Computes;
  readonly config: ControlConfig;
  readonly log: Logger;
  /** Milliseconds since 1970; the system's clock by default. */
  readonly now?: () => number;
}

export class Control implements WakeService {
  readonly projects: Projects;
  readonly imports: Imports;
  readonly branches: Branches;
  readonly endpoints: Endpoints;
  readonly catalog: Catalog;
  readonly operations: Operations;
  readonly apiKeys: ApiKeys;
  readonly context: ControlContext;
  readonly #idleMonitor: IdleMonitor;

  private constructor(context: ControlContext) {
    this.context = context;
    this.operations = context.operations;
    this.catalog = new Catalog(context);
    this.endpoints = new Endpoints(context, this.catalog);
    this.branches = new Branches(context, this.catalog, this.endpoints);
    this.projects = new Projects(context, this.catalog, this.branches, this.endpoints);
    this.imports = new Imports(context, this.projects, this.branches, this.endpoints);
    this.apiKeys = new ApiKeys(context.state, context.now);
    this.#idleMonitor = new IdleMonitor(context, this.endpoints);
  }

  /** Opens the state in the data directory, which exists. Makes the files that are missing: state, key for passwords, first API key. */
  static open(options: ControlOptions): Control {
    const { dataDirectory, storage, computes, config, log } = options;
    const now = options.now ?? Date.now;
    const state = State.open(join(dataDirectory, STATE_FILE_NAME));
    const operations = new Operations(state, now, log);
    const secrets = SecretBox.fromFile(join(dataDirectory, PASSWORD_KEY_FILE_NAME));
    const control = new Control({ state, storage, computes, operations, secrets, config, now, log });
    control.apiKeys.ensureFirstKey(join(dataDirectory, API_KEY_FILE_NAME));
    return control;
  }

  /**
   * Takes up what a crash interrupted. Creations are brought to their end and waited for (imports are given up); deletions go on in the background; a compute's
   * start is given up (the next connection starts it).
   */
  async recover(): Promise<void> {
    const { state, operations, log } = this.context;
    const unfinished = operations.unfinished();
    if (unfinished.length > 0) log.info({ count: unfinished.length }, 'taking up operations that did not finish');
    this.endpoints.reconcile();
    for (const operation of unfinished) if (!isCreation(operation)) this.#closeInterrupted(operation);
    for (const operation of unfinished) {
      if (!isCreation(operation)) continue;
      // What fails here is removed again and logged; the platform starts all the same.
      await this.branches
        .finishCreate(
          operation.id,
          operation.branch_id!,
          operation.action === 'import_data' ? IMPORT_GIVEN_UP : undefined,
        )
        .catch((error: unknown) =>
          log.error({ err: error, operation: operation.id }, 'an interrupted creation failed'),
        );
    }
    // A crash may have come between a change of a project's history window and storage's knowing of it.
    for (const row of state.all<ProjectRow>('SELECT * FROM projects WHERE deleted_at IS NULL')) {
      await this.context.storage
        .setRetention(row.tenant_id, row.history_retention_seconds)
        .catch((error: unknown) => log.error({ err: error, projectId: row.id }, 'storage was not told of a window'));
    }
    this.imports.resume();
    this.#resumeDeletions();
    for (const row of state.all<ProjectRow>('SELECT * FROM projects WHERE deleted_at IS NOT NULL'))
      purgeProject(state, row.id);
  }

  startIdleMonitor(intervalMs?: number): void {
    this.#idleMonitor.start(intervalMs);
  }

  /** One look for idle endpoints, for tests. */
  pollIdle(): Promise<void> {
    return this.#idleMonitor.poll();
  }

  /** Waits for work in the background; the computes are the caller's to stop. */
  async close(): Promise<void> {
    await this.#idleMonitor.close();
    this.endpoints.close();
    await this.operations.close();
    this.context.state.close();
  }

  async wake(request: EndpointRequest, signal: AbortSignal): Promise<Admission> {
    return this.endpoints.admit(this.endpoints.resolve(request).id, signal);
  }

  /** A new random password for the role, in force on a running compute when the operation has finished. */
  async resetPassword(
    projectId: string,
    branchId: string,
    roleName: string,
  ): Promise<{ role: RoleRow; operationId: string }> {
    const { state, operations } = this.context;
    this.catalog.role(this.branches.get(projectId, branchId).id, roleName);
    const renewed = await prepareRole(roleName);
    const { branch, operationId } = state.transaction(() => {
      const row = this.branches.get(projectId, branchId);
      this.catalog.role(branchId, roleName);
      this.catalog.setPassword(branchId, renewed);
      return { branch: row, operationId: operations.begin('apply_config', { projectId, branchId }) };
    });
    operations.inBackground(`change of the password of ${roleName}`, this.endpoints.applyCatalog(branch, operationId));
    return { role: this.catalog.role(branchId, roleName), operationId };
  }

  connectionUri(endpoint: EndpointRow, roleName: string, databaseName: string): string {
    const { config } = this.context;
    const role = this.catalog.role(endpoint.branch_id, roleName);
    const database = this.catalog.database(endpoint.branch_id, databaseName);
    return connectionUri({
      host: config.proxyHost,
      port: config.proxyPort,
      role: role.name,
      password: this.catalog.password(role),
      database: database.name,
      endpointId: endpoint.id,
    });
  }

  /** Of the oldest project's default branch, for its first database and that database's owner. */
  defaultConnectionUri(): string {
    const { state } = this.context;
    const project = state.get<ProjectRow>(
      'SELECT * FROM projects WHERE deleted_at IS NULL ORDER BY created_at, id LIMIT 1',
    );
    if (project === undefined) throw new StrataError('not-found', 'there is no project');
    const branch = this.branches.defaultBranch(project.id);
    const endpoint = this.endpoints.ofBranch(branch.id)[0];
    const database = this.catalog.databases(branch.id)[0];
    if (endpoint === undefined || database === undefined) {
      throw new StrataError(
        'not-found',
        `branch ${branch.name} of project ${project.id} has no endpoint or no database`,
      );
    }
    return this.connectionUri(endpoint, database.owner_name, database.name);
  }

  #closeInterrupted(operation: OperationRow): void {
    const { operations } = this.context;
    switch (operation.action) {
      case 'start_compute':
        operations.fail(
          operation.id,
          'the platform stopped before the compute had started; the next connection starts it',
        );
        break;
      case 'suspend_compute': // Nothing runs any more (see reconcile), or the endpoint's deletion goes on below.
      case 'apply_config': // Written; applied by the next start.
      case 'delete_timeline': // Goes on below, under a new operation.
        operations.finish(operation.id);
        break;
      case 'create_timeline':
      case 'import_data':
      case 'create_branch':
        break;
    }
  }

  #resumeDeletions(): void {
    const { state, operations } = this.context;
    const branches = childrenFirst(state.all<BranchRow>('SELECT * FROM branches WHERE deleted_at IS NOT NULL'));
    for (const branch of branches) {
      const refs = { projectId: branch.project_id, branchId: branch.id };
      const operationId = operations.begin('delete_timeline', refs);
      operations.inBackground(`deletion of branch ${branch.id}`, this.branches.finishDelete(operationId, branch));
    }
    const endpoints = state.all<EndpointRow>(
      `SELECT endpoints.* FROM endpoints JOIN branches ON branches.id = endpoints.branch_id
        WHERE endpoints.deleted_at IS NOT NULL AND branches.deleted_at IS NULL`,
    );
    for (const endpoint of endpoints) {
      const refs = { projectId: endpoint.project_id, branchId: endpoint.branch_id, endpointId: endpoint.id };
      const operationId = operations.begin('suspend_compute', refs);
      operations.inBackground(
        `removal of endpoint ${endpoint.id}`,
        this.endpoints.finishDelete(operationId, endpoint.id),
      );
    }
  }
}

function isCreation(operation: OperationRow): boolean {
  return ['create_timeline', 'import_data', 'create_branch'].includes(operation.action);
}
