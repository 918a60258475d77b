/**
 * What of a timeline's history stays readable: every LSN from its horizon on, and below it the points where children branch off and those
 * on which somebody holds a lease.
 *
 * A lease is held by name, for a time, and renewed. Leases are in memory only: a pageserver that has just started collects nothing until
 * everybody has had the time of a whole lease to take theirs again (GarbageCollection).
 */

import { RETENTION_MS } from '../api/retention.ts';
import { StrataError } from '../base/errors.ts';
import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';

const HOUR_MS = 60 * 60_000;
/** How long a lease lasts that is not renewed, unless the store is told otherwise. */
export const LEASE_MS = 10 * 60_000;

/** Below it, history is gone, save for retained points. */
export interface Horizon {
  readonly lsn: Lsn;
  /** The time whose state it is, by the clocks of commits, in milliseconds since 1970. */
  readonly timeMs: number;
}

interface Lease {
  readonly lsn: Lsn;
  readonly expiresAtMs: number;
}

export class Leases {
  readonly durationMs: number;
  readonly #now: () => number;
  /** By timeline, then by holder. */
  readonly #leases = new Map<string, Map<string, Lease>>();

  /** `now` is in milliseconds since any moment, and never steps: a clock that is set must not end leases. */
  constructor(now: () => number, durationMs: number) {
    this.#now = now;
    this.durationMs = durationMs;
  }

  /** Holds `lsn` in the place of what the holder held before, for `durationMs`. */
  take(timelineId: string, holder: string, lsn: Lsn): void {
    const expiresAtMs = this.#now() + this.durationMs;
    let leases = this.#leases.get(timelineId);
    if (leases === undefined) this.#leases.set(timelineId, (leases = new Map()));
    leases.set(holder, { lsn, expiresAtMs });
  }

  release(timelineId: string, holder: string): void {
    this.#leases.get(timelineId)?.delete(holder);
  }

  forget(timelineId: string): void {
    this.#leases.delete(timelineId);
  }

  lsnsOf(timelineId: string): Lsn[] {
    const leases = this.#leases.get(timelineId);
    if (leases === undefined) return [];
    for (const [holder, { expiresAtMs }] of leases) if (expiresAtMs <= this.#now()) leases.delete(holder);
    return [...leases.values()].map((lease) => lease.lsn);
  }
}

export function historyGone(timelineId: string, lsn: Lsn, oldestLsn: Lsn, horizon: Horizon | undefined): StrataError {
  return gone(timelineId, formatLsn(lsn), oldestLsn, horizon);
}

/** The same for a time, in milliseconds since 1970. */
export function timeGone(
  timelineId: string,
  timeMs: number,
  oldestLsn: Lsn,
  horizon: Horizon | undefined,
): StrataError {
  return gone(timelineId, `the state of ${new Date(timeMs).toISOString()}`, oldestLsn, horizon);
}

function gone(timelineId: string, what: string, oldestLsn: Lsn, horizon: Horizon | undefined): StrataError {
  const time = horizon === undefined ? '' : `, the state of ${new Date(horizon.timeMs).toISOString()}`;
  return new StrataError(
    'history-gone',
    `${what} of timeline ${timelineId} is no longer kept; the oldest LSN is ${formatLsn(oldestLsn)}${time}`,
  );
}

/** Throws `bad-request` for a window that is not offered. */
export function checkRetentionMs(retentionMs: number): number {
  if (retentionMs >= RETENTION_MS.min && retentionMs <= RETENTION_MS.max) return retentionMs;
  throw new StrataError(
    'bad-request',
    `history is kept for ${RETENTION_MS.min / HOUR_MS} to ${RETENTION_MS.max / HOUR_MS} hours, not for ${retentionMs / HOUR_MS}`,
  );
}
