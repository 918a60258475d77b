/** What does a page cost that a branch inherits through a thousand nested branches, each with changes of its own? */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLog } from '../src/base/log.ts';
import type { Logger } from '../src/base/log.ts';
import { signToken } from '../src/base/token.ts';
import { PageService } from '../src/pageserver/page-service.ts';
import { relationBlockKey, relationSizeKey } from '../src/pageserver/key.ts';
import { replayValue } from '../src/pageserver/replay.ts';
import { Timelines } from '../src/pageserver/timelines.ts';
import { encodeImage } from '../src/pageserver/value.ts';
import { PageAsker } from './page-client.ts';
import { median, type Row } from './measure.ts';

const LSN = 0x1000000;
const FORK = { spc: 1663, db: 5, rel: 16384, fork: 0 };
const BLOCKS = 2000;

export async function nestedBranches({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const directory = mkdtempSync(join(tmpdir(), 'strata-bench-nested-'));
  const log = createLog({ name: 'bench', level: 'error' });
  const store = await Timelines.open(directory, { replay: replayValue, log, limits: { pageCacheBytes: 0 } });
  try {
    const depth = quick ? 200 : 1000;
    const id = (n: number): string => n.toString(16).padStart(32, '0');
    const root = { tenantId: id(1), timelineId: id(1), pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 } as const;
    await store.import(root, async (target) => {
      target.put(relationSizeKey(FORK.spc, FORK.db, FORK.rel, 0), Buffer.from(new Uint32Array([BLOCKS]).buffer));
      for (let blk = 0; blk < BLOCKS; blk++) {
        target.put(relationBlockKey(FORK.spc, FORK.db, FORK.rel, 0, blk), Buffer.alloc(8192, blk));
        await target.drain();
      }
    });
    for (let n = 2; n <= depth; n++) {
      const { lastRecordLsn: lsn } = store.get(id(n - 1));
      const ids = { tenantId: id(1), timelineId: id(n), ancestorTimelineId: id(n - 1) };
      const timeline = await store.create({ ...ids, ancestorLsn: lsn, ancestorRecordLsn: lsn - 8 });
      for (let i = 0; i < 5; i++) {
        const key = relationBlockKey(FORK.spc, FORK.db, FORK.rel, 0, 1000 + ((n * 5 + i) % 1000));
        timeline.put(key, lsn + 8, encodeImage(Buffer.alloc(8192, n)));
      }
      timeline.advance(lsn + 8, lsn);
      await timeline.flush();
    }
    const roundUs = (n: number): number => {
      const timeline = store.get(id(n));
      const startMs = performance.now();
      for (let i = 0; i < 1000; i++) timeline.getPages(FORK, (i * 7) % 1000, 1, timeline.lastRecordLsn);
      return performance.now() - startMs;
    };
    const times: [first: number, deepest: number][] = [];
    // The first rounds are for V8's compiler and the caches.
    for (let round = 0; round < 25; round++) times.push([roundUs(1), roundUs(depth)]);
    const first = median(times.slice(4).map(([us]) => us));
    const deepest = median(times.slice(4).map(([, us]) => us));
    const [firstOverSocketUs, deepestOverSocketUs] = await overSocketUs(store, log, [id(1), id(depth)], quick);
    return [
      {
        question: `GetPage of a page of the root, through ${depth} nested branches, p50`,
        unit: 'µs',
        vanilla: undefined,
        strata: deepestOverSocketUs!,
        isRate: false,
        note: `${(deepestOverSocketUs! / firstOverSocketUs!).toFixed(2)} × the root's own ${firstOverSocketUs!.toFixed(0)} µs`,
      },
      {
        question: `a page of the root, read through ${depth} nested branches`,
        unit: 'µs',
        vanilla: undefined,
        strata: deepest,
        isRate: false,
        note: `${(deepest / first).toFixed(2)} × the root's own ${first.toFixed(1)} µs, no page cached, in process`,
      },
    ];
  } finally {
    await store.close();
    rmSync(directory, { recursive: true, force: true });
  }
}

/** The median of single pages, for each timeline; in turns. */
async function overSocketUs(
  store: Timelines,
  log: Logger,
  timelineIds: readonly string[],
  quick: boolean,
): Promise<number[]> {
  const secret = Buffer.alloc(32, 1);
  const host = '127.0.0.1';
  const service = await PageService.start({ host, port: 0, secret, timelines: store, log });
  using asker = new PageAsker();
  try {
    const token = await signToken(secret, { scope: 'platform' });
    const times: number[][] = timelineIds.map(() => []);
    for (let round = 0; round < (quick ? 2 : 4); round++) {
      for (const [i, timelineId] of timelineIds.entries()) {
        const table = { spc: FORK.spc, db: FORK.db, rel: FORK.rel, blocks: 1000 };
        const lsn = store.get(timelineId).lastRecordLsn;
        const work = { host, port: service.port, token, timelineId, table, lsn, singles: 1000, from: 0, to: 1 };
        times[i]!.push(...(await asker.ask(work)).singlesUs);
      }
    }
    return times.map(median);
  } finally {
    await service.close();
  }
}
