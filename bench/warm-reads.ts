/** How fast are reads of pages that are here? pgbench -S, prepared statements; through the proxy, and at the compute's own socket. */
import { inTurns, type Row } from './measure.ts';
import { tps } from './pgbench.ts';
import type { Contenders } from './main.ts';

export async function warmReads({ vanilla, strata, rounds, seconds }: Contenders): Promise<Row[]> {
  const rows: Row[] = [];
  for (const clients of [1, 8]) {
    const args = ['-S', '-M', 'prepared', '-c', String(clients), '-j', '2'];
    const [socket, direct, plain, tls] = await inTurns(
      rounds,
      () => tps(vanilla.connectionString, args, seconds),
      () => tps(strata.directConnectionString(), args, seconds),
      () => tps(strata.plainConnectionString(), args, seconds),
      () => tps(strata.connectionString, args, seconds),
    );
    const question = `warm pgbench -S, ${clients} client${clients === 1 ? '' : 's'}`;
    const row = (name: string, value: number): Row => ({
      question: `${question}, ${name}`,
      unit: 'tps',
      vanilla: socket,
      strata: value,
      isRate: true,
    });
    rows.push(row('compute itself', direct!), row('proxy without TLS', plain!), row('proxy with TLS', tls!));
  }
  return rows;
}
