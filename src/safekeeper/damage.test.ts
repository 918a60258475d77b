/** Damage to what a safekeeper has on its disk: it is found, costs nobody else anything, and others heal it. */
import assert from 'node:assert/strict';
import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { mkdir, open, rm, truncate } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { greetingOf, SafekeeperClient, SafekeeperConnection, type TimelineIdentity } from '../api/safekeeper.ts';
import {
  decodeGreetingReply,
  encodeJson,
  encodeProposerMessage,
  FRAME,
  type GreetingReply,
} from '../api/safekeeper-protocol.ts';
import { createLog } from '../base/log.ts';
import type { StrataError } from '../base/errors.ts';
import { type AcceptorState, blankState } from '../consensus/acceptor.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import { segmentOffset } from '../postgres/lsn.ts';
import { CONTROL_FILE_NAME, readControlFile, writeControlFile } from './control-file.ts';
import { startLedTimeline } from './led-timeline.test-data.ts';
import { makeWal, MID_SEGMENT_LSN } from './made-wal.test-data.ts';
import { newTimeline, RawProposer, type Served, serve } from './served.test-data.ts';
import { Timelines } from './timelines.ts';
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

const damages: Readonly<Record<string, { readonly at: (directory: string) => Promise<void>; readonly says: RegExp }>> =
  {
    'control file is changed': {
      at: (directory) => overwrite(join(directory, CONTROL_FILE_NAME), 60, Buffer.from('?')),
      says: /CRC|JSON/,
    },
    'control file is empty': { at: (directory) => truncate(join(directory, CONTROL_FILE_NAME)), says: /0 bytes/ },
    'control file is a directory': {
      at: async (directory) => {
        await rm(join(directory, CONTROL_FILE_NAME));
        await mkdir(join(directory, CONTROL_FILE_NAME));
      },
      says: /EISDIR/,
    },
    'control file is that of another': {
      at: async (directory) => {
        const control = (await readControlFile(directory))!;
        assert(control.kind === 'timeline');
        await writeControlFile(directory, {
          ...control,
          identity: { ...control.identity, timelineId: 'a'.repeat(32) },
        });
      },
      says: /has the control of [0-9a-f]{32}\/a{32}/,
    },
    'control file is the tombstone of another': {
      at: (directory) =>
        writeControlFile(directory, { kind: 'deleted', tenantId: 'b'.repeat(32), timelineId: 'a'.repeat(32) }),
      says: /has the control of b{32}\/a{32}/,
    },
    'control file is gone': { at: (directory) => rm(join(directory, CONTROL_FILE_NAME)), says: /no control/ },
    'WAL is gone': { at: (directory) => rm(segmentPath(directory, MID_SEGMENT_LSN)), says: /is not in/ },
  };

for (const [what, { at, says }] of Object.entries(damages)) {
  test(`a log whose ${what} is not served, others are, and only who was elected without it gives it anew`, async (context) => {
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
    await at(directory);
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
    const damaged = (await client.walStatus()).filter(({ damage }) => damage !== undefined);
    assert.deepEqual(
      damaged.map((each) => [each.timelineId, each.failure]),
      [[timelineId, undefined]],
    );
    assert.match(damaged[0]!.damage!, says);

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

test('a log whose files are removed beneath it is told, once, as lost: it goes on neither with what is in memory nor as damaged', async (context) => {
  const lost: string[] = [];
  const led = await startLedTimeline(context, { pgVersion: 17, onLost: (path) => lost.push(path) });
  const { tenantId, timelineId } = led.timeline;
  const directory = join(led.root, 'sk', tenantId, timelineId);
  rmSync(directory, { recursive: true });
  const wal = makeWal(MID_SEGMENT_LSN, [500]);
  led.append(wal.bytes, wal.startLsn, wal.endLsn, wal.endLsn);
  const candidate = new SafekeeperConnection(led.endpoint, { onFrame: () => {}, onClose: () => {} });
  context.after(() => candidate.close());
  candidate.write(encodeJson(FRAME.greeting, greetingOf(led.timeline)));
  candidate.write(encodeProposerMessage({ kind: 'vote', term: 2, generation: 0, configuration: NO_CONFIGURATION }));
  for (const deadline = Date.now() + 30_000; lost.length === 0 && Date.now() < deadline;) await sleep(20);
  assert.deepEqual(lost, [directory]);
});

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
    const path = segmentPath(join(dataDir, timeline.tenantId, timeline.timelineId), MID_SEGMENT_LSN);
    const expected = isDamaged ? Buffer.from(bytes) : undefined;
    expected?.fill(0xff, wal.ends[1]! + 300 - MID_SEGMENT_LSN, wal.ends[1]! + 301 - MID_SEGMENT_LSN);
    const cut = existsSync(`${path}.cut`) ? readFileSync(`${path}.cut`) : undefined;
    const at = segmentOffset(MID_SEGMENT_LSN);
    assert.deepEqual(cut?.subarray(at, at + bytes.length), expected, 'what was acknowledged is kept beside it');
    const damageOf = async (): Promise<string | undefined> => (await asked.walStatus())[0]?.damage;
    if (isDamaged) assert.match((await damageOf())!, /before .* acknowledged/);
    else assert.equal(await damageOf(), undefined);
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
      assert.equal(await damageOf(), undefined);
    }
    asked.close();
  }
});

test('a log that is copied ends where it was said to, whatever an attempt that failed has left', async (context) => {
  const led = await startLedTimeline(context, { pgVersion: 17 });
  const wal = makeWal(
    MID_SEGMENT_LSN,
    Array.from({ length: 300 }, () => 100_000),
  );
  led.append(wal.bytes, MID_SEGMENT_LSN, wal.endLsn, wal.endLsn);
  await led.flushed(wal.endLsn);
  const dataDir = join(led.root, 'other');
  const { tenantId, timelineId } = led.timeline;
  const log = createLog({ name: 'test', level: 'silent' });
  const timelines = await Timelines.load(2, dataDir, log);
  context.after(() => timelines.close());
  // Segments, and no control file.
  cpSync(join(led.root, 'sk', tenantId, timelineId), join(dataDir, tenantId, timelineId), {
    recursive: true,
    filter: (path) => !path.endsWith(CONTROL_FILE_NAME),
  });
  const endLsn = wal.ends[249]!;
  const copy = { endLsn, sources: [{ nodeId: 1, address: led.endpoint.address, endLsn: wal.endLsn }] };
  const state = blankState(MID_SEGMENT_LSN);
  const request = { timeline: led.timeline, logStartLsn: MID_SEGMENT_LSN, state, copy, replace: false };
  // Who asks twice, as the first answer took too long, does not have it made twice at the same time.
  const asked = [request, { ...request, replace: true }].map((each) => timelines.rebuild(each, led.endpoint.token));
  const outcomes = await Promise.allSettled(asked);
  assert.deepEqual(
    outcomes.map((outcome) => (outcome.status === 'fulfilled' ? 'made' : (outcome.reason as StrataError).code)),
    ['made', 'locked'],
  );
  const timeline = timelines.get(tenantId, timelineId);
  await timeline.open();
  assert.equal(timeline.flushLsn, endLsn);
});

test('a log is replaced by what is copied of it, whole or not at all, whenever the safekeeper dies', async (context) => {
  const led = await startLedTimeline(context, { pgVersion: 17 });
  const wal = makeWal(
    MID_SEGMENT_LSN,
    Array.from({ length: 50 }, () => 3_000),
  );
  led.append(wal.bytes, MID_SEGMENT_LSN, wal.endLsn, wal.endLsn);
  await led.flushed(wal.endLsn);
  const { tenantId, timelineId } = led.timeline;
  const tenant = join(led.root, 'sk', tenantId);
  const client = new SafekeeperClient(led.endpoint);
  const flushed = async (): Promise<number> => (await client.status(tenantId, timelineId)).flushLsn;
  const sources = [{ nodeId: 1, address: led.endpoint.address, endLsn: wal.endLsn }];
  const endLsn = wal.ends[29]!;
  const state = { ...blankState(MID_SEGMENT_LSN), term: 9, commitLsn: endLsn };
  const request = { timeline: led.timeline, logStartLsn: MID_SEGMENT_LSN, state, replace: true };
  const tooMuch = { endLsn: wal.endLsn + 8, sources };
  await assert.rejects(client.rebuildTimeline({ ...request, copy: tooMuch }), {
    code: 'unavailable',
    message: /is sound up to .* only/,
  });
  assert.equal(await flushed(), wal.endLsn, 'what is here serves as before');
  await client.rebuildTimeline({ ...request, copy: { endLsn, sources } });
  assert.deepEqual([await flushed(), (await client.status(tenantId, timelineId)).term], [endLsn, 9]);
  client.close();

  const log = createLog({ name: 'test', level: 'silent' });
  const aside = readdirSync(tenant).find((name) => name.includes('.aside-'))!;
  for (const [what, isWhole, isOldThere] of [
    ['too early', true, true],
    ['between the two renames', true, false],
    ['while it was made', false, true],
  ] as const) {
    const dataDir = join(led.root, what.replaceAll(' ', '-'));
    const at = (name: string): string => join(dataDir, tenantId, name);
    cpSync(join(tenant, timelineId), at(`${timelineId}.replacement`), { recursive: true });
    if (!isWhole) await rm(join(at(`${timelineId}.replacement`), CONTROL_FILE_NAME));
    cpSync(join(tenant, aside), at(isOldThere ? timelineId : aside), { recursive: true });
    const timelines = await Timelines.load(1, dataDir, log);
    const timeline = timelines.get(tenantId, timelineId);
    await timeline.open();
    assert.equal(timeline.flushLsn, isOldThere ? wal.endLsn : endLsn, what);
    await timelines.close();
    assert(
      readdirSync(join(dataDir, tenantId)).every((name) => !name.endsWith('.replacement')),
      what,
    );
  }
});

test('a log that is made and deleted at the same time is deleted', async (context) => {
  const dataDir = mkdtempSync(join(tmpdir(), 'strata-made-and-deleted-'));
  const timelines = await Timelines.load(1, dataDir, createLog({ name: 'test', level: 'silent' }));
  context.after(async () => {
    await timelines.close();
    rmSync(dataDir, { recursive: true });
  });
  for (let steps = 0; steps < 40; steps++) {
    const timeline = newTimeline();
    const { tenantId, timelineId } = timeline;
    const isDeletedFirst = steps % 2 === 0;
    const make = (): Promise<unknown> => timelines.getOrCreate(timeline);
    const remove = (): Promise<unknown> => timelines.delete(tenantId, timelineId);
    const first = isDeletedFirst ? remove() : make();
    for (let step = 0; step < steps / 2; step++) await Promise.resolve();
    await Promise.allSettled([first, isDeletedFirst ? make() : remove()]);
    assert.throws(() => timelines.get(tenantId, timelineId), { code: 'not-found' }, `after ${steps} steps`);
    const control = await readControlFile(join(dataDir, tenantId, timelineId));
    assert.deepEqual(control, { kind: 'deleted', tenantId, timelineId }, `after ${steps} steps`);
  }
});
