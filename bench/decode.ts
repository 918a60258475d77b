/**
 * How fast is WAL cut into records, decoded and checked? From memory: page headers, CRC of every record, block references. The floor is
 * the CRC of the same bytes. Time is that of the processor, so that what else the machine does counts less. Each WAL is decoded in a process of
 * its own, as by a pageserver: the one that made it has its heap full of what that took.
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { crc32c } from '../src/base/crc32c.ts';
import type { PgVersion } from '../src/postgres/version.ts';
import { WalError } from '../src/postgres/wal/error.ts';
import { WalReader } from '../src/postgres/wal/reader.ts';
import { cpuSeconds, median, type Row } from './measure.ts';
import { benchedWal, type BenchedWal } from './wal.ts';

const CHUNK_BYTES = 1024 * 1024;

interface Measured {
  readonly bytes: number;
  readonly records: number;
  /** MB/s, medians. */
  readonly speed: number;
  readonly floor: number;
}

/** What the process that decodes is told, as its argument. */
interface Task {
  readonly file: string;
  readonly startLsn: number;
  readonly version: PgVersion;
  readonly rounds: number;
}

export async function decode({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const rows: Row[] = [];
  for (const images of [false, true]) {
    const wal = await benchedWal({ transactions: quick ? 50_000 : 200_000, images });
    const what = images ? 'with full page images' : 'of small records';
    rows.push(...toRows(measureApart(wal, quick ? 5 : 15), what));
  }
  return rows;
}

function measureApart({ startLsn, version, bytes }: BenchedWal, rounds: number): Measured {
  const directory = mkdtempSync(join(tmpdir(), 'strata-bench-decode-'));
  try {
    const task: Task = { file: join(directory, 'wal'), startLsn, version, rounds };
    writeFileSync(task.file, bytes);
    const output = execFileSync(process.execPath, [import.meta.filename, JSON.stringify(task)], { encoding: 'utf8' });
    return JSON.parse(output) as Measured;
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

function toRows({ bytes, records, speed, floor }: Measured, what: string): Row[] {
  const question = `decode WAL ${what}`;
  const note = `${(bytes / 1e6).toFixed(0)} MB, ${Math.round(bytes / records)} bytes a record; CRC alone ${floor.toFixed(0)} MB/s`;
  return [
    { question, unit: 'MB/s', vanilla: undefined, strata: speed, isRate: true, note },
    { question, unit: 'records/s', vanilla: undefined, strata: (speed * 1e6 * records) / bytes, isRate: true },
  ];
}

function measure(wal: BenchedWal, rounds: number): Measured {
  const { bytes, records } = readAll(wal); // Once to warm up, and to know where it ends.
  const speeds: number[] = [];
  const floors: number[] = [];
  for (let round = 0; round < rounds; round++) {
    speeds.push(bytes / 1e6 / cpuSeconds(() => readAll(wal)));
    floors.push(bytes / 1e6 / cpuSeconds(() => crc32c(wal.bytes, 0, bytes)));
  }
  return { bytes, records, speed: median(speeds), floor: median(floors) };
}

/** How many bytes the records take, and how many they are. */
function readAll({ startLsn, version, bytes }: BenchedWal): { bytes: number; records: number } {
  const reader = new WalReader(startLsn, version);
  let records = 0;
  try {
    for (let at = 0; at < bytes.length; at += CHUNK_BYTES) {
      reader.push(startLsn + at, bytes.subarray(at, at + CHUNK_BYTES));
      while (reader.next() !== undefined) records++;
    }
  } catch (error) {
    if (!(error instanceof WalError)) throw error; // The end: zeroes.
  }
  return { bytes: reader.position - startLsn, records };
}

if (process.argv[1] === import.meta.filename) {
  const { file, startLsn, version, rounds } = JSON.parse(process.argv[2] ?? '') as Task;
  console.log(JSON.stringify(measure({ startLsn, version, bytes: readFileSync(file) }, rounds)));
}
