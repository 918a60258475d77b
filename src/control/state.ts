/**
 * The control plane's state: projects, branches, endpoints, roles, databases, operations, API keys and settings in one SQLite file, mode 0600.
 *
 * Invariants:
 *   - A transaction is synchronous and durable when it returns (WAL journal, synchronous=FULL). What it checked holds while it writes; after
 *     any `await` everything must be checked anew.
 *   - Each change of the world outside has an operation row written before it begins (see operations.ts).
 *   - Times are milliseconds since 1970, unless the name ends in `_us`. LSNs are integers. Flags are 0 or 1.
 *   - `deleted_at` set: gone for users, the world's side of it is being removed; the row itself goes last.
 *   - PRAGMA user_version is the number of migrations applied; a file from a newer Strata is refused.
 */
import { closeSync, openSync } from 'node:fs';
import { DatabaseSync, type SQLInputValue, type StatementSync } from 'node:sqlite';
import { StrataError } from '../base/errors.ts';

const MIGRATIONS: readonly string[] = [
  `
  CREATE TABLE projects (
    id TEXT PRIMARY KEY,
    tenant_id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    pg_version INTEGER NOT NULL,
    settings TEXT NOT NULL,
    default_endpoint_settings TEXT NOT NULL,
    store_passwords INTEGER NOT NULL,
    history_retention_seconds INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    deleted_at INTEGER
  ) STRICT;

  CREATE TABLE branches (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL REFERENCES projects (id),
    timeline_id TEXT NOT NULL UNIQUE,
    ancestor_timeline_id TEXT NOT NULL,
    ancestor_lsn INTEGER NOT NULL,
    parent_id TEXT,
    parent_timestamp_us INTEGER,
    name TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('init', 'ready')),
    is_default INTEGER NOT NULL,
    protected INTEGER NOT NULL,
    catalog_version INTEGER NOT NULL,
    catalog_applied INTEGER NOT NULL,
    creation_source TEXT NOT NULL,
    state_changed_at INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    deleted_at INTEGER
  ) STRICT;
  CREATE UNIQUE INDEX branches_name ON branches (project_id, name) WHERE deleted_at IS NULL;
  CREATE UNIQUE INDEX branches_default ON branches (project_id) WHERE is_default = 1;
  CREATE INDEX branches_parent ON branches (parent_id);

  CREATE TABLE endpoints (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL REFERENCES projects (id),
    branch_id TEXT NOT NULL REFERENCES branches (id),
    name TEXT,
    type TEXT NOT NULL CHECK (type IN ('read_write', 'read_only')),
    state TEXT NOT NULL CHECK (state IN ('init', 'active', 'idle')),
    pending_state TEXT CHECK (pending_state IN ('active', 'idle')),
    settings TEXT NOT NULL,
    autoscaling_limit_min_cu REAL NOT NULL,
    autoscaling_limit_max_cu REAL NOT NULL,
    suspend_timeout_seconds INTEGER NOT NULL,
    pooler_enabled INTEGER NOT NULL,
    disabled INTEGER NOT NULL,
    passwordless_access INTEGER NOT NULL,
    last_active INTEGER,
    started_at INTEGER,
    suspended_at INTEGER,
    creation_source TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    deleted_at INTEGER
  ) STRICT;
  CREATE UNIQUE INDEX endpoints_read_write ON endpoints (branch_id) WHERE type = 'read_write' AND deleted_at IS NULL;
  CREATE INDEX endpoints_branch ON endpoints (branch_id);
  CREATE INDEX endpoints_project ON endpoints (project_id);

  CREATE TABLE roles (
    branch_id TEXT NOT NULL REFERENCES branches (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    password_sealed BLOB NOT NULL,
    scram_verifier TEXT NOT NULL,
    protected INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    PRIMARY KEY (branch_id, name)
  ) STRICT;

  CREATE TABLE databases (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    branch_id TEXT NOT NULL REFERENCES branches (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    owner_name TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    UNIQUE (branch_id, name)
  ) STRICT;

  CREATE TABLE operations (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL,
    branch_id TEXT,
    endpoint_id TEXT,
    action TEXT NOT NULL,
    status TEXT NOT NULL,
    error TEXT,
    failures_count INTEGER NOT NULL,
    retry_at INTEGER,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
  ) STRICT;
  CREATE INDEX operations_project ON operations (project_id, sequence);
  CREATE INDEX operations_unfinished ON operations (status) WHERE status IN ('scheduling', 'running');

  CREATE TABLE api_keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    last_used_at INTEGER,
    last_used_from_addr TEXT NOT NULL
  ) STRICT;
  `,
  `
  CREATE TABLE settings (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
  ) STRICT;
  `,
  `
  CREATE TABLE imports (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL,
    branch_id TEXT NOT NULL,
    timeline_id TEXT NOT NULL,
    data_directory TEXT NOT NULL,
    owner_name TEXT NOT NULL,
    keep INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('importing', 'starting', 'finished', 'failed')),
    error TEXT,
    notes TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
  ) STRICT;
  CREATE INDEX imports_project ON imports (project_id);
  `,
  // What is asked often must not look at all of a project's endpoints, of which there may be ten thousand.
  `
  CREATE INDEX endpoints_active ON endpoints (state) WHERE state = 'active' AND deleted_at IS NULL;
  CREATE INDEX endpoints_last_active ON endpoints (project_id, last_active);
  DROP INDEX endpoints_project;
  CREATE INDEX imports_branch ON imports (branch_id);
  `,
];

/** In the data directory. */
export const STATE_FILE_NAME = 'state.db';

export interface ProjectRow {
  readonly id: string;
  readonly tenant_id: string;
  readonly name: string;
  readonly pg_version: number;
  /** JSON: ProjectSettingsData. */
  readonly settings: string;
  /** JSON: DefaultEndpointSettings. */
  readonly default_endpoint_settings: string;
  readonly store_passwords: number;
  readonly history_retention_seconds: number;
  readonly created_at: number;
  readonly updated_at: number;
  readonly deleted_at: number | null;
}

export interface BranchRow {
  readonly id: string;
  readonly project_id: string;
  readonly timeline_id: string;
  readonly ancestor_timeline_id: string;
  readonly ancestor_lsn: number;
  /** Null for a project's first branch, whose ancestor is the template. */
  readonly parent_id: string | null;
  /** The time that was asked for, when the branch was made by time. */
  readonly parent_timestamp_us: number | null;
  readonly name: string;
  readonly state: 'init' | 'ready';
  readonly is_default: number;
  readonly protected: number;
  /** Counts the changes of roles and databases; `catalog_applied` is the version that the cluster is known to have. */
  readonly catalog_version: number;
  readonly catalog_applied: number;
  readonly creation_source: string;
  readonly state_changed_at: number;
  readonly created_at: number;
  readonly updated_at: number;
  readonly deleted_at: number | null;
}

export interface EndpointRow {
  readonly id: string;
  readonly project_id: string;
  readonly branch_id: string;
  readonly name: string | null;
  readonly type: 'read_write' | 'read_only';
  readonly state: 'init' | 'active' | 'idle';
  readonly pending_state: 'active' | 'idle' | null;
  /** JSON: EndpointSettingsData. */
  readonly settings: string;
  readonly autoscaling_limit_min_cu: number;
  readonly autoscaling_limit_max_cu: number;
  /** 0: the platform's default; -1: never. */
  readonly suspend_timeout_seconds: number;
  readonly pooler_enabled: number;
  readonly disabled: number;
  readonly passwordless_access: number;
  readonly last_active: number | null;
  readonly started_at: number | null;
  readonly suspended_at: number | null;
  readonly creation_source: string;
  readonly created_at: number;
  readonly updated_at: number;
  readonly deleted_at: number | null;
}

export interface RoleRow {
  readonly branch_id: string;
  readonly name: string;
  readonly password_sealed: Uint8Array;
  readonly scram_verifier: string;
  readonly protected: number;
  readonly created_at: number;
  readonly updated_at: number;
}

export interface DatabaseRow {
  readonly id: number;
  readonly branch_id: string;
  readonly name: string;
  readonly owner_name: string;
  readonly created_at: number;
  readonly updated_at: number;
}

export interface OperationRow {
  readonly sequence: number;
  readonly id: string;
  readonly project_id: string;
  readonly branch_id: string | null;
  readonly endpoint_id: string | null;
  readonly action: OperationAction;
  readonly status: OperationStatus;
  readonly error: string | null;
  readonly failures_count: number;
  readonly retry_at: number | null;
  readonly created_at: number;
  readonly updated_at: number;
}

/** A project that came from elsewhere (imports.ts). No references: a failed import outlives its project. */
export interface ImportRow {
  readonly id: string;
  readonly project_id: string;
  readonly branch_id: string;
  readonly timeline_id: string;
  readonly data_directory: string;
  readonly owner_name: string;
  /** A failed one is not removed. */
  readonly keep: number;
  readonly state: 'importing' | 'starting' | 'finished' | 'failed';
  readonly error: string | null;
  /** JSON: what is not as it was there, for people. */
  readonly notes: string;
  readonly created_at: number;
  readonly updated_at: number;
}

export interface ApiKeyRow {
  readonly id: number;
  readonly name: string;
  readonly hash: string;
  readonly created_at: number;
  readonly last_used_at: number | null;
  readonly last_used_from_addr: string;
}

export type OperationAction =
  | 'create_timeline'
  | 'import_data'
  | 'create_branch'
  | 'delete_timeline'
  | 'start_compute'
  | 'suspend_compute'
  | 'apply_config';

export type OperationStatus = 'scheduling' | 'running' | 'finished' | 'failed';

interface TableRows {
  projects: ProjectRow;
  branches: BranchRow;
  endpoints: EndpointRow;
  roles: RoleRow;
  databases: Omit<DatabaseRow, 'id'>;
  operations: Omit<OperationRow, 'sequence'>;
  api_keys: Omit<ApiKeyRow, 'id'>;
  imports: ImportRow;
}

type Parameters = readonly SQLInputValue[];

export class State {
  readonly #database: DatabaseSync;
  readonly #statements = new Map<string, StatementSync>();
  #inTransaction = false;

  private constructor(database: DatabaseSync) {
    this.#database = database;
  }

  /** Opens or makes the file and brings it to this version's schema. Throws `conflict` for a file from a newer version. */
  static open(path: string): State {
    closeSync(openSync(path, 'a', 0o600)); // SQLite gives its -wal and -shm files the mode of the database file.
    const database = new DatabaseSync(path);
    try {
      database.exec(
        'PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA busy_timeout = 5000',
      );
      const state = new State(database);
      state.#migrate(path);
      return state;
    } catch (error) {
      database.close();
      if (error instanceof StrataError) throw error;
      const reason = error instanceof Error ? error.message : String(error);
      throw new StrataError('conflict', `${path} cannot be used: ${reason}; bring it back from a copy`, {
        cause: error,
      });
    }
  }

  close(): void {
    this.#database.close();
  }

  /** Runs `change` atomically: all of it is durable when this returns, or none of it when it throws. Joins a transaction already open. */
  transaction<T>(change: () => T): T {
    if (this.#inTransaction) return change();
    this.#database.exec('BEGIN IMMEDIATE');
    this.#inTransaction = true;
    try {
      const result = change();
      this.#database.exec('COMMIT');
      return result;
    } catch (error) {
      // On a full disk SQLite has done it already.
      if (this.#database.isTransaction) this.#database.exec('ROLLBACK');
      throw error;
    } finally {
      this.#inTransaction = false;
    }
  }

  /** The first row, typed by the caller, who writes the SQL. */
  get<Row>(sql: string, ...parameters: Parameters): Row | undefined {
    return this.#statement(sql).get(...parameters) as Row | undefined;
  }

  all<Row>(sql: string, ...parameters: Parameters): Row[] {
    return this.#statement(sql).all(...parameters) as Row[];
  }

  /** Returns how many rows changed. */
  run(sql: string, ...parameters: Parameters): number {
    return Number(this.#statement(sql).run(...parameters).changes);
  }

  insert<Table extends keyof TableRows>(table: Table, row: TableRows[Table]): void {
    const columns = Object.keys(row);
    const places = columns.map(() => '?').join(', ');
    this.run(
      `INSERT INTO ${table} (${columns.join(', ')}) VALUES (${places})`,
      ...(Object.values(row) as SQLInputValue[]),
    );
  }

  /** Sets columns of the row with that id. */
  update<Table extends 'projects' | 'branches' | 'endpoints' | 'operations' | 'api_keys'>(
    table: Table,
    id: string | number,
    change: Partial<TableRows[Table]>,
  ): void {
    const columns = Object.keys(change);
    if (columns.length === 0) return;
    const assignments = columns.map((column) => `${column} = ?`).join(', ');
    this.run(`UPDATE ${table} SET ${assignments} WHERE id = ?`, ...(Object.values(change) as SQLInputValue[]), id);
  }

  #statement(sql: string): StatementSync {
    let statement = this.#statements.get(sql);
    if (statement === undefined) {
      statement = this.#database.prepare(sql);
      this.#statements.set(sql, statement);
    }
    return statement;
  }

  #migrate(path: string): void {
    const version = (this.#database.prepare('PRAGMA user_version').get() as { user_version: number }).user_version;
    if (version > MIGRATIONS.length) {
      const message = `${path} has schema version ${version}, this Strata knows up to ${MIGRATIONS.length}: run the newer Strata that made it`;
      throw new StrataError('conflict', message);
    }
    for (let next = version; next < MIGRATIONS.length; next++) {
      this.transaction(() => {
        this.#database.exec(MIGRATIONS[next]!);
        this.#database.exec(`PRAGMA user_version = ${next + 1}`);
      });
    }
  }
}
