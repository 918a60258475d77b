/** Small clusters, completely. `npm run simulate -- --explore` takes larger bounds. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { explore, SMALL_BOUNDS } from './explore.ts';
import type { Bounds, ExploredBug } from './explored-world.ts';
import { Violation } from './invariants.ts';

test('no state of two proposers and three acceptors breaks an invariant, within two terms and one entry', (context) => {
  const { states, steps, depth, isComplete } = explore(SMALL_BOUNDS);
  context.diagnostic(`${states} states by ${steps} steps, up to ${depth} deep`);
  assert(isComplete);
  assert(states > 10_000);
});

const MOVING: Bounds = { ...SMALL_BOUNDS, acceptors: 2, memberSets: [[0], [1]] };

test('no state of two proposers breaks one while the log moves from one acceptor to another', (context) => {
  const { states, steps, depth, isComplete } = explore(MOVING);
  context.diagnostic(`${states} states by ${steps} steps, up to ${depth} deep`);
  assert(isComplete);
  assert(states > 10_000);
});

const BUGS: readonly (readonly [ExploredBug, Partial<Bounds>])[] = [
  ['reuse-of-term', {}],
  ['vote-without-persisting', { crashes: 1 }],
  ['skip-joint-phase', MOVING],
  ['finish-before-settled', MOVING],
  ['accept-older-configuration', MOVING],
  ['count-earlier-acks', MOVING],
];

for (const [bug, bounds] of BUGS) {
  test(`exploration finds the bug "${bug}"`, (context) => {
    assert.throws(
      () => explore({ ...SMALL_BOUNDS, ...bounds }, bug),
      (error) => {
        assert(error instanceof Violation || error instanceof assert.AssertionError, String(error));
        context.diagnostic(error.message.slice(0, 2_000));
        return true;
      },
    );
  });
}
