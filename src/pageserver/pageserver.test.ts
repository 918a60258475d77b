/**
 * The pageserver between its real neighbours: WAL that a vanilla Postgres wrote, on real safekeepers, and clients of its two ports.
 * (That the pages are right is ingest/workload.test.ts's to show; here they are compared with a store in memory.)
 */

import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Cluster } from '../../test/ingest/cluster.ts';
import { MemoryTimeline } from '../../test/ingest/memory-timeline.ts';
import { PageClient } from '../api/pages.ts';
import { PageserverClient } from '../api/pageserver.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { electProposer } from '../compute/proposer.ts';
import { segmentOffset, segmentStart, WAL_SEGMENT_SIZE, walFileName } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { runSafekeeper } from '../safekeeper/main.ts';
import type { Safekeeper } from '../safekeeper/main.ts';
import { takeBasebackup } from './basebackup.ts';
import { importDataDirectory } from './import.ts';
import { inspectDataDirectory } from './import-check.ts';
import { Ingest } from './ingest/ingest.ts';
import { runPageserver } from './main.ts';
import type { Pageserver } from './main.ts';

const secret = Buffer.alloc(32, 7);
const log = createLog({ name: 'test', level: process.env['STRATA_TEST_LOG'] ?? 'silent' });
const host = '127.0.0.1';
const TENANT = 'a'.repeat(32);
const ROOT = '17'.padStart(32, '0');
const BRANCH = 'b'.repeat(32);

describe('a pageserver', () => {
  const cluster = new Cluster();
  const directory = mkdtempSync(join(tmpdir(), 'strata-pageserver-'));
  const safekeepers: Safekeeper[] = [];
  let pageserver: Pageserver;
  let client: PageserverClient;
  let token: string;
  let startLsn: Lsn;
  /** What the same WAL makes in memory. */
  let reference: MemoryTimeline;
  let ingest: Ingest;
  let times: number[];

  async function startPageserver(): Promise<void> {
    pageserver = await runPageserver({
      dataDir: join(directory, 'pageserver'),
      host,
      rpcPort: 0,
      pagePort: 0,
      safekeepers: safekeepers.map(({ port }) => ({ host, port })),
      secret,
      limits: { flushBytes: 3_000_000 },
      log,
    });
    client = new PageserverClient({ host, port: pageserver.rpcPort, token });
  }

  async function stopPageserver(): Promise<void> {
    await client.close();
    await pageserver.close();
  }

  function connectPages(timelineId: string): Promise<PageClient> {
    return PageClient.connect({ host, port: pageserver.pagePort, token, timelineId });
  }

  before(async () => {
    token = await signToken(secret, { scope: 'platform' });
    for (const nodeId of [1, 2, 3]) {
      const dataDir = join(directory, `safekeeper-${nodeId}`);
      safekeepers.push(await runSafekeeper({ nodeId, dataDir, host, port: 0, secret, log }));
    }
    await startPageserver();
    cluster.initdb();
    const { lsn, recordStartLsn } = inspectDataDirectory(cluster.dataDir);
    startLsn = lsn;
    reference = new MemoryTimeline(cluster.version, lsn, recordStartLsn);
    await importDataDirectory(cluster.dataDir, reference);
    const request = { tenantId: TENANT, timelineId: ROOT, pgVersion: cluster.version, dataDirectory: cluster.dataDir };
    await client.importTimeline(request);
    await client.importTimeline(request);
    await client.createTimeline({
      tenantId: TENANT,
      timelineId: BRANCH,
      pgVersion: cluster.version,
      ancestorTimelineId: ROOT,
      ancestorLsn: lsn,
    });
    times = await runWorkload();
    ingest = new Ingest(reference);
    for (const record of cluster.records(startLsn)) {
      await ingest.prepare(record);
      ingest.ingest(record);
    }
  });

  after(async () => {
    await stopPageserver();
    for (const safekeeper of safekeepers) await safekeeper.close();
    await cluster[Symbol.asyncDispose]();
    rmSync(directory, { recursive: true });
  });

  /** Gives the times between its three steps, in microseconds. */
  async function runWorkload(): Promise<number[]> {
    await cluster.start();
    const session = await cluster.connect();
    const found: number[] = [];
    for (const step of [
      `CREATE TABLE orders (id int PRIMARY KEY, n int, payload text);
       INSERT INTO orders SELECT i, 0, repeat('x', 100) FROM generate_series(1, 20000) i`,
      'UPDATE orders SET n = n + 1 WHERE id % 3 = 0; VACUUM orders',
      'DELETE FROM orders WHERE id < 10000; CREATE INDEX ON orders (n); TRUNCATE orders',
    ]) {
      for (const sql of step.split(';')) await session.query(sql);
      await sleep(5);
      const { rows } = await session.query<{ us: string }>(
        'SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS us',
      );
      found.push(Number(rows[0]!.us));
      await sleep(5);
    }
    await session.query('CREATE TABLE hot (id int PRIMARY KEY, n int); INSERT INTO hot VALUES (1, 0)');
    for (let i = 0; i < 250; i++) await session.query('UPDATE hot SET n = n + 1');
    await session.query('CREATE DATABASE copied STRATEGY FILE_COPY');
    for (let i = 0; i < 250; i++) await session.query('UPDATE hot SET n = n + 1');
    await cluster.stop();
    return found;
  }

  /** The WAL that the cluster has written, from its files. */
  function readWal(from: Lsn, to: Lsn): Buffer {
    const parts: Buffer[] = [];
    for (let lsn = from; lsn < to; lsn = segmentStart(lsn) + WAL_SEGMENT_SIZE) {
      const bytes = readFileSync(join(cluster.dataDir, 'pg_wal', walFileName(1, lsn)));
      parts.push(bytes.subarray(segmentOffset(lsn), Math.min(WAL_SEGMENT_SIZE, to - segmentStart(lsn))));
    }
    return Buffer.concat(parts);
  }

  /** Appends the branch's WAL up to `endLsn`, as its compute would have. */
  async function propose(endLsn: Lsn, whenHalf: (half: Lsn) => Promise<void>): Promise<void> {
    const addresses = safekeepers.map(({ port }) => ({ host, port }));
    const timeline = await client.timelineIdentity(BRANCH);
    const proposer = await electProposer({ safekeepers: addresses, token, timeline, mayCreate: !timeline.hasWal });
    assert.equal(proposer.startLsn, startLsn);
    const ends = [...cluster.records(startLsn)].map((record) => record.endLsn);
    const half = ends[Math.floor(ends.length / 2)]!;
    for (const [from, to] of [
      [startLsn, half],
      [half, endLsn],
    ] as const) {
      const wal = readWal(from, to);
      for (let at = 0; at < wal.length; at += 100_001) proposer.append(from + at, wal.subarray(at, at + 100_001));
      await proposer.waitCommitted(to);
      if (to === half) await whenHalf(to);
    }
    await proposer.waitCommitted(endLsn);
    await proposer.close();
  }

  test('takes the WAL of a branch, over a restart and the loss of a safekeeper', async () => {
    await propose(reference.lastRecordLsn, async (half) => {
      await client.waitLsn(BRANCH, half, 20_000);
      await stopPageserver();
      await startPageserver();
      const status = await client.timelineStatus(BRANCH);
      assert(status.layerCount > 0 && status.diskConsistentLsn === half, 'the first half was flushed');
      await safekeepers.pop()!.close();
    });
    await client.waitLsn(BRANCH, reference.lastRecordLsn, 20_000);
    const status = await client.timelineStatus(BRANCH);
    assert.equal(status.ingestError, undefined);
    assert.equal(status.lastRecordLsn, reference.lastRecordLsn);
    assert.equal(status.lastRecordStartLsn, reference.lastRecordStartLsn);
    assert.equal(status.ancestorLsn, startLsn);
    assert.equal(status.commitLsn, reference.lastRecordLsn);
    assert((await client.timelineStatus(ROOT)).lastRecordLsn === startLsn, 'the ancestor is as it was');
  });

  test('gives the same basebackups and pages as the reference, at any LSN, before and after a flush', async () => {
    const indexed = { reader: reference, startLsn, tail: ingest.indexTail };
    const pages = await connectPages(BRANCH);
    const ends = [...cluster.records(startLsn)].map((record) => record.endLsn);
    const picks = [0.2, 0.5, 0.9].map((share) => ends[Math.floor(ends.length * share)]!);
    for (let round = 0; round < 2; round++) {
      for (const lsn of [startLsn, ...picks, reference.lastRecordLsn]) {
        const backup = await client.basebackup(BRANCH, lsn);
        const expected = takeBasebackup(indexed, lsn);
        assert.deepEqual(backup, { ...expected, files: expected.files });
        for (const relation of backup.relations) {
          for (let blk = 0; blk < relation.blocks; blk += 200) {
            const count = Math.min(200, relation.blocks - blk);
            const ours = await pages.getPages({ ...relation, blk, count, lsn });
            assert(ours.equals(reference.getPages(relation, blk, count, lsn)), `${relation.rel} ${blk} ${lsn}`);
          }
        }
      }
      await client.flush(BRANCH);
    }
    pages.close();
  });

  test('finds records by LSN and by time', async () => {
    const ends = [...cluster.records(startLsn)].map(({ startLsn: from, endLsn }) => ({ from, endLsn }));
    for (let i = 1; i < ends.length; i += 97) {
      const { from, endLsn } = ends[i]!;
      assert.deepEqual(await client.resolveLsn(BRANCH, endLsn), { lsn: endLsn, prevRecordLsn: from });
      assert.equal((await client.resolveLsn(BRANCH, endLsn - 1)).lsn, ends[i - 1]!.endLsn);
    }
    await assert.rejects(client.resolveLsn(BRANCH, startLsn - 100_000), { code: 'history-gone' });
    const found = [];
    for (const time of times) found.push(await client.lsnForTimestamp(BRANCH, time));
    assert.deepEqual(
      found.map(({ kind }) => kind),
      ['present', 'present', 'present'],
    );
    assert(found[0]!.lsn < found[1]!.lsn && found[1]!.lsn < found[2]!.lsn);
  });

  test('creates branches that read as their ancestor did, and refuses LSNs where no record ends', async () => {
    const lsn = reference.lastRecordLsn;
    const child = 'c'.repeat(32);
    const request = { tenantId: TENANT, timelineId: child, pgVersion: cluster.version, ancestorTimelineId: BRANCH };
    await assert.rejects(client.createTimeline({ ...request, ancestorLsn: lsn - 3 }), { code: 'bad-request' });
    await client.createTimeline({ ...request, ancestorLsn: lsn });
    assert.deepEqual(await client.basebackup(child, lsn), await client.basebackup(BRANCH, lsn));
    await assert.rejects(client.deleteTimeline(TENANT, BRANCH), { code: 'conflict' });
    await client.deleteTimeline(TENANT, child);
    await assert.rejects(client.timelineStatus(child), { code: 'not-found' });
  });

  test('answers page requests in order, many at once, and errors one by one', async () => {
    const pages = await connectPages(BRANCH);
    const lsn = reference.lastRecordLsn;
    const fork = { spc: 1663, db: 5, rel: 1259, fork: 0 };
    const expected = reference.getPages(fork, 0, 10, lsn);
    const before = pages.getPages({ ...fork, blk: 0, count: 1, lsn: startLsn - 8 });
    const many = Array.from({ length: 1000 }, (_, i) => pages.getPages({ ...fork, blk: i % 10, count: 1, lsn }));
    await assert.rejects(before, /no longer kept; the oldest LSN is/);
    for (const [i, page] of (await Promise.all(many)).entries()) {
      assert(page.equals(expected.subarray((i % 10) * BLOCK_SIZE, ((i % 10) + 1) * BLOCK_SIZE)));
    }
    const pastTheEnd = await pages.getPages({ ...fork, blk: 100_000, count: 256, lsn });
    assert(pastTheEnd.length === 256 * BLOCK_SIZE && pastTheEnd.every((byte) => byte === 0));
    pages.close();
  });

  test('lets a token read its own timeline only', async () => {
    const { pagePort: port } = pageserver;
    const own = await signToken(secret, { scope: 'timeline', timelineId: BRANCH });
    (await PageClient.connect({ host, port, token: own, timelineId: BRANCH })).close();
    const foreign = PageClient.connect({ host, port, token: own, timelineId: ROOT });
    await assert.rejects(foreign, /this token is not for timeline/);
    const forged = await signToken(Buffer.alloc(32, 8), { scope: 'platform' });
    await assert.rejects(PageClient.connect({ host, port, token: forged, timelineId: ROOT }), /not signed/);
    const unknown = PageClient.connect({ host, port, token, timelineId: 'd'.repeat(32) });
    await assert.rejects(unknown, /does not exist/);
  });

  test('damaged and missing layers are made anew from WAL while they are read, and what is read is right', async () => {
    await client.flush(BRANCH);
    await stopPageserver();
    const folder = join(directory, 'pageserver', 'timelines', BRANCH);
    const layers = readdirSync(folder).filter((name) => name !== 'index');
    assert(layers.length > 0);
    for (const [i, name] of layers.entries()) {
      const path = join(folder, name);
      const bytes = readFileSync(path);
      for (let at = 100; at < bytes.length; at += 5000) bytes[at]! ^= 1;
      if (i % 2 === 0) writeFileSync(path, bytes);
      else rmSync(path);
    }
    await startPageserver();
    const lsn = reference.lastRecordLsn;
    const pages = await connectPages(BRANCH);
    const { relations } = takeBasebackup({ reader: reference, startLsn, tail: ingest.indexTail }, lsn);
    for (const relation of relations) {
      for (let blk = 0; blk < relation.blocks; blk += 200) {
        const count = Math.min(200, relation.blocks - blk);
        const ours = await pages.getPages({ ...relation, blk, count, lsn });
        assert(ours.equals(reference.getPages(relation, blk, count, lsn)), `${relation.rel} ${blk}`);
      }
    }
    pages.close();
    assert.equal((await client.basebackup(BRANCH, lsn)).lsn, lsn);
    assert.deepEqual(
      readdirSync(join(directory, 'pageserver', 'timelines')).filter((name) => name.endsWith('.repair')),
      [],
    );
    const left = readdirSync(folder).filter((name) => layers.includes(name));
    assert.deepEqual(left, [], 'every damaged layer was replaced');
  });

  test('a damaged layer that no WAL can replace is an error that names file and offset, for that page only', async () => {
    await stopPageserver();
    const folder = join(directory, 'pageserver', 'timelines', ROOT);
    const name = readdirSync(folder).find((each) => each !== 'index')!;
    const bytes = readFileSync(join(folder, name));
    const before = Buffer.from(bytes);
    for (let at = 2000; at < bytes.length / 2; at += 1000) bytes[at]! ^= 1;
    writeFileSync(join(folder, name), bytes);
    await startPageserver();
    const pages = await connectPages(ROOT);
    const fork = { spc: 1663, db: 5, rel: 1259, fork: 0, blk: 0, count: 1, lsn: startLsn };
    await assert.rejects(pages.getPages(fork), /layer file .* is damaged at offset \d+/);
    pages.close();
    await stopPageserver();
    writeFileSync(join(folder, name), before);
    await startPageserver();
  });
});
