/**
 * Adoption: what turns an imported cluster into one of the platform's. Its superusers were its own people; here the only superuser is the
 * platform's role (ADMIN_ROLE), and everybody who comes through the proxy has at most the rights of an owner.
 *
 * First, in single-user mode, as nobody can connect yet (prepareAdoption):
 * - The bootstrap superuser (oid 10, usually `postgres`), which can never cease to be one, becomes the platform's role, with the platform's password. In one
 *   transaction with that a new role takes over its name, password, settings and memberships: its *heir*, which is no superuser.
 * - Subscriptions are disabled: the cluster that this is a copy of may still run, and has them.
 *
 * Then, over connections of the platform's role (adoptCluster):
 * - Every other superuser ceases to be one. They and the heir get an owner's rights (OWNER_GROUP), and so does the project's owner, who also becomes a
 *   member of all roles there are.
 * - Nobody is left a member of the roles that reach the server's files and programs, nor with rights on built-in functions beyond the usual ones.
 * - What users made and the bootstrap superuser owned becomes the heir's, in each database. Event triggers, which only a superuser may have, are disabled.
 *
 * All of it may be repeated: it is done at each start until the control plane knows that it was done whole.
 */
import { existsSync } from 'node:fs';
import { basename, isAbsolute, join } from 'node:path';
import { type Client, escapeIdentifier, escapeLiteral } from 'pg';
import type { AdoptionReport, CatalogSpec } from '../api/control.ts';
import { StrataError } from '../base/errors.ts';
import type { PgVersion } from '../postgres/version.ts';
import { ADMIN_DATABASE, applyCatalog, createOwnerGroup, OWNER_GROUP, SERVER_ROLES } from './admin.ts';
import { reassignOwned } from './reassign-owned.ts';
import { ADMIN_ROLE } from './settings.ts';
import { runSingleUser, type SingleUserOptions } from './single-user.ts';

const FIRST_NORMAL_OID = 16_384;
/** Of the platform's role, kept as its comment: who the heir is. */
const HEIR_PREFIX = 'superuser of the platform; heir of what it owned: ';
/** Names in a note, at most. */
const NAMES_SHOWN = 8;

/** Gives the platform's role its name and password. The cluster is not running, and is cleanly shut down afterwards. */
export async function prepareAdoption(
  options: Omit<SingleUserOptions, 'database'>,
  adminPassword: string,
): Promise<void> {
  const session: SingleUserOptions = { ...options, database: 'template1' };
  const { values } = await runSingleUser(session, [
    'SELECT rolname::text AS bootstrap FROM pg_authid WHERE oid = 10',
    `SELECT 'yes' AS taken FROM pg_authid WHERE rolname = '${ADMIN_ROLE}' AND oid <> 10`,
    `SELECT 'yes' AS admin_database FROM pg_database WHERE datname = '${ADMIN_DATABASE}'`,
  ]);
  const found = new Map(values);
  const bootstrap = found.get('bootstrap');
  if (bootstrap === undefined) throw new StrataError('bad-request', 'the cluster has no bootstrap superuser (oid 10)');
  if (found.has('taken')) {
    const why = `the cluster has a role ${ADMIN_ROLE}, which is the name of the platform's own`;
    throw new StrataError('bad-request', `${why}: rename it (ALTER ROLE … RENAME TO …) before the import`);
  }
  const statements = [
    ...(bootstrap === ADMIN_ROLE ? [] : [handOver(bootstrap)]),
    // Statements of one string are one transaction.
    [
      `SET LOCAL password_encryption = 'scram-sha-256'`,
      `ALTER ROLE ${ADMIN_ROLE} LOGIN SUPERUSER REPLICATION PASSWORD ${escapeLiteral(adminPassword)} VALID UNTIL 'infinity' CONNECTION LIMIT -1`,
      `ALTER ROLE ${ADMIN_ROLE} RESET ALL`,
      // Others may create functions in databases that it enters.
      `ALTER ROLE ${ADMIN_ROLE} SET search_path = pg_catalog, pg_temp`,
      'UPDATE pg_subscription SET subenabled = false WHERE subenabled',
      `UPDATE pg_database SET datallowconn = true, datconnlimit = -1 WHERE datname = '${ADMIN_DATABASE}'`,
    ].join('; '),
    ...(found.has('admin_database') ? [] : [`CREATE DATABASE ${ADMIN_DATABASE} TEMPLATE template0`]),
  ];
  const check = `SELECT 'yes' AS done FROM pg_authid WHERE oid = 10 AND rolname = '${ADMIN_ROLE}' AND rolpassword LIKE 'SCRAM-%'
    AND EXISTS (SELECT FROM pg_database WHERE datname = '${ADMIN_DATABASE}')`;
  const { values: after, complaints } = await runSingleUser(session, [...statements, check]);
  if (!new Map(after).has('done')) {
    throw new StrataError('internal', `the cluster could not be adopted: ${complaints.join('; ')}`);
  }
}

/** One transaction, as the name must never be without an owner. */
function handOver(bootstrap: string): string {
  const heir = escapeIdentifier(bootstrap);
  const heirOid = `(SELECT oid FROM pg_authid WHERE rolname = ${escapeLiteral(bootstrap)})`;
  return [
    `UPDATE pg_authid SET rolname = '${ADMIN_ROLE}' WHERE oid = 10`,
    `CREATE ROLE ${heir} LOGIN CREATEDB CREATEROLE BYPASSRLS`,
    `UPDATE pg_authid AS heir SET rolpassword = old.rolpassword, rolvaliduntil = old.rolvaliduntil, rolcanlogin = old.rolcanlogin
       FROM pg_authid AS old WHERE old.oid = 10 AND heir.rolname = ${escapeLiteral(bootstrap)}`,
    `UPDATE pg_db_role_setting SET setrole = ${heirOid} WHERE setrole = 10`,
    `UPDATE pg_auth_members SET roleid = ${heirOid} WHERE roleid = 10`,
    `UPDATE pg_auth_members SET member = ${heirOid} WHERE member = 10`,
    `COMMENT ON ROLE ${ADMIN_ROLE} IS ${escapeLiteral(HEIR_PREFIX + bootstrap)}`,
  ].join('; ');
}

export interface AdoptOptions {
  /** As the platform's role, to a database. */
  readonly connect: (database: string, options?: string) => Promise<Client>;
  readonly pgVersion: PgVersion;
  readonly catalog: CatalogSpec;
  /** The project's owner, one of the catalog's roles. */
  readonly ownerName: string;
}

/** Takes what is not an owner's from everybody, and gives an owner's to those who had it. */
export async function adoptCluster(options: AdoptOptions): Promise<AdoptionReport> {
  const { connect, pgVersion, catalog, ownerName } = options;
  const notes: string[] = [];
  const client = await connect(ADMIN_DATABASE);
  try {
    const heir = await findHeir(client);
    notes.push(...(await takeRights(client)));
    await createOwnerGroup(client, pgVersion);
    const owners = await demoteSuperusers(client, heir);
    if (owners.length > 0) notes.push(`no longer superusers, with the rights of an owner: ${list(owners)}`);
    await applyCatalog(client, catalog);
    await grantOwnersRights(client, [...new Set([...owners, ownerName])]);
    notes.push(...(await checkRoles(client, ownerName)));
    const databases = await listDatabases(client);
    const taken = databases.filter(({ ownerOid, name }) => ownerOid === '10' && name !== ADMIN_DATABASE);
    for (const { name } of taken) {
      await client.query(`ALTER DATABASE ${escapeIdentifier(name)} OWNER TO ${escapeIdentifier(heir ?? ownerName)}`);
    }
    for (const { name } of databases) {
      notes.push(...(await adoptDatabase(options, name, heir ?? ownerName)).map((note) => `database ${name}: ${note}`));
    }
    const names = databases.filter(({ isTemplate }) => !isTemplate).map(({ name }) => name);
    // Whoever looks for a default means what users made.
    const databaseNames = [...names.filter((name) => name !== ADMIN_DATABASE), ADMIN_DATABASE];
    return { databaseNames, notes };
  } finally {
    await client.end();
  }
}

async function findHeir(client: Client): Promise<string | undefined> {
  const { rows } = await client.query<{ rolname: string }>(
    `SELECT rolname FROM pg_roles WHERE rolname = substr(shobj_description(10, 'pg_authid'), ${HEIR_PREFIX.length + 1})`,
  );
  return rows[0]?.rolname;
}

/** What reaches beyond the cluster. */
async function takeRights(client: Client): Promise<string[]> {
  const notes: string[] = [];
  const members = await client.query<{ role: string; member: string }>(
    `SELECT role.rolname AS role, member.rolname AS member FROM pg_auth_members
       JOIN pg_roles AS role ON role.oid = roleid JOIN pg_roles AS member ON member.oid = member
      WHERE role.rolname = ANY ($1)`,
    [SERVER_ROLES],
  );
  for (const { role, member } of members.rows) {
    await client.query(`REVOKE ${escapeIdentifier(role)} FROM ${escapeIdentifier(member)} CASCADE`);
    notes.push(`${member} is no longer a member of ${role}, which reaches the server's own files or programs`);
  }
  return notes;
}

/** The heir and all superusers but the platform's; the hidden ones of before 16 (createOwnerGroup) are none of them. */
async function demoteSuperusers(client: Client, heir: string | undefined): Promise<string[]> {
  const { rows } = await client.query<{ rolname: string }>(
    'SELECT rolname FROM pg_authid WHERE rolsuper AND oid <> 10 AND oid >= $1 ORDER BY oid',
    [FIRST_NORMAL_OID],
  );
  const names = rows.map(({ rolname }) => rolname);
  for (const name of names) await client.query(`ALTER ROLE ${escapeIdentifier(name)} NOSUPERUSER`);
  return heir === undefined ? names : [heir, ...names];
}

/** Before 16 CREATEROLE is power over all other roles; from then on it must be given for each. */
async function grantOwnersRights(client: Client, owners: readonly string[]): Promise<void> {
  for (const owner of owners) {
    const name = escapeIdentifier(owner);
    await client.query(`ALTER ROLE ${name} CREATEDB CREATEROLE BYPASSRLS`);
    await client.query(`GRANT ${OWNER_GROUP} TO ${name}`);
  }
  const { rows } = await client.query<{ rolname: string }>(
    'SELECT rolname FROM pg_authid WHERE NOT rolsuper AND oid >= $1 AND rolname <> $2',
    [FIRST_NORMAL_OID, OWNER_GROUP],
  );
  // Membership goes one way only. So first among owners, each a member of those before it, and the last of them, the project's, of all; then the rest.
  for (const [i, owner] of owners.entries()) {
    for (const earlier of owners.slice(0, i)) await grantMembership(client, earlier, owner);
  }
  for (const { rolname } of rows.filter((role) => !owners.includes(role.rolname))) {
    for (const owner of owners) await grantMembership(client, rolname, owner);
  }
}

async function grantMembership(client: Client, role: string, member: string): Promise<void> {
  const grant = `GRANT ${escapeIdentifier(role)} TO ${escapeIdentifier(member)} WITH ADMIN OPTION`;
  await client.query(grant).catch(ignoreCycle);
}

/** `role "a" is a member of role "b"`: the other way round it cannot be. */
function ignoreCycle(error: unknown): void {
  const { code } = error as { code?: string };
  if (code !== '0LP01' && code !== '42P17') throw error;
}

async function checkRoles(client: Client, ownerName: string): Promise<string[]> {
  const { rows } = await client.query<{ rolname: string; kind: string }>(
    `SELECT rolname, CASE WHEN rolpassword IS NULL THEN 'none' ELSE 'md5' END AS kind FROM pg_authid
      WHERE rolcanlogin AND oid <> 10 AND oid >= $1 AND rolname <> $2 AND (rolpassword IS NULL OR rolpassword LIKE 'md5%')
      ORDER BY rolname`,
    [FIRST_NORMAL_OID, ownerName],
  );
  const of = (wanted: string): string[] => rows.filter(({ kind }) => kind === wanted).map(({ rolname }) => rolname);
  const notes: string[] = [];
  if (of('md5').length > 0) {
    notes.push(
      `their md5 passwords do not open a session here, give them new ones (ALTER ROLE … PASSWORD): ${list(of('md5'))}`,
    );
  }
  if (of('none').length > 0) {
    notes.push(`without a password they cannot log in (ALTER ROLE … PASSWORD): ${list(of('none'))}`);
  }
  const { rows: subscriptions } = await client.query<{ subname: string }>('SELECT subname FROM pg_subscription');
  if (subscriptions.length > 0) {
    notes.push(
      `subscriptions are disabled, as the original may still have them: ${list(subscriptions.map((s) => s.subname))}`,
    );
  }
  return notes;
}

interface DatabaseFound {
  readonly name: string;
  readonly ownerOid: string;
  readonly isTemplate: boolean;
}

async function listDatabases(client: Client): Promise<DatabaseFound[]> {
  const { rows } = await client.query<{ datname: string; datdba: string; datistemplate: boolean }>(
    `SELECT datname, datdba::text, datistemplate FROM pg_database WHERE datallowconn AND datname <> 'template0' ORDER BY oid`,
  );
  return rows.map((row) => ({ name: row.datname, ownerOid: row.datdba, isTemplate: row.datistemplate }));
}

async function adoptDatabase({ connect, pgVersion }: AdoptOptions, database: string, heir: string): Promise<string[]> {
  let client: Client;
  try {
    client = await connect(database, pgVersion >= 17 ? '-c event_triggers=off' : undefined);
  } catch (error) {
    return [`nobody can connect to it: ${error instanceof Error ? error.message : String(error)}`];
  }
  try {
    const notes = await disableEventTriggers(client);
    notes.push(...(await restoreBuiltInRights(client)));
    notes.push(...(await reassignOwned(client, heir)));
    if (database === ADMIN_DATABASE) {
      // It stays the platform's, but who kept tables there goes on.
      const name = escapeIdentifier(heir);
      await client.query(`GRANT ALL ON DATABASE ${ADMIN_DATABASE} TO ${name}`);
      await client.query(
        `DO $$ BEGIN IF to_regnamespace('public') IS NOT NULL THEN GRANT ALL ON SCHEMA public TO ${name}; END IF; END $$`,
      );
    }
    notes.push(...(await checkDatabase(client)));
    return notes;
  } finally {
    await client.end();
  }
}

/** They run as whoever does what they wait for, the platform's role too. */
async function disableEventTriggers(client: Client): Promise<string[]> {
  const { rows } = await client.query<{ evtname: string }>(
    `SELECT evtname FROM pg_event_trigger WHERE evtenabled <> 'D'`,
  );
  for (const { evtname } of rows) await client.query(`ALTER EVENT TRIGGER ${escapeIdentifier(evtname)} DISABLE`);
  if (rows.length === 0) return [];
  return [`event triggers need a superuser and are disabled: ${list(rows.map((row) => row.evtname))}`];
}

/** Somebody may have been let at pg_read_file and its like. */
async function restoreBuiltInRights(client: Client): Promise<string[]> {
  const { rows } = await client.query<{ name: string }>(
    `UPDATE pg_proc AS f SET proacl = i.initprivs FROM pg_init_privs AS i
      WHERE i.classoid = 'pg_proc'::regclass AND i.objoid = f.oid AND i.privtype = 'i' AND f.oid < $1
        AND f.proacl IS DISTINCT FROM i.initprivs
      RETURNING f.proname::text AS name`,
    [FIRST_NORMAL_OID],
  );
  return rows.length === 0
    ? []
    : [`built-in functions have their usual privileges again: ${list(rows.map((row) => row.name))}`];
}

async function checkDatabase(client: Client): Promise<string[]> {
  const notes: string[] = [];
  const unlogged = await client.query<{ count: string }>(
    `SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relpersistence = 'u'`,
  );
  if (unlogged.rows[0]?.count !== '0') notes.push(`${unlogged.rows[0]?.count} unlogged tables are empty`);
  const collation = await client.query<{ of: string; stored: string; actual: string }>(
    `SELECT 'the database' AS of, datcollversion AS stored, pg_database_collation_actual_version(oid) AS actual
       FROM pg_database WHERE datname = current_database() AND datcollversion IS NOT NULL
     UNION ALL
     SELECT collname, collversion, pg_collation_actual_version(oid) FROM pg_collation
      WHERE collversion IS NOT NULL AND oid IN (SELECT indcoll FROM pg_index, unnest(indcollation) AS indcoll)`,
  );
  for (const { of, stored, actual } of collation.rows) {
    if (stored === actual) continue;
    notes.push(
      `the collation of ${of} was of version ${stored} and is of ${actual ?? 'none'} here: REINDEX what uses it, then ALTER DATABASE or ALTER COLLATION … REFRESH COLLATION VERSION`,
    );
  }
  const missing = await client.query<{ extname: string }>(
    'SELECT extname FROM pg_extension WHERE extname NOT IN (SELECT name FROM pg_available_extensions)',
  );
  if (missing.rows.length > 0) {
    notes.push(`extensions whose files are not installed here: ${list(missing.rows.map((row) => row.extname))}`);
  }
  const libraries = await missingLibraries(client);
  if (libraries.length > 0) notes.push(`libraries of functions that are not installed here: ${list(libraries)}`);
  const untrusted = await client.query<{ name: string }>(
    `SELECT p.oid::regprocedure::text AS name FROM pg_proc AS p JOIN pg_language AS l ON l.oid = prolang
      WHERE p.oid >= $1 AND NOT lanpltrusted AND lanname NOT IN ('internal', 'sql')
        AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_proc'::regclass AND objid = p.oid AND deptype = 'e')`,
    [FIRST_NORMAL_OID],
  );
  if (untrusted.rows.length > 0) {
    notes.push(
      `functions in untrusted languages can be called, not changed: ${list(untrusted.rows.map((row) => row.name))}`,
    );
  }
  return notes;
}

async function missingLibraries(client: Client): Promise<string[]> {
  const { rows } = await client.query<{ probin: string; libdir: string }>(
    `SELECT DISTINCT probin, (SELECT setting FROM pg_config WHERE name = 'PKGLIBDIR') AS libdir FROM pg_proc
      WHERE probin IS NOT NULL AND oid >= $1`,
    [FIRST_NORMAL_OID],
  );
  return rows
    .filter(({ probin, libdir }) => {
      const name = probin.replace(/^\$libdir\//, '');
      const path = isAbsolute(name) ? name : join(libdir, name);
      return !existsSync(path) && !existsSync(`${path}.so`);
    })
    .map(({ probin }) => basename(probin));
}

function list(names: readonly string[]): string {
  const shown = names.slice(0, NAMES_SHOWN).join(', ');
  return names.length > NAMES_SHOWN ? `${shown} and ${names.length - NAMES_SHOWN} more` : shown;
}
