/**
 * Random histories of pageservers on one object store: writes, flushes, merges, garbage collection, branches made and deleted, eviction; deaths at any step, disks
 * lost or come back old, stale pageservers that go on; a store that fails, loses replies and takes puts late; a supervisor that cannot be asked.
 *
 * The WAL of a timeline below the highest remoteConsistentLsn that any pageserver ever had is taken away at once. What must hold: a pageserver that starts
 * finds every branch that was acknowledged, at or past where its WAL begins, and every read of it is what the model says; a stale one reads right or not at all.
 *
 * STRATA_TEST_SEED and STRATA_TEST_RUNS choose.
 */

import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { encodePoke, ModelTimeline } from '../../../test/pageserver/history-model.ts';
import { farStore, NodeDeath, TestGenerations, TestNode } from '../../../test/pageserver/node.ts';
import { FaultyStore, randomFaults } from '../../object-store/faulty-store.ts';
import { FileSystemStore } from '../../object-store/file-system-store.ts';
import { isObjectError } from '../../object-store/object-store.ts';
import type { ObjectStore } from '../../object-store/object-store.ts';
import { ALL_KEYS, KEY_KIND, relationBlockKey, relationSizeKey } from '../key.ts';
import type { Key } from '../key.ts';
import type { KeyImage } from '../read.ts';
import { LEASE_MS } from '../retention.ts';
import type { Timeline } from '../timeline.ts';
import type { KeyValue } from '../timeline-access.ts';
import { encodeImage, encodeTombstone } from '../value.ts';
import { listIndexes, listTimelineObjects, newestIndex, orphansOf, readIndex } from './timeline-objects.ts';

const TENANT = 'a'.repeat(32);
const START = 0x100000;
const RECORD = 8;
const BLOCKS = 12;
/** Of one of them all blocks are now and then put in bulk; the others lie below and above it. */
const RELS = [7, 8, 9] as const;
const COPIED_REL = 8;
const HISTORY = 150 * RECORD;
const ROOT = 1;

const firstSeed = Number(process.env['STRATA_TEST_SEED'] ?? Date.now() % 1_000_000);
const runs = Number(process.env['STRATA_TEST_RUNS'] ?? 4);

function id(n: number): string {
  return n.toString(16).padStart(32, '0');
}

interface Branch {
  readonly n: number;
  readonly model: ModelTimeline;
  readonly parent: Branch | undefined;
  /** Ends of the records of which some puts are in bulk: those of COPIED_REL. */
  readonly bulkLsns: Set<number>;
  /** WAL below it is gone. */
  walStart: number;
  /** Its making was acknowledged. */
  isKnown: boolean;
  /** Somebody has asked for its deletion. */
  isDoomed: boolean;
}

interface Running {
  readonly node: TestNode;
  readonly store: FaultyStore;
  readonly directory: string;
}

class World {
  readonly root: string;
  readonly plain: FileSystemStore;
  readonly generations = new TestGenerations();
  readonly random: () => number;
  readonly branches = new Map<number, Branch>();
  readonly stale: Running[] = [];
  current: Running | undefined;
  #next = ROOT + 1;
  #directoryCount = 0;
  isFaulty = false;

  constructor(root: string, plain: FileSystemStore, seed: number) {
    this.root = root;
    this.plain = plain;
    this.random = generator(seed);
  }

  below(n: number): number {
    return Math.floor(this.random() * n);
  }

  pick<T>(from: readonly T[]): T {
    return from[this.below(from.length)]!;
  }

  // ---- pageservers

  async start(directory: string): Promise<void> {
    for (;;) {
      try {
        return await this.#start(directory);
      } catch (error) {
        if (!(error instanceof NodeDeath)) throw error; // else it died on the way
      }
    }
  }

  async #start(directory: string): Promise<void> {
    const store = new FaultyStore(farStore(this.plain) as ObjectStore);
    let now = Date.now();
    const node = await TestNode.open({
      directory,
      store,
      generations: { next: (above) => this.generations.next(above), isLatest: (g) => this.generations.isLatest(g) },
      limits: { flushBytes: 4_000, collectBytesMin: 5_000 },
      cacheBytes: 20_000,
      storedWaitMs: 30,
      piecesFromBytes: 2_000,
      now: () => now,
      lsnAt: ({ index }) => Math.max(index.startLsn, index.diskConsistentLsn - HISTORY),
      onStep: () => {
        if (this.isFaulty && this.random() < 0.004) throw new NodeDeath('on purpose');
      },
    });
    now += LEASE_MS;
    this.current = { node, store, directory };
    this.setFaults();
    for (const branch of this.branches.values()) {
      const timeline = node.timelines.find(id(branch.n));
      if (branch.isDoomed) continue;
      if (!branch.isKnown) {
        branch.isKnown = timeline !== undefined;
        if (timeline === undefined) this.forget(branch);
        continue;
      }
      assert(timeline !== undefined, `branch ${branch.n} is lost: ${node.timelines.broken.get(id(branch.n))}`);
      const { lastRecordLsn } = timeline;
      assert(
        lastRecordLsn >= branch.walStart,
        `branch ${branch.n} is at ${lastRecordLsn}, its WAL begins at ${branch.walStart}`,
      );
    }
  }

  forget(branch: Branch): void {
    this.branches.delete(branch.n);
  }

  newDirectory(): string {
    return join(this.root, `disk-${++this.#directoryCount}`);
  }

  async restart(how: 'same' | 'empty' | 'old'): Promise<void> {
    const { directory } = this.current!;
    if (how === 'same') {
      await this.current!.node.abandon();
      return this.start(directory);
    }
    const [oldest] = this.stale;
    let next = this.newDirectory();
    if (how === 'old' && oldest !== undefined) {
      this.stale.shift();
      await oldest.node.abandon();
      next = oldest.directory;
    }
    // The one before goes on for a while, as one does that is only believed to be dead.
    this.stale.push(this.current!);
    if (this.stale.length > 2) await this.stale.shift()!.node.abandon();
    await this.start(next);
  }

  setFaults(): void {
    const rates = { error: 0.08, lostReply: 0.06, late: 0.06, slow: 0.05, slowMs: 15 };
    for (const { store } of this.all()) store.plan = this.isFaulty ? randomFaults(this.random, rates) : () => undefined;
  }

  all(): Running[] {
    return this.current === undefined ? this.stale : [...this.stale, this.current];
  }

  takeWalAway(): void {
    for (const { node } of this.all()) {
      for (const branch of this.branches.values()) {
        const reached = node.timelines.find(id(branch.n))?.remoteConsistentLsn ?? 0;
        branch.walStart = Math.max(branch.walStart, reached);
      }
    }
  }

  // ---- history

  /** Gives a timeline the records that the log has after what it has. */
  async catchUp(node: TestNode, branch: Branch): Promise<void> {
    const timeline = node.timelines.find(id(branch.n));
    if (timeline === undefined || timeline.isStopped || timeline.lastRecordLsn < branch.walStart) return;
    for (let lsn = timeline.lastRecordLsn + RECORD; lsn <= branch.model.lastRecordLsn; lsn += RECORD) {
      let puts = branch.model.puts.filter((put) => put.lsn === lsn);
      if (branch.bulkLsns.has(lsn)) {
        if (!(await this.putBulk(node, timeline, puts, lsn))) return;
        puts = puts.filter(({ key }) => key.rel !== COPIED_REL);
      }
      for (const { key, value } of puts) timeline.put(key, lsn, value);
      if (this.random() < 0.02) {
        // It cannot be taken, and comes again.
        timeline.discard();
        lsn -= RECORD;
        continue;
      }
      timeline.advance(lsn, lsn - RECORD);
      timeline.freezeIfFull();
      // A dead one never has room again.
      for (let room = timeline.writable(); room !== undefined; room = timeline.writable()) {
        await Promise.race([room, sleep(10)]);
        if (node.isDead || timeline.isStopped) return;
      }
    }
  }

  /** False when the record cannot be taken now. */
  async putBulk(node: TestNode, timeline: Timeline, puts: ModelTimeline['puts'], lsn: number): Promise<boolean> {
    const bulk = puts.filter(({ key }) => key.rel === COPIED_REL).map(({ key, value }): KeyValue => [key, value]);
    const meanwhile = async (): Promise<void> => {
      const dice = this.below(5);
      if (dice === 0) await timeline.flush();
      else if (dice === 1) await node.timelines.garbage.run([timeline]);
      else if (dice === 2) await node.eviction.run();
      else if (dice === 3) await sleep(this.below(10));
    };
    async function* pieces(): AsyncGenerator<KeyValue[]> {
      for (let i = 0; i < bulk.length; i += 5) {
        await meanwhile();
        yield bulk.slice(i, i + 5);
      }
    }
    try {
      await timeline.putBulk(pieces(), lsn);
      return true;
    } catch (error) {
      if (!node.isDead) throw error;
      return false;
    }
  }

  write(branch: Branch): void {
    const { model } = branch;
    for (let count = 1 + this.below(60); count > 0; count--) {
      const lsn = (model.lastRecordLsn += RECORD);
      const isBulk = this.random() < 0.02;
      if (isBulk) this.writeBulk(branch, lsn);
      const rel = this.pick(isBulk ? RELS.filter((each) => each !== COPIED_REL) : RELS);
      const key = relationBlockKey(1663, 5, rel, 0, this.below(BLOCKS));
      const dice = this.random();
      const value =
        dice < 0.06
          ? encodeImage(Buffer.alloc(8192, lsn))
          : encodePoke(dice < 0.1 ? 'init' : 'record', this.below(8000), this.below(250));
      model.puts.push({ key, lsn, value });
    }
  }

  writeBulk({ model, bulkLsns }: Branch, lsn: number): void {
    bulkLsns.add(lsn);
    for (let blk = 0; blk < BLOCKS; blk++) {
      const value = this.below(8) === 0 ? encodeTombstone() : encodeImage(Buffer.alloc(8192, this.below(256)));
      model.puts.push({ key: relationBlockKey(1663, 5, COPIED_REL, 0, blk), lsn, value });
    }
  }

  async makeBranch(): Promise<void> {
    const { node } = this.current!;
    const parents = [...this.branches.values()].filter((branch) => branch.isKnown && !branch.isDoomed);
    const parent = this.pick(parents);
    await this.catchUp(node, parent);
    const of = node.timelines.find(id(parent.n));
    if (of === undefined || of.lastRecordLsn < parent.model.ancestorLsn) return;
    const floor = Math.max(of.horizon?.lsn ?? 0, parent.model.ancestorLsn);
    const lsn = of.lastRecordLsn - RECORD * this.below(Math.max(1, (of.lastRecordLsn - floor) / RECORD));
    const n = this.#next++;
    const model = new ModelTimeline(lsn, parent.model);
    const branch: Branch = { n, model, parent, bulkLsns: new Set(), walStart: lsn, isKnown: false, isDoomed: false };
    this.branches.set(n, branch);
    const at = { ancestorTimelineId: id(parent.n), ancestorLsn: lsn, ancestorRecordLsn: lsn - RECORD };
    try {
      await node.timelines.create({ tenantId: TENANT, timelineId: id(n), ...at });
      branch.isKnown = true;
    } catch {
      // Perhaps it was made. Whoever asked asks again, or never mentions it again.
      if (node.timelines.find(id(n)) === undefined && !node.isDead) this.forget(branch);
    }
  }

  async deleteBranch(): Promise<void> {
    const { node } = this.current!;
    const leaves = [...this.branches.values()].filter(
      (branch) => branch.n !== ROOT && ![...this.branches.values()].some((other) => other.parent === branch),
    );
    if (leaves.length === 0) return;
    const branch = this.pick(leaves);
    branch.isDoomed = true;
    try {
      await node.timelines.delete(id(branch.n));
      this.forget(branch);
    } catch {
      // It is asked for again.
    }
  }

  /** As scrub does, beside all of them. */
  async deleteOrphans(): Promise<void> {
    const { generation, since } = this.current!.node.remote.status;
    for (const timelineId of (await listIndexes(this.plain)).keys()) {
      const objects = await listTimelineObjects(this.plain, TENANT, timelineId);
      const name = newestIndex((await listIndexes(this.plain)).get(timelineId) ?? []);
      if (name === undefined) continue;
      const newest = await readIndex(this.plain, name).catch(() => undefined);
      if (newest === undefined) continue; // It was replaced meanwhile.
      const orphans = orphansOf(objects, newest, { generation, since }, Date.now());
      await this.plain.deleteMany(orphans.map((orphan) => orphan.name));
    }
  }

  // ---- what must hold

  async check(node: TestNode, isStale: boolean): Promise<void> {
    const branches = [...this.branches.values()].filter(({ isKnown, isDoomed }) => isKnown && !isDoomed);
    const branch = this.pick(branches);
    const timeline = node.timelines.find(id(branch.n));
    if (timeline === undefined || timeline.isStopped) return assert(isStale);
    for (const lsn of this.sampled(branch, timeline)) {
      const found = await this.scan(node, branch, lsn, isStale);
      if (found === undefined) return;
      assert.deepEqual(
        withoutSizes(found),
        withoutSizes(branch.model.scan(ALL_KEYS, lsn)),
        `branch ${branch.n} at ${lsn}`,
      );
    }
  }

  /** Undefined when it may fail, and did. */
  async scan(node: TestNode, branch: Branch, lsn: number, isStale: boolean): Promise<KeyImage[] | undefined> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await node.scan(id(branch.n), ALL_KEYS, lsn);
      } catch (error) {
        if (isStale || this.isFaulty) return undefined;
        // A fetch that failed while the store did is not tried again at once (repair.ts).
        if (!isObjectError(error, 'transient') || attempt === 5) throw error;
        await sleep(500);
      }
    }
  }

  /** LSNs that can be read. */
  sampled(branch: Branch, timeline: Timeline): number[] {
    const from = Math.max(branch.model.ancestorLsn, timeline.horizon?.lsn ?? 0);
    const to = timeline.lastRecordLsn;
    if (to < from || !timeline.isVisible(to)) return [];
    return [from, from + RECORD * this.below(1 + (to - from) / RECORD), to];
  }

  async act(): Promise<void> {
    const { node } = this.current!;
    if (node.isDead) return this.restart(this.pick(['same', 'same', 'empty', 'old'] as const));
    const known = [...this.branches.values()].filter(({ isKnown, isDoomed }) => isKnown && !isDoomed);
    const dice = this.below(100);
    if (dice < 30) {
      const branch = this.pick(known);
      this.write(branch);
      await this.catchUp(node, branch);
    } else if (dice < 45)
      await node.timelines
        .find(id(this.pick(known).n))
        ?.flush()
        .catch(() => {});
    else if (dice < 50) await node.timelines.compaction.settled();
    else if (dice < 56) await node.timelines.garbage.run(node.timelines.all());
    else if (dice < 62) await this.makeBranch();
    else if (dice < 66) await this.deleteBranch();
    else if (dice < 70) await node.eviction.run();
    else if (dice < 78) await this.check(node, false);
    else if (dice < 82) await node.remote.settled(30);
    else if (dice < 90 && this.stale.length > 0) {
      const { node: stale } = this.pick(this.stale);
      const branch = this.pick(known);
      await this.catchUp(stale, branch);
      await stale.timelines
        .find(id(branch.n))
        ?.flush()
        .catch(() => {});
      await stale.timelines.compaction.settled();
      if (this.below(2) === 0) await stale.timelines.garbage.run(stale.timelines.all());
      await this.check(stale, true);
    } else if (dice < 92) {
      this.isFaulty = !this.isFaulty;
      this.setFaults();
    } else if (dice < 94) this.generations.isReachable = !this.generations.isReachable;
    else if (dice < 97) await this.restart(this.pick(['same', 'empty', 'old'] as const));
    else await this.deleteOrphans();
    this.takeWalAway();
  }

  async end(): Promise<void> {
    this.isFaulty = false;
    this.generations.isReachable = true;
    for (const { store } of this.all()) await store.settleLate();
    this.setFaults();
    await this.restart('empty');
    for (const branch of this.branches.values()) {
      if (branch.isDoomed) continue;
      await this.catchUp(this.current!.node, branch);
      for (let i = 0; i < 2; i++) await this.check(this.current!.node, false);
    }
    for (const doomed of [...this.branches.values()].reverse()) {
      if (doomed.isDoomed) await this.current!.node.timelines.delete(id(doomed.n));
      if (doomed.isDoomed) this.forget(doomed);
    }
    for (const timeline of this.current!.node.timelines.all()) await timeline.flush();
    await this.current!.node.timelines.compaction.settled();
    assert(await this.current!.node.remote.settled());
    this.takeWalAway();
    // Without what is nobody's, another that begins with nothing reads the same.
    await this.deleteOrphans();
    await this.restart('empty');
    for (const branch of this.branches.values()) {
      const timeline = this.current!.node.timelines.get(id(branch.n));
      assert.equal(timeline.lastRecordLsn, branch.model.lastRecordLsn);
      for (const lsn of this.sampled(branch, timeline)) {
        const found = await this.current!.node.scan(id(branch.n), ALL_KEYS, lsn);
        assert.deepEqual(
          withoutSizes(found),
          withoutSizes(branch.model.scan(ALL_KEYS, lsn)),
          `branch ${branch.n} at ${lsn}`,
        );
      }
    }
  }
}

/** Collections leave out what nobody can see; the fork's size stays the same here. */
function withoutSizes(entries: readonly (readonly [Key, Buffer])[]): (readonly [Key, Buffer])[] {
  return entries.filter(([{ kind }]) => kind !== KEY_KIND.relationSize);
}

function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

test(
  `pageservers come, go and are wrong about it, and no page is (seeds from ${firstSeed})`,
  { timeout: 60_000 + 60_000 * runs },
  async () => {
    for (let seed = firstSeed; seed < firstSeed + runs; seed++) {
      const root = mkdtempSync(join(tmpdir(), 'strata-random-'));
      const plain = await FileSystemStore.open(join(root, 'store'));
      const world = new World(root, plain, seed);
      try {
        await world.start(world.newDirectory());
        const request = {
          tenantId: TENANT,
          timelineId: id(ROOT),
          pgVersion: 17,
          lsn: START,
          recordLsn: START - RECORD,
        } as const;
        const size = Buffer.from([BLOCKS, 0, 0, 0]);
        const sizeKeys = RELS.map((rel) => relationSizeKey(1663, 5, rel, 0));
        await world.current!.node.timelines.import(request, async (target) => {
          for (const key of sizeKeys) target.put(key, size);
          await target.drain();
        });
        const model = new ModelTimeline(START);
        for (const key of sizeKeys) model.puts.push({ key, lsn: START, value: encodeImage(size) });
        world.branches.set(ROOT, {
          n: ROOT,
          model,
          parent: undefined,
          bulkLsns: new Set(),
          walStart: START,
          isKnown: true,
          isDoomed: false,
        });
        for (let step = 0; step < 120; step++) await world.act();
        await world.end();
      } catch (error) {
        throw new Error(`seed ${seed}: ${error instanceof Error ? error.message : String(error)}`, { cause: error });
      } finally {
        for (const { node } of world.all()) await node.abandon().catch(() => {});
        rmSync(root, { recursive: true, force: true, maxRetries: 5 });
      }
    }
  },
);
