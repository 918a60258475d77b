/**
 * A page store alone, without a platform around it: a fresh cluster, the WAL of many small changes that a real server wrote from it, and
 * a store that has imported the first and may ingest the second.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLog } from '../src/base/log.ts';
import { ThreadCompactor } from '../src/pageserver/compactor.ts';
import { importDataDirectory } from '../src/pageserver/import.ts';
import { inspectDataDirectory } from '../src/pageserver/import-check.ts';
import { Ingest } from '../src/pageserver/ingest/ingest.ts';
import { replayValue } from '../src/pageserver/replay.ts';
import type { Timeline } from '../src/pageserver/timeline.ts';
import { Timelines } from '../src/pageserver/timelines.ts';
import type { StoreLimits } from '../src/pageserver/timelines.ts';
import { segmentStart, WAL_SEGMENT_SIZE, walFileName } from '../src/postgres/lsn.ts';
import type { Lsn } from '../src/postgres/lsn.ts';
import { WalReader } from '../src/postgres/wal/reader.ts';
import { Cluster } from '../test/ingest/cluster.ts';

export const TIMELINE_ID = 'b'.repeat(32);
const CHUNK_BYTES = 128 * 1024;

export interface RecordedCluster {
  readonly store: Timelines;
  readonly timeline: Timeline;
  readonly startLsn: Lsn;
  /** From startLsn on, without the zeroes of the last segment. */
  readonly wal: Buffer;
  readonly recordCount: number;
  /** The table that the workload changed. */
  readonly table: RecordedTable;
  /** A table of which each page was made by about ten records, where it was asked for. */
  readonly tenRecords: RecordedTable | undefined;
  /** Closes the store, and opens it again with these limits. */
  readonly reopen: (limits: Partial<StoreLimits>) => Promise<{ store: Timelines; timeline: Timeline }>;
}

/** A table, and its size in blocks at the end. */
export interface RecordedTable {
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
  readonly blocks: number;
}

export interface Workload {
  readonly rows: number;
  /** Pages of a table that is filled with rows of which ten fill a page. */
  readonly pagesOfTenRecords?: number;
}

/** `rows` of about 100 bytes are inserted with a primary key, half of them then updated in small transactions. */
export async function withRecordedCluster<T>(
  workload: Workload,
  use: (recorded: RecordedCluster) => Promise<T>,
): Promise<T> {
  const directory = mkdtempSync(join(tmpdir(), 'strata-bench-pages-'));
  const cluster = new Cluster();
  let store: Timelines | undefined;
  try {
    cluster.initdb();
    const { lsn: startLsn, recordStartLsn, pgVersion } = inspectDataDirectory(cluster.dataDir);
    const open = (limits: Partial<StoreLimits>): Promise<Timelines> => {
      const log = createLog({ name: 'bench', level: 'error' });
      return Timelines.open(directory, { replay: replayValue, log, compactor: new ThreadCompactor(), limits });
    };
    store = await open({});
    const ids = { tenantId: TIMELINE_ID, timelineId: TIMELINE_ID };
    const timeline = await store.import({ ...ids, pgVersion, lsn: startLsn, recordLsn: recordStartLsn }, (target) =>
      importDataDirectory(cluster.dataDir, target).then(() => {}),
    );
    await cluster.start('synchronous_commit = off\nmax_wal_senders = 0\n');
    const { table, tenRecords } = await runWorkload(cluster, workload);
    await cluster.stop();
    const { wal, recordCount } = readWal(cluster, startLsn);
    const reopen: RecordedCluster['reopen'] = async (limits) => {
      await store?.close();
      store = undefined;
      store = await open(limits);
      return { store, timeline: store.get(TIMELINE_ID) };
    };
    return await use({ store, timeline, startLsn, wal, recordCount, table, tenRecords, reopen });
  } finally {
    await store?.close();
    await cluster[Symbol.asyncDispose]();
    rmSync(directory, { recursive: true, force: true });
  }
}

/** As the WAL receiver does it, without the network. */
export async function ingestAll(recorded: RecordedCluster): Promise<void> {
  const { timeline, startLsn, wal } = recorded;
  const reader = new WalReader(startLsn, timeline.pgVersion, { prevLsn: timeline.lastRecordStartLsn });
  const ingest = new Ingest(timeline);
  for (let at = 0; at < wal.length; at += CHUNK_BYTES) {
    reader.push(startLsn + at, wal.subarray(at, at + CHUNK_BYTES));
    for (let record = reader.next(); record !== undefined; record = reader.next()) {
      ingest.ingest(record);
      timeline.freezeIfFull();
    }
    await (timeline.writable() ?? new Promise<void>((resolve) => setImmediate(resolve)));
  }
}

async function runWorkload(
  cluster: Cluster,
  { rows, pagesOfTenRecords }: Workload,
): Promise<Pick<RecordedCluster, 'table' | 'tenRecords'>> {
  const client = await cluster.connect();
  await client.query('CREATE TABLE bench (id int PRIMARY KEY, n int, pad text)');
  await client.query(
    `INSERT INTO bench SELECT i, i, 'row ' || md5(i::text) || md5((i * 7)::text) FROM generate_series(1, ${rows}) i`,
  );
  await client.query(`CREATE PROCEDURE change(count int) LANGUAGE plpgsql AS $$ BEGIN
    FOR i IN 1..count LOOP UPDATE bench SET n = n + 1 WHERE id = 1 + (i::bigint * 7919) % ${rows}; COMMIT; END LOOP; END $$`);
  await client.query(`CALL change(${Math.floor(rows / 2)})`);
  if (pagesOfTenRecords !== undefined) {
    await client.query('CREATE TABLE ten (id int, pad text)');
    await client.query(
      `INSERT INTO ten SELECT i, (SELECT string_agg(md5((i * 31 + j)::text), '') FROM generate_series(1, 24) j)
         FROM generate_series(1, ${pagesOfTenRecords * 10}) i`,
    );
  }
  await client.query('CHECKPOINT');
  const tableNamed = async (name: string): Promise<RecordedTable> => {
    const { rows: found } = await client.query<{ db: number; rel: number; blocks: number }>(
      `SELECT d.oid::int AS db, c.relfilenode::int AS rel, (pg_relation_size(c.oid) / 8192)::int AS blocks
         FROM pg_class c, pg_database d WHERE c.relname = $1 AND d.datname = current_database()`,
      [name],
    );
    return { spc: 1663, ...found[0]! };
  };
  const tenRecords = pagesOfTenRecords === undefined ? undefined : await tableNamed('ten');
  return { table: await tableNamed('bench'), tenRecords };
}

function readWal(cluster: Cluster, startLsn: Lsn): { wal: Buffer; recordCount: number } {
  let endLsn = startLsn;
  let recordCount = 0;
  for (const record of cluster.records(startLsn)) {
    endLsn = record.endLsn;
    recordCount++;
  }
  const segments: Buffer[] = [];
  for (let lsn = segmentStart(startLsn); lsn < endLsn; lsn += WAL_SEGMENT_SIZE) {
    segments.push(readFileSync(join(cluster.dataDir, 'pg_wal', walFileName(1, lsn))));
  }
  const first = segmentStart(startLsn);
  return { wal: Buffer.concat(segments).subarray(startLsn - first, endLsn - first), recordCount };
}
