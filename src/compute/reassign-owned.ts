/**
 * REASSIGN OWNED for the one role that Postgres refuses it for: the bootstrap superuser, whose objects it does not write down. What users made (oid
 * 16384 and above) in one database and that role owns becomes another role's; members of extensions, indexes, TOAST, row types and sequences of columns
 * follow what they belong to.
 */
import { type Client, escapeIdentifier } from 'pg';

const FIRST_NORMAL_OID = 16_384;
const BATCH = 200;
const LOCK_TIMEOUT_MS = 2_000;
const LOCK_NOT_AVAILABLE = '55P03';

/** Objects as ALTER names them: `<kind> <identity>`. */
const OWNED = `
  WITH owned AS (
    SELECT 'TABLE' AS kind, 'pg_class'::regclass AS classid, c.oid FROM pg_class AS c
     WHERE relowner = 10 AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
       AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = c.oid
                          AND refclassid = 'pg_class'::regclass AND deptype IN ('a', 'i') AND relkind = 'S')
    UNION ALL SELECT 'TYPE', 'pg_type'::regclass, t.oid FROM pg_type AS t LEFT JOIN pg_class AS c ON c.oid = typrelid
     WHERE typowner = 10 AND typtype IN ('b', 'd', 'e', 'r', 'c') AND (typrelid = 0 OR c.relkind = 'c')
       AND NOT EXISTS (SELECT FROM pg_type AS element WHERE element.typarray = t.oid)
    UNION ALL SELECT 'ROUTINE', 'pg_proc'::regclass, oid FROM pg_proc AS p WHERE proowner = 10
       AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_proc'::regclass AND objid = p.oid AND deptype = 'i')
    UNION ALL SELECT 'SCHEMA', 'pg_namespace'::regclass, oid FROM pg_namespace WHERE nspowner = 10 AND nspname !~ '^pg_(toast_)?temp_'
    UNION ALL SELECT 'OPERATOR', 'pg_operator'::regclass, oid FROM pg_operator WHERE oprowner = 10
    UNION ALL SELECT 'OPERATOR CLASS', 'pg_opclass'::regclass, oid FROM pg_opclass WHERE opcowner = 10
    UNION ALL SELECT 'OPERATOR FAMILY', 'pg_opfamily'::regclass, oid FROM pg_opfamily WHERE opfowner = 10
    UNION ALL SELECT 'COLLATION', 'pg_collation'::regclass, oid FROM pg_collation WHERE collowner = 10
    UNION ALL SELECT 'CONVERSION', 'pg_conversion'::regclass, oid FROM pg_conversion WHERE conowner = 10
    UNION ALL SELECT 'TEXT SEARCH DICTIONARY', 'pg_ts_dict'::regclass, oid FROM pg_ts_dict WHERE dictowner = 10
    UNION ALL SELECT 'TEXT SEARCH CONFIGURATION', 'pg_ts_config'::regclass, oid FROM pg_ts_config WHERE cfgowner = 10
    UNION ALL SELECT 'STATISTICS', 'pg_statistic_ext'::regclass, oid FROM pg_statistic_ext WHERE stxowner = 10
    UNION ALL SELECT 'SERVER', 'pg_foreign_server'::regclass, oid FROM pg_foreign_server WHERE srvowner = 10
    UNION ALL SELECT 'PUBLICATION', 'pg_publication'::regclass, oid FROM pg_publication WHERE pubowner = 10
    UNION ALL SELECT 'LARGE OBJECT', 'pg_largeobject'::regclass, oid FROM pg_largeobject_metadata WHERE lomowner = 10
  )
  SELECT kind || ' ' || identity AS object FROM owned, pg_identify_object(classid, owned.oid, 0)
   WHERE owned.oid >= ${FIRST_NORMAL_OID} AND identity IS NOT NULL
     AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.classid = owned.classid AND d.objid = owned.oid AND d.deptype = 'e')`;

/** Trusted extensions may be changed and dropped by who owns them; there is no ALTER for it. */
const OWN_EXTENSIONS = `
  WITH taken AS (
    UPDATE pg_extension SET extowner = $1::regrole
     WHERE extowner = 10 AND oid >= ${FIRST_NORMAL_OID}
       AND extname IN (SELECT name FROM pg_available_extension_versions WHERE trusted)
    RETURNING oid
  )
  INSERT INTO pg_shdepend (dbid, classid, objid, objsubid, refclassid, refobjid, deptype)
  SELECT (SELECT oid FROM pg_database WHERE datname = current_database()), 'pg_extension'::regclass, oid, 0,
         'pg_authid'::regclass, $1::regrole, 'o' FROM taken`;

/** Gives what could not be handed over, and why. */
export async function reassignOwned(client: Client, heir: string): Promise<string[]> {
  // Nobody else is here, but prepared transactions keep their locks.
  await client.query(`SET lock_timeout = '${LOCK_TIMEOUT_MS}ms'`);
  const { rows } = await client.query<{ object: string }>(OWNED);
  const statements = rows.map(({ object }) => `ALTER ${object} OWNER TO ${escapeIdentifier(heir)}`);
  const notes: string[] = [];
  for (let at = 0; at < statements.length; at += BATCH) {
    const batch = statements.slice(at, at + BATCH);
    try {
      // One string is one transaction.
      await client.query(batch.join('; '));
    } catch {
      notes.push(...(await oneByOne(client, batch)));
    }
  }
  const schema = await client.query(`SELECT FROM pg_namespace WHERE nspname = 'public' AND nspowner = 10`);
  if (schema.rowCount === 1) await client.query('ALTER SCHEMA public OWNER TO pg_database_owner');
  await client.query(OWN_EXTENSIONS, [escapeIdentifier(heir)]);
  return notes;
}

async function oneByOne(client: Client, statements: readonly string[]): Promise<string[]> {
  const notes: string[] = [];
  for (const statement of statements) {
    await client.query(statement).catch((error: unknown) => {
      const { code, message } = error as { code?: string; message: string };
      const held = 'a prepared transaction holds a lock on it; finish that (COMMIT PREPARED) before the import';
      notes.push(`it stays the platform's (${statement}): ${code === LOCK_NOT_AVAILABLE ? held : message}`);
    });
  }
  return notes;
}
