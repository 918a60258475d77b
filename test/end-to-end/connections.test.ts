/**
 * How clients come in: passwords, TLS, endpoints, wake and suspend, cancel; and what they are told when they are wrong.
 */
import assert from 'node:assert/strict';
import { statSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { TestPlatform, waitUntil } from './platform.ts';

interface EndpointRow {
  readonly id: string;
  readonly current_state: string;
}

describe('connections', () => {
  let platform: TestPlatform;

  before(async () => {
    platform = await TestPlatform.start();
  });
  after(async () => {
    await platform.destroy();
  });

  function changed(change: (url: URL) => void): string {
    const url = new URL(platform.connectionString);
    change(url);
    return url.toString();
  }

  async function endpoint(): Promise<EndpointRow> {
    const [first] = await platform.cliJson<EndpointRow[]>(['endpoints', 'list']);
    assert(first !== undefined);
    return first;
  }

  test('with TLS required and with TLS refused', async () => {
    const query = 'SELECT ssl FROM (SELECT 1 AS ssl) AS one';
    for (const mode of ['require', 'disable', 'prefer', 'allow']) {
      const url = changed(({ searchParams }) => searchParams.set('sslmode', mode));
      assert.equal(await platform.psql(query, url), '1', mode);
    }
  });

  test('with a single project and no option, its default branch is meant', async () => {
    const url = changed(({ searchParams }) => searchParams.delete('options'));
    assert.equal(await platform.psql('SELECT 1', url), '1');
  });

  test('a wrong password, an unknown role, database or endpoint, and the platform’s own role are refused as Postgres would', async () => {
    const wrong = (change: (url: URL) => void): Promise<string> => platform.psql('SELECT 1', changed(change));
    await assert.rejects(
      wrong((url) => (url.password = 'wrong')),
      /password authentication failed/,
    );
    await assert.rejects(
      wrong((url) => (url.username = 'nobody_here')),
      /password authentication failed/,
    );
    await assert.rejects(
      wrong((url) => (url.pathname = '/nowhere')),
      /database "nowhere" does not exist/,
    );
    await assert.rejects(
      wrong((url) => url.searchParams.set('options', 'endpoint=ep-not-there-12345678')),
      /ep-not-there-12345678/,
    );
    await assert.rejects(
      wrong((url) => (url.username = 'strata_admin')),
      /strata_admin/,
    );
  });

  test('the owner is no superuser, and may do what an owner needs', async () => {
    assert.equal(await platform.psql('SELECT usesuper FROM pg_user WHERE usename = current_user'), 'f');
    await platform.psql('CREATE ROLE app LOGIN PASSWORD $$secret$$; CREATE SCHEMA app AUTHORIZATION app');
    await platform.psql('CREATE EXTENSION pgcrypto');
    const asApp = changed((url) => {
      url.username = 'app';
      url.password = 'secret';
    });
    assert.equal(await platform.psql('SELECT current_user', asApp), 'app');
    await assert.rejects(platform.psql("COPY (SELECT 1) TO PROGRAM 'cat'"), /permission denied/);
    await assert.rejects(platform.psql("SELECT pg_read_file('/etc/passwd')"), /permission denied/);
    await assert.rejects(platform.psql('ALTER SYSTEM SET fsync = on'), /permission denied/);
  });

  test('a query is cancelled by its own key', async () => {
    const client = await platform.connect();
    const started = Date.now();
    const query = client.query('SELECT pg_sleep(30)');
    const other = await platform.connect();
    await sleep(200);
    // What libpq's PQcancel does, as psql does on Ctrl-C.
    const { processID, secretKey } = client as unknown as { processID: number; secretKey: number };
    const { Client } = await import('pg');
    const canceller = new Client({ host: '127.0.0.1', port: platform.pgPort });
    const connection = (canceller as unknown as { connection: CancelConnection }).connection;
    connection.on('connect', () => connection.cancel(processID, secretKey));
    connection.on('error', () => {});
    connection.connect(platform.pgPort, '127.0.0.1');
    await assert.rejects(query, /canceling statement due to user request/);
    assert(Date.now() - started < 10_000);
    await client.end();
    await other.end();
  });

  test('a suspended endpoint wakes for a client that just waits, also for many at once', async () => {
    await platform.psql('CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)');
    await platform.cli(['endpoints', 'suspend', (await endpoint()).id]);
    assert.equal((await endpoint()).current_state, 'idle');
    assert.equal(platform.postmasters().length, 0);
    const answers = await Promise.all(Array.from({ length: 8 }, () => platform.psql('SELECT n FROM kept')));
    assert.deepEqual(new Set(answers), new Set(['7']));
    assert.equal(platform.postmasters().length, 1);
    assert.equal((await endpoint()).current_state, 'active');
  });

  test('a proxy that is killed is there again at the same port, before a Postgres that went on', async () => {
    const [before] = platform.postmasters();
    const client = await platform.connect();
    const gone = new Promise<void>((resolve) => client.once('end', resolve));
    platform.killService('proxy');
    await gone;
    await waitUntil(
      () =>
        platform.psql('SELECT 1').then(
          (row) => row === '1',
          () => false,
        ),
      'clients connect again',
    );
    assert.deepEqual(platform.postmasters(), [before]);
  });

  test('files that hold secrets are only for their owner', () => {
    for (const name of ['api-key', 'secrets.json', 'password-key', 'state.db', 'tls/key.pem']) {
      assert.equal(statSync(join(platform.dataDir, name)).mode & 0o077, 0, name);
    }
  });

  test('no secret is in a log or in a command line', () => {
    const password = new URL(platform.connectionString).password;
    const text = platform.logs() + platform.descendants().map((process) => process.command);
    assert(!text.includes(password));
    assert(!text.includes(platform.apiKey));
  });
});

interface CancelConnection {
  on(event: string, listener: () => void): void;
  connect(port: number, host: string): void;
  cancel(processId: number, secretKey: number): void;
}

test('an idle endpoint suspends, but not with a transaction open', async () => {
  const platform = await TestPlatform.start({ args: ['--suspend-timeout', '2'] });
  try {
    const client = await platform.connect();
    await client.query('BEGIN');
    await sleep(6000);
    assert.equal(platform.postmasters().length, 1, 'suspended with a transaction open');
    await client.query('COMMIT');
    await waitUntil(() => platform.postmasters().length === 0, 'the endpoint is suspended', 20_000);
    await client.end().catch(() => {});
    assert.equal(await platform.psql('SELECT 1'), '1');
  } finally {
    await platform.destroy();
  }
});
