/**
 * What is kept and what goes, on a whole platform whose pageserver believes that eight days have passed: the history window, branch points and
 * running computes keep what they need, the rest of the bytes leave the disk, and `bin/strata storage` tells the truth about it.
 */
import assert from 'node:assert/strict';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { FaultyDisk } from '../pageserver/faulty-disk.ts';
import { TestPlatform, waitUntil } from './platform.ts';

const DAY_SECONDS = 24 * 3600;
const LEASE_SECONDS = 5;

interface Stored {
  readonly name: string;
  readonly logical_size: number;
  readonly history_size: number;
  readonly shared_with_parent_size: number;
  readonly freed_by_deletion_size: number;
  readonly oldest_lsn: string;
  readonly oldest_timestamp?: string;
}

describe('retention', () => {
  let scratch: string;
  let platform: TestPlatform | undefined;
  let disk: FaultyDisk | undefined;
  let firstLsn = '';
  let firstTime = '';

  before(async () => {
    scratch = mkdtempSync(join(tmpdir(), 'strata-retention-'));
    const dataDir = join(scratch, 'data');
    mkdirSync(dataDir);
    disk = FaultyDisk.make(join(dataDir, 'pageserver'), scratch, 'pageserver');
    if (disk === undefined) return;
    platform = await TestPlatform.start({
      dataDir,
      env: { ...disk.environment, STRATA_TEST_LEASE_SECONDS: String(LEASE_SECONDS) },
    });
  });
  after(async () => {
    await platform?.destroy();
    rmSync(scratch, { recursive: true, force: true });
  });

  const storage = (...args: string[]): Promise<readonly Stored[]> => platform!.cliJson(['storage', ...args]);
  const of = (stored: readonly Stored[], name: string): Stored => stored.find((each) => each.name === name)!;
  const connect = async (branch: string): Promise<string> =>
    (await platform!.cli(['connection-string', branch])).stdout.trim();
  const collect = async (): Promise<readonly Stored[]> => {
    let stored: readonly Stored[] = [];
    const isDone = async (): Promise<boolean> => {
      try {
        stored = await storage('--collect');
        return true;
      } catch (error) {
        assert.match(String(error), /try again in \d+ seconds/);
        return false;
      }
    };
    await waitUntil(isDone, 'it may be collected', 60_000);
    return stored;
  };

  /** Bytes of layers on disk, of all timelines. */
  function bytesOnDisk(): number {
    const root = join(platform!.dataDir, 'pageserver', 'timelines');
    const folders = readdirSync(root).map((folder) => join(root, folder));
    const files = folders.flatMap((folder) => readdirSync(folder).map((name) => join(folder, name)));
    return files.filter((file) => /__[0-9A-F]{16}/.test(file)).reduce((sum, file) => sum + statSync(file).size, 0);
  }

  test('what a branch takes and shares adds up, and deleting one frees what was promised', async (context) => {
    if (platform === undefined) return context.skip('there is no C compiler');
    await platform.psql('CREATE TABLE t AS SELECT i AS id, md5(i::text) AS pad FROM generate_series(1, 40000) i');
    firstLsn = await platform.psql('SELECT pg_current_wal_lsn()');
    firstTime = await platform.psql('SELECT now()');
    await platform.cli(['branches', 'create', '--name', 'old']);
    await platform.cli(['branches', 'create', '--name', 'dev']);
    const dev = await connect('dev');
    await platform.psql('UPDATE t SET pad = reverse(pad) WHERE id <= 2000', dev);
    const size = Number(await platform.psql('SELECT sum(pg_database_size(oid)) FROM pg_database', dev));
    await platform.cli(['endpoints', 'suspend', 'dev']);
    const stored = await collect();
    const { logical_size, shared_with_parent_size, history_size, freed_by_deletion_size } = of(stored, 'dev');
    assert(Math.abs(logical_size - size) < size / 5, `${logical_size} is about what Postgres says, ${size}`);
    assert(shared_with_parent_size > logical_size * 0.8 && shared_with_parent_size < logical_size);
    assert.equal(freed_by_deletion_size, history_size);
    assert.equal(of(stored, 'main').freed_by_deletion_size, 0, 'it has children');
    const total = stored.reduce((sum, each) => sum + each.history_size, 0);
    const before = bytesOnDisk();
    assert(total <= before, `${total} of ${before} bytes on disk are the project's`);
    await platform.cli(['branches', 'delete', 'dev']);
    await waitUntil(() => bytesOnDisk() <= before - freed_by_deletion_size, 'the bytes are gone');
    assert.equal(bytesOnDisk(), before - freed_by_deletion_size, 'no more and no less');
  });

  test('a window later, history is gone but for branch points and what a running compute started from', async (context) => {
    if (platform === undefined || disk === undefined) return context.skip('there is no C compiler');
    await platform.psql('UPDATE t SET pad = md5(pad)');
    await platform.psql('VACUUM t');
    for (let i = 0; i < 4; i++) {
      await platform.psql(`CREATE TABLE scrap AS SELECT md5((i * ${i})::text) FROM generate_series(1, 60000) i`);
      await platform.psql('DROP TABLE scrap');
    }
    const expected = await platform.psql('SELECT count(*), sum(hashtext(pad)) FROM t');
    const before = of(await collect(), 'main').history_size;

    disk.setClockAhead(8 * DAY_SECONDS);
    // While it runs the pageserver does not believe that.
    assert.equal(of(await collect(), 'main').oldest_timestamp, undefined);
    const beforeKill = platform.killService('pageserver');
    await waitUntil(
      () => platform!.descendants().some(({ pid, command }) => command.endsWith('pageserver') && pid !== beforeKill),
      'the pageserver is back',
    );
    await sleep(LEASE_SECONDS * 1000);
    const main = of(await collect(), 'main');
    assert.notEqual(main.oldest_timestamp, undefined);
    assert(main.history_size < before * 0.75, `${main.history_size} of ${before} bytes are kept`);
    await assert.rejects(
      platform.cli(['branches', 'create', '--name', 'gone', '--at', firstLsn]),
      (error: Error) => error.message.includes(main.oldest_lsn) && /state of 20\d\d-/.test(error.message),
    );
    await assert.rejects(
      platform.cli(['branches', 'create', '--name', 'gone', '--at', firstTime]),
      (error: Error) =>
        error.message.includes(main.oldest_lsn) &&
        /of branch main is no longer kept: oldest .*state of 20\d\d-/.test(error.message),
    );
    // The compute started before all that, and may ask for any page that it has not read yet, at the LSN of its start.
    assert.equal(await platform.psql('SELECT count(*), sum(hashtext(pad)) FROM t'), expected);
    assert.match(await platform.psql('SELECT count(*) FROM pg_proc, pg_attribute LIMIT 1'), /^\d+$/);
    assert.equal(
      await platform.psql('SELECT count(*), sum(id) FROM t WHERE md5(id::text) = pad', await connect('old')),
      '40000|800020000',
    );

    await platform.cli(['endpoints', 'suspend', 'old']);
    await platform.cli(['branches', 'delete', 'old']);
    const left = of(await collect(), 'main').history_size;
    assert(left < main.history_size, `${left} of ${main.history_size} bytes without the branch`);
    await platform.cli(['endpoints', 'suspend', 'main']);
    for (const computes of [join(platform.dataDir, 'computes'), join(platform.runDir, 'computes')]) {
      for (const endpoint of existsSync(computes) ? readdirSync(computes) : []) {
        const caches = readdirSync(join(computes, endpoint)).map((name) => join(computes, endpoint, name));
        for (const cache of caches) rmSync(cache, { recursive: true });
      }
    }
    assert.equal(await platform.psql('SELECT count(*), sum(hashtext(pad)) FROM t'), expected, 'from nothing');
  });
});
