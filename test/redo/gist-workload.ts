/** A workload that makes every type of gist record appear, save ASSIGN_LSN, which takes wal_level = minimal. */

import type { WorkloadSessions } from './recorded-wal.ts';

type Sql = WorkloadSessions['sql'];

export async function gistWorkload({ sql }: WorkloadSessions): Promise<void> {
  await growAndShrink(sql);
  await deadItems(sql);
}

/** Insertion with splits up to the root, deletion of whole pages, reuse of deleted pages. */
async function growAndShrink(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE gist_grow (id int, p point, r tsrange)`);
  await sql(`CREATE INDEX gist_grow_p ON gist_grow USING gist (p)`);
  await sql(`CREATE INDEX gist_grow_b ON gist_grow USING gist (box(p, point(p[0] + 1, p[1] + 1)), r)`);
  const rows = (from: number, to: number): string =>
    `INSERT INTO gist_grow SELECT i, point(i * 7919 % 1000, i * 31 % 977), tsrange(now()::timestamp, now()::timestamp + i * interval '1 s')
     FROM generate_series(${from}, ${to}) i`;
  await sql(rows(1, 3000));
  await sql(`DELETE FROM gist_grow WHERE p[0] < 600`);
  await sql(`VACUUM gist_grow`);
  await sql(`DELETE FROM gist_grow WHERE id % 3 > 0`);
  await sql(`VACUUM gist_grow`);
  await sql(`SELECT txid_current()`);
  await sql(`VACUUM gist_grow`);
  await sql(rows(3001, 6000));
  await sql(`CREATE INDEX gist_grow_built ON gist_grow USING gist (p) WITH (buffering = on)`);
  await sql(`CREATE INDEX gist_grow_include ON gist_grow USING gist (p) INCLUDE (id)`);
  await sql(rows(6001, 6500));
}

/** Items that scans mark as dead, removed when their page is full. */
async function deadItems(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE gist_dead (id int, p point)`);
  await sql(`CREATE INDEX gist_dead_p ON gist_dead USING gist (p)`);
  await sql(`INSERT INTO gist_dead SELECT i, point(i, i) FROM generate_series(1, 500) i`);
  await sql(`SET enable_seqscan = off; SET enable_bitmapscan = off`);
  for (let round = 0; round < 4; round++) {
    await sql(`DELETE FROM gist_dead WHERE id % 4 = ${round}`);
    await sql(`SELECT count(*) FROM gist_dead WHERE p <@ box '(0,0,1000,1000)'`);
    await sql(`INSERT INTO gist_dead SELECT i, point(i, i) FROM generate_series(1, 500) i WHERE i % 4 = ${round}`);
  }
  await sql(`RESET enable_seqscan; RESET enable_bitmapscan`);
}
