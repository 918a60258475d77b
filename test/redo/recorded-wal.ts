/**
 * WAL to try redo on: a throw-away Postgres runs a workload with wal_consistency_checking, so that each record carries its pages as they
 * must be after replay, and leaves its pg_wal behind. Only index access methods are checked unless a test asks for more: images of heap
 * pages would make most of the WAL.
 */

import { execFileSync } from 'node:child_process';
import { chownSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import pg from 'pg';

import { findInstallation, reachableInstallation, unprivilegedUser } from '../../src/compute/installation.ts';
import { PostgresProcess } from '../../src/compute/postgres-process.ts';
import { parseLsn } from '../../src/postgres/lsn.ts';
import type { Lsn } from '../../src/postgres/lsn.ts';
import type { PgVersion } from '../../src/postgres/version.ts';

export interface RecordedWal extends Disposable {
  readonly directory: string;
  readonly version: PgVersion;
  /** Start of the first record that belongs to the workload. */
  readonly startLsn: Lsn;
}

/** What a workload may do: `sql` runs on the first session; `connect` opens another one, closed at the end. */
export interface WorkloadSessions {
  readonly sql: (text: string) => Promise<pg.QueryResult>;
  readonly connect: () => Promise<pg.Client>;
}

const PORT = 5432;

// Few and small buffers; no full page writes, so that records are replayed rather than restored; no autovacuum, so that runs are alike.
const SETTINGS = `
listen_addresses = ''
fsync = off
full_page_writes = off
wal_level = replica
wal_consistency_checking = 'btree,hash,gin,gist,spgist,brin,generic'
wal_keep_size = 8GB
max_wal_size = 8GB
autovacuum = off
shared_buffers = 64MB
maintenance_work_mem = 32MB
max_prepared_transactions = 5
track_commit_timestamp = on
`;

export interface RecordOptions {
  readonly pgBinDir?: string;
  readonly settings?: string;
}

/** STRATA_TEST_PG_VERSION runs the tests on another major than the default. */
function chosenVersion(): { pgVersion?: number } {
  const version = process.env['STRATA_TEST_PG_VERSION'];
  return version === undefined || version === '' ? {} : { pgVersion: Number(version) };
}

/** Runs the workload and returns its WAL; disposing removes it. */
export async function recordWal(
  workload: (sessions: WorkloadSessions) => Promise<void>,
  options: RecordOptions = {},
): Promise<RecordedWal> {
  const directory = mkdtempSync(join(tmpdir(), 'strata-wal-'));
  const user = unprivilegedUser();
  const installation = reachableInstallation(
    findInstallation(options.pgBinDir === undefined ? chosenVersion() : { pgBinDir: options.pgBinDir }),
    user,
    join(directory, 'bin'),
  );
  if (user !== undefined) chownSync(directory, user.uid, user.gid);
  const dataDir = join(directory, 'data');
  const remove = (): void => rmSync(directory, { recursive: true, force: true });
  try {
    execFileSync(
      join(installation.binDir, 'initdb'),
      ['-D', dataDir, '-U', 'postgres', '-A', 'trust', '--no-sync', '--no-locale', '-E', 'UTF8', '--no-instructions'],
      { stdio: 'pipe', cwd: directory, ...(user === undefined ? {} : { uid: user.uid, gid: user.gid }) },
    );
    writeFileSync(
      join(dataDir, 'postgresql.auto.conf'),
      `${SETTINGS}port = ${PORT}\nunix_socket_directories = '${directory}'\n${options.settings ?? ''}`,
    );
    const server = await PostgresProcess.start({ installation, dataDir, logFile: join(directory, 'log'), user });
    const clients: pg.Client[] = [];
    try {
      const connect = async (): Promise<pg.Client> => {
        const client = new pg.Client({ host: directory, port: PORT, user: 'postgres', database: 'postgres' });
        await client.connect();
        clients.push(client);
        return client;
      };
      const first = await connect();
      await first.query('CHECKPOINT');
      const found = await first.query<{ redo: string }>('SELECT redo_lsn::text AS redo FROM pg_control_checkpoint()');
      const startLsn = parseLsn(found.rows[0]?.redo ?? '');
      await workload({ sql: (text) => first.query(text), connect });
      await Promise.all(clients.map((client) => client.end()));
      if (!(await server.stop('fast', 30_000))) throw new Error('Postgres did not shut down');
      return {
        directory: join(dataDir, 'pg_wal'),
        version: installation.pgVersion,
        startLsn,
        [Symbol.dispose]: remove,
      };
    } catch (error) {
      server.kill();
      throw error;
    }
  } catch (error) {
    remove();
    throw error;
  }
}
