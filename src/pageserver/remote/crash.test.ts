/**
 * A pageserver is killed (kill -9) at any step of upload, index switch, delete, fetch and start; the next begins with its disk or with an empty one. What was acknowledged is
 * there, and every page that is read is what an independent replay makes of it.
 */

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { IMPORTED, putsOf, RECORD_BYTES, ROOT, START_LSN } from '../../../test/pageserver/crash-writer.ts';
import { ModelTimeline } from '../../../test/pageserver/history-model.ts';
import { farStore, TestNode } from '../../../test/pageserver/node.ts';
import { REMOTE_STEPS } from '../../../test/pageserver/remote-crash-writer.ts';
import { Settings } from '../../control/settings.ts';
import { FileSystemStore } from '../../object-store/file-system-store.ts';
import { ALL_KEYS, KEY_KIND } from '../key.ts';
import type { KeyImage } from '../read.ts';
import { encodeImage } from '../value.ts';

const WRITER = join(import.meta.dirname, '../../../test/pageserver/remote-crash-writer.ts');
const seed = Number(process.env['STRATA_TEST_SEED'] ?? Date.now() % 1_000_000);
const rounds = Number(process.env['STRATA_TEST_RUNS'] ?? REMOTE_STEPS.length);

/** What was acknowledged before it died. */
interface Told {
  flushedLsn: number;
  confirmedLsn: number;
  readonly made: Set<string>;
  readonly deleted: Set<string>;
}

async function runUntilKilled(
  directory: string,
  disk: string,
  step: string,
  count: number,
  killAfterMs: number,
  told: Told,
): Promise<boolean> {
  const child = spawn(process.execPath, [WRITER, directory, disk, String(seed), step, String(count)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (output += text));
  let wasAtStep = true;
  const exited = new Promise<void>((resolve, reject) => {
    child.once('close', (code, signal) => {
      if (signal === 'SIGKILL') resolve();
      else reject(new Error(`the writer ended by itself: ${code ?? signal}`));
    });
  });
  const ended = new AbortController();
  void sleep(killAfterMs, undefined, { signal: ended.signal }).then(
    () => {
      wasAtStep = false;
      child.kill('SIGKILL');
    },
    () => {},
  );
  await exited;
  ended.abort();
  for (const line of output.split('\n').slice(0, -1)) {
    const [what, value] = line.split(' ') as [string, string];
    if (what === 'flushed') told.flushedLsn = Number(value);
    else if (what === 'confirmed') told.confirmedLsn = Math.max(told.confirmedLsn, Number(value));
    else if (what === 'made') {
      told.made.add(value);
      told.deleted.delete(value);
    } else {
      told.made.delete(value);
      if (what === 'deleted') told.deleted.add(value);
      else told.deleted.delete(value);
    }
  }
  return wasAtStep;
}

/** Blocks past their fork's end are nobody's to read, and go with what is collected. */
function readable(entries: readonly KeyImage[]): KeyImage[] {
  const sizes = new Map(entries.map(([key, image]) => [key.kind * 2 ** 32 + key.rel, image]));
  return entries.filter(([{ kind, rel, blk }]) => {
    const size = sizes.get(KEY_KIND.relationSize * 2 ** 32 + rel)?.readUInt32LE(0) ?? 0;
    return kind !== KEY_KIND.relationBlock || blk < size;
  });
}

test(
  `a killed pageserver's store is whole, with and without its disk (seed ${seed})`,
  { timeout: 280_000 },
  async () => {
    const directory = mkdtempSync(join(tmpdir(), 'strata-remote-crash-'));
    const model = new ModelTimeline(START_LSN);
    for (const [key, image] of IMPORTED) model.puts.push({ key, lsn: START_LSN, value: encodeImage(image) });
    const told: Told = { flushedLsn: START_LSN, confirmedLsn: START_LSN, made: new Set(), deleted: new Set() };
    const stepsReached = new Set<string>();
    let diskCount = 0;
    try {
      for (let round = 0; round < rounds; round++) {
        const step = round % 4 === 3 ? '' : REMOTE_STEPS[(round * 7) % REMOTE_STEPS.length]!;
        const disk = join(directory, `disk-${diskCount}`);
        const killAfterMs = step === '' ? 400 + ((seed * round) % 600) : 4_000;
        if (await runUntilKilled(directory, disk, step, 1 + ((seed + round) % 2), killAfterMs, told))
          stepsReached.add(step);
        const isLost = (seed + round) % 3 !== 0;
        if (isLost) {
          rmSync(disk, { recursive: true, force: true });
          diskCount++;
        }
        const settings = Settings.open(directory);
        const store = farStore(await FileSystemStore.open(join(directory, 'store')));
        const node = await TestNode.open({
          directory: join(directory, `disk-${diskCount}`),
          store,
          generations: settings,
        });
        assert.equal(node.timelines.broken.size, 0);
        for (const timelineId of told.made)
          assert(node.timelines.find(timelineId) !== undefined, `${timelineId} was made`);
        for (const timelineId of told.deleted) assert.equal(node.timelines.find(timelineId), undefined);
        const root = node.timelines.find(ROOT);
        if (root !== undefined) {
          const lsn = root.lastRecordLsn;
          const acknowledgedLsn = isLost ? told.confirmedLsn : told.flushedLsn;
          assert(lsn >= acknowledgedLsn, `round ${round}: ${lsn} is there, ${acknowledgedLsn} was acknowledged`);
          told.flushedLsn = lsn; // what was on a lost disk alone is written again
          while (model.lastRecordLsn < lsn) {
            model.lastRecordLsn += RECORD_BYTES;
            for (const [key, value] of putsOf(seed, model.lastRecordLsn)) {
              model.puts.push({ key, lsn: model.lastRecordLsn, value });
            }
          }
          const oldest = root.oldestLsn;
          for (const at of [oldest, oldest + Math.floor((lsn - oldest) / 3), lsn]) {
            const found = readable(await node.scan(ROOT, ALL_KEYS, at));
            assert.deepEqual(found, readable(model.scan(ALL_KEYS, at)), `round ${round}: the state at ${at}`);
          }
          const branch = [...node.timelines.all()].find(
            (timeline) => timeline !== root && timeline.isVisible(timeline.index.startLsn),
          );
          if (branch !== undefined) {
            const at = branch.index.startLsn;
            const found = readable(await node.scan(branch.timelineId, ALL_KEYS, at));
            assert.deepEqual(found, readable(model.scan(ALL_KEYS, at)), `round ${round}: the branch at ${at}`);
          }
        }
        await node.abandon();
        settings.close();
      }
      assert(model.lastRecordLsn > START_LSN + 400 * RECORD_BYTES, 'much was written');
      assert(stepsReached.size >= rounds / 4, `it came to ${[...stepsReached].join()} only`);
    } finally {
      rmSync(directory, { recursive: true, force: true, maxRetries: 5 });
    }
  },
);
