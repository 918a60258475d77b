/** A workload that makes every type of btree record appear. */

import type { WorkloadSessions } from './recorded-wal.ts';

export async function btreeWorkload({ sql }: WorkloadSessions): Promise<void> {
  await duplicates(sql);
  await fullPagesOfPostingLists(sql);
  await deepTree(sql);
  await deadItems(sql);
}

type Sql = WorkloadSessions['sql'];

/** Deduplication, posting lists that are split by an insertion, and posting lists that lose heap pointers in VACUUM. */
async function duplicates(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE bt_dup (k int, filler text) WITH (fillfactor = 50)`);
  await sql(`CREATE INDEX bt_dup_k ON bt_dup (k)`);
  await sql(`INSERT INTO bt_dup SELECT i % 20, 'x' FROM generate_series(1, 6000) i`);
  await sql(
    `DELETE FROM bt_dup WHERE ctid IN (SELECT ctid FROM bt_dup ORDER BY ctid OFFSET 500 LIMIT 3000) AND (k % 3 = 0 OR k = 7)`,
  );
  await sql(`VACUUM bt_dup`);
  // The freed places are in the middle of what the posting lists hold.
  await sql(`INSERT INTO bt_dup SELECT i % 20, 'y' FROM generate_series(1, 4000) i`);
  await sql(`INSERT INTO bt_dup SELECT 7, repeat('z', i % 10) FROM generate_series(1, 3000) i`);
  await sql(`DELETE FROM bt_dup WHERE k IN (1, 2)`);
  await sql(`VACUUM bt_dup`);
}

/** Insertions into the middle of posting lists on pages that are full: the page and the list are split at once. */
async function fullPagesOfPostingLists(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE bt_full (k int)`);
  await sql(`INSERT INTO bt_full SELECT i % 300 FROM generate_series(1, 36000) i`);
  await sql(`DELETE FROM bt_full WHERE ctid >= '(20,0)' AND ctid < '(50,0)'`);
  await sql(`VACUUM bt_full`);
  await sql(`CREATE INDEX bt_full_k ON bt_full (k) WITH (fillfactor = 100)`);
  await sql(`INSERT INTO bt_full SELECT i * 7919 % 300 FROM generate_series(1, 6000) i`);

  // One value only: a page may be split between a list and the item that follows from splitting it.
  await sql(`CREATE TABLE bt_same (k int)`);
  await sql(`INSERT INTO bt_same SELECT 1 FROM generate_series(1, 30000) i`);
  await sql(`DELETE FROM bt_same WHERE ctid::text ~ '[357],'`);
  await sql(`VACUUM bt_same`);
  await sql(`CREATE INDEX bt_same_k ON bt_same (k) WITH (fillfactor = 100)`);
  await sql(`INSERT INTO bt_same SELECT 1 FROM generate_series(1, 9000) i`);
}

/** Wide keys, few to a page: deep trees from few rows. Splits on all levels, whole subtrees deleted, a fast root, reused pages. */
async function deepTree(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE bt_deep (k text)`);
  await sql(`ALTER TABLE bt_deep ALTER k SET STORAGE PLAIN`);
  await sql(`CREATE INDEX bt_deep_k ON bt_deep (k)`);
  const key = (expression: string): string => `lpad((${expression})::text, 8, '0') || repeat('k', 2000)`;
  await sql(`INSERT INTO bt_deep SELECT ${key('i')} FROM generate_series(1, 300) i`);
  await sql(`INSERT INTO bt_deep SELECT ${key('(i * 7919) % 100000')} FROM generate_series(1, 200) i`);
  for (const from of ['00000100', '00050000', '00090000']) {
    await sql(`DELETE FROM bt_deep WHERE k BETWEEN '${from}' AND (lpad(('${from}'::int + 8000)::text, 8, '0'))`);
    await sql(`VACUUM bt_deep`);
  }
  await sql(`DELETE FROM bt_deep WHERE k < (SELECT max(k) FROM bt_deep)`);
  await sql(`VACUUM bt_deep`);
  // Deleted pages are reused once no transaction can see them, from the VACUUM on that finds them so.
  await sql(`SELECT txid_current()`);
  await sql(`VACUUM bt_deep`);
  await sql(`INSERT INTO bt_deep SELECT ${key('99000 + i')} FROM generate_series(1, 60) i`);
  await sql(`DELETE FROM bt_deep`);
  await sql(`VACUUM bt_deep`);
  await sql(`SELECT txid_current()`);
  await sql(`VACUUM bt_deep`);
  await sql(`INSERT INTO bt_deep SELECT ${key('(i * 31) % 1000')} FROM generate_series(1, 100) i`);
}

/** Items that scans mark as dead, and versions of rows that changed elsewhere, removed when their page is full. */
async function deadItems(sql: Sql): Promise<void> {
  await sql(`CREATE TABLE bt_dead (id int, k int, v int)`);
  await sql(`CREATE UNIQUE INDEX bt_dead_id ON bt_dead (id)`);
  await sql(`CREATE INDEX bt_dead_k ON bt_dead (k) WITH (deduplicate_items = off)`);
  await sql(`CREATE INDEX bt_dead_v ON bt_dead (v, k)`);
  await sql(`INSERT INTO bt_dead SELECT i, i % 50, i FROM generate_series(1, 1500) i`);
  await sql(`SET enable_seqscan = off; SET enable_bitmapscan = off`);
  for (let round = 0; round < 6; round++) {
    await sql(`UPDATE bt_dead SET v = v + 1 WHERE id % 3 = ${round % 3}`);
    await sql(`DELETE FROM bt_dead WHERE id % 10 = ${round}`);
    await sql(`SELECT count(*) FROM bt_dead WHERE k >= 0`);
    await sql(`SELECT count(*) FROM bt_dead WHERE id >= 0`);
    await sql(`INSERT INTO bt_dead SELECT i, i % 50, i FROM generate_series(1, 1500) i WHERE i % 10 = ${round}`);
  }
  await sql(`RESET enable_seqscan; RESET enable_bitmapscan`);
}
