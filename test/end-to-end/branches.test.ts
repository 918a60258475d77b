/**
 * Branches: from the head, from an LSN and from a time; each writable, each apart from the others.
 */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { TestPlatform } from './platform.ts';

describe('branches', () => {
  let platform: TestPlatform;

  before(async () => {
    platform = await TestPlatform.start();
  });
  after(async () => {
    await platform.destroy();
  });

  async function connectionString(branch: string): Promise<string> {
    return (await platform.cli(['connection-string', branch])).stdout.trim();
  }

  test('at the LSN and at the time just before a DELETE the rows are in both, and the parent is untouched', async () => {
    await platform.psql('CREATE TABLE orders (id int PRIMARY KEY, note text)');
    await platform.psql("INSERT INTO orders SELECT i, 'order ' || i FROM generate_series(1, 1000) AS i");
    const lsn = await platform.psql('SELECT pg_current_wal_lsn()');
    await sleep(20);
    const time = await platform.psql(
      `SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')`,
    );
    await sleep(20);
    await platform.psql('DELETE FROM orders');

    await platform.cli(['branches', 'create', '--name', 'at-lsn', '--at', lsn]);
    await platform.cli(['branches', 'create', '--name', 'at-time', '--at', time]);
    for (const branch of ['at-lsn', 'at-time']) {
      assert.equal(
        await platform.psql('SELECT count(*), sum(id) FROM orders', await connectionString(branch)),
        '1000|500500',
        branch,
      );
    }
    assert.equal(await platform.psql('SELECT count(*) FROM orders'), '0');
  });

  test('a branch from the head is writable and isolated, and so is a branch of the branch', async () => {
    await platform.psql('CREATE TABLE notes (n int); INSERT INTO notes VALUES (1)');
    await platform.cli(['branches', 'create', '--name', 'dev']);
    const dev = await connectionString('dev');
    await platform.psql('INSERT INTO notes VALUES (2)', dev);
    await platform.cli(['branches', 'create', '--name', 'dev-of-dev', '--parent', 'dev']);
    const deeper = await connectionString('dev-of-dev');
    await platform.psql('INSERT INTO notes VALUES (3)', deeper);
    await platform.psql('UPDATE notes SET n = 100');
    assert.equal(await platform.psql('SELECT array_agg(n ORDER BY n) FROM notes'), '{100}');
    assert.equal(await platform.psql('SELECT array_agg(n ORDER BY n) FROM notes', dev), '{1,2}');
    assert.equal(await platform.psql('SELECT array_agg(n ORDER BY n) FROM notes', deeper), '{1,2,3}');
  });

  test('a branch of a busy parent holds every commit that was acknowledged before it', async () => {
    await platform.psql('CREATE TABLE busy (n int)');
    await platform.pgbench(['-i', '-s', '1', '-q']);
    const load = platform.pgbench(['-n', '-c', '2', '-T', '3']);
    for (let n = 1; n <= 5; n++) {
      await platform.psql(`INSERT INTO busy VALUES (${n})`);
      await platform.cli(['branches', 'create', '--name', `busy-${n}`]);
      assert.equal(await platform.psql('SELECT count(*) FROM busy', await connectionString(`busy-${n}`)), String(n));
    }
    await load;
  });

  test('an LSN that is not there yet, and one before the beginning, are refused by value', async () => {
    await assert.rejects(platform.cli(['branches', 'create', '--at', 'FFFF/0']), /FFFF\/0/);
    await assert.rejects(platform.cli(['branches', 'create', '--at', '0/1']), /0\/1/);
    await assert.rejects(platform.cli(['branches', 'create', '--at', 'yesterday']), /yesterday/);
  });

  test('a branch with children and the default branch are not deleted; a leaf is', async () => {
    await assert.rejects(platform.cli(['branches', 'delete', 'dev']), /child/i);
    await assert.rejects(platform.cli(['branches', 'delete', 'main']), /default|main/i);
    await platform.cli(['branches', 'delete', 'dev-of-dev']);
    const names = (await platform.cliJson<{ name: string }[]>(['branches', 'list'])).map((branch) => branch.name);
    assert(!names.includes('dev-of-dev'));
    assert(names.includes('dev'));
  });
});
