/** A workload that makes every type of BRIN record appear. */

import type { WorkloadSessions } from './recorded-wal.ts';

export async function brinWorkload({ sql }: WorkloadSessions): Promise<void> {
  await sql(`CREATE TABLE brin_grow (i int, t text, p inet) WITH (fillfactor = 20)`);
  await sql(`CREATE INDEX brin_grow_i ON brin_grow USING brin (i) WITH (pages_per_range = 1, autosummarize = off)`);
  await sql(`CREATE INDEX brin_grow_t ON brin_grow USING brin (t, p inet_inclusion_ops) WITH (pages_per_range = 1)`);
  await sql(
    `CREATE INDEX brin_grow_m ON brin_grow USING brin (i int4_minmax_multi_ops, t text_bloom_ops) WITH (pages_per_range = 4)`,
  );
  const rows = (from: number, to: number, width: number): string =>
    `INSERT INTO brin_grow SELECT i, repeat(md5(i::text), ${width}), ('10.0.' || i % 250 || '.1')::inet FROM generate_series(${from}, ${to}) i`;
  await sql(rows(1, 3000, 3));
  await sql(`SELECT brin_summarize_new_values(c) FROM unnest('{brin_grow_i,brin_grow_t,brin_grow_m}'::regclass[]) c`);
  // New values in ranges that have summaries: these change in place, or move when they no longer fit their page.
  await sql(`DELETE FROM brin_grow WHERE i % 2 = 0`);
  await sql(`VACUUM brin_grow`);
  await sql(rows(5001, 6500, 8));
  await sql(`INSERT INTO brin_grow SELECT -i, repeat('~', i % 2000), '2001:db8::1' FROM generate_series(1, 800) i`);
  await sql(`VACUUM brin_grow`);
  // More ranges than a page of the revmap has room for; the summaries in the way of the next page are moved.
  await sql(`CREATE TABLE brin_wide (i int, filler text)`);
  await sql(`ALTER TABLE brin_wide ALTER filler SET STORAGE PLAIN`);
  await sql(`CREATE INDEX brin_wide_i ON brin_wide USING brin (i) WITH (pages_per_range = 1)`);
  await sql(`INSERT INTO brin_wide SELECT i, repeat('f', 4100) FROM generate_series(1, 1500) i`);
  await sql(`VACUUM brin_wide`);
  await sql(`SELECT brin_desummarize_range('brin_wide_i', b) FROM generate_series(0, 1400, 7) b`);
  await sql(`INSERT INTO brin_wide SELECT i, repeat('g', 4100) FROM generate_series(1, 100) i`);
  await sql(`VACUUM brin_wide`);
  await sql(`SELECT brin_desummarize_range('brin_grow_t', b) FROM generate_series(0, 100, 3) b`);
  await sql(`SELECT brin_summarize_new_values('brin_grow_t')`);
}
