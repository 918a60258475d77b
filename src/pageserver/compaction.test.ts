import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import fc from 'fast-check';
import { encodePoke, replayPoke } from '../../test/pageserver/history-model.ts';
import { createLog } from '../base/log.ts';
import { deltaRuns, planMerge, RUN_BYTES_MIN, runCountMax, RUNS_TO_MERGE } from './compaction-plan.ts';
import type { LayerRun } from './compaction-plan.ts';
import { inlineCompactor, ThreadCompactor } from './compactor.ts';
import type { Compactor } from './compactor.ts';
import { ALL_KEYS, databaseKey, relationBlockKey } from './key.ts';
import { layerFileName } from './layers/layer-format.ts';
import { HOT_CHANGES_MAX } from './layers/memory-layer.ts';
import { CHAIN_RECORDS_MAX, TAIL_RECORDS_MAX } from './merge.ts';
import type { Timeline } from './timeline.ts';
import { Timelines } from './timelines.ts';
import type { StoreLimits } from './timelines.ts';
import { encodeImage } from './value.ts';

const ID = 'c'.repeat(32);
const LSN = 0x1000000;
const id = (n: number): string => n.toString(16).padStart(32, '0');
const log = createLog({ name: 'test', level: 'silent' });

test('sizes at least double from run to run when nothing is left to merge, whatever the flushes were', () => {
  fc.assert(
    fc.property(fc.array(fc.integer({ min: 1, max: 64 * RUN_BYTES_MIN }), { maxLength: 300 }), (sizes) => {
      let runs: LayerRun[] = [];
      for (const [i, sizeBytes] of sizes.entries()) {
        runs.push({ lsnStart: i, lsnEnd: i + 1, sizeBytes, layers: [] });
        for (let merged = planMerge(runs); merged !== undefined; merged = planMerge(runs)) {
          assert(merged.length >= RUNS_TO_MERGE);
          const sum = merged.reduce((total, run) => total + run.sizeBytes, 0);
          const kept = runs.slice(0, runs.length - merged.length);
          runs = [...kept, { lsnStart: merged[0]!.lsnStart, lsnEnd: i + 1, sizeBytes: sum, layers: [] }];
        }
        const bytes = runs.reduce((total, run) => total + Math.max(run.sizeBytes, RUN_BYTES_MIN), 0);
        assert(runs.length <= runCountMax(bytes), `${runs.length} runs of ${bytes} bytes`);
      }
    }),
  );
});

describe('compaction', () => {
  let directory: string;
  let timelines: Timelines;
  let replayCount = 0;

  async function open(compactor?: Compactor, limits: Partial<StoreLimits> = {}): Promise<void> {
    timelines = await Timelines.open(directory, {
      replay: (page, value) => {
        replayCount++;
        replayPoke(page, value);
      },
      log,
      limits: { pageCacheBytes: 0, ...limits },
      ...(compactor === undefined ? {} : { compactor }),
    });
  }

  async function importRoot(): Promise<Timeline> {
    const ids = { tenantId: ID, timelineId: ID };
    return timelines.import({ ...ids, pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 }, async (target) => {
      target.put(relationBlockKey(1663, 5, 100, 0, 0), Buffer.alloc(8192, 1));
      await target.drain();
    });
  }

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'strata-compaction-'));
  });
  afterEach(async () => {
    await timelines.close();
    rmSync(directory, { recursive: true });
  });

  test(
    'after compaction no read visits many layers or replays many records, at any LSN',
    { timeout: 120_000 },
    async () => {
      await open();
      await fc.assert(
        fc.asyncProperty(
          fc.array(fc.array(fc.tuple(fc.nat(3), fc.nat(90)), { maxLength: 60 }), { minLength: 5, maxLength: 60 }),
          async (flushes) => {
            await timelines.close();
            rmSync(directory, { recursive: true });
            await open();
            const root = await importRoot();
            const blocks = [0, 1, 5, 1000].map((blk) => relationBlockKey(1663, 5, 100, 0, blk));
            for (const puts of flushes) {
              for (const [block, byte] of puts) {
                const lsn = root.lastRecordLsn + 8;
                root.put(blocks[block]!, lsn, encodePoke('record', byte, byte));
                root.advance(lsn, lsn - 8);
              }
              await root.flush();
            }
            await timelines.compaction.settled();
            const runCount = deltaRuns(root.index.layers).length;
            assert(runCount < RUNS_TO_MERGE);
            let visits = 0;
            for (const layer of root.layerMap.all()) {
              const collect = layer.collect.bind(layer);
              layer.collect = (...args) => {
                visits++;
                return collect(...args);
              };
            }
            const recordsMax = CHAIN_RECORDS_MAX + runCount * Math.max(TAIL_RECORDS_MAX, HOT_CHANGES_MAX);
            for (let lsn = LSN; lsn <= root.lastRecordLsn; lsn += 8 * 7) {
              for (const key of blocks) {
                visits = 0;
                replayCount = 0;
                root.getImage(key, lsn);
                assert(visits <= runCount + 1, `${visits} layers for a read`);
                assert(replayCount <= recordsMax, `${replayCount} records for a read`);
              }
            }
          },
        ),
        { numRuns: 25 },
      );
    },
  );

  test('a page that changes in every layer gets an image, so that its chain does not grow with the history', async () => {
    await open();
    const root = await importRoot();
    const key = relationBlockKey(1663, 5, 100, 0, 0);
    for (let i = 0; i < 600; i++) {
      const lsn = root.lastRecordLsn + 8;
      root.put(key, lsn, encodePoke('record', i % 100, i % 200));
      root.advance(lsn, lsn - 8);
      if (i % 5 === 0) await root.flush();
    }
    await root.flush();
    await timelines.compaction.settled();
    replayCount = 0;
    root.getImage(key, root.lastRecordLsn);
    assert(replayCount <= CHAIN_RECORDS_MAX, `${replayCount} records`);
  });

  test(
    'small merges do not wait for a large one, but those of its ancestors and descendants do',
    { timeout: 60_000 },
    async () => {
      const gate = Promise.withResolvers<void>();
      const begun = Promise.withResolvers<void>();
      const inline = inlineCompactor(replayPoke);
      const merged: string[] = [];
      const compactor: Compactor = {
        merge: async (job) => {
          const isGated = job.timelineId === id(2) && merged.length === 0;
          if (isGated) begun.resolve();
          if (isGated) await gate.promise;
          merged.push(job.timelineId);
          return inline.merge(job);
        },
        close: () => inline.close(),
      };
      await open(compactor, { largeMergeBytes: 20_000 });
      const root = await importRoot();
      const ids = { tenantId: ID, ancestorTimelineId: ID, ancestorLsn: LSN, ancestorRecordLsn: LSN - 8 };
      const [large, small] = [
        await timelines.create({ ...ids, timelineId: id(2) }),
        await timelines.create({ ...ids, timelineId: id(3) }),
      ];
      const child = await timelines.create({ ...ids, timelineId: id(4), ancestorTimelineId: id(2) });
      const write = async (timeline: Timeline, bytes: number): Promise<void> => {
        for (let i = 0; i < RUNS_TO_MERGE; i++) {
          const lsn = timeline.lastRecordLsn + 8;
          timeline.put(databaseKey(1663, 5), lsn, encodeImage(randomBytes(bytes)));
          timeline.advance(lsn, lsn - 8);
          await timeline.flush();
        }
      };
      await write(large, 8_000);
      await begun.promise;
      await write(child, 10);
      await write(root, 10);
      await write(small, 10);
      while (deltaRuns(small.index.layers).length >= RUNS_TO_MERGE) await sleep(5);
      assert.deepEqual(merged, [id(3)]);
      assert.equal(deltaRuns(child.index.layers).length, RUNS_TO_MERGE);
      assert.equal(deltaRuns(root.index.layers).length, RUNS_TO_MERGE);
      gate.resolve();
      await timelines.compaction.settled();
      assert.deepEqual(merged.toSorted(), [ID, id(2), id(3), id(4)].toSorted());
      for (const timeline of [root, large, small, child]) {
        assert(deltaRuns(timeline.index.layers).length < RUNS_TO_MERGE);
      }
    },
  );

  test('what a merge has written is left alone by the next when nobody knows which index is on disk', async () => {
    await open();
    const root = await importRoot();
    const write = async (): Promise<void> => {
      const lsn = root.lastRecordLsn + 8;
      root.put(databaseKey(1663, 5), lsn, encodeImage(randomBytes(100)));
      root.advance(lsn, lsn - 8);
      await root.flush();
    };
    for (let i = 0; i < RUNS_TO_MERGE - 1; i++) await write();
    const before = new Set(readdirSync(root.directory));
    // The index is surely the old one: the next is written under this name first.
    const next = join(root.directory, 'index.partial');
    mkdirSync(next);
    await assert.rejects(
      timelines.compaction.merge(root, (runs) => runs),
      /index\.partial/,
    );
    rmdirSync(next);
    assert.deepEqual(new Set(readdirSync(root.directory)), before);
    root.replaceLayers = () => Promise.reject(new Error('the folder cannot be synced'));
    await assert.rejects(
      timelines.compaction.merge(root, (runs) => runs),
      /cannot be synced/,
    );
    const written = readdirSync(root.directory).filter((name) => !before.has(name));
    assert.equal(written.length, 1);
    const content = readFileSync(join(root.directory, written[0]!));
    Reflect.deleteProperty(root, 'replaceLayers');
    assert(await timelines.compaction.merge(root, (runs) => runs));
    assert.deepEqual(readFileSync(join(root.directory, written[0]!)), content);
    assert(!root.index.layers.some((layer) => layerFileName(layer) === written[0]));
  });

  test('merges run in a thread, a closed store gives them up, and the folder holds what the index names', async () => {
    await open(new ThreadCompactor());
    const root = await importRoot();
    for (let i = 0; i < 9; i++) {
      for (let blk = 0; blk < 50; blk++) {
        const lsn = root.lastRecordLsn + 8;
        root.put(relationBlockKey(1663, 5, 100, 0, blk), lsn, encodeImage(Buffer.alloc(8192, i)));
        root.put(databaseKey(1663, i), lsn, encodeImage(Buffer.from(`${i} ${blk}`)));
        root.advance(lsn, lsn - 8);
      }
      await root.flush();
    }
    const before = root.scan(ALL_KEYS, root.lastRecordLsn - 80);
    await timelines.compaction.settled();
    assert(deltaRuns(root.index.layers).length < RUNS_TO_MERGE);
    assert.deepEqual(root.scan(ALL_KEYS, root.lastRecordLsn - 80), before);
    assert.equal(readdirSync(root.directory).length, root.index.layers.length + 1);
  });
});
