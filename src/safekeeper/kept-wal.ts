/**
 * How much of a timeline's log this safekeeper keeps: what is offloaded, what storage has made pages of, who reads here, and the removal of what
 * nobody needs from this disk. What is read from further back comes from the object store (wal-cursor.ts).
 *
 * Invariants:
 *   - A segment is removed only when all of it is in the object store, and the pageserver's pages of it are too, so that no loss of one disk makes us need it.
 *   - It lies below the commit LSN as the control file has it, from where a start looks for the end of the log.
 *   - The extent file says that it is gone before it is.
 */
import { readdir, unlink } from 'node:fs/promises';
import { join } from 'node:path';
import { type Lsn, parseWalFileName, segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import type { PageserverFeedback } from '../api/safekeeper-protocol.ts';
import { syncDirectory } from '../base/durable-file.ts';
import { type WalExtent, writeWalExtent } from './wal-extent.ts';

export interface RemovalInput {
  readonly localStartLsn: Lsn;
  readonly offloadedLsn: Lsn;
  /** The pageserver's pages of everything below are in the object store. */
  readonly remoteLsn: Lsn;
  /** As the control file has it. */
  readonly savedCommitLsn: Lsn;
  /** Of readers that are connected. */
  readonly readerLsns: readonly Lsn[];
  readonly keptSegments: number;
  /** Readers hold back no more than this. */
  readonly readerBytesMax: number;
}

/** Where the WAL on this disk may begin: a segment's start, or where it begins now. */
export function removalHorizon(input: RemovalInput): Lsn {
  const { localStartLsn, offloadedLsn, remoteLsn, savedCommitLsn, readerLsns, keptSegments, readerBytesMax } = input;
  const readers = readerLsns.filter((lsn) => lsn >= savedCommitLsn - readerBytesMax);
  const neededLsn = Math.min(
    offloadedLsn,
    remoteLsn,
    segmentStart(savedCommitLsn) - keptSegments * WAL_SEGMENT_SIZE,
    ...readers,
  );
  return Math.max(localStartLsn, segmentStart(neededLsn));
}

export class KeptWal {
  readonly #directory: string;
  readonly #onLetGo: () => void;
  readonly #readers = new Set<{ readonly lsn: Lsn }>();
  #extent: WalExtent;
  /** As the file has it. */
  #savedExtent: WalExtent;
  #saving: Promise<void> = Promise.resolve();
  #removing: Promise<unknown> = Promise.resolve();
  /** Nothing below the extent is on the disk: a crash, or a disk that failed, may have left something. */
  #isTidy = false;
  #isClosed = false;
  #feedback: PageserverFeedback | undefined;

  /** `onLetGo` is called when a reader holds nothing here any more. */
  constructor(directory: string, extent: WalExtent, onLetGo: () => void) {
    this.#directory = directory;
    this.#extent = extent;
    this.#savedExtent = extent;
    this.#onLetGo = onLetGo;
  }

  get logStartLsn(): Lsn {
    return this.#extent.logStartLsn;
  }

  /** The first byte that is on this disk. */
  get localStartLsn(): Lsn {
    return this.#extent.localStartLsn;
  }

  get offloadedLsn(): Lsn {
    return this.#extent.offloadedLsn;
  }

  /** What the pageserver told last. */
  get feedback(): PageserverFeedback | undefined {
    return this.#feedback;
  }

  set feedback(told: PageserverFeedback) {
    this.#feedback = told;
  }

  get readerLsns(): readonly Lsn[] {
    return Array.from(this.#readers, ({ lsn }) => lsn);
  }

  /** The reader's position holds WAL here, until the returned function is called. */
  hold(reader: { readonly lsn: Lsn }): () => void {
    this.#readers.add(reader);
    return () => {
      if (this.#readers.delete(reader)) this.#onLetGo();
    };
  }

  /** `[fromLsn, endLsn)` was seen in the object store; written down by the next `save`. Means nothing when what is before was not. */
  offloaded(fromLsn: Lsn, endLsn: Lsn): void {
    const { offloadedLsn } = this.#extent;
    if (fromLsn <= offloadedLsn && endLsn > offloadedLsn) this.#extent = { ...this.#extent, offloadedLsn: endLsn };
  }

  /** Nothing of what is on this disk counts as seen in the object store any more. */
  forgetOffloaded(): void {
    this.#extent = { ...this.#extent, offloadedLsn: Math.max(this.#extent.logStartLsn, this.#extent.localStartLsn) };
  }

  /** Durable when it resolves. */
  save(): Promise<void> {
    const saved = this.#saving.catch(() => {}).then(() => this.#write());
    this.#saving = saved;
    return saved;
  }

  /** Removes the segments before `horizonLsn`, a segment's start. */
  remove(horizonLsn: Lsn): Promise<number> {
    const removed = this.#removing.catch(() => {}).then(() => this.#remove(horizonLsn));
    this.#removing = removed;
    return removed;
  }

  /** When it resolves, nothing is written or removed in the folder any more: it is another log's from then on. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await Promise.allSettled([this.#saving, this.#removing]);
  }

  async #write(): Promise<void> {
    if (this.#isClosed) return;
    const extent = this.#extent;
    await writeWalExtent(this.#directory, extent);
    this.#savedExtent = extent;
  }

  async #remove(horizonLsn: Lsn): Promise<number> {
    if (horizonLsn > this.#extent.localStartLsn) this.#extent = { ...this.#extent, localStartLsn: horizonLsn };
    else if (this.#isTidy) return 0;
    this.#isTidy = false;
    const { localStartLsn } = this.#extent;
    if (localStartLsn !== this.#savedExtent.localStartLsn) await this.save();
    let count = 0;
    for (const name of await readdir(this.#directory)) {
      const segment = parseWalFileName(name);
      if (segment === undefined || segment.startLsn + WAL_SEGMENT_SIZE > localStartLsn) continue;
      if (this.#isClosed) return count;
      await unlink(join(this.#directory, name));
      count++;
    }
    if (count > 0) await syncDirectory(this.#directory);
    this.#isTidy = true;
    return count;
  }
}
