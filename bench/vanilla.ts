/**
 * The other contender: the same Postgres binaries with the same memory settings, fsync and full-page writes on, on a local directory.
 */
import { chownSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { freePort } from '../src/base/free-port.ts';
import { ADMIN_ROLE, encodeSettings } from '../src/compute/settings.ts';
import { findInstallation, unprivilegedUser } from '../src/compute/installation.ts';
import { PostgresProcess } from '../src/compute/postgres-process.ts';
import { withFreshCluster } from '../src/platform/template.ts';
import { makeFolderFor } from '../src/platform/platform-directory.ts';

export interface Vanilla {
  readonly connectionString: string;
  /** At its Unix socket: to be compared with a compute's. */
  directConnectionString(): string;
  readonly pid: number;
  stop(): Promise<void>;
  start(): Promise<void>;
}

const PASSWORD = 'vanilla';
const STOP_TIMEOUT_MS = 120_000;

export async function withVanilla<T>(
  use: (vanilla: Vanilla) => Promise<T>,
  env: Readonly<Record<string, string>> = {},
): Promise<T> {
  const user = unprivilegedUser();
  const installation = findInstallation({});
  const runDir = mkdtempSync(join(tmpdir(), 'strata-bench-'));
  makeFolderFor(user, runDir);
  const port = await freePort();
  const options = { installation, user, runDir, adminPassword: PASSWORD, catalog: { roles: [], databases: [] } };
  return withFreshCluster(options, async (dataDir) => {
    const write = (name: string, text: string): void => {
      writeFileSync(join(dataDir, name), text);
      if (user !== undefined) chownSync(join(dataDir, name), user.uid, user.gid);
    };
    const settings = {
      listen_addresses: '127.0.0.1',
      port: String(port),
      unix_socket_directories: runDir,
      shared_buffers: '128MB',
      max_wal_size: '1GB',
      max_prepared_transactions: '64',
      timezone: 'UTC',
    };
    write('postgresql.conf', encodeSettings(settings));
    write('pg_hba.conf', 'local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n');
    let postgres: PostgresProcess | undefined;
    const vanilla = {
      connectionString: `postgresql://${ADMIN_ROLE}:${PASSWORD}@127.0.0.1:${port}/postgres`,
      directConnectionString: () =>
        `postgresql://${ADMIN_ROLE}:${PASSWORD}@${encodeURIComponent(runDir)}:${port}/postgres`,
      get pid(): number {
        return postgres?.pid ?? 0;
      },
      start: async () => {
        postgres = await PostgresProcess.start({ installation, dataDir, user, logFile: join(runDir, 'log'), env });
      },
      stop: async () => {
        await postgres?.stop('fast', STOP_TIMEOUT_MS);
      },
    };
    await vanilla.start();
    try {
      return await use(vanilla);
    } finally {
      await vanilla.stop();
      rmSync(runDir, { recursive: true, force: true });
    }
  });
}
