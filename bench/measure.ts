/**
 * Repeated measurements: the two contenders take turns, so that what else the machine does falls on both, and the median is what counts.
 */
import { readFileSync } from 'node:fs';

/** sysconf(_SC_CLK_TCK) of Linux. */
const TICKS_PER_SECOND = 100;

export interface Row {
  readonly question: string;
  readonly unit: string;
  /** Vanilla Postgres in the same run; undefined where it has no such thing. */
  readonly vanilla: number | undefined;
  readonly strata: number;
  /** True when larger is better. */
  readonly isRate: boolean;
  readonly note?: string;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const upper = sorted[middle] ?? Number.NaN;
  return sorted.length % 2 === 1 ? upper : ((sorted[middle - 1] ?? Number.NaN) + upper) / 2;
}

export function percentile(values: readonly number[], fraction: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * fraction))] ?? Number.NaN;
}

/** Runs the contenders in turn, `rounds` times; the median of each. */
export async function inTurns(rounds: number, ...contenders: readonly (() => Promise<number>)[]): Promise<number[]> {
  const results: number[][] = contenders.map(() => []);
  for (let round = 0; round < rounds; round++) {
    for (const [index, contender] of contenders.entries()) results[index]?.push(await contender());
  }
  return results.map(median);
}

export async function elapsedMs(work: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await work();
  return performance.now() - start;
}

/** Seconds of the processor that this process used, on all its threads, while `work` ran. */
export function cpuSeconds(work: () => void): number {
  const before = process.cpuUsage();
  work();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1e6;
}

/** Seconds of the processor that a process and those below it used since they began; of those that have ended as well. */
export function processorSeconds(pid: number): number {
  let stat: string;
  let children: string;
  try {
    stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'latin1');
  } catch {
    return 0; // It has just ended: its parent has its time.
  }
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  // proc(5): utime, stime, cutime and cstime are fields 14 to 17, of which the first two are cut off here.
  const ticks = fields.slice(11, 15).reduce((sum, field) => sum + Number(field), 0);
  const below = children.split(' ').filter((child) => child !== '');
  return below.reduce((sum, child) => sum + processorSeconds(Number(child)), ticks / TICKS_PER_SECOND);
}

export function formatTable(rows: readonly Row[]): string {
  const head = ['question', 'vanilla', 'strata', 'unit', 'ratio', 'note'];
  const cells = rows.map((row) => [
    row.question,
    row.vanilla === undefined ? '–' : formatFigure(row.vanilla),
    formatFigure(row.strata),
    row.unit,
    row.vanilla === undefined ? '–' : `${(row.strata / row.vanilla).toFixed(2)} ×`,
    row.note ?? '',
  ]);
  const widths = head.map((title, column) => Math.max(title.length, ...cells.map((cell) => cell[column]?.length ?? 0)));
  const line = (cell: readonly string[]): string =>
    `| ${cell.map((text, i) => text.padEnd(widths[i] ?? 0)).join(' | ')} |`;
  return [line(head), line(widths.map((width) => '-'.repeat(width))), ...cells.map(line)].join('\n');
}

function formatFigure(value: number): string {
  if (value >= 1000) return Math.round(value).toLocaleString('en-US');
  return value >= 100 ? value.toFixed(0) : value.toFixed(1);
}
