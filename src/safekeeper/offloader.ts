/**
 * Brings committed WAL to the object store, removes it from this disk when nobody needs it here, and from the store when nobody needs it at all.
 *
 * Whole segments go when they are complete; the last, unfinished one when its timeline has been quiet for a while, or is never quiet for long enough.
 * Every safekeeper does this for all of its timelines, but each waits longer than those before it in an order that is another for each timeline,
 * and looks first whether the object is there. So one does the work as a rule, and another when that one is away; who is slow or stale only
 * repeats what is there. A wait is for one segment: behind it all that are there are passed over at once, and who had to stand in for another goes on
 * without waiting until it finds that other's work again. So no disk fills because its turn comes last, however fast WAL comes. What is put is checked record by record before (segment-check.ts).
 *
 * Only timelines with something to do are looked at: an idle one costs nothing. A failure is told once, and tried again.
 */
import type { Logger } from '../base/log.ts';
import { toStrataError } from '../base/errors.ts';
import { historyUpTo } from '../consensus/term-history.ts';
import { formatLsn, type Lsn, segmentOffset, segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import { removalHorizon } from './kept-wal.ts';
import type { OffloadedWal } from './offloaded-wal.ts';
import { SegmentCheck } from './segment-check.ts';
import type { Timeline } from './timeline.ts';
import { WalFileReader } from './wal-store.ts';

export interface OffloaderOptions {
  readonly wal: OffloadedWal;
  readonly nodeId: number;
  /** Node ids are 1 to this, as a rule: it decides who goes first. */
  readonly safekeeperCount: number;
  readonly log: Logger;
  readonly limits?: Partial<OffloadLimits>;
}

export interface OffloadLimits {
  /** A timeline is quiet when its commit LSN has not moved for so long. */
  readonly quietMs: number;
  /** And one that is never quiet has its last segment offloaded so often. */
  readonly busyMs: number;
  /** Between one safekeeper's turn and the next one's. */
  readonly turnMs: number;
  /** Whole segments that stay on the disk for readers, whatever is offloaded. */
  readonly keptSegments: number;
  /** How far behind the commit LSN a reader holds WAL on the disk. */
  readonly readerBytesMax: number;
  readonly lookMs: number;
}

export const DEFAULT_OFFLOAD_LIMITS: OffloadLimits = {
  quietMs: 15_000,
  busyMs: 300_000,
  turnMs: 10_000,
  keptSegments: 2,
  readerBytesMax: 1024 * 1024 * 1024,
  lookMs: 1_000,
};

const CONCURRENCY = 2;
const RETRY_MS = 10_000;

/** A timeline with something to offload. */
interface Pending {
  commitLsn: Lsn;
  /** When its commit LSN was last seen to move, and when what is due now became so. */
  movedAtMs: number;
  dueLsn: Lsn;
  dueAtMs: number;
  partialAtMs: number;
  notBeforeMs: number;
  isFailing: boolean;
  /** Whose turn is before ours seems to be away: the last object was ours. */
  isStandIn: boolean;
  readonly check: SegmentCheck;
}

/** What is to be offloaded next, within one segment. */
interface Due {
  readonly endLsn: Lsn;
  /** Who has not waited for its turn may look, and no more. */
  readonly isOurTurn: boolean;
}

export class Offloader {
  readonly #options: OffloaderOptions;
  readonly #limits: OffloadLimits;
  readonly #pending = new Map<Timeline, Pending>();
  /** Moved, or told of: their disk is looked at. */
  readonly #toTrim = new Set<Timeline>();
  readonly #trimmedTo = new Map<string, Lsn>();
  readonly #closing = new AbortController();
  #timer: NodeJS.Timeout | undefined;
  #looking: Promise<void> | undefined;

  constructor(options: OffloaderOptions) {
    this.#options = options;
    this.#limits = { ...DEFAULT_OFFLOAD_LIMITS, ...options.limits };
  }

  /** To be called when the timeline was loaded, has moved, or the pageserver told of it. */
  notice(timeline: Timeline): void {
    if (timeline.commitLsn > timeline.kept.offloadedLsn && !this.#pending.has(timeline)) {
      const nowMs = performance.now();
      this.#pending.set(timeline, {
        commitLsn: timeline.commitLsn,
        movedAtMs: nowMs,
        dueLsn: 0,
        dueAtMs: nowMs,
        partialAtMs: nowMs,
        notBeforeMs: 0,
        isFailing: false,
        isStandIn: false,
        check: new SegmentCheck(),
      });
    }
    this.#toTrim.add(timeline);
    this.#schedule();
  }

  forget(timeline: Timeline): void {
    this.#pending.delete(timeline);
    this.#toTrim.delete(timeline);
    this.#trimmedTo.delete(timeline.identity.timelineId);
  }

  /** Whether what is committed cannot be brought to the store now; for who shows it. */
  isFailing(timeline: Timeline): boolean {
    return this.#pending.get(timeline)?.isFailing ?? false;
  }

  async close(): Promise<void> {
    this.#closing.abort();
    clearTimeout(this.#timer);
    await this.#looking;
  }

  #schedule(): void {
    if (this.#timer !== undefined || this.#closing.signal.aborted) return;
    this.#timer = setTimeout(() => {
      this.#looking = this.#look().finally(() => {
        this.#timer = undefined;
        if (this.#pending.size > 0 || this.#toTrim.size > 0) this.#schedule();
      });
    }, this.#limits.lookMs);
    this.#timer.unref();
  }

  /** Never rejects. */
  async #look(): Promise<void> {
    const queue = [...this.#pending];
    const work = async (): Promise<void> => {
      for (let next = queue.pop(); next !== undefined; next = queue.pop()) {
        const [timeline, pending] = next;
        if (this.#closing.signal.aborted) return;
        await this.#offloadDue(timeline, pending).catch((error: unknown) => this.#failed(timeline, pending, error));
      }
    };
    await Promise.all(Array.from({ length: CONCURRENCY }, work));
    for (const timeline of this.#toTrim) {
      this.#toTrim.delete(timeline);
      if (this.#closing.signal.aborted) return;
      await this.#trim(timeline).catch((error: unknown) => {
        const { timelineId } = timeline.identity;
        this.#options.log.warn({ timelineId, err: error }, 'old WAL could not be removed');
      });
    }
  }

  #failed(timeline: Timeline, pending: Pending, error: unknown): void {
    pending.notBeforeMs = performance.now() + RETRY_MS;
    const level = pending.isFailing ? 'debug' : 'error';
    pending.isFailing = true;
    const { timelineId } = timeline.identity;
    this.#options.log[level]({ timelineId, reason: toStrataError(error).message }, 'WAL could not be offloaded');
  }

  async #offloadDue(timeline: Timeline, pending: Pending): Promise<void> {
    const { kept } = timeline;
    for (let hasMoved = false; ; hasMoved = true) {
      const due = this.#due(timeline, pending);
      if (due === undefined || this.#closing.signal.aborted) return;
      if (!due.isOurTurn && !hasMoved) return;
      if (!(await this.#offload(timeline, due, pending))) return;
      pending.isFailing = false;
      pending.partialAtMs = performance.now();
      const isWhole = segmentOffset(due.endLsn) === 0;
      if (!isWhole || due.endLsn === timeline.commitLsn) await kept.save();
      if (kept.offloadedLsn >= timeline.commitLsn) this.#pending.delete(timeline);
      this.#toTrim.add(timeline);
    }
  }

  #due(timeline: Timeline, pending: Pending): Due | undefined {
    const nowMs = performance.now();
    const { commitLsn, kept } = timeline;
    const { quietMs, busyMs, turnMs } = this.#limits;
    if (commitLsn > pending.commitLsn) {
      pending.commitLsn = commitLsn;
      pending.movedAtMs = nowMs;
    }
    if (timeline.isFailed || nowMs < pending.notBeforeMs || kept.offloadedLsn >= commitLsn) return undefined;
    const segmentEnd = segmentStart(kept.offloadedLsn) + WAL_SEGMENT_SIZE;
    const isWhole = commitLsn >= segmentEnd;
    const isPartialDue = nowMs - pending.movedAtMs >= quietMs || nowMs - pending.partialAtMs >= busyMs;
    if (!isWhole && !isPartialDue) return undefined;
    const endLsn = isWhole ? segmentEnd : commitLsn;
    if (pending.dueLsn !== segmentEnd) {
      pending.dueLsn = segmentEnd;
      pending.dueAtMs = nowMs;
    }
    const sinceMs = isWhole ? nowMs - pending.dueAtMs : nowMs - pending.movedAtMs - quietMs;
    const busyForMs = nowMs - pending.partialAtMs - busyMs;
    const waitedMs = Math.max(sinceMs, isWhole ? 0 : busyForMs);
    return { endLsn, isOurTurn: pending.isStandIn || waitedMs >= this.#turn(timeline) * turnMs };
  }

  #turn(timeline: Timeline): number {
    const { nodeId, safekeeperCount } = this.#options;
    return (nodeId + parseInt(timeline.identity.timelineId.slice(-6), 16)) % safekeeperCount;
  }

  /** False when it is not there, and not ours to bring there yet. */
  async #offload(timeline: Timeline, { endLsn, isOurTurn }: Due, pending: Pending): Promise<boolean> {
    const { identity, kept } = timeline;
    const { wal, log } = this.#options;
    const fromLsn = Math.max(segmentStart(kept.offloadedLsn), kept.logStartLsn);
    const segment = { ...identity, fromLsn, endLsn };
    const isThere = await wal.covers(identity, fromLsn, endLsn);
    if (!isThere && !isOurTurn) return false;
    pending.isStandIn = !isThere && this.#turn(timeline) > 0;
    if (!isThere) {
      const bytes = await readSegment(timeline, fromLsn, endLsn);
      await pending.check.check(timeline, fromLsn, bytes);
      const history = historyUpTo(timeline.history, endLsn - 1);
      await wal.put({ ...segment, history, bytes });
      if (timeline.isDeleted) await wal.removeBefore(identity, Infinity);
      const range = `${formatLsn(fromLsn)} to ${formatLsn(endLsn)}`;
      log.debug({ timelineId: identity.timelineId, range }, 'WAL offloaded');
    }
    kept.offloaded(fromLsn, endLsn);
    return true;
  }

  async #trim(timeline: Timeline): Promise<void> {
    const { kept, identity } = timeline;
    const { feedback } = kept;
    if (feedback === undefined || timeline.isFailed) return;
    const { keptSegments, readerBytesMax } = this.#limits;
    const horizonLsn = removalHorizon({
      localStartLsn: kept.localStartLsn,
      offloadedLsn: kept.offloadedLsn,
      remoteLsn: feedback.remoteLsn,
      savedCommitLsn: timeline.savedCommitLsn,
      readerLsns: kept.readerLsns,
      keptSegments,
      readerBytesMax,
    });
    const { timelineId } = identity;
    const count = await kept.remove(horizonLsn);
    if (count > 0) this.#options.log.info({ timelineId, count, before: formatLsn(horizonLsn) }, 'WAL removed');

    const uselessLsn = segmentStart(Math.min(feedback.oldestLsn, feedback.remoteLsn, kept.localStartLsn));
    if (uselessLsn <= (this.#trimmedTo.get(timelineId) ?? kept.logStartLsn)) return;
    const removed = await this.#options.wal.removeBefore(identity, uselessLsn);
    this.#trimmedTo.set(timelineId, uselessLsn);
    if (removed > 0) {
      const before = formatLsn(uselessLsn);
      this.#options.log.info({ timelineId, count: removed, before }, 'WAL that no history needs was removed');
    }
  }
}

async function readSegment(timeline: Timeline, fromLsn: Lsn, endLsn: Lsn): Promise<Buffer> {
  const files = new WalFileReader(timeline.directory);
  try {
    return await files.readAll(fromLsn, endLsn);
  } finally {
    await files.close();
  }
}
