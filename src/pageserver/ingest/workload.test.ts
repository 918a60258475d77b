/**
 * The oracle of ingest is Postgres: a real cluster runs a workload and stops; what ingest has made of its WAL must be what is on its disk.
 * Then a vanilla Postgres is started on nothing but that.
 */

import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { Cluster } from '../../../test/ingest/cluster.ts';
import { materialize, otherFiles, pageOf, relationFiles } from '../../../test/ingest/data-directory.ts';
import { MemoryTimeline } from '../../../test/ingest/memory-timeline.ts';
import { runSecondWorkload, runWorkload } from '../../../test/ingest/workload.ts';
import type { Mark } from '../../../test/ingest/workload.ts';
import type { Basebackup } from '../../api/basebackup.ts';
import { decodeControlFile } from '../../postgres/control-file.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { FORK_FSM, FORK_INIT, FORK_MAIN, FORK_VM, parseRelationPath, relationPath } from '../../postgres/relation.ts';
import { RM_BRIN, RM_BTREE, RM_GIN, RM_GIST, RM_HASH, RM_HEAP, RM_SEQ, RM_SPGIST } from '../../postgres/rmgr.ts';
import { takeBasebackup } from '../basebackup.ts';
import { importDataDirectory } from '../import.ts';
import { inspectDataDirectory } from '../import-check.ts';
import { maskPageLsnAndChecksum } from '../redo/masks.ts';
import { maskPage } from '../redo/redo.ts';
import { FilesReplay } from '../scrub-files.ts';
import { Ingest } from './ingest.ts';
import { lsnForTimestamp, resolveLsn } from './wal-search.ts';
import type { IndexedTimeline } from './wal-search.ts';

const cluster = new Cluster();
let timeline: MemoryTimeline;
let ingest: Ingest;
let startLsn: Lsn;
let backup: Basebackup;
/** Resource managers by relation path. */
const managers = new Map<string, number>();
let realFiles: Map<string, Buffer>;
let walBytes = 0;
let mark: Mark;
/** Oid of the database made by STRATEGY WAL_LOG. */
let copiedByWal = 0;

function indexed(): IndexedTimeline {
  return { reader: timeline, startLsn, tail: ingest.indexTail };
}

before(async () => {
  cluster.initdb();
  const { lsn, recordStartLsn } = inspectDataDirectory(cluster.dataDir);
  startLsn = lsn;
  timeline = new MemoryTimeline(cluster.version, lsn, recordStartLsn);
  await importDataDirectory(cluster.dataDir, timeline);
  await cluster.start();
  mark = await runWorkload(cluster);
  await cluster.stop();
  await cluster.start('track_commit_timestamp = on\nmax_connections = 77');
  await runSecondWorkload(cluster);
  await noteResourceManagers();
  await cluster.stop();
  realFiles = relationFiles(cluster.dataDir);
  ingest = new Ingest(timeline);
  for (const record of cluster.records(lsn)) {
    await ingest.prepare(record);
    ingest.ingest(record);
    walBytes += record.totalLength;
  }
  backup = takeBasebackup(indexed(), timeline.lastRecordLsn);
});

after(() => cluster[Symbol.asyncDispose]());

const ACCESS_METHODS: Record<string, number> = {
  heap: RM_HEAP,
  btree: RM_BTREE,
  hash: RM_HASH,
  gin: RM_GIN,
  gist: RM_GIST,
  spgist: RM_SPGIST,
  brin: RM_BRIN,
};

async function noteResourceManagers(): Promise<void> {
  const first = await cluster.connect();
  const names = await first.query<{ datname: string; oid: number }>(
    'SELECT datname, oid FROM pg_database WHERE datallowconn',
  );
  copiedByWal = names.rows.find(({ datname }) => datname === 'by_wal')?.oid ?? 0;
  for (const { datname } of names.rows) {
    const client = await cluster.connect(datname);
    const { rows } = await client.query<{ path: string; kind: string; method: string | null }>(
      `SELECT pg_relation_filepath(c.oid) AS path, relkind AS kind, amname AS method
         FROM pg_class c LEFT JOIN pg_am a ON a.oid = relam WHERE pg_relation_filepath(c.oid) IS NOT NULL`,
    );
    for (const { path, kind, method } of rows) {
      managers.set(path, kind === 'S' ? RM_SEQ : (ACCESS_METHODS[method ?? ''] ?? -1));
    }
    await client.end();
  }
}

test('the WAL is taken to its end', () => {
  const control = decodeControlFile(otherFiles(cluster.dataDir, ['global']).get('global/pg_control')!);
  assert.equal(timeline.lastRecordStartLsn, control.checkPoint);
  assert.ok(walBytes > 10_000_000);
});

test('relations are those on disk, with their sizes', () => {
  const expected = new Map([...realFiles].map(([path, bytes]) => [path, bytes.length / BLOCK_SIZE] as const));
  const actual = new Map(backup.relations.map((r) => [relationPath(r, cluster.version), r]));
  const initForks = new Set([...realFiles.keys()].filter((path) => path.endsWith('_init')));
  for (const [path, relation] of actual) {
    const blocks = expected.get(path);
    assert.ok(blocks !== undefined, `${path} is not on disk`);
    if (initForks.has(`${path}_init`)) {
      assert.equal(relation.sourceFork, FORK_INIT);
      assert.equal(relation.blocks, expected.get(`${path}_init`));
    } else if (relation.fork === FORK_FSM) {
      assert.ok(relation.blocks <= blocks, `${path} has ${relation.blocks} blocks, on disk ${blocks}`);
    } else {
      // Postgres adds pages without logging it; they are zeroes until their first record.
      const rest = realFiles.get(path)!.subarray(relation.blocks * BLOCK_SIZE);
      assert.ok(relation.blocks <= blocks && isEmpty(rest), `${path}: ${relation.blocks} and ${blocks} blocks`);
    }
  }
  for (const path of expected.keys()) {
    const fork = parseRelationPath(path)!.fork;
    if (fork === FORK_FSM || initForks.has(`${path.replace(/_(vm|fsm)$/, '')}_init`)) continue;
    if (fork === FORK_VM && isEmpty(realFiles.get(path)!)) continue;
    assert.ok(actual.has(path), `${path} is on disk only`);
  }
});

/** Whether pages are zeroes, but for headers: until 15, Postgres initialises the pages of a visibility map that it adds. */
function isEmpty(pages: Buffer): boolean {
  return pages.every((byte, i) => byte === 0 || i % BLOCK_SIZE < 24);
}

test('pages are those on disk, under the masks of Postgres', () => {
  let compared = 0;
  const wrong: string[] = [];
  for (const relation of backup.relations) {
    const path = relationPath(relation, cluster.version);
    if (relation.fork === FORK_FSM || relation.sourceFork !== relation.fork) continue;
    // What a prepared transaction made is in no catalog yet.
    const manager = managers.get(relationPath({ ...relation, fork: FORK_MAIN }, cluster.version)) ?? RM_HEAP;
    const pages = timeline.getPages(relation, 0, relation.blocks, backup.lsn);
    for (let blk = 0; blk < relation.blocks; blk++) {
      const real = pageOf(realFiles.get(path)!, blk);
      const ours = pageOf(pages, blk);
      compared++;
      if (real.equals(ours)) continue;
      for (const page of [real, ours]) {
        if (relation.fork === FORK_MAIN) maskPage(page, manager, blk, cluster.version);
        else maskPageLsnAndChecksum(page);
      }
      if (manager === RM_SEQ) for (const page of [real, ours]) maskLastValue(page);
      if (relation.fork === FORK_VM && relation.db === copiedByWal) clearLostBits(real, ours);
      if (!real.equals(ours)) wrong.push(`${path} block ${blk}`);
    }
  }
  assert.deepEqual(wrong, []);
  assert.ok(compared > 3000, `${compared} pages`);
});

/** WAL runs ahead of a sequence, by up to 32 values: last_value and log_cnt, in the only tuple of its only page. */
function maskLastValue(page: Buffer): void {
  page.fill(0, BLOCK_SIZE - 32, BLOCK_SIZE - 16);
}

/**
 * CREATE DATABASE by WAL logs map pages as if they had a hole, which is where their bits are: a standby of Postgres loses them too. What
 * is set must be set on the primary all the same.
 */
function clearLostBits(real: Buffer, ours: Buffer): void {
  for (let i = 24; i < BLOCK_SIZE; i++) real[i]! &= ours[i]!;
}

test('filenode maps, version files and SLRUs are those on disk', () => {
  const files = new Map(backup.files.map(({ path, bytes }) => [path, bytes]));
  const slrus = ['pg_xact', 'pg_multixact/offsets', 'pg_multixact/members', 'pg_commit_ts', 'pg_twophase'];
  const databases = backup.databases.filter(({ db }) => db !== 0).map(({ db }) => `base/${db}`);
  const expected = otherFiles(cluster.dataDir, ['global', ...databases, ...slrus]);
  const kept = /^(global|base\/\d+)\/(PG_VERSION|pg_filenode\.map)$|^pg_(xact|multixact|commit_ts|twophase)\//;
  const paths = [...expected.keys()].filter((path) => kept.test(path));
  assert.deepEqual([...files.keys()].filter((path) => path !== 'PG_VERSION').sort(), paths.sort());
  for (const path of paths) {
    const ours = files.get(path)!;
    const real = expected.get(path)!;
    const at = ours.findIndex((byte, i) => byte !== real[i]);
    assert.equal(ours.length, real.length, path);
    assert.equal(at, -1, `${path} differs at ${at}`);
  }
  assert.ok(paths.includes('pg_multixact/offsets/0000') && paths.some((path) => path.startsWith('pg_twophase/')));
});

test('the independent replay of scrub comes to the same files and sizes from the same WAL, from any LSN on, and sees what differs', () => {
  const bases = [startLsn, resolveLsn(indexed(), mark.lsn).endLsn].map((lsn) => takeBasebackup(indexed(), lsn));
  for (const base of bases) {
    const replay = new FilesReplay(base, cluster.version);
    for (const record of cluster.records(startLsn)) if (record.startLsn >= base.lsn) replay.take(record);
    assert.equal(replay.lsn, backup.lsn);
    assert(replay.count > 300, `${replay.count} files and forks`);
    assert.deepEqual(replay.compare(backup), []);
    const files = backup.files.map((file) => {
      if (file.path !== 'pg_xact/0000') return file;
      const bytes = Buffer.from(file.bytes);
      bytes[200]! ^= 3;
      return { ...file, bytes };
    });
    const [first, ...others] = backup.relations.filter(({ fork }) => fork === FORK_MAIN);
    const relations = [{ ...first!, blocks: first!.blocks + 1 }, ...others];
    const found = replay.compare({ ...backup, files: files.filter(({ path }) => !path.startsWith('pg_twophase/')) });
    assert(found.some(({ file, offset }) => file === 'pg_xact/0000' && offset === 200));
    assert(found.some(({ file, reason }) => file.startsWith('pg_twophase/') && /not there, by WAL it is/.test(reason)));
    assert(
      replay.compare({ ...backup, relations }).some(({ reason }) => /the fork is \d+ blocks long, by WAL/.test(reason)),
    );
  }
});

test('the checkpoint state is what the last checkpoint says, and the settings are those of pg_control', () => {
  const control = decodeControlFile(otherFiles(cluster.dataDir, ['global']).get('global/pg_control')!);
  assert.deepEqual(backup.checkPoint, control.checkPointCopy);
  assert.equal(backup.checkpointLsn, control.checkPoint);
  assert.equal(backup.shutdownLsn, backup.lsn);
  for (const [name, value] of Object.entries(backup.parameters)) {
    assert.equal(value, control[name as keyof typeof control], name);
  }
});

test('a vanilla Postgres runs on what was ingested', async () => {
  await using copy = new Cluster();
  copy.writeDataDirectory(materialize(backup, timeline, Math.floor(Date.now() / 1000)));
  await copy.start('track_commit_timestamp = on');
  const client = await copy.connect();
  const count = async (sql: string): Promise<number> =>
    Number((await client.query<{ n: string }>(`SELECT count(*) AS n FROM ${sql}`)).rows[0]!.n);
  await client.query(`COMMIT PREPARED 'left'`);
  assert.equal(await count('kept'), 3);
  assert.equal(await count('made_later'), 0);
  assert.equal(await count('orders'), 20000 - 20);
  assert.equal(await count('shrinking'), 1);
  assert.equal(await count('fleeting'), 0);
  assert.equal(await count('nested'), 200);
  assert.equal(await count('many'), 33000 + 1800);
  assert.equal(await count('locked'), 2600);
  assert.equal(await count('emptied'), 1);
  assert.equal(await count('in_one'), 10);
  assert.equal(
    await count(`pg_class WHERE relname IN ('gone', 'never', 'never_made', 'dropped_later', 'temporary')`),
    0,
  );
  assert.equal(await count('timed'), 1000);
  assert.equal(await count('timed WHERE pg_xact_commit_timestamp(xmin) IS NOT NULL'), 1000);
  await client.query('SET enable_seqscan = off');
  assert.equal(await count('rewritten WHERE v BETWEEN 1 AND 3000'), 3000);
  await client.query('INSERT INTO fleeting VALUES (1)');
  for (const sql of ['VACUUM', 'UPDATE locked SET i = i + 1', 'CREATE DATABASE after', 'DROP DATABASE by_wal']) {
    await client.query(sql);
  }
  await copy.stop();
  assert.deepEqual(copy.complaints(), []);
});

test('a vanilla Postgres runs on what was ingested up to a moment in the middle, by LSN and by time', async () => {
  const { endLsn } = resolveLsn(indexed(), mark.lsn);
  const byTime = lsnForTimestamp(indexed(), mark.timeUs);
  assert.equal(byTime.kind, 'present');
  assert.ok(endLsn <= mark.lsn && mark.lsn - endLsn <= 40);
  assert.ok(byTime.lsn >= endLsn);
  await using copy = new Cluster();
  const then = takeBasebackup(indexed(), byTime.lsn);
  assert.throws(() => takeBasebackup(indexed(), byTime.lsn - 1), /no record ends at/);
  copy.writeDataDirectory(materialize(then, timeline, Math.floor(Date.now() / 1000)));
  await copy.start();
  const client = await copy.connect();
  const { rows } = await client.query<{ orders: string; tables: string }>(
    `SELECT (SELECT count(*) FROM orders) AS orders, (SELECT count(*) FROM pg_tables WHERE schemaname = 'public') AS tables`,
  );
  assert.deepEqual(rows, [{ orders: String(20000 - 20 + 15000), tables: '1' }]);
  await client.query(`INSERT INTO orders VALUES (-1, 'new'); CREATE TABLE another AS SELECT * FROM orders`);
  await copy.stop();
  assert.deepEqual(copy.complaints(), []);
});
