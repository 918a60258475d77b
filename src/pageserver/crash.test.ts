/**
 * A process is killed at any moment; what it leaves must be the state at some record at or past the last flush that it was told of, whole,
 * with no file that belongs to nothing.
 */

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { IMPORTED, putsOf, RECORD_BYTES, ROOT, START_LSN, STEPS } from '../../test/pageserver/crash-writer.ts';
import { ModelTimeline, replayPoke } from '../../test/pageserver/history-model.ts';
import { createLog } from '../base/log.ts';
import { ALL_KEYS, KEY_KIND } from './key.ts';
import type { Key } from './key.ts';
import { layerFileName } from './layers/layer-format.ts';
import { Timelines } from './timelines.ts';
import { encodeImage } from './value.ts';

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
  const model = new ModelTimeline(START_LSN);
  for (const [key, image] of IMPORTED) model.puts.push({ key, lsn: START_LSN, value: encodeImage(image) });
  try {
    for (let round = 0; round < rounds; round++) {
      const isAtStep = round % 2 === 0;
      const step = isAtStep ? STEPS[(round / 2) % STEPS.length]! : '';
      const count = 1 + ((seed + round) % 3);
      const killAfterMs = isAtStep ? 20_000 : 300 + ((seed * round) % 500);
      const confirmedLsn = await runUntilKilled(directory, step, count, killAfterMs);
      const log = createLog({ name: 'test', level: 'error' });
      const timelines = await Timelines.open(directory, { replay: replayPoke, log });
      assert.equal(timelines.broken.size, 0);
      for (const { directory: folder, index } of timelines.all()) {
        const named = index.layers.map((layer) => layerFileName(layer));
        assert.deepEqual(readdirSync(folder).sort(), [...named, 'index'].sort());
      }
      const root = timelines.find(ROOT);
      if (root === undefined) {
        assert.equal(confirmedLsn, START_LSN, 'the import did not end');
        continue;
      }
      const lsn = root.lastRecordLsn;
      assert(lsn >= confirmedLsn, `round ${round}: ${lsn} is there, ${confirmedLsn} was confirmed`);
      while (model.lastRecordLsn < lsn) {
        model.lastRecordLsn += RECORD_BYTES;
        for (const [key, value] of putsOf(seed, model.lastRecordLsn)) {
          model.puts.push({ key, lsn: model.lastRecordLsn, value });
        }
      }
      const oldest = root.oldestLsn;
      // Blocks past their fork's end are nobody's to read, and go with what is collected.
      const readable = (entries: [Key, Buffer][]): [Key, Buffer][] => {
        const sizes = new Map(entries.map(([key, image]) => [key.kind * 2 ** 32 + key.rel, image]));
        return entries.filter(([{ kind, rel, blk }]) => {
          const size = sizes.get(KEY_KIND.relationSize * 2 ** 32 + rel)?.readUInt32LE(0) ?? 0;
          return kind !== KEY_KIND.relationBlock || blk < size;
        });
      };
      for (const at of [oldest, oldest + Math.floor((lsn - oldest) / 3), lsn]) {
        const found = readable(root.scan(ALL_KEYS, at));
        assert.deepEqual(found, readable(model.scan(ALL_KEYS, at)), `round ${round}: the state at ${at}`);
      }
      for (const branch of timelines.all()) {
        if (branch !== root) assert.equal(branch.ancestor, root);
      }
      // What a child inherits is what the model had there.
      const branch = [...timelines.all()].find(
        (timeline) => timeline !== root && timeline.isVisible(timeline.index.startLsn),
      );
      if (branch !== undefined) {
        const at = branch.index.startLsn;
        assert.deepEqual(readable(branch.scan(ALL_KEYS, at)), readable(model.scan(ALL_KEYS, at)));
      }
      await timelines.close();
    }
    assert(model.lastRecordLsn > START_LSN + 400 * RECORD_BYTES, 'much was written');
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
});
