/** How fast are durable commits? pgbench -N with three safekeepers, and with one, against one vanilla Postgres with fsync on. */
import { inTurns, type Row } from './measure.ts';
import { load, tps } from './pgbench.ts';
import type { Contenders } from './main.ts';
import { BenchedPlatform } from './strata.ts';

export async function durableCommits({ vanilla, strata, env, rounds, seconds, scale }: Contenders): Promise<Row[]> {
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
  const single = await BenchedPlatform.start(['--safekeepers', '1'], env);
  try {
    await load(single.connectionString, scale);
    const args = ['-N', '-M', 'prepared', '-c', '8', '-j', '2'];
    const [theirs, direct] = await inTurns(
      rounds,
      () => tps(vanilla.connectionString, args, seconds),
      () => tps(single.directConnectionString(), args, seconds),
    );
    const question = 'durable pgbench -N, 8 clients, one safekeeper, compute itself';
    rows.push({ question, unit: 'tps', vanilla: theirs, strata: direct!, isRate: true });
  } finally {
    await single.destroy();
  }
  return rows;
}
