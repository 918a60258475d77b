/**
 * A process that writes history to a disk and an object store until it is killed, as crash-writer.ts does to a disk alone. Run as a child of the crash test:
 *
 *   remote-crash-writer.ts <directory> <disk> <seed> <step> <count>     it dies when it comes to the named step for the count-th time; '': never by itself
 *
 * <directory> has `store/` and the state that generations come from; <disk> is the pageserver's own, and may be empty. Each line of its output is something that was
 * acknowledged: `flushed <LSN>`, `confirmed <LSN>` (remoteConsistentLsn), `made <timeline>`, `deleted <timeline>`.
 */

import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Settings } from '../../src/control/settings.ts';
import { FileSystemStore } from '../../src/object-store/file-system-store.ts';
import { ALL_KEYS } from '../../src/pageserver/key.ts';
import { LEASE_MS } from '../../src/pageserver/retention.ts';
import { BRANCHES_MAX, IMPORTED, RECORD_BYTES, ROOT, START_LSN, takeRecord } from './crash-writer.ts';
import { farStore, TestNode } from './node.ts';

/** How far back history is kept. */
const HISTORY_BYTES = 600 * RECORD_BYTES;

async function write(directory: string, disk: string, seed: number, dieAt: string, dieAtCount: number): Promise<never> {
  let stepCount = 0;
  let nowMs = Date.now();
  const say = (what: string): void => void process.stdout.write(`${what}\n`);
  const node = await TestNode.open({
    directory: disk,
    store: farStore(await FileSystemStore.open(join(directory, 'store'))),
    generations: Settings.open(directory),
    limits: { flushBytes: 30_000, frozenLayersMax: 2, collectBytesMin: 20_000 },
    cacheBytes: 60_000,
    now: () => nowMs,
    lsnAt: ({ diskConsistentLsn }) => Math.max(START_LSN, diskConsistentLsn - HISTORY_BYTES),
    onStep: (step) => {
      if (step === dieAt && ++stepCount === dieAtCount) process.kill(process.pid, 'SIGKILL');
    },
  });
  const { timelines } = node;
  nowMs += LEASE_MS;
  let root = timelines.find(ROOT);
  root ??= await timelines.import(
    { tenantId: ROOT, timelineId: ROOT, pgVersion: 17, lsn: START_LSN, recordLsn: START_LSN - RECORD_BYTES },
    async (target) => {
      for (const [key, image] of IMPORTED) target.put(key, image);
      await target.drain();
    },
  );
  say(`made ${ROOT}`);
  for (;;) {
    // What was evicted, or was never here, is fetched.
    await node.scan(ROOT, ALL_KEYS, root.lastRecordLsn);
    for (let i = 0; i < 400; i++) {
      await takeRecord(root, seed, root.lastRecordLsn + RECORD_BYTES);
    }
    await root.flush();
    say(`flushed ${root.diskConsistentLsn}`);
    await timelines.garbage.run([root]);
    await node.eviction.run();
    await sleep(20);
    say(`confirmed ${root.remoteConsistentLsn}`);
    const branches = [...timelines.all()].filter((timeline) => timeline !== root);
    if (branches.length < BRANCHES_MAX) {
      const lsn = root.lastRecordLsn;
      const timelineId = lsn.toString().padStart(32, 'b');
      const at = { ancestorTimelineId: ROOT, ancestorLsn: lsn, ancestorRecordLsn: lsn - RECORD_BYTES };
      say(`making ${timelineId}`);
      await timelines.create({ tenantId: ROOT, timelineId, ...at });
      say(`made ${timelineId}`);
    } else {
      const { timelineId } = branches[0]!;
      say(`deleting ${timelineId}`);
      await timelines.delete(timelineId);
      say(`deleted ${timelineId}`);
    }
  }
}

if (process.argv[1] === import.meta.filename) {
  const [directory, disk, seed, dieAt, dieAtCount] = process.argv.slice(2);
  await write(directory!, disk!, Number(seed), dieAt!, Number(dieAtCount));
}
