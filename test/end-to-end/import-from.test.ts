/**
 * `strata import --from`: pg_dump and pg_restore between servers, of a vanilla server with what an owner may not have, and of a branch. Needs
 * Debian's pg_dump of 15.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { freePort } from '../../src/base/free-port.ts';
import { TestPlatform, waitUntil } from './platform.ts';
import { contentsOf, VanillaPostgres } from './vanilla.ts';

const PG_DUMP = '/usr/lib/postgresql/15/bin/pg_dump';
const SECRET = 'source-secret';

interface Imported {
  readonly project_id: string;
  readonly pg_version: number;
  readonly connection_uri: string;
  readonly tables: number;
  readonly rows: number;
  readonly bytes: number;
  readonly not_restored: readonly { kind: string; name: string; message: string }[];
  readonly notes: readonly string[];
}

describe('strata import --from', { skip: !existsSync(PG_DUMP) }, () => {
  let platform: TestPlatform;
  let server: VanillaPostgres;
  let port: number;

  const uri = (database: string, password = SECRET) =>
    `postgresql://postgres:${password}@127.0.0.1:${port}/${database}`;
  const projects = async () => (await platform.cliJson<{ id: string; name: string }[]>(['projects', 'list'])).length;

  before(async () => {
    platform = await TestPlatform.start({ args: ['--pg-version', '17'] });
    server = new VanillaPostgres(15);
    port = await freePort();
    await server.initdb();
    const start = { listen_addresses: '127.0.0.1', port: String(port), fsync: 'off' };
    server.write('pg_hba.conf', 'local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n');
    await server.start({ ...start, port: String(port) });
    const admin = await server.connect('postgres', 'postgres', undefined, port);
    await admin.query(`ALTER ROLE postgres PASSWORD '${SECRET}'; CREATE ROLE app; CREATE ROLE other`);
    await admin.query('CREATE DATABASE shop');
    await admin.query('CREATE DATABASE broken');
    const shop = await server.connect('shop', 'postgres', undefined, port);
    await shop.query(`
      CREATE EXTENSION pg_trgm;
      CREATE EXTENSION hstore;
      CREATE EXTENSION pageinspect;
      CREATE TABLE items (id serial PRIMARY KEY, body text, attributes hstore);
      INSERT INTO items (body, attributes) SELECT md5(i::text), hstore('n', i::text) FROM generate_series(1, 20000) AS i;
      CREATE INDEX ON items USING gin (body gin_trgm_ops);
      CREATE TABLE lines (item int REFERENCES items, n int GENERATED ALWAYS AS IDENTITY);
      INSERT INTO lines (item) SELECT 1 + i % 20000 FROM generate_series(1, 5000) AS i;
      ALTER TABLE lines OWNER TO other;
      GRANT SELECT ON items TO app;
      CREATE MATERIALIZED VIEW counts AS SELECT count(*) FROM lines;
      CREATE FUNCTION no_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$;
      CREATE EVENT TRIGGER watch ON ddl_command_end EXECUTE FUNCTION no_ddl();
      CREATE PUBLICATION everything FOR ALL TABLES;
      SELECT lo_from_bytea(0, convert_to(repeat('large', 10000), 'UTF8'))`);
  });
  after(async () => {
    await platform?.destroy();
    await server?.[Symbol.asyncDispose]();
  });

  test('a server becomes a project, and what its owner cannot have is listed', async () => {
    const imported = await platform.cliJson<Imported>(['import', '--from', uri('shop'), '--name', 'shop']);
    assert.equal(imported.pg_version, 15, 'the server’s own major');
    assert.deepEqual([imported.tables, imported.rows], [2, 25_000]);
    assert.ok(imported.bytes > 1_000_000);
    assert.deepEqual([...new Set(imported.not_restored.map(({ kind, name }) => `${kind} ${name}`))].sort(), [
      'ACL TABLE items',
      'COMMENT EXTENSION pageinspect',
      'EVENT TRIGGER watch',
      'EXTENSION pageinspect',
      'PUBLICATION everything',
    ]);
    assert.match(
      imported.notes.join('\n'),
      /everything belongs to stratadb_owner here; there it belonged to other, postgres/,
    );
    assert.equal(new URL(imported.connection_uri).pathname, '/shop');
    const source = await server.connect('shop', 'postgres', undefined, port);
    const client = await platform.connect(imported.connection_uri);
    assert.deepEqual(await contentsOf(client), await contentsOf(source));
    await client.query("INSERT INTO items (body) VALUES ('goes on'); SELECT * FROM items WHERE body LIKE '%abc%'");
    await client.end();
    assert.match((await platform.cli(['projects', 'list'])).stdout, /shop/);
  });

  test('a branch of another project is imported like any server, into a branch that exists, when that is empty', async () => {
    const source = (await platform.cliJson<{ id: string; name: string }[]>(['projects', 'list'])).find(
      ({ name }) => name === 'shop',
    )!;
    const from = (await platform.cli(['connection-string', '--project', source.id])).stdout.trim();
    const created = await platform.cliJson<{ project: { id: string }; connection_uris: { connection_uri: string }[] }>([
      ...['projects', 'create', '--name', 'copy', '--pg-version', '16'],
    ]);
    const into = ['--project', created.project.id, '--branch', 'main'];
    const imported = await platform.cliJson<Imported>(['import', '--from', from, ...into]);
    assert.equal(imported.project_id, created.project.id);
    assert.deepEqual(imported.not_restored, []);
    const [there, here] = [await platform.connect(from), await platform.connect(imported.connection_uri)];
    assert.deepEqual(await contentsOf(here), await contentsOf(there));
    await assert.rejects(
      platform.cli(['import', '--from', from, ...into]),
      /database "stratadb" is not empty \(.*items.*\): choose another .*--into-nonempty/,
    );
    await here.query(
      'DROP SCHEMA public CASCADE; CREATE SCHEMA public; SELECT lo_unlink(oid) FROM pg_largeobject_metadata',
    );
    await here.query('CREATE TABLE mine (n int)');
    await platform.cli(['import', '--from', from, ...into, '--into-nonempty']);
    const { 'public.mine': mine, ...rest } = await contentsOf(here);
    assert.equal(mine, '0 0');
    assert.deepEqual(rest, await contentsOf(there));
    await there.end();
    await here.end();
  });

  test('lost data is fatal: nothing is left of the project, and the source is as it was', async () => {
    const count = await projects();
    const broken = await server.connect('broken', 'postgres', undefined, port);
    // Only a server that has the limit already takes the rows.
    await broken.query(`CREATE TABLE z_limits (n int);
      INSERT INTO z_limits VALUES (1000);
      CREATE FUNCTION checked(n int) RETURNS boolean LANGUAGE sql AS 'SELECT $1 <= max(l.n) FROM public.z_limits AS l';
      CREATE TABLE t (n int CHECK (checked(n) IS TRUE));
      INSERT INTO t SELECT generate_series(1, 1000)`);
    const args = ['import', '--from', uri('broken')];
    await assert.rejects(platform.cli(args), (error: Error) => {
      assert.match(error.message, /TABLE DATA t could not be restored: .*; nothing is left of the new project/);
      assert.doesNotMatch(error.message.replace(/^Command failed.*$/m, ''), new RegExp(SECRET));
      return true;
    });
    await waitUntil(async () => (await projects()) === count, 'the project is gone');
    await assert.rejects(platform.cli([...args, '--keep', '--name', 'kept']), /project \S+ is left as it is/);
    assert.equal(await projects(), count + 1);
    assert.equal((await broken.query('SELECT count(*) FROM t')).rows[0].count, '1000');
  });

  test('what cannot be is refused with the next step', async () => {
    const refused = (reason: RegExp, ...args: string[]) => assert.rejects(platform.cli(['import', ...args]), reason);
    await refused(/is not a connection string such as/, '--from', 'nonsense');
    await refused(/must begin with postgresql:\/\//, '--from', 'mysql://x');
    await refused(/exclude each other/, '--from', uri('shop'), '--pgdata', '/tmp');
    await refused(/--pg-version is for --from/, '--pgdata', '/tmp', '--pg-version', '17');
    await refused(/the server cannot be read: .*password authentication failed/, '--from', uri('shop', 'wrong'));
    await refused(/database "nowhere" does not exist/, '--from', uri('nowhere'));
    await refused(/--pg-dump must name a pg_dump/, '--from', uri('shop'), '--pg-dump', '/etc/passwd');
    await using newer = new VanillaPostgres(17);
    await newer.initdb();
    await newer.start();
    const newest = `postgresql://postgres@/postgres?host=${encodeURIComponent(newer.socketDir)}`;
    await refused(
      /the server is Postgres 17, .*found: 15 in .*postgresql-client-17.*--pg-dump.*--pgdata/,
      '--from',
      newest,
    );
  });

  test('passwords are in no arguments of any process, nor in any log', async () => {
    const executable = join(import.meta.dirname, '../../bin/strata');
    const child = spawn(executable, ['import', '--from', uri('shop'), '--name', 'watched'], {
      env: { ...process.env, STRATA_DATA_DIR: platform.dataDir },
      stdio: 'ignore',
    });
    const commandLines = new Set<string>();
    const ended = new Promise<number | null>((done) => child.once('exit', done));
    let isOver = false;
    void ended.then(() => (isOver = true));
    await waitUntil(() => readCommandLine(child.pid!).startsWith('strata import'), 'its title is overwritten');
    await waitUntil(
      () => {
        for (const pid of childrenOf(child.pid!)) commandLines.add(readCommandLine(pid));
        commandLines.add(readCommandLine(child.pid!));
        return isOver;
      },
      'the import ends',
      120_000,
    );
    assert.equal(await ended, 0);
    const all = [...commandLines].join('\n');
    assert.match(all, /pg_dump .*--dbname postgresql:\/\/postgres@127/);
    assert.match(all, /pg_restore/);
    assert.ok(!all.includes(SECRET), all);
    const passwords = [SECRET, decodeURIComponent(new URL(platform.connectionString).password)];
    for (const password of passwords) assert.ok(!platform.logs().includes(password));
  });
});

function readCommandLine(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ').trim();
  } catch {
    return '';
  }
}

function childrenOf(pid: number): number[] {
  try {
    return readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(/\s+/).filter(Boolean).map(Number);
  } catch {
    return [];
  }
}
