/**
 * A pageserver is killed (kill -9) at each step of upload, index switch, delete, fetch and start, and between any two changes of disk and store that chance picks; the
 * next begins with its disk, with an empty one, or with one that has stood aside for a while. What was acknowledged is there, and every page that is read is what an
 * independent replay makes of it.
 */

import assert from 'node:assert/strict';
import { cpSync, existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { bringOn, newModel, sampledLsns } from '../../../test/pageserver/check-store.ts';
import { RECORD_BYTES, ROOT, START_LSN } from '../../../test/pageserver/crash-writer.ts';
import { FaultyDisk } from '../../../test/pageserver/faulty-disk.ts';
import { farStore, TestNode } from '../../../test/pageserver/node.ts';
import { runUntilKilled } from '../../../test/pageserver/run-until-killed.ts';
import { Settings } from '../../control/settings.ts';
import { FileSystemStore } from '../../object-store/file-system-store.ts';
import { ALL_KEYS, KEY_KIND } from '../key.ts';
import type { KeyImage } from '../read.ts';
import { REMOTE_STEPS } from '../step.ts';
import type { Step } from '../step.ts';

const WRITER = join(import.meta.dirname, '../../../test/pageserver/remote-crash-writer.ts');
const seed = Number(process.env['STRATA_TEST_SEED'] ?? Date.now() % 1_000_000);
const randomRounds = Number(process.env['STRATA_TEST_RUNS'] ?? 4);
const REACH_MS = 60_000;
/** Of disk and store, in a cycle of flushes, uploads, merges, a branch and its deletion. */
const CHANGES = 1500;
/** Of the disk alone (../crash.test.ts), but what the store has must fit. */
const LOCAL: readonly Step[] = [
  'index written',
  'compacted index written',
  'compacted layer removed',
  'timeline deleted',
];
/** They come when a pageserver begins with an empty disk. */
const OF_EMPTY_DISKS: readonly Step[] = ['other layers removed', 'index taken', 'layer fetched'];

describe(`a killed pageserver's store is whole, with and without its disk (seed ${seed})`, () => {
  const model = newModel();
  /** What was acknowledged: `flushedLsn` by this disk, the rest by the store. */
  let flushedLsn = START_LSN;
  let confirmedLsn = START_LSN;
  const made = new Set<string>();
  const deleted = new Set<string>();
  let scratch: string;
  let directory: string;
  let faulty: FaultyDisk | undefined;
  /** The last is the one in use. */
  let disks: string[] = [];
  let diskCount = 0;

  before(() => {
    scratch = mkdtempSync(join(tmpdir(), 'strata-remote-crash-'));
    directory = join(scratch, 'all');
    faulty = FaultyDisk.make(directory, scratch);
    disks = [newDisk()];
  });
  after(() => rmSync(scratch, { recursive: true, force: true, maxRetries: 5 }));

  const newDisk = (): string => join(directory, `disk-${diskCount++}`);

  function use(disk: string): void {
    disks = [...disks.filter((each) => each !== disk), disk].slice(-3);
    flushedLsn = confirmedLsn; // What was on the other disk alone is written again.
  }

  /** Runs a writer on the disk in use; false when it never came to the step. */
  async function write(
    step: string,
    count: number,
    environment: Readonly<Record<string, string>> = {},
  ): Promise<boolean> {
    const args = [directory, disks.at(-1)!, seed, step, count];
    const { lines, wasItself } = await runUntilKilled(WRITER, args, REACH_MS, environment);
    for (const line of lines) {
      const [what, value] = line.split(' ') as [string, string];
      if (what === 'flushed') flushedLsn = Number(value);
      else if (what === 'confirmed') confirmedLsn = Math.max(confirmedLsn, Number(value));
      else if (what === 'made') {
        made.add(value);
        deleted.delete(value);
      } else {
        made.delete(value);
        if (what === 'deleted') deleted.add(value);
        else deleted.delete(value);
      }
    }
    return wasItself;
  }

  /** Opens a pageserver on a disk, which is in use from then on, and looks at everything. */
  async function check(disk: string, what: string): Promise<void> {
    if (disk !== disks.at(-1)) use(disk);
    const settings = Settings.open(directory);
    const store = farStore(await FileSystemStore.open(join(directory, 'store')));
    const node = await TestNode.open({ directory: disk, store, generations: settings });
    try {
      assert.equal(node.timelines.broken.size, 0);
      for (const timelineId of made) assert(node.timelines.find(timelineId) !== undefined, `${timelineId} was made`);
      for (const timelineId of deleted) assert.equal(node.timelines.find(timelineId), undefined);
      const root = node.timelines.find(ROOT);
      if (root === undefined) return;
      const lsn = root.lastRecordLsn;
      assert(lsn >= flushedLsn, `${what}: ${lsn} is there, ${flushedLsn} was acknowledged`);
      bringOn(model, seed, lsn);
      for (const at of sampledLsns(root)) {
        const found = readable(await node.scan(ROOT, ALL_KEYS, at));
        assert.deepEqual(found, readable(model.scan(ALL_KEYS, at)), `${what}: the state at ${at}`);
      }
      const branch = [...node.timelines.all()].find(
        (timeline) => timeline !== root && timeline.isVisible(timeline.index.startLsn),
      );
      if (branch === undefined) return;
      const at = branch.index.startLsn;
      const found = readable(await node.scan(branch.timelineId, ALL_KEYS, at));
      assert.deepEqual(found, readable(model.scan(ALL_KEYS, at)), `${what}: the branch at ${at}`);
    } finally {
      await node.abandon();
      settings.close();
    }
  }

  /** With the disk in use, an empty one, or an old one. */
  const nextDisk = (number: number): string => {
    const choice = (seed + number) % 3;
    return choice === 0 ? disks.at(-1)! : choice === 1 ? newDisk() : disks[0]!;
  };

  /** A disk on which there are timelines that were deleted after it was set aside. */
  async function diskOfBefore(): Promise<string> {
    assert(await write('timeline deleted', 1)); // There were three.
    const disk = newDisk();
    cpSync(disks.at(-1)!, disk, { recursive: true });
    const there = readdirSync(join(disk, 'timelines'));
    while (!there.some((id) => deleted.has(id))) assert(await write('timeline deleted', 2));
    return disk;
  }

  for (const [number, step] of [...REMOTE_STEPS, ...LOCAL].entries()) {
    const isOfStart = REMOTE_STEPS.indexOf(step as (typeof REMOTE_STEPS)[number]) < 5;
    const count = isOfStart ? 1 : 1 + ((seed + number) % 2);
    test(`at "${step}"${count === 1 ? '' : `, the ${count}. time`}`, { timeout: 5 * REACH_MS }, async () => {
      if (!existsSync(join(directory, 'store'))) await write('index uploaded', 3);
      if (step === 'local timeline removed') use(await diskOfBefore());
      if (OF_EMPTY_DISKS.includes(step)) use(newDisk());
      assert(await write(step, count), `it never came to "${step}"`);
      await check(nextDisk(number), step);
    });
  }

  for (let round = 0; round < randomRounds; round++) {
    const changes = (seed * 31 + round * 677) % CHANGES;
    test(`before it changes disk or store for the ${changes + 1}. time`, { timeout: 2 * REACH_MS }, async (context) => {
      if (faulty === undefined) return context.skip('there is no C compiler');
      faulty.killAfter(changes);
      assert(await write('', 0, faulty.environment));
      await check(nextDisk(round), `${changes} changes`);
    });
  }

  test('much was written meanwhile', () => assert(model.lastRecordLsn > START_LSN + 400 * RECORD_BYTES));
});

/** Blocks past their fork's end are nobody's to read, and go with what is collected. */
function readable(entries: readonly KeyImage[]): KeyImage[] {
  const sizes = new Map(entries.map(([key, image]) => [key.kind * 2 ** 32 + key.rel, image]));
  return entries.filter(([{ kind, rel, blk }]) => {
    const size = sizes.get(KEY_KIND.relationSize * 2 ** 32 + rel)?.readUInt32LE(0) ?? 0;
    return kind !== KEY_KIND.relationBlock || blk < size;
  });
}
