import assert from 'node:assert/strict';
import { test } from 'node:test';
import { readWal } from '../api/safekeeper.ts';
import { startLedTimeline } from './led-timeline.test-data.ts';
import { makeWal, MID_SEGMENT_LSN } from './made-wal.test-data.ts';
import { GATHER_MS, Hurry } from './wal-stream.ts';

test('a reader gets what is new after a while, and all of it; who is in a hurry at once', async (context) => {
  const { timeline, endpoint, append } = await startLedTimeline(context, { pgVersion: 17 });
  const wal = makeWal(
    MID_SEGMENT_LSN,
    Array.from({ length: 110 }, () => 300),
  );
  let hurry: ((lsn: number) => void) | undefined;
  const { tenantId, timelineId } = timeline;
  const chunks = readWal({
    ...endpoint,
    tenantId,
    timelineId,
    fromLsn: MID_SEGMENT_LSN,
    onConnected: (given) => (hurry = given),
  });
  let at = MID_SEGMENT_LSN;
  const commitOne = async (endLsn: number): Promise<void> => {
    append(wal.bytes, at, endLsn, endLsn);
    while (at < endLsn) {
      const { value } = await chunks.next();
      assert.equal(value!.lsn, at);
      assert.deepEqual(
        value!.bytes,
        wal.bytes.subarray(at - MID_SEGMENT_LSN, at + value!.bytes.length - MID_SEGMENT_LSN),
      );
      at += value!.bytes.length;
    }
  };
  for (const endLsn of wal.ends.slice(0, 10)) await commitOne(endLsn);
  hurry!(wal.endLsn);
  const startedAt = performance.now();
  for (const endLsn of wal.ends.slice(10)) await commitOne(endLsn);
  const elapsedMs = performance.now() - startedAt;
  assert(elapsedMs < 100 * GATHER_MS, `100 commits came in ${elapsedMs} ms, as if nobody had been in a hurry`);
  await chunks.return();
});

test('a hurry is up to the highest LSN', () => {
  const hurry = new Hurry();
  let raised = 0;
  hurry.onRaised = () => void raised++;
  for (const lsn of [5, 3, 5, 9]) hurry.raise(lsn);
  assert.equal(hurry.lsn, 9);
  assert.equal(raised, 2);
});
