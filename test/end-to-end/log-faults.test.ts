/** A few rounds of log-faults.ts; `bin/node test/end-to-end/log-faults.ts --rounds 200` runs many. */
import { test } from 'node:test';
import { runFaults } from './log-faults.ts';

test(
  'nothing acknowledged is lost while processes die, stop and are cut off',
  { timeout: 300_000 },
  async (context) => {
    const seed = Math.floor(Math.random() * 2 ** 31);
    context.diagnostic(`seed ${seed}`);
    const report = await runFaults({ rounds: 5, seed, log: (text) => context.diagnostic(text) });
    context.diagnostic(JSON.stringify(report));
  },
);
