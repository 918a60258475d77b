/** How long does creating a branch take, by the API, of the running parent's head? */
import { elapsedMs, median, percentile, type Row } from './measure.ts';
import type { Contenders } from './main.ts';

export async function branchCreation({ strata, branchCount }: Contenders): Promise<Row[]> {
  const times: number[] = [];
  for (let n = 0; n < branchCount; n++) times.push(await elapsedMs(() => strata.createBranch(`bench-${n}`)));
  const last = times.slice(-100);
  return [
    {
      question: `create a branch, p50, ${branchCount} branches present at the end`,
      unit: 'ms',
      vanilla: undefined,
      strata: median(last),
      isRate: false,
      note: `p99 ${percentile(last, 0.99).toFixed(1)} ms; first ${(times[0] ?? 0).toFixed(1)} ms`,
    },
  ];
}
