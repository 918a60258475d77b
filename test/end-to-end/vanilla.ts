/**
 * A stock Postgres for tests of import and export: started by pg_ctl on a directory, without anything of Strata's. And what is compared between
 * it and a branch: the content of every table, sequence and large object of a database.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { chownSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { Client } from 'pg';
import {
  findInstallation,
  installationEnvironment,
  type PostgresInstallation,
  reachableInstallation,
  unprivilegedUser,
} from '../../src/compute/installation.ts';

const run = promisify(execFile);

/** Whether a test of these versions runs always, or only with `STRATA_TEST_ALL_VERSIONS`: it takes long, and the versions differ little. */
export function testsVersion(version: number, always: readonly number[]): boolean {
  return always.includes(version) || (process.env['STRATA_TEST_ALL_VERSIONS'] ?? '') !== '';
}

export class VanillaPostgres implements AsyncDisposable {
  readonly installation: PostgresInstallation;
  readonly dataDir: string;
  readonly #folder: string;
  readonly #user = unprivilegedUser();
  readonly #clients: Client[] = [];
  #isRunning = false;

  /** `dataDir`: one that is there already; without it initdb is to be called. `pgBinDir`: other binaries than npm's. */
  constructor(version: number, dataDir?: string, pgBinDir?: string) {
    this.#folder = mkdtempSync(join(tmpdir(), 'strata-vanilla-'));
    if (this.#user !== undefined) chownSync(this.#folder, this.#user.uid, this.#user.gid);
    const found = findInstallation({ pgVersion: version, ...(pgBinDir === undefined ? {} : { pgBinDir }) });
    const staging = join(tmpdir(), `strata-vanilla-binaries-${process.geteuid?.()}`);
    this.installation = reachableInstallation(found, this.#user, staging);
    this.dataDir = dataDir ?? join(this.#folder, 'data');
  }

  async initdb(args: readonly string[] = []): Promise<void> {
    await this.#program('initdb', ['-D', this.dataDir, '-U', 'postgres', '-A', 'trust', '--no-sync', ...args]);
  }

  /** `settings` are added to the command line. */
  async start(settings: Readonly<Record<string, string>> = {}): Promise<void> {
    const all = { listen_addresses: '', unix_socket_directories: this.#folder, ...settings };
    const options = Object.entries(all).map(([name, value]) => `-c ${name}='${value}'`);
    const args = ['start', '-w', '-D', this.dataDir, '-l', join(this.#folder, 'log'), '-o', options.join(' ')];
    try {
      await this.#program('pg_ctl', args);
    } catch (error) {
      const { stdout } = await run('tail', ['-n', '30', join(this.#folder, 'log')]);
      throw new Error(`pg_ctl start failed: ${stdout}`, { cause: error });
    }
    this.#isRunning = true;
  }

  async stop(mode = 'fast'): Promise<void> {
    await Promise.all(this.#clients.splice(0).map(async (client) => client.end()));
    if (this.#isRunning) await this.#program('pg_ctl', ['stop', '-w', '-m', mode, '-D', this.dataDir]);
    this.#isRunning = false;
  }

  /** Closed when the server stops. */
  async connect(database = 'postgres', user = 'postgres', password?: string, port = 5432): Promise<Client> {
    const secret = password === undefined ? {} : { password };
    const client = new Client({ host: this.#folder, port, user, database, ...secret });
    client.on('error', () => {});
    await client.connect();
    this.#clients.push(client);
    return client;
  }

  get socketDir(): string {
    return this.#folder;
  }

  /** A file in the data directory, as its owner would write it. */
  write(name: string, text: string): void {
    writeFileSync(join(this.dataDir, name), text, { mode: 0o600 });
    if (this.#user !== undefined) chownSync(join(this.dataDir, name), this.#user.uid, this.#user.gid);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop('immediate').catch(() => {});
    rmSync(this.#folder, { recursive: true, force: true, maxRetries: 20 });
  }

  async #program(name: string, args: readonly string[]): Promise<void> {
    const { installation } = this;
    await run(join(installation.binDir, name), [...args], {
      cwd: this.#folder,
      env: { ...installationEnvironment(installation), LC_ALL: 'C.UTF-8' },
      ...(this.#user === undefined ? {} : { uid: this.#user.uid, gid: this.#user.gid }),
    });
  }
}

/** A folder that Postgres' user can enter, for directories to be made in. */
export function folderForExports(): string {
  const folder = mkdtempSync(join(tmpdir(), 'strata-export-'));
  mkdirSync(folder, { recursive: true, mode: 0o755 });
  const user = unprivilegedUser();
  if (user !== undefined) chownSync(folder, user.uid, user.gid);
  return folder;
}

/** By name: rows and a hash of each table and materialized view, state of each sequence, hash of each large object. */
export async function contentsOf(client: Client): Promise<Record<string, string>> {
  const contents: Record<string, string> = {};
  const relations = await client.query<{ name: string; kind: string }>(
    `SELECT format('%I.%I', nspname, relname) AS name, relkind::text AS kind
       FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
      WHERE relkind IN ('r', 'm', 'S') AND nspname NOT IN ('pg_catalog', 'information_schema') AND nspname !~ '^pg_toast'
        AND relpersistence <> 't'
      ORDER BY 1`,
  );
  for (const { name, kind } of relations.rows) {
    const sql =
      kind === 'S'
        ? `SELECT last_value || ' ' || is_called AS value FROM ${name}`
        : `SELECT count(*) || ' ' || coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) AS value FROM ${name} AS t`;
    contents[name] = (await client.query<{ value: string }>(sql)).rows[0]!.value;
  }
  const objects = await client.query<{ oid: string }>('SELECT oid::text FROM pg_largeobject_metadata ORDER BY oid');
  for (const { oid } of objects.rows) {
    const { rows } = await client.query<{ value: string }>(`SELECT md5(lo_get(${oid})) AS value`);
    contents[`large object ${oid}`] = rows[0]!.value;
  }
  return contents;
}

/** WAL has a sequence up to 32 values ahead of itself, as Postgres after a crash shows too. */
export function assertSameContents(actual: Record<string, string>, expected: Record<string, string>): void {
  const withoutAdvance = Object.fromEntries(
    Object.entries(actual).map(([name, value]) => {
      const then = expected[name];
      if (!/^-?\d+ (true|false)$/.test(value) || then === undefined) return [name, value];
      const ahead = Number.parseInt(value, 10) - Number.parseInt(then, 10);
      return [name, ahead >= 0 && ahead <= 32 ? then : value];
    }),
  );
  assert.deepEqual(withoutAdvance, expected);
}

/** amcheck of every heap and B-tree of the database, catalogs included, by its superuser. Gives what it has found. */
export async function amcheck(client: Client): Promise<string[]> {
  await client.query('CREATE EXTENSION IF NOT EXISTS amcheck');
  const found: string[] = [];
  const { rows } = await client.query<{ oid: string; name: string; kind: string }>(
    `SELECT c.oid::text, c.oid::regclass::text AS name, relkind::text AS kind
       FROM pg_class AS c JOIN pg_am ON pg_am.oid = relam
      WHERE (amname = 'btree' OR (amname = 'heap' AND relkind IN ('r', 't', 'm'))) AND relpersistence = 'p'
        AND relkind IN ('r', 't', 'm', 'i')`,
  );
  for (const { oid, name, kind } of rows) {
    try {
      if (kind === 'i') {
        await client.query(`SELECT bt_index_check(${oid}::regclass, true)`);
      } else {
        const damage = await client.query<{ msg: string }>(`SELECT msg FROM verify_heapam(${oid}::regclass)`);
        for (const { msg } of damage.rows) found.push(`${name}: ${msg}`);
      }
    } catch (error) {
      found.push(`${name}: ${error instanceof Error ? error.message : String(error)}`);
    }
  }
  return found;
}
