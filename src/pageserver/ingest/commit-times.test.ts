/**
 * Postgres is the oracle of commit times: what `pg_xact_commit_timestamp` says of every transaction of many concurrent sessions, with
 * subtransactions, aborts and two-phase commits among them, against what is found by time in the index of their WAL.
 */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Cluster } from '../../../test/ingest/cluster.ts';
import { MemoryTimeline } from '../../../test/ingest/memory-timeline.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { RM_XACT } from '../../postgres/rmgr.ts';
import { parseXactRecord } from '../../postgres/xact-record.ts';
import { inspectDataDirectory } from '../import-check.ts';
import { importDataDirectory } from '../import.ts';
import { Ingest } from './ingest.ts';
import { lsnForTimestamp, timestampOfLsn } from './wal-search.ts';

const SESSIONS = 8;
const ROUNDS = 40;
const EPOCH_US = 946_684_800_000_000;

test('times are those that Postgres gives to its commits, and those only', async (context) => {
  await using cluster = new Cluster();
  cluster.initdb();
  const { lsn: startLsn, recordStartLsn } = inspectDataDirectory(cluster.dataDir);
  const timeline = new MemoryTimeline(cluster.version, startLsn, recordStartLsn);
  await importDataDirectory(cluster.dataDir, timeline);
  await cluster.start('track_commit_timestamp = on\n');
  const client = await cluster.connect();
  await client.query('CREATE TABLE t (id int, how int)');
  const session = async (n: number): Promise<void> => {
    const own = await cluster.connect();
    for (let i = 0; i < ROUNDS; i++) {
      const id = n * ROUNDS + i;
      await own.query(`BEGIN; INSERT INTO t VALUES (${id}, ${i % 4}); SAVEPOINT s; INSERT INTO t VALUES (${id}, 9)`);
      if (i % 4 === 0) await own.query('COMMIT');
      if (i % 4 === 1) await own.query('ROLLBACK');
      if (i % 4 === 2) await own.query(`ROLLBACK TO s; PREPARE TRANSACTION 'p${id}'`);
      if (i % 4 === 2) await own.query(`COMMIT PREPARED 'p${id}'`);
      if (i % 4 === 3) await own.query(`PREPARE TRANSACTION 'p${id}'`);
      if (i % 4 === 3) await own.query(`ROLLBACK PREPARED 'p${id}'`);
    }
  };
  await Promise.all(Array.from({ length: SESSIONS }, (_, n) => session(n)));
  const { rows } = await client.query<{ xid: number; us: string }>(
    `SELECT xmin::text::int AS xid, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint AS us
       FROM t WHERE how < 9`,
  );
  assert.equal(rows.length, (SESSIONS * ROUNDS) / 2);
  await cluster.stop();

  const ingest = new Ingest(timeline);
  const commits: { xid: number; endLsn: Lsn }[] = [];
  const ends: Lsn[] = [];
  for (const record of cluster.records(startLsn)) {
    ingest.ingest(record);
    ends.push(record.endLsn);
    const parsed = record.rmid === RM_XACT ? parseXactRecord(record, cluster.version) : undefined;
    if (parsed?.kind === 'commit') commits.push({ xid: parsed.xid, endLsn: record.endLsn });
  }
  const indexed = { reader: timeline, startLsn, tail: ingest.indexTail };
  const timeOf = new Map(rows.map(({ xid, us }) => [xid, Number(us) - EPOCH_US]));
  let disorderCount = 0;
  for (const timeUs of timeOf.values()) {
    const { kind, lsn } = lsnForTimestamp(indexed, timeUs);
    assert.notEqual(kind, 'past');
    assert(ends.includes(lsn), 'a record ends there');
    let isPast = false;
    for (const { xid, endLsn } of commits) {
      const other = timeOf.get(xid);
      if (other !== undefined && other > timeUs) isPast = true;
      if (other === undefined) continue;
      assert.equal(endLsn <= lsn, !isPast, `transaction ${xid} of ${other} at ${timeUs}`);
      if (isPast && other <= timeUs) disorderCount++;
    }
  }
  let latestUs = -Infinity;
  for (const { xid, endLsn } of commits) {
    latestUs = Math.max(latestUs, timeOf.get(xid) ?? -Infinity);
    if (timeOf.has(xid)) assert.equal(timestampOfLsn(indexed, endLsn), latestUs);
  }
  context.diagnostic(`${commits.length} commits; ${disorderCount} times one that is not later follows one that is`);
});
