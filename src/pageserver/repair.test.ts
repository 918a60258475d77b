/**
 * A pageserver is killed (kill -9) at each step of making a layer anew from WAL. What it leaves is whole, or still damaged where it was, and repaired then; no file
 * is left that belongs to nothing, and every state that is read is that of a store which was never damaged.
 */

import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { openRepairable, type Repairable, START_LSN } from '../../test/pageserver/repair-writer.ts';
import { runUntilKilled } from '../../test/pageserver/run-until-killed.ts';
import { layerFileName } from './layers/layer-format.ts';
import { REPAIR_STEPS } from './step.ts';
import type { Step } from './step.ts';

const WRITER = join(import.meta.dirname, '../../test/pageserver/repair-writer.ts');
const REACH_MS = 60_000;
/** Of a merge, but layers that were made anew are named and removed so too. */
const STEPS: readonly Step[] = [...REPAIR_STEPS, 'compacted index written', 'compacted layer removed'];

describe('a store that is killed while it repairs a layer comes back whole', () => {
  let scratch: string;
  let sound: Repairable;

  before(async () => {
    scratch = mkdtempSync(join(tmpdir(), 'strata-repair-'));
    sound = await openRepairable(join(scratch, 'sound'));
  });
  after(async () => {
    await sound.timelines.close();
    rmSync(scratch, { recursive: true, force: true });
  });

  for (const [number, step] of STEPS.entries()) {
    const count = 1 + (number % 3);
    test(`at "${step}", the ${count}. time`, { timeout: 2 * REACH_MS }, async () => {
      const directory = join(scratch, 'damaged');
      const { lines, wasItself } = await runUntilKilled(WRITER, [directory, step, count], REACH_MS);
      assert(wasItself, `it never came to "${step}"`);
      const { timelines, root, state } = await openRepairable(directory);
      try {
        assert.equal(timelines.broken.size, 0);
        assert.deepEqual(readdirSync(join(root.directory, '..')), [root.timelineId], 'no shadow is left');
        const files = (): string[] => readdirSync(root.directory).sort();
        const named = (): string[] => [...root.index.layers.map((layer) => layerFileName(layer)), 'index'].sort();
        assert.deepEqual(files(), named());
        const { lastRecordLsn } = root;
        assert(lastRecordLsn >= Number(lines.at(-1) ?? START_LSN));
        while (sound.root.lastRecordLsn < lastRecordLsn) sound.take(1);
        for (const lsn of [START_LSN, START_LSN + Math.floor((lastRecordLsn - START_LSN) / 3), lastRecordLsn]) {
          assert.deepEqual(await state(lsn), await sound.state(lsn), `the state at ${lsn}`);
        }
        assert.deepEqual(files(), named());
      } finally {
        await timelines.close();
      }
    });
  }
});
