/**
 * Runs the simulation for as many seeds as wanted, on as many threads, or one seed with all that happened in it; or the explorer. Exit code 1 when a seed broke
 * an invariant, 2 when an option is not what it should be.
 */
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { Command, Option } from 'commander';
import { wholeNumber } from '../../src/cli/numbers.ts';
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

interface Options extends Omit<Bounds, 'memberSets' | 'proposers' | 'prunes'> {
  readonly members: Bounds['memberSets'];
  readonly seeds: number;
  readonly from: number;
  readonly threads: number;
  readonly bug: Bug | undefined;
  readonly removal: boolean | undefined;
  readonly trace: boolean;
  readonly explore: boolean;
}

async function main(): Promise<void> {
  const bounds = SMALL_BOUNDS;
  const command = new Command('npm run simulate --')
    .exitOverride((error) => process.exit(error.exitCode === 0 ? 0 : 2))
    .description('The simulation of the consensus, for seeds, or an exhaustive exploration of it within bounds.')
    .option('--seeds <count>', 'how many', wholeNumber(0), 1_000)
    .option('--from <seed>', 'the first', wholeNumber(0), 1)
    .option('--threads <count>', 'on which to run them', wholeNumber(0), 1)
    .option('--trace', 'run the first seed alone, and show all that happens')
    .addOption(new Option('--bug <name>', 'a mistake made on purpose, which is to be found').choices(BUGS))
    .option('--removal', 'logs lose their beginning (default: drawn by the seed)')
    .option('--no-removal', 'logs do not')
    .option('--explore', 'explore instead, within these bounds:')
    .option('--acceptors <count>', 'acceptors', wholeNumber(0), bounds.acceptors)
    .addOption(
      new Option('--members <sets>', 'sets of acceptors that follow each other as members, such as 0,1,2/0,1,3')
        .argParser(parseMembers)
        .default(bounds.memberSets, 'all of them'),
    )
    .option('--terms <count>', 'terms', wholeNumber(0), bounds.terms)
    .option('--entries <count>', 'entries', wholeNumber(0), bounds.entries)
    .option('--delays <count>', 'messages that come late', wholeNumber(0), bounds.delays)
    .option('--crashes <count>', 'crashes', wholeNumber(0), bounds.crashes)
    .option('--breaks <count>', 'connections that break', wholeNumber(0), bounds.breaks)
    .option('--restarts <count>', 'restarts', wholeNumber(0), bounds.restarts)
    .addOption(
      new Option('--max-states <count>', 'states after which to stop')
        .argParser(wholeNumber(0))
        .default(bounds.maxStates, 'none'),
    );
  const {
    seeds,
    from,
    threads,
    bug,
    removal,
    trace,
    explore: isExploration,
    ...rest
  } = command.parse().opts<Options>();
  if (isExploration) {
    const { members: memberSets, ...asked } = rest;
    exploreAll({ ...bounds, ...asked, memberSets });
    return;
  }
  if (trace) {
    traceOne(from, { bug, removesWal: removal });
    return;
  }
  const startedAt = performance.now();
  const tallies = await Promise.all(
    Array.from({ length: threads }, (_, index) =>
      runThread({ from: from + index, end: from + seeds, step: threads, bug, removesWal: removal }, (tally) => {
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

/** Sets of acceptors, by their numbers. */
function parseMembers(text: string): number[][] {
  return text.split('/').map((set) => set.split(',').map((node) => wholeNumber(0)(node)));
}
