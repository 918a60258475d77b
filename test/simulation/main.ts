/**
 * Runs the simulation for as many seeds as wanted, on as many threads, or one seed with all that happened in it.
 *
 *   npm run simulate -- --seeds 100000 --from 1 [--threads 2] [--bug NAME]
 *   npm run simulate -- --from 17 --trace [--bug NAME]
 *   npm run simulate -- --explore [bounds of explore.ts]
 *
 * Whether logs lose their beginning is drawn by the seed, unless --removal or --no-removal says so.
 *
 * Exit code 1 when a seed broke an invariant.
 */
import { parseArgs } from 'node:util';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { type RunOptions, simulate } from './cluster.ts';
import { explore, SMALL_BOUNDS } from './explore.ts';
import type { Bounds } from './explored-world.ts';
import { type Bug, BUGS } from './simulated-acceptor.ts';

const PROGRESS_MS = 10_000;

/** Seeds from, from + step, … below end. */
interface Share {
  readonly from: number;
  readonly end: number;
  readonly step: number;
  readonly bug: Bug | undefined;
  readonly removesWal: boolean | undefined;
}

interface Tally {
  seeds: number;
  committedBytes: number;
  proposers: number;
  crashes: number;
  wipes: number;
  configurations: number;
  lateLogs: number;
  unfinishedLogs: number;
  violations: string[];
}

if (isMainThread) await main();
else runShare(workerData as Share, (tally) => parentPort!.postMessage(tally));

async function main(): Promise<void> {
  const { values } = parseArgs({
    allowNegative: true,
    options: {
      seeds: { type: 'string', default: '1000' },
      from: { type: 'string', default: '1' },
      threads: { type: 'string', default: '1' },
      bug: { type: 'string' },
      removal: { type: 'boolean' },
      trace: { type: 'boolean', default: false },
      explore: { type: 'boolean', default: false },
      terms: { type: 'string' },
      entries: { type: 'string' },
      delays: { type: 'string' },
      crashes: { type: 'string' },
      breaks: { type: 'string' },
      restarts: { type: 'string' },
      acceptors: { type: 'string' },
      members: { type: 'string' },
      'max-states': { type: 'string' },
    },
  });
  if (values.explore) {
    const bound = (
      name: 'acceptors' | 'terms' | 'entries' | 'delays' | 'crashes' | 'breaks' | 'restarts' | 'max-states',
      least: number,
    ): number => (values[name] === undefined ? least : wholeNumber(`--${name}`, values[name]));
    const { acceptors, terms, entries, delays, crashes, breaks, restarts, maxStates } = SMALL_BOUNDS;
    exploreAll({
      ...SMALL_BOUNDS,
      acceptors: bound('acceptors', acceptors),
      memberSets: values.members === undefined ? SMALL_BOUNDS.memberSets : memberSets(values.members),
      terms: bound('terms', terms),
      entries: bound('entries', entries),
      delays: bound('delays', delays),
      crashes: bound('crashes', crashes),
      breaks: bound('breaks', breaks),
      restarts: bound('restarts', restarts),
      maxStates: bound('max-states', maxStates),
    });
    return;
  }
  const from = wholeNumber('--from', values.from);
  const seeds = wholeNumber('--seeds', values.seeds);
  const threads = wholeNumber('--threads', values.threads);
  const bug = BUGS.find((each) => each === values.bug);
  if (values.bug !== undefined && bug === undefined) fail(`--bug is one of ${BUGS.join(', ')}`);
  if (values.trace) {
    traceOne(from, { bug, removesWal: values.removal });
    return;
  }
  const startedAt = performance.now();
  const tallies = await Promise.all(
    Array.from({ length: threads }, (_, index) =>
      runThread({ from: from + index, end: from + seeds, step: threads, bug, removesWal: values.removal }, (tally) => {
        if (index === 0) console.log(`${tally.seeds * threads} of ${seeds} seeds`);
      }),
    ),
  );
  const tookMs = performance.now() - startedAt;
  const total = tallies.reduce(add, emptyTally());
  for (const violation of total.violations) console.error(violation);
  const perSeedMs = tookMs / total.seeds;
  const work = `${total.committedBytes} bytes committed, ${total.proposers} proposers, ${total.crashes} crashes, ${total.wipes} disks lost, ${total.configurations} configurations, ${total.lateLogs} logs given without their beginning, ${total.unfinishedLogs} members replaced before they had everything`;
  console.log(`${total.seeds} seeds in ${(tookMs / 1000).toFixed(1)} s (${perSeedMs.toFixed(2)} ms each): ${work}`);
  console.log(`${total.violations.length} violations`);
  if (total.violations.length > 0) process.exitCode = 1;
}

function exploreAll(bounds: Bounds): void {
  const startedAt = performance.now();
  const { states, steps, depth, isComplete } = explore(bounds);
  const tookS = ((performance.now() - startedAt) / 1000).toFixed(1);
  const extent = isComplete ? 'all there are' : 'not all there are';
  console.log(`${JSON.stringify(bounds)}`);
  console.log(`${states} states, ${extent}, by ${steps} steps, up to ${depth} deep, in ${tookS} s: no violation`);
}

function traceOne(seed: number, options: RunOptions): void {
  try {
    simulate(seed, {
      ...options,
      onEvent: (nowMs, who, what) => console.log(`${String(nowMs).padStart(6)} ${who}: ${what}`),
    });
    console.log(`seed ${seed}: no violation`);
  } catch (error) {
    console.log(String(error));
    process.exitCode = 1;
  }
}

function runThread(share: Share, onProgress: (tally: Tally) => void): Promise<Tally> {
  return new Promise((resolve, reject) => {
    let last = emptyTally();
    const worker = new Worker(new URL(import.meta.url), { workerData: share });
    worker.on('message', (tally: Tally) => {
      last = tally;
      onProgress(tally);
    });
    worker.once('error', reject);
    worker.once('exit', () => resolve(last));
  });
}

function runShare({ from, end, step, bug, removesWal }: Share, report: (tally: Tally) => void): void {
  const tally = emptyTally();
  let reportedAt = performance.now();
  for (let seed = from; seed < end; seed += step) {
    tally.seeds++;
    try {
      const result = simulate(seed, { bug, removesWal });
      tally.committedBytes += result.committedBytes;
      tally.proposers += result.proposerCount;
      tally.crashes += result.crashCount;
      tally.wipes += result.wipeCount;
      tally.configurations += result.configurationCount;
      tally.lateLogs += result.lateLogCount;
      tally.unfinishedLogs += result.unfinishedLogCount;
    } catch (error) {
      tally.violations.push(String(error));
    }
    if (performance.now() - reportedAt < PROGRESS_MS) continue;
    reportedAt = performance.now();
    report(tally);
  }
  report(tally);
}

function emptyTally(): Tally {
  return {
    seeds: 0,
    committedBytes: 0,
    proposers: 0,
    crashes: 0,
    wipes: 0,
    configurations: 0,
    lateLogs: 0,
    unfinishedLogs: 0,
    violations: [],
  };
}

function add(a: Tally, b: Tally): Tally {
  return {
    seeds: a.seeds + b.seeds,
    committedBytes: a.committedBytes + b.committedBytes,
    proposers: a.proposers + b.proposers,
    crashes: a.crashes + b.crashes,
    wipes: a.wipes + b.wipes,
    configurations: a.configurations + b.configurations,
    lateLogs: a.lateLogs + b.lateLogs,
    unfinishedLogs: a.unfinishedLogs + b.unfinishedLogs,
    violations: [...a.violations, ...b.violations],
  };
}

/** `0,1,2/0,1,3`: sets of acceptors, by their numbers. */
function memberSets(text: string): number[][] {
  return text.split('/').map((set) => set.split(',').map((node) => wholeNumber('--members', node)));
}

function wholeNumber(option: string, text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 0) fail(`${option} is a whole number, not "${text}"`);
  return value;
}

function fail(message: string): never {
  console.error(message);
  process.exit(2);
}
