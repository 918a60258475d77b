/** A branch whose storage lags is slowed, waits at the limit, and goes on by itself; a real Postgres, and a pageserver that only says how far it is. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type PageserverFeedback, watchCommits } from '../../src/api/safekeeper.ts';
import { signToken } from '../../src/base/token.ts';
import { electProposer } from '../../src/compute/proposer.ts';
import { startWalPush } from '../../src/compute/wal-push.ts';
import { inspectDataDirectory } from '../../src/pageserver/import-check.ts';
import { Cluster } from '../ingest/cluster.ts';
import { waitUntil } from './platform.ts';
import { SafekeeperProcess } from './safekeeper-process.ts';

const SECRET = randomBytes(32);
const MB = 1024 * 1024;

test(
  'commits slow down as pages lag, wait at the limit, and go on when storage does',
  { timeout: 120_000 },
  async (context) => {
    const root = mkdtempSync(join(tmpdir(), 'strata-pressure-'));
    const safekeeper = new SafekeeperProcess({ nodeId: 1, dataDir: root, secret: SECRET });
    const watching = new AbortController();
    await using primary = new Cluster();
    context.after(async () => {
      watching.abort();
      await safekeeper.kill();
      rmSync(root, { recursive: true, force: true });
    });
    await safekeeper.start();
    primary.initdb();
    const { lsn: startLsn, pgVersion, systemId } = inspectDataDirectory(primary.dataDir);
    const [tenantId, timelineId] = [randomBytes(16).toString('hex'), randomBytes(16).toString('hex')];
    await primary.start(`synchronous_standby_names = 'strata'\n`);
    const token = await signToken(SECRET, { scope: 'platform' });
    const ingest = { softBytes: 2 * MB, hardBytes: 8 * MB };
    const proposer = await electProposer({
      safekeepers: [safekeeper.address],
      token,
      timeline: { tenantId, timelineId, startLsn, pgVersion, systemId: String(systemId) },
      mayCreate: true,
      backpressure: { ingest, keep: { softBytes: 1024 * MB, hardBytes: 2048 * MB } },
    });
    const [, socketDir, port] = /host=(\S+) port=(\d+)/.exec(primary.connectionInfo)!;
    const options = {
      socketDir: socketDir!,
      port: Number(port),
      user: 'postgres',
      password: '',
      slotName: 'strata',
      proposer,
    };
    const push = await startWalPush(options);

    const tell = await new Promise<(entry: PageserverFeedback) => void>((resolve) => {
      const endpoint = { address: safekeeper.address, token, signal: watching.signal };
      const onConnected = (all: (entries: readonly PageserverFeedback[]) => void): void =>
        resolve((entry) => all([entry]));
      void (async () => {
        for await (const batch of watchCommits({ ...endpoint, onConnected })) void batch;
      })();
    });
    const ingested = (lsn: number): void =>
      tell({ timelineId, ingestedLsn: lsn, flushedLsn: lsn, remoteLsn: lsn, oldestLsn: startLsn });

    const client = await primary.connect();
    client.on('error', () => {});
    await client.query('CREATE TABLE load (note text)');
    assert.equal(proposer.allowedRate, Infinity, 'nothing is known of storage: nothing is slowed');
    ingested(startLsn);
    await sleep(200);
    const rates: number[] = [];
    let isDone = false;
    const load = (async () => {
      for (let n = 0; n < 20; n++) {
        await client.query(`INSERT INTO load SELECT repeat('x', 1000) FROM generate_series(1, 1000)`);
        rates.push(proposer.allowedRate);
      }
      isDone = true;
    })();
    await waitUntil(() => proposer.allowedRate === 0, 'the limit is reached', 30_000);
    await sleep(500);
    const [at, count] = [proposer.endLsn, rates.length];
    await sleep(1_500);
    assert(!isDone && rates.length - count <= 1, 'commits wait');
    assert(proposer.endLsn - at < MB, 'and WAL is not taken');
    assert(proposer.endLsn - startLsn < ingest.hardBytes + 4 * MB, 'the limit is passed by what was under way only');
    const slowed = rates.filter((rate) => rate !== Infinity && rate > 0);
    assert(
      slowed.length >= 2 && slowed.every((rate, index) => index === 0 || rate < slowed[index - 1]!),
      `${slowed.join()}`,
    );

    const follow = setInterval(() => ingested(proposer.commitLsn), 50);
    await load;
    clearInterval(follow);
    await push.close();
    await proposer.close();
  },
);
