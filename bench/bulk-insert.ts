/**
 * How fast do many rows come in? Transactions of 20,000 small rows from one client: for each row a WAL record, which safekeepers, pageserver and object store all take.
 * What storage still has to do after each round, merging layers and uploading them, is waited for and is not in the rate; it is in the processor time.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Contenders } from './main.ts';
import { inTurns, processorSeconds, type Row } from './measure.ts';
import { tps } from './pgbench.ts';

const ROWS = 20_000;
const INSERT = `INSERT INTO pgbench_history SELECT 1, 1, n, 1, now(), repeat('x', 22) FROM generate_series(1, ${ROWS}) n;\n`;

export async function bulkInsert({ vanilla, strata, rounds, seconds }: Contenders): Promise<Row[]> {
  const directory = mkdtempSync(join(tmpdir(), 'strata-bulk-'));
  const script = join(directory, 'insert.sql');
  writeFileSync(script, INSERT);
  const args = ['-f', script, '-c', '1', '-j', '1'];
  try {
    await strata.caughtUp();
    const usedSeconds = processorSeconds(strata.pid);
    let rows = 0;
    const [theirs, ours] = await inTurns(
      rounds,
      async () => ROWS * (await tps(vanilla.directConnectionString(), args, seconds)),
      async () => {
        const rate = ROWS * (await tps(strata.directConnectionString(), args, seconds));
        rows += rate * seconds;
        await strata.caughtUp();
        return rate;
      },
    );
    const processorUs = ((processorSeconds(strata.pid) - usedSeconds) * 1e6) / rows;
    const question = `rows inserted, ${ROWS.toLocaleString('en-US')} a transaction, 1 client, compute itself`;
    const note = `${processorUs.toFixed(1)} µs of processor for each, merging and uploading too`;
    return [{ question, unit: 'rows/s', vanilla: theirs!, strata: ours!, isRate: true, note }];
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}
