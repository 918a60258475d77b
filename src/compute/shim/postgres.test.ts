import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { chmodSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Client } from 'pg';
import { countPresentPages, reusePageMap } from '../page-map.ts';
import type { PostgresProcess } from '../postgres-process.ts';
import { type Lsn, parseLsn } from '../../postgres/lsn.ts';
import { ReplicationClient } from '../replication-client.ts';
import { buildShim } from './build.ts';
import {
  type Cluster,
  type ColdCluster,
  connectTo,
  initCluster,
  logFileOf,
  makeColdCluster,
  pagesOfCluster,
  shimEnvironment,
  startCluster,
  TEST_TIMELINE,
  TEST_TOKEN,
} from './test-cluster.ts';
import { TestPageServer } from './test-page-server.ts';

const root = mkdtempSync(join(tmpdir(), 'strata-shim-'));
chmodSync(root, 0o755);

let shim: string;
let full: Cluster;
let server: TestPageServer;
/** Digest of each table of the full cluster, catalogs included. */
let digests: ReadonlyMap<string, string>;

before(async () => {
  shim = await buildShim(root);
  full = initCluster(root);
  const postgres = await startCluster(full);
  const client = await connectTo(full);
  await client.query(`
    create table accounts (aid int primary key, bid int, abalance int, filler char(84));
    insert into accounts select g, g / 1000, 0, 'x' from generate_series(1, 60000) g;
    create table history (tid int, aid int, delta int, mtime timestamp, filler char(22));
    create table wide as select g as id, (select string_agg(md5(g::text || i), '') from generate_series(1, 120) i) as text
      from generate_series(1, 500) g;
    create index on accounts using gin ((array[aid % 10, bid]));
    create table doomed as select g as id, md5(g::text) as text from generate_series(1, 20000) g;
    create table shrinking as select g as id, md5(g::text) as text from generate_series(1, 40000) g;
    create index on shrinking (id);
    create unlogged table passing (id int primary key);
    insert into passing select generate_series(1, 1000);
    create sequence numbers;
    select nextval('numbers');
    delete from accounts where aid % 7 = 0;
  `);
  await client.query('vacuum analyze');
  digests = await digestTables(client);
  await client.end();
  assert.equal(await postgres.stop('fast', 10_000), true);
  server = new TestPageServer(pagesOfCluster(full), { token: TEST_TOKEN });
  await server.start();
});

after(async () => {
  await server?.stop();
  rmSync(root, { recursive: true, force: true });
});

async function digestTables(client: Client): Promise<Map<string, string>> {
  const { rows } = await client.query<{ name: string }>(
    `select c.oid::regclass::text as name from pg_class c join pg_namespace n on n.oid = relnamespace
     where relkind = 'r' and relpersistence = 'p' and nspname in ('public', 'pg_catalog') order by 1`,
  );
  const found = new Map<string, string>();
  for (const { name } of rows) {
    const result = await client.query<{ digest: string }>(
      `select count(*) || ':' || coalesce(sum(hashtextextended(t::text, 0)), 0) as digest from ${name} t`,
    );
    found.set(name, result.rows[0]!.digest);
  }
  return found;
}

let coldCount = 0;

interface Running {
  readonly cluster: ColdCluster;
  readonly postgres: PostgresProcess;
  readonly client: Client;
}

/** A compute with no page of its own, running. */
async function startCold(extra: Record<string, string> = {}, filesOnFirstUse = true): Promise<Running> {
  const cluster = makeColdCluster(full, join(root, `cold-${coldCount++}`), filesOnFirstUse);
  const postgres = await startCluster(cluster, environmentOf(cluster, extra));
  return { cluster, postgres, client: await connectTo(cluster) };
}

function environmentOf(cluster: ColdCluster, extra: Record<string, string> = {}): Record<string, string> {
  return shimEnvironment({
    shim,
    dataDir: cluster.dataDir,
    pageMap: cluster.pageMap,
    port: server.port,
    user: cluster.user,
    extra,
  });
}

/** Stops it cleanly and looks for what should never be in a log. */
async function stop(running: Running): Promise<void> {
  await running.client.end();
  assert.equal(await running.postgres.stop('fast', 20_000), true);
  const log = readFileSync(logFileOf(running.cluster), 'utf8');
  assert.doesNotMatch(log, /PANIC|invalid page|could not read block|server process .* was terminated|strata page shim/);
}

async function one(client: Client, sql: string): Promise<string> {
  const { rows } = await client.query({ text: sql, rowMode: 'array' });
  return String((rows[0] as unknown[])[0]);
}

const MODES = [
  { mode: 'files made on first use', filesOnFirstUse: true },
  { mode: 'sparse files made before', filesOnFirstUse: false },
];

for (const { mode, filesOnFirstUse } of MODES) {
  test(`every table of a cold compute reads as in the cluster that it was made from (${mode})`, async () => {
    const running = await startCold({}, filesOnFirstUse);
    assert.deepEqual(await digestTables(running.client), digests);
    assert.equal(await one(running.client, 'select count(*) from passing'), '0', 'an unlogged table comes back empty');
    await running.client.query('insert into passing select generate_series(1, 10)');
    assert.equal(await one(running.client, `select nextval('numbers')`), '2');
    await running.client.query('vacuum (freeze, analyze)');
    const byIndex = await one(
      running.client,
      'select count(*) from accounts where array[aid % 10, bid] @> array[3, 12]',
    );
    assert.equal(byIndex, await one(running.client, 'select count(*) from accounts where aid % 10 = 3 and bid = 12'));
    await stop(running);
  });
}

test('pages arrive once: a second read asks for nothing, nor does a start on the kept files', async () => {
  const running = await startCold();
  await digestTables(running.client);
  const asked = server.requestCount;
  await digestTables(running.client);
  assert.equal(server.requestCount, asked);
  await stop(running);
  assert.equal(reusePageMap(running.cluster.pageMap, { timelineId: TEST_TIMELINE }).kind, 'ready');
  const postgres = await startCluster(running.cluster, environmentOf(running.cluster));
  const client = await connectTo(running.cluster);
  assert.deepEqual(await digestTables(client), digests);
  assert.equal(server.requestCount, asked);
  const { present, total } = countPresentPages(running.cluster.pageMap);
  assert.ok(present > 0 && present <= total);
  await stop({ ...running, postgres, client });
});

for (const { mode, filesOnFirstUse } of MODES) {
  test(`tables that are cut, rewritten, dropped and made anew hold what was written, whatever arrives meanwhile (${mode})`, async () => {
    const running = await startCold({}, filesOnFirstUse);
    const { client, cluster } = running;
    const readers = Array.from({ length: 3 }, async () => {
      const reader = await connectTo(cluster);
      for (let i = 0; i < 8; i++) {
        await reader.query('select count(*), sum(abalance) from accounts');
        await reader.query('select sum(length(text)) from wide');
      }
      await reader.end();
    });
    await client.query('delete from shrinking where id > 1000');
    await client.query('vacuum shrinking');
    assert.equal(await one(client, 'select count(*) from shrinking'), '1000');
    await client.query(`insert into shrinking select g, 'again' from generate_series(1001, 30000) g`);
    assert.equal(
      await one(client, `select count(*) filter (where text = 'again') || '/' || count(*) from shrinking`),
      '29000/30000',
    );
    await client.query('drop table doomed');
    await client.query('create table doomed (id int, text text)');
    await client.query('checkpoint');
    await client.query(`insert into doomed select g, 'new' from generate_series(1, 5000) g`);
    assert.equal(
      await one(client, `select count(*) filter (where text = 'new') || '/' || count(*) from doomed`),
      '5000/5000',
    );
    const before = await one(client, 'select sum(hashtextextended(t::text, 0)) from wide t');
    await client.query('vacuum full wide');
    await client.query('cluster shrinking using shrinking_id_idx');
    await client.query('reindex table accounts');
    await client.query('vacuum full pg_class');
    assert.equal(await one(client, 'select sum(hashtextextended(t::text, 0)) from wide t'), before);
    await client.query('begin; truncate history; insert into history values (1); rollback');
    assert.equal(await one(client, 'select count(*) from history'), '0');
    await Promise.all(readers);
    await stop(running);
  });
}

test('files that nobody used yet are there for whoever looks, lists and removes', async () => {
  const running = await startCold();
  const { client, cluster } = running;
  const template = join(
    cluster.dataDir,
    'base',
    await one(client, `select oid from pg_database where datname = 'template1'`),
  );
  const used = readdirSync(template).length;
  assert.ok(used < 20, `${used} files of a database that nobody was in`);
  const size = readdirSync(template.replace(cluster.dataDir, full.dataDir)).reduce(
    (sum, name) => sum + statSync(join(template.replace(cluster.dataDir, full.dataDir), name)).size,
    0,
  );
  assert.equal(await one(client, `select pg_database_size('template1')`), String(size));
  const path = await one(client, `select pg_relation_filepath('doomed')`);
  assert.ok(!existsSync(join(cluster.dataDir, path)));
  assert.equal(await one(client, `select pg_relation_size('doomed')`), String(statSync(join(full.dataDir, path)).size));
  await client.query(`update pg_database set datistemplate = false where datname = 'template1'`);
  await client.query('drop database template1');
  assert.ok(!existsSync(template));
  await stop(running);
});

test('a database copied file by file, and the files as functions and base backups read them, have every page', async () => {
  const running = await startCold();
  await running.client.query('create database copied template postgres strategy file_copy');
  const copy = await connectTo(running.cluster, 'copied');
  const found = await digestTables(copy);
  await copy.end();
  for (const name of ['accounts', 'wide', 'doomed', 'pg_class']) assert.equal(found.get(name), digests.get(name), name);
  await running.client.query('drop database copied');
  await stop(running);

  const second = await startCold();
  const path = await one(second.client, `select pg_relation_filepath('wide')`);
  const digest = await one(second.client, `select md5(pg_read_binary_file('${path}'))`);
  assert.equal(digest, await one(second.client, `select md5(pg_read_binary_file('${join(full.dataDir, path)}'))`));
  await stop(second);
});

test('concurrent clients, many and short, change rows while pages arrive', async () => {
  const running = await startCold();
  const workers = Array.from({ length: 6 }, async (_, worker) => {
    for (let i = 0; i < 12; i++) {
      const client = await connectTo(running.cluster);
      for (let j = 0; j < 15; j++) {
        const aid = ((worker * 7919 + i * 104_729 + j * 1299) % 60_000) + 1;
        await client.query('begin');
        await client.query('update accounts set abalance = abalance + 1 where aid = $1', [aid]);
        await client.query('insert into history (aid, delta) select aid, 1 from accounts where aid = $1', [aid]);
        await client.query('commit');
      }
      await client.end();
    }
  });
  await Promise.all(workers);
  const { client } = running;
  assert.equal(
    await one(client, 'select sum(abalance) from accounts'),
    await one(client, 'select count(*) from history'),
  );
  await stop(running);
});

test('while the pageserver is away what is here goes on, what is not waits, and comes when it is back', async () => {
  const running = await startCold();
  const { client, cluster } = running;
  const writer = await connectTo(cluster);
  await writer.query('create table here as select generate_series(1, 1000) as id');
  await client.query('select count(*) from accounts where aid < 100');
  await server.stop();
  const cold = client.query({ text: 'select sum(hashtextextended(t::text, 0)) from wide t', rowMode: 'array' });
  for (let i = 0; i < 5; i++) {
    assert.equal(await one(writer, 'select count(*) from here'), String(1000 + i));
    await writer.query('insert into here values (0)');
    await sleep(20);
  }
  await server.start();
  const { rows } = await cold;
  assert.equal(`500:${String((rows[0] as unknown[])[0])}`, digests.get('wide'));
  // And again in the midst of a scan, more than once.
  const scan = digestTables(client);
  for (let i = 0; i < 4; i++) {
    await sleep(30);
    await server.stop();
    await sleep(10);
    await server.start();
  }
  const found = await scan;
  for (const name of ['accounts', 'wide', 'doomed', 'shrinking'])
    assert.equal(found.get(name), digests.get(name), name);
  await writer.end();
  await stop(running);
});

test('a page that does not come in time is an I/O error of the statement, and no more', async () => {
  const running = await startCold({ STRATA_FETCH_TIMEOUT_MS: '400' });
  const { client } = running;
  await client.query('select count(*) from accounts where aid < 100');
  await server.stop();
  await assert.rejects(client.query('select sum(length(text)) from wide'), /could not read block.*Input\/output error/);
  assert.equal(await one(client, 'select 1'), '1');
  await server.start();
  assert.equal(await one(client, 'select count(*) from wide'), '500');
  await client.end();
  assert.equal(await running.postgres.stop('fast', 20_000), true);
  assert.match(
    readFileSync(logFileOf(running.cluster), 'utf8'),
    /strata page shim \[\d+\]: cannot get block \d+ of relation 1663\/\d+\/\d+ fork 0/,
  );
});

test('signals that arrive all the time break no fetch', async () => {
  const running = await startCold();
  const { client, cluster } = running;
  const pid = Number(await one(client, 'select pg_backend_pid()'));
  const noise = setInterval(() => process.kill(pid, 'SIGUSR1'), 1);
  const found = await digestTables(client);
  clearInterval(noise);
  assert.deepEqual(found, digests);
  const cancelled = client.query('select count(*) from accounts a, accounts b, accounts c');
  const canceller = await connectTo(cluster);
  await Promise.all([
    assert.rejects(cancelled, /canceling statement/),
    sleep(50).then(() => one(canceller, `select pg_cancel_backend(${pid})`)),
  ]);
  await canceller.end();
  await stop(running);
});

test('programs that the server starts run without the shim, and never learn where the token is', async () => {
  const running = await startCold();
  await running.client.query('create table environment (line text)');
  await running.client.query(`copy environment from program 'env'`);
  const { rows } = await running.client.query<{ line: string }>(
    `select line from environment where line ~ 'STRATA|LD_PRELOAD'`,
  );
  assert.deepEqual(rows, []);
  await stop(running);
});

test('a server whose page map is damaged, or of another timeline, does not start; other programs do not care', async () => {
  const cluster = makeColdCluster(full, join(root, 'refused'));
  const env = environmentOf(cluster);
  await assert.rejects(
    startCluster(cluster, { ...env, STRATA_TIMELINE: 'f'.repeat(32) }),
    /the page map is another timeline's/,
  );
  await assert.rejects(
    startCluster(cluster, { ...env, STRATA_PAGE_MAP: join(full.dataDir, 'PG_VERSION') }),
    /it is not a page map/,
  );
  await assert.rejects(startCluster(cluster, { ...env, STRATA_TOKEN_FILE: '' }), /STRATA_TOKEN_FILE is missing/);
  assert.equal(
    execFileSync('/bin/echo', ['fine'], { env: { ...env, STRATA_PAGE_MAP: '/nowhere' }, encoding: 'utf8' }),
    'fine\n',
  );
});

test('the server goes down with the process that started it, and runs on the processors that it is given, when told to', async () => {
  const cluster = makeColdCluster(full, join(root, 'orphan'));
  const { user, installation, dataDir } = cluster;
  const parent = spawn('/bin/sh', ['-c', `'${join(installation.binDir, 'postgres')}' -D '${dataDir}' & wait`], {
    cwd: dataDir,
    stdio: 'ignore',
    env: {
      PATH: '/usr/bin:/bin',
      LD_LIBRARY_PATH: join(dirname(installation.binDir), 'lib'),
      ...environmentOf(cluster, { STRATA_PARENT_DEATH: '1', STRATA_PROCESSORS: '0' }),
    },
    ...(user === undefined ? {} : { uid: user.uid, gid: user.gid }),
  });
  const pidFile = join(dataDir, 'postmaster.pid');
  await until(() => existsSync(pidFile) && readFileSync(pidFile, 'utf8').includes('ready'));
  const pid = Number(readFileSync(pidFile, 'utf8').split('\n')[0]);
  assert.match(readFileSync(`/proc/${pid}/status`, 'latin1'), /^Cpus_allowed_list:\s*0$/m);
  parent.kill('SIGKILL');
  await until(() => !existsSync(`/proc/${pid}`) || readFileSync(`/proc/${pid}/stat`, 'utf8').includes(') Z '));
});

test('a walsender gathers WAL while its last small message is not answered, and holds nothing back for ever', async () => {
  const running = await startCold();
  const { client, cluster } = running;
  const flushLsn = async (): Promise<Lsn> => parseLsn(await one(client, 'select pg_current_wal_flush_lsn()'));
  await client.query('create table counted (n int); set synchronous_commit = on');
  const follower = await ReplicationClient.connect({
    socketDir: cluster.dataDir,
    port: 5432,
    user: 'postgres',
    password: '',
    applicationName: 'follower',
  });
  let [messages, lsn] = [0, await flushLsn()];
  let answers: 'none' | 'the one before' | 'all' = 'none';
  await follower.ensureSlot('follower');
  await follower.stream('follower', lsn, {
    onWal: (startLsn, bytes) => {
      messages++;
      lsn = startLsn + bytes.length;
      if (answers !== 'none') follower.sendStatus(answers === 'all' ? lsn : startLsn);
    },
    onStatusWanted: () => follower.sendStatus(lsn),
    onClose: () => {},
  });
  const insert = async (): Promise<void> => {
    for (let n = 0; n < 100; n++) await client.query('insert into counted values ($1)', [n]);
    const end = await flushLsn();
    await until(() => lsn >= end);
  };
  for (answers of ['none', 'the one before'] as const) {
    messages = 0;
    const startMs = performance.now();
    await insert();
    const elapsedMs = performance.now() - startMs;
    assert.ok(
      messages <= elapsedMs / 2 + 3,
      `${messages} messages in ${elapsedMs.toFixed(0)} ms, answered: ${answers}`,
    );
  }
  answers = 'all';
  await insert();
  // Much WAL, in large messages.
  await client.query('insert into counted select generate_series(1, 100000)');
  const end = await flushLsn();
  await until(() => lsn >= end);
  follower.close();
  await stop(running);
});

async function until(condition: () => boolean): Promise<void> {
  for (const deadline = Date.now() + 10_000; !condition(); await sleep(10))
    assert.ok(Date.now() < deadline, 'it took more than 10 s');
}
