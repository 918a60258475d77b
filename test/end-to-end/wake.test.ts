/**
 * What a wake may take for granted, and what it may not: a Postgres is started before the election has said where the branch ends.
 */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { after, before, suite, test } from 'node:test';
import { isAlive, TestPlatform, waitUntil } from './platform.ts';

suite('a wake', () => {
  let platform: TestPlatform;
  let cacheDir: string;
  let endpointId: string;

  before(async () => {
    platform = await TestPlatform.start({ args: ['--suspend-timeout', '-1'] });
    await platform.psql('CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n');
    cacheDir = dirname(dirname(platform.postmasters()[0]?.dataDir ?? ''));
    endpointId = basename(cacheDir);
  });
  after(() => platform.destroy());

  /** `isKept` of each start so far, oldest first. */
  function starts(): boolean[] {
    return readFileSync(join(platform.dataDir, 'logs', 'platform.log'), 'utf8')
      .split('\n')
      .filter((line) => line.includes('compute is up'))
      .map((line) => (JSON.parse(line) as { isKept: boolean }).isKept);
  }

  const suspend = () => platform.cli(['endpoints', 'suspend', endpointId]);
  const rows = () => platform.psql('SELECT count(*), sum(n) FROM kept');

  test('uses the cache that a clean suspend left', async () => {
    await suspend();
    assert.equal(await rows(), '1000|500500');
    assert.equal(starts().at(-1), true);
  });

  test('throws a cache away that is not where the branch ends, with the Postgres that was started on it', async () => {
    await platform.psql('INSERT INTO kept VALUES (1001)');
    await suspend();
    const mark = join(cacheDir, 'cache.json');
    const cache = JSON.parse(readFileSync(mark, 'utf8')) as { endLsn: number };
    writeFileSync(mark, JSON.stringify({ ...cache, endLsn: cache.endLsn - 8 }));
    assert.equal(await rows(), '1001|501501');
    assert.equal(starts().at(-1), false);
    assert.equal(platform.postmasters().length, 1);
    await platform.psql('INSERT INTO kept VALUES (1002)');
    await suspend();
    assert.equal(await rows(), '1002|502503');
    assert.equal(starts().at(-1), true);
  });

  test('that the platform’s end cuts short leaves no Postgres behind', async () => {
    await suspend();
    const safekeepers = platform.descendants().filter(({ command }) => / safekeeper \d$/.test(command));
    for (const { pid } of safekeepers) process.kill(pid, 'SIGSTOP'); // no election is won
    const client = rows().then(
      () => 'connected',
      () => 'refused',
    );
    let stopped: Promise<number | null>;
    try {
      await waitUntil(() => platform.postmasters().length === 1, 'a Postgres is started before the election is won');
      stopped = platform.stop();
      await waitUntil(() => postgresBelow(cacheDir).length === 0, 'the Postgres of a start that was cut short is gone');
      // A Postgres also dies with its parent; safekeepers that cannot stop keep that one here.
      assert(isAlive(platform.pid), 'the platform ended it, and not by its own end');
    } finally {
      for (const { pid } of safekeepers) process.kill(pid, 'SIGCONT');
    }
    assert.equal(await client, 'refused');
    assert.equal(await stopped, 0);
    assert.deepEqual(postgresBelow(cacheDir), []);

    await platform.start();
    assert.equal(await rows(), '1002|502503');
  });
});

/** Postgres servers in that folder, whoever their parent is by now. */
function postgresBelow(folder: string): string[] {
  return readdirSync('/proc').filter((pid) => {
    try {
      return /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes(`-D\0${folder}/`);
    } catch {
      return false; // gone meanwhile
    }
  });
}
