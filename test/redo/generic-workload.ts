/** A workload of generic records: those of the bloom index access method. */

import type { WorkloadSessions } from './recorded-wal.ts';

export async function genericWorkload({ sql }: WorkloadSessions): Promise<void> {
  await sql(`CREATE EXTENSION bloom`);
  await sql(`CREATE TABLE bloom_grow (i int, t text)`);
  await sql(`CREATE INDEX bloom_grow_i ON bloom_grow USING bloom (i, t) WITH (length = 200, col1 = 5)`);
  await sql(`INSERT INTO bloom_grow SELECT i, md5(i::text) FROM generate_series(1, 3000) i`);
  await sql(`DELETE FROM bloom_grow WHERE i % 3 = 0 OR i BETWEEN 500 AND 1500`);
  await sql(`VACUUM bloom_grow`);
  await sql(`INSERT INTO bloom_grow SELECT i, md5(i::text) FROM generate_series(1, 1500) i`);
  await sql(`CREATE INDEX bloom_grow_built ON bloom_grow USING bloom (t)`);
  await sql(`DELETE FROM bloom_grow`);
  await sql(`VACUUM bloom_grow`);
}
