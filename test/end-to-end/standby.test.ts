/**
 * A stock Postgres as hot standby of a branch, fed by safekeepers alone: it replays what is committed, goes to another safekeeper when its own dies, and is
 * equal to the primary.
 *
 * Runs on the Postgres from npm, and on those in STRATA_TEST_PG_BIN_DIRS (bin folders, separated by colons).
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { promisify } from 'node:util';
import type { Client } from 'pg';
import type { TimelineIdentity } from '../../src/api/safekeeper.ts';
import { signToken } from '../../src/base/token.ts';
import { electProposer } from '../../src/compute/proposer.ts';
import { startWalPush } from '../../src/compute/wal-push.ts';
import { inspectDataDirectory } from '../../src/pageserver/import-check.ts';
import { formatLsn, parseLsn } from '../../src/postgres/lsn.ts';
import { Cluster } from '../ingest/cluster.ts';
import { waitUntil } from './platform.ts';
import { SafekeeperProcess } from './safekeeper-process.ts';

const BIN_DIRS = [undefined, ...(process.env['STRATA_TEST_PG_BIN_DIRS'] ?? '').split(':').filter((dir) => dir !== '')];
const SECRET = randomBytes(32);
const LOAD_SECONDS = Number(process.env['STRATA_TEST_PGBENCH_SECONDS'] ?? 10) / 2;
const TABLES = ['pgbench_accounts', 'pgbench_branches', 'pgbench_tellers', 'pgbench_history'];
const STANDBY_SETTINGS = 'hot_standby = on\nwal_receiver_status_interval = 1\nwal_retrieve_retry_interval = 200\n';

for (const binDir of BIN_DIRS) {
  test(
    `a hot standby follows safekeepers and is equal under load (${binDir ?? 'npm'})`,
    { timeout: 180_000 },
    async (context) => {
      const root = mkdtempSync(join(tmpdir(), 'strata-standby-'));
      const safekeepers = [1, 2, 3].map(
        (nodeId) => new SafekeeperProcess({ nodeId, dataDir: join(root, String(nodeId)), secret: SECRET }),
      );
      context.after(async () => {
        await Promise.all(safekeepers.map((safekeeper) => safekeeper.kill()));
        rmSync(root, { recursive: true, force: true });
      });
      await Promise.all(safekeepers.map((safekeeper) => safekeeper.start()));
      await using primary = new Cluster(binDir);
      await using standby = new Cluster(binDir);
      primary.initdb();
      standby.becomeStandbyOf(primary);
      const timeline = identityOf(primary);
      await primary.start();

      const proposer = await electProposer({
        safekeepers: safekeepers.map(({ address }) => address),
        token: await signToken(SECRET, { scope: 'platform' }),
        timeline,
        mayCreate: true,
      });
      const [socketDir, port] = socketOf(primary);
      const push = await startWalPush({
        socketDir,
        port,
        user: 'postgres',
        password: '',
        slotName: 'strata',
        proposer,
      });
      context.after(async () => {
        await push.close();
        await proposer.close();
      });
      const onPrimary = await primary.connect();
      await onPrimary.query(`ALTER SYSTEM SET synchronous_standby_names = 'strata'`);
      await onPrimary.query('SELECT pg_reload_conf()');

      const { timelineId } = timeline;
      const hosts = safekeepers.map(({ address }) => address.host).join(',');
      const ports = safekeepers.map(({ address }) => address.port).join(',');
      const password = await signToken(SECRET, { scope: 'timeline', timelineId });
      const conninfo = `host=${hosts} port=${ports} user=${timelineId} password=${password} sslmode=disable`;
      await standby.start(`${STANDBY_SETTINGS}primary_conninfo = '${conninfo}'`);
      const onStandby = await standby.connect();

      await pgbench(primary, ['-i', '-q', '-s', '2']);
      const load = pgbench(primary, ['-n', '-c', '4', '-T', String(LOAD_SECONDS)]);
      // The one that it reads from, then another: it goes on with those that are left.
      for (const [index, safekeeper] of safekeepers.slice(0, 2).entries()) {
        await followed(onStandby, (await flushLsn(onPrimary)) + 1);
        const sender = await onStandby.query<{ sender_port: number }>('SELECT sender_port FROM pg_stat_wal_receiver');
        context.diagnostic(`reads from ${sender.rows[0]?.sender_port}, ${index + 1} is killed`);
        await safekeeper.kill();
        await followed(onStandby, (await flushLsn(onPrimary)) + 1);
        await safekeeper.start();
      }
      await load;

      await onPrimary.query('CHECKPOINT');
      const endLsn = await flushLsn(onPrimary);
      await proposer.waitCommitted(endLsn, AbortSignal.timeout(10_000));
      await followed(onStandby, endLsn);
      for (const table of TABLES) {
        assert.deepEqual(await digest(onStandby, table), await digest(onPrimary, table), table);
      }

      // What no quorum has is not sent, even to who asks those that have it.
      await onPrimary.query('SET synchronous_commit = local');
      await Promise.all([safekeepers[1]!.kill(), safekeepers[2]!.kill()]);
      await onPrimary.query('CREATE TABLE not_durable (n int)');
      const beyondLsn = await flushLsn(onPrimary);
      await new Promise((resolve) => setTimeout(resolve, 1_000));
      const received = await position(onStandby, 'pg_last_wal_receive_lsn()');
      assert(received <= proposer.commitLsn && received < beyondLsn, `received to ${formatLsn(received)}`);
      await Promise.all([safekeepers[1]!.start(), safekeepers[2]!.start()]);
      await followed(onStandby, beyondLsn);
      assert.equal((await onStandby.query('SELECT * FROM not_durable')).rows.length, 0);
      await standby.stop();
      await primary.stop();
      // Broken connections are expected; anything else that replay complains of is not.
      assert.deepEqual(
        standby.complaints().filter((line) => !/stream|connect|terminat|walreceiver/.test(line)),
        [],
      );
    },
  );
}

function identityOf(cluster: Cluster): TimelineIdentity {
  const { lsn, pgVersion, systemId } = inspectDataDirectory(cluster.dataDir);
  const [tenantId, timelineId] = [randomBytes(16).toString('hex'), randomBytes(16).toString('hex')];
  return { tenantId, timelineId, startLsn: lsn, pgVersion, systemId: String(systemId) };
}

function socketOf(cluster: Cluster): [string, number] {
  const [, host, port] = /host=(\S+) port=(\d+)/.exec(cluster.connectionInfo)!;
  return [host!, Number(port)];
}

async function pgbench(cluster: Cluster, args: readonly string[]): Promise<void> {
  const [host, port] = socketOf(cluster);
  await promisify(execFile)('pgbench', ['-h', host, '-p', String(port), '-U', 'postgres', ...args, 'postgres']);
}

async function position(client: Client, expression: string): Promise<number> {
  const { rows } = await client.query<{ lsn: string | null }>(`SELECT ${expression}::text AS lsn`);
  return parseLsn(rows[0]!.lsn ?? '0/0');
}

function flushLsn(primary: Client): Promise<number> {
  return position(primary, 'pg_current_wal_flush_lsn()');
}

function followed(standby: Client, lsn: number): Promise<void> {
  const replayed = async (): Promise<boolean> => (await position(standby, 'pg_last_wal_replay_lsn()')) >= lsn;
  return waitUntil(replayed, `the standby has replayed ${formatLsn(lsn)}`);
}

async function digest(client: Client, table: string): Promise<unknown> {
  const { rows } = await client.query(
    `SELECT count(*), md5(string_agg(t::text, ' ' ORDER BY t::text)) AS digest FROM ${table} AS t`,
  );
  return rows[0];
}
