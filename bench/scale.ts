/**
 * Does the page store's cost grow with the work or with the data? Branch creation and cold and warm page reads at two sizes of a project, the memory that a
 * load takes, and what each of many branches costs in memory. In process, without a platform.
 *
 * STRATA_BENCH_GB: the larger size in gigabytes (10 for the full picture; it takes that much disk and minutes). The smaller is a tenth of it.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { createLog } from '../src/base/log.ts';
import { ThreadCompactor } from '../src/pageserver/compactor.ts';
import { relationBlockKey, relationSizeKey } from '../src/pageserver/key.ts';
import { replayValue } from '../src/pageserver/replay.ts';
import type { Timeline } from '../src/pageserver/timeline.ts';
import { Timelines } from '../src/pageserver/timelines.ts';
import { encodeCountImage, encodeImage } from '../src/pageserver/value.ts';
import { elapsedMs, median, percentile, type Row } from './measure.ts';

const LSN = 0x1000000;
const FORK = { spc: 1663, db: 5, rel: 16384, fork: 0 };
const BLOCK_BYTES = 8192;
/** The system's cache has the files, or the disk. */
const UNCACHED = { pageCacheBytes: 0, blockCacheBytes: 1024 * 1024 };
const id = (n: number): string => n.toString(16).padStart(32, '0');

export async function scale({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const largeGb = Number(process.env['STRATA_BENCH_GB'] ?? (quick ? 0.2 : 1));
  // First, while the heap is small.
  const branches = await manyBranches(quick ? 1000 : 10_000);
  const small = await atSize(largeGb / 10);
  const large = await atSize(largeGb);
  const size = `${largeGb} GB of pages (${largeGb / 10} GB in note)`;
  const row = (question: string, unit: string, of: (at: AtSize) => number): Row => ({
    question: `${question}, ${size}`,
    unit,
    vanilla: undefined,
    strata: of(large),
    isRate: false,
    note: `${of(small).toFixed(2)} ${unit}`,
  });
  return [
    row('page store: create a branch, p50', 'ms', (at) => at.createMs),
    row('page store: read a page of a branch, only the system caches files, p50', 'µs', (at) => at.coldUs),
    row('page store: the same, p99', 'µs', (at) => at.coldP99Us),
    row('page store: most memory while loading', 'MB', (at) => at.loadRssMb),
    ...branches,
  ];
}

interface AtSize {
  readonly createMs: number;
  readonly coldUs: number;
  readonly coldP99Us: number;
  readonly loadRssMb: number;
}

async function withStore<T>(use: (store: Timelines, root: Timeline) => Promise<T>): Promise<T> {
  const directory = mkdtempSync(join(tmpdir(), 'strata-bench-scale-'));
  const log = createLog({ name: 'bench', level: 'error' });
  const store = await Timelines.open(directory, {
    replay: replayValue,
    log,
    compactor: new ThreadCompactor(),
    limits: UNCACHED,
  });
  try {
    const request = { tenantId: id(1), timelineId: id(1), pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 } as const;
    const root = await store.import(request, async (target) => {
      target.put(relationSizeKey(FORK.spc, FORK.db, FORK.rel, 0), Buffer.alloc(4));
      await target.drain();
    });
    return await use(store, root);
  } finally {
    await store.close();
    rmSync(directory, { recursive: true, force: true });
  }
}

/** Pages that compress to about a half, loaded as ingest loads them. */
async function atSize(gb: number): Promise<AtSize> {
  return withStore(async (store, root) => {
    const blocks = Math.floor((gb * 1e9) / BLOCK_BYTES);
    collectHeap();
    const rssBefore = process.memoryUsage().rss;
    let rssMax = 0;
    const page = Buffer.alloc(BLOCK_BYTES);
    for (let blk = 0; blk < blocks; blk++) {
      const lsn = root.lastRecordLsn + BLOCK_BYTES;
      fill(page, blk);
      root.put(relationBlockKey(FORK.spc, FORK.db, FORK.rel, 0, blk), lsn, encodeImage(page));
      root.put(relationSizeKey(FORK.spc, FORK.db, FORK.rel, 0), lsn, encodeCountImage(blk + 1));
      root.advance(lsn, lsn - BLOCK_BYTES);
      root.freezeIfFull();
      if (blk % 256 === 0) {
        await (root.writable() ?? new Promise((resolve) => setImmediate(resolve)));
        rssMax = Math.max(rssMax, process.memoryUsage().rss);
      }
    }
    await root.flush();
    await store.compaction.settled();
    rssMax = Math.max(rssMax, process.memoryUsage().rss);
    const createTimes: number[] = [];
    const coldTimes: number[] = [];
    for (let n = 0; n < 200; n++) {
      createTimes.push(await elapsedMs(() => create(store, root, 2 + n)));
      const branch = store.get(id(2 + n));
      for (let i = 0; i < 10; i++) {
        const blk = Math.floor((((n * 10 + i) * 0.6180339887) % 1) * blocks);
        const startMs = performance.now();
        branch.getPages(FORK, blk, 1, branch.lastRecordLsn);
        coldTimes.push((performance.now() - startMs) * 1000);
      }
    }
    return {
      createMs: median(createTimes),
      coldUs: median(coldTimes),
      coldP99Us: percentile(coldTimes, 0.99),
      loadRssMb: (rssMax - rssBefore) / 1e6,
    };
  });
}

async function manyBranches(count: number): Promise<Row[]> {
  return withStore(async (store, root) => {
    root.put(relationSizeKey(FORK.spc, FORK.db, FORK.rel, 0), LSN + 8, encodeCountImage(1));
    root.advance(LSN + 8, LSN);
    collectHeap();
    const before = process.memoryUsage();
    const times: number[] = [];
    for (let n = 0; n < count; n++) times.push(await elapsedMs(() => create(store, root, 2 + n)));
    collectHeap();
    const after = process.memoryUsage();
    const bytes = after.heapUsed + after.external - before.heapUsed - before.external;
    const last = times.slice(-Math.min(1000, count / 2));
    const present = count.toLocaleString('en');
    const common = { vanilla: undefined, isRate: false } as const;
    return [
      {
        ...common,
        question: `page store: create a branch, ${present} present, p50 (p99 in note)`,
        unit: 'ms',
        strata: median(last),
        note: `p99 ${percentile(last, 0.99).toFixed(2)} ms; the first 100: ${median(times.slice(0, 100)).toFixed(2)} ms`,
      },
      {
        ...common,
        question: `page store: memory of each of ${present} branches`,
        unit: 'kB',
        strata: bytes / count / 1000,
        note: `process grew by ${((after.rss - before.rss) / 1e6).toFixed(0)} MB`,
      },
    ];
  });
}

function create(store: Timelines, root: Timeline, n: number): Promise<Timeline> {
  const { lastRecordLsn: ancestorLsn, lastRecordStartLsn: ancestorRecordLsn } = root;
  const ids = { tenantId: id(1), timelineId: id(n), ancestorTimelineId: id(1) };
  return store.create({ ...ids, ancestorLsn, ancestorRecordLsn });
}

function fill(page: Buffer, seed: number): void {
  let x = (seed + 1) | 0;
  for (let i = 0; i < BLOCK_BYTES; i += 8) {
    x = (Math.imul(x, 1103515245) + 12345) | 0;
    page.writeInt32LE(x, i);
  }
}

function collectHeap(): void {
  setFlagsFromString('--expose-gc');
  const collect = runInNewContext('gc') as () => void;
  for (let i = 0; i < 3; i++) collect();
}
