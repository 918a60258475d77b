/**
 * What does history take? A pgbench load's WAL in layers, bytes for each byte of WAL: all of it in the history window, and when the window has passed. Against a
 * vanilla data directory plus an archive of the WAL that a vanilla Postgres writes for the same transactions (with full page writes).
 *
 * Transactions stand for time: at 20 a second the default is an hour's.
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLog } from '../src/base/log.ts';
import { ThreadCompactor } from '../src/pageserver/compactor.ts';
import { inspectDataDirectory } from '../src/pageserver/import-check.ts';
import { importDataDirectory } from '../src/pageserver/import.ts';
import { Ingest } from '../src/pageserver/ingest/ingest.ts';
import { replayValue } from '../src/pageserver/replay.ts';
import { LEASE_MS } from '../src/pageserver/retention.ts';
import { Timelines } from '../src/pageserver/timelines.ts';
import type { Lsn } from '../src/postgres/lsn.ts';
import { Cluster } from '../test/ingest/cluster.ts';
import type { Row } from './measure.ts';

const ID = 'b'.repeat(32);
const CLIENTS = 8;

export async function space({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const transactions = quick ? 8_000 : 72_000;
  await using vanilla = new Cluster();
  const vanillaWalBytes = await run(vanilla, transactions, 'full_page_writes = on\ncheckpoint_timeout = 5min\n');
  const vanillaBytes = bytesBelow(vanilla.dataDir, (path) => !path.includes('/pg_wal'));

  await using cluster = new Cluster();
  const directory = mkdtempSync(join(tmpdir(), 'strata-bench-space-'));
  let nowMs = Date.now();
  let horizonLsn: Lsn | undefined;
  const store = await Timelines.open(directory, {
    replay: replayValue,
    log: createLog({ name: 'bench', level: 'error' }),
    compactor: new ThreadCompactor(),
    now: () => nowMs,
    lsnAt: () => horizonLsn,
  });
  try {
    cluster.initdb();
    const { lsn, recordStartLsn, pgVersion } = inspectDataDirectory(cluster.dataDir);
    const ids = { tenantId: ID, timelineId: ID, pgVersion, lsn, recordLsn: recordStartLsn };
    const timeline = await store.import(ids, (target) => importDataDirectory(cluster.dataDir, target).then(() => {}));
    const imported = bytesBelow(directory);
    await run(cluster, transactions, '');
    const ingest = new Ingest(timeline);
    let count = 0;
    for (const record of cluster.records(lsn)) {
      ingest.ingest(record);
      timeline.freezeIfFull();
      if (++count % 2000 === 0) await (timeline.writable() ?? new Promise((resolve) => setImmediate(resolve)));
    }
    await timeline.flush();
    await store.compaction.settled();
    const walBytes = timeline.lastRecordLsn - lsn;
    const historyBytes = bytesBelow(directory) - imported;
    nowMs += LEASE_MS;
    horizonLsn = timeline.lastRecordLsn;
    await store.garbage.run(store.all(), true);
    const mb = (bytes: number): string => `${(bytes / 1e6).toFixed(0)} MB`;
    const common = { isRate: false, unit: 'bytes' } as const;
    const what = `of ${transactions.toLocaleString('en')} pgbench transactions and their loading`;
    return [
      {
        ...common,
        question: `stored for each byte of WAL ${what}`,
        vanilla: 1,
        strata: historyBytes / walBytes,
        note: `${mb(historyBytes)} for ${mb(walBytes)}`,
      },
      {
        ...common,
        question: `stored in all, MB: vanilla data directory and WAL archive ${what}`,
        unit: 'MB',
        vanilla: (vanillaBytes + vanillaWalBytes) / 1e6,
        strata: (imported + historyBytes) / 1e6,
        note: `vanilla ${mb(vanillaBytes)} + ${mb(vanillaWalBytes)} of WAL with full page writes`,
      },
      {
        ...common,
        question: 'the same when the history window has passed, MB: vanilla data directory alone',
        unit: 'MB',
        vanilla: vanillaBytes / 1e6,
        strata: bytesBelow(directory) / 1e6,
      },
    ];
  } finally {
    await store.close();
    rmSync(directory, { recursive: true, force: true });
  }
}

/** The load on a cluster, which is stopped then; bytes of WAL. */
async function run(cluster: Cluster, transactions: number, settings: string): Promise<number> {
  try {
    inspectDataDirectory(cluster.dataDir);
  } catch {
    cluster.initdb();
  }
  const { lsn } = inspectDataDirectory(cluster.dataDir);
  await cluster.start(`synchronous_commit = off\nmax_wal_senders = 0\n${settings}`);
  const connection = cluster.connectionInfo.replace('user=', 'dbname=postgres user=');
  execFileSync('pgbench', ['-i', '-q', '-s', '5', connection], { stdio: 'pipe' });
  const each = String(Math.floor(transactions / CLIENTS));
  execFileSync('pgbench', ['-n', '-c', String(CLIENTS), '-t', each, connection], { stdio: 'pipe' });
  await cluster.stop();
  let endLsn = lsn;
  for (const record of cluster.records(lsn)) endLsn = record.endLsn;
  return endLsn - lsn;
}

function bytesBelow(directory: string, isCounted: (path: string) => boolean = () => true): number {
  let bytes = 0;
  for (const entry of readdirSync(directory, { recursive: true, withFileTypes: true })) {
    const path = join(entry.parentPath, entry.name);
    if (entry.isFile() && isCounted(path)) bytes += statSync(path).size;
  }
  return bytes;
}
