/**
 * When an idle endpoint is suspended: a pure decision over samples of what its compute does.
 *
 * Idle means, for the whole timeout: no query running, no transaction open, no replication connection but the proposer's, no live
 * subscription, no autovacuum worker. Open connections that do nothing do not count. A sample that could not be taken counts as activity.
 */
import type { ActivitySample } from '../api/control.ts';

export const NEVER_SUSPEND = -1;

export type SuspendDecision =
  | { readonly kind: 'stay'; readonly lastActiveMs: number }
  | { readonly kind: 'suspend'; readonly lastActiveMs: number };

export interface SuspendInput {
  readonly nowMs: number;
  /** What the last decision said, or when the compute started. */
  readonly lastActiveMs: number;
  readonly timeoutSeconds: number;
  /** Undefined: the compute could not be asked. */
  readonly sample: ActivitySample | undefined;
}

export function decideSuspend(input: SuspendInput): SuspendDecision {
  const lastActiveMs = Math.max(input.lastActiveMs, lastActivity(input.sample, input.nowMs));
  const idleMs = input.nowMs - lastActiveMs;
  const suspend =
    input.timeoutSeconds !== NEVER_SUSPEND && idleMs >= input.timeoutSeconds * 1000 && lastActiveMs < input.nowMs;
  return { kind: suspend ? 'suspend' : 'stay', lastActiveMs };
}

/** The timeout in force: an endpoint's own, or the platform's where it says 0. */
export function effectiveSuspendTimeout(endpointSeconds: number, platformSeconds: number): number {
  return endpointSeconds === 0 ? platformSeconds : endpointSeconds;
}

function lastActivity(sample: ActivitySample | undefined, nowMs: number): number {
  if (sample === undefined) return nowMs;
  const busy =
    sample.busyBackendCount > 0 ||
    sample.walsenderCount > 0 ||
    sample.activeSubscriptionCount > 0 ||
    sample.autovacuumWorkerCount > 0;
  if (busy) return nowMs;
  // A compute's clock is ours, but a time ahead of now must not keep an endpoint awake for ever.
  return Math.min(sample.lastActivityMs ?? 0, nowMs);
}
