/**
 * Postgres' single-user mode: one backend without a postmaster, as the bootstrap superuser whatever that is called, and without passwords. For
 * what must be changed in a cluster before anybody can connect to it.
 *
 * A statement may fail without ending the session, so each caller asks at the end what has become of it. Rows are printed as
 * `\t 1: name = "value"\t(typeid = …)` (debugtup in src/backend/access/common/printtup.c).
 */
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { StrataError } from '../base/errors.ts';
import { installationEnvironment, type PostgresInstallation, type UnixUser } from './installation.ts';

export interface SingleUserOptions {
  readonly installation: PostgresInstallation;
  readonly dataDir: string;
  readonly user: UnixUser | undefined;
  readonly database: string;
  /** Settings of this session. */
  readonly settings?: Readonly<Record<string, string>>;
  /** Added to a minimal environment. */
  readonly env?: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal;
}

export interface SingleUserOutput {
  /** `name = value` pairs of all rows, in order. */
  readonly values: readonly (readonly [name: string, value: string])[];
  /** `ERROR`, `WARNING`, … lines. */
  readonly complaints: readonly string[];
}

const TIMEOUT_MS = 10 * 60_000;
const VALUE_LINE = /^\t\s*\d+: (\S+) = "(.*)"\t\(typeid/gm;
const COMPLAINT_LINE = /^.*\b(?:WARNING|ERROR|FATAL|PANIC): .*$/gm;

/**
 * Runs the statements, each by itself, and shuts the cluster down cleanly. Throws `internal`, with what Postgres said, when it could not run to its end.
 * Statements are given on standard input: secrets in them are seen by nobody.
 */
export async function runSingleUser(
  options: SingleUserOptions,
  statements: readonly string[],
): Promise<SingleUserOutput> {
  const { installation, dataDir, user, database, settings, env, signal } = options;
  const args = ['--single', '-j', '-D', dataDir];
  for (const [name, value] of Object.entries(SETTINGS)) args.push('-c', `${name}=${value}`);
  for (const [name, value] of Object.entries(settings ?? {})) args.push('-c', `${name}=${value}`);
  const child = spawn(join(installation.binDir, 'postgres'), [...args, database], {
    cwd: dataDir,
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { ...installationEnvironment(installation), LC_ALL: 'C.UTF-8', ...env },
    timeout: TIMEOUT_MS,
    killSignal: 'SIGKILL',
    ...(signal === undefined ? {} : { signal }),
    ...(user === undefined ? {} : { uid: user.uid, gid: user.gid }),
  });
  let output = '';
  let complaints = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (output += text));
  child.stderr.setEncoding('utf8').on('data', (text: string) => (complaints += text));
  child.stdin.on('error', () => {}); // it ended early: its exit says why
  // With -j a statement ends where a semicolon and an empty line stand.
  child.stdin.end(statements.map((statement) => `${statement.trim().replace(/;$/, '')};\n\n`).join(''));
  const code = await new Promise<number | null>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  if (code !== 0) {
    const said = complaints.trim().slice(-2_000) || `exit code ${code ?? 'none'}`;
    throw new StrataError('internal', `Postgres ${installation.fullVersion} could not open ${dataDir}: ${said}`);
  }
  return {
    values: [...output.matchAll(VALUE_LINE)].map(([, name, value]) => [name!, value!] as const),
    complaints: complaints.match(COMPLAINT_LINE) ?? [],
  };
}

/** Nothing of the cluster's own ideas, nothing that waits for somebody, and no statement in any log. */
const SETTINGS: Readonly<Record<string, string>> = {
  synchronous_standby_names: '',
  shared_preload_libraries: '',
  session_preload_libraries: '',
  local_preload_libraries: '',
  log_min_messages: 'warning',
  log_min_error_statement: 'panic',
  log_statement: 'none',
  logging_collector: 'off',
  log_destination: 'stderr',
  archive_mode: 'off',
  exit_on_error: 'off',
  default_transaction_read_only: 'off',
};
