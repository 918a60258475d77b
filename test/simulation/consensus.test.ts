/** Consensus under faults, by seeds. `npm run simulate` runs any number of them, and shows all that happens in one. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { simulate } from './cluster.ts';
import { Violation } from './invariants.ts';
import { type Bug, BUGS } from './simulated-acceptor.ts';

const SEED_COUNT = 200;
const MAX_SEEDS_FOR_BUG = 2_000;
/** Bugs of logs and histories that lose their beginning. The others are looked for in runs without that, in which their seeds were found. */
const BUGS_OF_REMOVAL: readonly Bug[] = ['remove-unsaved', 'begin-past-commit', 'prune-at-commit'];
/** Where to begin for bugs that one seed in hundreds shows. */
const FIRST_SEED: Partial<Record<Bug, number>> = {
  'count-old-term-acks': 730,
  'vote-before-caught-up': 1_480,
  'accept-older-configuration': 140,
  'settle-unconfirmed': 5_980,
  'give-without-renewing': 1_681,
  'prune-at-commit': 480,
};

test('nothing committed is lost or changed, whatever crashes, and commits go on afterwards', (context) => {
  let committedBytes = 0;
  let crashCount = 0;
  let proposerCount = 0;
  let wipeCount = 0;
  let configurationCount = 0;
  let lateLogCount = 0;
  let unfinishedLogCount = 0;
  for (let seed = 1; seed <= SEED_COUNT; seed++) {
    const result = simulate(seed);
    committedBytes += result.committedBytes;
    crashCount += result.crashCount;
    proposerCount += result.proposerCount;
    wipeCount += result.wipeCount;
    configurationCount += result.configurationCount;
    lateLogCount += result.lateLogCount;
    unfinishedLogCount += result.unfinishedLogCount;
  }
  assert(lateLogCount > 20 && unfinishedLogCount > 20, `${lateLogCount} and ${unfinishedLogCount}`);
  context.diagnostic(
    `${SEED_COUNT} seeds: ${committedBytes} bytes, ${proposerCount} proposers, ${crashCount} crashes, ${wipeCount} disks lost, ${configurationCount} configurations, ${lateLogCount} logs given without their beginning, ${unfinishedLogCount} members replaced before they had everything`,
  );
});

/** Each showed a mistake that was made in earnest. */
const KEPT_SEEDS = [
  // A new configuration told by a message that was lost.
  11_243,
  // WAL that was read from another safekeeper in an earlier term of the same proposer came after its next election.
  90_043,
];

test('a log that was given anew goes on voting when its leader has a pruned history', () => {
  for (const seed of [15_077, 72_582, 78_896]) simulate(seed);
});

for (const seed of KEPT_SEEDS) {
  test(`seed ${seed}, which once showed a mistake, shows none`, () => {
    simulate(seed, { removesWal: false });
  });
}

test('a seed repeats a run exactly', () => {
  const runs = [0, 1].map(() => {
    const events: string[] = [];
    simulate(7, { onEvent: (nowMs, who, what) => events.push(`${nowMs} ${who}: ${what}`) });
    return events;
  });
  assert(runs[0]!.length > 100);
  assert.deepEqual(runs[0], runs[1]);
});

for (const bug of BUGS) {
  test(`the simulation finds the bug "${bug}"`, (context) => {
    const first = FIRST_SEED[bug] ?? 1;
    for (let seed = first; seed < first + MAX_SEEDS_FOR_BUG; seed++) {
      try {
        simulate(seed, { bug, removesWal: BUGS_OF_REMOVAL.includes(bug) });
      } catch (error) {
        assert(error instanceof Violation || error instanceof assert.AssertionError, String(error));
        context.diagnostic(`found by seed ${seed}: ${error.message}`);
        return;
      }
    }
    assert.fail(`${MAX_SEEDS_FOR_BUG} seeds did not find it`);
  });
}
