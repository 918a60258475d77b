/** A workload that makes every type of heap, heap2 and sequence record appear that the server's settings allow. */

import { setTimeout as sleep } from 'node:timers/promises';

import type { WorkloadSessions } from './recorded-wal.ts';

type Sql = WorkloadSessions['sql'];

export async function heapWorkload({ sql: query, connect }: WorkloadSessions): Promise<void> {
  const sql = statementByStatement(query);
  await rows(sql);
  await chains(sql);
  await wideRows(sql);
  await bulk(sql);
  await visibility(sql);
  await partitions(sql);
  await sequences(sql);
  await subtransactions(sql);
  await rewrites(sql);
  await locks({ sql, connect });
  await speculation({ sql, connect });
  await databases(sql);
}

/** What only a server with wal_level = logical writes. */
export async function logicalWorkload({ sql: query }: WorkloadSessions): Promise<void> {
  const sql = statementByStatement(query);
  await sql(`SELECT pg_create_logical_replication_slot('strata', 'pgoutput')`);
  await sql(`CREATE TABLE lg (id int PRIMARY KEY, v text) WITH (user_catalog_table = true)`);
  await sql(`ALTER TABLE lg REPLICA IDENTITY FULL`);
  await sql(`INSERT INTO lg SELECT i, repeat('l', i) FROM generate_series(1, 300) i`);
  await sql(`UPDATE lg SET v = v || 'x' WHERE id % 3 = 0; DELETE FROM lg WHERE id % 5 = 0`);
  await sql(`BEGIN; UPDATE lg SET v = 'new' WHERE id < 50; CREATE TABLE lg2 (LIKE lg); COMMIT`);
  await sql(`VACUUM FULL lg; VACUUM FULL pg_class`);
  await sql(`TRUNCATE lg`);
  await sql(`SELECT pg_logical_emit_message(true, 'strata', 'hello')`);
}

/** Statements sent as one text would be one transaction, in which VACUUM may not run. Returns the last one's result. */
function statementByStatement(sql: Sql): Sql {
  return async (text) => {
    const statements = text.includes('$$') ? [text] : text.split(/;\s*/);
    let result = await sql(statements[0] ?? '');
    for (const statement of statements.slice(1)) result = await sql(statement);
    return result;
  };
}

/** Insertions, updates of every part of a row, deletions, toasted values, nulls, columns added and dropped. */
async function rows(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE h_rows (id int, a text, b int, c text, d timestamptz DEFAULT now(), e numeric)`);
  await sql(`CREATE INDEX h_rows_id ON h_rows (id)`);
  await sql(
    `INSERT INTO h_rows (id, a, b) SELECT i, repeat(chr(97 + i % 26), i % 90), i FROM generate_series(1, 1500) i`,
  );
  await sql(`UPDATE h_rows SET b = b + 1 WHERE id % 3 = 0`);
  await sql(`UPDATE h_rows SET c = a, e = id / 7.0 WHERE id % 5 = 0`);
  await sql(`UPDATE h_rows SET a = NULL WHERE id % 11 = 0; UPDATE h_rows SET id = id + 10000 WHERE id % 13 = 0`);
  await sql(`UPDATE h_rows SET a = left(a, 3) || 'middle' || right(a, 5) WHERE id % 7 = 0`);
  await sql(`DELETE FROM h_rows WHERE id % 4 = 1`);
  await sql(`ALTER TABLE h_rows ADD COLUMN f int DEFAULT 7, DROP COLUMN b`);
  await sql(`UPDATE h_rows SET f = f + 1 WHERE id % 6 = 0`);
  await sql(
    `BEGIN; INSERT INTO h_rows (id) SELECT generate_series(1, 200); DELETE FROM h_rows WHERE id < 50; ROLLBACK`,
  );
  await sql(`CREATE TABLE h_toast (id int PRIMARY KEY, v text)`);
  await sql(`ALTER TABLE h_toast ALTER v SET STORAGE EXTERNAL`);
  await sql(`INSERT INTO h_toast SELECT i, repeat(md5(i::text), 200 + i) FROM generate_series(1, 40) i`);
  await sql(`UPDATE h_toast SET v = v || 'tail' WHERE id % 2 = 0; DELETE FROM h_toast WHERE id % 3 = 0`);
  await sql(`VACUUM h_toast`);
}

/** HOT chains that are pruned on access and by VACUUM, with and without indexes, and pages that lose line pointers. */
async function chains(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE h_chain (id int PRIMARY KEY, n int, pad text) WITH (fillfactor = 60)`);
  await sql(`INSERT INTO h_chain SELECT i, 0, repeat('p', 50) FROM generate_series(1, 600) i`);
  for (let round = 0; round < 8; round++) await sql(`UPDATE h_chain SET n = n + 1 WHERE id % 4 <> ${round % 4}`);
  await sql(`SELECT count(*) FROM h_chain`);
  await sql(`DELETE FROM h_chain WHERE id % 5 = 0`);
  await sql(`SELECT count(*) FROM h_chain`);
  await sql(`VACUUM h_chain`);
  await sql(`INSERT INTO h_chain SELECT i, 1, 'back' FROM generate_series(1, 600, 5) i ON CONFLICT DO NOTHING`);
  await sql(`DELETE FROM h_chain WHERE id % 2 = 1; UPDATE h_chain SET pad = 'short'`);
  await sql(`VACUUM (INDEX_CLEANUP off) h_chain; VACUUM h_chain`);
  await sql(`CREATE TABLE h_bare (n int, pad text)`);
  await sql(`INSERT INTO h_bare SELECT i, repeat('b', i % 40) FROM generate_series(1, 900) i`);
  await sql(`UPDATE h_bare SET n = n + 1 WHERE n % 2 = 0; DELETE FROM h_bare WHERE n % 3 = 0`);
  await sql(`VACUUM h_bare; INSERT INTO h_bare SELECT i, 'again' FROM generate_series(1, 500) i`);
  await sql(`DELETE FROM h_bare WHERE ctid > '(2,0)'; VACUUM h_bare`);
  await sql(`DELETE FROM h_bare; VACUUM h_bare; INSERT INTO h_bare VALUES (1, 'one')`);
}

/** Rows as long as a page takes, and null bitmaps of several bytes. */
async function wideRows(sql: Sql): Promise<void> {
  const columns = Array.from({ length: 60 }, (_, i) => `c${i} int`).join(', ');
  await sql(`CREATE TABLE h_wide (id int, ${columns}, v text)`);
  await sql(`ALTER TABLE h_wide ALTER v SET STORAGE PLAIN`);
  await sql(
    `INSERT INTO h_wide (id, c3, c41, v) SELECT i, i, -i, repeat('w', 7000 + i * 20) FROM generate_series(1, 40) i`,
  );
  await sql(`UPDATE h_wide SET c59 = id WHERE id % 2 = 0`);
  await sql(`UPDATE h_wide SET v = left(v, 100), c0 = 1, c17 = 2 WHERE id % 3 = 0`);
  await sql(`UPDATE h_wide SET c1 = 1 WHERE id % 6 = 0; UPDATE h_wide SET c1 = NULL, c59 = NULL WHERE id % 6 = 0`);
}

/** COPY and INSERT … SELECT in batches: on new pages and on pages that have rows, frozen from the start and not. */
async function bulk(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE h_bulk (id int, v text)`);
  await sql(`INSERT INTO h_bulk VALUES (0, 'first')`);
  const program = (rowCount: number): string => `PROGRAM 'seq 1 ${rowCount} | sed "s/$/\\tvalue of a row/"'`;
  await sql(`COPY h_bulk FROM ${program(3000)}`);
  await sql(`COPY h_bulk FROM ${program(30)}`);
  await sql(`DELETE FROM h_bulk WHERE id % 3 = 0; VACUUM h_bulk; COPY h_bulk FROM ${program(700)}`);
  await sql(`BEGIN; CREATE TABLE h_frozen (id int, v text); COPY h_frozen FROM ${program(2000)} (FREEZE); COMMIT`);
  await sql(`UPDATE h_frozen SET v = 'thawed' WHERE id % 400 = 0; COPY h_frozen FROM ${program(50)}`);
}

/** Bits of the visibility map set by VACUUM and cleared by each kind of change; tables whose end is cut off. */
async function visibility(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE h_vis (id int PRIMARY KEY, v text) WITH (fillfactor = 90)`);
  await sql(`INSERT INTO h_vis SELECT i, repeat('v', 100) FROM generate_series(1, 2000) i`);
  await sql(`VACUUM (FREEZE) h_vis`);
  await sql(`UPDATE h_vis SET v = 'updated' WHERE id = 100; DELETE FROM h_vis WHERE id = 300`);
  await sql(`SELECT * FROM h_vis WHERE id = 500 FOR UPDATE; INSERT INTO h_vis VALUES (5000, 'new')`);
  await sql(`UPDATE h_vis SET v = repeat('long', 300) WHERE id IN (700, 900, 901)`);
  await sql(`VACUUM h_vis; SELECT * FROM h_vis WHERE id = 700 FOR SHARE; VACUUM (FREEZE) h_vis`);
  await sql(`DELETE FROM h_vis WHERE id > 1000; VACUUM h_vis`);
  await sql(`INSERT INTO h_vis SELECT i, repeat('n', 100) FROM generate_series(6000, 8000) i; VACUUM h_vis`);
  await sql(`DELETE FROM h_vis; VACUUM h_vis; INSERT INTO h_vis VALUES (1, 'x'); VACUUM h_vis; TRUNCATE h_vis`);
  await sql(`INSERT INTO h_vis VALUES (1, 'x'); VACUUM (FREEZE) h_vis; ANALYZE h_vis`);
}

async function partitions(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE h_part (k int, v text) PARTITION BY RANGE (k)`);
  await sql(`CREATE TABLE h_part1 PARTITION OF h_part FOR VALUES FROM (0) TO (100)`);
  await sql(`CREATE TABLE h_part2 PARTITION OF h_part FOR VALUES FROM (100) TO (200)`);
  await sql(
    `INSERT INTO h_part SELECT i, 'row' FROM generate_series(0, 99) i; UPDATE h_part SET k = k + 100 WHERE k < 30`,
  );
}

async function sequences(sql: Sql): Promise<void> {
  await sql(`CREATE SEQUENCE h_seq CACHE 5; SELECT nextval('h_seq') FROM generate_series(1, 100)`);
  await sql(
    `SELECT setval('h_seq', 4000); ALTER SEQUENCE h_seq INCREMENT BY 3 RESTART WITH 9; SELECT nextval('h_seq')`,
  );
  await sql(
    `CREATE TABLE h_serial (id bigserial, v text); INSERT INTO h_serial (v) SELECT 'x' FROM generate_series(1, 70)`,
  );
}

/** More subtransactions than a backend remembers, some rolled back; a transaction prepared and one rolled back when prepared. */
async function subtransactions(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE h_sub (id int PRIMARY KEY, v int)`);
  await sql(`DO $$ BEGIN FOR i IN 1..150 LOOP BEGIN INSERT INTO h_sub VALUES (i, 0); UPDATE h_sub SET v = i WHERE id = i - 1;
    IF i % 7 = 0 THEN RAISE EXCEPTION 'undone'; END IF; EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$`);
  await sql(`BEGIN; UPDATE h_sub SET v = -1 WHERE id < 20; PREPARE TRANSACTION 'one'`);
  await sql(`BEGIN; SAVEPOINT s; DELETE FROM h_sub WHERE id > 140; PREPARE TRANSACTION 'two'`);
  await sql(`COMMIT PREPARED 'one'`);
  await sql(`ROLLBACK PREPARED 'two'`);
}

async function rewrites(sql: Sql): Promise<void> {
  await sql(`VACUUM FULL h_rows`);
  await sql(`CLUSTER h_rows USING h_rows_id`);
  await sql(`ALTER TABLE h_chain ALTER n TYPE bigint; CREATE INDEX h_chain_n ON h_chain (n); REINDEX TABLE h_chain`);
  await sql(`CREATE TABLE h_as AS SELECT * FROM h_rows; CREATE MATERIALIZED VIEW h_mv AS SELECT id, a FROM h_rows`);
  await sql(`REFRESH MATERIALIZED VIEW h_mv; CREATE UNLOGGED TABLE h_un (id int); INSERT INTO h_un VALUES (1)`);
  await sql(`ALTER TABLE h_un SET LOGGED; DROP TABLE h_as; ANALYZE`);
  await sql(`BEGIN; CREATE TABLE h_gone AS SELECT generate_series(1, 500) i; ROLLBACK`);
}

/** Rows locked by several transactions, versions of rows locked while they are updated, and both frozen afterwards. */
async function locks({ sql, connect }: WorkloadSessions): Promise<void> {
  const second = await connect();
  const third = await connect();
  await sql(`CREATE TABLE h_lock (id int PRIMARY KEY, v int)`);
  await sql(`INSERT INTO h_lock SELECT i, 0 FROM generate_series(1, 300) i; VACUUM (FREEZE) h_lock`);
  await sql(`BEGIN; SELECT * FROM h_lock WHERE id <= 40 FOR SHARE`);
  await second.query(`BEGIN; SELECT * FROM h_lock WHERE id <= 20 FOR SHARE`);
  await third.query(
    `BEGIN; SELECT * FROM h_lock WHERE id <= 50 FOR KEY SHARE; SAVEPOINT a; SELECT * FROM h_lock WHERE id <= 5 FOR SHARE`,
  );
  await second.query(`UPDATE h_lock SET v = 1 WHERE id BETWEEN 45 AND 60`);
  await third.query(`SELECT * FROM h_lock WHERE id BETWEEN 45 AND 55 FOR KEY SHARE`);
  await second.query(`UPDATE h_lock SET v = 2 WHERE id BETWEEN 45 AND 60`);
  await third.query(`SELECT * FROM h_lock WHERE id BETWEEN 50 AND 58 FOR KEY SHARE`);
  await sql(`COMMIT`);
  await second.query(`COMMIT`);
  await sql(`SELECT count(*) FROM h_lock; VACUUM h_lock`);
  await third.query(`ROLLBACK TO a; COMMIT`);
  await sql(`DELETE FROM h_lock WHERE id < 10; VACUUM h_lock`);
  await second.query(`BEGIN; SELECT * FROM h_lock WHERE id > 290 FOR UPDATE`);
  await third.query(
    `BEGIN; SELECT * FROM h_lock WHERE id BETWEEN 200 AND 220 FOR NO KEY UPDATE; UPDATE h_lock SET id = id + 1000 WHERE id BETWEEN 210 AND 215`,
  );
  await second.query(`ROLLBACK`);
  await third.query(`COMMIT`);
  await sql(`VACUUM (FREEZE) h_lock`);
  await second.end();
  await third.end();
}

/**
 * INSERT … ON CONFLICT that goes through, one that finds a row, and one that takes back its own row because another session inserted
 * the same key meanwhile: the index's expression waits the second time it is asked for, which is after the row is in the heap.
 */
async function speculation({ sql, connect }: WorkloadSessions): Promise<void> {
  await sql(`CREATE FUNCTION spec_key(k text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
    IF current_setting('spec.block', true) = 'on' THEN
      PERFORM set_config('spec.calls', (current_setting('spec.calls')::int + 1)::text, false);
      IF current_setting('spec.calls')::int = 2 THEN PERFORM pg_advisory_lock(77), pg_advisory_unlock(77); END IF;
    END IF;
    RETURN k; END $$`);
  await sql(`CREATE TABLE h_spec (k text, v int)`);
  await sql(`CREATE UNIQUE INDEX h_spec_k ON h_spec (spec_key(k))`);
  await sql(
    `INSERT INTO h_spec SELECT 'k' || i % 50, i FROM generate_series(1, 200) i ON CONFLICT (spec_key(k)) DO NOTHING`,
  );
  await sql(`INSERT INTO h_spec VALUES ('k1', 1), ('k99', 1) ON CONFLICT (spec_key(k)) DO UPDATE SET v = 9`);

  const second = await connect();
  await second.query(`SET spec.calls = 0; SET spec.block = 'on'`);
  await sql(`SELECT pg_advisory_lock(77)`);
  const late = second.query(`INSERT INTO h_spec VALUES ('race', 2) ON CONFLICT (spec_key(k)) DO NOTHING`);
  for (let tries = 0; ; tries++) {
    const waiting = await sql(`SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted`);
    if (waiting.rowCount === 1) break;
    if (tries > 500) throw new Error('the second session never came to wait');
    await sleep(10);
  }
  await sql(`INSERT INTO h_spec VALUES ('race', 1)`);
  await sql(`SELECT pg_advisory_unlock(77)`);
  await late;
  await second.end();
}

async function databases(sql: Sql): Promise<void> {
  await sql(`CREATE DATABASE h_db_log STRATEGY wal_log`);
  await sql(`CREATE DATABASE h_db_copy STRATEGY file_copy`);
  await sql(`DROP DATABASE h_db_log`);
}

/** Sessions that change, lock, delete and bring back the same few rows at once, while another one runs VACUUM. */
export async function concurrentWorkload({ sql, connect }: WorkloadSessions): Promise<void> {
  await sql(`CREATE TABLE c_rows (id int PRIMARY KEY, n int, pad text) WITH (fillfactor = 70)`);
  await sql(`INSERT INTO c_rows SELECT i, 0, repeat('c', i % 60) FROM generate_series(1, 4000) i`);
  await sql(`VACUUM c_rows`);
  const until = Date.now() + 2_500;
  const changes = [
    `UPDATE c_rows SET n = n + 1 WHERE id = $1`,
    `UPDATE c_rows SET pad = repeat('d', $1::int % 90) WHERE id = $1::int`,
    `DELETE FROM c_rows WHERE id = $1`,
    `INSERT INTO c_rows VALUES ($1, 0, 'back') ON CONFLICT (id) DO NOTHING`,
    `SELECT 1 FROM c_rows WHERE id = $1 FOR UPDATE`,
    `SELECT 1 FROM c_rows WHERE id = $1 FOR KEY SHARE`,
    `SELECT 1 FROM c_rows WHERE id = $1 FOR SHARE`,
  ];
  const change = async (session: number): Promise<void> => {
    const client = await connect();
    for (let step = session; Date.now() < until; step++) {
      const statements = 1 + (step % 4);
      if (statements > 1) await client.query('BEGIN');
      // Rising ids within a transaction: sessions never wait for each other in a circle.
      const first = (step * 7919) % 3500;
      for (let i = 0; i < statements; i++) {
        await client.query({
          name: `s${(step + i) % changes.length}`,
          text: changes[(step + i) % changes.length]!,
          values: [first + i * 100],
        });
      }
      if (statements > 1) await client.query(step % 5 === 0 ? 'ROLLBACK' : 'COMMIT');
    }
  };
  const vacuum = async (): Promise<void> => {
    while (Date.now() < until) {
      await sql(`VACUUM c_rows`);
      await sql(`VACUUM (FREEZE) c_rows`);
      await sleep(20);
    }
  };
  await Promise.all([change(1), change(2000), change(4000), change(6000), vacuum()]);
}
