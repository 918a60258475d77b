/** How long does a client wait for a suspended endpoint? From connect to the first row, with a cold cache and with a kept one. */
import { elapsedMs, median, percentile, type Row } from './measure.ts';
import type { Contenders } from './main.ts';

export async function wake({ vanilla, strata, rounds }: Contenders): Promise<Row[]> {
  const theirs: number[] = [];
  const kept: number[] = [];
  const cold: number[] = [];
  for (let round = 0; round < Math.max(5, rounds * 3); round++) {
    await vanilla.stop();
    theirs.push(
      await elapsedMs(async () => {
        await vanilla.start();
        await strata.firstRow(vanilla.connectionString);
      }),
    );
    await strata.suspend();
    kept.push(await elapsedMs(() => strata.firstRow(strata.connectionString)));
    await strata.suspend();
    strata.forgetCache();
    cold.push(await elapsedMs(() => strata.firstRow(strata.connectionString)));
  }
  const row = (name: string, values: readonly number[]): Row => ({
    question: `${name}, p50 (p99 in note)`,
    unit: 'ms',
    vanilla: median(theirs),
    strata: median(values),
    isRate: false,
    note: `p99 ${percentile(values, 0.99).toFixed(0)} ms, vanilla p99 ${percentile(theirs, 0.99).toFixed(0)} ms`,
  });
  return [row('wake from zero to first row, cold cache', cold), row('wake with kept cache', kept)];
}
