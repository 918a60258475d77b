/**
 * A throw-away cluster of vanilla Postgres: made by initdb, run for a workload, stopped, and compared with what the pageserver has made of
 * its WAL. Postgres is the one from npm, or the one in STRATA_TEST_PG_BIN_DIR.
 */

import { execFileSync } from 'node:child_process';
import { chmodSync, chownSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import pg from 'pg';

import { findInstallation, reachableInstallation, unprivilegedUser } from '../../src/compute/installation.ts';
import type { PostgresInstallation, UnixUser } from '../../src/compute/installation.ts';
import { PostgresProcess } from '../../src/compute/postgres-process.ts';
import { WAL_SEGMENT_SIZE, segmentStart, walFileName } from '../../src/postgres/lsn.ts';
import type { Lsn } from '../../src/postgres/lsn.ts';
import type { PgVersion } from '../../src/postgres/version.ts';
import { WalReader } from '../../src/postgres/wal/reader.ts';
import type { WalRecord } from '../../src/postgres/wal/record.ts';

const PORT = 5432;

const SETTINGS = `
listen_addresses = ''
fsync = off
full_page_writes = off
wal_level = replica
wal_keep_size = 8GB
max_wal_size = 8GB
checkpoint_timeout = 1h
autovacuum = off
shared_buffers = 64MB
max_prepared_transactions = 10
port = ${PORT}
`;

export class Cluster implements AsyncDisposable {
  readonly #directory: string;
  readonly #installation: PostgresInstallation;
  readonly #user: UnixUser | undefined;
  #server: PostgresProcess | undefined;
  #clients: pg.Client[] = [];

  constructor(pgBinDir = process.env['STRATA_TEST_PG_BIN_DIR']) {
    this.#directory = mkdtempSync(join(tmpdir(), 'strata-ingest-'));
    this.#user = unprivilegedUser();
    if (this.#user !== undefined) chownSync(this.#directory, this.#user.uid, this.#user.gid);
    const installation = findInstallation({ pgBinDir });
    this.#installation = reachableInstallation(installation, this.#user, join(this.#directory, 'bin'));
  }

  get version(): PgVersion {
    return this.#installation.pgVersion;
  }

  get dataDir(): string {
    return join(this.#directory, 'data');
  }

  /** How another server connects to this one. */
  get connectionInfo(): string {
    return `host=${this.#directory} port=${PORT} user=postgres`;
  }

  initdb(): void {
    const user = this.#user;
    execFileSync(
      join(this.#installation.binDir, 'initdb'),
      [
        '-D',
        this.dataDir,
        '-U',
        'postgres',
        '-A',
        'trust',
        '--no-sync',
        '--no-locale',
        '-E',
        'UTF8',
        '--no-instructions',
        ...(this.version >= 18 ? ['--no-data-checksums'] : []),
      ],
      { stdio: 'pipe', cwd: this.#directory, ...(user === undefined ? {} : { uid: user.uid, gid: user.gid }) },
    );
  }

  /** Takes over the directory of a cluster that is stopped, and becomes a hot standby of it when both are started. */
  becomeStandbyOf(primary: Cluster): void {
    execFileSync('cp', ['-a', primary.dataDir, this.dataDir]);
    writeFileSync(join(this.dataDir, 'standby.signal'), '');
    this.#own(join(this.dataDir, 'standby.signal'));
  }

  /** Makes the directory out of files; parents as needed. */
  writeDataDirectory(files: readonly { readonly path: string; readonly bytes: Buffer }[]): void {
    for (const directory of ['.', ...DIRECTORIES]) {
      mkdirSync(join(this.dataDir, directory), { recursive: true });
      this.#own(join(this.dataDir, directory));
    }
    chmodSync(this.dataDir, 0o700);
    const hba = { path: 'pg_hba.conf', bytes: Buffer.from('local all all trust\n') };
    const none = ['pg_ident.conf', 'postgresql.conf'].map((path) => ({ path, bytes: Buffer.alloc(0) }));
    for (const { path, bytes } of [hba, ...none, ...files]) {
      const parent = join(this.dataDir, path, '..');
      mkdirSync(parent, { recursive: true });
      this.#own(parent);
      writeFileSync(join(this.dataDir, path), bytes);
      this.#own(join(this.dataDir, path));
    }
  }

  /** `env` is added to the environment of Postgres. */
  async start(settings = '', env: Readonly<Record<string, string>> = {}): Promise<void> {
    writeFileSync(
      join(this.dataDir, 'postgresql.auto.conf'),
      `${SETTINGS}unix_socket_directories = '${this.#directory}'\n${settings}`,
    );
    this.#own(join(this.dataDir, 'postgresql.auto.conf'));
    this.#server = await PostgresProcess.start({
      installation: this.#installation,
      dataDir: this.dataDir,
      logFile: join(this.#directory, 'log'),
      user: this.#user,
      env,
    });
  }

  /** A session, closed when the cluster stops. */
  async connect(database = 'postgres'): Promise<pg.Client> {
    const client = new pg.Client({ host: this.#directory, port: PORT, user: 'postgres', database });
    await client.connect();
    this.#clients.push(client);
    return client;
  }

  /** Ends all sessions but one. */
  async disconnectOthers(kept: pg.Client): Promise<void> {
    await Promise.all(this.#clients.filter((client) => client !== kept).map((client) => client.end()));
    this.#clients = [kept];
  }

  async stop(): Promise<void> {
    await Promise.all(this.#clients.map((client) => client.end()));
    this.#clients = [];
    const stopped = await this.#server?.stop('fast', 30_000);
    this.#server = undefined;
    if (stopped === false) throw new Error('Postgres did not shut down');
  }

  /** kill -9, as in a crash of the machine; it can be started again. */
  async kill(): Promise<void> {
    const server = this.#server;
    this.#server = undefined;
    server?.kill();
    await server?.exited;
    this.#clients = [];
  }

  /** What the server has complained about. */
  complaints(): string[] {
    const log = readFileSync(join(this.#directory, 'log'), 'utf8');
    return log.split('\n').filter((line) => /\b(WARNING|ERROR|FATAL|PANIC):/.test(line));
  }

  /** The records from `startLsn` on, until they end. */
  *records(startLsn: Lsn): Generator<WalRecord> {
    const reader = new WalReader(startLsn, this.version);
    for (let lsn = startLsn; ; lsn = segmentStart(lsn) + WAL_SEGMENT_SIZE) {
      let bytes: Buffer;
      try {
        bytes = readFileSync(join(this.dataDir, 'pg_wal', walFileName(1, lsn)));
      } catch {
        return;
      }
      reader.push(lsn, bytes.subarray(lsn - segmentStart(lsn)));
      try {
        for (let record = reader.next(); record !== undefined; record = reader.next()) yield record;
      } catch {
        return; // the zeroes after the last record
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server?.kill();
    await this.#server?.exited;
    rmSync(this.#directory, { recursive: true, force: true });
  }

  #own(path: string): void {
    if (this.#user !== undefined) chownSync(path, this.#user.uid, this.#user.gid);
  }
}

const DIRECTORIES = [
  'base',
  'global',
  'pg_commit_ts',
  'pg_dynshmem',
  'pg_logical',
  'pg_logical/mappings',
  'pg_logical/snapshots',
  'pg_multixact',
  'pg_multixact/members',
  'pg_multixact/offsets',
  'pg_notify',
  'pg_replslot',
  'pg_serial',
  'pg_snapshots',
  'pg_stat',
  'pg_stat_tmp',
  'pg_subtrans',
  'pg_tblspc',
  'pg_twophase',
  'pg_wal',
  'pg_wal/archive_status',
  'pg_wal/summaries',
  'pg_xact',
];
