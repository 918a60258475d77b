/**
 * What the platform does inside a cluster as its own superuser: roles and databases that the control plane asks for, and a look at who is active.
 */
import { Client, escapeIdentifier, escapeLiteral } from 'pg';
import type { ActivitySample, CatalogSpec } from '../api/control.ts';
import type { PgVersion } from '../postgres/version.ts';
import { ADMIN_ROLE, PROPOSER_NAME } from './settings.ts';

export interface AdminAddress {
  readonly socketDir: string;
  readonly password: string;
}

/** Group of every role that owns a project: the rights of an owner, never a superuser's. */
export const OWNER_GROUP = 'strata_owner';
export const ADMIN_DATABASE = 'postgres';
/** application_name of the platform's own sessions; they do not keep a compute awake. */
const ADMIN_APPLICATION = 'strata_admin';
const CONNECT_TIMEOUT_MS = 10_000;
/**
 * A user may hold a lock on a catalog that our queries need (LOCK TABLE pg_authid is an owner's right by pg_maintain): Postgres gives up first, and
 * when it does not answer at all, we do.
 */
const STATEMENT_TIMEOUT_MS = 20_000;
/** Beyond what was to be Postgres' own timeout. */
const ANSWER_MARGIN_MS = 2_000;
/** Of a sample of the activity. */
const SAMPLE_TIMEOUT_MS = 3_000;

/** `options`: settings of the session, as on a command line. */
export async function connectAdmin(
  address: AdminAddress,
  database = ADMIN_DATABASE,
  options?: string,
): Promise<Client> {
  const client = new Client({
    host: address.socketDir,
    user: ADMIN_ROLE,
    password: address.password,
    database,
    application_name: ADMIN_APPLICATION,
    ...(options === undefined ? {} : { options }),
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    statement_timeout: STATEMENT_TIMEOUT_MS,
    query_timeout: STATEMENT_TIMEOUT_MS + ANSWER_MARGIN_MS,
  });
  client.on('error', () => {}); // the next query on it reports the loss
  await client.connect();
  return client;
}

/** Predefined roles that the owner of a project is given (https://www.postgresql.org/docs/17/predefined-roles.html). */
function ownerGrants(pgVersion: PgVersion): readonly string[] {
  const grants = ['pg_read_all_data', 'pg_write_all_data', 'pg_monitor', 'pg_signal_backend', 'pg_checkpoint'];
  if (pgVersion >= 16) grants.push('pg_create_subscription');
  if (pgVersion >= 17) grants.push('pg_maintain');
  return grants;
}

/** Predefined roles by which files and programs of the server are reached, and so those of every other project. */
export const SERVER_ROLES = ['pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program'];

/** The group of owners; once per template, and for a cluster that comes from elsewhere. Repeatable. */
export async function createOwnerGroup(client: Client, pgVersion: PgVersion): Promise<void> {
  if (pgVersion < 16) {
    // Before 16 whoever may create roles may grant any role that is no superuser's (AddRoleMems in src/backend/commands/user.c). Being a superuser is not
    // inherited: this keeps the roles from being granted, and gives nothing to anybody.
    await client.query('UPDATE pg_authid SET rolsuper = true WHERE rolname = ANY ($1)', [SERVER_ROLES]);
  }
  const existing = await client.query('SELECT FROM pg_roles WHERE rolname = $1', [OWNER_GROUP]);
  if (existing.rowCount === 0) await client.query(`CREATE ROLE ${OWNER_GROUP} NOLOGIN`);
  await client.query(`GRANT ${ownerGrants(pgVersion).join(', ')} TO ${OWNER_GROUP} WITH ADMIN OPTION`);
}

/** Creates the roles and databases that are missing and sets the roles' verifiers. Repeatable. */
export async function applyCatalog(client: Client, catalog: CatalogSpec): Promise<void> {
  const roles = await client.query<{ rolname: string }>('SELECT rolname FROM pg_roles');
  const existingRoles = new Set(roles.rows.map((row) => row.rolname));
  for (const role of catalog.roles) {
    const name = escapeIdentifier(role.name);
    const password = escapeLiteral(role.scramVerifier);
    if (existingRoles.has(role.name)) {
      await client.query(`ALTER ROLE ${name} LOGIN PASSWORD ${password}`);
    } else {
      await client.query(
        `CREATE ROLE ${name} LOGIN CREATEDB CREATEROLE BYPASSRLS IN ROLE ${OWNER_GROUP} PASSWORD ${password}`,
      );
    }
  }
  if (catalog.databases.length === 0) return;
  const databases = await client.query<{ datname: string }>('SELECT datname FROM pg_database');
  const existingDatabases = new Set(databases.rows.map((row) => row.datname));
  for (const database of catalog.databases) {
    if (existingDatabases.has(database.name)) continue;
    await client.query(
      `CREATE DATABASE ${escapeIdentifier(database.name)} OWNER ${escapeIdentifier(database.ownerName)}`,
    );
  }
}

const ACTIVITY_QUERY = `
  SELECT count(*) FILTER (WHERE backend_type = 'client backend' AND state <> 'idle')::int AS busy,
         count(*) FILTER (WHERE backend_type = 'walsender' AND application_name <> '${PROPOSER_NAME}')::int AS walsenders,
         count(*) FILTER (WHERE backend_type LIKE 'logical replication%worker' AND backend_type NOT LIKE '%launcher')::int AS subscriptions,
         count(*) FILTER (WHERE backend_type = 'autovacuum worker')::int AS autovacuum,
         (SELECT sum(sessions) FROM pg_stat_database)::text AS sessions,
         (extract(epoch FROM max(state_change) FILTER (WHERE backend_type = 'client backend')) * 1000)::float8 AS last_change
    FROM pg_stat_activity
   WHERE pid <> pg_backend_pid() AND application_name <> '${ADMIN_APPLICATION}'`;

/** Samples activity over one kept session; sessions that came and went between samples count as activity at the sample's time. */
export class ActivityMonitor {
  readonly #client: Client;
  #sessions: string | undefined;
  #lastActivityMs: number | undefined;
  #isPrepared = false;

  constructor(client: Client) {
    this.#client = client;
  }

  async sample(): Promise<ActivitySample> {
    if (!this.#isPrepared) await this.#client.query(`SET statement_timeout = ${SAMPLE_TIMEOUT_MS}`);
    this.#isPrepared = true;
    const { rows } = await this.#client.query<{
      busy: number;
      walsenders: number;
      subscriptions: number;
      autovacuum: number;
      sessions: string | null;
      last_change: number | null;
    }>(ACTIVITY_QUERY);
    const row = rows[0];
    if (row === undefined) throw new Error('the activity query gave no row');
    const sessions = row.sessions ?? '0';
    if (this.#sessions !== undefined && this.#sessions !== sessions) this.#lastActivityMs = Date.now();
    this.#sessions = sessions;
    if (row.last_change !== null) this.#lastActivityMs = Math.max(this.#lastActivityMs ?? 0, row.last_change);
    return {
      busyBackendCount: row.busy,
      walsenderCount: row.walsenders,
      activeSubscriptionCount: row.subscriptions,
      autovacuumWorkerCount: row.autovacuum,
      ...(this.#lastActivityMs === undefined ? {} : { lastActivityMs: this.#lastActivityMs }),
    };
  }
}
