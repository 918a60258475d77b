/**
 * Is anything lost that was acknowledged? A real Postgres, with the shim that computes have, commits through three real safekeeper processes while they are killed and stopped, while the network
 * between is cut, while the proposer is replaced under it, and while it is killed itself. Its clients write down what they did and what they were told; a
 * stock hot standby, which has nothing but the safekeepers' WAL, is asked what there is.
 *
 *   lists      each writer appends 1, 2, 3… to a list of its own: what was acknowledged is there, in order, once; nothing is there that was not tried;
 *              what the standby has shown once stays
 *   register   many writers set one value and count its versions: no version is given twice, none that was acknowledged is taken back
 *   bank       transfers between accounts: the sum never changes
 *   pgbench    if asked for, beside them: what it has added to accounts, tellers, branches and history is the same
 *
 * The network is a proxy before each safekeeper, or, if asked for, a network namespace for each, as on a host of its own.
 *
 * For many rounds: bin/node test/end-to-end/log-faults.ts --help
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { execFile } from 'node:child_process';
import { chmodSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { Command } from 'commander';
import type { Client } from 'pg';
import { readWal, type TimelineIdentity } from '../../src/api/safekeeper.ts';
import { signToken } from '../../src/base/token.ts';
import { electProposer, type Proposer } from '../../src/compute/proposer.ts';
import { buildShim } from '../../src/compute/shim/build.ts';
import { startWalPush, type WalPush } from '../../src/compute/wal-push.ts';
import { inspectDataDirectory } from '../../src/pageserver/import-check.ts';
import { formatLsn, parseLsn } from '../../src/postgres/lsn.ts';
import { Cluster } from '../ingest/cluster.ts';
import { CutProxy, type Link } from './cut-proxy.ts';
import { NetworkNamespace } from './network-namespace.ts';
import { waitUntil } from './platform.ts';
import { SafekeeperProcess } from './safekeeper-process.ts';

export interface FaultOptions {
  readonly rounds: number;
  readonly seed: number;
  readonly log: (text: string) => void;
  /** pgbench runs all the time. */
  readonly withPgbench?: boolean;
  /** Each safekeeper has a network namespace of its own; needs root. */
  readonly withNamespaces?: boolean;
}

export interface FaultReport {
  readonly rounds: number;
  readonly acknowledged: number;
  readonly unknown: number;
  readonly faults: Readonly<Record<string, number>>;
}

const SETTINGS = `synchronous_standby_names = 'strata'\nwal_sender_timeout = 0\n`;
const STANDBY_SETTINGS = 'hot_standby = on\nwal_receiver_status_interval = 1\nwal_retrieve_retry_interval = 100\n';
const WRITERS = 4;
const ACCOUNTS = 10;
const MONEY = 1_000;
const CATCH_UP_MS = 60_000;

/** Throws an AssertionError that says what was lost. */
export async function runFaults(options: FaultOptions): Promise<FaultReport> {
  const { rounds, seed, log, withPgbench = false, withNamespaces = false } = options;
  const random = generator(seed);
  const root = mkdtempSync(join(tmpdir(), 'strata-faults-'));
  chmodSync(root, 0o711); // Postgres, which runs as another user, loads the shim.
  const secret = randomBytes(32);
  const namespaces = withNamespaces
    ? [1, 2, 3].map((nodeId) => new NetworkNamespace(nodeId, () => safekeepers[nodeId - 1]!.address.port))
    : undefined;
  const safekeepers: readonly SafekeeperProcess[] = [1, 2, 3].map((nodeId) => {
    const config = { objectStore: join(root, 'store') };
    const namespace = namespaces?.[nodeId - 1];
    const place = namespace === undefined ? {} : { host: namespace.host, prefix: namespace.prefix };
    return new SafekeeperProcess({ nodeId, dataDir: join(root, String(nodeId)), secret, config, ...place });
  });
  const links: readonly Link[] = namespaces ?? safekeepers.map((safekeeper) => new CutProxy(() => safekeeper.address));
  await using primary = new Cluster();
  await using standby = new Cluster();
  const history = new History();
  try {
    await Promise.all(links.map((each) => each.start()));
    await Promise.all(safekeepers.map((each) => each.start()));
    primary.initdb();
    standby.becomeStandbyOf(primary);
    const timeline = identityOf(primary);
    const env = { LD_PRELOAD: await buildShim(join(root, 'shim')) };
    const startPrimary = (): Promise<void> => primary.start(SETTINGS, env);
    await startPrimary();
    const leader = new Leader(primary, links, timeline, await signToken(secret, { scope: 'platform' }));
    await leader.replace(true);
    await prepare(primary);
    const { timelineId } = timeline;
    const password = await signToken(secret, { scope: 'timeline', timelineId });
    const hosts = links.map(({ address }) => address.host).join(',');
    const ports = links.map(({ address }) => address.port).join(',');
    const conninfo = `host=${hosts} port=${ports} user=${timelineId} password=${password} sslmode=disable connect_timeout=2`;
    await standby.start(`${STANDBY_SETTINGS}primary_conninfo = '${conninfo}'`);
    const onStandby = await standby.connect();
    onStandby.on('error', () => {}); // It stays open to the end.

    const writers = startWriters(primary, history, random);
    const pgbench = withPgbench ? await startPgbench(primary) : undefined;
    const faults: Record<string, number> = {};
    for (let round = 1; round <= rounds; round++) {
      const name = FAULTS[Math.floor(random() * FAULTS.length)]!;
      faults[name] = (faults[name] ?? 0) + 1;
      const before = history.acknowledged;
      await sleep(100 + random() * 300);
      await inflict(name, { safekeepers, links, primary, startPrimary, leader, random });
      const deadline = Date.now() + CATCH_UP_MS;
      // Liveness: once the fault is over, commits go on.
      const goal = history.acknowledged + 20;
      while (history.acknowledged < goal) {
        assert(Date.now() < deadline, `round ${round} (${name}): no commits for ${CATCH_UP_MS} ms`);
        if (leader.isOver) await leader.replace(false);
        await sleep(10);
      }
      const seen = history.snapshot();
      await followed(onStandby, leader.commitLsn);
      await history.check(onStandby, seen, `round ${round} (${name})`);
      if (withPgbench) await checkPgbench(onStandby, `round ${round} (${name})`);
      log(`round ${round}: ${name}, ${history.acknowledged - before} acknowledged`);
    }
    await writers.stop();
    const pgbenchRuns = await pgbench?.stop();
    const seen = history.snapshot();
    await sleep(50);
    await followed(onStandby, leader.commitLsn);
    await history.check(onStandby, seen, 'at the end');
    if (pgbenchRuns !== undefined)
      log(`pgbench: ${await checkPgbench(onStandby, 'at the end')} transactions in ${pgbenchRuns} runs`);
    await equalLogs(safekeepers, timeline, await signToken(secret, { scope: 'platform' }), leader.commitLsn);
    await leader.close();
    return { rounds, acknowledged: history.acknowledged, unknown: history.unknown, faults };
  } finally {
    for (const safekeeper of safekeepers) safekeeper.signal('SIGCONT');
    await Promise.all(safekeepers.map((safekeeper) => safekeeper.kill()));
    for (const link of links) link.close();
    rmSync(root, { recursive: true, force: true });
  }
}

const FAULTS = [
  'kill one safekeeper',
  'kill two safekeepers',
  'kill all safekeepers',
  'stop one safekeeper',
  'stop two safekeepers',
  'cut one off',
  'cut two off',
  'silence one',
  'silence two',
  'another proposer',
  'another proposer with one cut off',
  'kill Postgres',
  'kill Postgres and one safekeeper',
] as const;
type Fault = (typeof FAULTS)[number];

interface World {
  readonly safekeepers: readonly SafekeeperProcess[];
  readonly links: readonly Link[];
  readonly primary: Cluster;
  readonly startPrimary: () => Promise<void>;
  readonly leader: Leader;
  readonly random: () => number;
}

/** Does it, waits a little, and undoes it. */
async function inflict(fault: Fault, world: World): Promise<void> {
  const { safekeepers, links, leader, random } = world;
  const first = Math.floor(random() * 3);
  const chosen = [first, (first + 1) % 3, (first + 2) % 3];
  const some = chosen.slice(0, fault.includes('all') ? 3 : fault.includes('two') ? 2 : 1);
  const pauseMs = 100 + random() * 700;
  if (fault.startsWith('kill') && fault.includes('safekeeper')) {
    await Promise.all(some.map((index) => safekeepers[index]!.kill()));
    if (fault.includes('Postgres')) await restartPostgres(world, pauseMs);
    else await sleep(pauseMs);
    await Promise.all(some.map((index) => safekeepers[index]!.start()));
  } else if (fault.startsWith('stop')) {
    for (const index of some) safekeepers[index]!.signal('SIGSTOP');
    await sleep(2 * pauseMs);
    for (const index of some) safekeepers[index]!.signal('SIGCONT');
  } else if (fault.startsWith('cut') || fault.startsWith('silence')) {
    for (const index of some) links[index]!.mode = fault.startsWith('cut') ? 'cut' : 'silent';
    await sleep(2 * pauseMs);
    for (const index of some) links[index]!.mode = 'open';
  } else if (fault.startsWith('another proposer')) {
    if (fault.includes('cut')) links[first]!.mode = 'cut';
    await leader.replace(false);
    await sleep(pauseMs);
    links[first]!.mode = 'open';
  } else {
    await restartPostgres(world, pauseMs / 4);
  }
}

async function restartPostgres({ primary, startPrimary, leader }: World, pauseMs: number): Promise<void> {
  await primary.kill();
  await sleep(pauseMs);
  for (let attempt = 0; ; attempt++) {
    try {
      await startPrimary();
      break;
    } catch (error) {
      if (attempt === 20) throw error;
      await sleep(200); // Its processes are still going.
    }
  }
  await leader.replace(false);
}

/** The proposer of the primary, and the one before it, which is not told that it is over. */
class Leader {
  readonly #primary: Cluster;
  readonly #links: readonly Link[];
  readonly #timeline: TimelineIdentity;
  readonly #token: string;
  #proposer: Proposer | undefined;
  #push: WalPush | undefined;
  #isOver = false;

  constructor(primary: Cluster, links: readonly Link[], timeline: TimelineIdentity, token: string) {
    this.#primary = primary;
    this.#links = links;
    this.#timeline = timeline;
    this.#token = token;
  }

  get commitLsn(): number {
    return this.#proposer?.commitLsn ?? 0;
  }

  get isOver(): boolean {
    return this.#isOver;
  }

  async replace(isFirst: boolean): Promise<void> {
    const before = this.#proposer;
    const push = this.#push;
    const proposer = await electProposer({
      safekeepers: this.#links.map(({ address }) => address),
      token: this.#token,
      timeline: this.#timeline,
      mayCreate: isFirst,
      signal: AbortSignal.timeout(CATCH_UP_MS),
    });
    await push?.close();
    this.#proposer = proposer;
    this.#isOver = false;
    const [socketDir, port] = socketOf(this.#primary);
    for (let attempt = 0; ; attempt++) {
      try {
        const options = { socketDir, port, user: 'postgres', password: '', slotName: 'strata', proposer };
        this.#push = await startWalPush(options);
        break;
      } catch (error) {
        if (attempt === 50) throw error;
        await sleep(100); // The slot is still the old one's.
      }
    }
    const started = this.#push;
    void started.closed.then(() => {
      if (this.#push === started) this.#isOver = true;
    });
    // Fenced by the new one, if it still hears anybody.
    setTimeout(() => void before?.close(), 1_000).unref();
  }

  async close(): Promise<void> {
    await this.#push?.close();
    await this.#proposer?.close();
  }
}

interface Seen {
  readonly lists: readonly (readonly number[])[];
  readonly version: number;
}

/** What clients did, and what they were told. */
class History {
  acknowledged = 0;
  unknown = 0;
  /** By writer: what was acknowledged, and how far was tried. */
  readonly lists = Array.from({ length: WRITERS }, () => ({ acknowledged: [] as number[], tried: 0 }));
  readonly versions = new Map<number, string>();
  #shown: number[][] = Array.from({ length: WRITERS }, () => []);
  #version = 0;

  snapshot(): Seen {
    return {
      lists: this.lists.map(({ acknowledged }) => acknowledged.slice()),
      version: Math.max(0, ...this.versions.keys()),
    };
  }

  /** Compares what there is with what had been acknowledged when `seen` was taken. */
  async check(client: Client, seen: Seen, when: string): Promise<void> {
    await client.query('BEGIN ISOLATION LEVEL REPEATABLE READ');
    const { rows } = await client.query<{ key: number; items: number[] }>('SELECT key, items FROM lists ORDER BY key');
    const bank = await client.query<{ sum: string }>('SELECT sum(amount) AS sum FROM bank');
    const register = await client.query<{ version: number; value: string }>('SELECT version, value FROM register');
    await client.query('COMMIT');
    for (const { key, items } of rows) {
      const there = new Set(items);
      const lost = seen.lists[key]!.filter((n) => !there.has(n));
      assert.deepEqual(lost, [], `${when}: list ${key} has lost what was acknowledged`);
      assert.equal(there.size, items.length, `${when}: list ${key} has something twice`);
      assert(
        items.every((n, at) => at === 0 || n > items[at - 1]!),
        `${when}: list ${key} is out of order`,
      );
      assert((items.at(-1) ?? 0) <= this.lists[key]!.tried, `${when}: list ${key} has what nobody wrote`);
      const shown = this.#shown[key]!;
      assert.deepEqual(items.slice(0, shown.length), shown, `${when}: list ${key} was shown otherwise before`);
      this.#shown[key] = items;
    }
    assert.equal(Number(bank.rows[0]!.sum), ACCOUNTS * MONEY, `${when}: money was made or lost`);
    const { version, value } = register.rows[0]!;
    assert(version >= seen.version && version >= this.#version, `${when}: the register went back to ${version}`);
    const told = this.versions.get(version);
    assert(told === undefined || told === value, `${when}: version ${version} is ${value}, acknowledged was ${told}`);
    this.#version = version;
  }
}

async function prepare(primary: Cluster): Promise<void> {
  const client = await primary.connect();
  client.on('error', () => {}); // It stays open, and Postgres will be killed.
  await client.query('CREATE TABLE lists (key int PRIMARY KEY, items int[] NOT NULL)');
  await client.query(`INSERT INTO lists SELECT key, '{}' FROM generate_series(0, ${WRITERS - 1}) AS key`);
  await client.query('CREATE TABLE register (version int NOT NULL, value text NOT NULL)');
  await client.query(`INSERT INTO register VALUES (0, '')`);
  await client.query('CREATE TABLE bank (account int PRIMARY KEY, amount int NOT NULL)');
  await client.query(`INSERT INTO bank SELECT n, ${MONEY} FROM generate_series(1, ${ACCOUNTS}) AS n`);
}

function startWriters(primary: Cluster, history: History, random: () => number): { stop(): Promise<void> } {
  let isStopping = false;
  const write = async (writer: number): Promise<void> => {
    let client: Client | undefined;
    for (let count = 0; !isStopping; count++) {
      try {
        if (client === undefined) {
          client = await primary.connect();
          client.on('error', () => {});
        }
        await step(client, writer, count);
        history.acknowledged++;
      } catch {
        history.unknown++;
        void client?.end().catch(() => {});
        client = undefined;
        await sleep(50);
      }
    }
  };
  const step = async (client: Client, writer: number, count: number): Promise<void> => {
    const list = history.lists[writer]!;
    if (count % 3 === 0) {
      const n = ++list.tried;
      await client.query('UPDATE lists SET items = items || $1::int WHERE key = $2', [n, writer]);
      list.acknowledged.push(n);
    } else if (count % 3 === 1) {
      const value = `${writer}/${count}/${random()}`;
      const sql = 'UPDATE register SET version = version + 1, value = $1 RETURNING version';
      const { rows } = await client.query<{ version: number }>(sql, [value]);
      const { version } = rows[0]!;
      assert(!history.versions.has(version), `version ${version} was given twice`);
      history.versions.set(version, value);
    } else {
      const [from, to] = [1 + Math.floor(random() * ACCOUNTS), 1 + Math.floor(random() * ACCOUNTS)];
      await client.query(
        `WITH taken AS (UPDATE bank SET amount = amount - CASE WHEN account = $1 THEN 1 ELSE -1 END
           WHERE account IN ($1, $2) AND $1 <> $2 RETURNING 1) SELECT count(*) FROM taken`,
        [from, to],
      );
    }
  };
  const writers = Array.from({ length: WRITERS }, (_, writer) => write(writer));
  return {
    stop: async () => {
      isStopping = true;
      await Promise.all(writers);
    },
  };
}

/** TPC-B of pgbench, again and again, as each run ends with the Postgres that it is connected to. Resolves when its tables are there. */
async function startPgbench(primary: Cluster): Promise<{ stop(): Promise<number> }> {
  const { connectionInfo } = primary;
  await promisify(execFile)('pgbench', ['-i', '-q', '-s', '1', connectionInfo]);
  const stopping = new AbortController();
  const { signal } = stopping;
  const running = (async () => {
    for (let runs = 1; ; runs++) {
      const args = ['-n', '-c', '4', '-T', '3600', connectionInfo];
      await promisify(execFile)('pgbench', args, { signal }).catch(() => {}); // It ends with its Postgres.
      if (signal.aborted) return runs;
      await sleep(100);
    }
  })();
  return {
    stop: () => {
      stopping.abort();
      return running;
    },
  };
}

/** What pgbench has added to each of its tables is the same, in one transaction or in none. Resolves to the number of its transactions. */
async function checkPgbench(client: Client, when: string): Promise<number> {
  const { rows } = await client.query<Record<'accounts' | 'tellers' | 'branches' | 'history' | 'count', string>>(
    `SELECT (SELECT sum(abalance) FROM pgbench_accounts) AS accounts, (SELECT sum(tbalance) FROM pgbench_tellers) AS tellers,
       (SELECT sum(bbalance) FROM pgbench_branches) AS branches, coalesce(sum(delta), 0) AS history, count(*) AS count FROM pgbench_history`,
  );
  const { accounts, tellers, branches, history, count } = rows[0]!;
  assert.deepEqual([accounts, tellers, branches], [history, history, history], `${when}: pgbench's sums are equal`);
  return Number(count);
}

/** All three have the same bytes, up to the last commit. */
async function equalLogs(
  safekeepers: readonly SafekeeperProcess[],
  { tenantId, timelineId, startLsn }: TimelineIdentity,
  token: string,
  endLsn: number,
): Promise<void> {
  const logs = await Promise.all(
    safekeepers.map(async ({ address }) => {
      const parts: Buffer[] = [];
      const signal = AbortSignal.timeout(CATCH_UP_MS);
      for await (const { lsn, bytes } of readWal({ address, token, tenantId, timelineId, fromLsn: startLsn, signal })) {
        parts.push(Buffer.from(bytes));
        if (lsn + bytes.length >= endLsn) break;
      }
      return Buffer.concat(parts).subarray(0, endLsn - startLsn);
    }),
  );
  for (const log of logs) assert(log.length === endLsn - startLsn && log.equals(logs[0]!), 'the three logs are equal');
}

function identityOf(cluster: Cluster): TimelineIdentity {
  const { lsn, pgVersion, systemId } = inspectDataDirectory(cluster.dataDir);
  const [tenantId, timelineId] = [randomBytes(16).toString('hex'), randomBytes(16).toString('hex')];
  return { tenantId, timelineId, startLsn: lsn, pgVersion, systemId: String(systemId) };
}

function socketOf(cluster: Cluster): [string, number] {
  const [, host, port] = /host=(\S+) port=(\d+)/.exec(cluster.connectionInfo)!;
  return [host!, Number(port)];
}

async function followed(standby: Client, lsn: number): Promise<void> {
  const replayed = async (): Promise<boolean> => {
    const { rows } = await standby.query<{ lsn: string | null }>('SELECT pg_last_wal_replay_lsn()::text AS lsn');
    return parseLsn(rows[0]!.lsn ?? '0/0') >= lsn;
  };
  await waitUntil(replayed, `the standby has replayed ${formatLsn(lsn)}`, CATCH_UP_MS);
}

/** mulberry32 */
function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

if (import.meta.main) {
  const {
    rounds,
    seed = Math.floor(Math.random() * 2 ** 31),
    pgbench,
    namespaces,
  } = new Command('bin/node test/end-to-end/log-faults.ts')
    .description('Kills, stops and cuts off safekeepers, proposers and Postgres, and looks for commits that are lost.')
    .option('--rounds <count>', 'how many', Number, 10)
    .option('--seed <number>', 'which ones (default: by chance)', Number)
    .option('--pgbench', 'pgbench runs beside the checkers', false)
    .option('--namespaces', 'each safekeeper has a network namespace of its own; needs root', false)
    .parse()
    .opts<{ rounds: number; seed?: number; pgbench: boolean; namespaces: boolean }>();
  console.log(`seed ${seed}`);
  const log = (text: string): void => console.log(text);
  const report = await runFaults({ rounds, seed, log, withPgbench: pgbench, withNamespaces: namespaces });
  console.log(JSON.stringify(report, undefined, 2));
  process.exit(0);
}
