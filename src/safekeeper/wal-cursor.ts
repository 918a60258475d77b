/**
 * One reader's place in a timeline's WAL: what is there from its position on, then what comes. What it is framed in, and for whom, is the
 * caller's: wal-stream.ts for our own readers, replication.ts for Postgres' own.
 *
 * Readers get what is committed, never more. The leader's recovery of another safekeeper names its term and gets what is flushed here, as long as
 * this log is that leader's; the term is looked at again after each read, as a new leader may have cut the log meanwhile.
 *
 * WAL that is not on this disk any more is read from the object store. A cursor holds what it is about to read on the disk (kept-wal.ts).
 */
import { StrataError } from '../base/errors.ts';
import { formatLsn, type Lsn, segmentOffset, segmentStart, WAL_PAGE_SIZE } from '../postgres/lsn.ts';
import { toPgVersion } from '../postgres/version.ts';
import { WalBoundaryTracker } from '../postgres/wal/boundary-tracker.ts';
import { WalError } from '../postgres/wal/error.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import type { Timeline } from './timeline.ts';
import { firstSegmentHead, WalFileReader } from './wal-store.ts';

export interface WalCursorOptions {
  readonly timeline: Timeline;
  readonly fromLsn: Lsn;
  /** Ends what waits. */
  readonly signal: AbortSignal;
  readonly term?: number | undefined;
  readonly isRebuild?: boolean | undefined;
}

export class WalCursor {
  readonly #timeline: Timeline;
  readonly #term: number | undefined;
  readonly #isRebuild: boolean;
  readonly #signal: AbortSignal;
  readonly #files: WalFileReader;
  readonly #stopListening: () => void;
  readonly #letGo: () => void;
  readonly #poke = (): void => {
    if (this.#isEnough === undefined || this.#isEnough()) this.#wake?.();
  };
  readonly #onAbort = (): void => this.#wake?.();
  #lsn: Lsn;
  #wake: (() => void) | undefined;
  #isEnough: (() => boolean) | undefined;

  constructor(options: WalCursorOptions) {
    const { timeline, fromLsn, signal, term, isRebuild } = options;
    this.#timeline = timeline;
    this.#term = term;
    this.#isRebuild = isRebuild ?? false;
    this.#signal = signal;
    this.#lsn = fromLsn;
    this.#files = new WalFileReader(timeline.directory);
    this.#stopListening = timeline.listen(this.#poke);
    this.#letGo = timeline.kept.hold(this);
    signal.addEventListener('abort', this.#onAbort, { once: true });
  }

  /** Where the next bytes begin. */
  get lsn(): Lsn {
    return this.#lsn;
  }

  /** The next bytes, within one segment; undefined when there are none yet. Throws when this log cannot be read any more. */
  async read(maxBytes: number): Promise<Buffer | undefined> {
    const endLsn = this.#readableEnd();
    if (this.#lsn >= endLsn) return undefined;
    const bytes = await this.#fetch(Math.min(endLsn, this.#lsn + maxBytes));
    this.#readableEnd();
    this.#lsn += bytes.length;
    return bytes;
  }

  /** Resolves when the timeline has moved or `poke` was called, and that is enough; when the signal aborted; or the time is over. */
  async arrival(timeoutMs?: number, isEnough?: () => boolean): Promise<void> {
    if (this.#signal.aborted) return;
    let timer: NodeJS.Timeout | undefined;
    this.#isEnough = isEnough;
    await new Promise<void>((resolve) => {
      this.#wake = resolve;
      if (timeoutMs !== undefined) timer = setTimeout(resolve, timeoutMs);
    });
    clearTimeout(timer);
    this.#wake = undefined;
    this.#isEnough = undefined;
  }

  poke(): void {
    this.#poke();
  }

  async close(): Promise<void> {
    this.#stopListening();
    this.#letGo();
    this.#signal.removeEventListener('abort', this.#onAbort);
    await this.#files.close();
  }

  /** From this disk, or from the object store when it has gone there. */
  async #fetch(endLsn: Lsn): Promise<Buffer> {
    const { kept } = this.#timeline;
    const lsn = this.#lsn;
    if (lsn >= kept.localStartLsn) {
      try {
        return await this.#files.read(lsn, endLsn);
      } catch (error) {
        const isGone = (error as NodeJS.ErrnoException).code === 'ENOENT' && lsn < kept.localStartLsn;
        if (!isGone) throw error;
      }
    }
    return fetchOffloaded(this.#timeline, lsn, endLsn);
  }

  #readableEnd(): Lsn {
    const timeline = this.#timeline;
    timeline.throwIfFailed();
    if (this.#isRebuild) return timeline.flushLsn;
    if (this.#term === undefined) return timeline.commitLsn;
    if (timeline.leaderTerm !== this.#term) {
      throw new StrataError('conflict', `the WAL here is not that of the leader of term ${this.#term}`);
    }
    return timeline.flushLsn;
  }
}

/**
 * From the object store. In the segment in which a log begins, what is before it is made up when nobody has it: zeroes, and the page headers that
 * say so. Postgres' own readers begin with the segment, and take nothing from before the log.
 */
async function fetchOffloaded(timeline: Timeline, lsn: Lsn, endLsn: Lsn): Promise<Buffer> {
  const { identity, kept, offloadedWal } = timeline;
  const segment = lsn < identity.startLsn ? undefined : await offloadedWal?.find(identity, lsn);
  if (segment !== undefined) {
    return segment.bytes.subarray(lsn - segment.fromLsn, Math.min(segment.endLsn, endLsn) - segment.fromLsn);
  }
  if (lsn < kept.logStartLsn && lsn >= segmentStart(kept.logStartLsn)) {
    const head = firstSegmentHead(identity, kept.logStartLsn);
    return head.subarray(segmentOffset(lsn), segmentOffset(lsn) + endLsn - lsn);
  }
  const { timelineId } = identity;
  throw new StrataError(
    'history-gone',
    `the WAL of timeline ${timelineId} at ${formatLsn(lsn)} has been removed: it is not kept for so long`,
  );
}

/**
 * The end of a record on this disk, as early as it can be found: where a log that is given anew may begin when its beginning has been removed. Nobody needs
 * what is before from a safekeeper's disk (kept-wal.ts). A whole record follows there, or the log's end: a damaged disk names no place where none ends.
 */
export async function resumePoint(
  timeline: Pick<Timeline, 'kept' | 'identity' | 'commitLsn' | 'directory'>,
): Promise<Lsn> {
  const { kept, identity, commitLsn, directory } = timeline;
  const { localStartLsn } = kept;
  if (localStartLsn === kept.logStartLsn) return localStartLsn;
  const files = new WalFileReader(directory);
  const tracker = new WalBoundaryTracker(localStartLsn);
  let reader: WalReader | undefined;
  try {
    for (let lsn = localStartLsn; lsn < commitLsn; lsn += WAL_PAGE_SIZE) {
      const bytes = await files.read(lsn, Math.min(commitLsn, lsn + WAL_PAGE_SIZE));
      if (reader === undefined) {
        const endLsn = tracker.push(bytes);
        if (endLsn > localStartLsn) reader = new WalReader(endLsn, toPgVersion(identity.pgVersion));
      }
      reader?.push(lsn, bytes); // Skips what is before it.
      if (reader?.next() !== undefined) return tracker.endLsn;
    }
  } finally {
    await files.close();
  }
  if (tracker.endLsn === localStartLsn)
    throw new StrataError('unavailable', `no record of timeline ${identity.timelineId} ends on this disk yet`);
  // What is committed ends with a record.
  if (tracker.endLsn < commitLsn) throw new WalError(tracker.endLsn, 'no record begins here, and none ends');
  return commitLsn;
}
