/**
 * A real platform for a test: `strata start` as a child process on free ports and a data directory of its own, and the clients that
 * users have (psql, pgbench, the `pg` package) against it.
 *
 * STRATA_TEST_PG_VERSION runs the tests on another major than the default, STRATA_TEST_PG_BIN_DIR on the Postgres installed there.
 */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, readlinkSync, realpathSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { Client } from 'pg';
import { freePort } from '../../src/base/free-port.ts';

const executable = resolve(import.meta.dirname, '../../bin/strata');
const START_TIMEOUT_MS = 60_000;
const run = promisify(execFile);

export interface PlatformOptions {
  readonly dataDir?: string;
  readonly args?: readonly string[];
  /** Added to the environment of the platform's processes. */
  readonly env?: Readonly<Record<string, string>>;
}

export interface CommandResult {
  readonly stdout: string;
  readonly stderr: string;
}

export class TestPlatform {
  readonly dataDir: string;
  readonly pgPort: number;
  readonly httpPort: number;
  readonly #args: readonly string[];
  readonly #env: Readonly<Record<string, string>>;
  #child: ChildProcess | undefined;
  #output = '';

  private constructor(
    dataDir: string,
    pgPort: number,
    httpPort: number,
    args: readonly string[],
    env: Readonly<Record<string, string>>,
  ) {
    this.dataDir = dataDir;
    this.pgPort = pgPort;
    this.httpPort = httpPort;
    this.#args = args;
    this.#env = env;
  }

  static async start(options: PlatformOptions = {}): Promise<TestPlatform> {
    const dataDir = options.dataDir ?? mkdtempSync(join(tmpdir(), 'strata-test-'));
    const args = [...versionArgs(options.args ?? []), ...(options.args ?? [])];
    const platform = new TestPlatform(dataDir, await freePort(), await freePort(), args, options.env ?? {});
    await platform.start();
    return platform;
  }

  /** Starts it (again) on the same ports and data; resolves when it has printed `ready`. Other arguments take the place of the first ones, `env` is added. */
  async start(others: readonly string[] = this.#args, env: Readonly<Record<string, string>> = {}): Promise<void> {
    const args = ['start', '--data-dir', this.dataDir, '--pg-port', String(this.pgPort)];
    const child = spawn(executable, [...args, '--http-port', String(this.httpPort), ...others], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...this.#env, ...env },
    });
    this.#child = child;
    this.#output = '';
    const collect = (chunk: Buffer): void => {
      this.#output += chunk.toString();
    };
    child.stdout.on('data', collect);
    child.stderr.on('data', collect);
    const deadline = Date.now() + START_TIMEOUT_MS;
    while (!/^ready$/m.test(this.#output)) {
      if (child.exitCode !== null || child.signalCode !== null || Date.now() > deadline) {
        child.kill('SIGKILL');
        throw new Error(`the platform did not start:\n${this.#output}\n${this.logs()}`);
      }
      await sleep(5);
    }
  }

  /** What the platform printed since its last start. */
  get output(): string {
    return this.#output;
  }

  get pid(): number {
    return this.#child?.pid ?? 0;
  }

  get connectionString(): string {
    const match = /postgresql:\/\/\S+/.exec(this.#output);
    assert(match !== null, `no connection string in: ${this.#output}`);
    return match[0];
  }

  get apiKey(): string {
    return readFileSync(join(this.dataDir, 'api-key'), 'utf8').trim();
  }

  /** Clean stop by SIGTERM; the exit code. */
  async stop(): Promise<number | null> {
    const child = this.#child;
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return child?.exitCode ?? null;
    const exited = new Promise<number | null>((done) => child.once('exit', (code) => done(code)));
    child.kill('SIGTERM');
    return exited;
  }

  /** kill -9 of everything at once: the supervisor, its services, every Postgres. */
  async killEverything(): Promise<void> {
    const pids = [this.pid, ...this.descendants().map((process) => process.pid)];
    for (const pid of pids) kill(pid);
    await waitUntil(() => pids.every((pid) => !isAlive(pid)), 'all killed processes are gone');
  }

  /** Stops and removes everything. */
  async destroy(): Promise<void> {
    await this.stop();
    for (const folder of [this.runDir, this.dataDir]) rmSync(folder, { recursive: true, force: true, maxRetries: 20 });
  }

  /** kill -9 of the one service process whose command line ends so, for example `pageserver` or `safekeeper 2`. */
  killService(name: string): number {
    const found = this.descendants().find((process) => process.command.endsWith(name));
    assert(found !== undefined, `no process "${name}" among ${JSON.stringify(this.descendants())}`);
    kill(found.pid);
    return found.pid;
  }

  /** Postmasters that run below this platform. */
  postmasters(): readonly { pid: number; dataDir: string }[] {
    return this.descendants()
      .filter((process) => /\/postgres -D /.test(process.command))
      .map((process) => ({ pid: process.pid, dataDir: process.command.replace(/^.* -D (\S+).*$/, '$1') }));
  }

  /** The folder of an endpoint's Unix socket. */
  socketDirOf(endpointId: string): string {
    return join(this.runDir, endpointId);
  }

  /** The platform's folder in the temporary directory (platform-directory.ts). */
  get runDir(): string {
    const name = createHash('sha256').update(realpathSync(this.dataDir)).digest('hex').slice(0, 12);
    return join(tmpdir(), `strata-${process.geteuid?.() ?? 0}-${name}`);
  }

  /** Every process below the supervisor, with its command line. */
  descendants(): readonly { pid: number; command: string }[] {
    const parents = new Map<number, number[]>();
    const commands = new Map<number, string>();
    for (const name of readdirSync('/proc')) {
      const pid = Number(name);
      if (!Number.isInteger(pid)) continue;
      try {
        const status = readFileSync(`/proc/${pid}/stat`, 'utf8');
        const parent = Number(status.slice(status.lastIndexOf(')') + 2).split(' ')[1]);
        parents.set(parent, [...(parents.get(parent) ?? []), pid]);
        commands.set(pid, readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ').trim());
      } catch {
        // Gone meanwhile.
      }
    }
    const found: { pid: number; command: string }[] = [];
    const visit = (pid: number): void => {
      for (const child of parents.get(pid) ?? []) {
        found.push({ pid: child, command: commands.get(child) ?? '' });
        visit(child);
      }
    };
    visit(this.pid);
    return found;
  }

  /** A session of the platform's own superuser, over the compute's Unix socket. */
  async connectAdmin(endpointId: string, database = 'stratadb'): Promise<Client> {
    const { adminPassword } = JSON.parse(readFileSync(join(this.dataDir, 'secrets.json'), 'utf8')) as {
      adminPassword: string;
    };
    const host = this.socketDirOf(endpointId);
    const client = new Client({ host, user: 'strata_admin', password: adminPassword, database });
    client.on('error', () => {});
    await client.connect();
    return client;
  }

  /** Signs the tokens of the platform's parts. */
  get platformSecret(): Buffer {
    const text = readFileSync(join(this.dataDir, 'secrets.json'), 'utf8');
    return Buffer.from((JSON.parse(text) as { platformSecret: string }).platformSecret, 'hex');
  }

  /** The TCP ports that a service process listens on, its name as in killService(). */
  listeningPorts(name: string): number[] {
    const found = this.descendants().find((process) => process.command.endsWith(name));
    assert(found !== undefined, `no process "${name}" among ${JSON.stringify(this.descendants())}`);
    const folder = `/proc/${found.pid}/fd`;
    const links = readdirSync(folder).map((fd) => {
      try {
        return readlinkSync(join(folder, fd));
      } catch {
        return ''; // closed meanwhile
      }
    });
    const LISTEN = '0A';
    // Columns of /proc/net/tcp: slot, local address:port in hex, remote, state, …, inode.
    const lines = readFileSync('/proc/net/tcp', 'utf8').trim().split('\n').slice(1);
    return lines.flatMap((line) => {
      const columns = line.trim().split(/\s+/);
      const isOurs = columns[3] === LISTEN && links.includes(`socket:[${columns[9]}]`);
      return isOurs ? [Number.parseInt(columns[1]?.split(':')[1] ?? '', 16)] : [];
    });
  }

  /** Rows as psql prints them unaligned, tuples only. */
  async psql(sql: string, connectionString = this.connectionString): Promise<string> {
    const { stdout } = await run(
      'psql',
      ['-X', '-A', '-t', '-q', '-v', 'ON_ERROR_STOP=1', '-d', connectionString, '-c', sql],
      {
        maxBuffer: 1 << 28,
      },
    );
    return stdout.trimEnd();
  }

  /** COPY table FROM STDIN, from a psql that is given `rowCount` lines. */
  async copyIn(table: string, rowCount: number, line: (n: number) => string): Promise<void> {
    const child = spawn(
      'psql',
      ['-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', this.connectionString, '-c', `COPY ${table} FROM STDIN`],
      {
        stdio: ['pipe', 'ignore', 'pipe'],
      },
    );
    let errors = '';
    child.stderr.on('data', (chunk: Buffer) => (errors += chunk.toString()));
    const exited = new Promise<number | null>((done) => child.once('exit', done));
    let batch = '';
    for (let n = 1; n <= rowCount; n++) {
      batch += line(n);
      if (batch.length < 1 << 16 && n < rowCount) continue;
      if (!child.stdin.write(batch)) await new Promise((done) => child.stdin.once('drain', done));
      batch = '';
    }
    child.stdin.end();
    assert.equal(await exited, 0, errors);
  }

  async pgbench(args: readonly string[], connectionString = this.connectionString): Promise<CommandResult> {
    return run('pgbench', [...args, connectionString], { maxBuffer: 1 << 28 });
  }

  async cli(args: readonly string[]): Promise<CommandResult> {
    return run(executable, args, { maxBuffer: 1 << 28, env: { ...process.env, STRATA_DATA_DIR: this.dataDir } });
  }

  async cliJson<T>(args: readonly string[]): Promise<T> {
    const { stdout } = await this.cli([...args, '--output', 'json']);
    return JSON.parse(stdout) as T;
  }

  async api(method: string, path: string, body?: unknown): Promise<{ status: number; body: unknown }> {
    const response = await fetch(`http://127.0.0.1:${this.httpPort}/api/v2${path}`, {
      method,
      headers: { authorization: `Bearer ${this.apiKey}`, 'content-type': 'application/json' },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    });
    const text = await response.text();
    return { status: response.status, body: text === '' ? undefined : JSON.parse(text) };
  }

  async connect(connectionString = this.connectionString): Promise<Client> {
    const client = new Client({ connectionString: withoutVerification(connectionString) });
    client.on('error', () => {});
    await client.connect();
    return client;
  }

  /** All logs, for a failing test's message. */
  logs(): string {
    const folder = join(this.dataDir, 'logs');
    try {
      return readdirSync(folder)
        .map((name) => `--- ${name}\n${readFileSync(join(folder, name), 'utf8').slice(-4000)}`)
        .join('\n');
    } catch {
      return '';
    }
  }
}

/** What the environment says about the Postgres to run on, unless the test says it itself. */
function versionArgs(args: readonly string[]): readonly string[] {
  if (args.some((arg) => arg === '--pg-version' || arg === '--pg-bin-dir')) return [];
  const version = process.env['STRATA_TEST_PG_VERSION'];
  const binDir = process.env['STRATA_TEST_PG_BIN_DIR'];
  return [
    ...(version === undefined || version === '' ? [] : ['--pg-version', version]),
    ...(binDir === undefined || binDir === '' ? [] : ['--pg-bin-dir', binDir]),
  ];
}

/** The `pg` package reads sslmode=require as a demand to verify; libpq does not. */
export function withoutVerification(connectionString: string): string {
  return connectionString.replace('sslmode=require', 'sslmode=no-verify');
}

export function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch {
    // Gone already.
  }
}

export function isAlive(pid: number): boolean {
  try {
    readlinkSync(`/proc/${pid}/exe`);
    return true;
  } catch {
    return false;
  }
}

export async function waitUntil(
  condition: () => boolean | Promise<boolean>,
  what: string,
  timeoutMs = 30_000,
): Promise<void> {
  const deadline = Date.now() + timeoutMs;
  while (!(await condition())) {
    if (Date.now() > deadline) throw new Error(`waited ${timeoutMs} ms in vain until ${what}`);
    await sleep(20);
  }
}
