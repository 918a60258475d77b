/** pgbench as an instrument: transactions per second as it prints them. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';

const run = promisify(execFile);

export async function load(connectionString: string, scale: number): Promise<void> {
  await run('pgbench', ['-i', '-q', '-s', String(scale), connectionString]);
  await run('psql', ['-X', '-q', '-c', 'CHECKPOINT', connectionString]);
}

/** Without the time to connect. */
export async function tps(connectionString: string, args: readonly string[], seconds: number): Promise<number> {
  const { stdout } = await run('pgbench', ['-n', '-T', String(seconds), ...args, connectionString]);
  const match = /tps = ([\d.]+) \(without initial connection time\)/.exec(stdout);
  if (match === null) throw new Error(`pgbench said: ${stdout}`);
  return Number(match[1]);
}
