/**
 * A process that ingests WAL, damages its layers and has them made anew from that WAL, until it is killed. Run as a child of the repair test:
 *
 *   repair-writer.ts <directory> <step> <count>     it dies when it comes to the named step of a repair for the count-th time
 *
 * Each line of its output is an LSN up to which a flush was confirmed.
 */

import { openSync, closeSync, fstatSync, writeSync } from 'node:fs';
import { createLog } from '../../src/base/log.ts';
import type { Lsn } from '../../src/postgres/lsn.ts';
import { RM_CLOG, RM_SMGR, RM_XACT } from '../../src/postgres/rmgr.ts';
import { WalReader } from '../../src/postgres/wal/reader.ts';
import { encodeRecordAt } from '../../src/postgres/wal/writer.ts';
import { Ingest } from '../../src/pageserver/ingest/ingest.ts';
import { ALL_KEYS, CHECKPOINT_STATE_KEY, databaseKey, KEY_KIND } from '../../src/pageserver/key.ts';
import type { Key } from '../../src/pageserver/key.ts';
import { layerPath } from '../../src/pageserver/layers/layer-format.ts';
import { Repairs } from '../../src/pageserver/repair.ts';
import { replayValue } from '../../src/pageserver/replay.ts';
import type { OnStep } from '../../src/pageserver/step.ts';
import type { Timeline } from '../../src/pageserver/timeline.ts';
import { Timelines } from '../../src/pageserver/timelines.ts';
import { readWhole } from '../../src/pageserver/whole-reads.ts';
import { checkpointStateAt } from '../ingest/checkpoint.ts';
import { u32 } from '../ingest/make-record.ts';

export const START_LSN: Lsn = 0x1000000;
const ID = '1'.padStart(32, '0');
const RECORDS = 4_000;
const RECORDS_IN_A_CYCLE = 150;
const WAL_PIECE_BYTES = 10_000;

/** Tables are made, and transactions commit. */
const WAL = makeWal();

function makeWal(): Buffer {
  const parts: Buffer[] = [];
  let [lsn, prevLsn] = [START_LSN, START_LSN - 64];
  const add = (record: { rmid: number; info: number; xid: number; mainData: Buffer }): void => {
    const { bytes, startLsn, endLsn } = encodeRecordAt({ ...record, lsn, prevLsn, version: 17, systemId: 1n });
    parts.push(bytes);
    [lsn, prevLsn] = [endLsn, startLsn];
  };
  add({ rmid: RM_CLOG, info: 0, xid: 0, mainData: Buffer.alloc(8) });
  for (let number = 1; number < RECORDS; number++) {
    const xid = 700 + number;
    const time = Buffer.alloc(8);
    time.writeBigInt64LE(800_000_000_000_000n + BigInt(number) * 1_000n);
    if (number % 3 === 0) add({ rmid: RM_SMGR, info: 0x10, xid, mainData: u32(1663, 5, 16384 + (number % 97), 0) });
    else add({ rmid: RM_XACT, info: 0, xid, mainData: time });
  }
  return Buffer.concat(parts);
}

export interface Repairable {
  readonly timelines: Timelines;
  readonly root: Timeline;
  /** All that can be read at the LSN, without the WAL index, whose entries end where flushes did; what is damaged is repaired first. */
  readonly state: (lsn: Lsn) => Promise<[Key, Buffer][]>;
  /** Ingests so many records, or as many as there are. */
  readonly take: (count: number) => void;
}

/** The store in the directory, made when there is none. */
export async function openRepairable(directory: string, onStep?: OnStep): Promise<Repairable> {
  const log = createLog({ name: 'repair-writer', level: 'silent' });
  const timelines = await Timelines.open(directory, {
    replay: replayValue,
    log,
    // What was read before is read from the disk again.
    limits: { flushBytes: 20_000, pageCacheBytes: 0, blockCacheBytes: 0, openFilesMax: 1 },
    ...(onStep === undefined ? {} : { onStep }),
  });
  const repairs = new Repairs({
    timelines,
    walOf: async function* (_timeline, fromLsn) {
      for (let at = fromLsn - START_LSN; at < WAL.length; at += WAL_PIECE_BYTES) {
        yield { lsn: START_LSN + at, bytes: WAL.subarray(at, at + WAL_PIECE_BYTES) };
      }
    },
    log,
    ...(onStep === undefined ? {} : { onStep }),
  });
  timelines.repair = (damage) => repairs.repair(damage);
  const request = { tenantId: ID, timelineId: ID, pgVersion: 17, lsn: START_LSN, recordLsn: START_LSN - 64 } as const;
  const root =
    timelines.find(ID) ??
    (await timelines.import(request, async (target) => {
      target.put(CHECKPOINT_STATE_KEY, checkpointStateAt(START_LSN));
      target.put(databaseKey(1663, 5), Buffer.from('map'));
      await target.drain();
    }));
  return {
    timelines,
    root,
    state: async (lsn) => {
      const entries = await readWhole(() => root.scan(ALL_KEYS, lsn), timelines.repair);
      return entries.filter(([{ kind }]) => kind !== KEY_KIND.walIndex);
    },
    take: (count) => {
      const reader = new WalReader(root.lastRecordLsn, 17);
      reader.push(root.lastRecordLsn, WAL.subarray(root.lastRecordLsn - START_LSN));
      const ingest = new Ingest(root);
      for (let taken = 0; taken < count; taken++) {
        const record = reader.next();
        if (record === undefined) return;
        ingest.ingest(record);
        root.freezeIfFull();
      }
    },
  };
}

/** Overwrites a layer that WAL can be taken again for. */
function damageOne({ index, directory }: Timeline, number: number): void {
  const layers = index.layers.filter((layer) => layer.lsnEnd > START_LSN + 1);
  const file = openSync(layerPath(directory, layers[number % layers.length]!), 'r+');
  writeSync(file, Buffer.alloc(fstatSync(file).size, 0x55), 0, undefined, 0);
  closeSync(file);
}

if (process.argv[1] === import.meta.filename) {
  const [directory, dieAt, dieAtCount] = process.argv.slice(2) as [string, string, string];
  let stepCount = 0;
  const { root, take, state } = await openRepairable(directory, (step) => {
    if (step === dieAt && ++stepCount === Number(dieAtCount)) process.kill(process.pid, 'SIGKILL');
  });
  for (let cycle = 0; ; cycle++) {
    await state(root.lastRecordLsn); // Ingest reads too.
    take(RECORDS_IN_A_CYCLE);
    await root.flush();
    process.stdout.write(`${root.diskConsistentLsn}\n`);
    damageOne(root, cycle);
  }
}
