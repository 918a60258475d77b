/** A workload that makes every type of SP-GiST record appear. */

import type { WorkloadSessions } from './recorded-wal.ts';

type Sql = WorkloadSessions['sql'];

export async function spgistWorkload({ sql }: WorkloadSessions): Promise<void> {
  await texts(sql);
  await points(sql);
}

/** A radix tree of texts: prefixes are split, nodes are added, chains of leaves move to pages with room. */
async function texts(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE spg_text (id int, t text)`);
  await sql(`CREATE INDEX spg_text_t ON spg_text USING spgist (t)`);
  await sql(`INSERT INTO spg_text SELECT i, 'root ' || i FROM generate_series(1, 40) i`);
  await sql(`DELETE FROM spg_text WHERE id % 2 = 0`);
  await sql(`VACUUM spg_text`);
  await sql(`INSERT INTO spg_text SELECT i, CASE WHEN i % 50 = 0 THEN NULL ELSE repeat(chr(97 + i % 5), i % 90) || md5(i::text) END
    FROM generate_series(1, 4000) i`);
  // One character more at a time below a long common prefix: nodes are added, and their tuple moves when its page is full.
  await sql(`INSERT INTO spg_text SELECT i, 'https://example.org/' || repeat('p', 150) || chr(33 + i % 90) || chr(33 + i / 90) || repeat('q', i % 40)
    FROM generate_series(1, 3000) i`);
  await sql(
    `INSERT INTO spg_text SELECT i, left('https://example.org/' || repeat('p', 150), i) || 'x' FROM generate_series(1, 170) i`,
  );
  await sql(`DELETE FROM spg_text WHERE id % 3 = 0`);
  await sql(`VACUUM spg_text`);
  await sql(`SELECT txid_current()`);
  await sql(`VACUUM spg_text`);
  await sql(`INSERT INTO spg_text SELECT i, md5(i::text) || repeat('r', i % 60) FROM generate_series(1, 3000) i`);
  await sql(`DELETE FROM spg_text WHERE id > 500`);
  await sql(`VACUUM spg_text`);
  await sql(`VACUUM spg_text`);
  await sql(`CREATE INDEX spg_text_built ON spg_text USING spgist (t) INCLUDE (id)`);
  await sql(`INSERT INTO spg_text SELECT i, md5(i::text) FROM generate_series(1, 300) i`);
}

/** Quadrants of points: every inner tuple has the same number of nodes. Many equal points end in tuples whose nodes are all the same. */
async function points(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE spg_point (id int, p point, a inet)`);
  await sql(`CREATE INDEX spg_point_p ON spg_point USING spgist (p)`);
  await sql(`CREATE INDEX spg_point_kd ON spg_point USING spgist (p kd_point_ops)`);
  await sql(`CREATE INDEX spg_point_a ON spg_point USING spgist (a)`);
  await sql(`INSERT INTO spg_point SELECT i, point(i * 7919 % 1000, i * 31 % 977), ('10.' || i % 200 || '.' || i % 250 || '.' || i % 7)::inet
    FROM generate_series(1, 2500) i`);
  await sql(`INSERT INTO spg_point SELECT i, point(500, 500), '10.0.0.1' FROM generate_series(1, 1200) i`);
  await sql(`DELETE FROM spg_point WHERE id % 4 > 0`);
  await sql(`VACUUM spg_point`);
  await sql(`INSERT INTO spg_point SELECT i, point(i, i), NULL FROM generate_series(1, 1500) i`);
  await sql(`VACUUM spg_point`);
}
