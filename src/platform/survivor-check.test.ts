/** What of a survivor's log can be had, when it, or what others have of it, is damaged. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { StrataError } from '../base/errors.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import { findEndOfWal } from '../postgres/wal/reader.ts';
import { type MadeWal, makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from '../safekeeper/made-wal.test-data.ts';
import type { WalOrigin } from '../safekeeper/sound-wal.ts';
import type { SurvivorCheck } from './rebuild-plan.ts';
import { checkSurvivor } from './survivor-check.ts';

const SIZES = Array.from({ length: 40 }, (_, index) => 100 + 400 * index);
const WAL = makeWal(MID_SEGMENT_LSN, SIZES);
const TIMELINE = {
  tenantId: 'a'.repeat(32),
  timelineId: 'b'.repeat(32),
  startLsn: MID_SEGMENT_LSN,
  pgVersion: 17,
  systemId: String(SYSTEM_ID),
};

function endOf(records: number, wal: MadeWal = WAL): Lsn {
  return records === 0 ? MID_SEGMENT_LSN : wal.ends[records - 1]!;
}

/** What follows the records is damaged, or where it says so, cannot be read at all. */
function origin(name: string, endLsn: Lsn, damaged: readonly number[], wal = WAL, isUnreadable = false): WalOrigin {
  const bytes = Buffer.from(wal.bytes);
  for (const records of damaged)
    bytes.fill(0xff, endOf(records, wal) + 40 - MID_SEGMENT_LSN, endOf(records, wal) + 60 - MID_SEGMENT_LSN);
  async function* read(fromLsn: Lsn): AsyncGenerator<Buffer, void, void> {
    const failLsn = isUnreadable ? endOf(damaged[0]!) : Infinity;
    for (let lsn = fromLsn; lsn < endLsn; lsn += 1_000) {
      if (lsn + 1_000 > failLsn) throw new StrataError('internal', 'EIO: i/o error, read');
      yield bytes.subarray(lsn - MID_SEGMENT_LSN, Math.min(endLsn, lsn + 1_000) - MID_SEGMENT_LSN);
    }
  }
  return { name, endLsn, endsWithRecord: name !== 'the object store', read };
}

async function check(
  origins: readonly WalOrigin[],
  ingested: number,
  more: { readonly resumePoint?: () => Promise<Lsn>; readonly wal?: MadeWal } = {},
): Promise<SurvivorCheck> {
  const wal = more.wal ?? WAL;
  const endLsn = endOf(ingested, wal);
  const { lastRecordStart } = await findEndOfWal(MID_SEGMENT_LSN, 17, [
    wal.bytes.subarray(0, endLsn - MID_SEGMENT_LSN),
  ]);
  return checkSurvivor({
    timeline: TIMELINE,
    origins,
    resumePoint: more.resumePoint ?? (async () => MID_SEGMENT_LSN),
    localStartLsn: MID_SEGMENT_LSN,
    flushLsn: origins[0]!.endLsn,
    ingested: { endLsn, startLsn: lastRecordStart ?? MID_SEGMENT_LSN - 8 },
    offloadedLsn: undefined,
  });
}

function remedies({ damage }: SurvivorCheck): [string, Lsn, string][] {
  return damage.map(({ origin: where, lsn, remedy }) => [where, lsn, remedy]);
}

test('damage in several places is healed from whoever has it, the survivor being asked again after each', async () => {
  const survivor = origin('safekeeper 1', WAL.endLsn, [5, 20, 30]);
  const other = origin('safekeeper 2', endOf(35), [5]);
  const store = origin('the object store', endOf(10) + 7, []); // It ends inside a record, as objects do.
  const found = await check([survivor, other, store], 3);
  assert.deepEqual([found.startLsn, found.soundLsn], [MID_SEGMENT_LSN, WAL.endLsn]);
  assert.deepEqual(remedies(found), [
    ['safekeeper 1', endOf(5), 'copied'],
    ['safekeeper 2', endOf(5), 'copied'],
    ['safekeeper 1', endOf(20), 'copied'],
  ]);
});

test('what cannot be read is damaged too; who does not answer says nothing', async () => {
  const survivor = origin('safekeeper 1', WAL.endLsn, [20], WAL, true);
  const found = await check([survivor], 10);
  assert(found.soundLsn <= endOf(20) && found.soundLsn >= endOf(18));
  assert.match(found.damage[0]!.reason, /EIO/);
  assert.equal(found.damage[0]!.remedy, 'none');
  const silent: WalOrigin = {
    ...survivor,
    read: async function* () {
      yield await Promise.reject<Buffer>(new StrataError('unavailable', 'it closed the connection'));
    },
  };
  await assert.rejects(check([silent], 10), { code: 'unavailable' });
});

test('where its log begins damaged, it begins where the pageserver is; without that nobody knows where', async () => {
  const survivor = origin('safekeeper 1', WAL.endLsn, [0]);
  const resumePoint = async (): Promise<Lsn> => {
    throw new StrataError('internal', 'no record begins here, and none ends');
  };
  const found = await check([survivor], 12, { resumePoint });
  assert.deepEqual([found.startLsn, found.soundLsn], [endOf(12), WAL.endLsn]);
  assert.deepEqual(remedies(found), [['safekeeper 1', MID_SEGMENT_LSN, 'ingested']]);
});

test('a length that is damaged at the end of the log does not wait for what never comes', async () => {
  const bytes = Buffer.from(WAL.bytes);
  bytes.writeUInt32LE(60_000, endOf(39) - MID_SEGMENT_LSN + (endOf(39) % 8192 === 0 ? 24 : 0));
  const survivor = origin('safekeeper 1', WAL.endLsn, [], { ...WAL, bytes });
  const found = await check([survivor], 10);
  assert.deepEqual([found.soundLsn, remedies(found)], [endOf(39), [['safekeeper 1', endOf(39), 'none']]]);
});

test('the log of a leader who lost is not what the pageserver has ingested: it ends where that does', async () => {
  const lost = makeWal(MID_SEGMENT_LSN, [...SIZES.slice(0, 10), 77, ...SIZES.slice(11)], 1);
  const survivor = origin('safekeeper 1', lost.endLsn, [], lost);
  const found = await check([survivor], 15);
  assert.deepEqual([found.startLsn, found.soundLsn], [endOf(15), endOf(15)], `not ${formatLsn(lost.endLsn)}`);
  assert.deepEqual(
    found.damage.map(({ remedy }) => remedy),
    ['ingested', 'none'],
  );
});
