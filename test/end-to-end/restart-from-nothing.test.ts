/**
 * A compute that starts from nothing gives the same answers as the one before: whatever Postgres can do to its files must have reached
 * the page store through the WAL alone.
 */
import assert from 'node:assert/strict';
import { rmSync } from 'node:fs';
import { dirname } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { isAlive, kill, TestPlatform, waitUntil } from './platform.ts';

describe('a compute started from nothing', () => {
  let platform: TestPlatform;

  before(async () => {
    platform = await TestPlatform.start();
  });
  after(async () => {
    await platform.destroy();
  });

  /** kill -9 of the Postgres and removal of its directory; the next connection wakes a new one. */
  async function restartFromNothing(): Promise<void> {
    const [postmaster] = platform.postmasters();
    assert(postmaster !== undefined, 'no Postgres is running');
    kill(postmaster.pid);
    rmSync(dirname(postmaster.dataDir), { recursive: true, force: true, maxRetries: 20 });
    await waitUntil(() => !isAlive(postmaster.pid), 'the postmaster is gone');
  }

  /** The answers to `queries` are the same before and after; returns them. */
  async function sameAfterRestart(...queries: readonly string[]): Promise<string[]> {
    const before: string[] = [];
    for (const query of queries) before.push(await platform.psql(query));
    await restartFromNothing();
    for (const [index, query] of queries.entries()) assert.equal(await platform.psql(query), before[index], query);
    return before;
  }

  test('tables, indexes, sequences and large TOASTed values', async () => {
    await platform.psql(`
      CREATE TABLE docs (id serial PRIMARY KEY, tag text, body text);
      INSERT INTO docs (tag, body)
        SELECT 't' || i % 17, (SELECT string_agg(md5(i::text || j), '') FROM generate_series(1, 300) AS j) FROM generate_series(1, 200) AS i;
      CREATE INDEX docs_tag ON docs (tag);`);
    await sameAfterRestart(
      'SELECT count(*), sum(length(body)), md5(string_agg(body, $$$$ ORDER BY id)) FROM docs',
      "SET enable_seqscan = off; SELECT count(*) FROM docs WHERE tag = 't3'",
    );
    assert.equal(await platform.psql("INSERT INTO docs (tag) VALUES ('new') RETURNING id > 200"), 't');
  });

  test('VACUUM, VACUUM FULL, HOT updates and truncation at the end of a table', async () => {
    await platform.psql(
      'CREATE TABLE v (id int PRIMARY KEY, n int, pad text) WITH (fillfactor = 70, autovacuum_enabled = off)',
    );
    await platform.psql("INSERT INTO v SELECT i, 0, repeat('x', 100) FROM generate_series(1, 20000) AS i");
    await platform.psql('UPDATE v SET n = n + 1 WHERE id % 3 = 0');
    await platform.psql('UPDATE v SET n = n + 1 WHERE id % 5 = 0');
    await platform.psql('DELETE FROM v WHERE id > 15000');
    await platform.psql('VACUUM v');
    const queries = [
      'SELECT count(*), sum(n), sum(id) FROM v',
      "SELECT pg_relation_size('v'), pg_relation_size('v', 'vm')",
      'SET enable_seqscan = off; SELECT count(*) FROM v WHERE id BETWEEN 100 AND 9000',
    ];
    await sameAfterRestart(...queries);
    await platform.psql('VACUUM (FULL, FREEZE) v');
    await sameAfterRestart(...queries);
    await platform.psql('TRUNCATE v');
    await platform.psql("INSERT INTO v SELECT i, 7, 'short' FROM generate_series(1, 300) AS i");
    await sameAfterRestart(...queries);
  });

  test('a database that was copied as files, and the copy of that', async () => {
    const inDatabase = (name: string): string => {
      const url = new URL(platform.connectionString);
      url.pathname = `/${name}`;
      return url.href;
    };
    await platform.psql('CREATE DATABASE template_of_ours');
    for (const sql of [
      'CREATE TABLE t (id int PRIMARY KEY, pad text) WITH (fillfactor = 50)',
      "INSERT INTO t SELECT i, repeat('x', 300) FROM generate_series(1, 30000) AS i",
      'DELETE FROM t WHERE id % 7 = 0',
      'VACUUM t',
      "UPDATE t SET pad = 'short' WHERE id % 11 = 0",
    ]) {
      await platform.psql(sql, inDatabase('template_of_ours'));
    }
    await platform.psql('CREATE DATABASE copy TEMPLATE template_of_ours STRATEGY FILE_COPY');
    await platform.psql('UPDATE t SET id = -id WHERE id < 5000', inDatabase('copy'));
    await platform.psql('CREATE DATABASE copy_of_copy TEMPLATE copy STRATEGY FILE_COPY');
    await platform.psql('DELETE FROM t WHERE id < 0', inDatabase('copy'));
    const sum = 'SELECT count(*), sum(id), sum(length(pad)) FROM t';
    const sums = async (): Promise<string[]> => {
      const found: string[] = [];
      for (const name of ['template_of_ours', 'copy', 'copy_of_copy'])
        found.push(await platform.psql(sum, inDatabase(name)));
      return found;
    };
    const before = await sums();
    assert.equal(new Set(before).size, 3);
    await restartFromNothing();
    assert.deepEqual(await sums(), before);
  });

  test('more than 64 subtransactions, some rolled back', async () => {
    await platform.psql('CREATE TABLE subs (n int)');
    const statements = Array.from(
      { length: 150 },
      (_, n) =>
        `SAVEPOINT s${n}; INSERT INTO subs VALUES (${n}); ${n % 3 === 0 ? `ROLLBACK TO s${n};` : `RELEASE s${n};`}`,
    );
    await platform.psql(`BEGIN; ${statements.join('\n')} COMMIT;`);
    const [answer] = await sameAfterRestart('SELECT count(*), sum(n) FROM subs');
    assert.equal(answer?.split('|')[0], '100');
  });

  test('row locks shared by two sessions (multixact)', async () => {
    await platform.psql(
      'CREATE TABLE shared (id int PRIMARY KEY, n int); INSERT INTO shared SELECT i, 0 FROM generate_series(1, 500) AS i',
    );
    const [one, two] = [await platform.connect(), await platform.connect()];
    await one.query('BEGIN');
    await two.query('BEGIN');
    await one.query('SELECT * FROM shared WHERE id <= 300 FOR SHARE');
    await two.query('SELECT * FROM shared WHERE id <= 300 FOR KEY SHARE');
    await one.query('COMMIT');
    await two.query('UPDATE shared SET n = 1 WHERE id BETWEEN 301 AND 400');
    await two.query('COMMIT');
    await one.end();
    await two.end();
    await sameAfterRestart('SELECT count(*), sum(n) FROM shared', 'SELECT count(DISTINCT xmax::text) > 0 FROM shared');
    await platform.psql('UPDATE shared SET n = n + 1');
    assert.equal(await platform.psql('SELECT sum(n) FROM shared'), '600');
  });

  test('transactions prepared before and finished after the restart', async () => {
    await platform.psql('CREATE TABLE prepared (n int)');
    await platform.psql("BEGIN; INSERT INTO prepared VALUES (1); PREPARE TRANSACTION 'keep'");
    await platform.psql("BEGIN; INSERT INTO prepared VALUES (2); PREPARE TRANSACTION 'drop'");
    await sameAfterRestart('SELECT gid FROM pg_prepared_xacts ORDER BY gid', 'SELECT count(*) FROM prepared');
    await platform.psql("COMMIT PREPARED 'keep'");
    await platform.psql("ROLLBACK PREPARED 'drop'");
    const answers = await sameAfterRestart(
      'SELECT count(*), sum(n) FROM prepared',
      'SELECT count(*) FROM pg_prepared_xacts',
    );
    assert.deepEqual(answers, ['1|1', '0']);
  });

  test('CREATE DATABASE with both strategies, and DROP DATABASE', async () => {
    const other = (name: string): string => platform.connectionString.replace(/\/[^/?]+\?/, `/${name}?`);
    await platform.psql('CREATE DATABASE by_log STRATEGY wal_log');
    await platform.psql(
      'CREATE TABLE in_log (n int); INSERT INTO in_log SELECT generate_series(1, 1000)',
      other('by_log'),
    );
    await platform.psql('CREATE DATABASE by_copy TEMPLATE by_log STRATEGY file_copy');
    await platform.psql('CREATE DATABASE gone');
    await platform.psql('DROP DATABASE gone');
    await platform.psql('INSERT INTO in_log SELECT generate_series(1, 10)', other('by_copy'));
    await sameAfterRestart('SELECT string_agg(datname, $$,$$ ORDER BY datname) FROM pg_database');
    assert.equal(await platform.psql('SELECT count(*) FROM in_log', other('by_log')), '1000');
    assert.equal(await platform.psql('SELECT count(*) FROM in_log', other('by_copy')), '1010');
    await assert.rejects(platform.psql('SELECT 1', other('gone')), /database "gone" does not exist/);
    await platform.psql('DROP DATABASE by_copy');
    await sameAfterRestart('SELECT count(*) FROM pg_database');
  });

  test('rewrites by ALTER TABLE, DDL that was rolled back, and a dropped table whose file is gone', async () => {
    await platform.psql('CREATE TABLE rewritten AS SELECT i AS id, i::text AS word FROM generate_series(1, 5000) AS i');
    await platform.psql('ALTER TABLE rewritten ALTER COLUMN id TYPE bigint');
    await platform.psql('ALTER TABLE rewritten ADD COLUMN made timestamptz DEFAULT clock_timestamp()');
    await platform.psql(
      'BEGIN; CREATE TABLE never (n int); INSERT INTO never VALUES (1); DROP TABLE rewritten; ROLLBACK',
    );
    await platform.psql('CREATE TABLE dropped AS SELECT generate_series(1, 5000) AS n');
    await platform.psql('DROP TABLE dropped');
    await sameAfterRestart(
      'SELECT count(*), sum(id), md5(string_agg(made::text, $$,$$ ORDER BY id)) FROM rewritten',
      "SELECT count(*) FROM pg_class WHERE relname IN ('never', 'dropped')",
    );
    await platform.psql('CREATE TABLE dropped AS SELECT generate_series(1, 10) AS n');
    assert.equal(await platform.psql('SELECT count(*) FROM dropped'), '10');
  });

  test('unlogged tables are empty, temporary tables are gone', async () => {
    await platform.psql(
      'CREATE UNLOGGED TABLE fleeting (n int PRIMARY KEY); INSERT INTO fleeting SELECT generate_series(1, 1000)',
    );
    await platform.psql('CREATE TEMPORARY TABLE brief (n int); INSERT INTO brief VALUES (1)');
    await restartFromNothing();
    assert.equal(await platform.psql('SELECT count(*) FROM fleeting'), '0');
    await platform.psql('INSERT INTO fleeting SELECT generate_series(1, 100)');
    assert.equal(await platform.psql('SET enable_seqscan = off; SELECT count(*) FROM fleeting WHERE n > 50'), '50');
    await assert.rejects(platform.psql('SELECT * FROM brief'), /does not exist/);
  });

  test('ANALYZE and CREATE INDEX CONCURRENTLY', async () => {
    await platform.psql('CREATE TABLE stats AS SELECT i % 100 AS k, i AS v FROM generate_series(1, 20000) AS i');
    await platform.psql('ANALYZE stats');
    await platform.psql('CREATE INDEX CONCURRENTLY stats_k ON stats (k)');
    await sameAfterRestart(
      "SELECT reltuples, relpages FROM pg_class WHERE relname = 'stats'",
      "SELECT n_distinct FROM pg_stats WHERE tablename = 'stats' AND attname = 'k'",
      'SET enable_seqscan = off; SELECT sum(v) FROM stats WHERE k = 42',
      "SELECT indisvalid FROM pg_index WHERE indexrelid = 'stats_k'::regclass",
    );
  });

  test('COPY of 100 MB', async () => {
    const megabytes = Number(process.env['STRATA_TEST_COPY_MB'] ?? 100);
    await platform.psql('CREATE TABLE bulk (id int, pad text)');
    await platform.copyIn('bulk', megabytes * 1000, (n) => `${n}\t${String(n).padStart(990, 'x')}\n`);
    const [answer] = await sameAfterRestart('SELECT count(*), sum(id::bigint), sum(length(pad)) FROM bulk');
    assert.equal(answer?.split('|')[0], String(megabytes * 1000));
  });
});
