/**
 * Ingest: takes WAL records, in order, into a timeline's history.
 *
 * For each record: a value for every block it references, then what it implies (implied-changes.ts), then the checkpoint state when it
 * changed, then the WAL index; all under the record's end LSN, made visible at once.
 *
 * How forks end and begin without old pages ever coming back. Truncating or dropping a fork writes its size key only; the values
 * of the blocks that are cut off stay in history, unreachable, because a block at or past the fork's size is zeroes to every reader. When the
 * fork grows again, be it years later under a file number that came back, each block that it grows over gets a value
 * that ends the search in its past: the block that the record is for by initialising it, an image, or a tombstone put first; the blocks
 * skipped on the way (pages that Postgres added and did not log) by a tombstone. So a truncation costs the same whatever its size, and a
 * skipped block one byte and its key. Whoever rewrites layers may drop the values of blocks at or past the size.
 *
 * Invariants:
 * - A record is taken whole or not at all: on an error the timeline forgets its puts, and this object must not be used again.
 * - A relation's size key exists exactly while the fork exists.
 * - A change to a page that does not exist (the visibility map of a relation that has none) is dropped, since an absent page of a map
 *   has no bits to clear; of an SLRU, it makes the page, as those are indexed by ids that exist.
 */

import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { FORK_FSM, FORK_INIT, FORK_MAIN, FORK_VM } from '../../postgres/relation.ts';
import type { RelationKey } from '../../postgres/relation.ts';
import { toPgVersion } from '../../postgres/version.ts';
import type { PgVersion } from '../../postgres/version.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import type { WalBlock, WalRecord } from '../../postgres/wal/record.ts';
import { isPlainCommit, plainCommitTimeUs } from '../../postgres/xact-record.ts';
import { CHECKPOINT_STATE_KEY, KEY_KIND, relationBlockKey } from '../key.ts';
import type { Key } from '../key.ts';
import { clearVisibilityChanges, truncateFreeSpace, truncateVisibility } from '../redo/derived.ts';
import type { DerivedChange } from '../redo/derived.ts';
import { applyRecord } from '../redo/redo.ts';
import type { TimelineWriter } from '../timeline-access.ts';
import { RECORD_HEADER_BYTES, encodeDerived, encodeImage, encodeTombstone } from '../value.ts';
import type { Change } from './change.ts';
import { CheckpointTracker, decodeCheckpointState, encodeCheckpointState } from './checkpoint-state.ts';
import { isFileCopy } from './database.ts';
import { copyDatabase, createDatabase, dropDatabase, prepareCopy, putRelationMap } from './databases.ts';
import type { PreparedCopy, PrepareOptions } from './databases.ts';
import { ForkSizes } from './fork-sizes.ts';
import { impliedChanges } from './implied-changes.ts';
import { IngestError } from './ingest-error.ts';
import { SlruStore } from './slru-store.ts';
import { PreparedTransactions } from './prepared.ts';
import { WalIndexWriter } from './wal-index-writer.ts';
import type { WalIndexChunk } from './wal-index.ts';

const TOMBSTONE = encodeTombstone();

export class Ingest {
  readonly #writer: TimelineWriter;
  readonly #version: PgVersion;
  readonly #sizes: ForkSizes;
  readonly #slrus: SlruStore;
  readonly #prepared: PreparedTransactions;
  readonly #checkpoint: CheckpointTracker;
  readonly #index: WalIndexWriter;
  #copy: PreparedCopy | undefined;
  #usable = true;

  /** `writer` is a timeline that has a checkpoint state: an imported one, or a branch of one. */
  constructor(writer: TimelineWriter) {
    const state = writer.get(CHECKPOINT_STATE_KEY);
    if (state === undefined) throw new Error('a timeline without checkpoint state cannot take WAL');
    this.#writer = writer;
    this.#version = toPgVersion(writer.pgVersion);
    this.#sizes = new ForkSizes(writer);
    this.#slrus = new SlruStore(writer);
    this.#prepared = new PreparedTransactions(writer);
    this.#checkpoint = new CheckpointTracker(decodeCheckpointState(state));
    // Another Ingest of the same timeline, before this one, may hold the end of the index in memory.
    writer.beforeFlush?.();
    this.#index = new WalIndexWriter(writer);
    writer.beforeFlush = () => this.#index.flush();
    writer.indexTail = () => this.#index.tail;
  }

  /** The part of the WAL index that is not in the timeline yet, for searches at its head. To be used at once: it changes with the next record. */
  get indexTail(): WalIndexChunk | undefined {
    return this.#index.tail;
  }

  /**
   * What has to be done before `ingest` takes the record, and takes long; undefined for nearly all records. When it rejects, nothing is changed: it can
   * be called again.
   */
  prepare(record: WalRecord, options: PrepareOptions = {}): Promise<void> | undefined {
    return isFileCopy(record) ? this.#prepareCopies(record, options) : undefined;
  }

  async #prepareCopies(record: WalRecord, options: PrepareOptions): Promise<void> {
    for (const change of impliedChanges(record, this.#version)) {
      if (change.kind === 'copy-database') this.#copy = await prepareCopy(this.#writer, change, record.endLsn, options);
    }
  }

  /**
   * Takes the record that follows the last one taken. Throws IngestError, or what the timeline throws; the record has left no
   * trace then, and a new Ingest is needed to go on.
   */
  ingest(record: WalRecord): void {
    if (!this.#usable)
      throw new Error('an earlier record could not be taken: this Ingest no longer knows what the timeline has');
    this.#usable = false;
    try {
      this.#take(record);
    } catch (error) {
      this.#writer.discard();
      throw error;
    }
    this.#writer.advance(record.endLsn, record.startLsn);
    this.#usable = true;
  }

  #take(record: WalRecord): void {
    const { blocks, endLsn } = record;
    for (let i = 0; i < blocks.length; i++) this.#takeBlock(record, blocks[i]!);
    if (record.xid !== 0) this.#checkpoint.sawXid(record.xid);
    const commitTimeUs = isPlainCommit(record) ? this.#takePlainCommit(record) : this.#takeChanges(record);
    if (this.#checkpoint.changed) {
      this.#writer.put(CHECKPOINT_STATE_KEY, endLsn, encodeImage(encodeCheckpointState(this.#checkpoint.state)));
      this.#checkpoint.changed = false;
    }
    this.#index.append(record.startLsn, endLsn, commitTimeUs);
  }

  /** A commit of one transaction that says nothing but its time, which is returned: most of them. */
  #takePlainCommit(record: WalRecord): number {
    const { xid, originId, endLsn } = record;
    const timeUs = plainCommitTimeUs(record);
    if (this.#checkpoint.trackCommitTimestamp) this.#slrus.setCommitTimestamps(timeUs, originId, [xid], endLsn);
    this.#slrus.setCommitted(xid, endLsn);
    return timeUs;
  }

  /** What the record implies. The time when it is a commit. */
  #takeChanges(record: WalRecord): number | undefined {
    const changes = impliedChanges(record, this.#version);
    let commitTimeUs: number | undefined;
    for (let i = 0; i < changes.length; i++) {
      const change = changes[i]!;
      if (change.kind === 'commit') commitTimeUs = change.timeUs;
      else this.#apply(change, record);
    }
    return commitTimeUs;
  }

  #takeBlock(record: WalRecord, block: WalBlock): void {
    const { endLsn } = record;
    const { spc, db, rel, fork, blk } = block;
    const restores = block.hasImage && block.applyImage;
    const initialises = block.willInit || restores;
    const size = this.#sizes.get(spc, db, rel, fork) ?? -1;
    if (blk >= size) {
      for (let skipped = Math.max(size, 0); skipped < blk; skipped++) {
        this.#writer.put(relationBlockKey(spc, db, rel, fork, skipped), endLsn, TOMBSTONE);
      }
      if (!initialises) this.#writer.put(relationBlockKey(spc, db, rel, fork, blk), endLsn, TOMBSTONE);
      this.#sizes.set(spc, db, rel, fork, blk + 1, endLsn);
    }
    // Records with many images would be stored once for each of them, whole; the image alone is smaller.
    if (restores && record.totalLength + RECORD_HEADER_BYTES > BLOCK_SIZE) {
      this.#writer.put(relationBlockKey(spc, db, rel, fork, blk), endLsn, encodeImage(this.#restore(record, block)));
    } else {
      this.#writer.putRecord(record, block, initialises);
    }
  }

  #apply(change: Exclude<Change, { kind: 'commit' }>, record: WalRecord): void {
    const lsn = record.endLsn;
    const checkpoint = this.#checkpoint;
    switch (change.kind) {
      case 'clear-visibility':
        for (const clear of clearVisibilityChanges(change.clears))
          this.#changeMap(change.relation, FORK_VM, clear, lsn);
        return;
      case 'create-fork': {
        const { spc, db, rel, fork } = change.fork;
        if (this.#sizes.get(spc, db, rel, fork) === undefined) this.#sizes.set(spc, db, rel, fork, 0, lsn);
        return;
      }
      case 'truncate-relation':
        return this.#truncate(change, lsn);
      case 'drop-relation':
        for (let fork = FORK_MAIN; fork <= FORK_INIT; fork++) {
          this.#sizes.remove(change.relation.spc, change.relation.db, change.relation.rel, fork, lsn);
        }
        return;
      case 'create-database':
        return createDatabase(this.#writer, change.spc, change.db, lsn);
      case 'copy-database':
        if (this.#copy?.endLsn !== lsn) throw new Error('a record that copies a database is prepared first');
        return copyDatabase(this.#writer, this.#sizes, change, this.#copy);
      case 'drop-database':
        return dropDatabase(this.#writer, this.#sizes, change.spc, change.db, lsn);
      case 'relation-map':
        return putRelationMap(this.#writer, change.spc, change.db, change.map, lsn);
      case 'zero-slru-page':
        return this.#slrus.zeroPage(change.slru, change.page, lsn);
      case 'change-slru-page':
        return this.#slrus.change(change.slru, change.change, lsn);
      case 'truncate-slru':
        return this.#slrus.truncate(change.slru, change.cutoffPage, lsn);
      case 'drop-slru-segment':
        return this.#slrus.dropSegment(change.slru, change.segment, lsn);
      case 'prepare':
        return this.#prepared.add(change.xid, change.file, checkpoint.nextXid, lsn);
      case 'forget-prepared':
        return this.#prepared.remove(change.xid, checkpoint.nextXid, lsn);
      case 'commit-timestamps':
        if (!checkpoint.trackCommitTimestamp) return;
        return this.#slrus.setCommitTimestamps(change.timeUs, change.origin, change.xids, lsn);
      case 'xids':
        for (const xid of change.xids) checkpoint.sawXid(xid);
        return;
      case 'next-oid':
        return checkpoint.setNextOid(change.nextOid);
      case 'next-multixact':
        return checkpoint.sawMultixact(change.multi, change.offset);
      case 'oldest-xid':
        return checkpoint.advanceOldestXid(change.xid, change.db);
      case 'oldest-multixact':
        return checkpoint.advanceOldestMultixact(change.multi, change.db);
      case 'oldest-commit-timestamp':
        return checkpoint.advanceOldestCommitTs(change.xid);
      case 'oldest-active-xid':
        return checkpoint.setOldestActiveXid(change.xid);
      case 'wal-level':
        return checkpoint.setWalLevel(change.walLevel);
      case 'full-page-writes':
        return checkpoint.setFullPageWrites(change.on);
      case 'parameters': {
        const tracked = checkpoint.trackCommitTimestamp;
        checkpoint.setParameters(change.parameters);
        if (tracked && !checkpoint.trackCommitTimestamp) this.#slrus.dropCommitTimestamps(lsn);
        if (checkpoint.trackCommitTimestamp) this.#slrus.beginCommitTimestamps(checkpoint.nextXid, lsn);
        return;
      }
      case 'checkpoint':
        return checkpoint.setCheckpoint(change.checkPoint, change.shutdown, record.startLsn, lsn);
      default:
        throw new IngestError(record, `change ${(change satisfies never as Change).kind} is not known`);
    }
  }

  #truncate(change: Extract<Change, { kind: 'truncate-relation' }>, lsn: Lsn): void {
    const { spc, db, rel } = change.relation;
    if (change.main) {
      const size = this.#sizes.get(spc, db, rel, FORK_MAIN);
      if (size === undefined || size > change.blocks)
        this.#sizes.set(spc, db, rel, FORK_MAIN, size === undefined ? 0 : change.blocks, lsn);
    }
    if (change.freeSpace) this.#truncateMap(change.relation, FORK_FSM, truncateFreeSpace(change.blocks), lsn);
    if (change.visibility) this.#truncateMap(change.relation, FORK_VM, truncateVisibility(change.blocks), lsn);
  }

  #truncateMap(
    relation: RelationKey,
    fork: number,
    end: { mapBlocks: number; change: DerivedChange | undefined },
    lsn: Lsn,
  ): void {
    const size = this.#sizes.get(relation.spc, relation.db, relation.rel, fork);
    if (size === undefined) return;
    if (end.change !== undefined) this.#changeMap(relation, fork, end.change, lsn);
    if (size > end.mapBlocks) this.#sizes.set(relation.spc, relation.db, relation.rel, fork, end.mapBlocks, lsn);
  }

  /** A change to a page of a map fork, if the fork has the page. */
  #changeMap(relation: RelationKey, fork: number, change: DerivedChange, lsn: Lsn): void {
    const { spc, db, rel } = relation;
    const size = this.#sizes.get(spc, db, rel, fork);
    if (size === undefined || change.page >= size) return;
    const key: Key = { kind: KEY_KIND.relationBlock, spc, db, rel, fork, blk: change.page };
    this.#writer.put(key, lsn, encodeDerived(change.subtype, change.payload));
  }

  /** The page after a record that restores it from an image. */
  #restore(record: WalRecord, block: WalBlock): Buffer {
    const page = Buffer.alloc(BLOCK_SIZE);
    applyRecord(page, record, block.id, this.#version);
    return page;
  }
}
