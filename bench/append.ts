/**
 * How fast does WAL in large records become durable? A proposer in this process, safekeepers in theirs. In memory (a tmpfs) the disk does not count, and what is left
 * is our own work; on the disk the floor is one file written with O_DSYNC in pieces of the size that a safekeeper writes.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import {
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { signToken } from '../src/base/token.ts';
import { electProposer, type Proposer } from '../src/compute/proposer.ts';
import { blankState } from '../src/consensus/acceptor.ts';
import { segmentStart } from '../src/postgres/lsn.ts';
import { CONTROL_FILE_NAME, encodeControlFile } from '../src/safekeeper/control-file.ts';
import { makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from '../src/safekeeper/made-wal.test-data.ts';
import { median, type Row } from './measure.ts';

const MEMORY_DIRECTORY = '/dev/shm';
const RECORD_BYTES = 100_000;
const MEGABYTE = 1_000_000;
/** As Postgres' walsender sends them. */
const CHUNK_BYTES = 128 * 1024;
const TIMEOUT_MS = 120_000;

interface Setting {
  readonly count: number;
  readonly directory: string;
  readonly question: string;
}

export async function append({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const bytes = (quick ? 100 : 400) * MEGABYTE;
  const sizes = Array.from({ length: Math.floor(bytes / RECORD_BYTES) }, () => RECORD_BYTES);
  const wal = makeWal(MID_SEGMENT_LSN, sizes).bytes;
  const settings: Setting[] = [
    { count: 1, directory: tmpdir(), question: 'append of large records, one safekeeper' },
    { count: 3, directory: tmpdir(), question: 'append of large records, three safekeepers' },
  ];
  if (existsSync(MEMORY_DIRECTORY)) {
    settings.unshift(
      { count: 1, directory: MEMORY_DIRECTORY, question: 'append of large records, one safekeeper, no disk' },
      { count: 3, directory: MEMORY_DIRECTORY, question: 'append of large records, three safekeepers, no disk' },
    );
  }
  const rows: Row[] = [];
  for (const { count, directory, question } of settings) {
    const rates: number[] = [];
    const floors: number[] = [];
    for (let round = 0; round < (quick ? 1 : 3); round++) {
      rates.push(await appendRate(count, directory, wal));
      floors.push(writeRate(directory, wal));
    }
    const note = `one file, O_DSYNC: ${median(floors).toFixed(0)} MB/s`;
    rows.push({ question, unit: 'MB/s', vanilla: undefined, strata: median(rates), isRate: true, note });
  }
  return rows;
}

async function appendRate(count: number, directory: string, wal: Buffer): Promise<number> {
  let seconds = 0;
  await withSafekeepers(count, directory, async (proposer) => {
    const startedAt = performance.now();
    for (let at = 0; at < wal.length; at += CHUNK_BYTES) {
      const hasRoom = proposer.append(MID_SEGMENT_LSN + at, wal.subarray(at, at + CHUNK_BYTES));
      if (!hasRoom) await once(proposer, 'drain');
    }
    await proposer.waitCommitted(MID_SEGMENT_LSN + wal.length, AbortSignal.timeout(TIMEOUT_MS));
    seconds = (performance.now() - startedAt) / 1000;
  });
  return wal.length / MEGABYTE / seconds;
}

/** A proposer in this process that leads a new timeline at MID_SEGMENT_LSN, kept by safekeepers in processes of their own, each with idle timelines beside. */
export async function withSafekeepers(
  count: number,
  directory: string,
  use: (proposer: Proposer) => Promise<void>,
  idleCount = 0,
): Promise<void> {
  const root = mkdtempSync(join(directory, 'strata-append-'));
  const secret = randomBytes(32);
  for (let index = 0; index < count; index++) makeIdleTimelines(directoryOf(root, index), idleCount);
  const safekeepers: SafekeeperProcess[] = [];
  try {
    for (let index = 0; index < count; index++) safekeepers.push(await startSafekeeper(root, index, secret));
    const proposer = await electProposer({
      safekeepers: safekeepers.map(({ port, socketPath }) => ({ host: '127.0.0.1', port, socketPath })),
      token: await signToken(secret, { scope: 'platform' }),
      timeline: {
        tenantId: randomBytes(16).toString('hex'),
        timelineId: randomBytes(16).toString('hex'),
        startLsn: MID_SEGMENT_LSN,
        pgVersion: 17,
        systemId: String(SYSTEM_ID),
      },
      mayCreate: true,
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    await use(proposer);
    await proposer.close();
  } finally {
    for (const { child } of safekeepers) {
      const gone = once(child, 'exit');
      child.kill('SIGKILL');
      await gone;
    }
    rmSync(root, { recursive: true, force: true });
  }
}

function directoryOf(root: string, index: number): string {
  return join(root, `safekeeper-${index}`);
}

/** As safekeepers have those that nobody has written to yet. */
function makeIdleTimelines(dataDir: string, count: number): void {
  const tenantId = randomBytes(16).toString('hex');
  const startLsn = segmentStart(MID_SEGMENT_LSN);
  for (let index = 0; index < count; index++) {
    const timelineId = randomBytes(16).toString('hex');
    const identity = { tenantId, timelineId, startLsn, pgVersion: 17, systemId: String(SYSTEM_ID) };
    const directory = join(dataDir, tenantId, timelineId);
    mkdirSync(directory, { recursive: true });
    const control = encodeControlFile({ kind: 'timeline', identity, acceptor: blankState(startLsn) });
    writeFileSync(join(directory, CONTROL_FILE_NAME), control);
  }
}

function writeRate(directory: string, wal: Buffer): number {
  const path = join(mkdtempSync(join(directory, 'strata-append-')), 'file');
  const { O_WRONLY, O_CREAT, O_DSYNC } = constants;
  const file = openSync(path, O_WRONLY | O_CREAT | O_DSYNC);
  const startedAt = performance.now();
  for (let at = 0; at < wal.length; at += MEGABYTE) writeSync(file, wal, at, Math.min(MEGABYTE, wal.length - at));
  const seconds = (performance.now() - startedAt) / 1000;
  closeSync(file);
  rmSync(join(path, '..'), { recursive: true });
  return wal.length / MEGABYTE / seconds;
}

interface SafekeeperProcess {
  readonly child: ChildProcess;
  readonly port: number;
  readonly socketPath: string;
}

async function startSafekeeper(root: string, index: number, secret: Buffer): Promise<SafekeeperProcess> {
  const main = join(import.meta.dirname, '..', 'src', 'main.ts');
  const env = { STRATA_LOG_LEVEL: 'warn', ...process.env };
  const child = spawn(process.execPath, [main, 'safekeeper'], { stdio: ['pipe', 'pipe', 'inherit'], env });
  const config = {
    nodeId: index + 1,
    dataDir: directoryOf(root, index),
    host: '127.0.0.1',
    port: 0,
    socketPath: join(root, `safekeeper-${index}.sock`),
    secret: secret.toString('hex'),
  };
  child.stdin.write(`${JSON.stringify(config)}\n`);
  const lines = createInterface({ input: child.stdout });
  const [line] = (await once(lines, 'line')) as [string];
  return { child, port: (JSON.parse(line) as { port: number }).port, socketPath: config.socketPath };
}
