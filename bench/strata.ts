/**
 * A platform under measurement: the test suite's platform, with the ways in that a benchmark needs.
 */
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Client } from 'pg';
import { TestPlatform, withoutVerification } from '../test/end-to-end/platform.ts';
import { elapsedMs } from './measure.ts';

const IDLE_LOOK_MS = 2_000;
/** Of a core, by all processes of storage together. */
const IDLE_SHARE = 0.2;

export class BenchedPlatform {
  readonly #platform: TestPlatform;
  readonly #projectId: string;
  readonly #endpointId: string;

  private constructor(platform: TestPlatform, projectId: string, endpointId: string) {
    this.#platform = platform;
    this.#projectId = projectId;
    this.#endpointId = endpointId;
  }

  static async start(
    args: readonly string[] = [],
    env: Readonly<Record<string, string>> = {},
  ): Promise<BenchedPlatform> {
    const platform = await TestPlatform.start({ args: ['--suspend-timeout', '-1', ...args], env });
    const projects = (await platform.api('GET', '/projects')).body as { projects: { id: string }[] };
    const projectId = projects.projects[0]?.id ?? '';
    const endpoints = (await platform.api('GET', `/projects/${projectId}/endpoints`)).body as {
      endpoints: { id: string }[];
    };
    return new BenchedPlatform(platform, projectId, endpoints.endpoints[0]?.id ?? '');
  }

  get connectionString(): string {
    return this.#platform.connectionString;
  }

  plainConnectionString(): string {
    return this.connectionString.replace('sslmode=require', 'sslmode=disable');
  }

  /** Through a relay of one's own before the compute. */
  connectionStringAt(port: number, sslMode: string): string {
    const url = new URL(this.connectionString);
    return `postgresql://${url.username}:${url.password}@127.0.0.1:${port}${url.pathname}?sslmode=${sslMode}`;
  }

  /** Of the proxy. */
  certificate(): { readonly cert: string; readonly key: string } {
    const read = (name: string): string => readFileSync(join(this.#platform.dataDir, 'tls', name), 'utf8');
    return { cert: read('cert.pem'), key: read('key.pem') };
  }

  /** The compute's own Unix socket, past the proxy. */
  directConnectionString(): string {
    const url = new URL(this.connectionString);
    const socketDir = encodeURIComponent(this.#socketDir());
    return `postgresql://${url.username}:${url.password}@${socketDir}${url.pathname}`;
  }

  socketPath(): string {
    return join(this.#socketDir(), '.s.PGSQL.5432');
  }

  #socketDir(): string {
    const [postmaster] = this.#platform.postmasters();
    if (postmaster === undefined) throw new Error('no compute is running');
    return this.#platform.socketDirOf(basename(dirname(dirname(postmaster.dataDir))));
  }

  /** kill -9 of the one that runs. */
  killPostgres(): void {
    const [postmaster] = this.#platform.postmasters();
    if (postmaster === undefined) throw new Error('no compute is running');
    process.kill(postmaster.pid, 'SIGKILL');
  }

  /** Of the supervisor. */
  get pid(): number {
    return this.#platform.pid;
  }

  /** The platform's own first. */
  processes(): readonly { readonly pid: number; readonly command: string }[] {
    return [{ pid: this.#platform.pid, command: 'platform' }, ...this.#platform.descendants()];
  }

  async stop(): Promise<void> {
    await this.#platform.stop();
  }

  /** After `stop`: again on its data. */
  async start(): Promise<void> {
    await this.#platform.start();
  }

  async firstRow(connectionString: string): Promise<void> {
    await this.value(connectionString, 'SELECT 1');
  }

  async value(connectionString: string, sql: string): Promise<unknown> {
    const client = new Client({ connectionString: withoutVerification(connectionString) });
    await client.connect();
    try {
      const { rows } = await client.query<unknown[]>({ text: sql, rowMode: 'array' });
      return rows[0]?.[0];
    } finally {
      await client.end();
    }
  }

  /** Milliseconds of the statement alone, without connecting. */
  async timedQuery(connectionString: string, sql: string): Promise<number> {
    return (await this.timedQueries(connectionString, [sql]))[0]!;
  }

  /** Of each statement, one after the other in one session. */
  async timedQueries(connectionString: string, statements: readonly string[]): Promise<number[]> {
    const client = new Client({ connectionString: withoutVerification(connectionString) });
    await client.connect();
    try {
      const times: number[] = [];
      for (const sql of statements) times.push(await elapsedMs(() => client.query(sql)));
      return times;
    } finally {
      await client.end();
    }
  }

  /** Resolves when all WAL is in pages, all pages that were flushed are in the object store, and no process of storage has work left (merges of layers). */
  async caughtUp(): Promise<void> {
    for (;;) {
      const { wal, object_store: store } = await this.#platform.cliJson<{
        readonly wal: readonly { readonly not_in_pages_size: number }[];
        readonly object_store?: { readonly pending_size: number };
      }>(['status']);
      const isDone = wal.every((lag) => lag.not_in_pages_size === 0) && (store?.pending_size ?? 0) === 0;
      const busySeconds = this.#storageCpuSeconds();
      await sleep(IDLE_LOOK_MS);
      if (isDone && this.#storageCpuSeconds() - busySeconds < IDLE_SHARE * (IDLE_LOOK_MS / 1000)) return;
    }
  }

  #storageCpuSeconds(): number {
    const storage = this.processes().filter(({ command }) => /(pageserver|safekeeper \d+)$/.test(command));
    return storage.reduce((sum, { pid }) => {
      const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
      const [user, system] = stat
        .slice(stat.lastIndexOf(')') + 2)
        .split(' ')
        .slice(11, 13); // hundredths of seconds
      return sum + (Number(user) + Number(system)) / 100;
    }, 0);
  }

  async cli(args: readonly string[]): Promise<void> {
    await this.#platform.cli(args);
  }

  async suspend(): Promise<void> {
    await this.#platform.cli(['endpoints', 'suspend', this.#endpointId]);
  }

  /** Removes what a suspended compute left on this machine, in the data directory or, where Postgres cannot reach that, beside the sockets. */
  forgetCache(): void {
    const parents = [this.#platform.dataDir, dirname(this.#platform.socketDirOf(this.#endpointId))];
    const folder = parents.map((parent) => join(parent, 'computes', this.#endpointId)).find((path) => existsSync(path));
    const left = folder === undefined ? [] : readdirSync(folder);
    assert(
      folder !== undefined && left.length > 0,
      'a suspended compute leaves a cache; without one "cold" is not measured',
    );
    for (const name of left) rmSync(join(folder, name), { recursive: true, force: true });
  }

  async createBranch(name: string): Promise<void> {
    const { status, body } = await this.#platform.api('POST', `/projects/${this.#projectId}/branches`, {
      branch: { name },
    });
    if (status !== 201) throw new Error(`creating ${name}: ${status} ${JSON.stringify(body)}`);
  }

  destroy(): Promise<void> {
    return this.#platform.destroy();
  }
}
