/**
 * `strata import --from`: pg_dump of a database on some server, into pg_restore for a new project or a branch. The dump is not kept anywhere: it
 * flows from one to the other, and the source is only read.
 *
 * Passwords are in no program's arguments: they are handed on in the environment (PGPASSWORD), which other users of the machine cannot read. A
 * password in our own argument is taken out of the process' title as soon as it is read (main.ts).
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { connectionUri, psqlEnvironment } from './connect.ts';
import { type CliContext, openPlatform, show } from './context.ts';
import { findBranch, findProject, listBranches, type Project, quote } from './entities.ts';
import { CliError } from './errors.ts';
import { formatBytes, formatDuration, formatFields } from './format.ts';
import type { ImportOptions } from './import.ts';
import { findPgPrograms, type PgPrograms, programsFor } from './pg-programs.ts';
import type { RunningPlatform } from './platform.ts';
import { occasionally } from './progress.ts';
import { type RestoreError, RestoreErrors } from './restore-errors.ts';

export interface ImportFromOptions extends ImportOptions {
  readonly from: string;
}

interface Source {
  /** Without a password. */
  readonly uri: string;
  readonly environment: NodeJS.ProcessEnv;
  readonly major: number;
  readonly database: string;
  readonly tables: number;
  readonly bytes: number;
  readonly owners: readonly string[];
}

interface Target {
  readonly project: Project;
  readonly isNew: boolean;
  readonly uri: string;
  readonly environment: NodeJS.ProcessEnv;
  readonly notes: readonly string[];
}

interface Progress {
  readonly bytes: number;
  readonly errors: RestoreErrors;
}

const run = promisify(execFile);
const LISTED_MAX = 40;
const SOURCE_QUERY = `
  SELECT json_build_object(
    'version', current_setting('server_version_num')::int,
    'database', current_database(),
    'tables', (SELECT count(*) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
                WHERE relkind = 'r' AND nspname <> 'information_schema' AND nspname !~ '^pg_'),
    'bytes', (SELECT coalesce(sum(pg_relation_size(c.oid) + coalesce(pg_relation_size(nullif(reltoastrelid, 0)), 0)), 0)
                FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
               WHERE relkind = 'r' AND nspname <> 'information_schema' AND nspname !~ '^pg_')
             + pg_relation_size('pg_largeobject'),
    'owners', (SELECT coalesce(json_agg(DISTINCT pg_get_userbyid(relowner)), '[]') FROM pg_class AS c
                 JOIN pg_namespace AS n ON n.oid = relnamespace WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'))`;
/** What users made; members of extensions are not theirs. */
const CONTENT_QUERY = `
  SELECT name FROM (
    SELECT format('%I.%I', nspname, relname) AS name, 'pg_class'::regclass AS classid, c.oid FROM pg_class AS c
      JOIN pg_namespace AS n ON n.oid = relnamespace WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
       AND nspname <> 'information_schema' AND nspname !~ '^pg_'
    UNION ALL SELECT format('%I.%I()', nspname, proname), 'pg_proc'::regclass, p.oid FROM pg_proc AS p
      JOIN pg_namespace AS n ON n.oid = pronamespace WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'
    UNION ALL SELECT format('schema %I', nspname), 'pg_namespace'::regclass, oid FROM pg_namespace
      WHERE nspname NOT IN ('information_schema', 'public') AND nspname !~ '^pg_'
    UNION ALL SELECT 'large object ' || oid, 'pg_largeobject'::regclass, oid FROM pg_largeobject_metadata
  ) AS made
  WHERE NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.classid = made.classid AND d.objid = made.oid AND deptype = 'e')
  LIMIT 4`;

export async function importFromServer(context: CliContext, options: ImportFromOptions): Promise<void> {
  const platform = openPlatform(context, options);
  const startedMs = context.now();
  const found = await findPgPrograms(options.pgDump, context.environment['PATH']);
  const source = await inspectSource(context, options.from, found.at(-1)!);
  const programs = programsFor(found, source.major);
  const interrupted = new AbortController();
  const onSignal = (): void => interrupted.abort();
  process.on('SIGINT', onSignal);
  process.on('SIGTERM', onSignal);
  try {
    const target = await openTarget(context, platform, options, source, programs);
    try {
      await assertEmpty(programs, target, options);
      const rowsBefore = await rowCount(programs, target);
      const { bytes, errors } = await copy(context, programs, source, target, interrupted.signal);
      context.printError('everything is restored; gathering statistics');
      await query(programs, target.environment, undefined, 'ANALYZE').catch(() => {});
      const rows = (await rowCount(programs, target)) - rowsBefore;
      const durationMs = context.now() - startedMs;
      report(context, options, { source, target, errors, bytes, rows, durationMs });
    } catch (error) {
      throw await undone(platform, options, target, error, interrupted.signal.aborted);
    }
  } finally {
    process.off('SIGINT', onSignal);
    process.off('SIGTERM', onSignal);
  }
}

async function inspectSource(context: CliContext, from: string, programs: PgPrograms): Promise<Source> {
  const { uri, password } = splitPassword(from);
  const environment = { ...context.environment, ...(password === undefined ? {} : { PGPASSWORD: password }) };
  let text: string;
  try {
    text = await query(programs, environment, uri, SOURCE_QUERY);
  } catch (error) {
    throw new CliError(`the server cannot be read: ${messageOf(error)}`);
  }
  const info = JSON.parse(text) as { version: number } & Pick<Source, 'database' | 'tables' | 'bytes' | 'owners'>;
  return { ...info, uri, environment, major: Math.floor(info.version / 10_000) };
}

/**
 * As libpq reads connection strings, which may name no host, or several (conninfo_uri_parse_options in src/interfaces/libpq/fe-connect.c). Throws
 * without quoting what it was given: there may be a password in it.
 */
export function splitPassword(from: string): { uri: string; password?: string } {
  const scheme = /^([a-z][a-z0-9+.-]*):\/\//i.exec(from)?.[1];
  if (scheme === undefined) {
    throw new CliError('--from is not a connection string such as postgresql://user@host:5432/database', 2);
  }
  if (scheme !== 'postgresql' && scheme !== 'postgres') {
    throw new CliError(`--from must begin with postgresql://, not ${scheme}://`, 2);
  }
  let password: string | undefined;
  const uri = from
    .replace(/^(\w+:\/\/[^:@/?]*):([^@/?]*)@/, (_, before: string, secret: string) => {
      password = secret;
      return `${before}@`;
    })
    .replace(/([?&])password=([^&]*)(&?)/, (_, before: string, secret: string, after: string) => {
      password = secret;
      return after === '' ? '' : before;
    });
  return password === undefined || password === '' ? { uri } : { uri, password: decodePassword(password) };
}

function decodePassword(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch (error) {
    throw new CliError('the password in --from has a % that begins no code: write %25 for it', 2, { cause: error });
  }
}

/** libpq's own variables (PGHOSTADDR, PGSERVICE, …) are meant for the source: with them the target could come to be the source. */
export function withoutPostgresVariables(environment: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
  return Object.fromEntries(Object.entries(environment).filter(([name]) => !name.startsWith('PG')));
}

async function openTarget(
  context: CliContext,
  platform: RunningPlatform,
  options: ImportFromOptions,
  source: Source,
  programs: PgPrograms,
): Promise<Target> {
  const { api } = platform;
  const environmentOf = (uri: string): NodeJS.ProcessEnv => ({
    ...withoutPostgresVariables(context.environment),
    ...psqlEnvironment(uri),
  });
  if (options.project !== undefined || options.branch !== undefined) {
    if (options.name !== undefined || options.pgVersion !== undefined) {
      throw new CliError(
        '--name and --pg-version are for a new project, --project and --branch for one that exists',
        2,
      );
    }
    const project = await findProject(api, options.project);
    const branch = findBranch(await listBranches(api, project), options.branch);
    const uri = await connectionUri({ ...platform, project }, branch.id, options);
    return { project, isNew: false, uri, environment: environmentOf(uri), notes: [] };
  }
  const { pgVersion, notes } = chooseVersion(platform, options, source);
  if (programs.major > pgVersion) {
    notes.push(
      `pg_dump is of Postgres ${programs.major}, the project of ${pgVersion}: what only the newer one knows is listed`,
    );
  }
  const database = options.database ?? (source.database === 'postgres' ? undefined : source.database);
  const { project, connection_uris: uris } = await api.post<{
    project: Project;
    connection_uris: readonly { connection_uri: string }[];
  }>('/projects', {
    project: {
      name: options.name,
      pg_version: pgVersion,
      branch: { role_name: options.role, database_name: database },
    },
  });
  const uri = uris[0]?.connection_uri ?? '';
  return { project, isNew: true, uri, environment: environmentOf(uri), notes };
}

/** The server's own major when there is one, else the next above, else the newest. */
function chooseVersion(
  platform: RunningPlatform,
  options: ImportFromOptions,
  source: Source,
): { pgVersion: number; notes: string[] } {
  if (options.pgVersion !== undefined) {
    const pgVersion = Number(options.pgVersion);
    if (Number.isInteger(pgVersion)) return { pgVersion, notes: [] };
    throw new CliError(`--pg-version must be a number such as 17, not ${quote(options.pgVersion)}`, 2);
  }
  const have = platform.file.installations.map((each) => each.pgVersion).sort((a, b) => a - b);
  const newest = have.at(-1) ?? source.major;
  const pgVersion = have.find((version) => version >= source.major) ?? newest;
  if (pgVersion >= source.major) return { pgVersion, notes: [] };
  return { pgVersion, notes: [`the server is of Postgres ${source.major}, the project of ${pgVersion}, an older one`] };
}

async function assertEmpty(programs: PgPrograms, target: Target, options: ImportFromOptions): Promise<void> {
  if (target.isNew || options.intoNonempty) return;
  const content = await query(programs, target.environment, undefined, CONTENT_QUERY);
  if (content === '') return;
  const names = content.split('\n').join(', ');
  const { PGDATABASE: database = '' } = target.environment;
  throw new CliError(
    `database ${quote(database)} is not empty (${names}): choose another branch or database, or say --into-nonempty`,
  );
}

/** pg_dump | pg_restore. Ends both at the first fatal error. */
async function copy(
  context: CliContext,
  programs: PgPrograms,
  source: Source,
  target: Target,
  signal: AbortSignal,
): Promise<Progress> {
  const errors = new RestoreErrors();
  const dump = spawn(
    join(programs.binDir, 'pg_dump'),
    ['--format=custom', '--compress=0', '--no-password', '--dbname', source.uri],
    { stdio: ['ignore', 'pipe', 'pipe'], env: source.environment, detached: true },
  );
  const restore = spawn(
    join(programs.binDir, 'pg_restore'),
    [
      '--no-owner',
      '--verbose',
      '--no-password',
      '--dbname',
      `dbname=${connectionValue(target.environment['PGDATABASE'] ?? '')}`,
    ],
    { stdio: ['pipe', 'ignore', 'pipe'], env: target.environment, detached: true },
  );
  const stop = (): void => {
    dump.kill('SIGTERM');
    restore.kill('SIGTERM');
  };
  signal.addEventListener('abort', stop);
  const print = occasionally<Progress>(context, (at, elapsedMs) => progressLine(source, at, elapsedMs));
  let bytes = 0;
  let dumpComplaints = '';
  let restoreTail = '';
  dump.stdout.on('data', (chunk: Buffer) => {
    bytes += chunk.length;
    print({ bytes, errors });
  });
  dump.stderr
    .setEncoding('utf8')
    .on('data', (text: string) => (dumpComplaints = (dumpComplaints + text).slice(-4_000)));
  restore.stderr.setEncoding('utf8').on('data', (text: string) => {
    restoreTail = (restoreTail + text).slice(-2_000);
    if (errors.push(text) !== undefined) stop();
    print({ bytes, errors });
  });
  restore.stdin.on('error', () => {}); // it ended early: its exit says why
  dump.stdout.pipe(restore.stdin);
  const [dumped, restored] = await Promise.all([ended(dump), ended(restore)]);
  signal.removeEventListener('abort', stop);
  signal.throwIfAborted();
  if (errors.fatal !== undefined) throw new CliError(fatalText(errors.fatal));
  if (dumped !== 0) throw new CliError(`pg_dump failed: ${dumpComplaints.trim() || `exit code ${dumped}`}`);
  if (restored !== 0 && errors.all.length === 0) throw new CliError(`pg_restore failed: ${restoreTail.trim()}`);
  return { bytes, errors };
}

function ended(child: ChildProcess): Promise<number | null> {
  return new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
}

function progressLine(source: Source, { bytes, errors }: Progress, elapsedMs: number): string {
  const size = `${formatBytes(bytes)} of about ${formatBytes(source.bytes)}`;
  const speed = `${formatBytes((bytes / Math.max(elapsedMs, 1)) * 1000)}/s`;
  const at = errors.currentTable === '' ? '' : `, ${errors.currentTable}`;
  return `${errors.tableCount} of ${source.tables} tables, ${size}, ${speed}${at}`;
}

function fatalText({ kind, name, message }: RestoreError): string {
  return kind === '' ? `pg_restore failed: ${message}` : `${kind} ${name} could not be restored: ${message}`;
}

/** Tuples that were inserted into tables that there are now, as Postgres counts them. */
async function rowCount(programs: PgPrograms, target: Target): Promise<number> {
  const sql = `SELECT coalesce(sum(n_tup_ins), 0) FROM pg_stat_user_tables JOIN pg_class ON oid = relid WHERE relkind = 'r'`;
  return Number(await query(programs, target.environment, undefined, sql));
}

async function query(
  programs: PgPrograms,
  environment: NodeJS.ProcessEnv,
  uri: string | undefined,
  sql: string,
): Promise<string> {
  const where = uri === undefined ? [] : ['--dbname', uri];
  const args = ['-X', '-A', '-t', '-q', '-w', '-v', 'ON_ERROR_STOP=1', ...where, '-c', sql];
  const { stdout } = await run(join(programs.binDir, 'psql'), args, { env: environment, maxBuffer: 1 << 26 });
  return stdout.trim();
}

/** What to tell of a failure, after what was made for it is removed. The source was only read. */
async function undone(
  platform: RunningPlatform,
  options: ImportFromOptions,
  target: Target,
  error: unknown,
  isInterrupted: boolean,
): Promise<CliError> {
  const what = isInterrupted ? 'interrupted' : messageOf(error);
  if (!target.isNew) {
    const isUntouched = error instanceof CliError && error.message.includes('--into-nonempty');
    const advice = isUntouched
      ? ''
      : '; what was restored until then is in the branch, a branch of the time before has it without';
    return new CliError(`${what}${advice}`, 1, { cause: error });
  }
  if (options.keep) return new CliError(`${what}; project ${target.project.id} is left as it is`, 1, { cause: error });
  try {
    await platform.api.delete(`/projects/${target.project.id}`);
    return new CliError(`${what}; nothing is left of the new project`, 1, { cause: error });
  } catch (failure) {
    const left = `the new project could not be removed (${messageOf(failure)}): strata projects delete ${target.project.id}`;
    return new CliError(`${what}; ${left}`, 1, { cause: error });
  }
}

interface Outcome {
  readonly source: Source;
  readonly target: Target;
  readonly errors: RestoreErrors;
  readonly bytes: number;
  readonly rows: number;
  readonly durationMs: number;
}

function report(context: CliContext, options: ImportFromOptions, outcome: Outcome): void {
  const { source, target, errors, bytes, rows, durationMs } = outcome;
  const owner = target.environment['PGUSER'] ?? '';
  const others = source.owners.filter((name) => name !== owner);
  const notes = [...target.notes];
  if (others.length > 0) notes.push(`everything belongs to ${owner} here; there it belonged to ${others.join(', ')}`);
  const value = {
    project_id: target.project.id,
    name: target.project.name,
    pg_version: target.project.pg_version,
    database: target.environment['PGDATABASE'],
    connection_uri: target.uri,
    tables: errors.tableCount,
    rows,
    bytes,
    duration_ms: durationMs,
    not_restored: errors.all.map(({ kind, name, message }) => ({ kind, name, message })),
    notes,
  };
  show(context, options, value, () => {
    const fields = formatFields([
      ['project', target.project.name],
      ['id', target.project.id],
      ['Postgres', String(target.project.pg_version)],
      ['database', target.environment['PGDATABASE'] ?? '-'],
      ['restored', `${errors.tableCount} tables, ${rows} rows, ${formatBytes(bytes)} in ${formatDuration(durationMs)}`],
      ['connection', target.uri],
    ]);
    const lines = errors.all.map(({ kind, name, message }) => `- ${kind} ${name}: ${message}`);
    const more = lines.length > LISTED_MAX ? [`- and ${lines.length - LISTED_MAX} more (all with --output json)`] : [];
    const listed = lines.length === 0 ? [] : ['', 'Not restored:', ...lines.slice(0, LISTED_MAX), ...more];
    const noted = notes.length === 0 ? [] : ['', 'Not as it was:', ...notes.map((note) => `- ${note}`)];
    return [fields, ...listed, ...noted].join('\n');
  });
}

/** In single quotes of a conninfo string, as pg_restore would take `a=b` for one. */
function connectionValue(name: string): string {
  return `'${name.replace(/[\\']/g, '\\$&')}'`;
}

function messageOf(error: unknown): string {
  const { stderr } = error as { stderr?: string };
  if (stderr !== undefined && stderr.trim() !== '') return stderr.trim();
  return error instanceof Error ? error.message : String(error);
}
