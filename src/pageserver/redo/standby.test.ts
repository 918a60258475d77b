/**
 * A vanilla hot standby and Strata are given the same WAL, from the same data directory on; then every page of every fork, every SLRU
 * page, filenode map and two-phase file of the two is compared.
 *
 * Both replay, so almost all pages are equal byte for byte, LSN included; masks are needed only where redo leaves bytes to chance. What
 * is not compared, and why: the free space map, of which WAL says next to nothing (a standby fills it as it sees fit), and the main forks of
 * unlogged relations, which replay does not make.
 *
 * The server from npm is always used. STRATA_TEST_PG_BIN_DIRS may name more bin folders, separated by colons.
 */

import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Client } from 'pg';

import { Cluster } from '../../../test/ingest/cluster.ts';
import { otherFiles, pageOf, relationFiles } from '../../../test/ingest/data-directory.ts';
import { runWorkload } from '../../../test/ingest/workload.ts';
import { brinWorkload } from '../../../test/redo/brin-workload.ts';
import { btreeWorkload } from '../../../test/redo/btree-workload.ts';
import { genericWorkload } from '../../../test/redo/generic-workload.ts';
import { ginWorkload } from '../../../test/redo/gin-workload.ts';
import { gistWorkload } from '../../../test/redo/gist-workload.ts';
import { hashWorkload } from '../../../test/redo/hash-workload.ts';
import { heapWorkload } from '../../../test/redo/heap-workload.ts';
import type { WorkloadSessions } from '../../../test/redo/recorded-wal.ts';
import { spgistWorkload } from '../../../test/redo/spgist-workload.ts';
import { createLog } from '../../base/log.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { pageLsn } from '../../postgres/page.ts';
import { FORK_FSM, FORK_MAIN, FORK_VM, parseRelationPath, relationPath } from '../../postgres/relation.ts';
import { RM_GIST, RM_XLOG, rmgrName } from '../../postgres/rmgr.ts';
import { twoPhaseFileName } from '../../postgres/version.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { importDataDirectory } from '../import.ts';
import { inspectDataDirectory } from '../import-check.ts';
import { Ingest } from '../ingest/ingest.ts';
import { SLRUS, slruSegmentPath } from '../ingest/slru.ts';
import { KEY_KIND, prefixRange, slruPageKey } from '../key.ts';
import type { RelationFork } from '../key.ts';
import { replayValue } from '../replay.ts';
import type { Timeline } from '../timeline.ts';
import { Timelines } from '../timelines.ts';
import { maskPageLsnAndChecksum } from './masks.ts';
import { maskPage } from './redo.ts';

const BIN_DIRS = [undefined, ...(process.env['STRATA_TEST_PG_BIN_DIRS'] ?? '').split(':').filter((dir) => dir !== '')];
const TIMELINE_ID = '1'.repeat(32);
const CATCH_UP_TIMEOUT_MS = 60_000;
/** Small enough for several layers to be written and merged. */
const FLUSH_BYTES = 16 * 1024 * 1024;
const METHODS = ['Heap', 'Btree', 'Hash', 'Gin', 'Gist', 'SPGist', 'BRIN', 'Generic', 'Sequence'];
const READ_PAGES = 128;
const F_TUPLES_DELETED = 0x04;
const SETTINGS = 'track_commit_timestamp = on\nwal_receiver_status_interval = 1';

for (const binDir of BIN_DIRS) {
  test(`pages are those of a standby given the same WAL (${binDir ?? 'npm'})`, { timeout: 180_000 }, async (t) => {
    const storeDir = mkdtempSync(join(tmpdir(), 'strata-store-'));
    await using primary = new Cluster(binDir);
    await using standby = new Cluster(binDir);
    try {
      primary.initdb();
      standby.becomeStandbyOf(primary);
      const store = await openStore(storeDir);
      const timeline = await importCluster(store, primary);
      await primary.start(SETTINGS);
      await standby.start(`${SETTINGS}\nprimary_conninfo = '${primary.connectionInfo}'`);
      await runWorkloads(primary);
      await stopCaughtUp(primary, standby);
      const managers = await ingestAll(primary, timeline);
      await store.close();

      const reopened = await openStore(storeDir);
      const comparison = new Comparison(reopened.get(TIMELINE_ID), standby, managers);
      comparison.compareRelations();
      comparison.compareOthers();
      await reopened.close();
      t.diagnostic(comparison.summary());
      assert.deepEqual(comparison.differences.slice(0, 10), []);
      const seen = new Set([...managers.values()].map(rmgrName));
      assert.deepEqual(
        METHODS.filter((name) => !seen.has(name)),
        [],
      );
      assert.ok(comparison.equalPages > 8000, comparison.summary());
    } finally {
      rmSync(storeDir, { recursive: true, force: true });
    }
  });
}

function openStore(directory: string): Promise<Timelines> {
  const log = createLog({ name: 'test', level: 'error' });
  return Timelines.open(directory, { replay: replayValue, log, limits: { flushBytes: FLUSH_BYTES } });
}

function importCluster(store: Timelines, { dataDir }: Cluster): Promise<Timeline> {
  const { lsn, recordStartLsn, pgVersion } = inspectDataDirectory(dataDir);
  const identity = { tenantId: TIMELINE_ID, timelineId: TIMELINE_ID };
  return store.import({ ...identity, pgVersion, lsn, recordLsn: recordStartLsn }, async (target) => {
    await importDataDirectory(dataDir, target);
  });
}

/** The workloads of indexes beside each other; then those that lock catalogs. */
async function runWorkloads(primary: Cluster): Promise<void> {
  const session = async (...workloads: ((sessions: WorkloadSessions) => Promise<void>)[]): Promise<void> => {
    const client = await primary.connect();
    for (const workload of workloads) {
      await workload({ sql: (text) => client.query(text), connect: () => primary.connect() });
    }
  };
  await Promise.all([
    session(btreeWorkload, hashWorkload, brinWorkload),
    session(ginWorkload, gistWorkload, spgistWorkload, genericWorkload),
  ]);
  await session(heapWorkload);
  await runWorkload(primary);
}

/**
 * Ends both when the standby has replayed all. The standby first: it then makes a restartpoint of the checkpoint, which writes all its
 * pages. Nobody connects to it, as readers set hint bits.
 */
async function stopCaughtUp(primary: Cluster, standby: Cluster): Promise<void> {
  const client = await primary.connect();
  await primary.disconnectOthers(client);
  const alone = `SELECT count(*) = 1 AS done FROM pg_stat_activity WHERE backend_type = 'client backend'`;
  await waitUntil(client, alone, 'the other sessions to end');
  await client.query('CHECKPOINT');
  const { rows } = await client.query<{ lsn: string }>('SELECT pg_current_wal_lsn()::text AS lsn');
  const replayed = `SELECT count(*) = 1 AS done FROM pg_stat_replication WHERE replay_lsn >= '${rows[0]!.lsn}'`;
  await waitUntil(client, replayed, 'the standby to catch up');
  await standby.stop();
  await primary.stop();
}

async function waitUntil(client: Client, sql: string, what: string): Promise<void> {
  for (const deadline = Date.now() + CATCH_UP_TIMEOUT_MS; ;) {
    const { rows } = await client.query<{ done: boolean }>(sql);
    if (rows[0]?.done === true) return;
    if (Date.now() > deadline) throw new Error(`waited too long for ${what}`);
    await sleep(50);
  }
}

/** Gives the resource manager of each relation whose pages were changed by more than images. */
async function ingestAll(primary: Cluster, timeline: Timeline): Promise<Map<string, number>> {
  const managers = new Map<string, number>();
  const ingest = new Ingest(timeline);
  for (const record of primary.records(timeline.lastRecordLsn)) {
    await ingest.prepare(record);
    ingest.ingest(record);
    for (const block of record.blocks) {
      if (record.rmid !== RM_XLOG && block.fork !== FORK_VM) managers.set(relationOf(block), record.rmid);
    }
    if (timeline.memoryBytes > FLUSH_BYTES / 2) await timeline.flush();
  }
  return managers;
}

function relationOf({ spc, db, rel }: Pick<RelationFork, 'spc' | 'db' | 'rel'>): string {
  return `${spc}/${db}/${rel}`;
}

/** The flag in a GiST page's last bytes that only a standby's replay sets (see gist.ts): the one thing that ours leaves out. */
function maskTuplesDeleted(page: Buffer): void {
  page[BLOCK_SIZE - 4]! &= ~F_TUPLES_DELETED;
}

class Comparison {
  readonly differences: string[] = [];
  equalPages = 0;
  /** Pages that are equal only under the mask, by resource manager. */
  readonly #maskedPages = new Map<string, number>();
  #otherFiles = 0;
  readonly #timeline: Timeline;
  readonly #dataDir: string;
  readonly #version: PgVersion;
  readonly #managers: ReadonlyMap<string, number>;

  constructor(timeline: Timeline, standby: Cluster, managers: ReadonlyMap<string, number>) {
    this.#timeline = timeline;
    this.#dataDir = standby.dataDir;
    this.#version = standby.version;
    this.#managers = managers;
  }

  summary(): string {
    const masked = [...this.#maskedPages].map(([name, count]) => `${count} of ${name}`).join(', ');
    return `${this.#version}: ${this.equalPages} pages equal, under masks ${masked || 'none'}; ${this.#otherFiles} other files`;
  }

  compareRelations(): void {
    const lsn = this.#timeline.lastRecordLsn;
    const files = relationFiles(this.#dataDir);
    const seen = new Set<string>();
    for (const [key, size] of this.#timeline.scan(prefixRange(KEY_KIND.relationSize), lsn)) {
      const path = relationPath(key, this.#version);
      seen.add(path);
      if (key.fork === FORK_FSM) continue;
      const blocks = size.readUInt32LE(0);
      const file = files.get(path);
      if (file === undefined || file.length !== blocks * BLOCK_SIZE) {
        this.differences.push(`${path} has ${blocks} blocks, the standby's ${(file?.length ?? NaN) / BLOCK_SIZE}`);
      } else this.#comparePages(key, path, file, lsn);
    }
    for (const [path, file] of files) {
      const { fork } = parseRelationPath(path)!;
      // A standby makes the map's page to clear a bit of it; ours begin when a bit is set.
      const isEmptyMap = fork === FORK_VM && file.every((byte, at) => byte === 0 || at % BLOCK_SIZE < 24);
      if (!seen.has(path) && fork !== FORK_FSM && !isEmptyMap) this.differences.push(`${path} is the standby's only`);
    }
  }

  #comparePages(fork: RelationFork, path: string, file: Buffer, lsn: number): void {
    const blocks = file.length / BLOCK_SIZE;
    for (let first = 0; first < blocks; first += READ_PAGES) {
      const count = Math.min(READ_PAGES, blocks - first);
      const pages = this.#timeline.getPages(fork, first, count, lsn);
      for (let i = 0; i < count; i++) {
        this.#comparePage(fork, `${path} block ${first + i}`, first + i, pageOf(file, first + i), pageOf(pages, i));
      }
    }
  }

  #comparePage(fork: RelationFork, name: string, blk: number, theirs: Buffer, ours: Buffer): void {
    if (theirs.equals(ours)) {
      this.equalPages++;
      return;
    }
    const isMap = fork.fork === FORK_VM;
    // Bits are cleared without an LSN, and on a page that may be as new; all else carries the LSN of its last record.
    if (!isMap && pageLsn(theirs) !== pageLsn(ours)) {
      this.differences.push(`${name} has LSN ${pageLsn(ours)}, the standby's ${pageLsn(theirs)}`);
      return;
    }
    const manager = this.#managers.get(relationOf(fork));
    for (const page of [theirs, ours]) {
      if (isMap) maskPageLsnAndChecksum(page);
      else if (manager === RM_GIST && fork.fork === FORK_MAIN) maskTuplesDeleted(page);
      else if (manager !== undefined && fork.fork === FORK_MAIN) maskPage(page, manager, blk, this.#version);
    }
    const at = theirs.findIndex((byte, i) => byte !== ours[i]);
    if (at === -1) {
      const what = isMap ? 'visibility maps' : rmgrName(manager ?? RM_XLOG);
      this.#maskedPages.set(what, (this.#maskedPages.get(what) ?? 0) + 1);
    } else this.differences.push(`${name} of ${rmgrName(manager ?? RM_XLOG)} differs at ${at}`);
  }

  /** SLRUs, filenode maps and two-phase files: all equal, and none more on either side. */
  compareOthers(): void {
    const lsn = this.#timeline.lastRecordLsn;
    const ours = new Map<string, Buffer>();
    for (const [{ db, rel }, size] of this.#timeline.scan(prefixRange(KEY_KIND.slruSize), lsn)) {
      const pages = Array.from({ length: size.readUInt32LE(0) }, (_, page) => {
        return this.#timeline.getImage(slruPageKey(db, rel, page), lsn) ?? Buffer.alloc(BLOCK_SIZE);
      });
      ours.set(slruSegmentPath(db, rel), Buffer.concat(pages));
    }
    for (const [{ db, rel }, bytes] of this.#timeline.scan(prefixRange(KEY_KIND.twoPhase), lsn)) {
      ours.set(`pg_twophase/${twoPhaseFileName(this.#version, db, rel)}`, bytes);
    }
    for (const [{ db }, bytes] of this.#timeline.scan(prefixRange(KEY_KIND.database), lsn)) {
      if (bytes.length > 0) ours.set(`${db === 0 ? 'global' : `base/${db}`}/pg_filenode.map`, bytes);
    }
    const theirs = otherFiles(this.#dataDir, [...SLRUS.map(({ directory }) => directory), 'pg_twophase']);
    for (const directory of ['global', ...readdirSync(join(this.#dataDir, 'base')).map((name) => `base/${name}`)]) {
      const path = join(this.#dataDir, directory, 'pg_filenode.map');
      if (existsSync(path)) theirs.set(`${directory}/pg_filenode.map`, readFileSync(path));
    }
    for (const path of new Set([...ours.keys(), ...theirs.keys()])) {
      const [a, b] = [ours.get(path), theirs.get(path)];
      this.#otherFiles++;
      if (a === undefined || b === undefined || !a.equals(b)) {
        this.differences.push(`${path}: ${a?.length} bytes, the standby's ${b?.length}, which differ`);
      }
    }
  }
}
