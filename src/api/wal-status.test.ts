import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { TimelineWalStatus } from './safekeeper-protocol.ts';
import { walLags } from './wal-status.ts';

const ID = 'b'.repeat(32);

function status(more: Partial<TimelineWalStatus>): TimelineWalStatus {
  return {
    tenantId: 'a'.repeat(32),
    timelineId: ID,
    commitLsn: 1_000,
    flushLsn: 1_000,
    localStartLsn: 0,
    offloadedLsn: 0,
    isOffloadFailing: false,
    ...more,
  };
}

test('what lags is what no safekeeper has seen done, and what one keeps is the most that one does', () => {
  const feedback = { timelineId: ID, ingestedLsn: 900, flushedLsn: 500, remoteLsn: 400, oldestLsn: 0 };
  const unknown = { commitLsn: 0, flushLsn: 0, isOffloadFailing: true, damage: 'a wrong CRC' };
  const [lag] = walLags(
    new Map([
      [1, [status({ commitLsn: 900, offloadedLsn: 600, localStartLsn: 100 })]],
      [2, [status(unknown)]],
      [5, [status({ feedback, localStartLsn: 600, isOffloadFailing: true, failure: 'the disk is full' })]],
    ]),
  );
  assert.deepEqual(lag, {
    timelineId: ID,
    commitLsn: 1_000,
    notInPagesBytes: 100,
    notUploadedBytes: 600,
    notOffloadedBytes: 400,
    keptBytes: 800,
    isOffloadFailing: false,
    failures: [{ safekeeper: 5, reason: 'the disk is full' }],
    damaged: [{ safekeeper: 2, reason: 'a wrong CRC' }],
  });
});

test('without a pageserver nothing is said of pages', () => {
  const [lag] = walLags(new Map([[1, [status({})]]]));
  assert.equal(lag?.notInPagesBytes, undefined);
  assert.deepEqual(walLags(new Map([[1, []]])), []);
});
