/**
 * What nobody may do: an owner beyond the own project, a stranger on any port, one project's compute with another's pages.
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { connect } from 'node:net';
import { after, before, describe, test } from 'node:test';
import { PageClient } from '../../src/api/pages.ts';
import { PageserverClient } from '../../src/api/pageserver.ts';
import { signToken } from '../../src/base/token.ts';
import { isAlive, TestPlatform, waitUntil } from './platform.ts';
import { resetSocket } from '../reset-socket.ts';

const PROTOCOL_3 = 196608;
const SSL_REQUEST = 80877103;
const CANCEL_REQUEST = 80877102;
const TEMPLATE = '17'.padStart(32, '0');

/** Statements that an owner has no right to; each must fail for want of it. */
const FORBIDDEN: readonly string[] = [
  // Files and programs of the server.
  "COPY (SELECT 1) TO PROGRAM 'id'",
  "COPY (SELECT 1) TO '/tmp/strata-test-owned'",
  'CREATE TEMPORARY TABLE f (x text); COPY f FROM $$/etc/passwd$$',
  "SELECT pg_read_file('postgresql.conf')",
  "SELECT pg_read_binary_file('../token')",
  "SELECT pg_ls_dir('.')",
  "SELECT pg_stat_file('postgresql.conf')",
  "SELECT lo_import('/etc/passwd')",
  "SELECT lo_export(lo_from_bytea(0, 'x'), '/tmp/strata-test-owned')",
  "CREATE TABLESPACE ts LOCATION '/tmp'",
  // Native code.
  "LOAD '/tmp/x.so'",
  "CREATE FUNCTION c() RETURNS int LANGUAGE c AS '/tmp/x.so', 'f'",
  "CREATE FUNCTION i() RETURNS int LANGUAGE internal AS 'now'",
  'CREATE EXTENSION plperlu',
  'CREATE EXTENSION plpython3u',
  'CREATE EXTENSION file_fdw',
  'CREATE EXTENSION dblink',
  'CREATE EXTENSION pageinspect',
  'CREATE EXTENSION pg_surgery',
  // What makes commits durable, and settings that reach further than a session.
  "ALTER SYSTEM SET synchronous_standby_names = ''",
  "SET synchronous_standby_names = ''",
  "ALTER ROLE CURRENT_USER SET synchronous_standby_names = ''",
  "ALTER DATABASE stratadb SET session_preload_libraries = 'x'",
  "ALTER ROLE CURRENT_USER SET session_preload_libraries = 'x'",
  "SET log_min_messages = 'debug5'",
  'SET zero_damaged_pages = on',
  'SET allow_system_table_mods = on',
  'SET allow_in_place_tablespaces = on',
  'SELECT pg_reload_conf()',
  "SELECT pg_drop_replication_slot('strata')",
  "SELECT pg_create_physical_replication_slot('mine')",
  'SELECT pg_terminate_backend(pid) FROM pg_stat_replication',
  'SELECT pg_switch_wal()',
  // Becoming more than an owner.
  'SET ROLE strata_admin',
  'SET SESSION AUTHORIZATION strata_admin',
  "ALTER ROLE strata_admin PASSWORD 'x'",
  'ALTER ROLE strata_admin SET search_path = evil',
  'ALTER ROLE ALL SET search_path = evil',
  'ALTER ROLE CURRENT_USER SUPERUSER',
  'ALTER ROLE CURRENT_USER REPLICATION',
  'CREATE ROLE r SUPERUSER',
  'CREATE ROLE r REPLICATION',
  'CREATE ROLE r IN ROLE pg_execute_server_program',
  'GRANT strata_admin TO CURRENT_USER',
  'GRANT pg_execute_server_program TO CURRENT_USER',
  'GRANT pg_read_server_files TO CURRENT_USER',
  'GRANT pg_write_server_files TO CURRENT_USER',
  'GRANT pg_use_reserved_connections TO CURRENT_USER',
  'DROP OWNED BY strata_admin',
  'REASSIGN OWNED BY strata_admin TO CURRENT_USER',
  'UPDATE pg_authid SET rolsuper = true',
  'DELETE FROM pg_class',
  'CREATE FUNCTION d() RETURNS text LANGUAGE sql AS $$SELECT 1$$; ALTER FUNCTION d() OWNER TO strata_admin',
  'CREATE FUNCTION e() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN END$$; CREATE EVENT TRIGGER t ON ddl_command_start EXECUTE FUNCTION e()',
  // The platform's own database, in which its superuser runs queries.
  'ALTER DATABASE postgres SET search_path = evil',
  'ALTER DATABASE postgres CONNECTION LIMIT 0',
  'ALTER DATABASE template1 CONNECTION LIMIT 0',
  'DROP DATABASE postgres',
];
const REFUSALS =
  /permission denied|must be owner|must be superuser|must be able to SET ROLE|cannot be changed|not allowed/;

describe('isolation', () => {
  let platform: TestPlatform;

  before(async () => {
    platform = await TestPlatform.start({ args: ['--suspend-timeout', '1'] });
    await platform.psql('SELECT 1');
  });
  after(async () => {
    await platform.destroy();
  });

  test('an owner cannot reach files, programs, native code, durability or the platform’s role', async () => {
    const client = await platform.connect();
    for (const statement of FORBIDDEN) await assert.rejects(client.query(statement), REFUSALS, statement);
    await client.end();
  });

  test('the platform’s database takes nothing that its superuser would stumble on', async () => {
    const url = platform.connectionString.replace(/\/stratadb\?/, '/postgres?');
    for (const statement of ['CREATE SCHEMA strata_admin', 'CREATE TABLE public.pg_roles (n int)']) {
      await assert.rejects(platform.psql(statement, url), /permission denied/, statement);
    }
  });

  test('no replication connection and no setting of a superuser comes in by the proxy', async () => {
    const url = platform.connectionString;
    await assert.rejects(platform.psql('IDENTIFY_SYSTEM', `${url}&replication=true`), /no pg_hba.conf entry/);
    await assert.rejects(platform.psql('IDENTIFY_SYSTEM', `${url}&replication=database`), /REPLICATION attribute/);
    for (const option of ['session_preload_libraries%3Dx', 'role%3Dstrata_admin']) {
      const changed = url.replace('options=', `options=-c%20${option}%20`);
      await assert.rejects(platform.psql('SELECT 1', changed), /permission denied/, option);
    }
  });

  test('an owner who locks the catalogs keeps neither the others nor the platform waiting for ever', async () => {
    await platform.cli(['projects', 'create', '--name', 'locked']);
    const { projects } = (await platform.api('GET', '/projects')).body as { projects: { id: string; name: string }[] };
    const locked = projects.find(({ name }) => name === 'locked');
    const query = 'database_name=stratadb&role_name=stratadb_owner';
    const { uri } = (await platform.api('GET', `/projects/${locked?.id}/connection_uri?${query}`)).body as {
      uri: string;
    };
    const client = await platform.connect(uri);
    await client.query('BEGIN; LOCK TABLE pg_authid, pg_database IN ACCESS EXCLUSIVE MODE');
    await platform.psql('SELECT 1');
    assert.equal(platform.postmasters().length, 2);
    // The first project is idle, and is suspended although the second one cannot be asked.
    await waitUntil(() => platform.postmasters().length === 1, 'the idle endpoint is suspended', 60_000);
    await client.query('COMMIT');
    await client.end();
  });

  test('a client whose startup message comes byte by byte is served, and others meanwhile', async () => {
    const name = platform.connectionString.replace(/^.*endpoint%3D/, '');
    const text = `user\0stratadb_owner\0database\0stratadb\0options\0endpoint=${name}\0\0`;
    const socket = connect({ port: platform.pgPort, host: '127.0.0.1', noDelay: true });
    const answered = once(socket, 'data');
    for (const byte of packet(PROTOCOL_3, Buffer.from(text))) {
      socket.write(Buffer.from([byte]));
      await new Promise((done) => setTimeout(done, 2));
    }
    assert.equal(await platform.psql('SELECT 1'), '1');
    const [bytes] = (await answered) as [Buffer];
    assert.equal(bytes.toString('latin1', 0, 1), 'R'); // asks for the password
    socket.destroy();
  });

  test('garbage, half messages and forged cancels on the proxy’s port disturb nobody', async () => {
    const parameters = Buffer.from('user\0stratadb_owner\0database\0stratadb\0\0');
    const hostile: readonly Buffer[] = [
      randomBytes(5000),
      Buffer.from('GET / HTTP/1.1\r\n\r\n'),
      packet(PROTOCOL_3, Buffer.from('\0')),
      packet(PROTOCOL_3, randomBytes(9000)),
      packet(2 << 16, parameters),
      packet(CANCEL_REQUEST, Buffer.alloc(0)),
      packet(CANCEL_REQUEST, randomBytes(8)),
      Buffer.concat([packet(SSL_REQUEST, Buffer.alloc(0)), packet(PROTOCOL_3, parameters)]),
      Buffer.concat([packet(PROTOCOL_3, parameters), randomBytes(100_000)]),
      Buffer.from([0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc]),
      Buffer.from([0, 0, 0]),
    ];
    const name = platform.connectionString.replace(/^.*endpoint%3D/, '');
    for (const bytes of hostile) {
      for (const leave of ['end', 'reset'] as const) {
        const socket = connect(platform.pgPort, '127.0.0.1');
        socket.on('error', () => {});
        await once(socket, 'connect');
        socket.write(bytes);
        await new Promise((done) => setTimeout(done, 10));
        if (leave === 'end') socket.destroy();
        else resetSocket(socket);
      }
    }
    await Promise.all(
      Array.from({ length: 500 }, async () => {
        const socket = connect(platform.pgPort, '127.0.0.1');
        socket.on('error', () => {});
        await once(socket, 'connect');
        socket.write(packet(PROTOCOL_3, Buffer.from(`user\0x\0options\0endpoint=${name}\0\0`)));
        socket.destroy();
      }),
    );
    assert.equal(await platform.psql('SELECT 1'), '1');
  });

  test('the services’ ports answer nobody without a token, and a compute’s token opens its own timeline only', async () => {
    const services = ['safekeeper 1', 'pageserver'];
    const pids = platform.descendants().filter(({ command }) => services.some((name) => command.endsWith(name)));
    const ports = services.flatMap((name) => platform.listeningPorts(name));
    assert.equal(ports.length, 3);
    for (const port of ports) {
      for (const bytes of [
        randomBytes(3000),
        Buffer.from('GET / HTTP/1.1\r\n\r\n'.repeat(1000)),
        Buffer.alloc(20_000, 1),
      ]) {
        const socket = connect(port, '127.0.0.1');
        socket.on('error', () => {});
        socket.resume();
        socket.write(bytes);
        await once(socket, 'close');
      }
    }
    const own = await signToken(platform.platformSecret, { scope: 'timeline', timelineId: '1'.repeat(32) });
    const forged = await signToken(randomBytes(32), { scope: 'platform' });
    for (const port of platform.listeningPorts('pageserver')) {
      for (const token of [own, forged, '']) {
        const options = { host: '127.0.0.1', port, timelineId: TEMPLATE, token };
        await assert.rejects(PageClient.connect(options), /not for timeline|not signed|was closed|ECONNRESET/);
        const client = new PageserverClient(options);
        await assert.rejects(client.listTimelines());
        await client.close();
      }
    }
    for (const { pid } of pids) assert(isAlive(pid), 'a service died of it');
    assert.equal(await platform.psql('SELECT 1'), '1');
  });
});

const POSTGRES_15 = '/usr/lib/postgresql/15/bin';

test(
  'before 16 too, who may create roles cannot grant himself the server’s files and programs',
  { skip: existsSync(POSTGRES_15) ? false : `there is no Postgres 15 in ${POSTGRES_15}` },
  async () => {
    const platform = await TestPlatform.start({ args: ['--pg-version', '15', '--pg-bin-dir', POSTGRES_15] });
    try {
      for (const role of ['pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program']) {
        await assert.rejects(platform.psql(`GRANT ${role} TO CURRENT_USER`), /must be superuser/);
        await assert.rejects(platform.psql(`CREATE ROLE mine IN ROLE ${role}`), /must be superuser/);
      }
      await assert.rejects(platform.psql("COPY (SELECT 1) TO PROGRAM 'id'"), /pg_execute_server_program/);
      await platform.psql('CREATE ROLE app; GRANT app TO CURRENT_USER; GRANT pg_monitor TO app');
    } finally {
      await platform.destroy();
    }
  },
);

function packet(code: number, body: Buffer): Buffer {
  const header = Buffer.alloc(8);
  header.writeUInt32BE(8 + body.length, 0);
  header.writeUInt32BE(code, 4);
  return Buffer.concat([header, body]);
}
