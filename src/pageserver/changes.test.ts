import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import fc from 'fast-check';
import { encodePoke, ModelTimeline, replayPoke } from '../../test/pageserver/history-model.ts';
import { RETENTION_MS } from '../api/retention.ts';
import { StrataError } from '../base/errors.ts';
import { createLog } from '../base/log.ts';
import { ChangeScan, commonPoint } from './changes.ts';
import type { ChangesOptions } from './changes.ts';
import { databaseKey, relationBlockKey, relationSizeKey, slruPageKey } from './key.ts';
import type { Key, RelationFork } from './key.ts';
import { LEASE_MS } from './retention.ts';
import type { Timeline } from './timeline.ts';
import { Timelines } from './timelines.ts';
import { encodeCountImage, encodeImage, encodeTombstone } from './value.ts';

const TENANT = 'a'.repeat(32);
const LSN = 0x1000000;
const FORKS: readonly RelationFork[] = [
  { spc: 1663, db: 5, rel: 100, fork: 0 },
  { spc: 1663, db: 5, rel: 100, fork: 2 },
  { spc: 1663, db: 5, rel: 101, fork: 0 },
  { spc: 1663, db: 6, rel: 100, fork: 0 },
];
const BLOCKS_MAX = 6;
const log = createLog({ name: 'test', level: 'silent' });
const id = (n: number): string => n.toString(16).padStart(32, '0');
const sizeKey = ({ spc, db, rel, fork }: RelationFork): Key => relationSizeKey(spc, db, rel, fork);
const blockKey = ({ spc, db, rel, fork }: RelationFork, blk: number): Key => relationBlockKey(spc, db, rel, fork, blk);
const nameOf = ({ spc, db, rel, fork }: RelationFork): string => `${spc}/${db}/${rel}/${fork}`;

/** What a scan says, with pieces put together. */
interface Found {
  readonly blocks: Set<number>;
  size: { before: number | undefined; after: number | undefined } | undefined;
}

describe('what changed', () => {
  let directory: string;
  let timelines: Timelines;
  let nowMs = Date.UTC(2026, 0, 1);
  const windowStart = new Map<string, number>();

  async function open(): Promise<void> {
    timelines = await Timelines.open(directory, {
      replay: replayPoke,
      log,
      limits: { flushBytes: 20_000, pageCacheBytes: 50_000 },
      now: () => nowMs,
      lsnAt: ({ timelineId }) => windowStart.get(timelineId),
    });
  }

  function importRoot(): Promise<Timeline> {
    const ids = { tenantId: TENANT, timelineId: id(1) };
    return timelines.import({ ...ids, pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 }, async (target) => {
      target.put(sizeKey(FORKS[0]!), Buffer.from([2, 0, 0, 0]));
      target.put(blockKey(FORKS[0]!, 0), Buffer.alloc(8192, 1));
      await target.drain();
    });
  }

  async function branch(n: number, of: number, lsn: number): Promise<Timeline> {
    const ids = { tenantId: TENANT, timelineId: id(n), ancestorTimelineId: id(of) };
    return timelines.create({ ...ids, ancestorLsn: lsn, ancestorRecordLsn: lsn - 8 });
  }

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-changes-'));
    windowStart.clear();
    await open();
  });
  afterEach(async () => {
    await timelines.close();
    rmSync(directory, { recursive: true });
  });

  /** `between` is called after each piece; with `resumes` each piece comes from a scan of its own. */
  async function scan(
    timeline: Timeline,
    options: ChangesOptions,
    between: () => Promise<unknown> = async () => {},
    resumes = false,
  ): Promise<Map<string, Found>> {
    const found = new Map<string, Found>();
    let at = new ChangeScan(timeline, options);
    for (let last = ''; ;) {
      const piece = await at.next();
      if (piece === undefined) return found;
      const { fork, ranges, size, isContinued } = piece;
      const name = nameOf(fork);
      const known = found.get(name);
      assert(known === undefined || last === name, 'pieces of a fork follow each other');
      assert(ranges.length <= (options.rangesMax ?? Infinity));
      last = name;
      const each: Found = known ?? { blocks: new Set(), size: undefined };
      found.set(name, each);
      if (size !== undefined) each.size = { before: size.before, after: size.after };
      for (const [start, end] of ranges) {
        assert(start < end);
        for (let blk = start; blk < end; blk++) {
          assert(Math.max(-1, ...each.blocks) < blk, 'blocks rise');
          each.blocks.add(blk);
        }
      }
      await between();
      if (!resumes) continue;
      const blk = ranges.at(-1)?.[1];
      at = new ChangeScan(timeline, {
        ...options,
        after: { fork, ...(isContinued && blk !== undefined ? { blk: blk - 1 } : {}) },
      });
    }
  }

  test('all that differs is named, and nothing that was not written, over random histories with flushes, compactions, branches and collections', async () => {
    const step = fc.tuple(fc.nat(99), fc.nat(), fc.nat(), fc.nat());
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 10, maxLength: 110 }), fc.nat(), async (steps, seed) => {
        await timelines.close();
        rmSync(directory, { recursive: true });
        mkdirSync(directory);
        windowStart.clear();
        await open();
        await importRoot();
        const root = new ModelTimeline(LSN);
        root.puts.push({ key: sizeKey(FORKS[0]!), lsn: LSN, value: encodeCountImage(2) });
        root.puts.push({ key: blockKey(FORKS[0]!, 0), lsn: LSN, value: encodeImage(Buffer.alloc(8192, 1)) });
        const models = new Map<number, { model: ModelTimeline; parent: number; horizon: number }>();
        models.set(1, { model: root, parent: 0, horizon: 0 });
        let isCollected = false;
        let count = 1;

        const isReadable = (n: number, lsn: number): boolean => {
          let owner = n;
          while (models.get(owner)!.parent !== 0 && lsn <= models.get(owner)!.model.ancestorLsn) {
            owner = models.get(owner)!.parent;
          }
          const { model, horizon } = models.get(owner)!;
          if (lsn < model.ancestorLsn) return false;
          if (lsn >= horizon) return true;
          return [...models.values()].some(
            ({ parent, model: { ancestorLsn } }) => parent === owner && ancestorLsn === lsn,
          );
        };
        const wasPut = (model: ModelTimeline, key: Key, from: number, to: number): boolean => {
          const isIt = (put: { key: Key; lsn: number }): boolean =>
            put.lsn > from && put.lsn <= to && JSON.stringify(put.key) === JSON.stringify(key);
          if (model.puts.some(isIt)) return true;
          return model.ancestor !== undefined && wasPut(model.ancestor, key, from, Math.min(to, model.ancestorLsn));
        };
        const sizeAt = (model: ModelTimeline, fork: RelationFork, lsn: number): number | undefined =>
          model.read(sizeKey(fork), lsn)?.readUInt32LE(0);
        const compare = (model: ModelTimeline, from: number, to: number, found: Map<string, Found>): void => {
          for (const fork of FORKS) {
            const before = sizeAt(model, fork, from);
            const after = sizeAt(model, fork, to);
            const { blocks, size } = found.get(nameOf(fork)) ?? { blocks: new Set(), size: undefined };
            const where = `${nameOf(fork)} from ${from - LSN} to ${to - LSN}`;
            if (before !== after) assert.deepEqual(size, { before, after }, where);
            else if (size !== undefined) assert.deepEqual(size, { before, after }, where);
            for (const blk of blocks) assert(blk < (after ?? 0), `${where}: block ${blk} exists at the end`);
            for (let blk = 0; blk < (after ?? 0); blk++) {
              const key = blockKey(fork, blk);
              const isWritten = wasPut(model, key, from, to);
              const then = model.read(key, from) ?? Buffer.alloc(8192);
              const now = model.read(key, to) ?? Buffer.alloc(8192);
              const differs = blk >= (before ?? 0) || !then.equals(now);
              if (differs || !isCollected) assert.equal(blocks.has(blk), isWritten, `${where}: block ${blk}`);
              else assert(isWritten || !blocks.has(blk), `${where}: block ${blk} was not written`);
            }
          }
        };
        let random = seed;
        const pick = (below: number): number => {
          random = (Math.imul(random, 1103515245) + 12345) >>> 0;
          return (random >>> 8) % below;
        };
        const lsnsOf = (model: ModelTimeline): number => (model.lastRecordLsn - LSN) / 8 + 1;
        const checkWindow = async (n: number, a: number, b: number): Promise<void> => {
          const { model } = models.get(n)!;
          const [from, to] = [Math.min(a, b), Math.max(a, b)];
          const timeline = timelines.get(id(n));
          const options: ChangesOptions = {
            fromLsn: from,
            toLsn: to,
            ...(pick(2) === 0 ? {} : { rangesMax: 1 + pick(2) }),
            ...(pick(2) === 0 ? {} : { sliceMs: 0 }),
          };
          if (!isReadable(n, from) || !isReadable(n, to)) {
            await assert.rejects(scan(timeline, options), { code: 'history-gone' });
            return;
          }
          const between = [
            async () => {},
            () => timeline.flush(),
            async () => {
              await timeline.flush();
              await timelines.compaction.settled();
              await timelines.compaction.merge(timeline, (runs) => (runs.length > 0 ? runs : undefined));
            },
          ];
          const meanwhile = pick(3);
          const changing = pick(2) === 0 ? between[meanwhile]!() : undefined;
          compare(model, from, to, await scan(timeline, options, between[meanwhile], pick(2) === 0));
          await changing;
        };

        for (const [what, t, a, b] of steps) {
          const n = [...models.keys()][t % models.size]!;
          const of = models.get(n)!;
          const { model } = of;
          const timeline = timelines.get(id(n));
          const someLsn = LSN + (a % lsnsOf(model)) * 8;
          const lsn = model.lastRecordLsn + 8;
          const put = (key: Key, value: Buffer): void => {
            timeline.put(key, lsn, value);
            model.puts.push({ key, lsn, value });
          };
          if (what < 60) {
            const fork = FORKS[a % FORKS.length]!;
            const size = sizeAt(model, fork, model.lastRecordLsn);
            if (what < 15) {
              const next = b % (BLOCKS_MAX + 1);
              // As ingest does: what a fork grows over begins anew.
              for (let blk = size ?? 0; blk < next; blk++) put(blockKey(fork, blk), encodeTombstone());
              put(sizeKey(fork), encodeCountImage(next));
            } else if (what < 18 && size !== undefined) {
              put(sizeKey(fork), encodeTombstone());
            } else if (size !== undefined && size > 0) {
              const hows = ['derived', 'record', 'init'] as const;
              const value =
                what < 25 ? encodeImage(Buffer.alloc(8192, b % 3)) : encodePoke(hows[b % 3]!, b % 20, what % 250);
              put(blockKey(fork, t % size), value);
            }
            put(slruPageKey(0, 0, b % 3), encodeImage(Buffer.alloc(8192, b % 250)));
            put(databaseKey(1663, 5), encodeImage(Buffer.from([b % 250])));
            timeline.advance(lsn, lsn - 8);
            model.lastRecordLsn = lsn;
          } else if (what < 66) {
            timeline.freeze();
          } else if (what < 71) {
            await timeline.flush();
          } else if (what < 77) {
            await timeline.flush();
            await timelines.compaction.settled();
            await timelines.compaction.merge(timeline, (runs) => runs.slice(0, 1 + (b % 3)));
          } else if (what < 83 && count < 6) {
            if (someLsn < model.ancestorLsn || someLsn < of.horizon) continue;
            await branch(++count, n, someLsn);
            models.set(count, { model: new ModelTimeline(someLsn, model), parent: n, horizon: 0 });
          } else if (what < 86) {
            isCollected = true;
            await timeline.flush();
            const start = Math.max(of.horizon, model.ancestorLsn, someLsn);
            windowStart.set(id(n), start);
            timelines.retention.set(TENANT, RETENTION_MS.min);
            nowMs += LEASE_MS;
            await timelines.garbage.run([timeline], true);
            if (start > model.ancestorLsn) of.horizon = start;
          } else if (what < 88) {
            await timelines.close();
            await open();
          } else {
            await checkWindow(n, LSN + (a % lsnsOf(model)) * 8, LSN + (b % lsnsOf(model)) * 8);
          }
        }
        for (const [n, { model, parent }] of models) {
          for (let i = 0; i < 6; i++) {
            await checkWindow(n, LSN + pick(lsnsOf(model)) * 8, LSN + pick(lsnsOf(model)) * 8);
          }
          await checkWindow(n, model.ancestorLsn, model.lastRecordLsn);
          if (parent === 0) continue;
          const other = [...models.keys()][pick(models.size)]!;
          const [aLsn, bLsn] = [model.lastRecordLsn, models.get(other)!.model.lastRecordLsn];
          const point = commonPoint(timelines.get(id(n)), aLsn, timelines.get(id(other)), bLsn);
          assert.equal(point?.lsn, expectedCommonLsn(model, aLsn, models.get(other)!.model, bLsn));
          await checkWindow(n, point!.lsn, aLsn);
          await checkWindow(other, point!.lsn, bLsn);
        }
      }),
      { numRuns: Number(process.env['STRATA_TEST_RUNS'] ?? 25) },
    );
  });

  test('an LSN below the horizon is refused with the oldest one, save for a branch point; so is a window that is none', async () => {
    const root = await importRoot();
    for (let i = 1; i <= 20; i++) write(root, FORKS[0]!, i % 2);
    await root.flush();
    const child = await branch(2, 1, LSN + 40);
    write(child, FORKS[0]!, 0);
    windowStart.set(id(1), LSN + 80);
    timelines.retention.set(TENANT, RETENTION_MS.min);
    nowMs += LEASE_MS;
    await timelines.garbage.run([root], true);
    const window = (fromLsn: number, toLsn: number) => new ChangeScan(root, { fromLsn, toLsn });
    assert.throws(
      () => window(LSN + 48, LSN + 160),
      (error: StrataError) =>
        error.code === 'history-gone' && /0\/1000030 .* the oldest LSN is 0\/1000050, the state of/.test(error.message),
    );
    assert.throws(() => window(LSN + 160, LSN + 80), /go backwards/);
    assert.throws(() => window(LSN + 80, LSN + 168), /after the end of timeline/);
    const since = await scan(root, { fromLsn: LSN + 40, toLsn: LSN + 160 });
    assert.deepEqual([...since.get('1663/5/100/0')!.blocks], [0, 1]);
    const own = await scan(child, { fromLsn: LSN + 40, toLsn: child.lastRecordLsn });
    assert.deepEqual([...own.get('1663/5/100/0')!.blocks], [0]);
  });

  test('one change in a large branch costs a few blocks of the index, many cost in proportion, and no page is read', async () => {
    const root = await importRoot();
    const fork = FORKS[0]!;
    const many = 100_000;
    let lsn = LSN + 8;
    root.put(sizeKey(fork), lsn, encodeCountImage(many));
    for (let blk = 0; blk < many; blk++) root.put(blockKey(fork, blk), lsn, encodePoke('init', 1, blk % 250));
    root.advance(lsn, lsn - 8);
    await root.flush();
    const child = await branch(2, 1, lsn);
    const cost = async (timeline: Timeline, fromLsn: number): Promise<{ blocks: number; keyBlocks: number }> => {
      const search = new ChangeScan(timeline, { fromLsn, toLsn: timeline.lastRecordLsn });
      let blocks = 0;
      for (let piece = await search.next(); piece !== undefined; piece = await search.next()) {
        for (const [start, end] of piece.ranges) blocks += end - start;
      }
      return { blocks, keyBlocks: search.keyBlocksRead };
    };
    for (const timeline of [root, child]) {
      const from = timeline.lastRecordLsn;
      lsn = from + 8;
      timeline.put(blockKey(fork, 54_321), lsn, encodePoke('record', 1, 1));
      timeline.advance(lsn, from);
      assert.deepEqual(await cost(timeline, from), { blocks: 1, keyBlocks: 0 }, 'in memory');
      await timeline.flush();
      const { blocks, keyBlocks } = await cost(timeline, from);
      assert.equal(blocks, 1);
      assert(keyBlocks <= 2, `${keyBlocks} key blocks for one change`);
    }
    // Of a layer that straddles the window, key blocks that have nothing in it are passed over.
    const beforeMerge = root.lastRecordLsn - 8;
    await timelines.compaction.merge(root, (runs) => runs);
    assert.equal(root.index.layers.filter((layer) => layer.kind === 'delta').length, 1);
    const straddling = await cost(root, beforeMerge);
    assert.equal(straddling.blocks, 1);
    assert(straddling.keyBlocks <= 3, `${straddling.keyBlocks} key blocks for one change in a merged layer`);
    const all = await cost(root, LSN);
    assert.equal(all.blocks, many);
    assert(all.keyBlocks > 20 && all.keyBlocks < many / 100, `${all.keyBlocks} key blocks for ${many} changes`);
  });

  function write(timeline: Timeline, fork: RelationFork, blk: number): void {
    const lsn = timeline.lastRecordLsn + 8;
    timeline.put(blockKey(fork, blk), lsn, encodePoke('record', 3, lsn % 250));
    timeline.advance(lsn, lsn - 8);
  }
});

/** Of the model: the LSN up to which two lines of history are one. */
function expectedCommonLsn(a: ModelTimeline, aLsn: number, b: ModelTimeline, bLsn: number): number | undefined {
  const upTo = (model: ModelTimeline, lsn: number): Map<ModelTimeline, number> => {
    const path = new Map<ModelTimeline, number>();
    for (let at: ModelTimeline | undefined = model, end = lsn; at !== undefined; at = at.ancestor) {
      path.set(at, end);
      end = Math.min(end, at.ancestorLsn);
    }
    return path;
  };
  const ofB = upTo(b, bLsn);
  for (const [model, lsn] of upTo(a, aLsn)) if (ofB.has(model)) return Math.min(lsn, ofB.get(model)!);
  return undefined;
}
