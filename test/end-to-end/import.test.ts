/**
 * `strata import --pgdata`: a project of a vanilla cluster, page by page, with and without data checksums, for every major; nobody who was a
 * superuser there is one here. And back: what is exported again is what was imported.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { copyFileSync, existsSync, openSync, readdirSync, readFileSync, rmSync, statSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import type { Client } from 'pg';
import { TestPlatform, waitUntil } from './platform.ts';
import { amcheck, assertSameContents, contentsOf, folderForExports, testsVersion, VanillaPostgres } from './vanilla.ts';

const DEBIAN_BIN_DIR = '/usr/lib/postgresql/15/bin';
const DATABASES = ['shop', 'Second "one"', 'postgres'];
const SETTINGS = { max_prepared_transactions: '10', fsync: 'off' };

interface Imported {
  readonly project_id: string;
  readonly connection_uri: string;
  readonly notes: readonly string[];
}

/** Of everything that a cluster can hold and Strata takes, something. */
async function makeCluster(server: VanillaPostgres): Promise<void> {
  const admin = await server.connect();
  await admin.query(`
    SET password_encryption = 'scram-sha-256';
    ALTER ROLE postgres PASSWORD 'postgres secret';
    CREATE ROLE app LOGIN PASSWORD 'app secret';
    CREATE ROLE boss LOGIN SUPERUSER PASSWORD 'boss secret';
    CREATE ROLE thief LOGIN PASSWORD 'thief secret';
    GRANT pg_execute_server_program, pg_read_server_files TO thief;
    GRANT EXECUTE ON FUNCTION pg_read_file(text) TO thief;
    GRANT boss TO app;
    ALTER ROLE postgres SET work_mem = '5MB'`);
  for (const name of DATABASES.slice(0, 2)) {
    await admin.query(`CREATE DATABASE "${name.replaceAll('"', '""')}"`);
  }
  for (const name of DATABASES) await makeDatabase(await server.connect(name), await server.connect(name));
}

async function makeDatabase(client: Client, other: Client): Promise<void> {
  await client.query(`
    CREATE EXTENSION pg_trgm;
    CREATE EXTENSION pageinspect;
    CREATE TABLE items (id serial PRIMARY KEY, body text, tags text[], at timestamptz DEFAULT now());
    INSERT INTO items (body, tags) SELECT repeat(md5(i::text), 1 + i % 200), ARRAY[i::text, 'x'] FROM generate_series(1, 5000) AS i;
    CREATE INDEX ON items USING gin (tags);
    CREATE INDEX ON items USING brin (id);
    CREATE INDEX ON items USING hash (body);
    DELETE FROM items WHERE id % 10 = 0;
    CREATE TABLE parts (k int, v text) PARTITION BY RANGE (k);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (1000);
    INSERT INTO parts SELECT i, 'part' FROM generate_series(0, 999) AS i;
    CREATE TABLE pending (n int);
    GRANT INSERT ON pending TO app;
    CREATE UNLOGGED TABLE scratch (n int);
    INSERT INTO scratch SELECT generate_series(1, 100);
    CREATE SEQUENCE lonely START 42;
    SELECT nextval('lonely');
    CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE FUNCTION secret() RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT current_user::text';
    CREATE PROCEDURE nothing() LANGUAGE sql AS 'SELECT 1';
    CREATE VIEW moods AS SELECT 'good'::mood AS mood;
    CREATE MATERIALIZED VIEW counts AS SELECT count(*) FROM items;
    CREATE SCHEMA apart;
    CREATE TABLE apart.of_app (n int);
    ALTER TABLE apart.of_app OWNER TO app;
    CREATE FUNCTION no_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no DDL'; END $$;
    SELECT lo_from_bytea(0, convert_to(repeat('large', 10000), 'UTF8'));
    DO $$ BEGIN FOR i IN 1..100 LOOP EXECUTE format('CREATE TABLE many_%s AS SELECT %s AS n', i, i); END LOOP; END $$`);
  await client.query('CREATE EVENT TRIGGER watch ON ddl_command_end EXECUTE FUNCTION no_ddl()');
  await client.query('BEGIN; SELECT * FROM items WHERE id < 500 FOR SHARE');
  await other.query('BEGIN; SELECT * FROM items WHERE id < 500 FOR KEY SHARE; COMMIT');
  await client.query('COMMIT');
  await client.query('VACUUM items');
  const { rows } = await client.query<{ name: string }>('SELECT current_database() AS name');
  if (rows[0]?.name === 'shop') {
    await client.query('SET SESSION AUTHORIZATION app; BEGIN; INSERT INTO pending VALUES (1)');
    await client.query("PREPARE TRANSACTION 'waiting'; RESET SESSION AUTHORIZATION");
  }
}

async function contentsOfAll(
  connect: (database: string) => Promise<Client>,
): Promise<Map<string, Record<string, string>>> {
  const all = new Map<string, Record<string, string>>();
  for (const name of DATABASES) all.set(name, await contentsOf(await connect(name)));
  return all;
}

function inDatabase(uri: string, database: string, user?: string, password?: string): string {
  const url = new URL(uri);
  url.pathname = `/${encodeURIComponent(database)}`;
  if (user !== undefined) url.username = user;
  if (password !== undefined) url.password = encodeURIComponent(password);
  return url.toString();
}

describe('strata import --pgdata', () => {
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

  const projects = () => platform.cliJson<{ id: string; name: string }[]>(['projects', 'list']);

  for (const [version, checksums] of [
    [15, true],
    [16, false],
    [17, true],
    [18, true],
  ] as const) {
    if (!testsVersion(version, [16, 18])) continue;
    test(`a cluster of Postgres ${version} ${checksums ? 'with' : 'without'} data checksums is a project, and a cluster again`, async () => {
      await using server = new VanillaPostgres(version);
      await server.initdb(version < 18 && checksums ? ['--data-checksums'] : []);
      await server.start(SETTINGS);
      await makeCluster(server);
      assert.equal(
        (await (await server.connect()).query('SHOW data_checksums')).rows[0].data_checksums,
        checksums ? 'on' : 'off',
      );
      const expected = await contentsOfAll((name) => server.connect(name));
      await server.stop();
      for (const contents of expected.values()) contents['public.scratch'] = '0 0';
      const before = readFileSync(join(server.dataDir, 'global/pg_control'));

      const imported = await platform.cliJson<Imported>([
        'import',
        '--pgdata',
        server.dataDir,
        '--name',
        `from-${version}`,
      ]);
      assert.deepEqual(readFileSync(join(server.dataDir, 'global/pg_control')), before, 'the directory is as it was');
      const notes = imported.notes.join('\n');
      assert.match(notes, /no longer superusers, with the rights of an owner: postgres, boss/);
      assert.match(notes, /thief is no longer a member of pg_execute_server_program/);
      assert.match(notes, /database shop: event triggers need a superuser and are disabled: watch/);
      assert.match(notes, /database shop: 1 unlogged tables are empty/);
      assert.match(notes, /database shop: it stays the platform's \(ALTER TABLE public.pending .*COMMIT PREPARED/);
      assert.match(notes, /built-in functions have their usual privileges again: pg_read_file/);
      assert.equal(new URL(imported.connection_uri).pathname, '/shop');

      const clients: Client[] = [];
      const connect = async (database: string, user?: string, password?: string): Promise<Client> => {
        const client = await platform.connect(inDatabase(imported.connection_uri, database, user, password));
        clients.push(client);
        return client;
      };
      const check = async (): Promise<void> => {
        for (const [name, contents] of await contentsOfAll((database) => connect(database))) {
          assertSameContents(contents, expected.get(name)!);
        }
        await Promise.all(clients.splice(0).map((client) => client.end()));
      };
      await check();

      // Rights.
      for (const [user, password] of [
        ['postgres', 'postgres secret'],
        ['boss', 'boss secret'],
      ] as const) {
        const client = await connect('shop', user, password);
        assert.equal((await client.query('SHOW is_superuser')).rows[0].is_superuser, 'off');
        await assert.rejects(client.query("COPY items TO PROGRAM 'true'"), /permission denied|must be superuser/);
        await assert.rejects(
          client.query('ALTER ROLE strata_admin PASSWORD NULL'),
          /permission denied|must be superuser/,
        );
        await assert.rejects(client.query('SET ROLE strata_admin'), /permission denied/);
        await assert.rejects(client.query(`GRANT pg_execute_server_program TO ${user}`), /permission denied|must/);
        await client.query('CREATE TABLE IF NOT EXISTS made_here (n int)');
      }
      const postgres = await connect('shop', 'postgres', 'postgres secret');
      assert.equal((await postgres.query('SHOW work_mem')).rows[0].work_mem, '5MB');
      await postgres.query(
        'ALTER TABLE items ADD COLUMN extra int; ALTER TABLE items DROP COLUMN extra; DROP VIEW moods',
      );
      await postgres.query('CREATE VIEW moods AS SELECT 1; DROP EXTENSION pg_trgm');
      assert.equal((await postgres.query('SELECT secret()')).rows[0].secret, 'postgres');
      const owner = await connect('shop');
      await owner.query('ALTER TABLE items ADD COLUMN extra int; ALTER TABLE items DROP COLUMN extra');
      await owner.query('ALTER TABLE apart.of_app ADD COLUMN m int; SET ROLE app; RESET ROLE');
      for (const sql of ['CREATE ROLE made LOGIN', 'DROP ROLE made', 'CREATE DATABASE third', 'DROP DATABASE third']) {
        await owner.query(sql);
      }
      const app = await connect('shop', 'app', 'app secret');
      await app.query('INSERT INTO apart.of_app VALUES (1); DELETE FROM apart.of_app');
      const thief = await connect('shop', 'thief', 'thief secret');
      await assert.rejects(thief.query("COPY (SELECT 1) TO PROGRAM 'true'"), /permission denied|must be superuser/);
      await assert.rejects(thief.query("SELECT pg_read_file('PG_VERSION')"), /permission denied/);
      await assert.rejects(connect('shop', 'postgres', 'wrong'), /password authentication failed/);

      // As it goes on: prepared transactions, and a compute that starts from nothing.
      assert.equal((await owner.query('SELECT gid FROM pg_prepared_xacts')).rows[0].gid, 'waiting');
      await app.query("COMMIT PREPARED 'waiting'");
      assert.equal((await owner.query('SELECT count(*) FROM pending')).rows[0].count, '1');
      expected.get('shop')!['public.pending'] = (await contentsOf(owner))['public.pending']!;
      await owner.query('DROP TABLE made_here');
      for (const contents of expected.values()) contents['apart.of_app'] = '0 0';
      await Promise.all(clients.splice(0).map((client) => client.end()));
      const { body } = await platform.api('GET', `/projects/${imported.project_id}/endpoints`);
      const endpointId = (body as { endpoints: { id: string }[] }).endpoints[0]!.id;
      await platform.api('POST', `/projects/${imported.project_id}/endpoints/${endpointId}/suspend`);
      await waitUntil(async () => {
        const { body: now } = await platform.api('GET', `/projects/${imported.project_id}/endpoints/${endpointId}`);
        return (now as { endpoint: { current_state: string } }).endpoint.current_state === 'idle';
      }, 'it sleeps');
      rmSync(join(platform.runDir, 'computes', endpointId), { recursive: true, force: true });
      rmSync(join(platform.dataDir, 'computes', endpointId), { recursive: true, force: true });
      await check();

      // A branch of it, and the way back.
      await platform.cli(['branches', 'create', '--project', imported.project_id, '--name', 'child']);
      const child = await platform.cli([
        'psql',
        'child',
        '--project',
        imported.project_id,
        '--database',
        'shop',
        '--',
        '-Atc',
        'SELECT count(*) FROM items',
      ]);
      assert.equal(child.stdout.trim(), expected.get('shop')!['public.items']!.split(' ')[0]);
      const target = join(folder, `again-${version}`);
      await platform.cli(['export', '--project', imported.project_id, '--pgdata', target]);
      await using again = new VanillaPostgres(version, target);
      await again.start();
      for (const [name, contents] of await contentsOfAll((database) => again.connect(database))) {
        assertSameContents(contents, expected.get(name)!);
      }
      for (const name of DATABASES) assert.deepEqual(await amcheck(await again.connect(name)), []);
      const admin = await again.connect();
      const { rows } = await admin.query('SELECT rolname FROM pg_roles WHERE rolsuper ORDER BY 1');
      assert.deepEqual(rows, [{ rolname: 'postgres' }, { rolname: 'strata_admin' }]);
      await again.stop();

      const twice = await platform.cliJson<Imported>(['import', '--pgdata', target, '--name', `twice-${version}`]);
      for (const name of DATABASES) {
        const client = await platform.connect(inDatabase(twice.connection_uri, name));
        const contents = await contentsOf(client);
        assertSameContents(contents, expected.get(name)!);
        await client.end();
      }
      for (const id of [imported.project_id, twice.project_id]) await platform.cli(['projects', 'delete', id]);
    });
  }

  test('a cluster that was promoted, without a database postgres, whose superuser has another name, is imported', async () => {
    await using server = new VanillaPostgres(17);
    await server.initdb(['--data-checksums']);
    await server.start();
    const admin = await server.connect();
    await admin.query('CREATE ROLE other SUPERUSER LOGIN');
    await admin.query('CREATE DATABASE app');
    await admin.end();
    const renamer = await server.connect('app', 'other');
    await renamer.query(
      'ALTER ROLE postgres RENAME TO "Root Of All"; CREATE TABLE t AS SELECT generate_series(1, 1000) AS n',
    );
    await renamer.query('DROP DATABASE postgres');
    await server.stop();
    server.write('standby.signal', '');
    await server.start();
    await (await server.connect('app', 'other')).query('SELECT pg_promote()');
    await server.stop();
    const imported = await platform.cliJson<Imported>(['import', '--pgdata', server.dataDir, '--role', 'other']);
    const url = new URL(imported.connection_uri);
    assert.deepEqual([url.username, url.pathname], ['other', '/app']);
    assert.match(imported.notes.join('\n'), /no longer superusers, with the rights of an owner: Root Of All, other/);
    assert.match(imported.notes.join('\n'), /without a password they cannot log in .*: Root Of All/);
    const client = await platform.connect(imported.connection_uri);
    assert.equal((await client.query('SELECT count(*) FROM t')).rows[0].count, '1000');
    await client.query('ALTER TABLE t ADD COLUMN m int; DELETE FROM t');
    await client.end();

    // A branch from before anybody was the platform's there.
    const [storage] = await platform.cliJson<{ oldest_lsn: string }[]>(['storage', '--project', imported.project_id]);
    const name = ['--name', 'untouched', '--at', storage!.oldest_lsn];
    await platform.cli(['branches', 'create', '--project', imported.project_id, ...name]);
    const at = ['psql', 'untouched', '--project', imported.project_id];
    const { stdout } = await platform.cli([...at, '--', '-Atc', 'SELECT count(*) FROM t; SHOW is_superuser']);
    assert.equal(stdout.trim(), '1000\noff');
  });

  test(
    'a cluster of Debian with ICU collations of another version is imported, and told what to do',
    { skip: !existsSync(DEBIAN_BIN_DIR) },
    async () => {
      await using server = new VanillaPostgres(15, undefined, DEBIAN_BIN_DIR);
      await server.initdb(['--locale-provider=icu', '--icu-locale=en-US', '--encoding=UTF8', '--locale=C']);
      await server.start({ password_encryption: 'md5' });
      const admin = await server.connect();
      await admin.query(
        'CREATE ROLE old LOGIN PASSWORD \'md5 secret\'; CREATE TABLE words (w text COLLATE "de-x-icu" PRIMARY KEY)',
      );
      await admin.query('INSERT INTO words SELECT md5(i::text) FROM generate_series(1, 1000) AS i');
      server.write('postgresql.auto.conf', "shared_preload_libraries = 'pg_stat_statements, auto_explain'\n");
      await server.stop();
      const imported = await platform.cliJson<Imported>(['import', '--pgdata', server.dataDir]);
      const notes = imported.notes.join('\n');
      assert.match(
        notes,
        /database postgres: the collation of the database was of version \S+ and is of \S+ here: REINDEX/,
      );
      assert.match(notes, /database postgres: the collation of de-x-icu was of version/);
      assert.match(notes, /shared_preload_libraries is not carried over: pg_stat_statements, auto_explain/);
      assert.match(notes, /their md5 passwords do not open a session here, .*: old/);
      const client = await platform.connect(imported.connection_uri);
      await client.query('REINDEX TABLE words');
      assert.equal((await client.query('SELECT count(*) FROM words')).rows[0].count, '1000');
      await client.end();
    },
  );

  test('a cluster that runs, that crashed, or is damaged is refused, and no project is left', async () => {
    await using server = new VanillaPostgres(17);
    await server.initdb(['--data-checksums']);
    await server.start();
    await (
      await server.connect()
    ).query('CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 20000) AS i; CHECKPOINT');
    const { rows } = await (await server.connect()).query<{ path: string }>("SELECT pg_relation_filepath('t') AS path");
    const before = await projects();
    const attempt = (...args: string[]) => platform.cli(['import', '--pgdata', server.dataDir, ...args]);
    await assert.rejects(attempt(), /a Postgres runs on .* stop it first/);
    await server.stop('immediate');
    await assert.rejects(attempt(), /was not stopped cleanly .*: start it once/);
    await server.start({ max_prepared_transactions: '10' });
    const admin = await server.connect();
    await admin.query('BEGIN; LOCK t');
    await admin.query("PREPARE TRANSACTION 'held'");
    await server.stop();
    await assert.rejects(attempt(), /its superuser has prepared \(held\), .*COMMIT PREPARED/);
    await server.start({ max_prepared_transactions: '10' });
    await (await server.connect()).query("ROLLBACK PREPARED 'held'");
    await server.stop();
    await assert.rejects(platform.cli(['import', '--pgdata', folder]), /is no data directory of Postgres/);
    await assert.rejects(platform.cli(['import']), /say what to import/);
    const path = join(server.dataDir, rows[0]!.path);
    copyFileSync(path, join(folder, 'whole'));
    const file = openSync(path, 'r+');
    writeSync(file, Buffer.from('damage'), 0, 6, 5 * 8192 + 4000);
    await assert.rejects(attempt(), (error: Error) => {
      assert.match(error.message, /base\/\d+\/\d+ is damaged: block 5 does not have its checksum; nothing is left/);
      return true;
    });
    await waitUntil(async () => (await projects()).length === before.length, 'the project is gone');
    const timelines = join(platform.dataDir, 'pageserver', 'timelines');
    const count = readdirSync(timelines).length;
    copyFileSync(join(folder, 'whole'), path);
    const { project_id: id } = await platform.cliJson<Imported>(['import', '--pgdata', server.dataDir]);
    assert.equal(readdirSync(timelines).length, count + 1, 'the failed one had left nothing');
    await platform.cli(['projects', 'delete', id]);
  });

  test('an import that is interrupted, or whose pageserver or platform dies, leaves nothing, and can be run again', async () => {
    await using server = new VanillaPostgres(17);
    await server.initdb(['--data-checksums']);
    await server.start({ fsync: 'off', max_wal_size: '4GB' });
    await (
      await server.connect()
    ).query(`CREATE TABLE big AS SELECT i, sha512(i::text::bytea)::text AS body FROM generate_series(1, 400000) AS i`);
    await server.stop();
    const before = await projects();
    const timelines = join(platform.dataDir, 'pageserver', 'timelines');
    const folders = () => readdirSync(timelines).filter((name) => !existsSync(join(timelines, name, 'index')));
    const isReading = () =>
      folders().some((name) =>
        readdirSync(join(timelines, name)).some((file) => statSync(join(timelines, name, file)).size > 1e6),
      );

    const child = spawn(join(import.meta.dirname, '../../bin/strata'), ['import', '--pgdata', server.dataDir], {
      env: { ...process.env, STRATA_DATA_DIR: platform.dataDir },
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    let said = '';
    child.stderr.on('data', (chunk: Buffer) => (said += chunk.toString()));
    const exited = new Promise<number | null>((done) => child.once('exit', done));
    await waitUntil(isReading, 'the pageserver reads');
    child.kill('SIGINT');
    assert.equal(await exited, 1);
    assert.match(said, /interrupted; nothing is left of the new project/);
    await waitUntil(async () => (await projects()).length === before.length, 'the project is gone');
    assert.deepEqual(folders(), []);

    let attempt = platform.cli(['import', '--pgdata', server.dataDir]);
    attempt.catch(() => {});
    await waitUntil(isReading, 'the pageserver reads');
    platform.killService('pageserver');
    await assert.rejects(attempt, /nothing is left of the new project/);
    await waitUntil(async () => (await projects()).length === before.length, 'the project is gone');
    await waitUntil(() => folders().length === 0, 'its folder is gone');

    attempt = platform.cli(['import', '--pgdata', server.dataDir]);
    attempt.catch(() => {});
    await waitUntil(isReading, 'the pageserver reads');
    await platform.killEverything();
    await assert.rejects(attempt);
    await platform.start();
    await waitUntil(async () => (await projects()).length === before.length, 'the project is gone');
    assert.deepEqual(folders(), []);

    const imported = await platform.cliJson<Imported>(['import', '--pgdata', server.dataDir]);
    const client = await platform.connect(imported.connection_uri);
    assert.equal((await client.query('SELECT count(*) FROM big')).rows[0].count, '400000');
    await client.end();
  });
});
