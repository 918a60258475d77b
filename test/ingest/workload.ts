/** SQL that makes every kind of record that implies more than its blocks say. */

import type { Client } from 'pg';

import { parseLsn } from '../../src/postgres/lsn.ts';
import type { Lsn } from '../../src/postgres/lsn.ts';
import type { Cluster } from './cluster.ts';

/** A moment in the middle: an LSN and a time, both between two commits. */
export interface Mark {
  readonly lsn: Lsn;
  /** Microseconds since 2000-01-01. */
  readonly timeUs: number;
}

/** Leaves one prepared transaction, `left`, and the tables that the checks name. Marks the moment when there is only `orders`, whole. */
export async function runWorkload(cluster: Cluster): Promise<Mark> {
  const first = await cluster.connect();
  await visibility(first);
  const mark = await markNow(first);
  await first.query('DELETE FROM orders WHERE id > 30000');
  await truncation(first);
  await rewrites(first);
  await transactions(first);
  await multixacts(first, await cluster.connect());
  await twoPhase(first);
  await databases(cluster, first);
  await catalogs(first);
  return mark;
}

async function markNow(client: Client): Promise<Mark> {
  const { rows } = await client.query<{ lsn: string; us: string }>(
    `SELECT pg_current_wal_insert_lsn()::text AS lsn,
            ((extract(epoch FROM clock_timestamp()) - 946684800) * 1000000)::bigint::text AS us`,
  );
  return { lsn: parseLsn(rows[0]!.lsn), timeUs: Number(rows[0]!.us) };
}

/** After a restart with commit timestamps tracked. */
export async function runSecondWorkload(cluster: Cluster): Promise<void> {
  const client = await cluster.connect();
  await client.query('CREATE TABLE timed (i int)');
  await client.query(`DO $$ BEGIN FOR i IN 1..2000 LOOP
      BEGIN INSERT INTO timed VALUES (i); EXCEPTION WHEN division_by_zero THEN NULL; END;
      IF i % 4 = 0 THEN ROLLBACK; ELSIF i % 2 = 0 THEN COMMIT; END IF;
    END LOOP; END $$`);
  await client.query(
    'BEGIN; SELECT * FROM locked WHERE i < 20 FOR SHARE; SAVEPOINT s; UPDATE locked SET i = i WHERE i < 10; COMMIT',
  );
}

async function visibility(client: Client): Promise<void> {
  await client.query(`
    CREATE TABLE orders (id int PRIMARY KEY, name text, payload text);
    CREATE INDEX ON orders (name);
    INSERT INTO orders SELECT i, 'order ' || i, repeat('x', 50) FROM generate_series(1, 20000) i;`);
  await client.query('VACUUM (FREEZE) orders');
  await client.query('UPDATE orders SET payload = payload || 1 WHERE id % 50 = 0');
  await client.query('DELETE FROM orders WHERE id % 997 = 0');
  await client.query(
    'BEGIN; SELECT count(*) FROM (SELECT * FROM orders WHERE id BETWEEN 300 AND 400 FOR UPDATE) s; COMMIT',
  );
  await client.query(`COPY orders FROM PROGRAM 'seq 30001 45000 | sed "s/$/,copied,row/"' WITH (FORMAT csv)`);
  await client.query('VACUUM orders');
  await client.query('UPDATE orders SET name = name || name WHERE id % 1000 < 3');
}

async function truncation(client: Client): Promise<void> {
  await client.query(`
    CREATE TABLE shrinking (id int, t text);
    INSERT INTO shrinking SELECT i, repeat('y', 200) FROM generate_series(1, 20000) i;`);
  await client.query('VACUUM shrinking');
  await client.query('DELETE FROM shrinking WHERE id > 3000');
  await client.query('VACUUM shrinking');
  await client.query(`INSERT INTO shrinking SELECT i, 'again' FROM generate_series(1, 30000) i`);
  await client.query('VACUUM shrinking');
  await client.query('DELETE FROM shrinking');
  await client.query('VACUUM shrinking');
  await client.query(`INSERT INTO shrinking VALUES (1, 'one')`);
  await client.query('CREATE TABLE emptied AS SELECT i FROM generate_series(1, 5000) i; CREATE INDEX ON emptied (i)');
  await client.query('TRUNCATE emptied; INSERT INTO emptied VALUES (1)');
  await client.query(`BEGIN; CREATE TABLE in_one AS SELECT i FROM generate_series(1, 5000) i; TRUNCATE in_one;
    INSERT INTO in_one SELECT i FROM generate_series(1, 10) i; COMMIT`);
  await client.query('CREATE TABLE gone AS SELECT i FROM generate_series(1, 5000) i; DROP TABLE gone');
  await client.query('BEGIN; CREATE TABLE never AS SELECT i FROM generate_series(1, 5000) i; ROLLBACK');
  await client.query('BEGIN; TRUNCATE emptied; DROP TABLE shrinking; ROLLBACK');
}

async function rewrites(client: Client): Promise<void> {
  await client.query(`
    CREATE TABLE rewritten (id int PRIMARY KEY, v int, big text);
    INSERT INTO rewritten SELECT i, i, CASE WHEN i % 100 = 0 THEN (SELECT string_agg(md5(j::text), '') FROM generate_series(1, 500) j) END
      FROM generate_series(1, 3000) i;`);
  await client.query('ALTER TABLE rewritten ALTER COLUMN v TYPE bigint');
  await client.query('CLUSTER rewritten USING rewritten_pkey');
  await client.query('VACUUM FULL rewritten');
  await client.query('CREATE INDEX CONCURRENTLY rewritten_v ON rewritten (v)');
  await client.query('REINDEX TABLE CONCURRENTLY rewritten');
  await client.query('CREATE INDEX ON rewritten USING hash (v)');
  await client.query('CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY, t text)');
  await client.query(`INSERT INTO fleeting SELECT i, 'gone' FROM generate_series(1, 1000) i`);
  await client.query('CREATE TEMP TABLE temporary AS SELECT i FROM generate_series(1, 1000) i');
  await client.query(`CREATE SEQUENCE counter; SELECT nextval('counter') FROM generate_series(1, 100)`);
}

async function transactions(client: Client): Promise<void> {
  await client.query('CREATE TABLE nested (i int); CREATE TABLE many (i int)');
  await client.query(`DO $$ BEGIN FOR i IN 1..300 LOOP
      BEGIN INSERT INTO nested VALUES (i); IF i % 3 = 0 THEN RAISE division_by_zero; END IF;
      EXCEPTION WHEN division_by_zero THEN NULL; END;
    END LOOP; END $$`);
  // One transaction whose subtransactions lie on two clog pages, then enough to fill them one by one.
  await client.query(`DO $$ BEGIN FOR i IN 1..33000 LOOP
      BEGIN INSERT INTO many VALUES (i); EXCEPTION WHEN division_by_zero THEN NULL; END;
    END LOOP; END $$`);
  await client.query(`DO $$ BEGIN FOR i IN 1..2000 LOOP
      INSERT INTO many VALUES (i); IF i % 10 = 0 THEN ROLLBACK; ELSE COMMIT; END IF;
    END LOOP; END $$`);
}

/** More multixacts than a page of offsets holds, and than several pages of members. */
async function multixacts(first: Client, second: Client): Promise<void> {
  await first.query('CREATE TABLE locked AS SELECT i FROM generate_series(1, 2600) i');
  await first.query('BEGIN');
  await first.query('SELECT count(*) FROM (SELECT * FROM locked FOR KEY SHARE) s');
  await second.query(`DO $$ DECLARE r record; BEGIN FOR r IN SELECT ctid FROM locked LOOP
      BEGIN PERFORM 1 FROM locked WHERE ctid = r.ctid FOR KEY SHARE; EXCEPTION WHEN division_by_zero THEN NULL; END;
    END LOOP; END $$`);
  await first.query('UPDATE locked SET i = -i WHERE i % 7 = 0');
  await first.query('COMMIT');
}

async function twoPhase(client: Client): Promise<void> {
  const prepared = async (name: string, sql: string): Promise<void> => {
    await client.query(`BEGIN; ${sql}; PREPARE TRANSACTION '${name}'`);
  };
  await client.query(
    'CREATE TABLE kept (i int); CREATE TABLE dropped_later (i int); INSERT INTO dropped_later VALUES (1)',
  );
  await prepared(
    'committed',
    'INSERT INTO kept VALUES (1); DROP TABLE dropped_later; CREATE TABLE made_in_two (i int)',
  );
  await prepared('rolled back', 'INSERT INTO kept VALUES (2); CREATE TABLE never_made (i int)');
  await client.query(`COMMIT PREPARED 'committed'`);
  await client.query(`ROLLBACK PREPARED 'rolled back'`);
  await prepared(
    'left',
    'INSERT INTO kept VALUES (3); SAVEPOINT s; INSERT INTO kept VALUES (4); CREATE TABLE made_later (i int)',
  );
}

async function databases(cluster: Cluster, client: Client): Promise<void> {
  await client.query('CREATE DATABASE by_copy STRATEGY FILE_COPY');
  await client.query('CREATE DATABASE by_wal STRATEGY WAL_LOG');
  for (const database of ['by_copy', 'by_wal']) {
    const other = await cluster.connect(database);
    await other.query('CREATE TABLE here AS SELECT i FROM generate_series(1, 3000) i; ANALYZE');
    await other.query('VACUUM');
    await other.query('UPDATE here SET i = i + 1 WHERE i % 100 = 0');
    await other.end();
  }
  await client.query('CREATE DATABASE copied_again TEMPLATE by_copy STRATEGY FILE_COPY');
  await client.query('CREATE DATABASE dropped_copy STRATEGY FILE_COPY');
  await client.query('CREATE DATABASE dropped_wal STRATEGY WAL_LOG');
  await client.query('DROP DATABASE dropped_copy');
  await client.query('DROP DATABASE dropped_wal');
}

async function catalogs(client: Client): Promise<void> {
  await client.query('VACUUM FULL pg_class');
  await client.query('VACUUM FULL pg_database');
  await client.query('REINDEX TABLE pg_proc');
  await client.query('ANALYZE');
  await client.query('VACUUM');
}
