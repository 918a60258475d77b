/**
 * How much a branch is slowed whose WAL comes faster than storage takes it in: the more storage lags, the less WAL per second is taken from Postgres, and
 * commits with it; gently at first, and nothing at all any more at the limit, so that no disk is filled.
 *
 *   rate = RATE_MAX × (1 − x)² with x = (lag − soft) / (hard − soft), between the two
 *
 * Two lags count: what is not in pages yet, and what is not in the object store yet, with its pages: so much the safekeepers keep.
 */
import { BACKPRESSURE_LIMITS, type BackpressureLimits, type LagLimits } from '../api/backpressure-limits.ts';
import type { PageserverFeedback } from '../api/safekeeper-protocol.ts';
import type { Lsn } from '../postgres/lsn.ts';

const MB = 1024 * 1024;

/** Bytes of WAL per second at the soft limit: more than storage takes in anyway. */
export const RATE_MAX = 200 * MB;
/** How long WAL is held back at once; then it is looked at anew. */
export const DELAY_MS_MAX = 1_000;

export interface Lag {
  readonly ingestBytes: number;
  readonly keepBytes: number;
}

export function lagOf(
  endLsn: Lsn,
  { ingestedLsn, remoteLsn }: Pick<PageserverFeedback, 'ingestedLsn' | 'remoteLsn'>,
): Lag {
  return { ingestBytes: Math.max(0, endLsn - ingestedLsn), keepBytes: Math.max(0, endLsn - remoteLsn) };
}

/** WAL bytes per second; Infinity when nothing is slowed, 0 when nothing may come. */
export function allowedRate(lag: Lag, limits: BackpressureLimits = BACKPRESSURE_LIMITS): number {
  return Math.min(rateFor(lag.ingestBytes, limits.ingest), rateFor(lag.keepBytes, limits.keep));
}

/** For how long no more WAL is to be taken after these bytes. */
export function delayMs(walBytes: number, rate: number): number {
  if (rate === Infinity) return 0;
  return Math.min(DELAY_MS_MAX, rate === 0 ? DELAY_MS_MAX : (1_000 * walBytes) / rate);
}

function rateFor(lagBytes: number, { softBytes, hardBytes }: LagLimits): number {
  if (lagBytes <= softBytes) return Infinity;
  if (lagBytes >= hardBytes) return 0;
  return RATE_MAX * (1 - (lagBytes - softBytes) / (hardBytes - softBytes)) ** 2;
}
