import assert from 'node:assert/strict';
import fc from 'fast-check';
import { test } from 'node:test';
import {
  abandonedConfiguration,
  type Configuration,
  finalConfiguration,
  isMember,
  isQuorum,
  jointConfiguration,
  nodesOf,
  quorumLsn,
} from './configuration.ts';

const sets = fc.uniqueArray(fc.integer({ min: 1, max: 7 }), { minLength: 1, maxLength: 5 });

test('a quorum of a joint configuration is a majority of both sets', () => {
  const joint: Configuration = { version: 2, members: [1, 2, 3], newMembers: [3, 4, 5] };
  const has = (...nodes: number[]): boolean => isQuorum(joint, (nodeId) => nodes.includes(nodeId));
  assert(has(2, 3, 4));
  assert(!has(1, 2, 4), 'one of the new three');
  assert(!has(3, 4, 5), 'one of the old three');
  const lsns = new Map([
    [1, 500],
    [2, 400],
    [3, 300],
    [4, 200],
    [5, 100],
  ]);
  assert.equal(
    quorumLsn(joint, (nodeId) => lsns.get(nodeId)!),
    200,
  );
});

test('quorums of configurations that follow each other meet', () => {
  fc.assert(
    fc.property(sets, sets, fc.boolean(), fc.infiniteStream(fc.boolean()), (before, after, isDone, coin) => {
      const from: Configuration = { version: 1, members: before };
      const joint = jointConfiguration(from, after);
      const to = isDone ? finalConfiguration(joint) : abandonedConfiguration(joint);
      const some = new Set(nodesOf(joint).filter(() => coin.next().value));
      // Whoever has not got `some` of its nodes has no quorum when those are one of the other configuration.
      for (const [one, other] of [
        [from, joint],
        [joint, to],
      ] as const) {
        const isOne = isQuorum(one, (nodeId) => some.has(nodeId));
        const isOther = isQuorum(other, (nodeId) => !some.has(nodeId));
        assert(!(isOne && isOther));
      }
    }),
  );
});

test('what a quorum has is the highest LSN for which a quorum is there', () => {
  fc.assert(
    fc.property(sets, fc.option(sets, { nil: undefined }), fc.array(fc.nat(5), { minLength: 8 }), (a, b, lsns) => {
      const configuration = { version: 1, members: a, ...(b === undefined ? {} : { newMembers: b }) };
      const lsn = quorumLsn(configuration, (nodeId) => lsns[nodeId]!);
      assert(isQuorum(configuration, (nodeId) => lsns[nodeId]! >= lsn));
      assert(!isQuorum(configuration, (nodeId) => lsns[nodeId]! > lsn));
    }),
  );
});

test('without a configuration everybody takes part', () => {
  assert(isMember({ version: 0, members: [] }, 9));
  assert(!isMember({ version: 1, members: [1, 2] }, 9));
});
