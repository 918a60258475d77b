/** A workload that makes every type of hash record appear. */

import type { WorkloadSessions } from './recorded-wal.ts';

type Sql = WorkloadSessions['sql'];

export async function hashWorkload({ sql }: WorkloadSessions): Promise<void> {
  await splitsAndOverflow(sql);
  await deadItems(sql);
}

/** A small index grows: buckets split, overflow pages come and go, and with them bits of the bitmap. */
async function splitsAndOverflow(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE hash_grow (id int, k int)`);
  await sql(`CREATE INDEX hash_grow_id ON hash_grow USING hash (id)`);
  await sql(`CREATE INDEX hash_grow_k ON hash_grow USING hash (k) WITH (fillfactor = 10)`);
  await sql(`INSERT INTO hash_grow SELECT i, i % 3 FROM generate_series(1, 3000) i`);
  // All of a bucket's chain but its end goes, so that VACUUM moves what is left to the front and frees pages.
  for (const rest of [5, 2, 11]) {
    await sql(`DELETE FROM hash_grow WHERE k = 1 AND id % ${rest} <> 0`);
    await sql(`DELETE FROM hash_grow WHERE k = 2 AND id < 2500`);
    await sql(`VACUUM hash_grow`);
    await sql(`INSERT INTO hash_grow SELECT i, 1 + i % 2 FROM generate_series(1, 1500) i`);
  }
  await sql(`DELETE FROM hash_grow WHERE k = 1 OR id % 7 <> 0`);
  await sql(`VACUUM hash_grow`);
  await sql(`CREATE INDEX hash_grow_built ON hash_grow USING hash (id)`);
  await sql(`CREATE TABLE hash_large AS SELECT i FROM generate_series(1, 4000) i`);
  await sql(`CREATE INDEX hash_large_i ON hash_large USING hash (i) WITH (fillfactor = 10)`);
  await sql(`ANALYZE hash_large`);
  await sql(`CREATE INDEX hash_large_j ON hash_large USING hash (i) WITH (fillfactor = 10)`);
}

/** Items that scans mark as dead, removed when their page is full. */
async function deadItems(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE hash_dead (id int, k int)`);
  await sql(`CREATE INDEX hash_dead_k ON hash_dead USING hash (k)`);
  await sql(`SET enable_seqscan = off; SET enable_bitmapscan = off`);
  for (let round = 0; round < 4; round++) {
    await sql(`INSERT INTO hash_dead SELECT i, i % 2 FROM generate_series(1, 700) i`);
    await sql(`DELETE FROM hash_dead WHERE id % 4 = ${round}`);
    await sql(`SELECT count(*) FROM hash_dead WHERE k = 0`);
    await sql(`SELECT count(*) FROM hash_dead WHERE k = 1`);
  }
  await sql(`RESET enable_seqscan; RESET enable_bitmapscan`);
}
