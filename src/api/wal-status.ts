/** What the WAL of branches takes and waits for, put together from what all safekeepers say; for `strata status`. */
import type { Lsn } from '../postgres/lsn.ts';
import type { TimelineWalStatus } from './safekeeper-protocol.ts';

export interface WalLags {
  readonly lags: readonly WalLag[];
  /** Ids of the safekeepers that did not answer in time. */
  readonly silent: readonly number[];
}

/** Of one timeline; the worst of what the safekeepers say where they differ. */
export interface WalLag {
  readonly timelineId: string;
  readonly commitLsn: Lsn;
  /** Committed WAL that is not in pages yet; absent when no pageserver has told of it. */
  readonly notInPagesBytes?: number;
  /** Committed WAL whose pages are not in layers in the object store yet. */
  readonly notUploadedBytes?: number;
  /** Committed WAL that is not in the object store yet. */
  readonly notOffloadedBytes: number;
  /** On the disk of the safekeeper that keeps most. */
  readonly keptBytes: number;
  readonly isOffloadFailing: boolean;
  /** Safekeepers that do not serve it, and why. */
  readonly failures: readonly { readonly safekeeper: number; readonly reason: string }[];
  /** Safekeepers on whose disks it is damaged, and how: the others heal it. */
  readonly damaged: readonly { readonly safekeeper: number; readonly reason: string }[];
}

/** `statuses`: by id, of each safekeeper that answers. */
export function walLags(statuses: ReadonlyMap<number, readonly TimelineWalStatus[]>): WalLag[] {
  const byTimeline = new Map<string, { readonly safekeeper: number; readonly status: TimelineWalStatus }[]>();
  for (const [safekeeper, list] of statuses) {
    for (const status of list) {
      const known = byTimeline.get(status.timelineId);
      const one = { safekeeper, status };
      if (known === undefined) byTimeline.set(status.timelineId, [one]);
      else known.push(one);
    }
  }
  return Array.from(byTimeline, ([timelineId, all]) => {
    const most = (of: (status: TimelineWalStatus) => number): number =>
      Math.max(...all.map(({ status }) => of(status)));
    const commitLsn = most((status) => status.commitLsn);
    const hasFeedback = all.some(({ status }) => status.feedback !== undefined);
    const ingestedLsn = most((status) => status.feedback?.ingestedLsn ?? 0);
    const remoteLsn = most((status) => status.feedback?.remoteLsn ?? 0);
    return {
      timelineId,
      commitLsn,
      ...(hasFeedback
        ? {
            notInPagesBytes: Math.max(0, commitLsn - ingestedLsn),
            notUploadedBytes: Math.max(0, commitLsn - remoteLsn),
          }
        : {}),
      notOffloadedBytes: Math.max(0, commitLsn - most((status) => status.offloadedLsn)),
      keptBytes: most((status) => Math.max(0, status.commitLsn - status.localStartLsn)),
      isOffloadFailing: all.every(({ status }) => status.isOffloadFailing),
      failures: all.flatMap(({ safekeeper, status }) =>
        status.failure === undefined ? [] : [{ safekeeper, reason: status.failure }],
      ),
      damaged: all.flatMap(({ safekeeper, status }) =>
        status.damage === undefined ? [] : [{ safekeeper, reason: status.damage }],
      ),
    };
  });
}
