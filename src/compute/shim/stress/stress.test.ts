import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { PageRange } from '../../../api/pages.ts';
import { BLOCK_SIZE } from '../../../postgres/page-size.ts';
import { createPageMap, createRelationFolders, createSparseRelationFiles, type RelationFork } from '../../page-map.ts';
import { buildShim } from '../build.ts';
import { shimEnvironment, TEST_TIMELINE, TEST_TOKEN } from '../test-cluster.ts';
import { type Fault, TestPageServer } from '../test-page-server.ts';

const PATH = 'base/5/16384';
const RELATION = { spc: 1663, db: 5, rel: 16384, fork: 0 };
const ROUND_MS = 300;
const root = mkdtempSync(join(tmpdir(), 'strata-stress-'));
let shim: string;
let program: string;

before(async () => {
  shim = await buildShim(root);
  program = join(root, 'stress');
  const source = join(import.meta.dirname, 'stress.c');
  await promisify(execFile)('cc', [
    '-std=gnu11',
    '-O1',
    '-Wall',
    '-Wextra',
    '-Werror',
    '-o',
    program,
    source,
    '-lpthread',
  ]);
});

after(() => rmSync(root, { recursive: true, force: true }));

/** Version 0 of a page, as stress.c knows it. */
function originalPages(range: PageRange): Buffer {
  assert.deepEqual(
    { spc: range.spc, db: range.db, rel: range.rel, fork: range.fork, lsn: range.lsn },
    { ...RELATION, lsn: 100 },
  );
  const words = new Uint32Array((range.count * BLOCK_SIZE) / 4);
  for (let page = 0; page < range.count; page++) {
    const block = Math.imul(range.blk + page, 2654435761);
    const at = (page * BLOCK_SIZE) / 4;
    words[at + 1] = 1;
    for (let i = 2; i < BLOCK_SIZE / 4; i++) words[at + i] = block ^ i;
  }
  return Buffer.from(words.buffer);
}

function seededRandom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

interface StressOptions {
  readonly name: string;
  readonly blocks: number;
  readonly rounds: number;
  readonly fault: () => Fault;
  readonly restartEveryMs?: number;
}

/** Rounds are short, each with a file of which no page is there: only while pages are absent is there anything to get wrong. */
async function stress(options: StressOptions): Promise<string> {
  const server = new TestPageServer(originalPages, { token: TEST_TOKEN, fault: options.fault });
  await server.start();
  let running = true;
  const restarts = (async () => {
    while (running && options.restartEveryMs !== undefined) {
      await sleep(options.restartEveryMs);
      await server.stop();
      await server.start();
    }
  })();
  const reports: string[] = [];
  try {
    for (let round = 0; round < options.rounds; round++) {
      const dataDir = join(root, `${options.name}-${round}`);
      mkdirSync(dataDir);
      const relations: RelationFork[] = [{ ...RELATION, blocks: options.blocks }];
      const pageMap = `${dataDir}.map`;
      const filesOnFirstUse = round % 2 === 1;
      createPageMap(pageMap, { startLsn: 100, timelineId: TEST_TIMELINE, relations, filesOnFirstUse });
      (filesOnFirstUse ? createRelationFolders : createSparseRelationFiles)(dataDir, 17, relations);
      const env = shimEnvironment({ shim, dataDir, pageMap, port: server.port });
      reports.push(
        await run([PATH, String(options.blocks), '6', String(ROUND_MS), String(seed + round)], dataDir, env),
      );
      rmSync(dataDir, { recursive: true });
    }
  } finally {
    running = false;
    await restarts;
    await server.stop();
  }
  return `${reports.join('; ')}; ${server.requestCount} requests for ${server.pageCount} pages`;
}

async function run(args: readonly string[], cwd: string, env: Record<string, string>): Promise<string> {
  const child = spawn(program, args, { cwd, env: { PATH: '/usr/bin:/bin', ...env } });
  const timeout = setTimeout(() => child.pid && process.kill(-child.pid, 'SIGKILL'), 20_000);
  let output = '';
  child.stdout.on('data', (chunk: Buffer) => (output += chunk.toString()));
  child.stderr.on('data', (chunk: Buffer) => (output += chunk.toString()));
  const code = await new Promise<number | null>((resolve) => child.once('close', resolve));
  clearTimeout(timeout);
  assert.equal(code, 0, `arguments ${args.join(' ')}: ${output.slice(0, 2000)}`);
  return output.trim().split('\n').at(-1) ?? '';
}

const seed = Number(process.env['SEED'] ?? Date.now() % 1_000_000);

test(`no fetched page overwrites a written one, none comes back after a truncation (seed ${seed})`, async (t) => {
  t.diagnostic(await stress({ name: 'plain', blocks: 6000, rounds: 7, fault: () => 'none' }));
});

test(`nor when the pageserver lies, stalls and hangs up (seed ${seed})`, async (t) => {
  const random = seededRandom(seed);
  const faults: Fault[] = ['disconnect', 'short', 'wrong-id', 'wrong-length', 'error', 'slow'];
  const fault = (): Fault => (random() < 0.2 ? faults[Math.floor(random() * faults.length)]! : 'none');
  t.diagnostic(await stress({ name: 'faults', blocks: 6000, rounds: 4, fault }));
});

test(`nor when it is killed and started again (seed ${seed})`, async (t) => {
  t.diagnostic(await stress({ name: 'restarts', blocks: 20_000, rounds: 4, fault: () => 'none', restartEveryMs: 60 }));
});
