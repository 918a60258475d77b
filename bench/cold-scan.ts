/** How fast is the first scan of a table of which no page is here? Vanilla: after a restart, its pages in the system's cache. */
import { median, type Row } from './measure.ts';
import type { Contenders } from './main.ts';

const SCAN = 'SET max_parallel_workers_per_gather = 0; SELECT sum(abalance) FROM pgbench_accounts';

export async function coldScan({ vanilla, strata, rounds }: Contenders): Promise<Row[]> {
  const theirs: number[] = [];
  const ours: number[] = [];
  let bytes = 0;
  for (let round = 0; round < rounds; round++) {
    await vanilla.stop();
    await vanilla.start();
    theirs.push(await strata.timedQuery(vanilla.connectionString, SCAN));
    await strata.suspend();
    strata.forgetCache();
    await strata.firstRow(strata.connectionString);
    ours.push(await strata.timedQuery(strata.connectionString, SCAN));
    bytes = Number(await strata.value(strata.connectionString, "SELECT pg_relation_size('pgbench_accounts')"));
  }
  const megabytes = bytes / 1e6;
  return [
    {
      question: `cold sequential scan of ${megabytes.toFixed(0)} MB`,
      unit: 'MB/s',
      vanilla: (megabytes / median(theirs)) * 1000,
      strata: (megabytes / median(ours)) * 1000,
      isRate: true,
      note: 'vanilla reads from the system cache',
    },
  ];
}
