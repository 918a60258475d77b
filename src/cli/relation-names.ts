/**
 * Which table a relation's file belongs to: asked of the catalogs of a branch, through its endpoint, as the owner of a database. Indexes belong to
 * their table, TOAST tables and their indexes to the table whose values they hold.
 *
 * The catalogs say what is so now. A file that is gone is known only when its number is still that of a relation, which was rewritten then.
 */
import { Client } from 'pg';

export interface RelationFile {
  readonly databaseOid: number;
  readonly relfilenode: number;
}

export type RelationRole = 'heap' | 'index' | 'toast';

export interface NamedRelation {
  readonly database: string;
  readonly schema: string;
  /** The table that it belongs to, or itself. */
  readonly table: string;
  /** Of the table, as pg_class has it. */
  readonly relkind: string;
  readonly isCatalog: boolean;
  readonly role: RelationRole;
  readonly relation: string;
  /** The relation has another file now. */
  readonly wasReplaced: boolean;
  /** The file is not the relation's first. */
  readonly isRewritten: boolean;
}

export interface CatalogNames<File extends RelationFile = RelationFile> {
  find(file: File): NamedRelation | undefined;
  /** Undefined when there is none. */
  databaseName(oid: number): string | undefined;
  /** A database that it does not know is not there. */
  readonly isComplete: boolean;
}

interface RelationRow {
  readonly oid: number;
  readonly filenode: number | null;
  readonly relname: string;
  readonly role: RelationRole;
  readonly table_name: string;
  readonly schema: string;
  readonly relkind: string;
  readonly is_catalog: boolean;
  readonly is_mapped: boolean;
}

const CONNECT_TIMEOUT_MS = 60_000;
const SHARED = 0;

const DATABASES = `SELECT oid::int8::text AS oid, datname,
  datallowconn AND pg_catalog.has_database_privilege(oid, 'CONNECT') AS is_open FROM pg_catalog.pg_database`;

const RELATIONS = `
  SELECT c.oid::int8::float8 AS oid, pg_catalog.pg_relation_filenode(c.oid)::int8::float8 AS filenode, c.relname,
    CASE WHEN owner.oid IS NOT NULL THEN 'toast' WHEN i.indexrelid IS NOT NULL THEN 'index' ELSE 'heap' END AS role,
    t.relname AS table_name, n.nspname AS schema, t.relkind::text AS relkind,
    n.nspname IN ('pg_catalog', 'information_schema') AS is_catalog, c.relfilenode = 0 AS is_mapped
  FROM pg_catalog.pg_class c
  LEFT JOIN pg_catalog.pg_index i ON i.indexrelid = c.oid
  LEFT JOIN pg_catalog.pg_class owner ON owner.reltoastrelid = COALESCE(i.indrelid, c.oid)
  JOIN pg_catalog.pg_class t ON t.oid = COALESCE(owner.oid, i.indrelid, c.oid)
  JOIN pg_catalog.pg_namespace n ON n.oid = t.relnamespace
  WHERE c.relisshared = $2
    AND (pg_catalog.pg_relation_filenode(c.oid)::int8 = ANY ($1::int8[]) OR c.oid::int8 = ANY ($1::int8[]))`;

/** `uriOf` gives the connection string of a database; without a name, of the branch's first. */
export async function readCatalogNames(
  uriOf: (database?: string) => Promise<string>,
  files: readonly RelationFile[],
): Promise<CatalogNames> {
  const filenodes = new Map<number, number[]>();
  for (const { databaseOid, relfilenode } of files) {
    const known = filenodes.get(databaseOid);
    if (known === undefined) filenodes.set(databaseOid, [relfilenode]);
    else known.push(relfilenode);
  }
  const databases = new Map<number, string>();
  const relations = new Map<string, NamedRelation>();
  const read = async (client: Client, databaseOid: number, database: string): Promise<void> => {
    const wanted = filenodes.get(databaseOid);
    if (wanted === undefined) return;
    const { rows } = await client.query<RelationRow>(RELATIONS, [wanted, databaseOid === SHARED]);
    // Those whose file it is come last, and win over those whose first file it was.
    for (const row of rows) addRelation(relations, databaseOid, row.oid, database, row, true);
    for (const row of rows)
      if (row.filenode !== null) addRelation(relations, databaseOid, row.filenode, database, row, false);
  };
  const open = new Map<number, string>();
  await withClient(await uriOf(), async (client) => {
    const { rows } = await client.query<{ oid: string; datname: string; is_open: boolean }>(DATABASES);
    for (const { oid, datname, is_open: isOpen } of rows) {
      databases.set(Number(oid), datname);
      if (isOpen) open.set(Number(oid), datname);
    }
    await read(client, SHARED, '');
  });
  for (const databaseOid of filenodes.keys()) {
    const database = open.get(databaseOid);
    if (database === undefined) continue;
    await withClient(await uriOf(database), (client) => read(client, databaseOid, database));
  }
  return {
    find: ({ databaseOid, relfilenode }) => relations.get(`${databaseOid}/${relfilenode}`),
    databaseName: (oid) => (oid === SHARED ? '' : databases.get(oid)),
    isComplete: true,
  };
}

function addRelation(
  relations: Map<string, NamedRelation>,
  databaseOid: number,
  file: number,
  database: string,
  row: RelationRow,
  wasReplaced: boolean,
): void {
  relations.set(`${databaseOid}/${file}`, {
    database,
    schema: row.schema,
    table: row.table_name,
    relkind: row.relkind,
    isCatalog: row.is_catalog,
    role: row.role,
    relation: row.relname,
    wasReplaced,
    isRewritten: !row.is_mapped && row.filenode !== row.oid,
  });
}

async function withClient<T>(uri: string, use: (client: Client) => Promise<T>): Promise<T> {
  // The certificate is the platform's own: encryption without a check of the name, as libpq does it for sslmode=require.
  const connectionString = uri.replace('sslmode=require', 'sslmode=no-verify');
  const client = new Client({
    connectionString,
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    application_name: 'strata',
  });
  client.on('error', () => {});
  try {
    await client.connect();
    return await use(client);
  } finally {
    await client.end().catch(() => {});
  }
}
