/** How much memory does the platform take when nothing runs? Proportional set size of all its processes, the endpoint suspended. */
import { readFileSync } from 'node:fs';
import type { Row } from './measure.ts';
import type { Contenders } from './main.ts';

export async function idleMemory({ strata }: Contenders): Promise<Row[]> {
  await strata.suspend();
  const processes = strata.processes();
  const megabytes = processes.reduce((sum, { pid }) => sum + proportionalBytes(pid), 0) / 1e6;
  return [
    {
      question: `memory of the idle platform, ${processes.length} processes`,
      unit: 'MB',
      vanilla: undefined,
      strata: megabytes,
      isRate: false,
    },
  ];
}

function proportionalBytes(pid: number): number {
  const match = /^Pss:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8'));
  return Number(match?.[1] ?? 0) * 1024;
}
