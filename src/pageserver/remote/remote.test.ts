import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { encodePoke, ModelTimeline } from '../../../test/pageserver/history-model.ts';
import { farStore, TestGenerations, TestNode } from '../../../test/pageserver/node.ts';
import type { NodeOptions } from '../../../test/pageserver/node.ts';
import { FaultyStore } from '../../object-store/faulty-store.ts';
import { FileSystemStore } from '../../object-store/file-system-store.ts';
import { listAll } from '../../object-store/object-store.ts';
import type { ObjectStore, PutOptions } from '../../object-store/object-store.ts';
import { ALL_KEYS, relationBlockKey, relationSizeKey } from '../key.ts';
import { layerFileName, layerPath } from '../layers/layer-format.ts';
import { LEASE_MS } from '../retention.ts';
import { encodeCountImage, encodeImage } from '../value.ts';
import { readWhole } from '../whole-reads.ts';
import { listIndexes, listTimelineObjects, newestIndex, orphansOf, readIndex } from './timeline-objects.ts';

const TENANT = 'a'.repeat(32);
const LSN = 0x1000000;
const RECORD = 8;

function id(n: number): string {
  return n.toString(16).padStart(32, '0');
}

describe('a pageserver and the object store', () => {
  let root: string;
  let plain: FileSystemStore;
  let store: FaultyStore;
  let generations: TestGenerations;
  let node: TestNode;
  let model: ModelTimeline;
  const nodes: TestNode[] = [];

  async function start(name: string, options: Partial<NodeOptions> = {}): Promise<TestNode> {
    node = await TestNode.open({ directory: join(root, name), store, generations, storedWaitMs: 200, ...options });
    nodes.push(node);
    return node;
  }

  beforeEach(async () => {
    root = mkdtempSync(join(tmpdir(), 'strata-remote-'));
    plain = await FileSystemStore.open(join(root, 'store'));
    store = new FaultyStore(farStore(plain));
    generations = new TestGenerations();
    model = new ModelTimeline(LSN);
    await start('a');
    const request = { tenantId: TENANT, timelineId: id(1), pgVersion: 17, lsn: LSN, recordLsn: LSN - RECORD } as const;
    const size = Buffer.from([40, 0, 0, 0]);
    await node.timelines.import(request, async (target) => {
      target.put(relationSizeKey(1663, 5, 1, 0), size);
      await target.drain();
    });
    model.puts.push({ key: relationSizeKey(1663, 5, 1, 0), lsn: LSN, value: encodeImage(size) });
  });

  afterEach(async () => {
    store.plan = () => undefined;
    generations.isReachable = true;
    for (const each of nodes.splice(0)) await each.abandon();
    rmSync(root, { recursive: true, force: true, maxRetries: 5 });
  });

  /** Records up to `lsn` go to the node; what is new of them, to the model too. */
  function write(to: TestNode, count: number, timelineId = id(1)): void {
    const timeline = to.timelines.get(timelineId);
    for (let i = 0; i < count; i++) {
      const lsn = timeline.lastRecordLsn + RECORD;
      const n = (lsn / RECORD) * 7919;
      const key = relationBlockKey(1663, 5, 1, 0, n % 40);
      const value = n % 11 === 0 ? encodeImage(Buffer.alloc(8192, n)) : encodePoke('record', n % 8000, n % 250);
      timeline.put(key, lsn, value);
      timeline.advance(lsn, lsn - RECORD);
      if (timelineId !== id(1) || lsn <= model.lastRecordLsn) continue;
      model.puts.push({ key, lsn, value });
      model.lastRecordLsn = lsn;
    }
  }

  /** The node's log is brought to where the model's ends, as WAL does. */
  function catchUp(to: TestNode): void {
    write(to, (model.lastRecordLsn - to.timelines.get(id(1)).lastRecordLsn) / RECORD);
  }

  async function assertRight(of: TestNode): Promise<void> {
    const end = of.timelines.get(id(1)).lastRecordLsn;
    for (const lsn of [LSN, LSN + RECORD * 10, LSN + Math.floor((end - LSN) / RECORD / 2) * RECORD, end]) {
      if (lsn <= end) assert.deepEqual(await of.scan(id(1), ALL_KEYS, lsn), model.scan(ALL_KEYS, lsn), `at ${lsn}`);
    }
  }

  async function names(prefix: string, of: ObjectStore = plain): Promise<string[]> {
    const found: string[] = [];
    for await (const { name } of listAll(of, prefix)) found.push(name);
    return found;
  }

  function branch(of: TestNode, n: number, lsn: number): Promise<unknown> {
    const at = { ancestorTimelineId: id(1), ancestorLsn: lsn, ancestorRecordLsn: lsn - RECORD };
    return of.timelines.create({ tenantId: TENANT, timelineId: id(n), ...at });
  }

  /** Every object is named by its timeline's newest index, or is that. */
  async function assertNoOrphans(): Promise<void> {
    for (const [timelineId, indexes] of await listIndexes(plain)) {
      const objects = await listTimelineObjects(plain, TENANT, timelineId);
      const newest = await readIndex(plain, newestIndex(indexes)!);
      assert.deepEqual(orphansOf(objects, newest, { generation: Infinity, since: 0 }, Date.now()), []);
      for (const layer of newest.layers) {
        const found = objects.layers.find(({ fileName }) => fileName === layerFileName(layer.description));
        assert.equal(found?.sizeBytes, layer.description.sizeBytes);
      }
    }
  }

  test('what was flushed is read from the store alone, at any LSN, and its WAL goes on', async () => {
    write(node, 300);
    await node.timelines.get(id(1)).flush();
    await branch(node, 2, LSN + 800);
    write(node, 200);
    await node.timelines.get(id(1)).flush();
    assert(await node.remote.settled());
    assert.equal(node.timelines.get(id(1)).remoteConsistentLsn, model.lastRecordLsn);
    write(node, 50); // not flushed: comes again as WAL
    await node.abandon();
    const empty = await start('b');
    assert.equal(empty.timelines.get(id(1)).lastRecordLsn, LSN + 500 * RECORD);
    assert.equal(empty.timelines.get(id(2)).ancestor, empty.timelines.get(id(1)));
    assert.deepEqual(readdirSync(join(root, 'b/timelines', id(1))).sort(), ['index', 'remote']);
    catchUp(empty);
    await assertRight(empty);
    assert.deepEqual(await empty.scan(id(2), ALL_KEYS, LSN + 800), model.scan(ALL_KEYS, LSN + 800));
    await empty.timelines.get(id(1)).flush();
    assert(await empty.remote.settled());
    await assertNoOrphans();
    assert.equal(empty.timelines.get(id(1)).remoteConsistentLsn, model.lastRecordLsn);
  });

  test('a start with the same disk asks nothing of the store, and moves remoteConsistentLsn to where it was', async () => {
    write(node, 300);
    await node.timelines.get(id(1)).flush();
    await node.close();
    const before = store.calls.length;
    await start('a');
    assert(await node.remote.settled());
    assert.equal(store.calls.length, before);
    assert.equal(node.timelines.get(id(1)).remoteConsistentLsn, model.lastRecordLsn);
    await assertRight(node);
  });

  test('who cannot ask for the generation uploads, but neither deletes nor moves remoteConsistentLsn', async () => {
    await node.remote.settled();
    generations.isReachable = false;
    for (let i = 0; i < 12; i++) {
      write(node, 100);
      await node.timelines.get(id(1)).flush();
      await node.timelines.compaction.settled();
      await node.timelines.stored(node.timelines.get(id(1)));
    }
    assert(node.timelines.get(id(1)).index.layers.length < 8, 'it was compacted');
    assert.equal(node.timelines.get(id(1)).remoteConsistentLsn, LSN);
    assert((await names('layers/')).length > 12, 'nothing was deleted');
    assert((await names('indexes/')).length > 12);
    const other = await start('b');
    assert.equal(other.timelines.get(id(1)).lastRecordLsn, model.lastRecordLsn);
    await assertRight(other);
    await other.abandon();
    for (const name of await names('indexes/')) if (/-00000002-/.test(name)) await plain.delete(name);
    generations.isReachable = true;
    generations.latest = 1; // as if the other had never been: the first is asked again and told yes
    assert(await nodes[0]!.remote.settled());
    assert.equal(nodes[0]!.timelines.get(id(1)).remoteConsistentLsn, model.lastRecordLsn);
    await assertNoOrphans();
  });

  test('a branch is made when its index is in the store, and not before', async () => {
    write(node, 10);
    await branch(node, 2, LSN + 16);
    assert.equal((await names(`indexes/${TENANT}/${id(2)}`)).length, 1);
    store.plan = () => ({ kind: 'error', errorKind: 'transient' });
    await assert.rejects(branch(node, 3, LSN + 16), {
      code: 'unavailable',
      message: /the object store .* does not take it/,
    });
    await assert.rejects(branch(node, 3, LSN + 16), { code: 'unavailable' });
    assert.equal((await names(`indexes/${TENANT}/${id(3)}`)).length, 0);
    assert(node.remote.status.failure !== undefined);
    store.plan = () => undefined;
    await branch(node, 3, LSN + 16);
    assert.equal((await names(`indexes/${TENANT}/${id(3)}`)).length, 1);
    assert.equal(node.remote.status.failure, undefined);
  });

  test('a layer that was slow to be uploaded when another one failed is not taken for one that nobody names', async () => {
    store.plan = ({ operation }) => (operation === 'putFile' ? { kind: 'error', errorKind: 'transient' } : undefined);
    for (let i = 0; i < 2; i++) {
      write(node, 20);
      await node.timelines.get(id(1)).flush();
    }
    const layers = node.timelines.get(id(1)).index.layers.filter(({ kind }) => kind === 'delta');
    const [failing, slow] = layers.map((layer) => layerFileName(layer));
    assert(failing !== undefined && slow !== undefined && layers.length === 2);
    const attempts = new Map<string, number>();
    let indexCount = 0;
    store.plan = ({ operation, name }) => {
      // Deletions come when all else is done.
      if (operation === 'deleteMany' && indexCount < 2) return { kind: 'error', errorKind: 'transient' };
      if (operation === 'put') {
        indexCount++;
        return { kind: 'slow', delayMs: 300 };
      }
      const which = [failing, slow].find((fileName) => operation === 'putFile' && name.includes(fileName));
      if (which === undefined) return undefined;
      const attempt = attempts.get(which) ?? 0;
      attempts.set(which, attempt + 1);
      if (attempt > 0) return undefined;
      return which === slow ? { kind: 'slow', delayMs: 200 } : { kind: 'error', errorKind: 'transient' };
    };
    while (attempts.get(slow) !== undefined && indexCount === 0) await sleep(5);
    await sleep(700);
    write(node, 20);
    await node.timelines.get(id(1)).flush();
    assert(await node.remote.settled());
    await assertNoOrphans();
    await assertRight(await start('b'));
  });

  test('a deleted timeline leaves a tombstone, and does not come back', async () => {
    write(node, 100);
    await branch(node, 2, LSN + 80);
    write(node, 100, id(2));
    await node.timelines.get(id(2)).flush();
    assert(await node.remote.settled());
    assert.equal((await names(`layers/${TENANT}/${id(2)}`)).length, 1);
    store.plan = ({ operation }) => (operation === 'put' ? { kind: 'error', errorKind: 'transient' } : undefined);
    await assert.rejects(node.timelines.delete(id(2)), { code: 'unavailable' });
    assert(node.timelines.find(id(2)) !== undefined);
    store.plan = () => undefined;
    await node.timelines.delete(id(2));
    assert.match((await names(`indexes/${TENANT}/${id(2)}`)).at(-1)!, /-deleted$/);
    assert(await node.remote.settled());
    assert.equal((await names(`layers/${TENANT}/${id(2)}`)).length, 0);
    assert.equal((await names(`indexes/${TENANT}/${id(2)}`)).length, 1);
    const empty = await start('b');
    assert.equal(empty.timelines.find(id(2)), undefined);
    await assertRight(empty);
  });

  test('a timeline that could not be made here is not left in the store, and its id is not used again', async () => {
    writeFileSync(join(root, 'a/timelines', id(2)), 'a file where its folder should be');
    await assert.rejects(branch(node, 2, LSN), { code: 'EEXIST' });
    assert.match((await names(`indexes/${TENANT}/${id(2)}`)).at(-1)!, /-deleted$/);
    await assert.rejects(branch(node, 2, LSN), { code: 'conflict' });
    await node.timelines.delete(id(1)); // nothing holds its branch point
  });

  test('a timeline that a crash has left in the store alone can be made again, and deleted', async () => {
    await branch(node, 2, LSN);
    await branch(node, 3, LSN);
    await node.close();
    for (const n of [2, 3]) rmSync(join(root, 'a/timelines', id(n)), { recursive: true });
    const again = await start('a');
    assert.equal(again.timelines.find(id(2)), undefined);
    await branch(again, 2, LSN);
    await again.timelines.delete(id(3), TENANT);
    await again.timelines.delete(id(3), TENANT);
    assert(await again.remote.settled());
    await again.close();
    const empty = await start('b');
    assert(empty.timelines.find(id(2)) !== undefined);
    assert.equal(empty.timelines.find(id(3)), undefined);
  });

  test('an older disk takes the store’s state, keeps what is the same, and loses what was deleted meanwhile', async () => {
    write(node, 300);
    await node.timelines.get(id(1)).flush();
    await branch(node, 2, LSN + 80);
    await node.close();
    const other = await start('b');
    catchUp(other);
    write(other, 300);
    await other.timelines.get(id(1)).flush();
    await other.timelines.delete(id(2));
    await branch(other, 3, LSN + 80);
    await other.close();
    const kept = node.timelines
      .get(id(1))
      .index.layers.filter((layer) => existsSync(layerPath(join(root, 'a/timelines', id(1)), layer)));
    assert.equal(kept.length, 2, 'the import and the first flush');
    // Damage of the same length is no layer of the store's.
    const path = layerPath(join(root, 'a/timelines', id(1)), kept.at(-1)!);
    const bytes = readFileSync(path);
    bytes[100]! ^= 1;
    writeFileSync(path, bytes);
    const again = await start('a');
    assert.equal(existsSync(path), false);
    assert.equal(again.remote.generation, 3);
    assert.equal(again.timelines.get(id(1)).lastRecordLsn, model.lastRecordLsn);
    assert.equal(again.timelines.find(id(2)), undefined);
    assert(again.timelines.find(id(3)) !== undefined);
    await assertRight(again);
  });

  test('a stale pageserver writes beside the newer one and harms nothing', async () => {
    write(node, 300);
    await node.timelines.get(id(1)).flush();
    assert(await node.remote.settled());
    const stale = node;
    const newer = await start('b');
    for (let i = 0; i < 6; i++) {
      write(stale, 100);
      await stale.timelines.get(id(1)).flush();
      await stale.timelines.compaction.settled();
    }
    await stale.remote.settled();
    assert(stale.remote.status.isStale);
    assert.equal(stale.timelines.get(id(1)).remoteConsistentLsn, LSN + 300 * RECORD);
    await assert.rejects(stale.timelines.delete(id(1)), { code: 'unavailable' });
    await assert.rejects(branch(stale, 7, LSN + 80), { code: 'unavailable', message: /later pageserver/ });
    catchUp(newer);
    for (let i = 0; i < 6; i++) {
      write(newer, 100);
      await newer.timelines.get(id(1)).flush();
      await newer.timelines.compaction.settled();
    }
    assert(await newer.remote.settled());
    await assertRight(newer);
    await assertRight(stale);
    const third = await start('c');
    assert.equal(third.timelines.get(id(1)).lastRecordLsn, model.lastRecordLsn);
    await assertRight(third);
  });

  test('what a stale pageserver collects late is not missing where the newer one has branched off, whoever comes next', async () => {
    await node.close();
    let nowMs = Date.now();
    const stale = await start('a', {
      limits: { collectBytesMin: 1 },
      now: () => nowMs,
      lsnAt: ({ diskConsistentLsn }) => diskConsistentLsn,
    });
    nowMs += LEASE_MS;
    write(stale, 300);
    await stale.timelines.get(id(1)).flush();
    assert(await stale.remote.settled());
    const newer = await start('b');
    const branchLsn = LSN + 100 * RECORD;
    await branch(newer, 2, branchLsn);
    // The other, which does not know of that branch, collects what is below its horizon, and has its index accepted as one of its generation.
    await stale.timelines.garbage.run([stale.timelines.get(id(1))], true);
    await assert.rejects(stale.scan(id(1), ALL_KEYS, branchLsn), { code: 'history-gone' });
    await stale.remote.settled();
    assert(stale.remote.status.isStale);
    const objects = await listTimelineObjects(plain, TENANT, id(1));
    assert(objects.indexes.some(({ generation }) => generation === stale.remote.generation));
    const newest = await readIndex(plain, newestIndex(objects.indexes)!);
    const { generation, since } = newer.remote.status;
    await plain.deleteMany(orphansOf(objects, newest, { generation, since }, Date.now()).map((orphan) => orphan.name));
    await newer.abandon();
    const third = await start('c');
    assert.deepEqual(await third.scan(id(2), ALL_KEYS, branchLsn), model.scan(ALL_KEYS, branchLsn));
  });

  test('while the newest index may be a stale pageserver’s, nothing is called an orphan; soon there is one of our own', async () => {
    write(node, 300);
    await node.timelines.get(id(1)).flush();
    assert(await node.remote.settled());
    const stale = node;
    generations.isReachable = false;
    const newer = await TestNode.open({
      directory: join(root, 'b'),
      store,
      generations,
      onStep: (step) => {
        if (step === 'generation written') throw new Error('dead');
      },
    }).catch((error: unknown) => error);
    assert.match(String(newer), /dead/);
    await stale.timelines.get(id(1)).flush();
    const objects = await listTimelineObjects(plain, TENANT, id(1));
    const newest = await readIndex(plain, newestIndex(objects.indexes)!);
    const forged = {
      ...objects,
      layers: [...objects.layers, { ...objects.layers[0]!, name: `${objects.layers[0]!.name}0` }],
    };
    assert.deepEqual(orphansOf(forged, newest, { generation: 2, since: 2 }, Date.now()), []);
    assert.equal(orphansOf(forged, newest, { generation: 2, since: 1 }, Date.now()).length, 1);
    generations.isReachable = true;
    const again = await start('b');
    assert.deepEqual([again.remote.status.generation, again.remote.status.since], [3, 2]);
    assert(await again.remote.settled());
    const { indexes } = await listTimelineObjects(plain, TENANT, id(1));
    assert.deepEqual(
      indexes.map(({ generation }) => generation),
      [3],
    );
  });

  test('two processes of one generation notice it, and write no more', async () => {
    await node.remote.settled();
    await node.close();
    generations.latest = 0;
    // The store has an index of generation 1: both are given the one after it by a control plane that forgets.
    const one = await start('b');
    await one.remote.settled();
    const other = await start('c', { generations: { next: async () => 2, isLatest: async () => true } });
    assert.equal(one.remote.generation, 2);
    assert.equal(other.remote.generation, 2);
    write(one, 100);
    await one.timelines.get(id(1)).flush();
    assert(await one.remote.settled());
    write(other, 60);
    await other.timelines.get(id(1)).flush();
    await other.remote.settled(2_000);
    assert(other.remote.status.isStale);
    assert(!one.remote.status.isStale);
    const third = await start('d');
    assert.equal(third.timelines.get(id(1)).lastRecordLsn, LSN + 100 * RECORD);
  });

  test('a damaged layer is fetched again; a damaged object is not taken for it', async () => {
    write(node, 300);
    await node.timelines.get(id(1)).flush();
    assert(await node.remote.settled());
    const timeline = node.timelines.get(id(1));
    const layer = timeline.index.layers.find(({ kind }) => kind === 'delta')!;
    const path = layerPath(timeline.directory, layer);
    const good = readFileSync(path);
    await node.close();
    const damaged = Buffer.from(good);
    for (let at = 8; at < damaged.length; at += 50) damaged[at]! ^= 0x55;
    writeFileSync(path, damaged);
    await start('a');
    await assertRight(node);
    assert(readFileSync(path).equals(good));
    await node.close();
    writeFileSync(path, damaged);
    const [object] = (await names('layers/')).filter((name) => name.includes(layerFileName(layer)));
    await plain.put(object!, damaged);
    await start('a');
    await assert.rejects(node.scan(id(1), ALL_KEYS, model.lastRecordLsn), { name: 'LayerDamagedError' });
  });

  test('of a timeline whose newest index is damaged no older one is used, and the others are served', async () => {
    write(node, 100);
    await branch(node, 2, LSN + 80);
    await branch(node, 3, LSN + 80);
    await node.close();
    const [name] = await names(`indexes/${TENANT}/${id(2)}`);
    await plain.put(name!, Buffer.from('nonsense'));
    const empty = await start('b');
    assert.match(empty.timelines.broken.get(id(2))!, /is damaged/);
    assert.throws(() => empty.timelines.get(id(2)), { code: 'internal' });
    assert(empty.timelines.find(id(3)) !== undefined);
  });

  for (const what of ['whole', 'emptied', 'away'] as const) {
    test(`a timeline whose index is damaged here is taken from the store (which is ${what})`, async () => {
      write(node, 100);
      await node.timelines.get(id(1)).flush();
      await branch(node, 2, model.lastRecordLsn);
      assert(await node.remote.settled());
      const uploadedLsn = node.timelines.get(id(1)).remoteConsistentLsn;
      write(node, 100);
      await node.close();
      const path = join(root, 'a/timelines', id(1), 'index');
      const index = readFileSync(path);
      index[100]! ^= 1;
      writeFileSync(path, index);
      if (what === 'emptied') await plain.deleteMany(await names(''));
      if (what === 'away') store.plan = () => ({ kind: 'error', errorKind: 'transient' });
      await start('a');
      if (what === 'away') {
        assert.throws(() => node.timelines.get(id(1)), { code: 'internal', message: /is damaged/ });
        await node.abandon();
        store.plan = () => undefined;
        await start('a');
      }
      assert(node.timelines.get(id(1)).lastRecordLsn >= uploadedLsn, 'what is not in the store comes from WAL');
      catchUp(node);
      await assertRight(node);
      assert.equal(node.timelines.get(id(2)).ancestor, node.timelines.get(id(1)));
      await node.timelines.get(id(1)).flush();
      assert(await node.remote.settled());
    });
  }

  test('what the store has counts, whether the disk can note it or not', async () => {
    const timeline = node.timelines.get(id(1));
    const place = join(timeline.directory, 'remote.partial');
    mkdirSync(place); // It is taken, as a full disk refuses it.
    write(node, 300);
    await timeline.flush();
    assert(await node.remote.settled());
    assert.equal(timeline.remoteConsistentLsn, timeline.diskConsistentLsn);
    await assertNoOrphans();
    rmSync(place, { recursive: true });
    await node.close();
    await start('a');
    write(node, 300);
    await node.timelines.get(id(1)).flush();
    assert(await node.remote.settled());
    await assertNoOrphans();
    await assertRight(node);
  });

  test('what comes to be confirmed in the moment in which a confirmation is done is confirmed too', async () => {
    await node.close();
    let gate = Promise.withResolvers<void>();
    class HeldStore extends FaultyStore {
      override async put(name: string, bytes: Uint8Array, options?: PutOptions): Promise<void> {
        await super.put(name, bytes, options);
        if (name.endsWith('-deleted')) await gate.promise;
      }
    }
    await start('a', { store: new HeldStore(farStore(plain)) });
    for (let steps = 0; steps < 24; steps++) {
      gate = Promise.withResolvers<void>();
      generations.isLatest = () => Promise.resolve(true);
      await branch(node, 100 + steps, LSN);
      assert(await node.remote.settled());
      const deletion = node.timelines.delete(id(100 + steps));
      generations.isLatest = () => {
        let comes = Promise.resolve();
        for (let step = 0; step < steps; step++) comes = comes.then(() => {});
        void comes.then(() => gate.resolve());
        return Promise.resolve(true);
      };
      write(node, 10);
      await node.timelines.get(id(1)).flush();
      await deletion;
      assert(await node.remote.settled(5_000), `after ${steps} steps`);
    }
  });

  test('local layers stay within the limit, and are fetched when they are read again', async () => {
    await node.close();
    await start('a', { cacheBytes: 10_000 });
    for (let i = 0; i < 3; i++) {
      write(node, 1000);
      await node.timelines.get(id(1)).flush();
    }
    assert(await node.remote.settled());
    const localBytes = (): number => {
      const directory = join(root, 'a/timelines', id(1));
      return readdirSync(directory)
        .filter((name) => name.includes('__'))
        .reduce((sum, name) => sum + statSync(join(directory, name)).size, 0);
    };
    assert(localBytes() > 15_000, String(localBytes()));
    await node.eviction.run();
    await node.eviction.run();
    assert(localBytes() <= 10_000, String(localBytes()));
    await assertRight(node);
    assert(localBytes() > 15_000);
    await node.eviction.run();
    await node.eviction.run();
    assert(localBytes() <= 10_000);
    // What is cached is served without the store; what is not, is not, until it is back.
    store.plan = () => ({ kind: 'error', errorKind: 'transient' });
    await assert.rejects(node.scan(id(1), ALL_KEYS, model.lastRecordLsn), { code: 'unavailable' });
    write(node, 1000);
    await node.timelines.get(id(1)).flush();
    await sleep(20);
    await node.eviction.run();
    await node.eviction.run();
    assert(localBytes() > 5_000, 'what is not in the store stays');
    store.plan = () => undefined;
    await sleep(1_100); // a failed fetch is not tried again at once
    await assertRight(node);
    assert(await node.remote.settled());
  });

  test('of a large layer a read fetches the pieces that it wants, and many reads all of it', async () => {
    const request = { tenantId: TENANT, timelineId: id(9), pgVersion: 17, lsn: LSN, recordLsn: LSN - RECORD } as const;
    const fork = { spc: 1663, db: 5, rel: 9, fork: 0 };
    const blocks = Array.from({ length: 600 }, () => randomBytes(8192));
    await node.timelines.import(request, async (target) => {
      target.put(relationSizeKey(1663, 5, 9, 0), Buffer.from([600 & 255, 600 >> 8, 0, 0]));
      for (const [blk, page] of blocks.entries()) {
        target.put(relationBlockKey(1663, 5, 9, 0, blk), page);
        await target.drain();
      }
    });
    await node.close();
    await start('b', { piecesFromBytes: 1_000_000, cacheBytes: 500_000 });
    assert(await node.remote.settled());
    const page = (blk: number): Promise<Buffer> =>
      readWhole(() => node.timelines.get(id(9)).getPages(fork, blk, 1, LSN), node.timelines.repair);
    store.calls.length = 0;
    assert.deepEqual(await page(300), blocks[300]);
    assert(store.calls.every(({ operation }) => operation === 'getRange'));
    assert(store.calls.length <= 4, `${store.calls.length} pieces`);
    const callCount = store.calls.length;
    assert.deepEqual(await page(301), blocks[301]);
    assert.equal(store.calls.length, callCount);
    const files = (): string[] => readdirSync(join(root, 'b/timelines', id(9))).filter((name) => name.includes('__'));
    assert.match(files().join(), /^[^,]*\.pieces$/);
    await node.eviction.run();
    await node.eviction.run();
    assert.deepEqual(files(), [], 'pieces are evicted as layers are');
    for (let blk = 0; blk < 600; blk += 7) assert.deepEqual(await page(blk), blocks[blk]);
    assert.equal(store.calls.filter(({ operation }) => operation === 'getToFile').length, 1);
    assert.match(files().join(), /^[^,.]*$/);
    // What a crash leaves of pieces is not believed.
    await start('c', { piecesFromBytes: 1_000_000 });
    assert.deepEqual(await page(5), blocks[5]);
    await node.abandon();
    await start('c', { piecesFromBytes: 1_000_000 });
    assert.deepEqual(readdirSync(join(root, 'c/timelines', id(9))).sort(), ['index', 'remote']);
    assert.deepEqual(await page(5), blocks[5]);
  });

  test('merges fetch what they read', async () => {
    for (let i = 0; i < 3; i++) {
      write(node, 200);
      await node.timelines.get(id(1)).flush();
    }
    await node.timelines.compaction.settled();
    await node.close();
    const empty = await start('b');
    for (let i = 0; i < 12; i++) {
      write(empty, 100);
      await empty.timelines.get(id(1)).flush();
    }
    await empty.timelines.compaction.settled();
    assert(empty.timelines.get(id(1)).index.layers.length < 8, 'it was compacted');
    assert(await empty.remote.settled());
    await assertRight(empty);
    await assertNoOrphans();
  });

  test('a thousand branches are there soon after a start with an empty disk', async () => {
    write(node, 100);
    for (let n = 2; n < 1002; n += 50) {
      await Promise.all(Array.from({ length: 50 }, (_, i) => branch(node, n + i, LSN + 80)));
    }
    await node.close();
    const startMs = performance.now();
    const empty = await start('b');
    const tookMs = performance.now() - startMs;
    assert.equal([...empty.timelines.all()].length, 1001);
    assert(tookMs < 20_000, `${tookMs} ms`);
    assert.deepEqual(await empty.scan(id(777), ALL_KEYS, LSN + 80), model.scan(ALL_KEYS, LSN + 80));
  });

  test('with a store on the same file system nothing is stored twice', async () => {
    await node.close();
    rmSync(root, { recursive: true });
    plain = await FileSystemStore.open(join(root, 'store'));
    await start('a', { store: plain });
    const request = { tenantId: TENANT, timelineId: id(1), pgVersion: 17, lsn: LSN, recordLsn: LSN - RECORD } as const;
    await node.timelines.import(request, async (target) => {
      target.put(relationSizeKey(1663, 5, 1, 0), encodeCountImage(40).subarray(1));
      await target.drain();
    });
    const timeline = node.timelines.get(id(1));
    const path = layerPath(timeline.directory, timeline.index.layers[0]!);
    assert.equal(statSync(path).nlink, 2);
    await node.close();
    const empty = await start('b', { store: plain });
    assert.equal((await empty.scan(id(1), ALL_KEYS, LSN)).length, 1);
    assert.equal(statSync(path).nlink, 3);
  });
});
