/**
 * `strata wal verify | dump | connection-string`: what WAL says, for people, and how others read it. The work is the caller's of the program; here are its
 * options and its output.
 *
 * `dump` prints a record in a line, as pg_waldump does, or a JSON object in a line.
 */
import { statSync } from 'node:fs';
import { resolve } from 'node:path';
import { Command, InvalidArgumentError, Option } from 'commander';
import { writeFileDurably } from '../base/durable-file.ts';
import { formatLsn, type Lsn, parseLsn } from '../postgres/lsn.ts';
import { RM_MAX_BUILTIN, rmgrName } from '../postgres/rmgr.ts';
import { type CliContext, openProject, projectCommand, type ProjectOptions, show } from './context.ts';
import { findBranch, listBranches } from './entities.ts';
import { CliError } from './errors.ts';
import { formatFields, formatTable } from './format.ts';
import { wholeNumber } from './numbers.ts';
import type { RunningPlatform } from './platform.ts';

export interface WalProgress {
  readonly lsn: Lsn;
  readonly startLsn: Lsn;
  readonly endLsn: Lsn;
  readonly records: number;
  readonly mismatches: number;
}

export interface WalMismatch {
  readonly lsn: Lsn;
  readonly block?: { id: number; spc: number; db: number; rel: number; fork: number; blk: number };
  readonly reason: string;
  /** In the page; expected and found are hex. */
  readonly offset?: number;
  readonly expected?: string;
  readonly found?: string;
}

interface WalCounts {
  readonly records: number;
  readonly compared: number;
  readonly restored: number;
  readonly trusted: number;
  readonly unchecked: number;
  readonly refused: number;
  readonly mismatches: number;
}

export interface WalTypeCounts extends WalCounts {
  readonly rmgr: string;
  readonly type: string;
  readonly firstMismatch: WalMismatch | undefined;
}

export interface WalVerification extends WalCounts {
  readonly version: number;
  readonly startLsn: Lsn;
  readonly endLsn: Lsn;
  readonly stoppedBy: string | undefined;
  readonly resumesAtLsn: Lsn | undefined;
  readonly types: readonly WalTypeCounts[];
}

export interface DumpFilter {
  /** The first record is the first that begins here or later. */
  readonly startLsn?: Lsn;
  /** Records that end after this are left out. */
  readonly endLsn?: Lsn;
  readonly relation?: { readonly spc: number; readonly db: number; readonly rel: number };
  /** As rmgrName gives it. */
  readonly rmgr?: string;
  readonly limit?: number;
}

export interface DumpedRecord {
  readonly rmgr: string;
  readonly type: string;
  /** What the record says besides; may be empty. */
  readonly description: string;
  readonly lsn: Lsn;
  readonly endLsn: Lsn;
  readonly prevLsn: Lsn;
  readonly xid: number;
  /** Without images. */
  readonly recordBytes: number;
  readonly totalBytes: number;
  readonly blocks: readonly {
    readonly id: number;
    readonly spc: number;
    readonly db: number;
    readonly rel: number;
    readonly fork: number;
    readonly blk: number;
    readonly image: 'to apply' | 'for verification' | undefined;
  }[];
}

export type DumpPlace =
  | { readonly kind: 'directory'; readonly path: string }
  | { readonly kind: 'branch'; readonly platform: RunningPlatform; readonly timelineId: string };

/** What the commands are made of. */
export interface WalTools {
  readonly verify: (
    directory: string,
    options: { startLsn?: Lsn; endLsn?: Lsn; onProgress: (progress: WalProgress) => void },
  ) => Promise<WalVerification>;
  /** Resolves to why there is nothing after the last record; undefined at an end that was asked for. */
  readonly dump: (
    place: DumpPlace,
    filter: DumpFilter,
    onRecords: (records: readonly DumpedRecord[]) => void,
  ) => Promise<string | undefined>;
  readonly connection: (place: DumpPlace & { readonly kind: 'branch' }) => Promise<WalConnection>;
}

/** How a reader of Postgres' replication protocol gets a branch's WAL. */
export interface WalConnection {
  readonly safekeepers: readonly { readonly host: string; readonly port: number }[];
  readonly user: string;
  /** A token that may read this one timeline, and nothing else. */
  readonly password: string;
}

interface VerifyOptions {
  readonly start?: Lsn;
  readonly end?: Lsn;
  readonly output: 'table' | 'json';
}

interface DumpOptions extends ProjectOptions {
  readonly start?: Lsn;
  readonly end?: Lsn;
  readonly relation?: DumpFilter['relation'];
  readonly rmgr?: string;
  readonly limit?: number;
}

const PROGRESS_INTERVAL_MS = 2_000;
const FORK_NAMES = ['main', 'fsm', 'vm', 'init'];

export function walCommand(context: CliContext, tools: WalTools, setExitCode: (code: number) => void): Command {
  const verify = new Command('verify')
    .description('replay WAL with Strata’s redo and compare every page with the image that Postgres put into the WAL')
    .argument('<directory>', 'WAL segments of Postgres 15 to 18, written with wal_consistency_checking = all')
    .option('--start <lsn>', 'begin at the first record from here on (default: the first checkpoint)', lsn)
    .option('--end <lsn>', 'end before the first record that ends after this', lsn)
    .addOption(new Option('-o, --output <form>', 'form of the output').choices(['table', 'json']).default('table'))
    .addHelpText('after', '\nExit code 1 when a page differs or the WAL is damaged.')
    .addHelpText('after', '\nExample:\n  $ strata wal verify /var/lib/postgresql/17/main/pg_wal')
    .action(async (directory: string, options: VerifyOptions) => {
      assertOrder(options);
      if (!isDirectory(directory)) throw new CliError(`there is no directory ${directory}`);
      const report = await tools.verify(directory, {
        ...(options.start === undefined ? {} : { startLsn: options.start }),
        ...(options.end === undefined ? {} : { endLsn: options.end }),
        onProgress: progressPrinter(context),
      });
      context.print(options.output === 'json' ? verificationJson(report) : verificationText(report));
      if (report.compared === 0 && report.mismatches === 0) {
        context.printError('no page could be compared: the WAL must be written with wal_consistency_checking = all');
      }
      const damage = damageOf(report);
      if (damage !== undefined) context.printError(`strata: ${damage}`);
      if (report.mismatches > 0 || damage !== undefined) setExitCode(1);
    });

  const dump = projectCommand('dump', 'print WAL records', 'wal dump main --rmgr Heap --limit 20')
    .argument('[place]', 'a directory of WAL segments, or a branch (default: the default branch)')
    .option('--start <lsn>', 'from the first record that begins here or later', lsn)
    .option('--end <lsn>', 'up to the last record that ends here or before', lsn)
    .option('--relation <spc/db/rel>', 'records that change a block of this relation', relation)
    .option('--rmgr <name>', 'records of this resource manager, for example Heap or Transaction', resourceManager)
    .option('--limit <count>', 'at most so many records', wholeNumber(1))
    .addHelpText('after', '\nWith --output json each record is a line of its own.')
    .action(async (place: string | undefined, options: DumpOptions) => {
      assertOrder(options);
      const filter: DumpFilter = {
        ...(options.start === undefined ? {} : { startLsn: options.start }),
        ...(options.end === undefined ? {} : { endLsn: options.end }),
        ...(options.relation === undefined ? {} : { relation: options.relation }),
        ...(options.rmgr === undefined ? {} : { rmgr: options.rmgr }),
        ...(options.limit === undefined ? {} : { limit: options.limit }),
      };
      const format = options.output === 'json' ? recordJson : recordLine;
      const end = await tools.dump(await findPlace(context, place, options), filter, (records) => {
        if (records.length > 0) context.print(records.map(format).join('\n'));
      });
      if (end !== undefined) context.printError(end);
    });

  const connectionString = projectCommand(
    'connection-string',
    'print how a hot standby or pg_receivewal reads the WAL of a branch',
    'wal connection-string main',
  )
    .argument('[branch]', 'name or id (default: the default branch)')
    .option('--passfile <file>', 'write the password there, for libpq’s passfile, and leave it out of the string')
    .addHelpText('after', '\nIts password reads this one branch’s WAL: treat it as a secret.')
    .action(async (branch: string | undefined, options: ProjectOptions & { readonly passfile?: string }) => {
      const place = await findBranchPlace(context, branch, options);
      const connection = await tools.connection(place);
      const { passfile } = options;
      if (passfile === '') throw new CliError('--passfile "" names no file', 2);
      if (passfile !== undefined) writePassfile(passfile, connection);
      const text = conninfo(connection, passfile === undefined ? undefined : resolve(passfile));
      show(context, options, { connection_string: text }, () => text);
    });

  return new Command('wal')
    .description('look into WAL: of any Postgres 15 to 18, or of a branch')
    .addCommand(verify)
    .addCommand(dump)
    .addCommand(connectionString)
    .addHelpText('after', '\nExample:\n  $ strata wal dump main --limit 20');
}

async function findPlace(context: CliContext, place: string | undefined, options: ProjectOptions): Promise<DumpPlace> {
  if (place !== undefined && isDirectory(place)) return { kind: 'directory', path: place };
  if (place?.includes('/') === true) throw new CliError(`there is no directory ${place}`);
  return findBranchPlace(context, place, options);
}

function isDirectory(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isDirectory() === true;
}

function assertOrder({ start, end }: { readonly start?: Lsn; readonly end?: Lsn }): void {
  if (start === undefined || end === undefined || start <= end) return;
  throw new CliError(`--start ${formatLsn(start)} is after --end ${formatLsn(end)}: nothing is between`, 2);
}

async function findBranchPlace(
  context: CliContext,
  place: string | undefined,
  options: ProjectOptions,
): Promise<DumpPlace & { readonly kind: 'branch' }> {
  const { project, ...platform } = await openProject(context, options);
  const branch = findBranch(await listBranches(platform.api, project), place);
  return { kind: 'branch', platform, timelineId: branch.timeline_id };
}

/** A line for each safekeeper, 0600: libpq reads it only so. */
function writePassfile(path: string, { safekeepers, user, password }: WalConnection): void {
  const lines = safekeepers.map(({ host, port }) => `${host.replaceAll(':', '\\:')}:${port}:*:${user}:${password}\n`);
  try {
    writeFileDurably(path, lines.join(''), 0o600);
  } catch (error) {
    throw new CliError(`--passfile ${JSON.stringify(path)} cannot be written: ${(error as Error).message}`, 1, {
      cause: error,
    });
  }
}

/** Keywords and values, as primary_conninfo and pg_receivewal --dbname take them: of several hosts the next is tried when one does not answer. */
function conninfo({ safekeepers, user, password }: WalConnection, passfile: string | undefined): string {
  const hosts = safekeepers.map(({ host }) => host).join(',');
  const ports = safekeepers.map(({ port }) => port).join(',');
  const secret = passfile === undefined ? `password=${password}` : `passfile=${quoted(passfile)}`;
  return `host=${hosts} port=${ports} user=${user} ${secret} dbname=replication sslmode=disable connect_timeout=10`;
}

function quoted(value: string): string {
  return `'${value.replaceAll('\\', '\\\\').replaceAll("'", "\\'")}'`;
}

function progressPrinter(context: CliContext): (progress: WalProgress) => void {
  const startedMs = context.now();
  let printedMs = startedMs;
  return ({ lsn: at, startLsn, endLsn, records, mismatches }) => {
    const nowMs = context.now();
    if (nowMs - printedMs < PROGRESS_INTERVAL_MS) return;
    printedMs = nowMs;
    const percent = Math.floor((100 * (at - startLsn)) / Math.max(endLsn - startLsn, 1));
    const speed = (at - startLsn) / 1e6 / ((nowMs - startedMs) / 1000);
    context.printError(
      `${percent} %, ${formatLsn(at)} of ${formatLsn(endLsn)}, ${records} records, ${mismatches} mismatches, ${speed.toFixed(0)} MB/s`,
    );
  };
}

function damageOf(report: WalVerification): string | undefined {
  if (report.resumesAtLsn === undefined) return undefined;
  const reason = report.stoppedBy ?? `WAL at ${formatLsn(report.endLsn)}: a segment is missing`;
  return `${reason}; it goes on at ${formatLsn(report.resumesAtLsn)}, so this is damage and not its end`;
}

function verificationText(report: WalVerification): string {
  const types = [...report.types].sort((a, b) => a.rmgr.localeCompare(b.rmgr) || a.type.localeCompare(b.type));
  const header = ['RESOURCE MANAGER', 'TYPE', 'RECORDS', 'COMPARED', 'RESTORED', 'TRUSTED', 'UNCHECKED', 'REFUSED'];
  const cells = (counts: WalCounts) =>
    [
      ...[counts.records, counts.compared, counts.restored, counts.trusted, counts.unchecked, counts.refused],
      counts.mismatches,
    ].map(String);
  const rows = types.map((type) => [type.rmgr, type.type, ...cells(type)]);
  const table = formatTable([...header, 'MISMATCHES'], [...rows, ['total', '', ...cells(report)]]);
  const summary = formatFields([
    ['Postgres', String(report.version)],
    ['WAL', `${formatLsn(report.startLsn)} to ${formatLsn(report.endLsn)}`],
    ['ended by', report.stoppedBy ?? 'the end of the bytes, or the LSN asked for'],
    ['compared', `${report.compared} pages with the image of the primary`],
    ['restored', `${report.restored} pages from images to be applied`],
    ['trusted', `${report.trusted} pages met first without such an image, which took the expected one`],
    ['unchecked', `${report.unchecked} changes of pages whose record has no image`],
    ['refused', `${report.refused} records of unknown extensions or tablespaces`],
    ['mismatches', String(report.mismatches)],
  ]);
  const first = types.flatMap((type) => (type.firstMismatch === undefined ? [] : [mismatchText(type)]));
  return [table, '', ...first, summary].join('\n');
}

function mismatchText({ rmgr, type, mismatches, firstMismatch }: WalTypeCounts): string {
  const { lsn: at, block, reason, offset, expected, found } = firstMismatch!;
  const lines = [`${rmgr}/${type}: ${mismatches} mismatches, the first at ${formatLsn(at)}: ${reason}`];
  if (block !== undefined) {
    const { id, spc, db, rel, fork, blk } = block;
    lines.push(`  block ${id}: rel ${spc}/${db}/${rel} fork ${FORK_NAMES[fork] ?? fork} blk ${blk}`);
  }
  if (offset !== undefined) lines.push(`  offset ${offset}: expected ${expected ?? '-'}, found ${found ?? '-'}`);
  return `${lines.join('\n')}\n`;
}

function verificationJson(report: WalVerification): string {
  const counts = ({ records, compared, restored, trusted, unchecked, refused, mismatches }: WalCounts) => {
    return { records, compared, restored, trusted, unchecked, refused, mismatches };
  };
  const types = report.types.map(({ firstMismatch, ...type }) => ({
    rmgr: type.rmgr,
    type: type.type,
    ...counts(type),
    first_mismatch: firstMismatch === undefined ? null : { ...firstMismatch, lsn: formatLsn(firstMismatch.lsn) },
  }));
  const value = {
    pg_version: report.version,
    start_lsn: formatLsn(report.startLsn),
    end_lsn: formatLsn(report.endLsn),
    stopped_by: report.stoppedBy ?? null,
    damage:
      report.resumesAtLsn === undefined
        ? null
        : { lsn: formatLsn(report.endLsn), resumes_at_lsn: formatLsn(report.resumesAtLsn) },
    ...counts(report),
    types,
  };
  return JSON.stringify(value, undefined, 2);
}

/** As pg_waldump prints it (XLogDumpDisplayRecord, XLogRecGetBlockRefInfo). */
function recordLine(record: DumpedRecord): string {
  const { rmgr, type, description, recordBytes, totalBytes, xid, blocks } = record;
  const length = `len (rec/tot): ${String(recordBytes).padStart(6)}/${String(totalBytes).padStart(6)}`;
  const place = `lsn: ${paddedLsn(record.lsn)}, prev ${paddedLsn(record.prevLsn)}`;
  let line = `rmgr: ${rmgr.padEnd(11)} ${length}, tx: ${String(xid).padStart(10)}, ${place}, desc: ${type} ${description}`;
  for (const { id, spc, db, rel, fork, blk, image } of blocks) {
    const forkName = fork === 0 ? '' : ` fork ${FORK_NAMES[fork] ?? fork}`;
    line += `, blkref #${id}: rel ${spc}/${db}/${rel}${forkName} blk ${blk}`;
    if (image !== undefined) line += image === 'to apply' ? ' FPW' : ' FPW for WAL verification';
  }
  return line;
}

/** pg_waldump prints all 8 digits of the low half. */
function paddedLsn(value: Lsn): string {
  const [high, low] = formatLsn(value).split('/');
  return `${high}/${low!.padStart(8, '0')}`;
}

function recordJson(record: DumpedRecord): string {
  const { rmgr, type, description, xid, recordBytes, totalBytes, blocks } = record;
  return JSON.stringify({
    lsn: formatLsn(record.lsn),
    end_lsn: formatLsn(record.endLsn),
    prev_lsn: formatLsn(record.prevLsn),
    rmgr,
    type,
    description,
    xid,
    record_bytes: recordBytes,
    total_bytes: totalBytes,
    blocks,
  });
}

function lsn(text: string): Lsn {
  try {
    return parseLsn(text);
  } catch {
    throw new InvalidArgumentError('It must be an LSN such as 0/16B3748.');
  }
}

function relation(text: string): NonNullable<DumpFilter['relation']> {
  const match = /^(\d+)\/(\d+)\/(\d+)$/.exec(text);
  if (match === null)
    throw new InvalidArgumentError('It must be tablespace/database/relation, for example 1663/5/16384.');
  return { spc: Number(match[1]), db: Number(match[2]), rel: Number(match[3]) };
}

function resourceManager(text: string): string {
  const names = Array.from({ length: RM_MAX_BUILTIN + 1 }, (_, id) => rmgrName(id));
  const found = names.find((name) => name.toLowerCase() === text.toLowerCase());
  if (found !== undefined) return found;
  if (/^custom\d{3}$/.test(text)) return text;
  throw new InvalidArgumentError(`It must be one of ${names.join(', ')}, or custom128 to custom255.`);
}
