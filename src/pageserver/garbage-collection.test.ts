import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import fc from 'fast-check';
import { encodePoke, ModelTimeline, replayPoke } from '../../test/pageserver/history-model.ts';
import { RETENTION_MS } from '../api/retention.ts';
import { createLog } from '../base/log.ts';
import { Indexed } from './indexed-timeline.ts';
import { WalIndexWriter } from './ingest/wal-index-writer.ts';
import { lsnForTimestamp, resolveLsn, timestampOfLsn } from './ingest/wal-search.ts';
import { databaseKey, KEY_KIND, prefixRange, relationBlockKey, relationSizeKey, slruPageKey } from './key.ts';
import type { Key } from './key.ts';
import { LEASE_MS } from './retention.ts';
import type { Timeline } from './timeline.ts';
import { Timelines } from './timelines.ts';
import { encodeCountImage, encodeImage, encodeTombstone } from './value.ts';

const TENANT = 'a'.repeat(32);
const LSN = 0x1000000;
const SIZE = relationSizeKey(1663, 5, 100, 0);
const BLOCKS = [0, 1, 2].map((blk) => relationBlockKey(1663, 5, 100, 0, blk));
const OTHERS = [databaseKey(1663, 5), slruPageKey(0, 0, 3)];
const log = createLog({ name: 'test', level: 'silent' });
const id = (n: number): string => n.toString(16).padStart(32, '0');

describe('garbage collection', () => {
  let directory: string;
  let timelines: Timelines;
  let nowMs = Date.UTC(2026, 0, 1);
  /** By timeline id, where the history window begins. */
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
      target.put(SIZE, Buffer.from([2, 0, 0, 0]));
      target.put(BLOCKS[0]!, Buffer.alloc(8192, 1));
      await target.drain();
    });
  }

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-garbage-'));
    windowStart.clear();
    await open();
  });
  afterEach(async () => {
    await timelines.close();
    rmSync(directory, { recursive: true });
  });

  async function branch(n: number, of: number, lsn: number): Promise<Timeline> {
    const ids = { tenantId: TENANT, timelineId: id(n), ancestorTimelineId: id(of) };
    return timelines.create({ ...ids, ancestorLsn: lsn, ancestorRecordLsn: lsn - 8 });
  }

  /** `count` records that each replace the first block. */
  function write(timeline: Timeline, count: number): void {
    for (let i = 0; i < count; i++) {
      const lsn = timeline.lastRecordLsn + 8;
      timeline.put(BLOCKS[0]!, lsn, encodeImage(randomPage(lsn)));
      timeline.advance(lsn, lsn - 8);
    }
  }

  function randomPage(seed: number): Buffer {
    const page = Buffer.alloc(8192);
    for (let i = 0, x = seed; i < 8192; i++) page[i] = (x = (Math.imul(x, 1103515245) + 12345) >>> 0) >>> 24;
    return page;
  }

  test('what is retained reads as before and all else is refused, whatever is leased, branched, deleted and collected', async () => {
    const step = fc.tuple(fc.nat(99), fc.nat(), fc.nat(), fc.nat());
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 10, maxLength: 90 }), async (steps) => {
        await timelines.close();
        rmSync(directory, { recursive: true });
        mkdirSync(directory);
        windowStart.clear();
        await open();
        await importRoot();
        const root = new ModelTimeline(LSN);
        root.puts.push({ key: SIZE, lsn: LSN, value: encodeCountImage(2) });
        root.puts.push({ key: BLOCKS[0]!, lsn: LSN, value: encodeImage(Buffer.alloc(8192, 1)) });
        const models = new Map<number, { model: ModelTimeline; parent: number; horizon: number }>();
        models.set(1, { model: root, parent: 0, horizon: 0 });
        const leases = new Map<string, { n: number; lsn: number }>();
        const isReadable = (n: number, lsn: number): boolean => {
          let owner = n;
          while (lsn < models.get(owner)!.model.ancestorLsn && models.get(owner)!.parent !== 0)
            owner = models.get(owner)!.parent;
          const { model, horizon } = models.get(owner)!;
          if (lsn < model.ancestorLsn) return false;
          if (lsn >= horizon) return true;
          const children = [...models.values()].filter(({ parent }) => parent === owner);
          if (children.some((child) => child.model.ancestorLsn === lsn)) return true;
          return [...leases.values()].some((lease) => lease.n === owner && lease.lsn === lsn);
        };
        const check = (): void => {
          for (const [n, { model }] of models) {
            const timeline = timelines.get(id(n));
            for (let lsn = LSN; lsn <= model.lastRecordLsn; lsn += 8) {
              if (!isReadable(n, lsn)) {
                assert.throws(() => timeline.getImage(SIZE, lsn), { code: 'history-gone' }, `${n} at ${lsn}`);
                continue;
              }
              const size = model.read(SIZE, lsn)?.readUInt32LE(0) ?? 0;
              for (const key of [SIZE, ...OTHERS, ...BLOCKS.slice(0, size)]) {
                assert.deepEqual(timeline.getImage(key, lsn), model.read(key, lsn), `${n} at ${lsn}, block ${key.blk}`);
              }
            }
          }
        };
        let count = 1;
        for (const [what, t, a, b] of steps) {
          const n = [...models.keys()][t % models.size]!;
          const of = models.get(n)!;
          const { model } = of;
          const timeline = timelines.get(id(n));
          const someLsn = LSN + (a % ((model.lastRecordLsn - LSN) / 8 + 1)) * 8;
          if (what < 55) {
            const lsn = model.lastRecordLsn + 8;
            const put = (key: Key, value: Buffer): void => {
              timeline.put(key, lsn, value);
              model.puts.push({ key, lsn, value });
            };
            const size = model.read(SIZE, model.lastRecordLsn)?.readUInt32LE(0) ?? 0;
            if (what < 8) {
              const next = a % 4;
              // As ingest does: what a fork grows over begins anew.
              for (let blk = size; blk < next; blk++) put(BLOCKS[blk]!, encodeTombstone());
              put(SIZE, next === 0 ? encodeTombstone() : encodeCountImage(next));
            } else if (what < 15) {
              put(OTHERS[0]!, a % 3 === 0 ? encodeTombstone() : encodeImage(Buffer.alloc(5, a)));
            } else {
              const key = what < 25 || size === 0 ? OTHERS[1]! : BLOCKS[a % size]!;
              const how = (['derived', 'record', 'record', 'init'] as const)[b % 4]!;
              put(key, b % 5 === 0 ? encodeImage(Buffer.alloc(8192, b)) : encodePoke(how, a % 20, b % 250));
            }
            timeline.advance(lsn, lsn - 8);
            model.lastRecordLsn = lsn;
          } else if (what < 65) {
            await timeline.flush();
          } else if (what < 72) {
            const child = ++count;
            const canBranch = someLsn >= model.ancestorLsn && isReadable(n, someLsn);
            if (!canBranch) {
              const code = someLsn < model.ancestorLsn ? 'bad-request' : 'history-gone';
              await assert.rejects(branch(child, n, someLsn), { code });
              continue;
            }
            await branch(child, n, someLsn);
            models.set(child, { model: new ModelTimeline(someLsn, model), parent: n, horizon: 0 });
          } else if (what < 76) {
            if (n === 1 || [...models.values()].some(({ parent }) => parent === n)) continue;
            await timelines.delete(id(n));
            models.delete(n);
            for (const [holder, lease] of leases) if (lease.n === n) leases.delete(holder);
          } else if (what < 82) {
            const holder = `holder-${b % 3}`;
            if (someLsn < model.ancestorLsn || !isReadable(n, someLsn)) continue;
            for (const each of timelines.all()) timelines.leases.release(each.timelineId, holder);
            timelines.leases.take(id(n), holder, someLsn);
            leases.set(holder, { n, lsn: someLsn });
          } else if (what < 94) {
            const renew = (): void => {
              for (const [holder, lease] of leases) timelines.leases.take(id(lease.n), holder, lease.lsn);
            };
            nowMs += LEASE_MS / 2;
            renew();
            nowMs += LEASE_MS / 2;
            renew();
            windowStart.set(id(n), someLsn);
            await timelines.garbage.run(timelines.all(), b % 2 === 0);
            for (const [m, each] of models) each.horizon = timelines.get(id(m)).horizon?.lsn ?? 0;
            check();
          } else if (what < 97) {
            await timelines.compaction.merge(timeline, (runs) => runs);
          } else {
            await timelines.close();
            await open();
            for (const [holder, lease] of leases) timelines.leases.take(id(lease.n), holder, lease.lsn);
          }
        }
        check();
      }),
      { numRuns: 60 },
    );
  });

  test('overwritten pages and dropped forks are freed; what a branch point needs goes with its branch', async () => {
    const root = await importRoot();
    write(root, 20);
    const branchLsn = root.lastRecordLsn;
    await branch(2, 1, branchLsn);
    write(root, 200);
    await root.flush();
    const bytes = (): number => root.index.layers.reduce((sum, layer) => sum + layer.sizeBytes, 0);
    const before = bytes();
    nowMs += LEASE_MS;
    windowStart.set(id(1), root.lastRecordLsn);
    await timelines.garbage.run(timelines.all(), true);
    const kept = bytes();
    assert(kept < before / 50, `${kept} of ${before} bytes are kept`);
    assert.deepEqual(timelines.get(id(2)).getImage(BLOCKS[0]!, branchLsn), randomPage(branchLsn));
    await timelines.delete(id(2));
    await timelines.garbage.run(timelines.all(), true);
    assert(bytes() < kept * 0.7, 'the page of the branch point is gone');
    assert.deepEqual(root.getImage(BLOCKS[0]!, root.lastRecordLsn), randomPage(root.lastRecordLsn));
    const lsn = root.lastRecordLsn + 8;
    root.put(SIZE, lsn, encodeTombstone());
    root.advance(lsn, lsn - 8);
    await root.flush();
    windowStart.set(id(1), lsn);
    await timelines.garbage.run(timelines.all(), true);
    assert(bytes() < 1500, 'a dropped fork has no pages');
  });

  test('what was imported goes too, once it is overwritten, but for what a branch point needs', async () => {
    const imported = Array.from({ length: 40 }, (_, blk) => relationBlockKey(1663, 5, 200, 0, blk));
    const root = await timelines.import(
      { tenantId: TENANT, timelineId: id(1), pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 },
      async (target) => {
        target.put(SIZE, Buffer.from([2, 0, 0, 0]));
        target.put(relationSizeKey(1663, 5, 200, 0), Buffer.from([40, 0, 0, 0]));
        target.put(BLOCKS[0]!, Buffer.alloc(8192, 1));
        for (const key of imported) target.put(key, randomPage(key.blk));
        await target.drain();
      },
    );
    await branch(2, 1, LSN);
    for (const [i, key] of imported.entries()) {
      if (i === 7) continue;
      const lsn = root.lastRecordLsn + 8;
      root.put(key, lsn, encodeImage(Buffer.alloc(8192, i)));
      root.advance(lsn, lsn - 8);
    }
    await root.flush();
    const bytes = (): number => root.index.layers.reduce((sum, layer) => sum + layer.sizeBytes, 0);
    const before = bytes();
    assert(before > 40 * 8000);
    nowMs += LEASE_MS;
    windowStart.set(id(1), root.lastRecordLsn);
    await timelines.garbage.run(timelines.all(), true);
    assert(bytes() > 40 * 8000, 'the branch point needs all of it');
    assert.deepEqual(timelines.get(id(2)).getImage(imported[3]!, LSN), randomPage(3));
    await timelines.delete(id(2));
    await timelines.garbage.run(timelines.all(), true);
    assert(bytes() < 12_000, `${bytes()} of ${before} bytes are kept`);
    await timelines.close();
    await open();
    const again = timelines.get(id(1));
    assert.deepEqual(again.getImage(imported[7]!, again.lastRecordLsn), randomPage(7));
    assert.deepEqual(again.getImage(imported[8]!, again.lastRecordLsn), Buffer.alloc(8192, 8));
    assert.deepEqual(again.getImage(BLOCKS[0]!, again.lastRecordLsn), Buffer.alloc(8192, 1));
    assert.equal(again.getImage(BLOCKS[1]!, again.lastRecordLsn), undefined);
  });

  test('the WAL index goes below the horizon, and finds the same as before at and above it and at retained LSNs', async () => {
    const root = await importRoot();
    const index = new WalIndexWriter(root);
    root.beforeFlush = () => index.flush();
    root.indexTail = () => index.tail;
    const ends: number[] = [];
    const add = (timeline: Timeline, writer: WalIndexWriter, i: number): void => {
      const startLsn = timeline.lastRecordLsn;
      // From one record in a bucket to many, and some that are larger than a bucket.
      const lsn = startLsn + 8 * (i % 50 === 7 ? 20_000 : 20 + ((i * 37) % 3000));
      writer.append(startLsn, lsn, i % 3 === 0 ? i * 1000 : undefined);
      timeline.put(OTHERS[0]!, lsn, encodeImage(Buffer.from([i])));
      timeline.advance(lsn, startLsn);
      ends.push(lsn);
    };
    for (let i = 1; i <= 600; i++) {
      add(root, index, i);
      if (i % 100 === 0) await root.flush();
    }
    const child = await branch(2, 1, ends[120]!);
    const answers = (timeline: Timeline, from: number): unknown[] => [
      ...ends.filter((end) => end >= from).map((end) => resolveLsn(new Indexed(timeline), end + 3)),
      ...ends.filter((end) => end >= from).map((end) => timestampOfLsn(new Indexed(timeline), end)),
      ...Array.from({ length: 200 }, (_, i) => lsnForTimestamp(new Indexed(timeline), (400 + i) * 1000 + 500)),
    ];
    const horizon = ends[400]!;
    const before = answers(root, horizon);
    const atChild = resolveLsn(new Indexed(root), ends[120]!);
    nowMs += LEASE_MS;
    windowStart.set(id(1), horizon);
    const chunkCount = (): number => root.scan(prefixRange(KEY_KIND.walIndex)).length;
    const countBefore = chunkCount();
    await timelines.garbage.run(timelines.all(), true);
    assert(chunkCount() < countBefore / 2, `${chunkCount()} of ${countBefore} chunks are kept`);
    assert.deepEqual(answers(root, horizon), before);
    assert.deepEqual(resolveLsn(new Indexed(root), ends[120]!), atChild);
    assert.deepEqual(resolveLsn(new Indexed(child), ends[120]!), atChild);
    assert.equal(timestampOfLsn(new Indexed(child), ends[120]!), 120_000);
    assert.equal(lsnForTimestamp(new Indexed(root), 100_000).kind, 'past');
    const childIndex = new WalIndexWriter(child);
    child.indexTail = () => childIndex.tail;
    for (let i = 122; i < 300; i++) add(child, childIndex, i);
    assert.equal(lsnForTimestamp(new Indexed(child), 125_000).lsn, ends[600 + 3]);
    for (let i = 601; i <= 900; i++) add(root, index, i);
    await root.flush();
    windowStart.set(id(1), root.lastRecordLsn);
    await timelines.garbage.run(timelines.all(), true);
    assert(chunkCount() < 10, 'and again');
    assert.deepEqual(resolveLsn(new Indexed(root), ends[120]!), atChild);
  });

  test('an error below the horizon names the oldest LSN and its time', async () => {
    timelines.retention.set(TENANT, RETENTION_MS.default);
    const root = await importRoot();
    write(root, 5);
    await root.flush();
    nowMs += LEASE_MS;
    windowStart.set(id(1), LSN + 24);
    await timelines.garbage.run(timelines.all());
    const time = new Date(nowMs - RETENTION_MS.default).toISOString();
    const expected = { code: 'history-gone', message: new RegExp(`oldest LSN is 0/1000018, the state of ${time}`) };
    assert.throws(() => root.getImage(SIZE, LSN + 16), expected);
    await assert.rejects(branch(2, 1, LSN + 16), expected);
    root.getImage(SIZE, LSN + 24);
    await timelines.close();
    await open();
    assert.throws(() => timelines.get(id(1)).getImage(SIZE, LSN + 16), expected);
  });

  test('nothing is collected until leases have had time to be taken again after a start', async () => {
    const root = await importRoot();
    write(root, 50);
    await root.flush();
    windowStart.set(id(1), root.lastRecordLsn);
    await timelines.garbage.run(timelines.all(), true);
    assert.equal(root.horizon, undefined);
    timelines.leases.take(id(1), 'compute', LSN + 80);
    nowMs += LEASE_MS - 1;
    await timelines.garbage.run(timelines.all(), true);
    assert.equal(root.horizon, undefined);
    timelines.leases.take(id(1), 'compute', LSN + 80);
    nowMs += 1;
    await timelines.garbage.run(timelines.all(), true);
    assert.deepEqual(root.getImage(BLOCKS[0]!, LSN + 80), randomPage(LSN + 80));
    assert.throws(() => root.getImage(BLOCKS[0]!, LSN + 88), { code: 'history-gone' });
    nowMs += LEASE_MS;
    assert.throws(() => root.getImage(BLOCKS[0]!, LSN + 80), { code: 'history-gone' }, 'the lease has expired');
  });

  test('nothing is left out before the horizon is durable, even when writing it has failed once', async () => {
    const root = await importRoot();
    write(root, 50);
    await root.flush();
    nowMs += LEASE_MS;
    windowStart.set(id(1), root.lastRecordLsn);
    // A folder stands where the index is written.
    const partial = join(root.directory, 'index.partial');
    mkdirSync(partial);
    await timelines.garbage.run(timelines.all(), true);
    assert.equal(root.index.horizon, undefined);
    assert.equal(timelines.garbage.retentionOf(root), undefined);
    assert.throws(
      () => root.getImage(BLOCKS[0]!, LSN + 80),
      { code: 'history-gone' },
      'it counts at once all the same',
    );
    await timelines.garbage.run(timelines.all(), true);
    rmSync(partial, { recursive: true });
    await timelines.close();
    await open();
    assert.deepEqual(timelines.get(id(1)).getImage(BLOCKS[0]!, LSN + 80), randomPage(LSN + 80));
    nowMs += LEASE_MS;
    await timelines.garbage.run(timelines.all(), true);
    assert.equal(timelines.get(id(1)).index.horizon?.lsn, windowStart.get(id(1)));
  });

  test('while windows are damaged, the longest is kept for everybody', async () => {
    timelines.retention.set(TENANT, RETENTION_MS.min);
    await timelines.close();
    const file = join(directory, 'retention');
    writeFileSync(
      file,
      readFileSync(file, 'utf8').replace(/\d(?=})/, (digit) => String((Number(digit) + 1) % 10)),
    );
    await open();
    assert.equal(timelines.retention.of(TENANT), RETENTION_MS.max);
    timelines.retention.set(TENANT, RETENTION_MS.min);
    await timelines.close();
    await open();
    assert.equal(timelines.retention.of(TENANT), RETENTION_MS.min);
    assert.equal(timelines.retention.of('b'.repeat(32)), RETENTION_MS.max, 'nobody has told');
  });

  test('a window is kept over a restart, and only offered windows are taken', async () => {
    timelines.retention.set(TENANT, RETENTION_MS.min);
    await timelines.close();
    await open();
    assert.equal(timelines.retention.of(TENANT), RETENTION_MS.min);
    assert.equal(timelines.retention.of('b'.repeat(32)), RETENTION_MS.max, 'nobody has told');
    assert.throws(() => timelines.retention.set(TENANT, RETENTION_MS.max + 1), { code: 'bad-request' });
  });
});
