/**
 * What do many branches cost? Creating one, by the API, of the running parent's head, when many are there; the memory that each takes; what is
 * asked about all of them; and a start of the platform.
 *
 * STRATA_BENCH_BRANCHES: how many.
 */
import { readFileSync } from 'node:fs';
import { elapsedMs, median, percentile, type Row } from './measure.ts';
import type { Contenders } from './main.ts';
import type { BenchedPlatform } from './strata.ts';

/** Made one after the other and measured; those before them several at a time. */
const MEASURED = 200;
const AT_A_TIME = 8;

export async function branchCreation({ strata }: Contenders): Promise<Row[]> {
  const count = Number(process.env['STRATA_BENCH_BRANCHES'] ?? 1000);
  const create = (n: number): Promise<number> => elapsedMs(() => strata.createBranch(`bench-${n}`));
  const first: number[] = [];
  let made = 0;
  while (made < 100) first.push(await create(made++));
  const before = memoryOf(strata);
  const from = made;
  const fill = async (): Promise<void> => {
    while (made < count - MEASURED) await create(made++);
  };
  await Promise.all(Array.from({ length: AT_A_TIME }, fill));
  const times: number[] = [];
  while (made < count) times.push(await create(made++));
  const eachKb = (memoryOf(strata) - before) / (made - from) / 1000;
  const list = await elapsedMs(() => strata.cli(['branches', 'list']));
  const status = await elapsedMs(() => strata.cli(['status']));
  const storage = await elapsedMs(() => strata.cli(['storage']));
  const stop = await elapsedMs(() => strata.stop());
  const start = await elapsedMs(() => strata.start());
  const present = `${count.toLocaleString('en')} branches present`;
  const common = { vanilla: undefined, isRate: false } as const;
  return [
    {
      ...common,
      question: `create a branch, p50, ${present}`,
      unit: 'ms',
      strata: median(times),
      note: `p99 ${percentile(times, 0.99).toFixed(1)} ms; the first 100: ${median(first).toFixed(1)} ms`,
    },
    {
      ...common,
      question: `strata branches list, ${present}`,
      unit: 'ms',
      strata: list,
      note: `status ${status.toFixed(0)} ms, storage ${storage.toFixed(0)} ms; the command's own start included`,
    },
    {
      ...common,
      question: `start of the platform, ${present}`,
      unit: 'ms',
      strata: start,
      note: `stop ${stop.toFixed(0)} ms`,
    },
    { ...common, question: `memory of all processes for each branch, ${present}`, unit: 'kB', strata: eachKb },
  ];
}

function memoryOf(strata: BenchedPlatform): number {
  const resident = strata.processes().map(({ pid }) => {
    const status = readFileSync(`/proc/${pid}/status`, 'utf8');
    return Number(/^VmRSS:\s+(\d+) kB/m.exec(status)?.[1] ?? 0) * 1024;
  });
  return resident.reduce((sum, bytes) => sum + bytes, 0);
}
