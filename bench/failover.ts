/**
 * How long are commits away when the primary dies? kill -9 of the Postgres under load; then a client that connects anew, through the same connection
 * string, until it has committed. The load is what keeps the page store and the safekeepers busy; its own clients end with their connections.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Contenders } from './main.ts';
import { elapsedMs, median, percentile, type Row } from './measure.ts';

const LOAD_MS = 2_000;
const RETRY_MS = 5;
const TIMEOUT_MS = 60_000;

export async function failover({ strata, rounds }: Contenders): Promise<Row[]> {
  const times: number[] = [];
  for (let round = 0; round < Math.max(5, rounds * 3); round++) {
    const load = spawn('pgbench', ['-n', '-N', '-c', '4', '-j', '1', '-T', '60', strata.connectionString], {
      stdio: 'ignore',
    });
    const ended = once(load, 'exit');
    await sleep(LOAD_MS);
    strata.killPostgres();
    times.push(await elapsedMs(() => commit(strata.connectionString, strata)));
    load.kill();
    await ended;
  }
  return [
    {
      question: 'kill -9 of Postgres under load to the next commit, p50 (max in note)',
      unit: 'ms',
      vanilla: undefined,
      strata: median(times),
      isRate: false,
      note: `max ${percentile(times, 1).toFixed(0)} ms, ${times.length} times`,
    },
  ];
}

async function commit(connectionString: string, strata: Contenders['strata']): Promise<void> {
  const deadline = Date.now() + TIMEOUT_MS;
  for (;;) {
    try {
      await strata.value(connectionString, 'UPDATE pgbench_tellers SET tbalance = tbalance + 1 WHERE tid = 1');
      return;
    } catch (error) {
      if (Date.now() > deadline) throw error;
      await sleep(RETRY_MS);
    }
  }
}
