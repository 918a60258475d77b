import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import fc from 'fast-check';
import { createLog } from '../base/log.ts';
import { encodePoke, ModelTimeline, replayPoke } from '../../test/pageserver/history-model.ts';
import { deltaRuns, RUNS_TO_MERGE } from './compaction-plan.ts';
import { ALL_KEYS, databaseKey, KEY_KIND, prefixRange, relationBlockKey, relationSizeKey, slruPageKey } from './key.ts';
import type { Key } from './key.ts';
import { HOT_CHANGES_MAX } from './layers/memory-layer.ts';
import type { Timeline } from './timeline.ts';
import { Timelines } from './timelines.ts';
import type { StoreLimits } from './timelines.ts';
import { encodeCountImage, encodeImage, encodeTombstone } from './value.ts';

const TENANT = 'a'.repeat(32);
const LSN = 0x1000000;
const log = createLog({ name: 'test', level: 'silent' });

function id(n: number): string {
  return n.toString(16).padStart(32, '0');
}

describe('timelines', () => {
  let directory: string;
  let timelines: Timelines;

  async function open(limits: Partial<StoreLimits> = {}): Promise<Timelines> {
    timelines = await Timelines.open(directory, { replay: replayPoke, log, limits });
    return timelines;
  }

  async function importRoot(n = 1, entries: readonly [Key, Buffer][] = []): Promise<Timeline> {
    const request = { tenantId: TENANT, timelineId: id(n), pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 } as const;
    return timelines.import(request, async (target) => {
      for (const [key, image] of entries) target.put(key, image);
      await target.drain();
    });
  }

  function branch(n: number, of: number, lsn: number): Promise<Timeline> {
    return timelines.create({
      tenantId: TENANT,
      timelineId: id(n),
      ancestorTimelineId: id(of),
      ancestorLsn: lsn,
      ancestorRecordLsn: lsn - 8,
    });
  }

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-timelines-'));
    await open();
  });
  afterEach(async () => {
    await timelines.close();
    rmSync(directory, { recursive: true });
  });

  test('an imported state is read at its LSN, survives a restart, and cannot be read before it', async () => {
    const entries: [Key, Buffer][] = [
      [databaseKey(1663, 5), Buffer.from('map')],
      [relationSizeKey(1663, 5, 1259, 0), encodeCountImage(2).subarray(1)],
      [relationBlockKey(1663, 5, 1259, 0, 1), Buffer.alloc(8192, 7)],
    ];
    await importRoot(1, entries);
    await timelines.close();
    await open();
    const root = timelines.get(id(1));
    assert.deepEqual(root.scan(ALL_KEYS, LSN), entries);
    const pages = root.getPages({ spc: 1663, db: 5, rel: 1259, fork: 0 }, 0, 4, LSN);
    assert.deepEqual(pages, Buffer.concat([Buffer.alloc(8192), Buffer.alloc(8192, 7), Buffer.alloc(2 * 8192)]));
    assert.equal(root.oldestLsn, LSN);
    assert.equal(root.lastRecordStartLsn, LSN - 8);
    await assert.rejects(importRoot(1), { code: 'conflict' });
  });

  test('creating a branch is repeatable, refuses other parameters, and needs an LSN that the ancestor has', async () => {
    const root = await importRoot();
    root.put(databaseKey(1, 1), LSN + 8, encodeImage(Buffer.from('x')));
    root.advance(LSN + 8, LSN);
    const child = await branch(2, 1, LSN + 8);
    assert.equal(await branch(2, 1, LSN + 8), child);
    assert.equal(child.lastRecordLsn, LSN + 8);
    assert.equal(child.lastRecordStartLsn, LSN);
    assert.equal(child.getImage(databaseKey(1, 1), LSN + 8)?.toString(), 'x');
    await assert.rejects(branch(2, 1, LSN), { code: 'conflict' });
    await assert.rejects(branch(3, 1, LSN + 16), { code: 'bad-request' });
    await assert.rejects(branch(3, 9, LSN), { code: 'not-found' });
    await assert.rejects(branch(3, 2, LSN), { code: 'bad-request' });
  });

  test('a timeline with children is not deleted; one that is deleted is gone for good', async () => {
    await importRoot();
    await branch(2, 1, LSN);
    await assert.rejects(timelines.delete(id(1)), { code: 'conflict' });
    const child = timelines.get(id(2));
    const waiting = assert.rejects(child.waitLsn(LSN + 8, 60_000), { code: 'not-found' });
    await timelines.delete(id(2));
    await waiting;
    await timelines.delete(id(2));
    await assert.rejects(branch(2, 1, LSN), { code: 'conflict' }, 'an id is not used twice');
    await timelines.delete(id(1));
    assert.deepEqual(readdirSync(join(directory, 'timelines')), []);
    await open();
    assert.deepEqual([...timelines.all()], []);
  });

  test('at start, what no index names is removed and a damaged index harms its own branch only', async () => {
    await importRoot(1);
    await importRoot(2);
    await branch(3, 2, LSN);
    await timelines.close();
    writeFileSync(join(directory, 'timelines', id(1), 'layer-1-1.partial'), 'x');
    writeFileSync(join(directory, 'timelines', id(1), 'index.partial'), 'x');
    mkdirSync(join(directory, 'timelines', id(7)));
    const indexPath = join(directory, 'timelines', id(2), 'index');
    const index = readFileSync(indexPath);
    index[100]! ^= 1;
    writeFileSync(indexPath, index);
    await open();
    assert.deepEqual(readdirSync(join(directory, 'timelines', id(1))), ['index']);
    assert.deepEqual(readdirSync(join(directory, 'timelines')).sort(), [id(1), id(2), id(3)]);
    assert.throws(() => timelines.get(id(2)), /timeline index .* is damaged: checksum/);
    assert.throws(() => timelines.get(id(3)), /its ancestor 0+2 is damaged or not there/);
    assert.equal(timelines.get(id(1)).lastRecordLsn, LSN);
  });

  test('WAL that changes no page is flushed too when there is much of it, so that it can leave the safekeepers', async () => {
    await timelines.close();
    await open({ flushWalBytes: 1_000 });
    const root = await importRoot();
    const isDurable = async (lsn: number): Promise<boolean> => {
      for (let n = 0; n < 3000 && root.diskConsistentLsn < lsn; n++) await sleep(10);
      return root.diskConsistentLsn >= lsn;
    };
    root.advance(LSN + 992, LSN);
    root.freezeIfFull();
    await sleep(50);
    assert.equal(root.diskConsistentLsn, LSN);
    for (const lsn of [LSN + 1_008, LSN + 2_024]) {
      root.advance(lsn, lsn - 8);
      root.freezeIfFull();
      assert(await isDurable(lsn), `${lsn} is durable`);
    }
    assert.deepEqual(root.index.layers, []);
  });

  test('a wait ends when the LSN is visible here and in the ancestors, by timeout, by abort, and when ingest stops', async () => {
    const root = await importRoot();
    root.advance(LSN + 8, LSN);
    await root.flush();
    root.advance(LSN + 16, LSN + 8);
    await branch(2, 1, LSN + 16);
    await timelines.close();
    await open();
    const child = timelines.get(id(2));
    await child.waitLsn(LSN + 16, 1000);
    const aborter = new AbortController();
    const aborted = assert.rejects(child.waitLsn(LSN + 24, 60_000, aborter.signal), { code: 'unavailable' });
    aborter.abort();
    await aborted;
    await assert.rejects(child.waitLsn(LSN + 24, 1), { code: 'timeout' });
    const stopped = assert.rejects(child.waitLsn(LSN + 24, 60_000), /a record that is not known/);
    child.setIngestError(new Error('a record that is not known'));
    await stopped;
    await assert.rejects(child.waitLsn(LSN + 24, 60_000), /a record that is not known/);
    child.setIngestError(undefined);
    const ready = child.waitLsn(LSN + 24, 60_000);
    child.advance(LSN + 24, LSN + 16);
    await ready;
  });

  test('an error of replay fails the read, and nothing of it is kept', async () => {
    const root = await importRoot();
    const key = relationBlockKey(1, 1, 1, 0, 0);
    root.put(key, LSN + 8, encodePoke('derived', 5, 1));
    root.put(key, LSN + 16, encodePoke('derived', 6, 255));
    root.advance(LSN + 16, LSN + 8);
    for (let i = 0; i < 2; i++) assert.throws(() => root.getImage(key, LSN + 16), /cannot be replayed/);
    assert.equal(root.getImage(key, LSN + 8)?.[5], 1);
  });

  test('a page that changes often gets images as it does, and reads end at them, flushed or not', async () => {
    const root = await importRoot();
    const key = relationBlockKey(1, 1, 1, 0, 3);
    const count = 2 * HOT_CHANGES_MAX + 50;
    for (let i = 1; i <= count; i++) {
      root.put(key, LSN + 8 * i, encodePoke('record', i, i % 200));
      root.advance(LSN + 8 * i, LSN + 8 * i - 8);
    }
    const expected = root.getImage(key, LSN + 8 * count);
    await timelines.close();
    const replayed: number[] = [];
    timelines = await Timelines.open(directory, {
      replay: (page, value, lsn) => {
        replayed.push(lsn);
        replayPoke(page, value);
      },
      log,
    });
    assert.deepEqual(timelines.get(id(1)).getImage(key, LSN + 8 * count), expected);
    assert.equal(replayed.length, 50);
  });

  test('the store agrees with the model over puts, discards, flushes, branches, deletions and restarts', async () => {
    const keys = [
      relationSizeKey(1663, 5, 100, 0),
      relationBlockKey(1663, 5, 100, 0, 0),
      relationBlockKey(1663, 5, 100, 0, 1),
      relationBlockKey(1663, 5, 100, 2, 1),
      relationBlockKey(1663, 5, 101, 0, 4_000_000_000),
      slruPageKey(0, 1, 31),
      databaseKey(1663, 5),
    ];
    const step = fc.oneof(
      {
        weight: 30,
        arbitrary: fc.record({
          do: fc.constant('record' as const),
          t: fc.nat(),
          puts: fc.array(fc.tuple(fc.nat(), fc.nat(), fc.nat()), { maxLength: 4 }),
        }),
      },
      { weight: 4, arbitrary: fc.record({ do: fc.constant('discard' as const), t: fc.nat(), k: fc.nat() }) },
      {
        weight: 6,
        arbitrary: fc.record({ do: fc.constant('read' as const), t: fc.nat(), k: fc.nat(), lsn: fc.nat() }),
      },
      { weight: 2, arbitrary: fc.record({ do: fc.constant('scan' as const), t: fc.nat(), lsn: fc.nat() }) },
      { weight: 3, arbitrary: fc.record({ do: fc.constant('freeze' as const), t: fc.nat() }) },
      { weight: 2, arbitrary: fc.record({ do: fc.constant('flush' as const), t: fc.nat() }) },
      { weight: 2, arbitrary: fc.record({ do: fc.constant('compact' as const), t: fc.nat() }) },
      { weight: 2, arbitrary: fc.record({ do: fc.constant('branch' as const), t: fc.nat(), lsn: fc.nat() }) },
      { weight: 1, arbitrary: fc.record({ do: fc.constant('delete' as const), t: fc.nat() }) },
      { weight: 1, arbitrary: fc.record({ do: fc.constant('reopen' as const) }) },
    );

    const valueFor = (key: Key, what: number, seed: number): Buffer => {
      const isPage = key.kind === KEY_KIND.relationBlock || key.kind === KEY_KIND.slruPage;
      if (what % 11 === 0) return encodeTombstone();
      if (key.kind === KEY_KIND.relationSize) return encodeCountImage(what % 4);
      if (!isPage) return encodeImage(Buffer.alloc(what % 30, seed));
      const hows = ['derived', 'record', 'record', 'init'] as const;
      if (what % 7 === 0) return encodeImage(Buffer.alloc(8192, seed));
      return encodePoke(hows[what % 4]!, seed % 20, what % 250);
    };

    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 1, maxLength: 120 }), async (steps) => {
        await timelines.close();
        rmSync(directory, { recursive: true });
        mkdirSync(directory);
        const limits = { flushBytes: 20_000, pageCacheBytes: 100_000, blockCacheBytes: 100_000, openFilesMax: 3 };
        await open(limits);
        const imported: [Key, Buffer][] = keys
          .slice(0, 3)
          .map((key) => [key, key.kind === KEY_KIND.relationSize ? Buffer.from([2, 0, 0, 0]) : Buffer.alloc(8192, 1)]);
        await importRoot(1, imported);
        const models = new Map<number, ModelTimeline>([[1, new ModelTimeline(LSN)]]);
        for (const [key, image] of imported) models.get(1)!.puts.push({ key, lsn: LSN, value: encodeImage(image) });
        let count = 1;
        const pick = (t: number): [number, ModelTimeline, Timeline] => {
          const n = [...models.keys()][t % models.size]!;
          return [n, models.get(n)!, timelines.get(id(n))];
        };
        const lsnOf = (model: ModelTimeline, lsn: number): number =>
          LSN + (lsn % ((model.lastRecordLsn - LSN) / 8 + 1)) * 8;

        for (const action of steps) {
          if (action.do === 'reopen') {
            await timelines.close();
            await open(limits);
            continue;
          }
          const [n, model, timeline] = pick(action.t);
          switch (action.do) {
            case 'record': {
              const lsn = model.lastRecordLsn + 8;
              for (const [k, what, seed] of action.puts) {
                const key = keys[k % keys.length]!;
                const value = valueFor(key, what, seed);
                timeline.put(key, lsn, value);
                model.puts.push({ key, lsn, value });
                assert.deepEqual(timeline.get(key), model.read(key, lsn));
              }
              timeline.advance(lsn, lsn - 8);
              model.lastRecordLsn = lsn;
              timeline.freezeIfFull();
              break;
            }
            case 'compact': {
              await timeline.flush();
              await timelines.compaction.settled();
              const runs = deltaRuns(timeline.index.layers);
              assert(runs.length < RUNS_TO_MERGE, `${runs.length} runs are left`);
              const first = runs[0];
              if (first !== undefined) await timelines.compaction.merge(timeline, (all) => all.slice(0, 1));
              break;
            }
            case 'discard': {
              const key = keys[action.k % keys.length]!;
              timeline.put(key, model.lastRecordLsn + 8, encodeTombstone());
              assert.equal(timeline.get(key), undefined);
              timeline.discard();
              assert.deepEqual(timeline.get(key), model.read(key, model.lastRecordLsn));
              break;
            }
            case 'read': {
              const key = keys[action.k % keys.length]!;
              const lsn = lsnOf(model, action.lsn);
              assert.deepEqual(timeline.getImage(key, lsn), model.read(key, lsn));
              break;
            }
            case 'scan': {
              const lsn = lsnOf(model, action.lsn);
              for (const range of [ALL_KEYS, prefixRange(KEY_KIND.relationBlock, 1663, 5, 100)]) {
                assert.deepEqual(timeline.scan(range, lsn), model.scan(range, lsn));
              }
              break;
            }
            case 'freeze':
              timeline.freeze();
              break;
            case 'flush':
              await timeline.flush();
              assert.equal(timeline.diskConsistentLsn, model.lastRecordLsn);
              break;
            case 'branch': {
              const lsn = Math.max(model.ancestorLsn, lsnOf(model, action.lsn));
              await branch(++count, n, lsn);
              models.set(count, new ModelTimeline(lsn, model));
              break;
            }
            case 'delete': {
              const hasChildren = [...models.values()].some((other) => other.ancestor === model);
              if (hasChildren) {
                await assert.rejects(timelines.delete(id(n)), { code: 'conflict' });
              } else if (models.size > 1) {
                await timelines.delete(id(n));
                models.delete(n);
              }
              break;
            }
          }
        }
        for (const [n, model] of models) {
          const timeline = timelines.get(id(n));
          assert.deepEqual(timeline.scan(ALL_KEYS, model.lastRecordLsn), model.scan(ALL_KEYS, model.lastRecordLsn));
          for (const key of keys) {
            for (let lsn = LSN; lsn <= model.lastRecordLsn; lsn += 8) {
              const found = timeline.getImage(key, lsn);
              const expected = model.read(key, lsn);
              assert(
                found === expected || (found !== undefined && expected !== undefined && found.equals(expected)),
                `${n} ${lsn}`,
              );
            }
          }
        }
      }),
      { numRuns: Number(process.env['STRATA_TEST_RUNS'] ?? 40) },
    );
  });

  test('a thousand nested branches load at once and are read through', async () => {
    const key = databaseKey(1, 1);
    await importRoot(1, [[key, Buffer.from('deep')]]);
    for (let n = 2; n <= 1001; n++) await branch(n, n - 1, LSN);
    await timelines.close();
    const startMs = performance.now();
    await open();
    const deepest = timelines.get(id(1001));
    assert.equal(deepest.getImage(key, LSN)?.toString(), 'deep');
    assert(performance.now() - startMs < 3000, 'a thousand timelines load in seconds');
    assert.equal(deepest.lineage.length, 2, 'ancestors without history of their own are not visited');
  });

  test('hundreds of nested branches that each changed something are read through by looking into few of them', async () => {
    const key = (blk: number): Key => relationBlockKey(1663, 5, 100, 0, blk);
    await importRoot(1, [[key(0), Buffer.alloc(8192, 1)]]);
    const model = new Map<number, number>([[0, 1]]);
    for (let n = 2; n <= 301; n++) {
      const parent = timelines.get(id(n - 1));
      const timeline = await branch(n, n - 1, parent.lastRecordLsn);
      const lsn = parent.lastRecordLsn + 8;
      const blk = n % 100;
      if (blk !== 0) model.set(blk, n % 256);
      timeline.put(key(blk === 0 ? 100 : blk), lsn, encodeImage(Buffer.alloc(8192, n % 256)));
      timeline.put(key(100_000 + n), lsn, encodeImage(Buffer.alloc(8192, n % 256)));
      timeline.advance(lsn, lsn - 8);
      if (n % 5 === 0) await timeline.flush();
    }
    const deepest = timelines.get(id(301));
    let visits = 0;
    for (const { history } of deepest.lineage) {
      for (const source of [...history.memoryLayers, ...history.layerMap.all()]) {
        const collect = source.collect.bind(source);
        source.collect = (...args) => {
          visits++;
          return collect(...args);
        };
      }
    }
    for (const [blk, byte] of model) assert.equal(deepest.getImage(key(blk), deepest.lastRecordLsn)?.[0], byte);
    assert.equal(deepest.getImage(key(100_002), deepest.lastRecordLsn)?.[0], 2);
    assert(visits < 10 * model.size, `${visits} layers for ${model.size} reads`);
  });
});
