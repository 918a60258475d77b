/**
 * The template: a fresh cluster of one Postgres version, initialised once per platform and imported into the page store. Every project's main branch begins as
 * a branch of it, so creating a project costs no initdb.
 */
import { execFile } from 'node:child_process';
import { chownSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { CatalogSpec } from '../api/control.ts';
import { StrataError } from '../base/errors.ts';
import { ADMIN_DATABASE, applyCatalog, connectAdmin, createOwnerGroup } from '../compute/admin.ts';
import { installationEnvironment, type PostgresInstallation, type UnixUser } from '../compute/installation.ts';
import { PostgresProcess } from '../compute/postgres-process.ts';
import { ADMIN_ROLE, encodeSettings, hbaFile } from '../compute/settings.ts';
import { makeFolderFor } from './platform-directory.ts';

export interface TemplateOptions {
  readonly installation: PostgresInstallation;
  readonly user: UnixUser | undefined;
  /** Scratch folder that Postgres can enter; the cluster is made in a folder below it. */
  readonly runDir: string;
  readonly adminPassword: string;
  /** What every new project has from the start. */
  readonly catalog: CatalogSpec;
}

const STOP_TIMEOUT_MS = 60_000;

/** Timelines of templates: their id says the version. */
export function templateTimelineId(pgVersion: number): string {
  return String(pgVersion).padStart(32, '0');
}

export const TEMPLATE_TENANT_ID = '0'.repeat(32);

/** Makes a cleanly stopped cluster, gives its data directory to `use`, and removes it. */
export async function withFreshCluster<T>(options: TemplateOptions, use: (dataDir: string) => Promise<T>): Promise<T> {
  const workDir = join(options.runDir, `template-${options.installation.pgVersion}`);
  rmSync(workDir, { recursive: true, force: true });
  makeFolderFor(options.user, workDir);
  try {
    const dataDir = join(workDir, 'data');
    await runInitdb(options, workDir, dataDir);
    await prepareCatalog(options, workDir, dataDir);
    return await use(dataDir);
  } finally {
    rmSync(workDir, { recursive: true, force: true });
  }
}

async function runInitdb(options: TemplateOptions, workDir: string, dataDir: string): Promise<void> {
  const { installation, user } = options;
  const passwordFile = join(workDir, 'password');
  writeOwned(user, passwordFile, `${options.adminPassword}\n`);
  const args = [
    ...[
      '-D',
      dataDir,
      '-U',
      ADMIN_ROLE,
      `--pwfile=${passwordFile}`,
      '--auth=scram-sha-256',
      '--encoding=UTF8',
      '--no-sync',
    ],
    // From 17 Postgres has a locale of its own that needs nothing of the system and never changes under an index.
    ...(installation.pgVersion >= 17 ? ['--locale-provider=builtin', '--builtin-locale=C.UTF-8'] : []),
    '--locale=C',
    ...(installation.pgVersion >= 18 ? ['--no-data-checksums'] : []),
  ];
  try {
    await promisify(execFile)(join(installation.binDir, 'initdb'), args, {
      cwd: workDir,
      env: { ...installationEnvironment(installation), LC_ALL: 'C' },
      ...(user === undefined ? {} : { uid: user.uid, gid: user.gid }),
    });
  } catch (error) {
    const { stderr } = error as { stderr?: string };
    throw new StrataError(
      'internal',
      `initdb of Postgres ${installation.fullVersion} failed: ${stderr?.trim() ?? String(error)}`,
      {
        cause: error,
      },
    );
  }
}

async function prepareCatalog(options: TemplateOptions, workDir: string, dataDir: string): Promise<void> {
  const { installation, user } = options;
  writeOwned(
    user,
    join(dataDir, 'postgresql.conf'),
    encodeSettings({
      listen_addresses: '',
      unix_socket_directories: workDir,
      fsync: 'off',
      wal_level: 'replica',
      timezone: 'UTC',
    }),
  );
  writeOwned(user, join(dataDir, 'pg_hba.conf'), hbaFile);
  const postgres = await PostgresProcess.start({ installation, dataDir, user, logFile: join(workDir, 'log') });
  try {
    const client = await connectAdmin({ socketDir: workDir, password: options.adminPassword }, ADMIN_DATABASE);
    try {
      await createOwnerGroup(client, installation.pgVersion);
      await applyCatalog(client, options.catalog);
    } finally {
      await client.end();
    }
  } finally {
    await postgres.stop('fast', STOP_TIMEOUT_MS);
  }
}

function writeOwned(user: UnixUser | undefined, path: string, content: string): void {
  writeFileSync(path, content, { mode: 0o600 });
  if (user !== undefined) chownSync(path, user.uid, user.gid);
}
