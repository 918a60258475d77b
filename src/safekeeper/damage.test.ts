/** Damage to what a safekeeper has on its disk: it is found, costs nobody else anything, and others heal it. */
import assert from 'node:assert/strict';
import { cpSync, readdirSync } from 'node:fs';
import { open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { greetingOf, SafekeeperClient, SafekeeperConnection, type TimelineIdentity } from '../api/safekeeper.ts';
import { decodeGreetingReply, encodeJson, FRAME, type GreetingReply } from '../api/safekeeper-protocol.ts';
import type { StrataError } from '../base/errors.ts';
import { type AcceptorState, blankState } from '../consensus/acceptor.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import { segmentOffset } from '../postgres/lsn.ts';
import { CONTROL_FILE_NAME } from './control-file.ts';
import { makeWal, MID_SEGMENT_LSN } from './made-wal.test-data.ts';
import { newTimeline, RawProposer, type Served, serve } from './served.test-data.ts';
import { segmentPath } from './wal-store.ts';

async function overwrite(path: string, at: number, bytes: Buffer): Promise<void> {
  const file = await open(path, 'r+');
  await file.write(bytes, 0, bytes.length, at);
  await file.close();
}

/** Greets as a proposer would, and makes the log with the state; who is told no hears why. */
async function offer(
  served: Served,
  timeline: TimelineIdentity,
  state: AcceptorState,
): Promise<GreetingReply | StrataError> {
  return new Promise((resolve) => {
    const connection = new SafekeeperConnection(served.endpoint, {
      onFrame: ({ type, payload }) => {
        if (type !== FRAME.greetingReply) return;
        const reply = decodeGreetingReply(payload);
        if (reply.kind === 'absent') {
          connection.write(encodeJson(FRAME.create, { incarnation: reply.incarnation, state }));
          return;
        }
        resolve(reply);
        connection.close();
      },
      onClose: resolve,
    });
    connection.write(encodeJson(FRAME.greeting, greetingOf(timeline)));
  });
}

for (const what of ['control file', 'WAL'] as const) {
  test(`a log whose ${what} is damaged is not served, others are, and only who was elected without it gives it anew`, async (context) => {
    const served = await serve(context);
    const [timeline, sound] = [newTimeline(), newTimeline()];
    for (const each of [timeline, sound]) {
      const proposer = new RawProposer(served.endpoint, each);
      await proposer.lead(1);
      const wal = makeWal(MID_SEGMENT_LSN, [100, 20_000]);
      proposer.send({ kind: 'append', term: 1, beginLsn: wal.startLsn, commitLsn: wal.endLsn, bytes: wal.bytes });
      await proposer.next();
      proposer.close();
    }
    const { tenantId, timelineId } = timeline;
    const directory = join(served.dataDir, tenantId, timelineId);
    await served.safekeeper.close();
    if (what === 'control file') await overwrite(join(directory, CONTROL_FILE_NAME), 60, Buffer.from('?'));
    else await rm(segmentPath(directory, MID_SEGMENT_LSN));
    await served.start();

    const client = new SafekeeperClient(served.endpoint);
    await assert.rejects(client.status(tenantId, timelineId), ({ code }: StrataError) =>
      ['unavailable', 'internal'].includes(code),
    );
    assert.deepEqual(
      (await client.list()).map((each) => each.timelineId),
      [sound.timelineId],
    );
    assert((await client.status(sound.tenantId, sound.timelineId)).flushLsn > MID_SEGMENT_LSN);

    const refused = await offer(served, timeline, blankState(MID_SEGMENT_LSN));
    assert(refused instanceof Error && refused.code === 'unavailable', 'what is there may be all that there is');
    const given = {
      ...blankState(MID_SEGMENT_LSN),
      term: 5,
      generation: 1,
      votesFrom: { lastLogTerm: 5, flushLsn: MID_SEGMENT_LSN + 8 },
    };
    const taken = await offer(served, timeline, given);
    assert(!(taken instanceof Error) && taken.kind === 'present' && taken.term === 5);
    const status = await client.status(tenantId, timelineId);
    assert.deepEqual([status.flushLsn, status.isVoter], [MID_SEGMENT_LSN, false]);
    client.close();
    const aside = readdirSync(join(served.dataDir, tenantId)).filter((name) => name.startsWith(`${timelineId}.aside-`));
    assert.equal(aside.length, 1, 'what was there is kept');
  });
}

test('a log that ends before what it had acknowledged gives no vote until it is healed; a torn tail costs nothing', async (context) => {
  const served = await serve(context);
  const timeline = newTimeline();
  const proposer = new RawProposer(served.endpoint, timeline);
  await proposer.lead(1);
  const wal = makeWal(MID_SEGMENT_LSN, [500, 600, 700, 800]);
  const bytes = wal.bytes.subarray(0, wal.bytes.length - 100); // The last record is not whole.
  proposer.send({ kind: 'append', term: 1, beginLsn: MID_SEGMENT_LSN, commitLsn: MID_SEGMENT_LSN, bytes });
  const acknowledged = wal.ends[2]!;
  const client = new SafekeeperClient(served.endpoint);
  while ((await client.status(timeline.tenantId, timeline.timelineId)).flushLsn !== acknowledged) await sleep(10);
  client.close();
  await sleep(500); // The mark is written.

  // What a crash would leave, and the same with a byte of the third record changed.
  for (const isDamaged of [false, true]) {
    const dataDir = `${served.dataDir}-${isDamaged}`;
    cpSync(served.dataDir, dataDir, { recursive: true });
    if (isDamaged) {
      const path = segmentPath(join(dataDir, timeline.tenantId, timeline.timelineId), MID_SEGMENT_LSN);
      const file = await open(path, 'r+');
      await file.write(Buffer.from([0xff]), 0, 1, segmentOffset(wal.ends[1]!) + 300);
      await file.close();
    }
    const other = await serve(context, dataDir);
    const asked = new SafekeeperClient(other.endpoint);
    const status = await asked.status(timeline.tenantId, timeline.timelineId);
    assert.equal(status.isVoter, !isDamaged);
    assert.equal(status.flushLsn, isDamaged ? wal.ends[1] : acknowledged);
    if (isDamaged) {
      const leader = new RawProposer(other.endpoint, timeline);
      assert.equal(await leader.next(), 'greeted');
      leader.send({ kind: 'vote', term: 2, generation: 0, configuration: NO_CONFIGURATION });
      const vote = await leader.next();
      assert(vote !== 'greeted' && vote.kind === 'vote-reply' && !vote.granted && !vote.isVoter);
      // Elected by others, who have it all.
      const history = [...vote.history, { term: 2, startLsn: acknowledged }];
      leader.send({ kind: 'elected', term: 2, startLsn: wal.ends[1]!, history });
      assert.notEqual(await leader.next(), 'greeted'); // It follows.
      const rest = wal.bytes.subarray(wal.ends[1]! - MID_SEGMENT_LSN);
      leader.send({ kind: 'append', term: 2, beginLsn: wal.ends[1]!, commitLsn: 0, bytes: rest });
      while ((await asked.status(timeline.tenantId, timeline.timelineId)).flushLsn !== wal.endLsn) await sleep(10);
      assert((await asked.status(timeline.tenantId, timeline.timelineId)).isVoter, 'healed');
    }
    asked.close();
  }
});
