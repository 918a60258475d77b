/**
 * A workload that makes the record types appear that are not of one access method: transactions, statuses, multixacts, commit timestamps,
 * storage, databases, tablespaces, origins, and those of XLOG itself. 70,000 subtransactions, as statuses are cut off by whole segments.
 */

import pg from 'pg';

import type { WorkloadSessions } from './recorded-wal.ts';

const LOCKED_ROWS = 70_000;

export async function otherWorkload({ sql, connect }: WorkloadSessions): Promise<void> {
  await sql(`CREATE TABLE other (id int PRIMARY KEY, v text)`);
  await sql(`INSERT INTO other SELECT i, 'v' FROM generate_series(1, ${LOCKED_ROWS}) i`);
  await sql(`BEGIN; INSERT INTO other VALUES (-1, ''); PREPARE TRANSACTION 'kept'`);
  await sql(`COMMIT PREPARED 'kept'`);
  await sql(`BEGIN; INSERT INTO other VALUES (-2, ''); PREPARE TRANSACTION 'dropped'`);
  await sql(`ROLLBACK PREPARED 'dropped'`);
  await sql(`BEGIN; INSERT INTO other VALUES (-3, ''); ROLLBACK`);
  await sql(`SELECT pg_logical_emit_message(false, 'strata', 'hello')`);
  await origins(sql);
  await multixacts({ sql, connect });
  await files({ sql, connect });
  await sql(`SELECT pg_create_restore_point('here')`);
  await sql(`SELECT pg_backup_start('strata', true)`);
  await sql(`SELECT pg_backup_stop(false)`);
  for (const setting of ['on', 'off']) {
    await sql(`ALTER SYSTEM SET full_page_writes = ${setting}`);
    await sql(`SELECT pg_reload_conf()`);
    await sql(`SELECT pg_sleep(0.2)`);
    await sql(`CHECKPOINT`);
  }
  await sql(`SELECT pg_switch_wal()`);
  await sql(`INSERT INTO other VALUES (-4, '')`);
}

async function origins(sql: WorkloadSessions['sql']): Promise<void> {
  await sql(`SELECT pg_replication_origin_create('strata')`);
  await sql(`SELECT pg_replication_origin_advance('strata', '0/1000000')`);
  await sql(`SELECT pg_replication_origin_drop('strata')`);
}

/** More than a segment of multixacts, then all of them frozen in every database, so that the oldest segments go. */
async function multixacts({ sql, connect }: WorkloadSessions): Promise<void> {
  const other = await connect();
  await other.query('BEGIN');
  await other.query('SELECT count(*) FROM (SELECT 1 FROM other WHERE id > 0 FOR KEY SHARE) AS locked');
  await sql(`DO $$
    BEGIN
      FOR i IN 1..${LOCKED_ROWS} LOOP
        BEGIN
          PERFORM 1 FROM other WHERE id = i FOR KEY SHARE;
        EXCEPTION WHEN division_by_zero THEN NULL;
        END;
      END LOOP;
    END $$`);
  await other.query('COMMIT');
  await sql(`ALTER DATABASE template0 ALLOW_CONNECTIONS true`);
  for (const database of ['template0', 'template1', 'postgres']) {
    const client = new pg.Client({ host: other.host, port: other.port, user: 'postgres', database });
    await client.connect();
    await client.query('SET vacuum_freeze_min_age = 0');
    await client.query('SET vacuum_multixact_freeze_min_age = 0');
    await client.query('VACUUM (FREEZE)');
    await client.end();
  }
}

async function files({ sql }: WorkloadSessions): Promise<void> {
  await sql(`CREATE TABLE shrinks AS SELECT generate_series(1, 10000) AS n`);
  await sql(`DELETE FROM shrinks`);
  await sql(`VACUUM shrinks`);
  await sql(`VACUUM FULL pg_class`);
  await sql(`CREATE DATABASE by_log STRATEGY wal_log`);
  await sql(`CREATE DATABASE by_copy STRATEGY file_copy`);
  await sql(`DROP DATABASE by_log`);
  await sql(`SET allow_in_place_tablespaces = on`);
  await sql(`CREATE TABLESPACE strata LOCATION ''`);
  await sql(`CREATE TABLE elsewhere (n int) TABLESPACE strata`);
  await sql(`INSERT INTO elsewhere VALUES (1)`);
  await sql(`DROP TABLE elsewhere`);
  await sql(`DROP TABLESPACE strata`);
}
