/**
 * Import: a cleanly stopped data directory of vanilla Postgres becomes the first state of a timeline: every key, as an image, at the LSN
 * where its shutdown checkpoint ends.
 *
 * Keys come in order, so that they can be written into an image layer as they come. Memory is bounded: one piece of a file at a time,
 * besides the list of files. The event loop is given back every few pages, as a pageserver has others to serve.
 *
 * Where the cluster has data checksums each page is verified, and then carries none, as the pages that redo makes. What a directory must be
 * besides: import-check.ts.
 */

import { closeSync, openSync, readFileSync, readSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate as turn } from 'node:timers/promises';

import { encodeControlFile } from '../postgres/control-file.ts';
import type { ControlFile } from '../postgres/control-file.ts';
import { setPageChecksum } from '../postgres/page.ts';
import { verifyPageChecksum } from '../postgres/page-checksum.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import {
  BLOCKS_PER_SEGMENT,
  DEFAULT_TABLESPACE,
  FORK_INIT,
  GLOBAL_TABLESPACE,
  databasePath,
  parseRelationPath,
  relationSegmentPath,
} from '../postgres/relation.ts';
import { assertStillStopped, ImportError, inspectDataDirectory } from './import-check.ts';
import type { StoppedCluster } from './import-check.ts';
import { encodeCheckpointState, fullXid } from './ingest/checkpoint-state.ts';
import { SLRUS, parseSlruFileName, slruSegmentPath } from './ingest/slru.ts';
import { encodeChunk, walIndexBucket, walIndexChunkKey } from './ingest/wal-index.ts';
import {
  CHECKPOINT_STATE_KEY,
  CONTROL_FILE_KEY,
  compareKeys,
  databaseKey,
  relationBlockKey,
  relationSizeKey,
  slruPageKey,
  slruSizeKey,
  twoPhaseKey,
} from './key.ts';
import type { Key, RelationFork } from './key.ts';

/** Takes keys in rising order, each with its value, which it copies. */
export interface ImportSink {
  put(key: Key, image: Uint8Array): void;
  /** Awaited after every so many puts, for a sink that writes what it was given. */
  drain(): Promise<void>;
}

export interface ImportOptions {
  /** Relation bytes so far; called every few pages. */
  readonly onProgress?: (doneBytes: number) => void;
  readonly signal?: AbortSignal;
}

const READ_BYTES = 1024 * 1024;
const PAGES_BETWEEN_DRAINS = 64;
const UNIX_TO_POSTGRES_EPOCH_SECONDS = 946_684_800;

/** Puts every key of a stopped cluster into the sink. Throws ImportError when the directory cannot be imported. */
export async function importDataDirectory(
  dataDir: string,
  sink: ImportSink,
  options: ImportOptions = {},
): Promise<StoppedCluster> {
  const cluster = inspectDataDirectory(dataDir);
  const { controlFile } = cluster;
  sink.put(CHECKPOINT_STATE_KEY, initialState(controlFile, cluster));
  sink.put(CONTROL_FILE_KEY, encodeControlFile({ ...controlFile, dataChecksumVersion: 0 }));
  const databases = listDatabases(dataDir);
  for (const { spc, db } of databases) {
    const map = join(dataDir, databasePath(spc, db, cluster.pgVersion), 'pg_filenode.map');
    sink.put(databaseKey(spc, db), readFileSync(map));
  }
  await putRelations(dataDir, databases, cluster, sink, options);
  putSlrus(dataDir, sink);
  putTwoPhase(dataDir, controlFile.checkPointCopy.nextXid, sink);
  // Nothing is known of times before: as the first time there is, the checkpoint's own.
  const chunk = encodeChunk({
    timeBefore: (controlFile.checkPointCopy.time - UNIX_TO_POSTGRES_EPOCH_SECONDS) * 1e6,
    setBackLsn: 0,
    starts: [cluster.recordStartLsn],
    ends: [cluster.lsn],
    commits: [],
  });
  sink.put(walIndexChunkKey(walIndexBucket(cluster.recordStartLsn)), chunk);
  assertStillStopped(dataDir, cluster);
  return cluster;
}

function initialState(controlFile: ControlFile, cluster: StoppedCluster): Buffer {
  return encodeCheckpointState({
    checkPoint: controlFile.checkPointCopy,
    parameters: controlFile,
    checkpointLsn: cluster.recordStartLsn,
    shutdownLsn: cluster.lsn,
  });
}

function listDatabases(dataDir: string): { spc: number; db: number }[] {
  const databases = readdirSync(join(dataDir, 'base'))
    .filter((name) => /^\d+$/.test(name))
    .map((name) => ({ spc: DEFAULT_TABLESPACE, db: Number(name) }))
    .sort((a, b) => a.db - b.db);
  return [...databases, { spc: GLOBAL_TABLESPACE, db: 0 }];
}

interface ForkFiles extends RelationFork {
  blocks: number;
  /** Blocks in each of its files, by segment. */
  readonly segments: Map<number, number>;
}

async function putRelations(
  dataDir: string,
  databases: readonly { spc: number; db: number }[],
  cluster: StoppedCluster,
  sink: ImportSink,
  { onProgress, signal }: ImportOptions,
): Promise<void> {
  const { pgVersion, controlFile } = cluster;
  const hasChecksums = controlFile.dataChecksumVersion !== 0;
  const forks: ForkFiles[] = [];
  for (const { spc, db } of databases) forks.push(...listForks(dataDir, databasePath(spc, db, pgVersion)));
  for (const { spc, db, rel, fork, blocks } of forks) {
    sink.put(relationSizeKey(spc, db, rel, fork), u32(blocks));
  }
  let pagesRead = 0;
  for (const fork of forks) {
    for (let blk = 0; blk < fork.blocks; blk += BLOCKS_PER_SEGMENT) {
      const path = relationSegmentPath({ ...fork, segment: blk / BLOCKS_PER_SEGMENT }, pgVersion);
      for (const [index, page] of readPages(join(dataDir, path))) {
        if (++pagesRead % PAGES_BETWEEN_DRAINS === 0) {
          signal?.throwIfAborted();
          onProgress?.(pagesRead * BLOCK_SIZE);
          await sink.drain();
          await turn();
        }
        // A block without a value is zeroes.
        if (isZero(page)) continue;
        if (hasChecksums) {
          if (!verifyPageChecksum(page, blk + index)) {
            throw new ImportError(`${join(dataDir, path)} is damaged: block ${index} does not have its checksum`);
          }
          setPageChecksum(page, 0);
        }
        sink.put(relationBlockKey(fork.spc, fork.db, fork.rel, fork.fork, blk + index), page);
      }
    }
  }
}

/** The forks of a directory, sorted. What is in unlogged relations is not kept: only their init forks are taken. */
function listForks(dataDir: string, directory: string): ForkFiles[] {
  const forks = new Map<string, ForkFiles>();
  const unlogged = new Set<number>();
  for (const name of readdirSync(join(dataDir, directory))) {
    const file = parseRelationPath(`${directory}/${name}`);
    if (file === undefined) continue;
    const { spc, db, rel, fork, segment } = file;
    if (fork === FORK_INIT) unlogged.add(rel);
    const blocks = statSync(join(dataDir, directory, name)).size / BLOCK_SIZE;
    if (!Number.isInteger(blocks)) throw new ImportError(`${directory}/${name} does not consist of whole pages`);
    const id = `${rel}/${fork}`;
    const known = forks.get(id) ?? { spc, db, rel, fork, blocks: 0, segments: new Map<number, number>() };
    known.segments.set(segment, blocks);
    if (blocks > 0) known.blocks = Math.max(known.blocks, segment * BLOCKS_PER_SEGMENT + blocks);
    forks.set(id, known);
  }
  for (const fork of forks.values()) assertWhole(directory, fork);
  return [...forks.values()]
    .filter(({ rel, fork }) => fork === FORK_INIT || !unlogged.has(rel))
    .sort((a, b) => compareKeys(sizeKey(a), sizeKey(b)));
}

/** All files of a fork but the last are full. */
function assertWhole(directory: string, { rel, fork, blocks, segments }: ForkFiles): void {
  for (let segment = 0; (segment + 1) * BLOCKS_PER_SEGMENT < blocks; segment++) {
    const found = segments.get(segment);
    if (found === BLOCKS_PER_SEGMENT) continue;
    const what = found === undefined ? 'is missing' : `has ${found} blocks`;
    throw new ImportError(`segment ${segment} of ${directory}/${rel} (fork ${fork}) ${what}, but there is a later one`);
  }
}

function sizeKey({ spc, db, rel, fork }: RelationFork): Key {
  return relationSizeKey(spc, db, rel, fork);
}

function putSlrus(dataDir: string, sink: ImportSink): void {
  const segments: { slru: number; segment: number }[] = [];
  for (const { slru, directory } of SLRUS) {
    const numbers = readdirSync(join(dataDir, directory)).map(parseSlruFileName);
    for (const segment of numbers.filter((number) => number !== undefined).sort((a, b) => a - b)) {
      segments.push({ slru, segment });
    }
  }
  for (const { slru, segment } of segments) {
    const pages = Math.ceil(statSync(join(dataDir, slruSegmentPath(slru, segment))).size / BLOCK_SIZE);
    sink.put(slruSizeKey(slru, segment), u32(pages));
  }
  for (const { slru, segment } of segments) {
    for (const [page, bytes] of readPages(join(dataDir, slruSegmentPath(slru, segment)))) {
      sink.put(slruPageKey(slru, segment, page), bytes);
    }
  }
}

function putTwoPhase(dataDir: string, nextXid: number, sink: ImportSink): void {
  const directory = join(dataDir, 'pg_twophase');
  const files = readdirSync(directory)
    .filter((name) => /^(?:[0-9A-F]{8}){1,2}$/.test(name))
    .map((name) => {
      const low = parseInt(name.slice(-8), 16);
      // Until 16 the epoch is not in the name.
      const full = name.length === 16 ? parseInt(name.slice(0, 8), 16) * 2 ** 32 + low : fullXid(low, nextXid);
      return { name, full };
    })
    .sort((a, b) => a.full - b.full);
  for (const { name, full } of files) {
    sink.put(twoPhaseKey(Math.floor(full / 2 ** 32), full % 2 ** 32), readFileSync(join(directory, name)));
  }
}

/** The pages of a file with their numbers. A page is a view of memory that is used again. */
function* readPages(path: string): Generator<[number: number, page: Buffer]> {
  const file = openSync(path, 'r');
  try {
    const buffer = Buffer.alloc(READ_BYTES);
    for (let first = 0; ; first += READ_BYTES / BLOCK_SIZE) {
      const length = readSync(file, buffer, 0, READ_BYTES, first * BLOCK_SIZE);
      if (length === 0) return;
      // The end of an SLRU segment may lack the rest of its last page.
      buffer.fill(0, length, Math.ceil(length / BLOCK_SIZE) * BLOCK_SIZE);
      for (let at = 0; at < length; at += BLOCK_SIZE) {
        yield [first + at / BLOCK_SIZE, buffer.subarray(at, at + BLOCK_SIZE)];
      }
      if (length < READ_BYTES) return;
    }
  } finally {
    closeSync(file);
  }
}

function u32(value: number): Buffer {
  const bytes = Buffer.allocUnsafe(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

const ZERO_PAGE = Buffer.alloc(BLOCK_SIZE);

function isZero(page: Buffer): boolean {
  return ZERO_PAGE.equals(page);
}
