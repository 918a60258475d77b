/**
 * The page map: what the page shim of a compute knows of the pages that its local files lack; and the local files themselves, sparse and of
 * full length, whose pages arrive on first read. The agent makes both before it starts Postgres.
 *
 * One file per compute, outside its data directory, mapped shared by all of its processes. Little-endian.
 *
 *   offset  size  field
 *        0     8  magic "STRPGMAP"
 *        8     4  version, 1
 *       12     4  CRC-32 (zlib's) of bytes [0, table end), with this field taken as zero
 *       16     8  start LSN: the LSN at which absent pages are fetched
 *       24     8  length of the file in bytes
 *       32     4  entry count n
 *       36     4  index slot count m: a power of two, larger than the entry count
 *       40     4  blocks per segment of a relation fork (131072)
 *       44     4  block size in bytes (8192)
 *       48     8  offset of the name words
 *       56     8  offset of the page states
 *       64    16  boot id of the machine: after a reboot the local files cannot be trusted, nothing was synced
 *       80    16  timeline id
 *       96     4  flags: 1 = the files are made on first use
 *      100    28  zero
 *      128   48n  entries, one per segment file that had blocks at the start (with flag 1 also one per file without):
 *                   0 spc, 4 db, 8 rel, 12 fork, 16 segment: the key, u32 each
 *                  20 rel, 24 fork: from where its pages are fetched (another fork for unlogged tables, else the same), u32 each
 *                  28 blocks of this segment at the start, u32
 *                  32 offset in this file of its page states, u64
 *                  40 zero, 8 bytes
 *        ·    4m  index: open addressing with linear probing; entry number + 1, or 0 for an empty slot; begins at hash(key) & (m - 1)
 *                 table end; zeroes up to the name words, which begin at a multiple of 64
 *        ·    4n  name words, one per entry: what is under the name of its file
 *                   0 the file of the start; with flag 1 it is not made yet, and whoever uses the name first makes it
 *                   1 nothing, or a file that this compute made after dropping the other: wholly local from then on
 *                   2 the file of the start, made on first use (with flag 1 only)
 *                   3 somebody is making it (with flag 1 only; waited for by a futex)
 *        ·     ·  page states, one byte per block, each entry's at a multiple of 64:
 *                   0 absent, 1 claimed, 2 present, 3 claimed and somebody waits (what they mean: shim/format.h)
 *
 * Everything before the table end never changes after the file is written. Blocks past an entry's count are always local. A map may be
 * used again only with the local files it describes, after a clean shutdown: a claim that was cut short then changed nothing.
 */
import {
  closeSync,
  fchownSync,
  fstatSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  renameSync,
  writeSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { crc32 } from 'node:zlib';
import { type Lsn, readLsn, writeLsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { BLOCKS_PER_SEGMENT, databasePath, type RelationForkKey, relationSegmentPath } from '../postgres/relation.ts';
import type { PgVersion } from '../postgres/version.ts';

const MAGIC = 'STRPGMAP';
const VERSION = 1;
const HEADER_BYTES = 128;
const ENTRY_BYTES = 48;
const CRC_OFFSET = 12;
const MIN_SLOTS = 16;
const BOOT_ID_FILE = '/proc/sys/kernel/random/boot_id';

const FLAG_FILES_ON_FIRST_USE = 1;
const FLAGS_OFFSET = 96;
const NAME_AT_START = 0;
const NAME_GONE = 1;
const NAME_BEING_MADE = 3;
const STATE_PRESENT = 2;
const CLAIMED_STATES = [1, 3];
const SCAN_CHUNK_BYTES = 1 << 20;

/** A relation fork as it is at the start LSN. */
export interface RelationFork extends RelationForkKey {
  readonly blocks: number;
  /** From where its pages come when not from itself: the main fork of an unlogged table starts as a copy of its init fork. */
  readonly source?: { readonly rel: number; readonly fork: number };
}

/** The user that Postgres runs as. */
export interface FileOwner {
  readonly uid: number;
  readonly gid: number;
}

export interface PageMapOptions {
  readonly startLsn: Lsn;
  readonly timelineId: string;
  readonly relations: readonly RelationFork[];
  /**
   * The shim makes each relation file when its name is first used, and only their folders have to be there (createRelationFolders). Else all
   * files have to be there before Postgres starts (createSparseRelationFiles).
   */
  readonly filesOnFirstUse?: boolean;
  readonly owner?: FileOwner | undefined;
}

export interface PageMapEntry extends RelationForkKey {
  readonly segment: number;
  readonly sourceRel: number;
  readonly sourceFork: number;
  readonly blocks: number;
  readonly statesOffset: number;
  readonly gone: boolean;
}

export interface PageMap {
  readonly startLsn: Lsn;
  readonly timelineId: string;
  /** 32 hex digits. */
  readonly bootId: string;
  readonly filesOnFirstUse: boolean;
  readonly namesOffset: number;
  readonly entries: readonly PageMapEntry[];
}

export type PageMapReuse =
  { readonly kind: 'ready'; readonly map: PageMap } | { readonly kind: 'unusable'; readonly reason: string };

/** Writes the page map of a compute that starts with no page of its own. A file that is there is replaced. */
export function createPageMap(path: string, options: PageMapOptions): void {
  const segments = options.relations.flatMap((relation) => segmentsOf(relation, options.filesOnFirstUse ? 1 : 0));
  const table = encodeTable(options, segments);
  const temporary = `${path}.partial`;
  const file = openSync(temporary, 'w', 0o600);
  try {
    if (options.owner !== undefined) fchownSync(file, options.owner.uid, options.owner.gid);
    for (let offset = 0; offset < table.bytes.length;) offset += writeSync(file, table.bytes, offset);
    ftruncateSync(file, table.length);
  } finally {
    closeSync(file);
  }
  renameSync(temporary, path);
}

/** Reads header, entries and gone words. Throws an Error that says what is wrong with the file. */
export function readPageMap(path: string): PageMap {
  const file = openSync(path, 'r');
  try {
    return readOpenPageMap(file);
  } finally {
    closeSync(file);
  }
}

/**
 * Makes the page map of a cleanly stopped compute fit for the next start with the same local files: claims that were cut short go back to
 * absent. Unusable when it is damaged, another timeline's, or from before a reboot; then the cache is to be thrown away.
 */
export function reusePageMap(path: string, expected: { readonly timelineId: string }): PageMapReuse {
  let file: number;
  try {
    file = openSync(path, 'r+');
  } catch (error) {
    return { kind: 'unusable', reason: (error as Error).message };
  }
  try {
    const map = readOpenPageMap(file);
    if (map.timelineId !== expected.timelineId)
      return { kind: 'unusable', reason: `it is of timeline ${map.timelineId}` };
    if (map.bootId !== readBootId()) return { kind: 'unusable', reason: 'the machine was started anew since' };
    resetNames(file, map);
    resetClaims(file, map);
    return { kind: 'ready', map };
  } catch (error) {
    return { kind: 'unusable', reason: (error as Error).message };
  } finally {
    closeSync(file);
  }
}

/** How many blocks of the map's live files are local by now, of how many. */
export function countPresentPages(path: string): { readonly present: number; readonly total: number } {
  const file = openSync(path, 'r');
  try {
    let present = 0;
    let total = 0;
    for (const entry of readOpenPageMap(file).entries) {
      if (entry.gone) continue;
      total += entry.blocks;
      scanStates(file, entry, (states) => {
        for (const state of states) if (state === STATE_PRESENT) present++;
      });
    }
    return { present, total };
  } finally {
    closeSync(file);
  }
}

/**
 * Makes the files of the forks: sparse, of the length that they have at the start LSN, with their folders. Only for an empty cache: a file
 * that is there is cut.
 */
export function createSparseRelationFiles(
  dataDir: string,
  pgVersion: PgVersion,
  relations: readonly RelationFork[],
  owner?: FileOwner,
): void {
  const folders = new Set<string>();
  for (const relation of relations) {
    const segmentCount = Math.max(1, Math.ceil(relation.blocks / BLOCKS_PER_SEGMENT));
    for (let segment = 0; segment < segmentCount; segment++) {
      const path = join(dataDir, relationSegmentPath({ ...relation, segment }, pgVersion));
      const folder = dirname(path);
      if (!folders.has(folder)) {
        makeFolder(folder, owner);
        folders.add(folder);
      }
      const blocks = Math.min(relation.blocks - segment * BLOCKS_PER_SEGMENT, BLOCKS_PER_SEGMENT);
      const file = openSync(path, 'w', 0o600);
      try {
        if (owner !== undefined) fchownSync(file, owner.uid, owner.gid);
        if (blocks > 0) ftruncateSync(file, blocks * BLOCK_SIZE);
      } finally {
        closeSync(file);
      }
    }
  }
}

/** Makes the folders of the forks' files: what a page map with filesOnFirstUse needs. */
export function createRelationFolders(
  dataDir: string,
  pgVersion: PgVersion,
  relations: readonly RelationFork[],
  owner?: FileOwner,
): void {
  const folders = new Set(relations.map(({ spc, db }) => databasePath(spc, db, pgVersion)));
  for (const folder of folders) makeFolder(join(dataDir, folder), owner);
}

function makeFolder(folder: string, owner: FileOwner | undefined): void {
  if (mkdirSync(folder, { recursive: true, mode: 0o700 }) === undefined || owner === undefined) return;
  const file = openSync(folder, 'r');
  try {
    fchownSync(file, owner.uid, owner.gid);
  } finally {
    closeSync(file);
  }
}

// --- writing ---

interface Segment extends RelationForkKey {
  readonly segment: number;
  readonly sourceRel: number;
  readonly sourceFork: number;
  readonly blocks: number;
}

/** At least `minSegments`, the last of which may then have no blocks. */
function segmentsOf(relation: RelationFork, minSegments: number): Segment[] {
  const { spc, db, rel, fork, blocks, source } = relation;
  const segments: Segment[] = [];
  for (let segment = 0; segment < minSegments || segment * BLOCKS_PER_SEGMENT < blocks; segment++) {
    segments.push({
      spc,
      db,
      rel,
      fork,
      segment,
      sourceRel: source?.rel ?? rel,
      sourceFork: source?.fork ?? fork,
      blocks: Math.min(blocks - segment * BLOCKS_PER_SEGMENT, BLOCKS_PER_SEGMENT),
    });
  }
  return segments;
}

/** All bytes that are not zero, and the length of the file. */
function encodeTable(options: PageMapOptions, segments: readonly Segment[]): { bytes: Buffer; length: number } {
  const slotCount = slotsFor(segments.length);
  const indexOffset = HEADER_BYTES + segments.length * ENTRY_BYTES;
  const tableEnd = indexOffset + slotCount * 4;
  const namesOffset = align64(tableEnd);
  const statesOffset = align64(namesOffset + segments.length * 4);
  const bytes = Buffer.alloc(tableEnd);

  let nextStates = statesOffset;
  segments.forEach((segment, number) => {
    const at = HEADER_BYTES + number * ENTRY_BYTES;
    const { spc, db, rel, fork, sourceRel, sourceFork, blocks } = segment;
    [spc, db, rel, fork, segment.segment, sourceRel, sourceFork, blocks].forEach((value, i) =>
      bytes.writeUInt32LE(value, at + i * 4),
    );
    writeU64(bytes, nextStates, at + 32);
    nextStates = align64(nextStates + blocks);
    let slot = hashKey(segment) & (slotCount - 1);
    while (bytes.readUInt32LE(indexOffset + slot * 4) !== 0) slot = (slot + 1) & (slotCount - 1);
    bytes.writeUInt32LE(number + 1, indexOffset + slot * 4);
  });

  bytes.write(MAGIC, 0, 'latin1');
  bytes.writeUInt32LE(VERSION, 8);
  writeLsn(bytes, options.startLsn, 16);
  writeU64(bytes, nextStates, 24);
  bytes.writeUInt32LE(segments.length, 32);
  bytes.writeUInt32LE(slotCount, 36);
  bytes.writeUInt32LE(BLOCKS_PER_SEGMENT, 40);
  bytes.writeUInt32LE(BLOCK_SIZE, 44);
  writeU64(bytes, namesOffset, 48);
  writeU64(bytes, statesOffset, 56);
  bytes.write(readBootId(), 64, 'hex');
  bytes.write(options.timelineId, 80, 'hex');
  bytes.writeUInt32LE(options.filesOnFirstUse ? FLAG_FILES_ON_FIRST_USE : 0, FLAGS_OFFSET);
  bytes.writeUInt32LE(crc32(bytes), CRC_OFFSET); // over the field while it is zero
  return { bytes, length: nextStates };
}

function slotsFor(entryCount: number): number {
  let slots = MIN_SLOTS;
  while (slots < entryCount * 2) slots *= 2;
  return slots;
}

/** The same in shim/map.c. */
function hashKey(key: RelationForkKey & { readonly segment: number }): number {
  let hash = 0;
  for (const field of [key.spc, key.db, key.rel, key.fork, key.segment]) {
    hash = Math.imul(hash ^ field, 0x9e3779b1);
    hash ^= hash >>> 15;
  }
  return hash >>> 0;
}

function align64(offset: number): number {
  return Math.ceil(offset / 64) * 64;
}

function writeU64(bytes: Buffer, value: number, offset: number): void {
  writeLsn(bytes, value, offset);
}

/** 32 hex digits. */
function readBootId(): string {
  return readFileSync(BOOT_ID_FILE, 'latin1').trim().replaceAll('-', '');
}

// --- reading ---

function readOpenPageMap(file: number): PageMap {
  const header = readAt(file, 0, HEADER_BYTES);
  if (header.toString('latin1', 0, 8) !== MAGIC) throw new Error('it is not a page map');
  const version = header.readUInt32LE(8);
  if (version !== VERSION) throw new Error(`it is a page map of version ${version}, this program knows ${VERSION}`);
  const length = readLsn(header, 24);
  const size = fstatSync(file).size;
  if (length !== size) throw new Error(`it is ${size} bytes, its header says ${length}`);
  const entryCount = header.readUInt32LE(32);
  const slotCount = header.readUInt32LE(36);
  const namesOffset = readLsn(header, 48);
  const tableEnd = HEADER_BYTES + entryCount * ENTRY_BYTES + slotCount * 4;
  if (tableEnd > namesOffset || namesOffset + entryCount * 4 > length) throw new Error('its parts overlap');
  const table = readAt(file, 0, tableEnd);
  const stored = table.readUInt32LE(CRC_OFFSET);
  table.writeUInt32LE(0, CRC_OFFSET);
  const computed = crc32(table);
  if (stored !== computed) throw new Error(`its checksum is ${stored}, its content's is ${computed}`);

  const names = readAt(file, namesOffset, entryCount * 4);
  const entries: PageMapEntry[] = [];
  for (let number = 0; number < entryCount; number++) {
    const at = HEADER_BYTES + number * ENTRY_BYTES;
    const field = (index: number): number => table.readUInt32LE(at + index * 4);
    const statesOffset = readLsn(table, at + 32);
    const blocks = field(7);
    if (statesOffset + blocks > length) throw new Error(`its entry ${number} is out of bounds`);
    entries.push({
      spc: field(0),
      db: field(1),
      rel: field(2),
      fork: field(3),
      segment: field(4),
      sourceRel: field(5),
      sourceFork: field(6),
      blocks,
      statesOffset,
      gone: names.readUInt32LE(number * 4) === NAME_GONE,
    });
  }
  const timelineId = table.toString('hex', 80, 96);
  return {
    startLsn: readLsn(table, 16),
    timelineId,
    bootId: table.toString('hex', 64, 80),
    filesOnFirstUse: (table.readUInt32LE(FLAGS_OFFSET) & FLAG_FILES_ON_FIRST_USE) !== 0,
    namesOffset,
    entries,
  };
}

/** Whoever was making a file when all ended will make it again. */
function resetNames(file: number, map: PageMap): void {
  const names = readAt(file, map.namesOffset, map.entries.length * 4);
  let changed = false;
  for (let offset = 0; offset < names.length; offset += 4) {
    const name = names.readUInt32LE(offset);
    if (name > NAME_BEING_MADE) throw new Error(`it has a name in state ${name}`);
    if (name !== NAME_BEING_MADE) continue;
    names.writeUInt32LE(NAME_AT_START, offset);
    changed = true;
  }
  if (changed) writeSync(file, names, 0, names.length, map.namesOffset);
}

/** Throws when a state is none of the known ones. All entries' states at once: they fill the rest of the file, with zeroes between them. */
function resetClaims(file: number, map: PageMap): void {
  const end = fstatSync(file).size;
  let offset = map.entries.reduce((lowest, entry) => Math.min(lowest, entry.statesOffset), end);
  for (; offset < end; offset += SCAN_CHUNK_BYTES) {
    const states = readAt(file, offset, Math.min(SCAN_CHUNK_BYTES, end - offset));
    let changed = false;
    for (const claimed of CLAIMED_STATES) {
      for (let at = states.indexOf(claimed); at >= 0; at = states.indexOf(claimed, at)) {
        states[at] = 0;
        changed = true;
      }
    }
    for (let at = 0; at < states.length; at++) {
      if (states[at] !== 0 && states[at] !== STATE_PRESENT) throw new Error(`it has a page in state ${states[at]}`);
    }
    if (changed) writeSync(file, states, 0, states.length, offset);
  }
}

function scanStates(file: number, entry: PageMapEntry, visit: (states: Buffer, fileOffset: number) => void): void {
  for (let done = 0; done < entry.blocks; done += SCAN_CHUNK_BYTES) {
    const offset = entry.statesOffset + done;
    visit(readAt(file, offset, Math.min(SCAN_CHUNK_BYTES, entry.blocks - done)), offset);
  }
}

function readAt(file: number, offset: number, length: number): Buffer {
  const bytes = Buffer.allocUnsafe(length);
  for (let done = 0; done < length;) {
    const count = readSync(file, bytes, done, length - done, offset + done);
    if (count === 0) throw new Error(`it ends at byte ${offset + done}`);
    done += count;
  }
  return bytes;
}
