import assert from 'node:assert/strict';
import { test } from 'node:test';
import { BACKPRESSURE_LIMITS, backpressureLimits } from '../api/backpressure-limits.ts';
import { allowedRate, DELAY_MS_MAX, delayMs, lagOf } from './backpressure.ts';

const MB = 1024 * 1024;

test('nothing is slowed up to the soft limit; then the rate falls without a jump, down to nothing at the hard limit', () => {
  const { softBytes, hardBytes } = BACKPRESSURE_LIMITS.ingest;
  const rate = (ingestBytes: number): number => allowedRate({ ingestBytes, keepBytes: 0 });
  assert.equal(rate(0), Infinity);
  assert.equal(rate(softBytes), Infinity);
  let last = rate(softBytes + 1);
  for (let lag = softBytes + MB; lag <= hardBytes; lag += MB) {
    const now = rate(lag);
    assert(now < last && last - now < MB, `${lag}: ${last} to ${now}`);
    last = now;
  }
  assert.equal(last, 0);
  assert.equal(rate(2 * hardBytes), 0);
});

test('the limit of what safekeepers keep is chosen, and slowing begins at the same share of it', () => {
  const limits = backpressureLimits(1024 * MB);
  const rate = (keepBytes: number): number => allowedRate({ ingestBytes: 0, keepBytes }, limits);
  assert.deepEqual(
    [rate(256 * MB), rate(1024 * MB), allowedRate({ ingestBytes: 0, keepBytes: 1024 * MB })],
    [Infinity, 0, Infinity],
  );
  assert(rate(257 * MB) < Infinity && rate(1023 * MB) > 0);
  assert.deepEqual(limits.ingest, BACKPRESSURE_LIMITS.ingest);
});

test('the worse of the two lags counts, and what is unknown or ahead does not slow', () => {
  const { ingest, keep } = BACKPRESSURE_LIMITS;
  const half = { ingestBytes: (ingest.softBytes + ingest.hardBytes) / 2, keepBytes: 0 };
  assert.equal(allowedRate({ ...half, keepBytes: keep.hardBytes }), 0);
  assert(allowedRate(half) > 0 && allowedRate(half) < Infinity);
  assert.deepEqual(lagOf(100, { ingestedLsn: 150, remoteLsn: 40 }), { ingestBytes: 0, keepBytes: 60 });
});

test('a delay is what the bytes take at the rate, and never so long that a change of the lag goes unseen', () => {
  assert.equal(delayMs(1_000, Infinity), 0);
  assert.equal(delayMs(1_000, 10_000), 100);
  assert.equal(delayMs(1, 0), DELAY_MS_MAX);
  assert.equal(delayMs(100 * MB, 1), DELAY_MS_MAX);
});
