/** A real Postgres whose commits wait for three real safekeeper processes, some of which are killed. */
import assert from 'node:assert/strict';
import { execFile, execFileSync, spawn, type ChildProcess } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  chmodSync,
  chownSync,
  rmSync,
  appendFileSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { Client } from 'pg';
import { readWal, SafekeeperClient, type SafekeeperEndpoint, type TimelineIdentity } from '../api/safekeeper.ts';
import { createLog } from '../base/log.ts';
import { findProcessors, SharedProcessor } from '../base/processors.ts';
import { signToken } from '../base/token.ts';
import { formatLsn, type Lsn, parseLsn } from '../postgres/lsn.ts';
import { RM_XACT } from '../postgres/rmgr.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import { findInstallation, reachableInstallation, unprivilegedUser } from './installation.ts';
import { PostgresProcess } from './postgres-process.ts';
import { electProposer } from './proposer.ts';
import { startWalPush } from './wal-push.ts';

const SECRET = randomBytes(32);
const PGBENCH = '/usr/bin/pgbench';
const USER = 'strata_admin';
const log = createLog({ name: 'test', level: 'silent' });
const processors = findProcessors();
const XACT_OPERATION_MASK = 0x70;
const XACT_COMMIT = 0x00;

interface Cluster {
  readonly postgres: PostgresProcess;
  readonly socketDir: string;
  readonly timeline: TimelineIdentity;
}

test('commits go on with one safekeeper of three killed, wait with two, and none is lost', async (context) => {
  const root = mkdtempSync(join(tmpdir(), 'strata-wal-push-'));
  chmodSync(root, 0o755);
  context.after(() => rmSync(root, { recursive: true, force: true }));
  const safekeepers = [1, 2, 3].map((nodeId) => new SafekeeperProcess(nodeId, join(root, `safekeeper-${nodeId}`)));
  context.after(() => safekeepers.forEach((safekeeper) => safekeeper.kill()));
  const [cluster] = await Promise.all([startPostgres(root, context), ...safekeepers.map((each) => each.start())]);
  const { socketDir, timeline, postgres } = cluster;
  const token = await signToken(SECRET, { scope: 'platform' });
  const addresses = safekeepers.map(({ address }) => address);
  const signal = AbortSignal.timeout(10_000);

  const proposer = await electProposer({
    safekeepers: addresses,
    token,
    timeline,
    mayCreate: true,
    signal,
    retainedBytes: 64 * 1024,
  });
  context.after(() => proposer.close());
  assert.equal(proposer.startLsn, timeline.startLsn, 'a new log begins where the branch does');
  const push = await startWalPush({
    socketDir,
    port: 5432,
    user: USER,
    password: 'secret',
    slotName: 'strata',
    proposer,
    processor: processors === undefined ? undefined : new SharedProcessor(processors, log),
  });
  await query(socketDir, `ALTER SYSTEM SET synchronous_standby_names = 'strata'`);
  await query(socketDir, `SELECT pg_reload_conf()`);
  await query(socketDir, 'CREATE TABLE ledger (writer int, number int)');

  const ledger = new Ledger(socketDir);
  await ledger.start(4);
  const load = startLoad(socketDir);
  const [first, second, third] = safekeepers as [SafekeeperProcess, SafekeeperProcess, SafekeeperProcess];
  await ledger.progress(50);

  first.kill();
  await ledger.progress(200);
  await first.start();
  await caughtUp(first, token, timeline, proposer.commitLsn);

  second.kill();
  third.kill();
  await sleep(100); // What was on its way.
  const before = ledger.count;
  await sleep(400);
  assert.equal(ledger.count, before, 'without a quorum no commit returns');
  await second.start();
  await ledger.progress(200);
  await third.start();
  await caughtUp(third, token, timeline, proposer.commitLsn);

  await ledger.stop();
  await load;
  await senderIsKept(socketDir);
  assert(await postgres.stop('fast', 10_000), 'Postgres shuts down cleanly: its last WAL is acknowledged');
  assert.equal(proposer.commitLsn, proposer.endLsn, 'all WAL is committed');
  const { endLsn } = proposer;
  await push.close();
  await proposer.close();

  const contents = await Promise.all(safekeepers.map(({ address }) => readAll({ address, token }, timeline, endLsn)));
  for (const { committed, digest } of contents) {
    const lost = ledger.xids.filter((xid) => !committed.has(xid));
    assert.deepEqual(lost, [], 'each acknowledged commit is in the WAL of each safekeeper');
    assert.equal(digest, contents[0]!.digest, 'all safekeepers have the same bytes');
  }
  context.diagnostic(`${ledger.count} commits acknowledged, WAL up to ${formatLsn(endLsn)}`);

  for (const safekeeper of safekeepers) safekeeper.kill();
  await Promise.all(safekeepers.map((safekeeper) => safekeeper.start()));
  const next = await electProposer({
    safekeepers: addresses,
    token,
    timeline,
    mayCreate: false,
    signal: AbortSignal.timeout(10_000),
  });
  assert.equal(next.startLsn, endLsn, 'a new leader starts where the log ended');
  assert(next.term > proposer.term, 'under a higher term');
  await next.close();
});

/** Waits until the process that sends the WAL runs on the processor that it was to be kept to. */
async function senderIsKept(socketDir: string): Promise<void> {
  if (processors === undefined) return;
  const pid = (await query(socketDir, 'SELECT pid FROM pg_stat_replication'))[0]?.['pid'] as number;
  const isKept = (): boolean =>
    new RegExp(`^Cpus_allowed_list:\\s*${processors.shared}$`, 'm').test(readFileSync(`/proc/${pid}/status`, 'latin1'));
  for (const deadline = Date.now() + 20_000; !isKept(); await sleep(20)) {
    assert(Date.now() < deadline, 'it still runs where the scheduler wants it to');
  }
}

/** `strata safekeeper`, on one port for all of its lives. */
class SafekeeperProcess {
  readonly #nodeId: number;
  readonly #dataDir: string;
  #child: ChildProcess | undefined;
  #port = 0;

  constructor(nodeId: number, dataDir: string) {
    this.#nodeId = nodeId;
    this.#dataDir = dataDir;
  }

  get address(): { host: string; port: number } {
    return { host: '127.0.0.1', port: this.#port };
  }

  async start(): Promise<void> {
    const script = resolve(import.meta.dirname, '../main.ts');
    const child = spawn(process.execPath, [script, 'safekeeper'], {
      stdio: ['pipe', 'pipe', process.env['STRATA_LOG_LEVEL'] === undefined ? 'ignore' : 'inherit'],
    });
    this.#child = child;
    const config = { nodeId: this.#nodeId, dataDir: this.#dataDir, port: this.#port, host: '127.0.0.1' };
    child.stdin!.write(`${JSON.stringify({ ...config, secret: SECRET.toString('hex') })}\n`);
    const [line] = (await once(createInterface({ input: child.stdout! }), 'line')) as [string];
    this.#port = (JSON.parse(line) as { port: number }).port;
  }

  /** kill -9. */
  kill(): void {
    this.#child?.kill('SIGKILL');
  }
}

async function startPostgres(root: string, context: TestContext): Promise<Cluster> {
  const user = unprivilegedUser();
  const installation = reachableInstallation(findInstallation({}), user, join(root, 'postgres'));
  const home = join(root, 'cluster');
  mkdirSync(home);
  if (user !== undefined) chownSync(home, user.uid, user.gid);
  const dataDir = join(home, 'data');
  const passwordFile = join(root, 'password');
  writeFileSync(passwordFile, 'secret\n');
  const owner = user === undefined ? {} : { uid: user.uid, gid: user.gid };
  execFileSync(
    join(installation.binDir, 'initdb'),
    ['-D', dataDir, '-U', USER, '-A', 'scram-sha-256', '-N', '--pwfile', passwordFile],
    { ...owner, cwd: home, stdio: ['ignore', 'ignore', 'inherit'] },
  );
  const settings = { fsync: 'off', full_page_writes: 'off', listen_addresses: '', unix_socket_directories: home };
  const lines = Object.entries(settings).map(([name, value]) => `${name} = '${value}'\n`);
  appendFileSync(join(dataDir, 'postgresql.conf'), lines.join(''));
  const postgres = await PostgresProcess.start({ installation, dataDir, logFile: join(root, 'postgres.log'), user });
  context.after(() => postgres.kill());
  if (existsSync(PGBENCH)) await pgbench(home, ['-i', '-q']);
  const [row] = await query(
    home,
    `SELECT pg_current_wal_flush_lsn()::text AS lsn, system_identifier::text AS id FROM pg_control_system()`,
  );
  const timeline: TimelineIdentity = {
    tenantId: randomBytes(16).toString('hex'),
    timelineId: randomBytes(16).toString('hex'),
    startLsn: parseLsn(row!['lsn'] as string),
    pgVersion: installation.pgVersion,
    systemId: row!['id'] as string,
  };
  return { postgres, socketDir: home, timeline };
}

function connection(socketDir: string): Client {
  return new Client({ host: socketDir, port: 5432, user: USER, password: 'secret', database: 'postgres' });
}

async function query(socketDir: string, sql: string): Promise<Record<string, unknown>[]> {
  const client = connection(socketDir);
  await client.connect();
  const { rows } = await client.query<Record<string, unknown>>(sql);
  await client.end();
  return rows;
}

async function pgbench(socketDir: string, args: readonly string[]): Promise<void> {
  const env = { ...process.env, PGPASSWORD: 'secret' };
  await promisify(execFile)(PGBENCH, ['-h', socketDir, '-U', USER, ...args, 'postgres'], { env });
}

/** Background noise, where the machine has pgbench. */
async function startLoad(socketDir: string): Promise<void> {
  if (existsSync(PGBENCH)) await pgbench(socketDir, ['-N', '-c', '4', '-T', '5']);
}

/** Clients that write rows and remember the transactions whose commit they were told of. */
class Ledger {
  readonly xids: number[] = [];
  readonly #socketDir: string;
  readonly #writers: Promise<void>[] = [];
  #isStopping = false;

  constructor(socketDir: string) {
    this.#socketDir = socketDir;
  }

  get count(): number {
    return this.xids.length;
  }

  async start(writerCount: number): Promise<void> {
    for (let writer = 0; writer < writerCount; writer++) {
      const client = connection(this.#socketDir);
      await client.connect();
      this.#writers.push(this.#write(client, writer));
    }
  }

  /** Resolves when so many more commits were acknowledged. */
  async progress(commitCount: number): Promise<void> {
    const goal = this.count + commitCount;
    const deadline = Date.now() + 10_000;
    while (this.count < goal) {
      assert(Date.now() < deadline, `commits go on: ${this.count} of ${goal}`);
      await sleep(5);
    }
  }

  async stop(): Promise<void> {
    this.#isStopping = true;
    await Promise.all(this.#writers);
  }

  async #write(client: Client, writer: number): Promise<void> {
    for (let number = 0; !this.#isStopping; number++) {
      const { rows } = await client.query<{ xid: string }>(
        'INSERT INTO ledger VALUES ($1, $2) RETURNING pg_current_xact_id()::text AS xid',
        [writer, number],
      );
      this.xids.push(Number(rows[0]!.xid));
    }
    await client.end();
  }
}

async function caughtUp(
  safekeeper: SafekeeperProcess,
  token: string,
  timeline: TimelineIdentity,
  lsn: Lsn,
): Promise<void> {
  const client = new SafekeeperClient({ address: safekeeper.address, token });
  const deadline = Date.now() + 10_000;
  for (;;) {
    const { commitLsn } = await client.status(timeline.tenantId, timeline.timelineId);
    if (commitLsn >= lsn) break;
    assert(Date.now() < deadline, `a restarted safekeeper catches up: ${formatLsn(commitLsn)} of ${formatLsn(lsn)}`);
    await sleep(10);
  }
  client.close();
}

/** The transactions that a safekeeper's WAL commits, each record checked. */
async function readAll(
  safekeeper: SafekeeperEndpoint,
  timeline: TimelineIdentity,
  endLsn: Lsn,
): Promise<{ committed: Set<number>; digest: string }> {
  const { tenantId, timelineId, startLsn } = timeline;
  const reader = new WalReader(startLsn, 17);
  const hash = createHash('sha256');
  const committed = new Set<number>();
  for await (const { lsn, bytes } of readWal({ ...safekeeper, tenantId, timelineId, fromLsn: startLsn })) {
    reader.push(lsn, bytes);
    hash.update(bytes);
    for (let record = reader.next(); record !== undefined; record = reader.next()) {
      const isCommit = record.rmid === RM_XACT && (record.info & XACT_OPERATION_MASK) === XACT_COMMIT;
      if (isCommit) committed.add(record.xid);
    }
    if (reader.position >= endLsn) break;
  }
  assert.equal(reader.position, endLsn, 'the WAL ends with a whole record');
  return { committed, digest: hash.digest('hex') };
}
