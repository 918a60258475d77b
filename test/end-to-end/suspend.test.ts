/**
 * Suspending and waking as clients see it: whoever connects waits, and what a restart of Postgres keeps is kept.
 */
import assert from 'node:assert/strict';
import { rmSync } from 'node:fs';
import { dirname } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { kill, TestPlatform, waitUntil } from './platform.ts';

interface EndpointList {
  readonly endpoints: readonly { readonly id: string; readonly project_id: string }[];
}

describe('suspend and wake', () => {
  let platform: TestPlatform;
  let endpointPath: string;

  before(async () => {
    platform = await TestPlatform.start();
    const [project] = ((await platform.api('GET', '/projects')).body as { projects: { id: string }[] }).projects;
    const { endpoints } = (await platform.api('GET', `/projects/${project?.id}/endpoints`)).body as EndpointList;
    endpointPath = `/projects/${project?.id}/endpoints/${endpoints[0]?.id}`;
  });
  after(async () => {
    await platform.destroy();
  });

  /** kill -9 of the Postgres and removal of its directory. */
  function destroyCompute(): void {
    const [postmaster] = platform.postmasters();
    assert(postmaster !== undefined, 'no Postgres is running');
    kill(postmaster.pid);
    rmSync(dirname(postmaster.dataDir), { recursive: true, force: true, maxRetries: 20 });
  }

  async function suspend(): Promise<void> {
    await platform.api('POST', `${endpointPath}/suspend`);
    await waitUntil(() => platform.postmasters().length === 0, 'the endpoint is suspended');
  }

  test('no error reaches clients that connect while the endpoint suspends, whatever the moment', async () => {
    for (let round = 0; round < 4; round++) {
      const clients = Array.from({ length: 20 }, async (_, n) => {
        await sleep(n * 20);
        const client = await platform.connect();
        await client.end().catch(() => {}); // one that was ready when the suspend began is dropped
      });
      await sleep(round * 40);
      const suspended = await platform.api('POST', `${endpointPath}/suspend`);
      assert.equal(suspended.status, 200);
      await Promise.all(clients);
    }
  });

  test('no error reaches clients that connect while their Postgres is killed and started again', async () => {
    for (let round = 0; round < 3; round++) {
      await platform.psql('SELECT 1');
      const clients = Array.from({ length: 10 }, async (_, n) => {
        await sleep(150 + n * 20);
        assert.equal(await platform.psql('SELECT 7'), '7');
      });
      destroyCompute();
      await Promise.all(clients);
    }
  });

  test('a client that never sends its password does not keep an endpoint awake', async () => {
    const { connect } = await import('node:net');
    await platform.psql('SELECT 1');
    const parameters = Buffer.from('user\0stratadb_owner\0database\0stratadb\0\0');
    const packet = Buffer.alloc(8 + parameters.length);
    packet.writeUInt32BE(packet.length, 0);
    packet.writeUInt32BE(196608, 4);
    parameters.copy(packet, 8);
    const socket = connect(platform.pgPort, '127.0.0.1');
    socket.on('error', () => {});
    await new Promise((done) => {
      socket.once('data', done); // it is asked for a password
      socket.write(packet);
    });
    await suspend();
    socket.destroy();
  });

  test('sequences go on without a repetition after suspend, crash and loss of the directory', async () => {
    await platform.psql('CREATE SEQUENCE numbers CACHE 5; CREATE SEQUENCE plain');
    const seen = new Set<string>();
    for (let round = 0; round < 6; round++) {
      const client = await platform.connect();
      for (let i = 0; i < 40; i++) {
        // A number that nothing durable was made of may come again after a crash, as in any Postgres: these are all committed.
        await client.query('BEGIN');
        await client.query('SELECT pg_current_xact_id()');
        const { rows } = await client.query<{ a: string; b: string }>(
          "SELECT 'n' || nextval('numbers') AS a, 'p' || nextval('plain') AS b",
        );
        await client.query('COMMIT');
        for (const value of Object.values(rows[0] ?? {})) {
          assert(!seen.has(value), `${value} was given twice (round ${round})`);
          seen.add(value);
        }
      }
      if (round % 2 === 0) {
        await suspend();
      } else {
        destroyCompute();
        await waitUntil(() => platform.postmasters().length === 0, 'the Postgres is gone');
      }
      await client.end().catch(() => {});
    }
  });

  test('a clean suspend keeps the exact value of a sequence when the directory is kept', async () => {
    await platform.psql("CREATE SEQUENCE exact; SELECT nextval('exact')");
    await suspend();
    assert.equal(await platform.psql("SELECT nextval('exact')"), '2');
  });

  test('a prepared transaction with its locks lives through suspend and crash', async () => {
    await platform.psql('CREATE TABLE held (n int); INSERT INTO held VALUES (1)');
    await platform.psql("BEGIN; UPDATE held SET n = 2; PREPARE TRANSACTION 'held'");
    await suspend();
    await assert.rejects(platform.psql("SET lock_timeout = '200ms'; UPDATE held SET n = 3"), /lock timeout/);
    destroyCompute();
    await waitUntil(() => platform.postmasters().length === 0, 'the Postgres is gone');
    await assert.rejects(platform.psql("SET lock_timeout = '200ms'; UPDATE held SET n = 3"), /lock timeout/);
    await platform.psql("COMMIT PREPARED 'held'");
    assert.equal(await platform.psql('SELECT n FROM held'), '2');
  });
});
