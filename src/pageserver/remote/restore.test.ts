import assert from 'node:assert/strict';
import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import type { LostObject } from '../../api/pageserver.ts';
import { newModel } from '../../../test/pageserver/check-store.ts';
import { IMPORTED, putsOf, RECORD_BYTES, ROOT, START_LSN } from '../../../test/pageserver/crash-writer.ts';
import { farStore, silent, TestGenerations, TestNode } from '../../../test/pageserver/node.ts';
import type { NodeOptions } from '../../../test/pageserver/node.ts';
import { FileSystemStore } from '../../object-store/file-system-store.ts';
import type { ObjectStore } from '../../object-store/object-store.ts';
import { ALL_KEYS } from '../key.ts';
import { layerPath } from '../layers/layer-format.ts';
import { INDEXES_PREFIX, LAYERS_PREFIX } from './object-names.ts';
import { restoreAtStart, restoreTimeline } from './restore.ts';
import { listTimelineObjects } from './timeline-objects.ts';

const CHILD = '2'.padStart(32, '0');

describe('an object store that has lost objects', () => {
  const seed = 7;
  let root: string;
  let store: ObjectStore;
  let generations: TestGenerations;
  let model: ReturnType<typeof newModel>;
  let node: TestNode;
  const nodes: TestNode[] = [];

  const storePath = (): string => join(root, 'store');
  const pathOf = (name: string): string => join(storePath(), name);

  async function start(disk: string, options: Partial<NodeOptions> = {}): Promise<TestNode> {
    node = await TestNode.open({ directory: join(root, disk), store, generations, ...options });
    nodes.push(node);
    return node;
  }

  /** Flushed here and in the store. */
  async function write(count = 300): Promise<void> {
    const timeline = node.timelines.get(ROOT);
    for (let i = 0; i < count; i++) {
      const lsn = timeline.lastRecordLsn + RECORD_BYTES;
      for (const [key, value] of putsOf(seed, lsn)) {
        timeline.put(key, lsn, value);
        model.puts.push({ key, lsn, value });
      }
      timeline.advance(lsn, lsn - RECORD_BYTES);
      model.lastRecordLsn = lsn;
    }
    await timeline.flush();
    await node.timelines.compaction.settled();
    assert(await node.remote.settled());
  }

  beforeEach(async () => {
    root = mkdtempSync(join(tmpdir(), 'strata-restore-'));
    store = farStore(await FileSystemStore.open(storePath()));
    generations = new TestGenerations();
    model = newModel();
    await start('a');
    await node.timelines.import(
      { tenantId: ROOT, timelineId: ROOT, pgVersion: 17, lsn: START_LSN, recordLsn: START_LSN - RECORD_BYTES },
      async (target) => {
        for (const [key, image] of IMPORTED) target.put(key, image);
        await target.drain();
      },
    );
    await write();
    const at = { ancestorTimelineId: ROOT, ancestorLsn: model.lastRecordLsn };
    const ancestorRecordLsn = model.lastRecordLsn - RECORD_BYTES;
    await node.timelines.create({ tenantId: ROOT, timelineId: CHILD, ...at, ancestorRecordLsn });
    await write();
  });

  afterEach(async () => {
    for (const each of nodes.splice(0)) await each.abandon();
    rmSync(root, { recursive: true, force: true, maxRetries: 5 });
  });

  const restoring = (): {
    remote: TestNode['remote'];
    repair: TestNode['timelines']['repair'];
    log: typeof silent;
  } => ({
    remote: node.remote,
    repair: node.timelines.repair,
    log: silent,
  });

  async function lookAtStart(): Promise<void> {
    assert(await restoreAtStart({ ...restoring(), store, timelines: () => node.timelines.all() }));
    assert(await node.remote.settled());
  }

  function restore(damaged: readonly string[] = []): Promise<LostObject[]> {
    return restoreTimeline(restoring(), node.timelines.get(ROOT), new Set(damaged));
  }

  /** Everything is read from the store alone. */
  async function assertWhole(): Promise<void> {
    assert(await node.remote.settled());
    await node.close();
    await start(`empty-${nodes.length}`);
    assert.equal(node.timelines.broken.size, 0);
    assert(node.timelines.find(CHILD) !== undefined);
    assert.equal(node.timelines.get(ROOT).lastRecordLsn, model.lastRecordLsn);
    for (const lsn of [START_LSN, START_LSN + 100 * RECORD_BYTES, model.lastRecordLsn]) {
      assert.deepEqual(await node.scan(ROOT, ALL_KEYS, lsn), model.scan(ALL_KEYS, lsn), `at ${lsn}`);
    }
  }

  const objects = async (): Promise<{ indexes: string[]; layers: string[] }> => {
    const { indexes, layers } = await listTimelineObjects(store, ROOT, ROOT);
    return { indexes: indexes.map(({ name }) => name), layers: layers.map(({ name }) => name) };
  };

  test('is filled again after a start when it was emptied', async () => {
    await node.close();
    for (const name of [INDEXES_PREFIX, LAYERS_PREFIX]) rmSync(pathOf(name), { recursive: true });
    await start('a');
    await lookAtStart();
    await assertWhole();
  });

  test('is filled again when the pageserver died in its first start with the emptied one', async () => {
    await node.close();
    for (const name of [INDEXES_PREFIX, LAYERS_PREFIX]) rmSync(pathOf(name), { recursive: true });
    const dying = start('a', {
      onStep: (step) => {
        if (step === 'generation taken') throw new Error('dead');
      },
    });
    await assert.rejects(dying, /dead/);
    await start('a');
    await lookAtStart();
    await assertWhole();
  });

  test('is brought on when it is a copy of before, also when the disk is not known to be the last one', async () => {
    cpSync(storePath(), join(root, 'copy'), { recursive: true });
    await write();
    await node.close();
    rmSync(storePath(), { recursive: true });
    cpSync(join(root, 'copy'), storePath(), { recursive: true });
    generations.latest++; // Somebody was given one in between, and came to nothing.
    await start('a');
    assert.equal(node.timelines.get(ROOT).lastRecordLsn, model.lastRecordLsn, 'the disk’s state is the newer one');
    await lookAtStart();
    await assertWhole();
  });

  test('is given again what is missing and what is damaged, under another name where that is another generation’s', async () => {
    await node.close();
    await start('a');
    const before = await objects();
    const [missing, damaged] = before.layers as [string, string];
    rmSync(pathOf(missing));
    writeFileSync(pathOf(damaged), Buffer.alloc(readFileSync(pathOf(damaged)).length));
    assert.deepEqual(await restore([damaged]), []);
    assert(await node.remote.settled());
    const after = await objects();
    assert(!after.layers.includes(missing) && !after.layers.includes(damaged), 'and the old ones are deleted');
    assert.equal(after.layers.length, before.layers.length);
    assert.equal(after.indexes.length, 1);
    assert.deepEqual(await restore(), []);
    assert.deepEqual(await objects(), after, 'nothing is done when nothing is lost');
    // Of its own generation, under the same name.
    const own = after.layers.find((name) => name.endsWith('-00000002'))!;
    writeFileSync(pathOf(own), Buffer.alloc(readFileSync(pathOf(own)).length));
    assert.deepEqual(await restore([own]), []);
    await assertWhole();
  });

  test('is given its newest index again, and while that is damaged a disk that has a copy serves from it', async () => {
    const [index] = (await objects()).indexes as [string];
    writeFileSync(pathOf(index), 'damaged');
    await node.close();
    generations.latest++;
    await start('a');
    assert.equal(node.timelines.broken.size, 0);
    assert.deepEqual(await restore([index]), []);
    await assertWhole();
  });

  test('is told of what nothing else has, and that harms nothing else', async () => {
    const timeline = node.timelines.get(ROOT);
    const [layer] = timeline.index.layers;
    const [name] = (await objects()).layers.filter((each) => each.includes(layerPath('', layer!).slice(0, 60)));
    rmSync(layerPath(timeline.directory, layer!));
    rmSync(pathOf(name!));
    const lost = await restore();
    assert.deepEqual(
      lost.map((each) => each.name),
      [name],
    );
    assert.match(lost[0]!.reason, /neither|not there/);
    await write();
    assert(await node.remote.settled(), 'uploads go on');
  });

  test('does not have the last copy of a layer taken away from the disk', async () => {
    await node.close();
    await start('a', { cacheBytes: 1 });
    const { layers } = await objects();
    rmSync(pathOf(LAYERS_PREFIX), { recursive: true });
    node.timelines.layerCache.tick++;
    await node.eviction.run();
    const { directory, index } = node.timelines.get(ROOT);
    assert(index.layers.every((layer) => existsSync(layerPath(directory, layer))));
    assert(await node.remote.settled());
    assert.equal((await objects()).layers.length, layers.length, 'and it is there again');
    node.timelines.layerCache.tick++;
    await node.eviction.run();
    await node.eviction.run();
    assert.deepEqual(readdirSync(directory).sort(), ['index', 'remote'], 'now it may');
    await assertWhole();
  });
});
