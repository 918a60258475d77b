/**
 * The safekeepers of a running platform are added, replaced and removed while clients write: none of them notices, and nothing is lost.
 */
import assert from 'node:assert/strict';
import { existsSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { TestPlatform, waitUntil } from './platform.ts';

const SECONDS = 4;

interface Listing {
  readonly version: number;
  readonly safekeepers: readonly {
    readonly id: number;
    readonly state: string;
    readonly role: string;
    readonly behind_count: number;
  }[];
  readonly change?: { readonly members: readonly number[] };
}

describe('a platform that began with one safekeeper', () => {
  let platform: TestPlatform;
  let committed = 0;

  before(async () => {
    platform = await TestPlatform.start({ args: ['--safekeepers', '1'] });
    await platform.pgbench(['-i', '-s', '2', '-q']);
    await platform.cli(['branches', 'create', '--name', 'asleep']);
  });
  after(async () => {
    await platform.destroy();
  });

  async function list(): Promise<Listing> {
    return platform.cliJson<Listing>(['safekeepers']);
  }

  async function ids(): Promise<number[]> {
    return (await list()).safekeepers.map(({ id }) => id);
  }

  /** Under load that must not see an error, and whose every commit must be there. */
  async function underLoad(change: () => Promise<void>): Promise<void> {
    await platform.psql('SELECT 1'); // It is awake then.
    const load = platform.pgbench(['-c', '4', '-j', '2', '-T', String(SECONDS), '-n']);
    const [postmaster] = platform.postmasters();
    await sleep(500);
    await change();
    const { stdout } = await load;
    committed += Number(/number of transactions actually processed: (\d+)/.exec(stdout)?.[1]);
    assert.match(stdout, /number of failed transactions: 0 /);
    assert.deepEqual(platform.postmasters()[0], postmaster, 'it is the same Postgres as before');
    await assertWhole();
  }

  async function assertWhole(): Promise<void> {
    const line = await platform.psql('SELECT count(*), sum(delta) FROM pgbench_history');
    const [count, sum] = line.split('|').map(Number);
    assert.equal(count, committed);
    assert.equal(Number(await platform.psql('SELECT sum(abalance) FROM pgbench_accounts')), sum);
  }

  test('grows to three when it is started with --safekeepers 3, while clients write', async () => {
    await platform.stop();
    await platform.start(['--safekeepers', '3']);
    await underLoad(async () => {
      await waitUntil(() => platform.output.includes('the safekeepers are 1, 2, 3 now'), 'it has grown', 30_000);
    });
    assert.match(platform.output, /changing from 1 to 3 safekeepers/);
    assert.deepEqual(await ids(), [1, 2, 3]);
  });

  test('goes on when the first safekeeper loses its disk, as the others have everything', async () => {
    await underLoad(async () => {
      rmSync(join(platform.dataDir, 'safekeeper-1'), { recursive: true, force: true, maxRetries: 20 });
      platform.killService('safekeeper 1');
      await sleep(SECONDS * 300);
    });
    await waitUntil(
      async () => (await list()).safekeepers.every((each) => each.state === 'up'),
      'it is up again',
      20_000,
    );
  });

  test('a safekeeper whose disk is emptied beneath it is given everything anew by itself, while clients write', async () => {
    const pid = (): number | undefined =>
      platform.descendants().find(({ command }) => command.endsWith('safekeeper 2'))?.pid;
    const before = pid();
    await underLoad(async () => {
      rmSync(join(platform.dataDir, 'safekeeper-2'), { recursive: true, force: true, maxRetries: 20 });
      await waitUntil(() => pid() !== undefined && pid() !== before, 'it begins anew', 30_000);
    });
    await waitUntil(
      async () => (await list()).safekeepers.every((each) => each.state === 'up' && each.behind_count === 0),
      'it has everything again',
      30_000,
    );
    const { wal } = await platform.cliJson<{ wal: { state: string }[] }>(['status']);
    assert.deepEqual(new Set(wal.map(({ state }) => state)), new Set(['ok']));
  });

  test('replaces a safekeeper, while clients write', async () => {
    await underLoad(async () => {
      const { stderr } = await platform.cli(['safekeepers', 'replace', '2']);
      assert.match(stderr, /changing to 1, 3, 4/);
    });
    const { safekeepers, change } = await list();
    assert.deepEqual(
      safekeepers.map(({ id, role }) => [id, role]),
      [
        [1, 'member'],
        [3, 'member'],
        [4, 'member'],
      ],
    );
    assert.equal(change, undefined);
    assert(!existsSync(join(platform.dataDir, 'safekeeper-2')), 'what it kept is gone');
    assert(!platform.descendants().some(({ command }) => command.endsWith('safekeeper 2')));
  });

  test('a change that everything was killed in goes on after the next start', async () => {
    const load = platform.pgbench(['-c', '4', '-j', '2', '-T', '30', '-n']).catch(() => undefined);
    const removal = platform.cli(['safekeepers', 'remove', '1', '3']).catch(() => undefined);
    await waitUntil(async () => (await list()).change !== undefined || (await ids()).length === 1, 'it has begun');
    await platform.killEverything();
    await Promise.all([load, removal]);
    await platform.start([]);
    await waitUntil(async () => (await list()).change === undefined, 'it is done', 30_000);
    assert.deepEqual(await ids(), [4]);
    committed = Number(await platform.psql('SELECT count(*) FROM pgbench_history'));
    await assertWhole();
    await platform.psql('INSERT INTO pgbench_history (delta) VALUES (0)');
    committed++;
  });

  test('says what is wrong with a change that cannot be', async () => {
    const failure = async (...args: string[]): Promise<string> => {
      const error = (await platform.cli(['safekeepers', ...args]).catch((thrown: unknown) => thrown)) as {
        stderr: string;
      };
      return error.stderr;
    };
    assert.match(await failure('remove', '9'), /there is no safekeeper 9 \(safekeepers: 4\)/);
    assert.match(await failure('add', '--count', '1'), /that would be 2 safekeepers: choose 1, 3, 5 or 7/);
    assert.match(await failure('remove', '4'), /that would be 0 safekeepers/);
    assert.match(await failure('replace', 'x'), /"x" is not the id of a safekeeper/);
    assert.match(await failure('cancel'), /no change of the safekeepers is under way/);
  });

  test('replaces the only one, and a branch that slept all the while wakes with its data', async () => {
    await platform.cli(['safekeepers', 'replace', '4']);
    assert.deepEqual(await ids(), [5]);
    const { stdout } = await platform.cli(['connection-string', 'asleep']);
    assert.equal(await platform.psql('SELECT count(*) FROM pgbench_accounts', stdout.trim()), '200000');
    await assertWhole();
  });
});
