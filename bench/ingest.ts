/**
 * How fast does WAL of small records become durable layers? Processor time of all threads counts, compression's and the garbage collector's too: megabytes for
 * each second of one core. The floor is cutting and checking the same records, and nothing else. Each round takes the same WAL into a new branch of the
 * cluster that it came from. The first rounds are for V8 to compile the code, and are not counted: a pageserver that is busy has long been through it.
 */
import type { Timeline } from '../src/pageserver/timeline.ts';
import { WalReader } from '../src/postgres/wal/reader.ts';
import { median, type Row } from './measure.ts';
import { ingestAll, TIMELINE_ID, withRecordedCluster } from './page-store.ts';
import type { RecordedCluster } from './page-store.ts';

const UNCOUNTED_ROUNDS = 3;

export async function ingest({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const rounds = UNCOUNTED_ROUNDS + (quick ? 3 : 5);
  const ours: number[] = [];
  const floor: number[] = [];
  const wall: number[] = [];
  let note = '';
  await withRecordedCluster({ rows: quick ? 150_000 : 500_000 }, async (recorded) => {
    const megabytes = recorded.wal.length / 1e6;
    for (let round = 0; round < rounds; round++) {
      const timeline = await branchOf(recorded, round);
      const cutSeconds = cpuSeconds(() => cutRecords(recorded));
      const before = process.cpuUsage();
      const startMs = performance.now();
      await ingestAll({ ...recorded, timeline });
      await timeline.flush();
      const elapsedMs = performance.now() - startMs;
      const { user, system } = process.cpuUsage(before);
      const stored = timeline.index.layers.reduce((sum, layer) => sum + layer.sizeBytes, 0) / 1e6;
      await recorded.store.delete(timeline.timelineId);
      if (round < UNCOUNTED_ROUNDS) continue;
      floor.push(megabytes / cutSeconds);
      wall.push((megabytes / elapsedMs) * 1000);
      ours.push((megabytes * 1e6) / (user + system));
      const averageBytes = Math.round(recorded.wal.length / recorded.recordCount);
      note = `${megabytes.toFixed(0)} MB in records of ${averageBytes} bytes; layers ${stored.toFixed(0)} MB`;
    }
  });
  const common = { unit: 'MB/s', isRate: true };
  return [
    {
      ...common,
      question: 'ingest to durable layers, for each core used',
      vanilla: undefined,
      strata: median(ours),
      note: `${note}; cutting records alone ${median(floor).toFixed(0)} MB/s`,
    },
    { ...common, question: 'ingest to durable layers, by the clock', vanilla: undefined, strata: median(wall) },
  ];
}

/** A new branch where the cluster's WAL begins. */
function branchOf({ store, timeline, startLsn }: RecordedCluster, round: number): Promise<Timeline> {
  return store.create({
    tenantId: TIMELINE_ID,
    timelineId: `${round}`.padStart(32, '0'),
    ancestorTimelineId: TIMELINE_ID,
    ancestorLsn: startLsn,
    ancestorRecordLsn: timeline.lastRecordStartLsn,
  });
}

function cutRecords({ startLsn, wal, timeline }: RecordedCluster): void {
  const reader = new WalReader(startLsn, timeline.pgVersion);
  reader.push(startLsn, wal);
  while (reader.next() !== undefined);
}

function cpuSeconds(work: () => void): number {
  const before = process.cpuUsage();
  work();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1e6;
}
