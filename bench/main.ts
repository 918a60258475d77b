/**
 * `npm run bench`: Strata and vanilla Postgres (the same binaries) in the same run on the same machine; medians of several rounds.
 */
import { Command, InvalidArgumentError, Option } from 'commander';
import { append } from './append.ts';
import { branchCreation } from './branch-creation.ts';
import { bulkInsert } from './bulk-insert.ts';
import { changes } from './changes.ts';
import { commitLatency } from './commit-latency.ts';
import { coldScan } from './cold-scan.ts';
import { decode } from './decode.ts';
import { durableCommits } from './durable-commits.ts';
import { failover } from './failover.ts';
import { getPage } from './get-page.ts';
import { growth } from './growth.ts';
import { idleMemory } from './idle-memory.ts';
import { ingest } from './ingest.ts';
import { formatTable, type Row } from './measure.ts';
import { nestedBranches } from './nested-branches.ts';
import { load } from './pgbench.ts';
import { redo } from './redo.ts';
import { scale as sizes } from './scale.ts';
import { slowDisk } from './slow-disk.ts';
import { space } from './space.ts';
import { BenchedPlatform } from './strata.ts';
import { type Vanilla, withVanilla } from './vanilla.ts';
import { wake } from './wake.ts';
import { warmReads } from './warm-reads.ts';

export interface Contenders {
  readonly vanilla: Vanilla;
  readonly strata: BenchedPlatform;
  /** Of the processes of both. */
  readonly env: Readonly<Record<string, string>>;
  readonly rounds: number;
  /** Of each pgbench run. */
  readonly seconds: number;
  /** Of pgbench's tables. */
  readonly scale: number;
}

const QUESTIONS: Readonly<Record<string, (contenders: Contenders) => Promise<Row[]>>> = {
  'warm-reads': warmReads,
  'durable-commits': durableCommits,
  'bulk-insert': bulkInsert,
  'cold-scan': coldScan,
  wake,
  failover,
  'idle-memory': idleMemory,
  'branch-creation': branchCreation,
};

/** Questions to parts of Strata, for which no platform is started. */
const PART_QUESTIONS: Readonly<Record<string, (options: { readonly quick: boolean }) => Promise<Row[]>>> = {
  append,
  'commit-latency': commitLatency,
  decode,
  redo,
  ingest,
  'get-page': getPage,
  'nested-branches': nestedBranches,
  changes,
  scale: sizes,
  growth,
  space,
};

const KNOWN = [...Object.keys(PART_QUESTIONS), ...Object.keys(QUESTIONS)];

interface Options {
  readonly quick: boolean;
  readonly only: readonly string[];
  /** Milliseconds. */
  readonly syncDelay: number;
  readonly json: boolean;
}

const {
  quick,
  only: names,
  syncDelay,
  json,
} = new Command('npm run bench --')
  .description(
    'Asks Strata and a vanilla Postgres in turns, and prints figures and ratios. Without options: everything.',
  )
  .option('--quick', 'short rounds, for a look', false)
  .addOption(
    new Option('--only <names>', `some of the questions, with commas between: ${KNOWN.join(', ')}`)
      .argParser(parseNames)
      .default(KNOWN, 'all'),
  )
  .option('--sync-delay <ms>', 'both on a disk whose flushes take so much longer', parseMilliseconds, 0)
  .option('--json', 'the rows as JSON instead of a table', false)
  .parse()
  .opts<Options>();
const env = syncDelay === 0 ? {} : slowDisk(syncDelay);
const scale = quick ? 5 : 20;
const rows: Row[] = [];

for (const name of names) {
  const question = PART_QUESTIONS[name];
  if (question === undefined) continue;
  console.error(`${name} …`);
  rows.push(...(await question({ quick })));
}

const platformNames = names.filter((name) => name in QUESTIONS);
if (platformNames.length > 0) await withVanilla(askPlatform, env);
console.log(json ? JSON.stringify(rows, undefined, 2) : formatTable(rows));

async function askPlatform(vanilla: Vanilla): Promise<void> {
  const strata = await BenchedPlatform.start([], env);
  try {
    const size = quick ? { rounds: 1, seconds: 3, scale } : { rounds: 3, seconds: 10, scale };
    console.error('loading both …');
    await load(vanilla.connectionString, scale);
    await load(strata.connectionString, scale);
    for (const name of platformNames) {
      console.error(`${name} …`);
      rows.push(...(await QUESTIONS[name]!({ vanilla, strata, env, ...size })));
    }
  } finally {
    await strata.destroy();
  }
}

function parseNames(text: string): string[] {
  const given = text.split(',');
  const unknown = given.find((name) => !KNOWN.includes(name));
  if (unknown !== undefined) throw new InvalidArgumentError(`There is no question "${unknown}".`);
  return given;
}

function parseMilliseconds(text: string): number {
  const value = Number(text);
  if (!(value >= 0)) throw new InvalidArgumentError('Give milliseconds, such as 1 or 0.5.');
  return value;
}
