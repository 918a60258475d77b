/**
 * A process is killed at any moment; what it leaves must be the state at some record at or past the last flush that it was told of, whole,
 * with no file that belongs to nothing.
 */

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { checkStore, newModel } from '../../test/pageserver/check-store.ts';
import { RECORD_BYTES, START_LSN, STEPS } from '../../test/pageserver/crash-writer.ts';

const WRITER = join(import.meta.dirname, '../../test/pageserver/crash-writer.ts');
const seed = Number(process.env['STRATA_TEST_SEED'] ?? Date.now() % 1_000_000);
const rounds = Number(process.env['STRATA_TEST_RUNS'] ?? 2 * STEPS.length);

/** Runs a writer until it dies; gives the last LSN that it was told is durable. */
async function runUntilKilled(directory: string, step: string, count: number, killAfterMs: number): Promise<number> {
  const child = spawn(process.execPath, [WRITER, directory, String(seed), step, String(count)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (output += text));
  const exited = new Promise<void>((resolve, reject) => {
    child.once('close', (code, signal) => {
      if (signal === 'SIGKILL') resolve();
      else reject(new Error(`the writer ended by itself: ${code ?? signal}`));
    });
  });
  void sleep(killAfterMs).then(() => child.kill('SIGKILL'));
  await exited;
  return Number(output.split('\n').at(-2) ?? START_LSN);
}

test(`a killed store comes back whole (seed ${seed})`, { timeout: 120_000 }, async () => {
  const directory = mkdtempSync(join(tmpdir(), 'strata-crash-'));
  const model = newModel();
  try {
    for (let round = 0; round < rounds; round++) {
      const isAtStep = round % 2 === 0;
      const step = isAtStep ? STEPS[(round / 2) % STEPS.length]! : '';
      const count = 1 + ((seed + round) % 3);
      const killAfterMs = isAtStep ? 20_000 : 300 + ((seed * round) % 500);
      const confirmedLsn = await runUntilKilled(directory, step, count, killAfterMs);
      await checkStore(directory, { seed, confirmedLsn, model, what: `round ${round}` });
    }
    assert(model.lastRecordLsn > START_LSN + 400 * RECORD_BYTES, 'much was written');
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
});
