import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate as laterTurn } from 'node:timers/promises';
import { SingleRun } from './single-run.ts';

test('one run at a time does all that comes, also between its last look and its end', async () => {
  // The second comes so many turns of the microtask queue after the first: before, in and after that moment.
  for (let turns = 0; turns < 12; turns++) {
    const waiting: string[] = [];
    const done: string[] = [];
    let running = 0;
    const runs = new SingleRun(
      async () => {
        assert.equal(++running, 1);
        for (let next = waiting.shift(); next !== undefined; next = waiting.shift()) {
          await Promise.resolve();
          done.push(next);
        }
        running--;
      },
      () => waiting.length > 0,
    );
    waiting.push('first');
    runs.start();
    for (let turn = 0; turn < turns; turn++) await Promise.resolve();
    waiting.push('second');
    runs.start();
    await laterTurn();
    assert.deepEqual(done, ['first', 'second'], `${turns} turns later`);
    assert.equal(runs.current, undefined);
  }
});
