/**
 * Does finding what changed cost what changed, and not what there is? Windows of one change and of many, in a branch and in the history of a large timeline after
 * everything was merged into one run; against the floor of reading all of its index.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLog } from '../src/base/log.ts';
import { ChangeScan } from '../src/pageserver/changes.ts';
import { relationBlockKey, relationSizeKey } from '../src/pageserver/key.ts';
import { replayValue } from '../src/pageserver/replay.ts';
import type { Timeline } from '../src/pageserver/timeline.ts';
import { Timelines } from '../src/pageserver/timelines.ts';
import { encodeCountImage, encodeDerived } from '../src/pageserver/value.ts';
import type { Row } from './measure.ts';

const LSN = 0x1000000;
const FORK = { spc: 1663, db: 5, rel: 16384, fork: 0 };
const ROUNDS = 5;
const id = (n: number): string => n.toString(16).padStart(32, '0');

export async function changes({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const directory = mkdtempSync(join(tmpdir(), 'strata-bench-changes-'));
  const log = createLog({ name: 'bench', level: 'error' });
  const store = await Timelines.open(directory, { replay: replayValue, log });
  try {
    const blocks = quick ? 200_000 : 2_000_000;
    const root = await store.import(
      { tenantId: id(1), timelineId: id(1), pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 },
      async (target) => {
        target.put(relationSizeKey(FORK.spc, FORK.db, FORK.rel, 0), encodeCountImage(blocks).subarray(1));
        await target.drain();
      },
    );
    await change(root, blocks, blocks);
    const rows: Row[] = [await measure('all of a large timeline', root, LSN)];
    for (const count of [1, 100, 10_000]) {
      const from = root.lastRecordLsn;
      await change(root, blocks, count);
      await store.compaction.merge(root, (runs) => runs);
      rows.push(await measure(`${count} in a large timeline, merged into one run`, root, from));
      const branchLsn = root.lastRecordLsn;
      const branch = await store.create({
        tenantId: id(1),
        timelineId: id(count + 1),
        ancestorTimelineId: id(1),
        ancestorLsn: branchLsn,
        ancestorRecordLsn: branchLsn - 8,
      });
      await change(branch, blocks, count);
      rows.push(await measure(`${count} in a branch of it`, branch, branchLsn));
    }
    return rows;
  } finally {
    await store.close();
    rmSync(directory, { recursive: true, force: true });
  }
}

/** Changes `count` neighbouring blocks in the middle, in one record, and flushes. */
async function change(timeline: Timeline, blocks: number, count: number): Promise<void> {
  const first = Math.floor((blocks - count) / 2);
  const value = encodeDerived(1, Buffer.alloc(60, count));
  for (let blk = first; blk < first + count;) {
    const lsn = timeline.lastRecordLsn + 8;
    for (let i = 0; i < 10_000 && blk < first + count; i++, blk++) {
      timeline.put(relationBlockKey(FORK.spc, FORK.db, FORK.rel, 0, blk), lsn, value);
    }
    timeline.advance(lsn, lsn - 8);
    timeline.freezeIfFull();
    await timeline.writable();
  }
  await timeline.flush();
}

/** Processor time, the smallest of some rounds. */
async function measure(what: string, timeline: Timeline, fromLsn: number): Promise<Row> {
  let best = Infinity;
  let found = 0;
  let keyBlocks = 0;
  for (let round = 0; round < ROUNDS; round++) {
    const start = process.cpuUsage();
    const scan = new ChangeScan(timeline, { fromLsn, toLsn: timeline.lastRecordLsn });
    found = 0;
    for (let piece = await scan.next(); piece !== undefined; piece = await scan.next()) {
      for (const [from, to] of piece.ranges) found += to - from;
    }
    const { user, system } = process.cpuUsage(start);
    best = Math.min(best, (user + system) / 1000);
    keyBlocks = scan.keyBlocksRead;
  }
  const note = `${found} blocks found in ${keyBlocks} key blocks; processor time`;
  return { question: `what changed: ${what}`, unit: 'ms', vanilla: undefined, strata: best, isRate: false, note };
}
