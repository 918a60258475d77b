/**
 * The other half of the independent replay (scrub-replay.ts): what is no relation's page. From the files of a timeline at one LSN (SLRUs, filenode maps, prepared
 * transactions) and the sizes of its forks, and the WAL from there on, those at a later LSN are made without keys, layers or ingest, and compared with what the store gives.
 *
 * Files are whole files here, as Postgres has them; ingest keeps keys of pages and of sizes, and takes most commits by a way of its own. Shared with it is what
 * a record means (implied-changes.ts) and how a page of an SLRU changes (redo/derived.ts).
 *
 * Not compared: forks of unlogged relations, which a basebackup makes anew; commit timestamps when their tracking was switched meanwhile.
 */

import type { Basebackup, BasebackupRelation } from '../api/basebackup.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { databasePath, FORK_FSM, FORK_INIT, FORK_MAIN, FORK_VM, relationPath } from '../postgres/relation.ts';
import type { RelationKey } from '../postgres/relation.ts';
import type { PgVersion } from '../postgres/version.ts';
import type { WalRecord } from '../postgres/wal/record.ts';
import type { Change } from './ingest/change.ts';
import { impliedChanges } from './ingest/implied-changes.ts';
import { PAGES_PER_SLRU_SEGMENT, SLRUS, slruSegmentIsOld, slruSegmentPath } from './ingest/slru.ts';
import { SLRU } from './key.ts';
import { applyDerived, commitTimestampChanges, truncateFreeSpace, truncateVisibility } from './redo/derived.ts';

/** What a timeline has besides pages of relations, at an LSN. */
export type Files = Pick<Basebackup, 'files' | 'relations' | 'databases'>;

export interface FoundDifference {
  /** Relative to a data directory. */
  readonly file: string;
  /** First byte that differs; undefined when it is about the whole. */
  readonly offset: number | undefined;
  readonly reason: string;
}

const TWO_PHASE = 'pg_twophase/';
const COMMIT_TS = `${SLRUS[SLRU.commitTs]!.directory}/`;

export class FilesReplay {
  readonly #version: PgVersion;
  /** By SLRU, then segment: its pages. */
  readonly #slrus: readonly Map<number, Buffer[]>[] = SLRUS.map(() => new Map<number, Buffer[]>());
  /** By path: the filenode map of each database. */
  readonly #maps = new Map<string, Buffer>();
  /** By xid. */
  readonly #prepared = new Map<number, Buffer>();
  readonly #forks = new Map<string, BasebackupRelation>();
  readonly #tracksCommitTs: boolean;
  #isCommitTsKnown = true;
  /** End of the last record. */
  lsn: Lsn;

  constructor(base: Basebackup, version: PgVersion) {
    this.#version = version;
    this.lsn = base.lsn;
    this.#tracksCommitTs = base.parameters.trackCommitTimestamp;
    const files = new Map(base.files.map(({ path, bytes }) => [path, bytes]));
    for (const { spc, db } of base.databases) {
      const path = this.#mapPath(spc, db);
      this.#maps.set(path, files.get(path) ?? Buffer.alloc(0));
    }
    for (const [path, bytes] of files) {
      if (path.startsWith(TWO_PHASE)) this.#prepared.set(xidOf(path), bytes);
      for (const { slru, directory } of SLRUS) {
        if (!path.startsWith(`${directory}/`)) continue;
        const pages = Array.from({ length: bytes.length / BLOCK_SIZE }, (_, i) =>
          Buffer.from(bytes.subarray(i * BLOCK_SIZE, (i + 1) * BLOCK_SIZE)),
        );
        this.#slrus[slru]!.set(parseInt(path.slice(directory.length + 1), 16), pages);
      }
    }
    for (const fork of base.relations) if (fork.fork === fork.sourceFork) this.#setSize(fork, fork.fork, fork.blocks);
  }

  take(record: WalRecord): void {
    for (const block of record.blocks) {
      const size = this.#size(block, block.fork) ?? 0;
      this.#setSize(block, block.fork, Math.max(size, block.blk + 1));
    }
    for (const change of impliedChanges(record, this.#version)) this.#apply(change);
    this.lsn = record.endLsn;
  }

  /** How many files and forks there are to compare. */
  get count(): number {
    return this.#slrus.reduce((sum, { size }) => sum + size, this.#maps.size + this.#prepared.size + this.#forks.size);
  }

  /** With what the store gives at `lsn`. */
  compare(stored: Files): FoundDifference[] {
    const differences: FoundDifference[] = [];
    const expected = this.#files();
    const found = new Map<string, Buffer>();
    for (const { path, bytes } of stored.files) {
      if (isCompared(path)) found.set(path.startsWith(TWO_PHASE) ? twoPhaseName(xidOf(path)) : path, bytes);
    }
    for (const { spc, db } of stored.databases) {
      const path = this.#mapPath(spc, db);
      if (!found.has(path)) found.set(path, Buffer.alloc(0));
    }
    for (const path of new Set([...expected.keys(), ...found.keys()])) {
      if (path.startsWith(COMMIT_TS) && !this.#isCommitTsKnown) continue;
      const difference = differenceOf(path, expected.get(path), found.get(path));
      if (difference !== undefined) differences.push(difference);
    }
    differences.push(...this.#compareForks(stored.relations));
    return differences;
  }

  #compareForks(stored: readonly BasebackupRelation[]): FoundDifference[] {
    const path = (fork: BasebackupRelation): string => relationPath(fork, this.#version);
    const unlogged = new Set(stored.filter(({ fork }) => fork === FORK_INIT).map(relationName));
    const found = new Map(stored.filter((fork) => !unlogged.has(relationName(fork))).map((fork) => [path(fork), fork]));
    const expected = new Map(
      [...this.#forks.values()].filter((fork) => !unlogged.has(relationName(fork))).map((fork) => [path(fork), fork]),
    );
    return [...new Set([...expected.keys(), ...found.keys()])].flatMap((file) => {
      const [ours, theirs] = [expected.get(file)?.blocks, found.get(file)?.blocks];
      if (ours === theirs) return [];
      const blocks = (count: number | undefined): string =>
        count === undefined ? 'not there' : `${count} blocks long`;
      return [{ file, offset: undefined, reason: `the fork is ${blocks(theirs)}, by WAL it is ${blocks(ours)}` }];
    });
  }

  #files(): Map<string, Buffer> {
    const files = new Map(this.#maps);
    for (const { slru } of SLRUS) {
      for (const [segment, pages] of this.#slrus[slru]!)
        files.set(slruSegmentPath(slru, segment), Buffer.concat(pages));
    }
    for (const [xid, bytes] of this.#prepared) files.set(twoPhaseName(xid), bytes);
    return files;
  }

  #apply(change: Change): void {
    switch (change.kind) {
      case 'create-fork':
        if (this.#size(change.fork, change.fork.fork) === undefined) this.#setSize(change.fork, change.fork.fork, 0);
        return;
      case 'truncate-relation':
        return this.#truncate(change);
      case 'drop-relation':
        for (const fork of [FORK_MAIN, FORK_FSM, FORK_VM, FORK_INIT])
          this.#forks.delete(forkName(change.relation, fork));
        return;
      case 'create-database': {
        const path = this.#mapPath(change.spc, change.db);
        if (!this.#maps.has(path)) this.#maps.set(path, Buffer.alloc(0));
        return;
      }
      case 'copy-database':
        return this.#copyDatabase(change);
      case 'drop-database':
        return this.#dropDatabase(change.spc, change.db);
      case 'relation-map':
        this.#maps.set(this.#mapPath(change.spc, change.db), Buffer.from(change.map));
        return;
      case 'zero-slru-page':
        this.#page(change.slru, change.page).fill(0);
        return;
      case 'change-slru-page':
        return applyDerived(this.#page(change.slru, change.change.page), change.change.subtype, change.change.payload);
      case 'truncate-slru':
        for (const segment of [...this.#slrus[change.slru]!.keys()]) {
          if (slruSegmentIsOld(change.slru, segment, change.cutoffPage)) this.#slrus[change.slru]!.delete(segment);
        }
        return;
      case 'drop-slru-segment':
        this.#slrus[change.slru]!.delete(change.segment);
        return;
      case 'commit-timestamps':
        if (!this.#tracksCommitTs) return;
        for (const each of commitTimestampChanges(change.timeUs, change.origin, change.xids)) {
          applyDerived(this.#page(SLRU.commitTs, each.page), each.subtype, each.payload);
        }
        return;
      case 'parameters':
        if (this.#tracksCommitTs || change.parameters.trackCommitTimestamp) this.#isCommitTsKnown = false;
        return;
      case 'prepare':
        this.#prepared.set(change.xid, Buffer.from(change.file));
        return;
      case 'forget-prepared':
        this.#prepared.delete(change.xid);
        return;
      default: // The rest is about pages of relations, or is no file.
    }
  }

  /** The page, made if need be, with all that are before it in its segment. */
  #page(slru: number, page: number): Buffer {
    const segment = Math.floor(page / PAGES_PER_SLRU_SEGMENT);
    const pages = this.#slrus[slru]!.get(segment) ?? [];
    this.#slrus[slru]!.set(segment, pages);
    while (pages.length <= page % PAGES_PER_SLRU_SEGMENT) pages.push(Buffer.alloc(BLOCK_SIZE));
    return pages[page % PAGES_PER_SLRU_SEGMENT]!;
  }

  #truncate(change: Extract<Change, { kind: 'truncate-relation' }>): void {
    const { relation, blocks } = change;
    if (change.main) this.#setSize(relation, FORK_MAIN, Math.min(blocks, this.#size(relation, FORK_MAIN) ?? 0));
    const cut = (fork: number, mapBlocks: number): void => {
      const size = this.#size(relation, fork);
      if (size !== undefined) this.#setSize(relation, fork, Math.min(size, mapBlocks));
    };
    if (change.freeSpace) cut(FORK_FSM, truncateFreeSpace(blocks).mapBlocks);
    if (change.visibility) cut(FORK_VM, truncateVisibility(blocks).mapBlocks);
  }

  #copyDatabase({ spc, db, fromSpc, fromDb }: Extract<Change, { kind: 'copy-database' }>): void {
    this.#dropDatabase(spc, db);
    this.#maps.set(this.#mapPath(spc, db), this.#maps.get(this.#mapPath(fromSpc, fromDb)) ?? Buffer.alloc(0));
    for (const fork of [...this.#forks.values()]) {
      if (fork.spc === fromSpc && fork.db === fromDb) this.#setSize({ ...fork, spc, db }, fork.fork, fork.blocks);
    }
  }

  #dropDatabase(spc: number, db: number): void {
    this.#maps.delete(this.#mapPath(spc, db));
    for (const [name, fork] of this.#forks) if (fork.spc === spc && fork.db === db) this.#forks.delete(name);
  }

  #mapPath(spc: number, db: number): string {
    return `${databasePath(spc, db, this.#version)}/pg_filenode.map`;
  }

  #size(relation: RelationKey, fork: number): number | undefined {
    return this.#forks.get(forkName(relation, fork))?.blocks;
  }

  #setSize({ spc, db, rel }: RelationKey, fork: number, blocks: number): void {
    const name = forkName({ spc, db, rel }, fork);
    if (this.#forks.get(name)?.blocks === blocks) return;
    this.#forks.set(name, { spc, db, rel, fork, sourceFork: fork, blocks });
  }
}

function relationName({ spc, db, rel }: RelationKey): string {
  return `${spc}/${db}/${rel}`;
}

function forkName(relation: RelationKey, fork: number): string {
  return `${relationName(relation)}.${fork}`;
}

/** The files of `base/…/PG_VERSION` and the like say nothing. */
function isCompared(path: string): boolean {
  return (
    path.endsWith('/pg_filenode.map') ||
    path.startsWith(TWO_PHASE) ||
    SLRUS.some(({ directory }) => path.startsWith(`${directory}/`))
  );
}

/** Names of files of prepared transactions end in the xid; from version 17 on the epoch is before it. */
function xidOf(path: string): number {
  return parseInt(path.slice(-8), 16);
}

function twoPhaseName(xid: number): string {
  return `${TWO_PHASE}${xid.toString(16).toUpperCase().padStart(8, '0')}`;
}

function differenceOf(
  file: string,
  expected: Buffer | undefined,
  found: Buffer | undefined,
): FoundDifference | undefined {
  const length = (bytes: Buffer | undefined): string =>
    bytes === undefined ? 'not there' : `${bytes.length} bytes long`;
  if (expected?.length !== found?.length) {
    return { file, offset: undefined, reason: `the file is ${length(found)}, by WAL it is ${length(expected)}` };
  }
  if (expected === undefined || found === undefined || expected.equals(found)) return undefined;
  const offset = expected.findIndex((byte, i) => byte !== found[i]);
  return { file, offset, reason: `its byte is ${found[offset]}, by WAL it is ${expected[offset]}` };
}
