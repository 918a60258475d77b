/** A workload that makes every type of gin record appear. */

import type { WorkloadSessions } from './recorded-wal.ts';

type Sql = WorkloadSessions['sql'];

export async function ginWorkload({ sql }: WorkloadSessions): Promise<void> {
  await postingTrees(sql);
  await pendingList(sql);
  await entryTree(sql);
}

/** A key of many rows: its posting tree is made, grows, is vacuumed, loses pages, and takes rows in the middle again. */
async function postingTrees(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE gin_tree (k int[], filler text) WITH (fillfactor = 30)`);
  await sql(`CREATE INDEX gin_tree_k ON gin_tree USING gin (k) WITH (fastupdate = off)`);
  await sql(`INSERT INTO gin_tree SELECT ARRAY[1, 2 + i % 3], repeat('x', 200) FROM generate_series(1, 1500) i`);
  await sql(`INSERT INTO gin_tree SELECT ARRAY[1], '' FROM generate_series(1, 3000) i`);
  await sql(`DELETE FROM gin_tree WHERE ctid::text ~ '[37],'`);
  await sql(`VACUUM gin_tree`);
  await sql(`INSERT INTO gin_tree SELECT ARRAY[1, 2 + i % 5], '' FROM generate_series(1, 1500) i`);
  // Into the index as it was built: leaves are full, rows come by the thousand.
  await sql(`CREATE TABLE gin_big (k int[])`);
  await sql(`INSERT INTO gin_big SELECT ARRAY[1] FROM generate_series(1, 60000) i`);
  await sql(`CREATE INDEX gin_big_k ON gin_big USING gin (k) WITH (fastupdate = on)`);
  await sql(`DELETE FROM gin_big WHERE ctid >= '(50,0)' AND ctid < '(250,0)' OR ctid::text ~ '[2-5],1'`);
  await sql(`VACUUM gin_big`);
  await sql(`INSERT INTO gin_big SELECT ARRAY[1] FROM generate_series(1, 6000) i`);
  await sql(`VACUUM gin_big`);
  await sql(`DELETE FROM gin_big WHERE ctid < '(100,0)'`);
  await sql(`VACUUM gin_big`);
}

/** New rows wait in the list of pending pages, which is emptied when it is full, by VACUUM and on request. */
async function pendingList(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE gin_pending (k int[])`);
  await sql(
    `CREATE INDEX gin_pending_k ON gin_pending USING gin (k) WITH (fastupdate = on, gin_pending_list_limit = 64)`,
  );
  for (let i = 0; i < 20; i++) await sql(`INSERT INTO gin_pending VALUES (ARRAY[${i}, ${i + 1}])`);
  await sql(`INSERT INTO gin_pending SELECT ARRAY(SELECT generate_series(i, i + 700)) FROM generate_series(1, 40) i`);
  await sql(`SELECT gin_clean_pending_list('gin_pending_k')`);
  await sql(`INSERT INTO gin_pending SELECT ARRAY[i] FROM generate_series(1, 500) i`);
  await sql(`VACUUM gin_pending`);
}

/** Many keys: splits of the entry tree on its levels; keys whose rows all go. */
async function entryTree(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE gin_entry (id int, k text[])`);
  await sql(`CREATE INDEX gin_entry_k ON gin_entry USING gin (k) WITH (fastupdate = off)`);
  await sql(`INSERT INTO gin_entry
    SELECT i, ARRAY[lpad((i * 7919 % 10000)::text, 6, '0') || repeat('k', 700), (i % 7)::text] FROM generate_series(1, 400) i`);
  await sql(`DELETE FROM gin_entry WHERE id % 3 = 0`);
  await sql(`VACUUM gin_entry`);
  await sql(`INSERT INTO gin_entry SELECT i, ARRAY[(i % 7)::text, NULL] FROM generate_series(1, 1000) i`);
  await sql(`INSERT INTO gin_entry VALUES (1, NULL), (2, '{}')`);
}
