/** From which lag of storage on a branch is slowed, and at which it waits (compute/backpressure.ts). */
export interface LagLimits {
  readonly softBytes: number;
  readonly hardBytes: number;
}

export interface BackpressureLimits {
  /** WAL that is committed and not in pages. */
  readonly ingest: LagLimits;
  /** WAL that safekeepers must keep on their disks: its pages are not in the object store. */
  readonly keep: LagLimits;
}

const MB = 1024 * 1024;

/** A branch is slowed from a quarter of what safekeepers may have to keep of it. */
const SOFT_SHARE = 1 / 4;

export const DEFAULT_WAL_LIMIT_BYTES = 16_384 * MB;
/** With less, a branch would be slowed by WAL that only waits for the next regular upload. */
export const MIN_WAL_LIMIT_BYTES = 1024 * MB;

/** `walLimitBytes`: how much WAL of one branch may wait on safekeepers' disks before its commits do. */
export function backpressureLimits(walLimitBytes = DEFAULT_WAL_LIMIT_BYTES): BackpressureLimits {
  return {
    ingest: { softBytes: 256 * MB, hardBytes: 4096 * MB },
    keep: { softBytes: Math.floor(walLimitBytes * SOFT_SHARE), hardBytes: walLimitBytes },
  };
}

export const BACKPRESSURE_LIMITS = backpressureLimits();
