/**
 * Verification of redo against Postgres itself.
 *
 * WAL that was written with wal_consistency_checking = all carries, for every block that a record changes, the page as it was on the
 * primary after the change. Here each record is replayed with our redo on pages kept from record to record, and every page is compared
 * with its image, under the masks that Postgres uses when a standby does the same (verifyBackupPageConsistency in xlogrecovery.c). No
 * data directory is needed:
 *
 * - an image that is to be applied restores its page, and there is nothing to compare;
 * - a page that is met first by a record that needs it, without such an image, takes the expected image: it is counted as trusted;
 * - where a page differs, or redo fails, the difference is counted and the page takes the expected image, so that one fault is counted
 *   once.
 *
 * Beyond Postgres' own check, which masks them wholly:
 *
 * - bits of visibility-map pages are compared with the images of those pages. A bit that we have and the image has not may be cleared
 *   by a record that comes a little later, as the primary clears the bit before it writes that record; it is a fault only if none does.
 *   A bit that the image has and we have not is a fault at once.
 *   CREATE DATABASE by WAL logs pages of maps as if they had a hole, which is where their bits are, so that every replay loses them: such a
 *   page is not known until its next image, which it takes on trust.
 * - PD_ALL_VISIBLE of heap pages, which decides whether the map's bits are ever cleared again.
 *
 * Records that redo refuses, because only the extension that wrote them knows what they mean or because Strata has no tablespaces, are
 * counted apart. Images that are to be applied are restored all the same.
 *
 * WAL is read in bounded memory; pages beyond `memoryPages` wait in a file.
 */

import { setImmediate } from 'node:timers/promises';

import { PD_ALL_VISIBLE, pageFlags, pageIsNew, setPageLsn } from '../postgres/page.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { FORK_MAIN, FORK_VM } from '../postgres/relation.ts';
import type { RelationKey } from '../postgres/relation.ts';
import { RM_HEAP, RM_HEAP2, RM_MIN_CUSTOM, RM_TBLSPC, rmgrName } from '../postgres/rmgr.ts';
import type { Lsn } from '../postgres/lsn.ts';
import type { PgVersion } from '../postgres/version.ts';
import { WalError } from '../postgres/wal/error.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import type { WalBlock, WalRecord } from '../postgres/wal/record.ts';
import type { Change } from './ingest/change.ts';
import { NO_CHANGES } from './ingest/change.ts';
import { impliedChanges } from './ingest/implied-changes.ts';
import { IngestError } from './ingest/ingest-error.ts';
import {
  HEAP_BLOCKS_PER_VISIBILITY_PAGE,
  applyDerived,
  clearVisibilityChanges,
  truncateVisibility,
} from './redo/derived.ts';
import type { DerivedChange } from './redo/derived.ts';
import { restoreImage } from './redo/image.ts';
import { MaskError } from './redo/masks.ts';
import { recordTypeName } from './redo/record-type.ts';
import { RedoError } from './redo/redo-error.ts';
import { applyRecord, maskPage, needsPriorPage } from './redo/redo.ts';
import { findWalAfter } from './wal-after.ts';
import type { WalChunk, WalSource } from './wal-directory.ts';
import { VerifyPages } from './wal-verify-pages.ts';
import { addType, type Mismatch, newType, type TypeReport, type VerifyReport } from './wal-verify-report.ts';

const DEFAULT_MEMORY_PAGES = 32_768;
const DIFFERENCE_BYTES = 16;
const PAGE_HEADER_SIZE = 24;

export interface VerifyOptions {
  /** Stop at the first record that ends after this. */
  readonly endLsn?: Lsn;
  /** Pages kept in memory (8 KiB each). */
  readonly memoryPages?: number;
  /** Called now and then, and at the end. */
  readonly onProgress?: (progress: VerifyProgress) => void;
  /** Called at the end with the pages as replay left them. */
  readonly onPages?: (pages: VerifyPages) => void;
  readonly signal?: AbortSignal;
}

export interface VerifyProgress {
  readonly lsn: Lsn;
  readonly startLsn: Lsn;
  readonly endLsn: Lsn;
  readonly records: number;
  readonly mismatches: number;
}

/** Replays and compares all records of the source. Throws what reading the source throws; differences are in the report. */
export async function verifyWal(source: WalSource, options: VerifyOptions = {}): Promise<VerifyReport> {
  const verifier = new Verifier(source, options);
  try {
    return await verifier.run();
  } finally {
    verifier.close();
  }
}

class Verifier {
  readonly #source: WalSource;
  readonly #options: VerifyOptions;
  readonly #version: PgVersion;
  readonly #pages: VerifyPages;
  readonly #types = new Map<number, TypeReport>();
  /** Relations whose creation is in this WAL: their pages that were never met are all zeros. */
  readonly #created = new Set<string>();
  /** Visibility-map pages whose last image left out their bits. */
  readonly #mapsWithoutBits = new Set<string>();
  /** Visibility-map bits that await a record that clears them: relation and heap block, the record that lacked them. */
  readonly #pendingClears = new Map<string, { type: TypeReport; mismatch: Mismatch }>();
  readonly #replayed = Buffer.alloc(BLOCK_SIZE);
  readonly #expected = Buffer.alloc(BLOCK_SIZE);
  /** End of the last record verified. */
  #endLsn: Lsn;
  #records = 0;
  #mismatches = 0;

  constructor(source: WalSource, options: VerifyOptions) {
    this.#source = source;
    this.#options = options;
    this.#version = source.version;
    this.#endLsn = source.startLsn;
    this.#pages = new VerifyPages(options.memoryPages ?? DEFAULT_MEMORY_PAGES);
  }

  close(): void {
    this.#pages.close();
  }

  async run(): Promise<VerifyReport> {
    const reader = new WalReader(this.#source.startLsn, this.#version, { anyTimeline: true });
    const limit = this.#options.endLsn ?? Infinity;
    let stoppedBy: WalError | undefined;
    let isLimited = false;
    let resumesAtLsn: Lsn | undefined;
    for await (const chunk of this.#source.chunks) {
      this.#options.signal?.throwIfAborted();
      if (stoppedBy === undefined) {
        try {
          isLimited = !this.#verifyChunk(reader, chunk, limit);
        } catch (error) {
          if (!(error instanceof WalError)) throw error;
          stoppedBy = error;
        }
        this.#progress();
      }
      if (isLimited) break;
      if (stoppedBy !== undefined) {
        resumesAtLsn = findWalAfter(
          { goodUntil: reader.position, errorLsn: stoppedBy.lsn },
          chunk.lsn,
          chunk.bytes,
          this.#version,
        );
        if (resumesAtLsn !== undefined) break;
      }
      await setImmediate();
    }
    // Without an error, nothing but a missing segment keeps the stream from going on.
    if (!isLimited) resumesAtLsn ??= this.#source.resumesAtLsn;
    this.#settlePendingClears();
    this.#progress();
    this.#options.onPages?.(this.#pages);
    return this.#report(stoppedBy?.message, resumesAtLsn);
  }

  /** False when the LSN is reached at which verification is to end. */
  #verifyChunk(reader: WalReader, chunk: WalChunk, limit: Lsn): boolean {
    reader.push(chunk.lsn, chunk.bytes);
    for (let record = reader.next(); record !== undefined; record = reader.next()) {
      if (record.endLsn > limit) return false;
      this.#verifyRecord(record);
    }
    return true;
  }

  #verifyRecord(record: WalRecord): void {
    this.#records++;
    const type = this.#typeOf(record);
    type.records++;
    for (const change of this.#changesOf(record, type)) this.#applyChange(change);
    for (const block of record.blocks) this.#verifyBlock(record, block, type);
    this.#endLsn = record.endLsn;
  }

  #verifyBlock(record: WalRecord, block: WalBlock, type: TypeReport): void {
    const fork = forkName(block, block.fork);
    let page = this.#pages.get(fork, block.blk);
    if (page === undefined) {
      page = Buffer.alloc(BLOCK_SIZE);
      const isKnown = this.#created.has(relationName(block)) && !this.#mapsWithoutBits.has(`${fork}/${block.blk}`);
      if (needsPriorPage(record, block.id) && !isKnown) {
        if (!block.hasImage) {
          type.unchecked++;
          return;
        }
        if (block.fork === FORK_VM) this.#mapsWithoutBits.delete(`${fork}/${block.blk}`);
        restoreImage(page, record, block);
        if (!pageIsNew(page)) setPageLsn(page, record.endLsn);
        this.#pages.set(fork, block.blk, page);
        type.trusted++;
        return;
      }
      this.#pages.set(fork, block.blk, page);
    }
    try {
      applyRecord(page, record, block.id, this.#version);
    } catch (error) {
      if (!(error instanceof RedoError)) throw error;
      // The record itself is counted as refused.
      if (!isRefused(record)) this.#mismatch(type, { ...placeOf(record, block), reason: error.message });
      this.#takeExpected(record, block, fork, page);
      return;
    }
    if (!block.hasImage) type.unchecked++;
    else if (block.applyImage) {
      type.restored++;
      if (block.fork === FORK_VM && block.holeLength > 0) this.#forgetMap(fork, block.blk);
    } else this.#compare(record, block, type, fork, page);
  }

  #compare(record: WalRecord, block: WalBlock, type: TypeReport, fork: string, page: Buffer): void {
    type.compared++;
    const { blk } = block;
    page.copy(this.#replayed);
    restoreImage(this.#expected, record, block);
    const reason =
      this.#compareVisibilityBits(record, block, type) ??
      (block.fork === FORK_MAIN && (record.rmid === RM_HEAP || record.rmid === RM_HEAP2)
        ? compareAllVisible(this.#replayed, this.#expected)
        : undefined);
    if (reason === undefined && this.#replayed.equals(this.#expected)) return;
    const masked = maskBoth(this.#replayed, this.#expected, record.rmid, blk, this.#version);
    if (reason === undefined && masked === undefined && this.#replayed.equals(this.#expected)) return;
    this.#mismatch(type, {
      ...placeOf(record, block),
      reason: reason ?? masked ?? 'the page differs',
      ...difference(this.#replayed, this.#expected),
    });
    this.#takeExpected(record, block, fork, page);
  }

  /** Compares the bits of a visibility-map page with its image, both as they are before masking. */
  #compareVisibilityBits(record: WalRecord, block: WalBlock, type: TypeReport): string | undefined {
    if (block.fork !== FORK_VM) return undefined;
    let lost: string | undefined;
    for (let at = PAGE_HEADER_SIZE; at < BLOCK_SIZE; at++) {
      const ours = this.#replayed[at]!;
      const theirs = this.#expected[at]!;
      if (ours === theirs) continue;
      for (let slot = 0; slot < 4; slot++) {
        const have = (ours >> (slot * 2)) & 3;
        const want = (theirs >> (slot * 2)) & 3;
        if (have === want) continue;
        const heapBlock = block.blk * HEAP_BLOCKS_PER_VISIBILITY_PAGE + (at - PAGE_HEADER_SIZE) * 4 + slot;
        const what = `visibility of heap block ${heapBlock} is ${have}, the primary had ${want}`;
        if ((want & ~have) !== 0) lost ??= what;
        else this.#awaitClear(block, heapBlock, type, { ...placeOf(record, block), reason: what, offset: at });
      }
    }
    return lost;
  }

  #awaitClear(relation: RelationKey, heapBlock: number, type: TypeReport, mismatch: Mismatch): void {
    const key = `${relationName(relation)}/${heapBlock}`;
    if (!this.#pendingClears.has(key)) this.#pendingClears.set(key, { type, mismatch });
  }

  #settlePendingClears(): void {
    for (const { type, mismatch } of this.#pendingClears.values()) this.#mismatch(type, mismatch);
  }

  #takeExpected(record: WalRecord, block: WalBlock, fork: string, page: Buffer): void {
    if (!block.hasImage) {
      this.#pages.delete(fork, block.blk);
      return;
    }
    restoreImage(page, record, block);
    if (!pageIsNew(page)) setPageLsn(page, record.endLsn);
  }

  #changesOf(record: WalRecord, type: TypeReport): readonly Change[] {
    try {
      return impliedChanges(record, this.#version);
    } catch (error) {
      if (!(error instanceof IngestError)) throw error;
      if (isRefused(record)) type.refused++;
      else this.#mismatch(type, { lsn: record.startLsn, reason: error.message });
      return NO_CHANGES;
    }
  }

  #applyChange(change: Change): void {
    switch (change.kind) {
      case 'clear-visibility':
        for (const { heapBlock } of change.clears) {
          if (this.#pendingClears.size > 0) this.#pendingClears.delete(`${relationName(change.relation)}/${heapBlock}`);
        }
        for (const derived of clearVisibilityChanges(change.clears)) this.#applyDerived(change.relation, derived);
        return;
      case 'create-fork':
        this.#dropFork(change.fork, change.fork.fork);
        if (change.fork.fork === FORK_MAIN) this.#created.add(relationName(change.fork));
        return;
      case 'truncate-relation':
        this.#truncate(change.relation, change);
        return;
      case 'drop-relation':
        for (let fork = FORK_MAIN; fork <= 3; fork++) this.#dropFork(change.relation, fork);
        this.#created.delete(relationName(change.relation));
        this.#forgetPendingClears(`${relationName(change.relation)}/`);
        deleteByPrefix(this.#mapsWithoutBits, `${relationName(change.relation)}/`);
        return;
      case 'copy-database':
      case 'drop-database':
        this.#pages.drop(`${change.spc}/${change.db}/`);
        for (const names of [this.#created, this.#mapsWithoutBits])
          deleteByPrefix(names, `${change.spc}/${change.db}/`);
        this.#forgetPendingClears(`${change.spc}/${change.db}/`);
        return;
    }
  }

  #truncate(relation: RelationKey, change: { blocks: number; main: boolean; visibility: boolean }): void {
    if (change.main) this.#pages.truncate(forkName(relation, FORK_MAIN), change.blocks);
    if (!change.visibility) return;
    const { mapBlocks, change: derived } = truncateVisibility(change.blocks);
    this.#pages.truncate(forkName(relation, FORK_VM), mapBlocks);
    if (derived !== undefined) this.#applyDerived(relation, derived);
    this.#forgetPendingClears(`${relationName(relation)}/`);
  }

  /** A map page that is not known stays so. */
  #applyDerived(relation: RelationKey, change: DerivedChange): void {
    const page = this.#pages.get(forkName(relation, FORK_VM), change.page);
    if (page !== undefined) applyDerived(page, change.subtype, change.payload);
  }

  #forgetMap(fork: string, blk: number): void {
    this.#pages.delete(fork, blk);
    this.#mapsWithoutBits.add(`${fork}/${blk}`);
  }

  #dropFork(relation: RelationKey, fork: number): void {
    this.#pages.truncate(forkName(relation, fork), 0);
  }

  #forgetPendingClears(prefix: string): void {
    deleteByPrefix(this.#pendingClears, prefix);
  }

  #mismatch(type: TypeReport, mismatch: Mismatch): void {
    type.mismatches++;
    this.#mismatches++;
    type.firstMismatch ??= mismatch;
  }

  #typeOf(record: WalRecord): TypeReport {
    const key = (record.rmid << 8) | (record.info & 0xf0);
    let type = this.#types.get(key);
    if (type === undefined) {
      type = newType(rmgrName(record.rmid), recordTypeName(record, this.#version));
      this.#types.set(key, type);
    }
    return type;
  }

  #progress(): void {
    const { startLsn, endLsn } = this.#source;
    this.#options.onProgress?.({
      lsn: this.#endLsn,
      startLsn,
      endLsn,
      records: this.#records,
      mismatches: this.#mismatches,
    });
  }

  #report(stoppedBy: string | undefined, resumesAtLsn: Lsn | undefined): VerifyReport {
    const byName = new Map<string, TypeReport>();
    for (const type of this.#types.values()) {
      const name = `${type.rmgr}/${type.type}`;
      const same = byName.get(name);
      if (same === undefined) byName.set(name, { ...type });
      else addType(same, type);
    }
    const types = [...byName.values()];
    const total = newType('', '');
    for (const type of types) addType(total, type);
    return {
      version: this.#version,
      startLsn: this.#source.startLsn,
      endLsn: this.#endLsn,
      stoppedBy,
      resumesAtLsn,
      records: this.#records,
      compared: total.compared,
      restored: total.restored,
      trusted: total.trusted,
      unchecked: total.unchecked,
      refused: total.refused,
      mismatches: total.mismatches,
      types,
      visibilityBitsLeft: this.#pendingClears.size,
    };
  }
}

/** What no redo of ours can replay, and what is not a fault of it. */
function isRefused(record: WalRecord): boolean {
  return record.rmid >= RM_MIN_CUSTOM || record.rmid === RM_TBLSPC;
}

function deleteByPrefix(names: Set<string> | Map<string, unknown>, prefix: string): void {
  for (const name of names.keys()) if (name.startsWith(prefix)) names.delete(name);
}

function relationName(relation: RelationKey): string {
  return `${relation.spc}/${relation.db}/${relation.rel}`;
}

function forkName(relation: RelationKey, fork: number): string {
  return `${relation.spc}/${relation.db}/${relation.rel}/${fork}`;
}

function placeOf(record: WalRecord, block: WalBlock): Omit<Mismatch, 'reason'> {
  const { id, spc, db, rel, fork, blk } = block;
  return { lsn: record.startLsn, block: { id, spc, db, rel, fork, blk } };
}

function compareAllVisible(replayed: Buffer, expected: Buffer): string | undefined {
  const ours = (pageFlags(replayed) & PD_ALL_VISIBLE) !== 0;
  const theirs = (pageFlags(expected) & PD_ALL_VISIBLE) !== 0;
  return ours === theirs ? undefined : `PD_ALL_VISIBLE is ${ours}, the primary had ${theirs}`;
}

/** Masks both pages; returns why that cannot be done. */
function maskBoth(
  replayed: Buffer,
  expected: Buffer,
  rmid: number,
  blk: number,
  version: PgVersion,
): string | undefined {
  try {
    maskPage(replayed, rmid, blk, version);
    maskPage(expected, rmid, blk, version);
    return undefined;
  } catch (error) {
    if (error instanceof MaskError || error instanceof RangeError) return error.message;
    throw error;
  }
}

function difference(found: Buffer, expected: Buffer): Pick<Mismatch, 'offset' | 'expected' | 'found'> {
  let offset = 0;
  while (offset < BLOCK_SIZE && found[offset] === expected[offset]) offset++;
  if (offset === BLOCK_SIZE) return {};
  const end = offset + DIFFERENCE_BYTES;
  return {
    offset,
    expected: expected.subarray(offset, end).toString('hex'),
    found: found.subarray(offset, end).toString('hex'),
  };
}
