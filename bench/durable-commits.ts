/**
 * How fast are durable commits? pgbench -N with three safekeepers, and with one, against one vanilla Postgres with fsync on: the compute itself, over its Unix
 * socket, against vanilla over its own, and the proxy against vanilla over TCP. Beside the rate, which depends on what else the machine does, the processor time
 * of all processes for each commit.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { inTurns, median, processorSeconds, type Row } from './measure.ts';
import { load, tps } from './pgbench.ts';
import type { Contenders } from './main.ts';
import { BenchedPlatform } from './strata.ts';

/** What a backend has used is its parent's once it has ended. */
const BACKENDS_END_MS = 300;

export async function durableCommits({ vanilla, strata, rounds, seconds, scale }: Contenders): Promise<Row[]> {
  const rows: Row[] = [];
  for (const clients of [1, 8, 32]) {
    const args = pgbenchArgs(clients);
    const [socket, tcp, direct, tls] = await inTurnsMeasured(rounds, seconds, [
      { pid: vanilla.pid, run: () => tps(vanilla.directConnectionString(), args, seconds) },
      { pid: vanilla.pid, run: () => tps(vanilla.connectionString, args, seconds) },
      { pid: strata.pid, run: () => tps(strata.directConnectionString(), args, seconds) },
      { pid: strata.pid, run: () => tps(strata.connectionString, args, seconds) },
    ]);
    const question = `durable pgbench -N, ${clients} client${clients === 1 ? '' : 's'}`;
    rows.push(row(`${question}, compute itself`, socket!, direct!), row(`${question}, proxy with TLS`, tcp!, tls!));
  }
  const single = await BenchedPlatform.start(['--safekeepers', '1']);
  try {
    await load(single.connectionString, scale);
    const args = pgbenchArgs(8);
    const [theirs, direct] = await inTurnsMeasured(rounds, seconds, [
      { pid: vanilla.pid, run: () => tps(vanilla.directConnectionString(), args, seconds) },
      { pid: single.pid, run: () => tps(single.directConnectionString(), args, seconds) },
    ]);
    rows.push(row('durable pgbench -N, 8 clients, one safekeeper, compute itself', theirs!, direct!));
  } finally {
    await single.destroy();
  }
  return rows;
}

interface Measured {
  readonly rate: number;
  /** Microseconds of the processor for each transaction, pgbench's own not counted. */
  readonly processorUs: number;
}

interface Contender {
  /** The process below which everything runs that works for it. */
  readonly pid: number;
  readonly run: () => Promise<number>;
}

async function inTurnsMeasured(rounds: number, seconds: number, contenders: readonly Contender[]): Promise<Measured[]> {
  const costs: number[][] = contenders.map(() => []);
  const rates = await inTurns(
    rounds,
    ...contenders.map(({ pid, run }, index) => async () => {
      const before = processorSeconds(pid);
      const rate = await run();
      await sleep(BACKENDS_END_MS);
      costs[index]!.push(((processorSeconds(pid) - before) * 1e6) / (rate * seconds));
      return rate;
    }),
  );
  return rates.map((rate, index) => ({ rate, processorUs: median(costs[index]!) }));
}

function row(question: string, vanilla: Measured, strata: Measured): Row {
  const note = `${strata.processorUs.toFixed(0)} µs of processor for each, vanilla ${vanilla.processorUs.toFixed(0)} µs`;
  return { question, unit: 'tps', vanilla: vanilla.rate, strata: strata.rate, isRate: true, note };
}

function pgbenchArgs(clients: number): string[] {
  return ['-N', '-M', 'prepared', '-c', String(clients), '-j', '2'];
}
