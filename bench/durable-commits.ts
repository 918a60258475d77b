/** How fast are durable commits? pgbench -N with three safekeepers, against one vanilla Postgres with fsync on. */
import { inTurns, type Row } from './measure.ts';
import { tps } from './pgbench.ts';
import type { Contenders } from './main.ts';

export async function durableCommits({ vanilla, strata, rounds, seconds }: Contenders): Promise<Row[]> {
  const rows: Row[] = [];
  for (const clients of [1, 8, 32]) {
    const args = ['-N', '-M', 'prepared', '-c', String(clients), '-j', '2'];
    const [theirs, direct, tls] = await inTurns(
      rounds,
      () => tps(vanilla.connectionString, args, seconds),
      () => tps(strata.directConnectionString(), args, seconds),
      () => tps(strata.connectionString, args, seconds),
    );
    const question = `durable pgbench -N, ${clients} client${clients === 1 ? '' : 's'}`;
    rows.push({ question: `${question}, compute itself`, unit: 'tps', vanilla: theirs, strata: direct!, isRate: true });
    rows.push({ question: `${question}, proxy with TLS`, unit: 'tps', vanilla: theirs, strata: tls!, isRate: true });
  }
  return rows;
}
