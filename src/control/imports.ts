/**
 * Imports: a project whose first branch is a cluster that was made elsewhere.
 *
 *   importing   storage reads the data directory; the branch is `init`          a restart gives it up, and removes what there is
 *   starting    the branch is `ready`; its first compute adopts the cluster     a restart starts it again
 *   finished    the project is like any other
 *   failed      the project is removed, unless it was to be kept
 *
 * The row stays as long as the project, as the clusters of its branches may have to be adopted (Endpoints), and a failed one for a day, so that whoever asked can be
 * told why.
 */
import type { ImportProgress } from '../api/pageserver.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import type { Branches } from './branches.ts';
import type { ControlContext } from './context.ts';
import type { Endpoints } from './endpoints.ts';
import { newImportId } from './ids.ts';
import type { Projects } from './projects.ts';
import type { BranchRow, EndpointRow, ImportRow, ProjectRow } from './state.ts';

export interface ImportOptions {
  /** Absolute, on the pageserver's machine. */
  readonly data_directory: string;
  readonly name?: string;
  /** The project's owner; one of the cluster's roles gets a new password. */
  readonly role_name?: string;
  /** Leave what there is when the cluster cannot be started. */
  readonly keep?: boolean;
}

export interface BegunImport {
  readonly row: ImportRow;
  readonly project: ProjectRow;
  readonly branch: BranchRow;
  readonly endpoint: EndpointRow;
  readonly operationIds: readonly string[];
}

const FAILED_KEPT_MS = 24 * 3_600_000;

export class Imports {
  readonly #context: ControlContext;
  readonly #projects: Projects;
  readonly #branches: Branches;
  readonly #endpoints: Endpoints;

  constructor(context: ControlContext, projects: Projects, branches: Branches, endpoints: Endpoints) {
    this.#context = context;
    this.#projects = projects;
    this.#branches = branches;
    this.#endpoints = endpoints;
  }

  get(id: string): ImportRow {
    const row = this.#context.state.get<ImportRow>('SELECT * FROM imports WHERE id = ?', id);
    if (row === undefined) throw new StrataError('not-found', `import ${id} does not exist`);
    return row;
  }

  /** Undefined while storage does not read. */
  progress(row: ImportRow): Promise<ImportProgress | undefined> {
    return row.state === 'importing'
      ? this.#context.storage.importProgress(row.timeline_id)
      : Promise.resolve(undefined);
  }

  /** Resolves when the project is written down; the rest goes on in the background. `bad-request` for a directory that cannot be imported. */
  async begin(options: ImportOptions): Promise<BegunImport> {
    const { storage, operations, state, now } = this.#context;
    const { pgVersion, notes } = await storage.inspectImport(options.data_directory);
    const id = newImportId();
    const inserted = await this.#projects.insertImported(
      {
        pg_version: pgVersion,
        ...(options.name === undefined ? {} : { name: options.name }),
        ...(options.role_name === undefined ? {} : { branch: { role_name: options.role_name } }),
      },
      ({ branch, ownerName }) =>
        state.insert('imports', {
          id,
          project_id: branch.project_id,
          branch_id: branch.id,
          timeline_id: branch.timeline_id,
          data_directory: options.data_directory,
          owner_name: ownerName,
          keep: options.keep ? 1 : 0,
          state: 'importing',
          error: null,
          notes: JSON.stringify(notes),
          created_at: now(),
          updated_at: now(),
        }),
    );
    const { operationId, branch, endpoint } = inserted;
    const work = this.#branches.finishCreate(operationId, branch.id).then(() => this.#adopt(id));
    operations.inBackground(`import ${id}`, work);
    return {
      row: this.get(id),
      project: this.#projects.get(branch.project_id),
      branch,
      endpoint,
      operationIds: [operationId],
    };
  }

  /** Has an import that is under way fail and leave nothing. `conflict` when all is read: then the project can be deleted. */
  async cancel(id: string): Promise<ImportRow> {
    const row = this.get(id);
    if (row.state === 'starting' || row.state === 'finished') {
      throw new StrataError('conflict', `import ${id} is over: delete project ${row.project_id} if it is not wanted`);
    }
    if (row.state === 'importing') await this.#context.storage.cancelImport(row.timeline_id);
    return this.get(id);
  }

  /** After a restart: what was imported is started again. What was being imported is the operations' (Control.recover). */
  resume(): void {
    const { state, operations, now } = this.#context;
    state.run(`DELETE FROM imports WHERE state = 'failed' AND updated_at < ?`, now() - FAILED_KEPT_MS);
    for (const row of state.all<ImportRow>(`SELECT * FROM imports WHERE state = 'starting'`)) {
      operations.inBackground(`import ${row.id}`, this.#adopt(row.id));
    }
  }

  /** The first start of the compute; what it found is written by Endpoints. */
  async #adopt(id: string): Promise<void> {
    const { state, now } = this.#context;
    const row = this.get(id);
    const [endpoint] = this.#endpoints.ofBranch(row.branch_id);
    try {
      if (endpoint === undefined) throw new StrataError('not-found', `branch ${row.branch_id} has no endpoint`);
      await this.#endpoints.wake(endpoint.id);
    } catch (error) {
      const { message } = toStrataError(error);
      state.run(
        `UPDATE imports SET state = 'failed', error = ?, updated_at = ? WHERE id = ?`,
        `the cluster was read, but could not be started: ${message}`,
        now(),
        id,
      );
      if (row.keep === 0) this.#projects.delete(row.project_id);
      throw error;
    }
  }
}
