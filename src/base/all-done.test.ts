import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { allDone, forEachLimited } from './all-done.ts';

test('a failure is told when the last has ended', async () => {
  let hasEnded = false;
  const slow = sleep(30).then(() => (hasEnded = true));
  await assert.rejects(allDone([slow, Promise.reject(new Error('first'))]), /first/);
  assert(hasEnded);
});

test('each item is worked on once, so many at a time; after a failure none is begun, and what was begun ends', async () => {
  let running = 0;
  let most = 0;
  const done: number[] = [];
  const work = async (item: number): Promise<void> => {
    most = Math.max(most, ++running);
    await sleep(item % 3);
    running--;
    if (item === 13) throw new Error('thirteen');
    done.push(item);
  };
  await forEachLimited(
    Array.from({ length: 12 }, (_, index) => index),
    4,
    work,
  );
  assert.equal(new Set(done).size, 12);
  assert.equal(most, 4);

  done.length = 0;
  await assert.rejects(
    forEachLimited(
      Array.from({ length: 100 }, (_, index) => index + 10),
      4,
      work,
    ),
    /thirteen/,
  );
  assert.equal(running, 0);
  assert(done.length < 20);
});
