/**
 * How much of a timeline's log this safekeeper keeps: what is offloaded, what storage has made pages of, who reads here, and the removal of what
 * nobody needs from this disk. What is read from further back comes from the object store (wal-cursor.ts).
 *
 * Invariants:
 *   - A segment is removed only when all of it is in the object store, and the pageserver's pages of it are too, so that no loss of one disk makes us need it.
 *   - It lies below the commit LSN as the control file has it, from where a start looks for the end of the log.
 *   - The extent file says that it is gone before it is.
 */
import { unlink } from 'node:fs/promises';
import { type Lsn, segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import type { PageserverFeedback } from '../api/safekeeper-protocol.ts';
import { syncDirectory } from '../base/durable-file.ts';
import { type WalExtent, writeWalExtent } from './wal-extent.ts';
import { segmentPath } from './wal-store.ts';

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
  #saving: Promise<void> = Promise.resolve();
  #feedback: PageserverFeedback | undefined;

  /** `onLetGo` is called when a reader holds nothing here any more. */
  constructor(directory: string, extent: WalExtent, onLetGo: () => void) {
    this.#directory = directory;
    this.#extent = extent;
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
    const saved = this.#saving.catch(() => {}).then(async () => writeWalExtent(this.#directory, this.#extent));
    this.#saving = saved;
    return saved;
  }

  /** Removes the segments before `horizonLsn`, a segment's start. */
  async remove(horizonLsn: Lsn): Promise<number> {
    const { localStartLsn } = this.#extent;
    if (horizonLsn <= localStartLsn) return 0;
    this.#extent = { ...this.#extent, localStartLsn: horizonLsn };
    await this.save();
    let count = 0;
    for (let lsn = segmentStart(localStartLsn); lsn < horizonLsn; lsn += WAL_SEGMENT_SIZE) {
      const removed = await unlink(segmentPath(this.#directory, lsn)).then(
        () => true,
        (error: NodeJS.ErrnoException) => {
          if (error.code === 'ENOENT') return false;
          throw error;
        },
      );
      if (removed) count++;
    }
    await syncDirectory(this.#directory);
    return count;
  }

  /** Removes what a crash left behind below the extent. */
  async removeLeftovers(segmentStarts: readonly Lsn[]): Promise<void> {
    const old = segmentStarts.filter((start) => start + WAL_SEGMENT_SIZE <= this.#extent.localStartLsn);
    for (const start of old) await unlink(segmentPath(this.#directory, start));
  }
}
