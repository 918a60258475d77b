/**
 * A process that writes history until it is killed: an endless log of records on one timeline, the same for the same seed, frozen and
 * flushed often, with branches made and deleted on the way. Run as a child of the crash test:
 *
 *   crash-writer.ts <directory> <seed> <step> <count>     it dies when it comes to the named step for the count-th time; '': never by itself
 *   crash-writer.ts <directory> <seed> faulty             its disk may fail: it goes on, and ends with 3 when it reads what is not so
 *
 * It begins where the store says that it is, as a pageserver does that pulls WAL again. Each line of its output is an LSN up to which a
 * flush was confirmed.
 */

import { setTimeout as sleep } from 'node:timers/promises';
import { createLog } from '../../src/base/log.ts';
import { databaseKey, makeKey, KEY_KIND, relationBlockKey, relationSizeKey } from '../../src/pageserver/key.ts';
import type { Key } from '../../src/pageserver/key.ts';
import { LayerDamagedError } from '../../src/pageserver/layers/block.ts';
import { LEASE_MS } from '../../src/pageserver/retention.ts';
import type { Timeline } from '../../src/pageserver/timeline.ts';
import { Timelines } from '../../src/pageserver/timelines.ts';
import { encodeCountImage, encodeImage, encodeTombstone } from '../../src/pageserver/value.ts';
import { encodePoke, ModelTimeline, replayPoke } from './history-model.ts';

export const BRANCHES_MAX = 3;
export const ROOT = '1'.padStart(32, '0');
export const START_LSN = 0x100000;
export const RECORD_BYTES = 8;
/** Of each relation; no relation ever has fewer, as then what it grows over would have to begin anew (ingest.ts). */
const BLOCKS = 40;
/** Of so many records one replaces all blocks of this relation. */
const BULK_EVERY = 331;
const COPIED_REL = 16385;
/** How far back history is kept. */
const HISTORY_BYTES = 600 * RECORD_BYTES;

/** What is imported: values at START_LSN. */
export const IMPORTED: readonly [Key, Buffer][] = [
  [databaseKey(1663, 0), Buffer.from('first')],
  ...[16384, 16385, 16386].map((rel): [Key, Buffer] => [
    relationSizeKey(1663, 5, rel, 0),
    Buffer.from([BLOCKS, 0, 0, 0]),
  ]),
];

/** The puts of the record that ends at `lsn`, those in bulk first. */
export function putsOf(seed: number, lsn: number): [Key, Buffer][] {
  const bulk = bulkOf(seed, lsn);
  const isApart = ([{ kind, rel }]: [Key, Buffer]): boolean =>
    bulk.length === 0 || kind !== KEY_KIND.relationBlock || rel !== COPIED_REL;
  return [...bulk, ...otherPutsOf(seed, lsn).filter(isApart)];
}

/** What is put in bulk for the record that ends at `lsn`: now and then, all blocks of one relation. */
function bulkOf(seed: number, lsn: number): [Key, Buffer][] {
  if ((lsn / RECORD_BYTES + seed) % BULK_EVERY !== 0) return [];
  const random = generator(seed * 1_000_033 + lsn);
  return Array.from({ length: BLOCKS }, (_, blk): [Key, Buffer] => {
    const value = random() % 8 === 0 ? encodeTombstone() : encodeImage(Buffer.alloc(8192, random()));
    return [relationBlockKey(1663, 5, COPIED_REL, 0, blk), value];
  });
}

/** Has the timeline take the record that ends at `lsn`. */
export async function takeRecord(timeline: Timeline, seed: number, lsn: number): Promise<void> {
  const bulk = bulkOf(seed, lsn);
  if (bulk.length > 0) await timeline.putBulk(inPieces(bulk), lsn);
  for (const [key, value] of putsOf(seed, lsn).slice(bulk.length)) timeline.put(key, lsn, value);
  timeline.advance(lsn, lsn - RECORD_BYTES);
  timeline.freezeIfFull();
  await timeline.writable();
}

async function* inPieces(bulk: readonly [Key, Buffer][]): AsyncGenerator<[Key, Buffer][]> {
  for (let i = 0; i < bulk.length; i += 7) yield bulk.slice(i, i + 7);
}

function otherPutsOf(seed: number, lsn: number): [Key, Buffer][] {
  const random = generator(seed * 1_000_003 + lsn);
  return Array.from({ length: 1 + (random() % 3) }, (): [Key, Buffer] => {
    const what = random() % 100;
    const block = relationBlockKey(1663, 5, 16384 + (random() % 3), 0, random() % BLOCKS);
    if (what < 8) return [databaseKey(1663, random() % 5), encodeImage(Buffer.alloc(random() % 600, what))];
    if (what < 10) return [databaseKey(1663, random() % 5), encodeTombstone()];
    if (what < 15)
      return [relationSizeKey(1663, 5, 16384 + (random() % 3), 0), encodeCountImage(BLOCKS + (random() % 10))];
    if (what < 20) return [block, encodeImage(Buffer.alloc(8192, random()))];
    if (what < 25) return [makeKey(KEY_KIND.walIndex, 0, lsn, 0, 0, 0), encodeImage(Buffer.alloc(10, what))];
    const how = what < 30 ? 'init' : what < 60 ? 'derived' : 'record';
    return [block, encodePoke(how, random() % 100, random() % 250)];
  });
}

function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return (mixed ^ (mixed >>> 14)) >>> 0;
  };
}

async function write(directory: string, seed: number, dieAtStep: string, dieAtCount: number): Promise<never> {
  const isFaulty = dieAtStep === 'faulty';
  let stepCount = 0;
  let nowMs = Date.now();
  const timelines = await Timelines.open(directory, {
    replay: replayPoke,
    log: createLog({ name: 'crash-writer', level: isFaulty ? 'silent' : 'error' }),
    limits: {
      flushBytes: 30_000,
      frozenLayersMax: 2,
      collectBytesMin: 20_000,
      ...(isFaulty ? { pageCacheBytes: 0, blockCacheBytes: 0, openFilesMax: 1 } : {}),
    },
    now: () => nowMs,
    lsnAt: ({ diskConsistentLsn }) => Math.max(START_LSN, diskConsistentLsn - HISTORY_BYTES),
    onStep: (step) => {
      if (step === dieAtStep && ++stepCount === dieAtCount) process.kill(process.pid, 'SIGKILL');
    },
  });
  nowMs += LEASE_MS;
  setInterval(() => {}, 1000); // As a server has it: retries alone do not keep a process alive.
  /** What fails is tried again as whoever calls the store would. */
  const persist = async <T>(work: () => Promise<T>): Promise<T> => {
    for (;;) {
      try {
        return await work();
      } catch (error) {
        if (!isFaulty) throw error;
        await sleep(50);
      }
    }
  };
  const model = new ModelTimeline(START_LSN);
  for (const [key, image] of IMPORTED) model.puts.push({ key, lsn: START_LSN, value: encodeImage(image) });
  const learn = (lsn: number): void => {
    for (const [key, value] of putsOf(seed, lsn)) model.puts.push({ key, lsn, value });
    model.lastRecordLsn = lsn;
  };
  const import_ = (): Promise<Timeline> =>
    timelines.import(
      { tenantId: ROOT, timelineId: ROOT, pgVersion: 17, lsn: START_LSN, recordLsn: START_LSN - RECORD_BYTES },
      async (target) => {
        for (const [key, image] of IMPORTED) target.put(key, image);
        await target.drain();
      },
    );
  const root = timelines.find(ROOT) ?? (await persist(import_));
  if (isFaulty) while (model.lastRecordLsn < root.lastRecordLsn) learn(model.lastRecordLsn + RECORD_BYTES);
  for (;;) {
    for (let i = 0; i < 400; i++) {
      const lsn = root.lastRecordLsn + RECORD_BYTES;
      await persist(() => takeRecord(root, seed, lsn));
      if (isFaulty) learn(lsn);
    }
    if (isFaulty) check(root, model);
    await persist(() => root.flush());
    await timelines.garbage.run([root]);
    process.stdout.write(`${root.diskConsistentLsn}\n`);
    const branches = [...timelines.all()].filter((timeline) => timeline !== root);
    const lsn = root.lastRecordLsn;
    if (branches.length < BRANCHES_MAX) {
      const timelineId = lsn.toString().padStart(32, 'b');
      const at = { ancestorTimelineId: ROOT, ancestorLsn: lsn, ancestorRecordLsn: lsn - RECORD_BYTES };
      await persist(async () => void (await timelines.create({ tenantId: ROOT, timelineId, ...at })));
    } else {
      const { timelineId } = branches[lsn % BRANCHES_MAX]!;
      await persist(() => timelines.delete(timelineId));
    }
  }
}

/** A read may fail; what is read is right. */
function check(root: Timeline, model: ModelTimeline): void {
  for (const lsn of [root.oldestLsn, root.lastRecordLsn - 100 * RECORD_BYTES, root.lastRecordLsn]) {
    for (const blk of [0, 7, 23]) {
      const key = relationBlockKey(1663, 5, 16384 + (blk % 3), 0, blk);
      let found: Buffer | undefined;
      try {
        found = root.getImage(key, lsn);
      } catch (error) {
        if (error instanceof LayerDamagedError || lsn < root.oldestLsn) continue;
        process.stderr.write(`a read failed in another way: ${String(error)}\n`);
        process.exit(3);
      }
      const expected = model.read(key, lsn);
      if (found === expected || (expected !== undefined && found?.equals(expected) === true)) continue;
      process.stderr.write(`block ${blk} at ${lsn} is read wrong\n`);
      process.exit(3);
    }
  }
}

if (process.argv[1] === import.meta.filename) {
  const [directory, seed, dieAtStep, dieAtCount] = process.argv.slice(2);
  await write(directory!, Number(seed), dieAtStep!, Number(dieAtCount));
}
