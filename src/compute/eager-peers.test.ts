import assert from 'node:assert/strict';
import { test } from 'node:test';
import { EagerPeers } from './eager-peers.ts';

function eagerOf(peers: EagerPeers, count: number): number[] {
  return Array.from({ length: count }, (_, index) => index).filter((index) => peers.has(index));
}

test('as many are eager as make a quorum, others for other timelines', () => {
  assert.deepEqual(eagerOf(new EagerPeers(1, 7), 1), [0]);
  assert.deepEqual(eagerOf(new EagerPeers(3, 0), 3), [0, 1]);
  assert.deepEqual(eagerOf(new EagerPeers(3, 2), 3), [0, 2]);
  assert.equal(eagerOf(new EagerPeers(5, 3), 5).length, 3);
});

test('one that owes an answer for several pauses in a row gives its place away, and has it no more when it is back', () => {
  const peers = new EagerPeers(3, 0);
  for (let pause = 0; pause < 3; pause++) peers.choose((index) => index !== 0);
  peers.choose(() => true); // It was only slow.
  for (let pause = 0; pause < 3; pause++) peers.choose((index) => index !== 0);
  assert.deepEqual(eagerOf(peers, 3), [0, 1]);
  peers.choose((index) => index !== 0);
  assert.deepEqual(eagerOf(peers, 3), [1, 2]);
  for (let pause = 0; pause < 9; pause++) peers.choose(() => true);
  assert.deepEqual(eagerOf(peers, 3), [1, 2]);
});
