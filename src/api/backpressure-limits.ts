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

export const BACKPRESSURE_LIMITS: BackpressureLimits = {
  ingest: { softBytes: 256 * MB, hardBytes: 4096 * MB },
  keep: { softBytes: 4096 * MB, hardBytes: 16_384 * MB },
};
