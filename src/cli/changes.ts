/**
 * `strata branches changes`: which tables changed, by how many pages, in a branch since it began, between two points of its history, or on both
 * sides since two branches parted. What changed comes from the platform's API, by file numbers; which tables those are, from the branch's catalogs.
 */
import type { Command } from 'commander';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { parsePoint } from './point.ts';
import {
  type CliContext,
  openProject,
  projectCommand,
  type ProjectOptions,
  type ProjectScope,
  show,
} from './context.ts';
import { type Branch, type Database, findBranch, listBranches, listEndpoints } from './entities.ts';
import { CliError } from './errors.ts';
import { formatBytes, formatTable } from './format.ts';
import { occasionally } from './progress.ts';
import type { CatalogNames, NamedRelation } from './relation-names.ts';

interface ChangesOptions extends ProjectOptions {
  readonly from?: string;
  readonly to?: string;
  readonly wake: boolean;
  readonly catalogs: boolean;
}

/** As the API gives it. */
interface ForkChange {
  readonly tablespace_oid: number;
  readonly database_oid: number;
  readonly relfilenode: number;
  readonly fork: string;
  readonly changed_blocks: number;
  /** Both absent: the size did not change. */
  readonly blocks_before?: number | null;
  readonly blocks_after?: number | null;
}

interface ChangesPage {
  readonly from_lsn: string;
  readonly to_lsn: string;
  readonly forks: readonly ForkChange[];
  readonly transaction_status_pages?: number;
  readonly index_blocks_read: number;
  readonly pagination?: { readonly next: string };
}

interface BranchChanges {
  readonly branch: Branch;
  readonly fromLsn: string;
  readonly toLsn: string;
  readonly files: readonly FileChange[];
  readonly statusPages: number;
  readonly indexBlocksRead: number;
}

/** All forks of one file number. */
interface FileChange {
  readonly tablespaceOid: number;
  readonly databaseOid: number;
  readonly relfilenode: number;
  mainPages: number;
  mapPages: number;
  /** Of the main fork, in pages; null: not there; undefined: not changed. */
  before: number | null | undefined;
  after: number | null | undefined;
}

/** A line of the answer: a table with what belongs to it, or a file that no table has. */
interface TableChange {
  readonly database: string;
  readonly name: string;
  readonly isNamed: boolean;
  readonly isCatalog: boolean;
  pages: number;
  heap: number;
  indexes: number;
  toast: number;
  maps: number;
  before: number | null | undefined;
  after: number | null | undefined;
  /** Of the table itself. */
  readonly notes: Set<string>;
  /** Of what belongs to it. */
  readonly partNotes: Set<string>;
}

const NOTES = `
Without a second branch: what changed in the branch since it began, or between --from and --to. With one: what changed in each of the two since
they were one.

A page counts when it was written, also when it was written back to what it was. Of a transaction that ran across the beginning, what it wrote
before does not count, also when it became visible after. Free space maps are not in the WAL, and mostly not counted.
The names are those of now; to read them, the branch's endpoint is woken, unless --no-wake. Files without a name are shown by their numbers.

Examples:
  $ strata branches changes dev
  $ strata branches changes dev main
  $ strata branches changes main --from '2026-01-31 12:00:00+00' --to 0/16B3748`;

export function changesCommand(context: CliContext): Command {
  return projectCommand('changes', 'show which tables changed, and by how many pages', 'branches changes dev')
    .argument('<branch>', 'name or id')
    .argument('[other]', 'name or id of a branch: what changed in both since they parted')
    .option(
      '--from <point>',
      'from an LSN (0/16B3748) or a time with its zone (2026-01-31T12:00:00.5Z) on (default: where the branch began)',
    )
    .option('--to <point>', 'up to an LSN or a time (default: now)')
    .option('--no-wake', 'do not wake the endpoint: names only where it is awake')
    .option('--catalogs', 'list each system catalog, and not only their sum', false)
    .addHelpText('after', NOTES)
    .action(async (wanted: string, otherWanted: string | undefined, options: ChangesOptions) => {
      const query = windowQuery(options, otherWanted);
      const scope = await openProject(context, options);
      const branches = await listBranches(scope.api, scope.project);
      const branch = findBranch(branches, wanted);
      const other = otherWanted === undefined ? undefined : findBranch(branches, otherWanted);
      if (other?.id === branch.id) throw new CliError(`${branch.name} cannot be compared with itself`, 2);
      const parent = branches.find((each) => each.id === branch.parent_id);
      const sides: { changes: BranchChanges; names: CatalogNames<FileChange> | undefined; tables: TableChange[] }[] =
        [];
      for (const [side, opposite] of other === undefined
        ? [[branch, parent]]
        : [[branch, other] as const, [other, branch] as const]) {
        const compareTo: Record<string, string> = other === undefined ? {} : { compare_to: opposite!.id };
        const changes = await readChanges(context, scope, side!, { ...query, ...compareTo });
        const known = options.from === undefined ? opposite : undefined;
        const names = await namesFor(context, scope, side!, known, changes.files, options.wake);
        sides.push({ changes, names, tables: tablesOf(changes, names) });
      }
      const value = sides.map(({ changes, tables }) => sideJson(changes, tables));
      show(context, options, other === undefined ? value[0] : value, () =>
        sides.map(({ changes, tables }) => sideText(changes, tables, options.catalogs)).join('\n\n'),
      );
    });
}

function windowQuery(options: ChangesOptions, other: string | undefined): Record<string, string> {
  const query: Record<string, string> = {};
  for (const end of ['from', 'to'] as const) {
    const text = options[end];
    if (text === undefined) continue;
    if (other !== undefined) {
      throw new CliError(
        `--${end} cannot be given with two branches: they are compared from where they parted until now`,
        2,
      );
    }
    const point = parsePoint(text, `--${end}`);
    if ('parent_lsn' in point) query[`${end}_lsn`] = point.parent_lsn;
    else query[`${end}_timestamp`] = point.parent_timestamp;
  }
  return query;
}

async function readChanges(
  context: CliContext,
  { api, project }: ProjectScope,
  branch: Branch,
  query: Record<string, string>,
): Promise<BranchChanges> {
  const files = new Map<string, FileChange>();
  const progress = occasionally<number>(context, (count) => `${count} files of relations have changed so far`);
  let indexBlocksRead = 0;
  for (let cursor: string | undefined; ;) {
    const search = new URLSearchParams({ ...query, ...(cursor === undefined ? {} : { cursor }) });
    const page = await api.get<ChangesPage>(
      `/projects/${project.id}/branches/${branch.id}/changes?${search.toString()}`,
    );
    for (const fork of page.forks) addFork(files, fork);
    indexBlocksRead += page.index_blocks_read;
    cursor = page.pagination?.next;
    progress(files.size);
    if (cursor !== undefined) continue;
    const { from_lsn: fromLsn, to_lsn: toLsn, transaction_status_pages: statusPages = 0 } = page;
    return { branch, fromLsn, toLsn, files: [...files.values()], statusPages, indexBlocksRead };
  }
}

function addFork(files: Map<string, FileChange>, change: ForkChange): void {
  const { tablespace_oid: tablespaceOid, database_oid: databaseOid, relfilenode, fork } = change;
  const name = `${tablespaceOid}/${databaseOid}/${relfilenode}`;
  let file = files.get(name);
  if (file === undefined) {
    file = { tablespaceOid, databaseOid, relfilenode, mainPages: 0, mapPages: 0, before: undefined, after: undefined };
    files.set(name, file);
  }
  if (fork === 'main') {
    file.mainPages += change.changed_blocks;
    file.before = change.blocks_before;
    file.after = change.blocks_after;
  } else {
    file.mapPages += change.changed_blocks;
  }
}

/** Undefined when there are none to be had. */
async function namesFor(
  context: CliContext,
  scope: ProjectScope,
  branch: Branch,
  opposite: Branch | undefined,
  files: readonly FileChange[],
  mayWake: boolean,
): Promise<CatalogNames<FileChange> | undefined> {
  const own = await namesOf(context, scope, branch, files, mayWake);
  // A file that is younger may have the number of another one there.
  const gone = files.filter((file) => file.before !== null && own?.find(file) === undefined);
  if (opposite === undefined || gone.length === 0) return own;
  // What the branch has dropped may still be there in the other. That one is not woken for it.
  const others = await namesOf(context, scope, opposite, gone, false);
  if (others === undefined) return own;
  const old = new Set(gone);
  return {
    find: (file) => own?.find(file) ?? (old.has(file) ? others.find(file) : undefined),
    databaseName: (oid) => own?.databaseName(oid) ?? others.databaseName(oid),
    isComplete: own !== undefined,
  };
}

async function namesOf(
  context: CliContext,
  { api, project }: ProjectScope,
  branch: Branch,
  files: readonly FileChange[],
  mayWake: boolean,
): Promise<CatalogNames<FileChange> | undefined> {
  if (files.length === 0) return undefined;
  const endpoint = (await listEndpoints(api, project)).find((each) => each.branch_id === branch.id);
  if (endpoint === undefined) {
    if (mayWake) context.printError(`branch ${branch.name} has no endpoint: its relations are shown by their numbers`);
    return undefined;
  }
  if (!mayWake && endpoint.current_state !== 'active') return undefined;
  const path = `/projects/${project.id}/branches/${branch.id}/databases`;
  const first = (await api.get<{ databases: Database[] }>(path)).databases[0];
  if (first === undefined) return undefined;
  const uriOf = async (database = first.name): Promise<string> => {
    const query = new URLSearchParams({ branch_id: branch.id, database_name: database, role_name: first.owner_name });
    return (await api.get<{ uri: string }>(`/projects/${project.id}/connection_uri?${query.toString()}`)).uri;
  };
  try {
    // The Postgres client is not loaded for other commands.
    const { readCatalogNames } = await import('./relation-names.ts');
    return await readCatalogNames(uriOf, files);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    context.printError(`the names of branch ${branch.name} cannot be read (${reason}): numbers are shown`);
    return undefined;
  }
}

function tablesOf({ files }: BranchChanges, names: CatalogNames<FileChange> | undefined): TableChange[] {
  const tables = new Map<string, TableChange>();
  for (const file of files) {
    const named = names?.find(file);
    const database = named?.database ?? databaseLabel(file, names);
    const name = named === undefined ? fileLabel(file) : `${named.schema}.${named.table}`;
    const key = `${database}\0${name}`;
    let table = tables.get(key);
    if (table === undefined) {
      table = {
        database,
        name,
        isNamed: named !== undefined,
        isCatalog: named?.isCatalog ?? false,
        pages: 0,
        heap: 0,
        indexes: 0,
        toast: 0,
        maps: 0,
        before: undefined,
        after: undefined,
        notes: new Set(),
        partNotes: new Set(),
      };
      tables.set(key, table);
    }
    addFile(table, file, named);
  }
  return [...tables.values()].sort((a, b) => b.pages - a.pages || a.name.localeCompare(b.name));
}

function addFile(table: TableChange, file: FileChange, named: NamedRelation | undefined): void {
  const { mainPages, mapPages, before, after } = file;
  table.pages += mainPages + mapPages;
  table.maps += mapPages;
  const role = named?.role ?? 'heap';
  if (role === 'index') table.indexes += mainPages;
  else if (role === 'toast') table.toast += mainPages;
  else table.heap += mainPages;
  const what = role === 'heap' ? '' : role === 'index' ? `index ${named!.relation} ` : 'TOAST ';
  const notes = role === 'heap' ? table.notes : table.partNotes;
  if (before === null) notes.add(`${what}${named?.isRewritten === true ? 'rewritten' : 'new'}`);
  else if (after === null && named?.wasReplaced !== true) notes.add(`${what}dropped`);
  if (role !== 'heap') return;
  // A table that was rewritten has two files: the old one is its size before, the new one its size after.
  if (before !== undefined && before !== null) table.before = before;
  else if (table.before === undefined) table.before = before;
  if (after !== undefined && after !== null) table.after = after;
  else if (table.after === undefined) table.after = after;
}

function databaseLabel({ databaseOid }: FileChange, names: CatalogNames<FileChange> | undefined): string {
  const known = names?.databaseName(databaseOid);
  if (known !== undefined) return known;
  return databaseOid === 0 ? '' : names?.isComplete === true ? `${databaseOid} (dropped)` : String(databaseOid);
}

function fileLabel({ relfilenode }: FileChange): string {
  return `file ${relfilenode}`;
}

function sideJson(changes: BranchChanges, tables: readonly TableChange[]): object {
  const { branch, fromLsn, toLsn, statusPages, indexBlocksRead } = changes;
  const pages = tables.reduce((sum, table) => sum + table.pages, 0);
  return {
    branch_id: branch.id,
    branch: branch.name,
    from_lsn: fromLsn,
    to_lsn: toLsn,
    pages,
    bytes: pages * BLOCK_SIZE,
    transaction_status_pages: statusPages,
    index_blocks_read: indexBlocksRead,
    tables: tables.map((table) => ({
      database: table.database,
      name: table.name,
      named: table.isNamed,
      catalog: table.isCatalog,
      pages: table.pages,
      bytes: table.pages * BLOCK_SIZE,
      heap_pages: table.heap,
      index_pages: table.indexes,
      toast_pages: table.toast,
      map_pages: table.maps,
      ...(table.before === undefined && table.after === undefined
        ? {}
        : { heap_size_before: table.before ?? null, heap_size_after: table.after ?? null }),
      notes: notesOf(table),
    })),
  };
}

function sideText(changes: BranchChanges, tables: readonly TableChange[], withCatalogs: boolean): string {
  const { branch, fromLsn, toLsn, statusPages } = changes;
  const pages = tables.reduce((sum, table) => sum + table.pages, 0);
  const head = `${branch.name}, from ${fromLsn} to ${toLsn}: ${pages} ${pages === 1 ? 'page' : 'pages'}, ${formatBytes(pages * BLOCK_SIZE)}`;
  const shown = tables.filter((table) => withCatalogs || !table.isCatalog);
  const catalogs = tables.filter((table) => !withCatalogs && table.isCatalog);
  const rows = shown.map((table) =>
    row(table.database, table.name, table, [...sizeNote(table), ...notesOf(table)].join(', ')),
  );
  if (catalogs.length > 0) {
    const sum = { pages: 0, heap: 0, indexes: 0, toast: 0, maps: 0 };
    for (const table of catalogs) {
      for (const name of ['pages', 'heap', 'indexes', 'toast', 'maps'] as const) sum[name] += table[name];
    }
    rows.push(row('', `system catalogs (${catalogs.length})`, sum, ''));
  }
  if (statusPages > 0)
    rows.push(['', 'transaction status', String(statusPages), formatBytes(statusPages * BLOCK_SIZE)]);
  if (rows.length === 0) return `${head}\nnothing changed`;
  const header = ['DATABASE', 'TABLE', 'PAGES', 'BYTES', 'HEAP', 'INDEXES', 'TOAST', 'MAPS', 'NOTE'];
  return `${head}\n${formatTable(header, rows)}`;
}

function row(
  database: string,
  name: string,
  counts: Pick<TableChange, 'pages' | 'heap' | 'indexes' | 'toast' | 'maps'>,
  note: string,
): string[] {
  const { pages, heap, indexes, toast, maps } = counts;
  const numbers = [heap, indexes, toast, maps].map((count) => (count === 0 ? '-' : String(count)));
  return [database, name, String(pages), formatBytes(pages * BLOCK_SIZE), ...numbers, note];
}

/** What belongs to a table comes and goes with it. */
function notesOf({ notes, partNotes }: TableChange): string[] {
  return notes.size > 0 ? [...notes] : [...partNotes];
}

function sizeNote({ before, after }: TableChange): string[] {
  if (typeof before !== 'number' || typeof after !== 'number' || before === after) return [];
  return [`${after > before ? 'grown' : 'shrunk'} from ${before} to ${after} pages`];
}
