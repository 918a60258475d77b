/**
 * How fast are reads of pages that are here? pgbench -S, prepared statements; through the proxy, against vanilla over TCP, and at the compute's own socket, against
 * vanilla's. What a relay costs at least is measured too: a bare one, before the same compute.
 */
import { startBareRelay } from './bare-relay.ts';
import type { Contenders } from './main.ts';
import { inTurns, type Row } from './measure.ts';
import { tps } from './pgbench.ts';

export async function warmReads({ vanilla, strata, rounds, seconds }: Contenders): Promise<Row[]> {
  const socketPath = strata.socketPath();
  const barePlain = await startBareRelay({ socketPath });
  const bareTls = await startBareRelay({ socketPath, certificate: strata.certificate() });
  const rows: Row[] = [];
  try {
    for (const clients of [1, 8]) {
      const args = ['-S', '-M', 'prepared', '-c', String(clients), '-j', '2'];
      const [socket, tcp, direct, plain, tls, plainFloor, tlsFloor] = await inTurns(
        rounds,
        () => tps(vanilla.directConnectionString(), args, seconds),
        () => tps(vanilla.connectionString, args, seconds),
        () => tps(strata.directConnectionString(), args, seconds),
        () => tps(strata.plainConnectionString(), args, seconds),
        () => tps(strata.connectionString, args, seconds),
        () => tps(strata.connectionStringAt(barePlain.port, 'disable'), args, seconds),
        () => tps(strata.connectionStringAt(bareTls.port, 'require'), args, seconds),
      );
      const question = `warm pgbench -S, ${clients} client${clients === 1 ? '' : 's'}`;
      const row = (name: string, theirs: number, value: number, floor?: number): Row => ({
        question: `${question}, ${name}`,
        unit: 'tps',
        vanilla: theirs,
        strata: value,
        isRate: true,
        ...(floor === undefined ? {} : { note: `a bare relay in Node: ${Math.round(floor).toLocaleString('en-US')}` }),
      });
      rows.push(row('compute itself', socket!, direct!));
      rows.push(row('proxy without TLS', tcp!, plain!, plainFloor), row('proxy with TLS', tcp!, tls!, tlsFloor));
    }
  } finally {
    await barePlain.stop();
    await bareTls.stop();
  }
  return rows;
}
