/**
 * Consensus under faults, by seeds. SIMULATION_SEED=n repeats one run; SIMULATION_SEEDS=count and SIMULATION_FROM=first choose how many and which.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { simulate } from './cluster.ts';
import { Violation } from './invariants.ts';
import type { Bug } from './simulated-acceptor.ts';

const one = process.env['SIMULATION_SEED'];
const from = Number(one ?? process.env['SIMULATION_FROM'] ?? 1);
const count = one === undefined ? Number(process.env['SIMULATION_SEEDS'] ?? 100) : 1;

test('nothing committed is lost or changed, whatever crashes, and commits go on afterwards', (context) => {
  let committedBytes = 0;
  let crashCount = 0;
  let proposerCount = 0;
  for (let seed = from; seed < from + count; seed++) {
    const result = simulate(seed);
    committedBytes += result.committedBytes;
    crashCount += result.crashCount;
    proposerCount += result.proposerCount;
  }
  context.diagnostic(`${count} seeds: ${committedBytes} bytes, ${proposerCount} proposers, ${crashCount} crashes`);
});

const BUGS: readonly Bug[] = [
  'acknowledge-before-sync',
  'vote-without-persisting',
  'skip-truncation',
  'flush-inside-record',
  'quorum-of-one',
];
const MAX_SEEDS_FOR_BUG = 200;

for (const bug of BUGS) {
  test(`the simulation finds the bug "${bug}"`, (context) => {
    for (let seed = 1; seed <= MAX_SEEDS_FOR_BUG; seed++) {
      try {
        simulate(seed, bug);
      } catch (error) {
        assert(error instanceof Violation || error instanceof assert.AssertionError, String(error));
        context.diagnostic(`found by seed ${seed}: ${error.message}`);
        return;
      }
    }
    assert.fail(`${MAX_SEEDS_FOR_BUG} seeds did not find it`);
  });
}
