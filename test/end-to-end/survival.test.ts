/**
 * What a user has committed survives the death of any process, or of all of them.
 */
import assert from 'node:assert/strict';
import { rmSync } from 'node:fs';
import { dirname } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isAlive, kill, TestPlatform, waitUntil } from './platform.ts';

const SCALE = Number(process.env['STRATA_TEST_PGBENCH_SCALE'] ?? 10);
const SECONDS = Number(process.env['STRATA_TEST_PGBENCH_SECONDS'] ?? 10);

/** pgbench's invariant: every transaction adds the same delta to one account, one teller, one branch, and to the history. */
async function balances(platform: TestPlatform, connectionString?: string): Promise<string> {
  return platform.psql(
    `SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
            (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history),
            (SELECT count(*) FROM pgbench_history)`,
    connectionString,
  );
}

function assertBalanced(line: string): number {
  const [accounts, tellers, branches, history, count] = line.split('|');
  assert.equal(accounts, history);
  assert.equal(tellers, history);
  assert.equal(branches, history);
  return Number(count);
}

function processedCount(output: string): number {
  const match = /number of transactions actually processed: (\d+)/.exec(output);
  assert(match !== null, `pgbench said: ${output}`);
  return Number(match[1]);
}

describe('with a loaded pgbench database', () => {
  let platform: TestPlatform;

  before(async () => {
    platform = await TestPlatform.start();
    await platform.pgbench(['-i', '-s', String(SCALE), '-q']);
  });
  after(async () => {
    await platform.destroy();
  });

  test('clients go on while a safekeeper and then the pageserver are killed, and all is there after the Postgres and its directory are gone', async () => {
    const load = platform.pgbench(['-c', '8', '-j', '2', '-T', String(SECONDS), '-n']);
    await sleep(SECONDS * 200);
    platform.killService('safekeeper 1');
    await sleep(SECONDS * 300);
    platform.killService('pageserver');
    const { stdout } = await load;
    const committed = processedCount(stdout);
    assert(committed > 0);

    const [postmaster] = platform.postmasters();
    assert(postmaster !== undefined);
    kill(postmaster.pid);
    rmSync(dirname(postmaster.dataDir), { recursive: true, force: true, maxRetries: 20 });
    assert.equal(assertBalanced(await balances(platform)), committed);
  });

  test('with two of three safekeepers gone commits wait, and go on when one is back', async () => {
    await platform.psql('CREATE TABLE IF NOT EXISTS waits (n int)');
    const paused = [...platform.descendants()].filter((found) => /safekeeper [12]$/.test(found.command));
    assert.equal(paused.length, 2);
    for (const { pid } of paused) process.kill(pid, 'SIGSTOP');
    let isDone = false;
    const commit = platform.psql('INSERT INTO waits VALUES (1)').then(() => (isDone = true));
    await sleep(1500);
    assert.equal(isDone, false, 'a commit returned without a quorum');
    for (const { pid } of paused) process.kill(pid, 'SIGCONT');
    await commit;
    assert.equal(await platform.psql('SELECT count(*) FROM waits'), '1');
  });

  test('after kill -9 of everything under load, the next start has every acknowledged commit', async () => {
    const acknowledged: number[] = [];
    await platform.psql('CREATE TABLE marks (n int PRIMARY KEY)');
    const writers = Array.from({ length: 4 }, async (_, writer) => {
      const client = await platform.connect();
      try {
        for (let i = 0; ; i++) {
          const n = i * 4 + writer;
          await client.query('INSERT INTO marks VALUES ($1)', [n]);
          acknowledged.push(n);
        }
      } catch {
        // The platform is gone.
      }
    });
    await sleep(2000);
    await platform.killEverything();
    await Promise.all(writers);
    assert(acknowledged.length > 100, `only ${acknowledged.length} commits were made`);

    await platform.start();
    const found = new Set((await platform.psql('SELECT n FROM marks')).split('\n').map(Number));
    const lost = acknowledged.filter((n) => !found.has(n));
    assert.deepEqual(lost, []);
    assertBalanced(await balances(platform));
  });

  test('a killed Postgres comes back for the same connection string, again and again, with an intact B-tree and heap', async () => {
    for (let round = 0; round < 3; round++) {
      const load = platform.pgbench(['-c', '4', '-T', '3', '-n']).catch(() => undefined);
      await sleep(1500);
      const [postmaster] = platform.postmasters();
      assert(postmaster !== undefined);
      kill(postmaster.pid);
      await load;
      await waitUntil(() => !isAlive(postmaster.pid), 'the postmaster is gone');
      assertBalanced(await balances(platform));
    }
    const seen = await platform.psql(
      'SET enable_seqscan = off; SELECT count(*), sum(aid) FROM (SELECT aid FROM pgbench_accounts ORDER BY aid) AS ordered',
    );
    const expected = await platform.psql(
      'SET enable_indexscan = off; SET enable_indexonlyscan = off; SELECT count(*), sum(aid) FROM pgbench_accounts',
    );
    assert.equal(seen, expected);
  });

  test('after all of that, and from nothing again, amcheck finds no fault in any heap or B-tree', async () => {
    const [postmaster] = platform.postmasters();
    assert(postmaster !== undefined);
    kill(postmaster.pid);
    rmSync(dirname(postmaster.dataDir), { recursive: true, force: true, maxRetries: 20 });
    await waitUntil(() => !isAlive(postmaster.pid), 'the postmaster is gone');
    await platform.psql('SELECT 1');
    const endpointId = /endpoint%3D([\w-]+)/.exec(platform.connectionString)?.[1] ?? '';
    const admin = await platform.connectAdmin(endpointId);
    try {
      await admin.query('CREATE EXTENSION amcheck');
      const indexes = await admin.query<{ name: string }>(
        `SELECT c.oid::regclass::text AS name, bt_index_check(c.oid, heapallindexed => true)
           FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_am AS a ON a.oid = c.relam
          WHERE a.amname = 'btree' AND i.indisvalid AND c.relkind = 'i' AND c.relpersistence = 'p'`,
      );
      assert(indexes.rows.length > 100);
      const faults = await admin.query(
        `SELECT c.oid::regclass, fault.* FROM pg_class AS c, LATERAL verify_heapam(c.oid, check_toast => true) AS fault
          WHERE c.relkind IN ('r', 't', 'm') AND c.relpersistence = 'p'`,
      );
      assert.deepEqual(faults.rows, []);
    } finally {
      await admin.end();
    }
  });

  test('SIGTERM stops everything cleanly and the next start has all the data', async () => {
    const before = await balances(platform);
    const pids = platform.descendants().map((process) => process.pid);
    assert.equal(await platform.stop(), 0);
    await waitUntil(() => pids.every((pid) => !isAlive(pid)), 'every process of the platform is gone');
    await platform.start();
    assert.equal(await balances(platform), before);
  });
});
