/**
 * A process is killed (kill -9) at each step that it names, and between any two changes of its disk that chance picks; what it leaves must be the state at some
 * record at or past the last flush that it was told of, whole, with no file that belongs to nothing.
 */

import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { checkStore, newModel } from '../../test/pageserver/check-store.ts';
import { RECORD_BYTES, START_LSN } from '../../test/pageserver/crash-writer.ts';
import { FaultyDisk } from '../../test/pageserver/faulty-disk.ts';
import { runUntilKilled } from '../../test/pageserver/run-until-killed.ts';
import { LOCAL_STEPS } from './step.ts';
import type { Step } from './step.ts';

const WRITER = join(import.meta.dirname, '../../test/pageserver/crash-writer.ts');
const seed = Number(process.env['STRATA_TEST_SEED'] ?? Date.now() % 1_000_000);
const randomRounds = Number(process.env['STRATA_TEST_RUNS'] ?? 6);
const REACH_MS = 60_000;
/** An import is made once. */
const ONCE: readonly Step[] = ['import folder made', 'imported layers written'];
/** Of the disk, in a cycle of flushes, merges, a branch and its deletion. */
const CHANGES = 400;

describe(`a killed store comes back whole (seed ${seed})`, () => {
  const model = newModel();
  let scratch: string;
  let directory: string;
  let disk: FaultyDisk | undefined;

  before(() => {
    scratch = mkdtempSync(join(tmpdir(), 'strata-crash-'));
    directory = join(scratch, 'store');
    mkdirSync(directory);
    disk = FaultyDisk.make(directory, scratch);
  });
  after(() => rmSync(scratch, { recursive: true, force: true }));

  async function check(lines: readonly string[], what: string): Promise<void> {
    await checkStore(directory, { seed, confirmedLsn: Number(lines.at(-1) ?? START_LSN), model, what });
  }

  for (const [number, step] of LOCAL_STEPS.entries()) {
    const count = ONCE.includes(step) ? 1 : 1 + ((seed + number) % 3);
    test(`at "${step}", the ${count}. time`, { timeout: 2 * REACH_MS }, async () => {
      const { lines, wasItself } = await runUntilKilled(WRITER, [directory, seed, step, count], REACH_MS);
      assert(wasItself, `it never came to "${step}"`);
      await check(lines, step);
    });
  }

  for (let round = 0; round < randomRounds; round++) {
    const changes = (seed * 31 + round * 173) % CHANGES;
    test(`before it changes the disk for the ${changes + 1}. time`, { timeout: 2 * REACH_MS }, async (context) => {
      if (disk === undefined) return context.skip('there is no C compiler');
      disk.killAfter(changes);
      const { lines, wasItself } = await runUntilKilled(WRITER, [directory, seed, ''], REACH_MS, disk.environment);
      assert(wasItself);
      await check(lines, `${changes} changes`);
    });
  }

  test('much was written meanwhile', () => assert(model.lastRecordLsn > START_LSN + 400 * RECORD_BYTES));
});
