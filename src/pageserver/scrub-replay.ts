/**
 * An independent replay: a sample of a timeline's pages made from its WAL alone, record by record, to compare with what the page store gives.
 *
 * It shares redo with the store, and nothing else: no layers, no index, no merges, no caches. The WAL of a window of the timeline's history is read once. Which
 * pages are sampled is decided by a hash of the seed and the page: those with the lowest hashes of all pages that the WAL changes. A page that belongs to the
 * sample in the end has belonged to it since its first record, so that one pass and the sample's memory are enough. Of each page two states are compared:
 * at the end of the window, and after one of its records that chance picks.
 *
 * A page whose first record in the window makes it anew, or brings an image of it, is replayed from nothing. Others begin with the page as the store has it at the
 * beginning of the window: what came before is taken as given. Sampled are main forks: what maps say is implied by records of other pages. What is no page of a
 * relation has a replay of its own (scrub-files.ts).
 */

import { WalReader } from '../postgres/wal/reader.ts';
import { WalError } from '../postgres/wal/error.ts';
import type { WalBlock, WalRecord } from '../postgres/wal/record.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { FORK_MAIN } from '../postgres/relation.ts';
import type { RelationForkKey } from '../postgres/relation.ts';
import type { Lsn } from '../postgres/lsn.ts';
import type { PgVersion } from '../postgres/version.ts';
import { impliedChanges } from './ingest/implied-changes.ts';
import { applyRecord } from './redo/redo.ts';
import type { WalSource } from './wal-directory.ts';

export interface ReplayedPage {
  readonly fork: RelationForkKey;
  readonly blk: number;
  /** The state after the record that ends there. */
  readonly lsn: Lsn;
  readonly page: Buffer;
  /** Made from nothing but WAL. */
  readonly isFromWalAlone: boolean;
}

export interface ReplayOptions {
  readonly source: WalSource;
  /** Pages. */
  readonly sample: number;
  readonly seed: number;
  /** The page as the store has it at the beginning of the window. */
  readonly readBase: (fork: RelationForkKey, blk: number) => Promise<Buffer>;
  readonly onRecord?: (record: WalRecord) => void;
  readonly onProgress: (lsn: Lsn) => void;
}

export interface Replayed {
  readonly pages: readonly ReplayedPage[];
  /** Sampled pages that could not be replayed, and why. */
  readonly refused: readonly { readonly fork: RelationForkKey; readonly blk: number; readonly reason: string }[];
  /** Where the WAL was left. */
  readonly endLsn: Lsn;
  readonly records: number;
}

interface Sampled {
  readonly fork: RelationForkKey;
  readonly blk: number;
  readonly hash: number;
  page: Buffer;
  isFromWalAlone: boolean;
  changes: number;
  /** Of the page's records, after which a copy was kept. */
  picked: { readonly lsn: Lsn; readonly page: Buffer } | undefined;
  lastLsn: Lsn;
  /** Gone, or no longer known; why. */
  refused: string | undefined;
  isGone: boolean;
}

const COPIED = 'its database was copied, and no record has its pages';

export async function replayPages(options: ReplayOptions): Promise<Replayed> {
  const { source, onRecord, onProgress } = options;
  const replay = new PageReplay(options);
  const reader = new WalReader(source.startLsn, source.version, { anyTimeline: true });
  let endLsn = source.startLsn;
  let records = 0;
  try {
    for await (const { lsn, bytes } of source.chunks) {
      reader.push(lsn, bytes);
      for (let record = reader.next(); record !== undefined; record = reader.next()) {
        if (record.endLsn > source.endLsn) break;
        await replay.take(record);
        onRecord?.(record);
        endLsn = record.endLsn;
        records++;
      }
      onProgress(endLsn);
    }
  } catch (error) {
    // The last record may be half written.
    if (!(error instanceof WalError)) throw error;
  }
  return { ...replay.result(endLsn), endLsn, records };
}

class PageReplay {
  readonly #options: ReplayOptions;
  readonly #version: PgVersion;
  readonly #sampled = new Map<string, Sampled>();
  /** The highest hash in the sample once it is full. */
  #limit = Infinity;
  readonly #random: () => number;
  /** By relation or database, from which block on pages of the beginning are gone; everything, for a database. */
  readonly #cut = new Map<string, number>();
  /** Databases that were copied: their pages are in no record. */
  readonly #copied = new Set<string>();

  constructor(options: ReplayOptions) {
    this.#options = options;
    this.#version = options.source.version;
    this.#random = randomFrom(options.seed);
  }

  async take(record: WalRecord): Promise<void> {
    for (const block of record.blocks) {
      if (block.fork !== FORK_MAIN) continue;
      const sampled = await this.#find(block);
      if (sampled !== undefined) this.#apply(sampled, record, block);
    }
    for (const change of impliedChanges(record, this.#version)) {
      if (change.kind === 'truncate-relation' && change.main) this.#remove(change.relation, change.blocks);
      else if (change.kind === 'drop-relation') this.#remove(change.relation, 0);
      else if (change.kind === 'drop-database') this.#removeDatabase(change.spc, change.db);
      else if (change.kind === 'copy-database') {
        this.#removeDatabase(change.spc, change.db, COPIED);
        this.#copied.add(`${change.spc}/${change.db}`);
      }
    }
  }

  result(endLsn: Lsn): Pick<Replayed, 'pages' | 'refused'> {
    const pages: ReplayedPage[] = [];
    const refused: { fork: RelationForkKey; blk: number; reason: string }[] = [];
    for (const { fork, blk, page, picked, isFromWalAlone, lastLsn, ...state } of this.#sampled.values()) {
      if (state.refused !== undefined) {
        refused.push({ fork, blk, reason: state.refused });
        continue;
      }
      if (picked !== undefined && picked.lsn !== lastLsn) pages.push({ fork, blk, ...picked, isFromWalAlone });
      // Nothing has changed it since its last record.
      pages.push({ fork, blk, lsn: endLsn, page: state.isGone ? Buffer.alloc(BLOCK_SIZE) : page, isFromWalAlone });
    }
    return { pages, refused };
  }

  async #find({ spc, db, rel, fork, blk, ...block }: WalBlock): Promise<Sampled | undefined> {
    const name = `${spc}/${db}/${rel}/${blk}`;
    const known = this.#sampled.get(name);
    if (known !== undefined) return known;
    const hash = hashOf(this.#options.seed, spc, db, rel, blk);
    if (hash >= this.#limit) return undefined;
    const key = { spc, db, rel, fork };
    const isMade = block.willInit || (block.hasImage && block.applyImage);
    const isCut = blk >= (this.#cut.get(`${spc}/${db}/${rel}`) ?? Infinity) || this.#cut.has(`${spc}/${db}`);
    const isCopied = this.#copied.has(`${spc}/${db}`);
    const page = isMade || isCut ? Buffer.alloc(BLOCK_SIZE) : await this.#options.readBase(key, blk);
    const sampled: Sampled = {
      fork: key,
      blk,
      hash,
      page,
      isFromWalAlone: isMade || isCut,
      changes: 0,
      picked: undefined,
      lastLsn: 0,
      refused: isCopied && !isMade ? COPIED : undefined,
      isGone: false,
    };
    this.#sampled.set(name, sampled);
    this.#shrink();
    return sampled;
  }

  #apply(sampled: Sampled, record: WalRecord, block: WalBlock): void {
    if (block.willInit || (block.hasImage && block.applyImage)) {
      sampled.refused = undefined;
    }
    if (sampled.refused !== undefined) return;
    sampled.isGone = false;
    try {
      applyRecord(sampled.page, record, block.id, this.#version);
    } catch (error) {
      sampled.refused = (error as Error).message;
      return;
    }
    sampled.lastLsn = record.endLsn;
    sampled.changes++;
    if (this.#random() * sampled.changes < 1) sampled.picked = { lsn: record.endLsn, page: Buffer.from(sampled.page) };
  }

  #remove({ spc, db, rel }: { spc: number; db: number; rel: number }, blocks: number): void {
    const name = `${spc}/${db}/${rel}`;
    this.#cut.set(name, Math.min(blocks, this.#cut.get(name) ?? Infinity));
    for (const sampled of this.#sampled.values()) {
      const { fork, blk } = sampled;
      if (fork.rel === rel && fork.db === db && fork.spc === spc && blk >= blocks) this.#forget(sampled);
    }
  }

  /** `refused`: why what is there from now on is not known. */
  #removeDatabase(spc: number, db: number, refused?: string): void {
    this.#cut.set(`${spc}/${db}`, 0);
    for (const sampled of this.#sampled.values()) {
      if (sampled.fork.db !== db || sampled.fork.spc !== spc) continue;
      this.#forget(sampled);
      sampled.refused = refused;
    }
  }

  /** The page is gone; should it come again, it begins with zeroes. */
  #forget(sampled: Sampled): void {
    sampled.page = Buffer.alloc(BLOCK_SIZE);
    sampled.isGone = true;
    sampled.refused = undefined;
  }

  #shrink(): void {
    if (this.#sampled.size <= this.#options.sample) return;
    let highest: [string, Sampled] | undefined;
    let limit = 0;
    for (const entry of this.#sampled) {
      if (highest === undefined || entry[1].hash > highest[1].hash) {
        limit = Math.max(limit, highest?.[1].hash ?? 0);
        highest = entry;
      } else limit = Math.max(limit, entry[1].hash);
    }
    this.#sampled.delete(highest![0]);
    this.#limit = limit;
  }
}

/** In [0, 1). */
function hashOf(seed: number, ...parts: number[]): number {
  let hash = seed | 0;
  for (const part of parts) {
    hash = Math.imul(hash ^ (part | 0), 0x85ebca6b);
    hash = Math.imul(hash ^ (hash >>> 15), 0xc2b2ae35);
    hash ^= hash >>> 13;
  }
  return (hash >>> 0) / 2 ** 32;
}

/** The same numbers in [0, 1) for the same seed (mulberry32). */
export function randomFrom(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
