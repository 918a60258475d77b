/**
 * `strata export`: a stock Postgres starts from the directory and has every row that the branch had, with nothing for amcheck to complain of;
 * at the head and at an old LSN, while the branch's compute runs, is written to, and sleeps, for every major.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { TestPlatform, waitUntil } from './platform.ts';
import { amcheck, assertSameContents, contentsOf, folderForExports, testsVersion, VanillaPostgres } from './vanilla.ts';

interface Project {
  readonly id: string;
  readonly uri: string;
}

interface Exported {
  readonly lsn: string;
  readonly path: string;
  readonly pg_version: number;
  readonly relation_bytes: number;
}

async function createProject(platform: TestPlatform, version: number): Promise<Project> {
  const args = ['projects', 'create', '--name', `of-${version}`, '--pg-version', String(version)];
  const created = await platform.cliJson<{
    project: { id: string };
    connection_uris: { connection_uri: string }[];
  }>(args);
  return { id: created.project.id, uri: created.connection_uris[0]!.connection_uri };
}

/** Of everything that a data directory holds, something. */
async function makeContents(platform: TestPlatform, uri: string): Promise<void> {
  await platform.pgbench(['-i', '-q', '-s', '1'], uri);
  await platform.pgbench(['-n', '-c', '4', '-t', '50'], uri);
  const client = await platform.connect(uri);
  await client.query(`CREATE TABLE docs (id serial PRIMARY KEY, body text, tags text[]);
    INSERT INTO docs (body, tags) SELECT repeat(md5(i::text), 200), ARRAY[i::text, 'x'] FROM generate_series(1, 300) AS i;
    CREATE INDEX ON docs USING gin (tags);
    CREATE UNLOGGED TABLE scratch (n int);
    INSERT INTO scratch SELECT generate_series(1, 100);
    CREATE MATERIALIZED VIEW sums AS SELECT bid, sum(abalance) FROM pgbench_accounts GROUP BY bid;
    CREATE TABLE gone AS SELECT generate_series(1, 1000) AS n;
    SELECT lo_from_bytea(0, convert_to(repeat('large', 10000), 'UTF8'))`);
  await client.query('DROP TABLE gone');
  await client.query("BEGIN; INSERT INTO docs (body) VALUES ('prepared'); PREPARE TRANSACTION 'waiting'");
  const other = await platform.connect(uri);
  await client.query('BEGIN; SELECT * FROM docs WHERE id < 50 FOR SHARE');
  await other.query('BEGIN; SELECT * FROM docs WHERE id < 50 FOR KEY SHARE; COMMIT');
  await client.query('COMMIT');
  await client.query('CREATE DATABASE second');
  await other.end();
  await client.end();
}

/** Starts a stock Postgres from the directory and compares. */
async function checkExport(
  exported: Exported,
  expected: Record<string, string>,
  options: { password?: string; checksums?: boolean } = {},
): Promise<void> {
  assert.equal(statSync(exported.path).mode & 0o777, 0o700);
  for (const name of ['PG_VERSION', 'global/pg_control', 'postgresql.conf']) {
    assert.equal(statSync(join(exported.path, name)).mode & 0o777, 0o600);
  }
  await using server = new VanillaPostgres(exported.pg_version, exported.path);
  await server.start();
  const client = await server.connect('stratadb');
  // What is unlogged comes back empty, as after a crash.
  assertSameContents(await contentsOf(client), { ...expected, 'public.scratch': '0 0' });
  assert.equal((await client.query('SELECT gid FROM pg_prepared_xacts')).rows[0]?.gid, 'waiting');
  await client.query("COMMIT PREPARED 'waiting'");
  assert.equal((await client.query("SELECT count(*) FROM docs WHERE body = 'prepared'")).rows[0].count, '1');
  assert.equal((await client.query('SHOW data_checksums')).rows[0].data_checksums, options.checksums ? 'on' : 'off');
  assert.deepEqual(await amcheck(client), []);
  const supers = await client.query('SELECT rolname, rolpassword FROM pg_authid WHERE rolsuper');
  assert.deepEqual(supers.rows, [{ rolname: 'postgres', rolpassword: null }], 'one superuser, without a password');
  await client.query('VACUUM (FREEZE) pgbench_accounts');
  await server.connect('second');
  if (options.password !== undefined) {
    const owner = await server.connect('stratadb', 'stratadb_owner', options.password);
    await owner.query('CREATE TABLE mine (n int)');
    await assert.rejects(server.connect('stratadb', 'stratadb_owner', 'wrong'), /password authentication failed/);
  }
  await server.stop();
  await server.start();
  await server.connect('stratadb');
}

describe('strata export', () => {
  let platform: TestPlatform;
  let folder: string;

  before(async () => {
    platform = await TestPlatform.start({ args: ['--pg-version', '17'] });
    folder = folderForExports();
  });
  after(async () => {
    await platform.destroy();
    rmSync(folder, { recursive: true, force: true });
  });

  const exportTo = (name: string, project: Project, args: readonly string[] = []): Promise<Exported> =>
    platform.cliJson<Exported>(['export', '--project', project.id, '--pgdata', join(folder, name), ...args]);

  for (const version of [15, 16, 17, 18]) {
    if (!testsVersion(version, [17, 18])) continue;
    test(`a stock Postgres ${version} starts from a branch, as it is and as it was`, async () => {
      const project = await createProject(platform, version);
      await makeContents(platform, project.uri);
      const client = await platform.connect(project.uri);
      const before = await contentsOf(client);
      const { lsn } = (await client.query<{ lsn: string }>('SELECT pg_current_wal_insert_lsn() AS lsn')).rows[0]!;
      await client.query('VACUUM (FULL) pgbench_accounts');
      await client.query('DELETE FROM pgbench_history; TRUNCATE pgbench_tellers; DROP MATERIALIZED VIEW sums');
      await client.query('UPDATE docs SET tags = NULL WHERE id % 2 = 0');
      const now = await contentsOf(client);
      const password = decodeURIComponent(new URL(project.uri).password);

      const head = await exportTo(`head-${version}`, project);
      await checkExport(head, now, { password });
      const old = await exportTo(`old-${version}`, project, ['--lsn', lsn, '--data-checksums']);
      assert.ok(old.relation_bytes > 0);
      await checkExport(old, before, { password, checksums: true });
      assert.deepEqual(await contentsOf(client), now, 'the branch goes on as it was');
      await client.end();

      const { body } = await platform.api('GET', `/projects/${project.id}/endpoints`);
      const endpointId = (body as { endpoints: { id: string }[] }).endpoints[0]!.id;
      await platform.api('POST', `/projects/${project.id}/endpoints/${endpointId}/suspend`);
      const isGone = () => !platform.postmasters().some(({ dataDir }) => dataDir.includes(endpointId));
      await waitUntil(isGone, 'the endpoint sleeps');
      const asleep = await exportTo(`asleep-${version}`, project);
      assert.ok(isGone(), 'an export wakes nobody');
      await checkExport(asleep, now);
    });
  }

  test('what is written meanwhile is in it whole or not at all', async () => {
    const project = await createProject(platform, 17);
    await platform.pgbench(['-i', '-q', '-s', '1'], project.uri);
    const client = await platform.connect(project.uri);
    const transfers = async (of: { query: typeof client.query }): Promise<number> =>
      Number((await of.query<{ n: string }>('SELECT count(*) AS n FROM pgbench_history')).rows[0]!.n);
    let isOver = false;
    const load = platform.pgbench(['-n', '-c', '3', '-T', '8'], project.uri).finally(() => (isOver = true));
    await waitUntil(async () => (await transfers(client)) > 50, 'money moves');
    const before = await transfers(client);
    const exported = await exportTo('written', project);
    const afterwards = await transfers(client);
    assert(!isOver || afterwards > before, 'it was written to meanwhile');
    await load;
    await client.end();
    await using server = new VanillaPostgres(17, exported.path);
    await server.start();
    const copy = await server.connect('stratadb');
    const { rows } = await copy.query(`SELECT (SELECT sum(abalance) FROM pgbench_accounts) AS accounts,
      (SELECT sum(tbalance) FROM pgbench_tellers) AS tellers, (SELECT sum(bbalance) FROM pgbench_branches) AS branches,
      (SELECT sum(delta) FROM pgbench_history) AS history`);
    const [{ accounts, tellers, branches, history }] = rows as [Record<string, string>];
    assert.deepEqual([tellers, branches, history], [accounts, accounts, accounts]);
    const count = await transfers(copy);
    assert(before <= count && count <= afterwards, `${before} <= ${count} <= ${afterwards}`);
    assert.deepEqual(await amcheck(copy), []);
  });

  test('the platform’s own password is nowhere in the directory', async () => {
    const secrets = JSON.parse(readFileSync(join(platform.dataDir, 'secrets.json'), 'utf8')) as {
      adminPassword: string;
    };
    const project = (await platform.cliJson<{ id: string; name: string }[]>(['projects', 'list'])).find(
      ({ name }) => name === 'of-17',
    )!;
    const exported = await exportTo('named', { id: project.id, uri: '' }, ['--superuser', 'Grand Duke']);
    await using server = new VanillaPostgres(17, exported.path);
    await server.start();
    await assert.rejects(server.connect('postgres', 'strata_admin', secrets.adminPassword), /does not exist|failed/);
    await assert.rejects(
      server.connect('postgres', 'Grand Duke', secrets.adminPassword).then(() => {
        throw new Error('peer');
      }),
      /peer/,
    );
    const { rows } = await (await server.connect('postgres', 'Grand Duke')).query('SELECT current_user AS me');
    assert.equal(rows[0].me, 'Grand Duke');
  });

  test('a directory that is not empty, a file, and an unknown point are refused, and nothing is left', async () => {
    const project = (await platform.cliJson<{ id: string; name: string }[]>(['projects', 'list']))[0]!;
    const attempt = (...args: string[]) => platform.cli(['export', '--project', project.id, ...args]);
    mkdirSync(join(folder, 'full'));
    writeFileSync(join(folder, 'full', 'mine'), 'x');
    await assert.rejects(attempt('--pgdata', join(folder, 'full')), /is not empty: choose a directory/);
    await assert.rejects(attempt('--pgdata', join(folder, 'full', 'mine')), /is no directory/);
    await assert.rejects(attempt('--pgdata', '/proc/strata'), /cannot be made/);
    await assert.rejects(attempt('--pgdata', ''), /names no directory/);
    const target = join(folder, 'never');
    await assert.rejects(attempt('--pgdata', target, '--lsn', 'FFFF/0'), /is in the future of branch/);
    await assert.rejects(attempt('--pgdata', target, '--lsn', 'x'), /is not an LSN/);
    await assert.rejects(attempt('--pgdata', target, '--lsn', '0/1', '--at', '0/1'), /exclude each other/);
    await assert.rejects(attempt('--pgdata', target, '--superuser', 'pg_x'), /cannot be the name of a superuser/);
    assert.equal(existsSync(target), false);
    mkdirSync(join(folder, 'left', 'unfinished-export'), { recursive: true });
    await assert.rejects(attempt('--pgdata', join(folder, 'left')), /holds an export that was interrupted/);
    assert.deepEqual(readdirSync(join(folder, 'full')), ['mine']);
  });

  test('an export that is interrupted leaves no directory that a Postgres would start from', async () => {
    const project = (await platform.cliJson<{ id: string; name: string }[]>(['projects', 'list'])).find(
      ({ name }) => name === 'of-17',
    )!;
    const target = join(folder, 'interrupted');
    const command = `bin/strata export --data-dir "${platform.dataDir}" --project ${project.id} --pgdata "${target}"`;
    const interrupt = (signal: string): void => {
      const script = `${command} & pid=$!; while [ ! -e "${target}/unfinished-export/base" ]; do sleep 0.01; done; kill -${signal} $pid; wait $pid`;
      try {
        execFileSync('sh', ['-c', script], { cwd: join(import.meta.dirname, '../..'), stdio: 'pipe' });
      } catch (error) {
        // It was killed, or says that it was interrupted.
        if (signal === 'TERM') assert.match(String((error as Error).message), /interrupted; nothing is left of it/);
      }
    };
    interrupt('TERM');
    assert.equal(existsSync(target), false);
    interrupt('KILL');
    assert.deepEqual(readdirSync(target), ['unfinished-export']);
    await using server = new VanillaPostgres(17, target);
    await assert.rejects(server.start());
  });
});
