/**
 * Does what a user waits for grow with the data? A platform of its own is filled to a size and then to ten times that; at both: creating a branch, waking with
 * a cold cache, and the first read of a row (a leaf of the index and a page of the table, which are not here yet). And how much memory do the processes take
 * meanwhile? Each of `scale.ts`'s questions is to the page store alone; these go through everything.
 *
 * STRATA_BENCH_GB: the larger size in gigabytes, of tables and WAL each.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { elapsedMs, median, percentile, type Row } from './measure.ts';
import { BenchedPlatform } from './strata.ts';

/** Of the table's rows, 15 in a page. */
const ROW_BYTES = 540;
const CHUNK_ROWS = 200_000;
const BRANCHES = 50;
const WAKES = 7;
const READS = 300;
const SAMPLE_MS = 250;

interface AtSize {
  readonly createMs: readonly number[];
  readonly wakeMs: readonly number[];
  readonly readMs: readonly number[];
  readonly loadSeconds: number;
  readonly catchUpSeconds: number;
  /** By process, megabytes. */
  readonly rssMax: ReadonlyMap<string, number>;
}

export async function growth({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const largeGb = Number(process.env['STRATA_BENCH_GB'] ?? (quick ? 0.2 : 1));
  const platform = await BenchedPlatform.start();
  try {
    await platform.value(platform.connectionString, 'CREATE TABLE growth (id int PRIMARY KEY, pad text)');
    const small = await atSize(platform, 0, largeGb / 10);
    const large = await atSize(platform, largeGb / 10, largeGb);
    const row = (question: string, unit: string, of: (at: AtSize) => number, note = ''): Row => ({
      question: `${question}, ${largeGb} GB of tables (${largeGb / 10} GB in note)`,
      unit,
      vanilla: undefined,
      strata: of(large),
      isRate: unit === 'MB/s',
      note: `${of(small).toFixed(1)} ${unit}${note}`,
    });
    const tail = (of: (at: AtSize) => readonly number[]): string =>
      `; p99 ${percentile(of(large), 0.99).toFixed(1)} ms, ${percentile(of(small), 0.99).toFixed(1)} ms`;
    return [
      row(
        'create a branch, p50',
        'ms',
        (at) => median(at.createMs),
        tail((at) => at.createMs),
      ),
      row('wake with a cold cache, p50', 'ms', (at) => median(at.wakeMs)),
      row(
        'first read of a row, cold cache, p50',
        'ms',
        (at) => median(at.readMs),
        tail((at) => at.readMs),
      ),
      row('load, until all is in the object store', 'MB/s', (at) => {
        const gb = at === large ? largeGb * 0.9 : largeGb / 10;
        return (gb * 1000) / (at.loadSeconds + at.catchUpSeconds);
      }),
      ...[...large.rssMax.keys()].map((name) =>
        row(`most memory of the ${name} while loading`, 'MB', (at) => at.rssMax.get(name) ?? 0),
      ),
    ];
  } finally {
    await platform.destroy();
  }
}

async function atSize(platform: BenchedPlatform, fromGb: number, toGb: number): Promise<AtSize> {
  const [firstRow, endRow] = [fromGb, toGb].map((gb) => Math.floor((gb * 1e9) / ROW_BYTES)) as [number, number];
  const rssMax = new Map<string, number>();
  const sampling = new AbortController();
  const sampled = sampleMemory(platform, rssMax, sampling.signal);
  const loadMs = await elapsedMs(async () => {
    for (let from = firstRow; from < endRow; from += CHUNK_ROWS) {
      const to = Math.min(from + CHUNK_ROWS, endRow) - 1;
      const pad = `rpad(md5(i::text), 480, md5((i * 7::bigint)::text))`;
      await platform.value(
        platform.connectionString,
        `INSERT INTO growth SELECT i, ${pad} FROM generate_series(${from}, ${to}) i`,
      );
    }
  });
  const catchUpMs = await elapsedMs(() => platform.caughtUp());
  writeBack();
  sampling.abort();
  await sampled;
  const createMs: number[] = [];
  for (let n = 0; n < BRANCHES; n++) createMs.push(await elapsedMs(() => platform.createBranch(`growth-${toGb}-${n}`)));
  const wakeMs: number[] = [];
  for (let n = 0; n < WAKES; n++) {
    await platform.suspend();
    platform.forgetCache();
    writeBack();
    wakeMs.push(await elapsedMs(() => platform.firstRow(platform.connectionString)));
  }
  const readMs = await platform.timedQueries(
    platform.connectionString,
    Array.from({ length: READS }, (_, n) => {
      const id = Math.floor((((n + 1) * 0.6180339887) % 1) * endRow);
      return `SELECT length(pad) FROM growth WHERE id = ${id}`;
    }),
  );
  return { createMs, wakeMs, readMs, loadSeconds: loadMs / 1000, catchUpSeconds: catchUpMs / 1000, rssMax };
}

/**
 * Of the compute's own files, which are never synced, by the system: while it writes gigabytes of them back, and frees what was removed, each fsync on the same file system
 * waits for that. It is the disk that is measured then.
 */
function writeBack(): void {
  execFileSync('sync');
}

async function sampleMemory(
  platform: BenchedPlatform,
  rssMax: Map<string, number>,
  signal: AbortSignal,
): Promise<void> {
  while (!signal.aborted) {
    for (const { pid, command } of platform.processes()) {
      const name = /(pageserver|safekeeper|proxy|platform)( \d+)?$/.exec(command)?.[1];
      if (name === undefined) continue;
      let status: string;
      try {
        status = readFileSync(`/proc/${pid}/status`, 'utf8');
      } catch {
        continue; // It has ended meanwhile.
      }
      const megabytes = Number(/^VmRSS:\s+(\d+) kB/m.exec(status)?.[1] ?? 0) / 1000;
      rssMax.set(name, Math.max(rssMax.get(name) ?? 0, megabytes));
    }
    await sleep(SAMPLE_MS, undefined, { signal }).catch(() => {});
  }
}
