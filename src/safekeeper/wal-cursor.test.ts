/** Where a log that is given anew may begin, from files as a safekeeper has them. */
import assert from 'node:assert/strict';
import { mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import { type Lsn, segmentOffset, segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import { KeptWal } from './kept-wal.ts';
import { makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from './made-wal.test-data.ts';
import { resumePoint } from './wal-cursor.ts';
import { segmentPath, WalStore } from './wal-store.ts';

const IDENTITY = {
  tenantId: 'a'.repeat(32),
  timelineId: 'b'.repeat(32),
  startLsn: MID_SEGMENT_LSN,
  pgVersion: 17,
  systemId: String(SYSTEM_ID),
};
const LOCAL_START = segmentStart(MID_SEGMENT_LSN) + WAL_SEGMENT_SIZE;
const WAL = makeWal(MID_SEGMENT_LSN, Array<number>(200).fill(100_000));
/** Of the record that goes on over the start of the second segment. */
const FIRST_END = WAL.ends.find((endLsn) => endLsn > LOCAL_START)!;

/** A log of which only what is from the second segment on is on the disk. */
async function trimmedLog(
  context: TestContext,
): Promise<{ directory: string; resume: (commitLsn: Lsn) => Promise<Lsn> }> {
  const directory = await mkdtemp(join(tmpdir(), 'strata-wal-cursor-'));
  context.after(() => rm(directory, { recursive: true }));
  const store = new WalStore(directory, IDENTITY);
  await store.create();
  await store.fill(MID_SEGMENT_LSN, WAL.bytes);
  await rm(segmentPath(directory, MID_SEGMENT_LSN));
  const extent = { logStartLsn: MID_SEGMENT_LSN, localStartLsn: LOCAL_START, offloadedLsn: LOCAL_START };
  const kept = new KeptWal(directory, extent, () => {});
  return { directory, resume: (commitLsn) => resumePoint({ kept, identity: IDENTITY, commitLsn, directory }) };
}

test('a log begins where the first record ends, or where all that is committed does', async (context) => {
  const { resume } = await trimmedLog(context);
  assert.equal(await resume(WAL.endLsn), FIRST_END);
  assert.equal(await resume(FIRST_END), FIRST_END);
  await assert.rejects(resume(LOCAL_START + 2000), { code: 'unavailable' });
});

test('a damaged disk names no place where a log may begin', async (context) => {
  const { directory, resume } = await trimmedLog(context);
  const file = await open(segmentPath(directory, LOCAL_START), 'r+');
  context.after(() => file.close());
  // How much of the record is to come, as the first page says; and a byte of the record that follows.
  for (const lsn of [LOCAL_START + 16, LOCAL_START + 17, FIRST_END, FIRST_END + 5_000]) {
    const byte = Buffer.alloc(1);
    await file.read(byte, 0, 1, segmentOffset(lsn));
    await file.write(Buffer.from([byte[0]! ^ 8]), 0, 1, segmentOffset(lsn));
    await assert.rejects(resume(WAL.endLsn), { name: 'WalError' });
    await file.write(byte, 0, 1, segmentOffset(lsn));
  }
  assert.equal(await resume(WAL.endLsn), FIRST_END);
});
