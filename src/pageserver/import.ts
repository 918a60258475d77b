/**
 * Import: a cleanly stopped data directory of vanilla Postgres becomes the first state of a timeline: every key, as an image, at the LSN
 * where its shutdown checkpoint ends.
 *
 * Keys come in order, so that they can be written into an image layer as they come. Memory is bounded: one piece of a file at a time,
 * besides the list of files.
 *
 * Not supported, and refused: data checksums (pages made by redo carry none), tablespaces of users, a cluster that was not stopped
 * cleanly.
 */

import { closeSync, openSync, readFileSync, readSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';

import { CONTROL_FILE_PATH, DB_SHUTDOWNED, decodeControlFile } from '../postgres/control-file.ts';
import type { ControlFile } from '../postgres/control-file.ts';
import { WAL_SEGMENT_SIZE, formatLsn, segmentOffset, segmentStart, walFileName } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
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
import type { PgVersion } from '../postgres/version.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import type { WalRecord } from '../postgres/wal/record.ts';
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

export interface ImportedCluster {
  /** Where the shutdown checkpoint's record ends: the LSN of all keys. */
  readonly lsn: Lsn;
  /** Where that record starts. */
  readonly recordStartLsn: Lsn;
  readonly pgVersion: PgVersion;
  readonly systemId: bigint;
}

/** The data directory cannot be imported; the message says why. */
export class ImportError extends Error {
  override name = 'ImportError';
}

const READ_BYTES = 1024 * 1024;
const PAGES_BETWEEN_DRAINS = 128;
const UNIX_TO_POSTGRES_EPOCH_SECONDS = 946_684_800;

/** Where the imported history begins. Throws ImportError when the directory cannot be imported. */
export function inspectDataDirectory(dataDir: string): ImportedCluster {
  return positionOf(dataDir, readControlFile(dataDir).controlFile);
}

/** Puts every key of a stopped cluster into the sink. Throws ImportError when the directory cannot be imported. */
export async function importDataDirectory(dataDir: string, sink: ImportSink): Promise<ImportedCluster> {
  const { controlFile, bytes } = readControlFile(dataDir);
  const cluster = positionOf(dataDir, controlFile);
  sink.put(CHECKPOINT_STATE_KEY, initialState(controlFile, cluster));
  sink.put(CONTROL_FILE_KEY, bytes);
  const databases = listDatabases(dataDir);
  for (const { spc, db } of databases) {
    const map = join(dataDir, databasePath(spc, db, cluster.pgVersion), 'pg_filenode.map');
    sink.put(databaseKey(spc, db), readFileSync(map));
  }
  await putRelations(dataDir, databases, cluster.pgVersion, sink);
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
  return cluster;
}

function readControlFile(dataDir: string): { controlFile: ControlFile; bytes: Buffer } {
  const bytes = readFileSync(join(dataDir, CONTROL_FILE_PATH));
  const controlFile = decodeControlFile(bytes);
  if (controlFile.state !== DB_SHUTDOWNED) {
    throw new ImportError(`${dataDir} was not stopped cleanly: its control file says state ${controlFile.state}`);
  }
  if (controlFile.dataChecksumVersion !== 0) {
    throw new ImportError(`${dataDir} has data checksums; take them off with pg_checksums --disable`);
  }
  return { controlFile, bytes };
}

function positionOf(dataDir: string, controlFile: ControlFile): ImportedCluster {
  const { version: pgVersion, systemId, checkPoint, checkPointCopy } = controlFile;
  const reader = new WalReader(checkPoint, pgVersion);
  let record: WalRecord | undefined;
  for (let lsn = checkPoint; record === undefined; lsn = segmentStart(lsn) + WAL_SEGMENT_SIZE) {
    const path = join(dataDir, 'pg_wal', walFileName(checkPointCopy.timelineId, lsn));
    reader.push(lsn, readFileSync(path).subarray(segmentOffset(lsn)));
    record = reader.next();
  }
  if (record.startLsn !== checkPoint) {
    throw new ImportError(`${dataDir} has no checkpoint record at ${formatLsn(checkPoint)}`);
  }
  return { lsn: record.endLsn, recordStartLsn: record.startLsn, pgVersion, systemId };
}

function initialState(controlFile: ControlFile, cluster: ImportedCluster): Buffer {
  return encodeCheckpointState({
    checkPoint: controlFile.checkPointCopy,
    parameters: controlFile,
    checkpointLsn: cluster.recordStartLsn,
    shutdownLsn: cluster.lsn,
  });
}

function listDatabases(dataDir: string): { spc: number; db: number }[] {
  if (readdirSync(join(dataDir, 'pg_tblspc')).length > 0) {
    throw new ImportError(`${dataDir} has tablespaces of its own, which are not supported`);
  }
  const databases = readdirSync(join(dataDir, 'base'))
    .filter((name) => /^\d+$/.test(name))
    .map((name) => ({ spc: DEFAULT_TABLESPACE, db: Number(name) }))
    .sort((a, b) => a.db - b.db);
  return [...databases, { spc: GLOBAL_TABLESPACE, db: 0 }];
}

interface ForkFiles extends RelationFork {
  blocks: number;
}

async function putRelations(
  dataDir: string,
  databases: readonly { spc: number; db: number }[],
  version: PgVersion,
  sink: ImportSink,
): Promise<void> {
  const forks: ForkFiles[] = [];
  for (const { spc, db } of databases) forks.push(...listForks(dataDir, databasePath(spc, db, version)));
  for (const { spc, db, rel, fork, blocks } of forks) {
    sink.put(relationSizeKey(spc, db, rel, fork), u32(blocks));
  }
  for (const fork of forks) {
    for (let blk = 0; blk < fork.blocks; blk += BLOCKS_PER_SEGMENT) {
      const path = relationSegmentPath({ ...fork, segment: blk / BLOCKS_PER_SEGMENT }, version);
      for (const [index, page] of readPages(join(dataDir, path))) {
        if (index % PAGES_BETWEEN_DRAINS === 0) await sink.drain();
        // A block without a value is zeroes.
        if (isZero(page)) continue;
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
    const known = forks.get(id) ?? { spc, db, rel, fork, blocks: 0 };
    if (blocks > 0) known.blocks = Math.max(known.blocks, segment * BLOCKS_PER_SEGMENT + blocks);
    forks.set(id, known);
  }
  return [...forks.values()]
    .filter(({ rel, fork }) => fork === FORK_INIT || !unlogged.has(rel))
    .sort((a, b) => compareKeys(sizeKey(a), sizeKey(b)));
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
