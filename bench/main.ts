/**
 * `npm run bench`: Strata and vanilla Postgres (the same binaries) in the same run on the same machine; medians of several rounds.
 *
 *   --quick               short rounds, for a look
 *   --only NAME[,NAME]    some of the questions
 *   --json                the rows as JSON instead of a table
 */
import { parseArgs } from 'node:util';
import { branchCreation } from './branch-creation.ts';
import { coldScan } from './cold-scan.ts';
import { durableCommits } from './durable-commits.ts';
import { idleMemory } from './idle-memory.ts';
import { formatTable, type Row } from './measure.ts';
import { load } from './pgbench.ts';
import { BenchedPlatform } from './strata.ts';
import { type Vanilla, withVanilla } from './vanilla.ts';
import { wake } from './wake.ts';
import { warmReads } from './warm-reads.ts';

export interface Contenders {
  readonly vanilla: Vanilla;
  readonly strata: BenchedPlatform;
  readonly rounds: number;
  /** Of each pgbench run. */
  readonly seconds: number;
  readonly branchCount: number;
}

const QUESTIONS: Readonly<Record<string, (contenders: Contenders) => Promise<Row[]>>> = {
  'warm-reads': warmReads,
  'durable-commits': durableCommits,
  'cold-scan': coldScan,
  wake,
  'idle-memory': idleMemory,
  'branch-creation': branchCreation,
};

const { values } = parseArgs({
  options: { quick: { type: 'boolean' }, only: { type: 'string' }, json: { type: 'boolean' } },
});
const names = values.only?.split(',') ?? Object.keys(QUESTIONS);
const scale = values.quick ? 5 : 20;

await withVanilla(async (vanilla) => {
  const strata = await BenchedPlatform.start();
  try {
    const size = values.quick
      ? { rounds: 1, seconds: 3, branchCount: 100 }
      : { rounds: 3, seconds: 10, branchCount: 1000 };
    console.error('loading both …');
    await load(vanilla.connectionString, scale);
    await load(strata.connectionString, scale);
    const rows: Row[] = [];
    for (const name of names) {
      const question = QUESTIONS[name];
      if (question === undefined)
        throw new Error(`no question "${name}"; there are ${Object.keys(QUESTIONS).join(', ')}`);
      console.error(`${name} …`);
      rows.push(...(await question({ vanilla, strata, ...size })));
    }
    console.log(values.json ? JSON.stringify(rows, undefined, 2) : formatTable(rows));
  } finally {
    await strata.destroy();
  }
});
