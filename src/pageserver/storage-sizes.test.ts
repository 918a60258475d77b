import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import fc from 'fast-check';
import { replayPoke } from '../../test/pageserver/history-model.ts';
import { createLog } from '../base/log.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { KEY_KIND, prefixRange, relationBlockKey, relationSizeKey } from './key.ts';
import type { RelationFork } from './key.ts';
import { StorageSizes } from './storage-sizes.ts';
import type { Timeline } from './timeline.ts';
import { Timelines } from './timelines.ts';
import { encodeCountImage, encodeImage, encodeTombstone } from './value.ts';

const TENANT = 'a'.repeat(32);
const LSN = 0x1000000;
const FORKS: readonly RelationFork[] = [100, 101, 102].map((rel) => ({ spc: 1663, db: 5, rel, fork: 0 }));
const IMPORTED_BLOCKS = 7;
const id = (n: number): string => n.toString(16).padStart(32, '0');

describe('what timelines take', () => {
  let directory: string;
  let timelines: Timelines;
  /** Blocks that the timeline itself has written. */
  const written = new Map<Timeline, Set<string>>();

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-sizes-'));
    timelines = await Timelines.open(directory, {
      replay: replayPoke,
      log: createLog({ name: 'test', level: 'silent' }),
      limits: { flushBytes: 20_000 },
    });
    const ids = { tenantId: TENANT, timelineId: id(1) };
    await timelines.import({ ...ids, pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 }, async (target) => {
      const { spc, db, rel, fork } = FORKS[0]!;
      target.put(relationSizeKey(spc, db, rel, fork), Buffer.from([IMPORTED_BLOCKS, 0, 0, 0]));
      await target.drain();
    });
    written.clear();
  });
  afterEach(async () => {
    await timelines.close();
    rmSync(directory, { recursive: true });
  });

  function write(timeline: Timeline, { spc, db, rel, fork }: RelationFork, blocks: number, blk: number): void {
    const lsn = timeline.lastRecordLsn + 8;
    const size = relationSizeKey(spc, db, rel, fork);
    timeline.put(size, lsn, blocks === 0 ? encodeTombstone() : encodeCountImage(blocks));
    if (blk < blocks) {
      timeline.put(relationBlockKey(spc, db, rel, fork, blk), lsn, encodeImage(Buffer.alloc(BLOCK_SIZE, 1)));
      const own = written.get(timeline) ?? new Set();
      written.set(timeline, own.add(`${rel} ${blk}`));
    }
    timeline.advance(lsn, lsn - 8);
    timeline.freezeIfFull();
  }

  function branch(n: number, of: Timeline): Promise<Timeline> {
    const ids = { tenantId: TENANT, timelineId: id(n), ancestorTimelineId: of.timelineId };
    return timelines.create({ ...ids, ancestorLsn: of.lastRecordLsn, ancestorRecordLsn: of.lastRecordLsn - 8 });
  }

  /** By reading every size. */
  function naive(timeline: Timeline): { logicalBytes: number; sharedBytes: number } {
    let logical = 0;
    let changed = 0;
    for (const [{ rel }, size] of timeline.scan(prefixRange(KEY_KIND.relationSize), timeline.lastRecordLsn)) {
      const blocks = size.readUInt32LE(0);
      logical += blocks;
      for (let blk = 0; blk < blocks; blk++) if (written.get(timeline)?.has(`${rel} ${blk}`)) changed++;
    }
    return { logicalBytes: logical * BLOCK_SIZE, sharedBytes: (logical - changed) * BLOCK_SIZE };
  }

  test('sizes that are counted on from what is known are those that reading everything gives', async () => {
    const step = fc.record({
      kind: fc.constantFrom('write', 'write', 'write', 'branch', 'flush', 'ask', 'forget'),
      pick: fc.nat(100),
      fork: fc.nat(FORKS.length - 1),
      blocks: fc.nat(9),
      blk: fc.nat(9),
    });
    const all = [timelines.get(id(1))];
    let n = 2;
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 60 }), async (steps) => {
        let sizes = new StorageSizes();
        for (const { kind, pick, fork, blocks, blk } of steps) {
          const timeline = all[pick % all.length]!;
          if (kind === 'write') write(timeline, FORKS[fork]!, blocks, blk);
          else if (kind === 'branch') all.push(await branch(n++, timeline));
          else if (kind === 'flush') await timeline.flush();
          else if (kind === 'forget') sizes = new StorageSizes();
          else {
            const { logicalBytes, sharedBytes } = await sizes.of(timeline, 0);
            const expected = naive(timeline);
            assert.equal(logicalBytes, expected.logicalBytes);
            if (timeline.ancestor !== undefined) assert.equal(sharedBytes, expected.sharedBytes);
          }
        }
      }),
      { numRuns: 40 },
    );
  });

  test('branches that nobody has written to are counted from what their parent is', async () => {
    const root = timelines.get(id(1));
    let branches = await Promise.all(Array.from({ length: 20 }, (_, i) => branch(100 + i, root)));
    write(root, FORKS[1]!, 3, 0);
    branches = [...branches, ...(await Promise.all(Array.from({ length: 20 }, (_, i) => branch(200 + i, root))))];
    const sizes = new StorageSizes();
    const found = [];
    for (const timeline of branches) found.push((await sizes.of(timeline, 0)).logicalBytes / BLOCK_SIZE);
    assert.deepEqual(
      found,
      branches.map((_, i) => (i < 20 ? IMPORTED_BLOCKS : IMPORTED_BLOCKS + 3)),
    );
  });
});
