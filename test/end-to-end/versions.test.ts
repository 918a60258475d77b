/**
 * Every major of Postgres that Strata runs: projects of each on one platform, and a distribution's own Postgres by path. A smaller set of
 * what the other files of this folder ask of the default major.
 */
import assert from 'node:assert/strict';
import { existsSync, rmSync } from 'node:fs';
import { dirname } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { isAlive, kill, TestPlatform, waitUntil } from './platform.ts';
import { testsVersion } from './vanilla.ts';

const DEBIAN_BIN_DIR = '/usr/lib/postgresql/15/bin';

interface Place {
  readonly platform: TestPlatform;
  readonly projectId: string;
  readonly endpointId: string;
  readonly connectionString: string;
}

/** kill -9 of the project's Postgres and removal of its directory; the next connection wakes a new one. */
async function restartFromNothing({ platform, endpointId }: Place): Promise<void> {
  const postmaster = platform.postmasters().find(({ dataDir }) => dataDir.includes(endpointId));
  assert(postmaster !== undefined, 'no Postgres is running');
  kill(postmaster.pid);
  rmSync(dirname(postmaster.dataDir), { recursive: true, force: true, maxRetries: 20 });
  await waitUntil(() => !isAlive(postmaster.pid), 'the postmaster is gone');
}

/** Returns the folder in which what the endpoint had is kept. */
async function suspend({ platform, projectId, endpointId }: Place): Promise<string> {
  const postmaster = platform.postmasters().find(({ dataDir }) => dataDir.includes(endpointId));
  assert(postmaster !== undefined, 'no Postgres is running');
  const { status } = await platform.api('POST', `/projects/${projectId}/endpoints/${endpointId}/suspend`);
  assert.equal(status, 200);
  const isGone = () => !platform.postmasters().some(({ dataDir }) => dataDir.includes(endpointId));
  await waitUntil(isGone, 'the endpoint is suspended');
  return dirname(dirname(postmaster.dataDir));
}

/** Statements that leave something behind for each way in which WAL changes pages and statuses. */
async function runWorkload(place: Place): Promise<void> {
  const { platform, connectionString: at } = place;
  await platform.pgbench(['-i', '-q', '-s', '1'], at);
  await platform.pgbench(['-n', '-c', '4', '-t', '50'], at);
  await platform.psql('CREATE TABLE v (id int PRIMARY KEY, n int, pad text) WITH (autovacuum_enabled = off)', at);
  await platform.psql("INSERT INTO v SELECT i, 0, repeat('x', 100) FROM generate_series(1, 5000) AS i", at);
  await platform.psql('UPDATE v SET n = n + 1 WHERE id % 3 = 0', at);
  await platform.psql('DELETE FROM v WHERE id > 4000', at);
  await platform.psql('VACUUM (FREEZE) v', at);
  await platform.psql('UPDATE v SET n = n + 1 WHERE id % 7 = 0', at);

  const [one, two] = [await platform.connect(at), await platform.connect(at)];
  await one.query('BEGIN');
  await two.query('BEGIN');
  await one.query('SELECT * FROM v WHERE id <= 200 FOR SHARE');
  await two.query('SELECT * FROM v WHERE id <= 200 FOR KEY SHARE');
  await one.query('COMMIT');
  await two.query('COMMIT');
  await one.end();
  await two.end();

  await platform.psql('CREATE TABLE prepared (n int)', at);
  await platform.psql("BEGIN; INSERT INTO prepared VALUES (1); PREPARE TRANSACTION 'keep'", at);
  await platform.psql("BEGIN; INSERT INTO prepared VALUES (2); PREPARE TRANSACTION 'drop'", at);
  await platform.psql('CREATE DATABASE by_log STRATEGY wal_log', at);
  await platform.psql('CREATE TABLE t (n int); INSERT INTO t SELECT generate_series(1, 500)', inDatabase(at, 'by_log'));
  await platform.psql('CREATE DATABASE by_copy TEMPLATE by_log STRATEGY file_copy', at);
}

function inDatabase(connectionString: string, name: string): string {
  return connectionString.replace(/\/[^/?]+\?/, `/${name}?`);
}

const QUESTIONS = [
  'SELECT count(*), sum(abalance) FROM pgbench_accounts',
  'SELECT count(*), sum(delta) FROM pgbench_history',
  'SELECT count(*), sum(n), sum(id) FROM v',
  'SET enable_seqscan = off; SELECT count(*) FROM v WHERE id BETWEEN 100 AND 3000',
  "SELECT pg_relation_size('v'), pg_relation_size('v', 'vm')",
  'SELECT count(DISTINCT xmax::text) > 1 FROM v',
  'SELECT string_agg(gid, $$,$$ ORDER BY gid) FROM pg_prepared_xacts',
  'SELECT string_agg(datname, $$,$$ ORDER BY datname) FROM pg_database',
];

async function answers({ platform, connectionString }: Place): Promise<string[]> {
  const given: string[] = [];
  for (const question of QUESTIONS) given.push(await platform.psql(question, connectionString));
  return given;
}

/** The workload's outcome is the same for a new compute, and everything goes on from there. */
async function checkVersion(place: Place, version: number): Promise<void> {
  const { platform, projectId, connectionString: at } = place;
  assert.equal((await platform.psql('SHOW server_version', at)).split('.')[0], String(version));
  await runWorkload(place);
  const expected = await answers(place);
  await restartFromNothing(place);
  assert.deepEqual(await answers(place), expected);
  assert.equal(await platform.psql('SELECT count(*) FROM t', inDatabase(at, 'by_copy')), '500');
  assert.equal(await platform.psql('SELECT count(*) FROM t', inDatabase(at, 'by_log')), '500');

  const lsn = await platform.psql('SELECT pg_current_wal_lsn()', at);
  await platform.psql('VACUUM (FULL, FREEZE) v', at);
  await platform.psql('UPDATE v SET n = n + 1', at);
  await platform.psql("COMMIT PREPARED 'keep'", at);
  await platform.psql("ROLLBACK PREPARED 'drop'", at);
  await platform.psql('DROP DATABASE by_copy', at);
  await platform.psql('DELETE FROM pgbench_accounts', at);
  const later = await answers(place);
  await suspend(place);
  assert.deepEqual(await answers(place), later, 'after a wake with the kept directory');
  rmSync(await suspend(place), { recursive: true, maxRetries: 20 });
  assert.deepEqual(await answers(place), later, 'after a wake from nothing');
  assert.equal(await platform.psql('SELECT n FROM prepared', at), '1');

  await platform.cli(['branches', 'create', '--project', projectId, '--name', 'before', '--at', lsn]);
  const branch = (await platform.cli(['connection-string', 'before', '--project', projectId])).stdout.trim();
  assert.deepEqual(await answers({ ...place, connectionString: branch }), expected, 'on a branch at an LSN before');
}

async function placeOf(platform: TestPlatform, projectId: string, connectionString: string): Promise<Place> {
  const { body } = await platform.api('GET', `/projects/${projectId}/endpoints`);
  const [endpoint] = (body as { endpoints: { id: string }[] }).endpoints;
  assert(endpoint !== undefined);
  return { platform, projectId, endpointId: endpoint.id, connectionString };
}

describe('projects of other majors than the default, side by side', () => {
  let platform: TestPlatform;

  before(async () => {
    platform = await TestPlatform.start({ args: ['--pg-version', '17'] });
  });
  after(async () => {
    await platform.destroy();
  });

  for (const version of [15, 16, 18]) {
    if (!testsVersion(version, [15, 18])) continue;
    test(`Postgres ${version} gives the same answers from nothing, from its kept directory and on a branch`, async () => {
      const args = ['projects', 'create', '--name', `of-${version}`, '--pg-version', String(version)];
      const created = await platform.cliJson<{
        project: { id: string; pg_version: number };
        connection_uris: { connection_uri: string }[];
      }>(args);
      assert.equal(created.project.pg_version, version);
      const uri = created.connection_uris[0]?.connection_uri ?? '';
      await checkVersion(await placeOf(platform, created.project.id, uri), version);
    });
  }

  test('a major without binaries is refused by name', async () => {
    const { status, body } = await platform.api('POST', '/projects', { project: { pg_version: 14 } });
    assert.equal(status, 400);
    assert.match(JSON.stringify(body), /14/);
  });
});

describe('a Postgres that the system installed, by path', { skip: !existsSync(DEBIAN_BIN_DIR) }, () => {
  let platform: TestPlatform;

  before(async () => {
    platform = await TestPlatform.start({ args: ['--pg-bin-dir', DEBIAN_BIN_DIR] });
  });
  after(async () => {
    await platform.destroy();
  });

  test('is that of new projects, without saying its version, and gives the same answers', async () => {
    const [project] = await platform.cliJson<{ id: string; pg_version: number }[]>(['projects', 'list']);
    assert.equal(project?.pg_version, 15);
    const place = await placeOf(platform, project.id, platform.connectionString);
    assert.equal(
      platform.postmasters().every(({ dataDir }) => existsSync(dataDir)),
      true,
    );
    await checkVersion(place, 15);
    assert.match(await platform.psql('SELECT version()'), /Debian/);
  });
});
