/** A safekeeper in this process, spoken to as others would. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, mkdirSync, readdirSync, readlinkSync, writeFileSync } from 'node:fs';
import { mkdir, rmdir, writeFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { basename, join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  greetingOf,
  readWal,
  SafekeeperClient,
  SafekeeperConnection,
  type TimelineProgress,
  watchCommits,
} from '../api/safekeeper.ts';
import { encodeHello, encodeJson, FRAME } from '../api/safekeeper-protocol.ts';
import type { StrataError } from '../base/errors.ts';
import { signToken } from '../base/token.ts';
import { blankState } from '../consensus/acceptor.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import { type Lsn, segmentStart } from '../postgres/lsn.ts';
import { CONTROL_FILE_NAME, encodeControlFile, readControlFile } from './control-file.ts';
import { makeWal, MID_SEGMENT_LSN } from './made-wal.test-data.ts';
import { newTimeline, RawProposer, SECRET, serve } from './served.test-data.ts';
import { segmentPath } from './wal-store.ts';

test('watchers see all timelines, then each commit', async (context) => {
  const served = await serve(context);
  const client = new SafekeeperClient(served.endpoint);
  const [a, b] = [newTimeline(), newTimeline()];
  await client.createTimeline(a);
  await client.createTimeline(a);
  const stopping = new AbortController();
  const batches = watchCommits({ ...served.endpoint, signal: stopping.signal });
  const next = async (): Promise<TimelineProgress[]> => (await batches.next()).value ?? [];
  const { tenantId, timelineId } = a;
  assert.deepEqual(await next(), [{ tenantId, timelineId, commitLsn: MID_SEGMENT_LSN, flushLsn: MID_SEGMENT_LSN }]);
  await client.createTimeline(b);
  assert.equal((await next())[0]?.timelineId, b.timelineId);

  const proposer = new RawProposer(served.endpoint, a);
  await proposer.lead(1);
  const wal = makeWal(MID_SEGMENT_LSN, [100, 50_000]);
  proposer.send({ kind: 'append', term: 1, beginLsn: MID_SEGMENT_LSN, commitLsn: 0, bytes: wal.bytes });
  proposer.send({ kind: 'append', term: 1, beginLsn: wal.endLsn, commitLsn: wal.ends[0]!, bytes: Buffer.alloc(0) });
  let seen: TimelineProgress | undefined;
  while (seen?.commitLsn !== wal.ends[0]) seen = (await next()).find((each) => each.timelineId === timelineId) ?? seen;
  assert.equal(seen?.flushLsn, wal.endLsn);
  stopping.abort();
  assert.equal((await batches.next()).done, true);
  proposer.close();
  client.close();
});

test('readers get what is committed, then what comes; the leader of the term what is flushed', async (context) => {
  const served = await serve(context);
  const timeline = newTimeline();
  const { tenantId, timelineId } = timeline;
  const proposer = new RawProposer(served.endpoint, timeline);
  await proposer.lead(4);
  const wal = makeWal(MID_SEGMENT_LSN, [100, 50_000, 1_000]);
  const commitLsn = wal.ends[0]!;
  proposer.send({ kind: 'append', term: 4, beginLsn: MID_SEGMENT_LSN, commitLsn, bytes: wal.bytes });
  await proposer.next();

  const request = { ...served.endpoint, tenantId, timelineId, fromLsn: MID_SEGMENT_LSN };
  const committed = readWal(request);
  const first = (await committed.next()).value!;
  assert.deepEqual(
    [first.lsn, first.bytes.length, first.commitLsn],
    [MID_SEGMENT_LSN, commitLsn - MID_SEGMENT_LSN, commitLsn],
  );
  const more = committed.next();
  proposer.send({ kind: 'append', term: 4, beginLsn: wal.endLsn, commitLsn: wal.ends[1]!, bytes: Buffer.alloc(0) });
  const second = (await more).value!;
  assert.deepEqual([second.lsn, second.commitLsn], [commitLsn, wal.ends[1]]);
  await committed.return();

  const flushed = readWal({ ...request, fromLsn: wal.ends[1]!, term: 4 });
  const third = (await flushed.next()).value!;
  assert.equal(third.lsn + third.bytes.length, wal.endLsn);
  const other = new RawProposer(served.endpoint, timeline);
  assert.equal(await other.next(), 'greeted');
  other.send({ kind: 'vote', term: 5, generation: 0, configuration: NO_CONFIGURATION });
  await assert.rejects(flushed.next(), { code: 'conflict' }, 'the old leader reads no more');
  assert.deepEqual(await proposer.next(), { kind: 'term-notice', term: 5 });
  await assert.rejects(readWal({ ...request, fromLsn: MID_SEGMENT_LSN - 8 }).next(), { code: 'bad-request' });
  await assert.rejects(readWal({ ...request, timelineId: tenantId }).next(), { code: 'not-found' });
  proposer.close();
  other.close();
});

test('bytes that are no WAL, gaps and appends without an election are refused', async (context) => {
  const served = await serve(context);
  const timeline = newTimeline();
  const wal = makeWal(MID_SEGMENT_LSN, [100, 100]);
  const proposer = new RawProposer(served.endpoint, timeline);
  const append = (beginLsn: number, bytes: Buffer): void =>
    proposer.send({ kind: 'append', term: 1, beginLsn, commitLsn: 0, bytes });
  const refused = async (pattern: RegExp): Promise<void> => {
    const reply = await proposer.next();
    assert(reply !== 'greeted' && reply.kind === 'refusal');
    assert.match(reply.message, pattern);
  };
  assert.equal(await proposer.next(), 'greeted');
  append(MID_SEGMENT_LSN, wal.bytes);
  await refused(/term 1/);
  proposer.send({ kind: 'vote', term: 1, generation: 0, configuration: NO_CONFIGURATION });
  await proposer.next();
  append(MID_SEGMENT_LSN, wal.bytes);
  await refused(/introduced/);
  proposer.close();

  const leader = new RawProposer(served.endpoint, timeline);
  await leader.lead(2);
  for (const [beginLsn, bytes] of [
    [MID_SEGMENT_LSN + 8, wal.bytes],
    [MID_SEGMENT_LSN, Buffer.alloc(100)],
  ] as const) {
    leader.send({ kind: 'append', term: 2, beginLsn, commitLsn: 0, bytes });
    const reply = await leader.next();
    assert(reply !== 'greeted' && reply.kind === 'refusal');
  }
  leader.close();
});

test('what was acknowledged is there after a restart, and a torn tail is not', async (context) => {
  const served = await serve(context);
  const timeline = newTimeline();
  const proposer = new RawProposer(served.endpoint, timeline);
  await proposer.lead(1);
  const wal = makeWal(MID_SEGMENT_LSN, [100, 20_000, 300]);
  const bytes = wal.bytes.subarray(0, -8);
  proposer.send({ kind: 'append', term: 1, beginLsn: MID_SEGMENT_LSN, commitLsn: wal.ends[0]!, bytes });
  const reply = await proposer.next();
  assert(reply !== 'greeted' && reply.kind === 'append-reply');
  assert.deepEqual([reply.flushLsn, reply.writeLsn], [wal.ends[1], wal.endLsn - 8]);
  proposer.close();
  await served.restart();
  const client = new SafekeeperClient(served.endpoint);
  const status = await client.status(timeline.tenantId, timeline.timelineId);
  assert.deepEqual([status.term, status.lastLogTerm, status.flushLsn], [1, 1, wal.ends[1]]);
  assert.equal(status.commitLsn, wal.ends[0], 'a clean stop writes the commit LSN down');
  client.close();
});

test('a deleted timeline stays deleted, and an unfinished creation is forgotten', async (context) => {
  const served = await serve(context);
  const timeline = newTimeline();
  const { tenantId, timelineId } = timeline;
  const client = new SafekeeperClient(served.endpoint);
  const proposer = new RawProposer(served.endpoint, timeline);
  await proposer.lead(1);
  await client.deleteTimeline(tenantId, timelineId);
  assert.equal((await proposer.closed).code, 'not-found', 'its proposer is disconnected');
  await client.deleteTimeline(tenantId, timelineId);
  await assert.rejects(client.createTimeline(timeline), { code: 'not-found' });
  const never = newTimeline();
  await client.deleteTimeline(never.tenantId, never.timelineId);
  client.close();

  const unfinished = join(served.dataDir, tenantId, randomBytes(16).toString('hex'));
  await mkdir(unfinished);
  await writeFile(join(unfinished, 'control.partial'), 'half');
  await served.restart();
  assert(!existsSync(unfinished));
  const again = new SafekeeperClient(served.endpoint);
  assert.deepEqual(await again.list(), []);
  await assert.rejects(again.createTimeline(timeline), { code: 'not-found' });
  await assert.rejects(again.createTimeline(never), { code: 'not-found' });
  assert(!existsSync(segmentPath(join(served.dataDir, tenantId, timelineId), MID_SEGMENT_LSN)));
  again.close();
});

test('a timeline must be what it was said to be', async (context) => {
  const served = await serve(context);
  const timeline = newTimeline();
  const client = new SafekeeperClient(served.endpoint);
  await client.createTimeline(timeline);
  await assert.rejects(client.createTimeline({ ...timeline, startLsn: MID_SEGMENT_LSN + 8 }), { code: 'conflict' });
  await assert.rejects(client.createTimeline({ ...newTimeline(), pgVersion: 9 }), { code: 'bad-request' });
  await assert.rejects(client.createTimeline({ ...newTimeline(), tenantId: '../../x' }), { code: 'bad-request' });
  client.close();
});

test('a token opens what it is for', async (context) => {
  const served = await serve(context);
  const timeline = newTimeline();
  const { tenantId, timelineId } = timeline;
  const platform = new SafekeeperClient(served.endpoint);
  await platform.createTimeline(timeline);
  platform.close();
  const client = new SafekeeperClient({
    ...served.endpoint,
    token: await signToken(SECRET, { scope: 'timeline', timelineId }),
  });
  assert.equal((await client.status(tenantId, timelineId)).timelineId, timelineId);
  await assert.rejects(client.status(tenantId, tenantId), { code: 'forbidden' });
  await assert.rejects(client.list(), { code: 'forbidden' });
  await assert.rejects(client.deleteTimeline(tenantId, timelineId), { code: 'forbidden' });
  client.close();
  const proposer = new SafekeeperConnection(
    { ...served.endpoint, token: await signToken(SECRET, { scope: 'timeline', timelineId }) },
    { onFrame: () => {}, onClose: (error) => refused(error) },
  );
  let refused: (error: StrataError) => void = () => {};
  const closed = new Promise<StrataError>((resolve) => (refused = resolve));
  proposer.write(encodeJson(FRAME.greeting, greetingOf(timeline)));
  assert.equal((await closed).code, 'forbidden', 'a token to read proposes nothing');
  const forged = new SafekeeperClient({
    ...served.endpoint,
    token: await signToken(randomBytes(32), { scope: 'platform' }),
  });
  await assert.rejects(forged.list(), { code: 'unauthorized' });
});

test('strangers are disconnected: no hello, a frame too large, another protocol', async (context) => {
  const served = await serve(context);
  const { address, token } = served.endpoint;
  const openings = [
    encodeJson(FRAME.request, { id: 1, method: 'list', params: {} }),
    Buffer.from('GET / HTTP/1.1\r\n\r\n'),
    Buffer.concat([encodeHello(token), Buffer.from([0xff, 0xff, 0xff, 0x7f, FRAME.append])]),
  ];
  for (const opening of openings) {
    const socket = connect(address);
    socket.resume();
    socket.write(opening);
    await once(socket, 'close');
  }
});

test('a thousand idle timelines hold no file and no timer each, and are there quickly after a restart', async (context) => {
  const COUNT = 1_000;
  const served = await serve(context);
  await served.safekeeper.close();
  const tenantId = randomBytes(16).toString('hex');
  const startLsn = segmentStart(MID_SEGMENT_LSN);
  for (let index = 0; index < COUNT; index++) {
    const identity = { ...newTimeline(), tenantId, startLsn };
    const directory = join(served.dataDir, tenantId, identity.timelineId);
    mkdirSync(directory, { recursive: true });
    const control = encodeControlFile({ kind: 'timeline', identity, acceptor: blankState(startLsn) });
    writeFileSync(join(directory, CONTROL_FILE_NAME), control);
  }
  const startedAtMs = performance.now();
  await served.start();
  context.diagnostic(`start with ${COUNT} timelines: ${(performance.now() - startedAtMs).toFixed(0)} ms`);
  const client = new SafekeeperClient(served.endpoint);
  assert.equal((await client.list()).length, COUNT);

  const timeline = newTimeline();
  const proposer = new RawProposer(served.endpoint, timeline);
  await proposer.lead(1);
  const bytes = makeWal(MID_SEGMENT_LSN, [100]).bytes;
  proposer.send({ kind: 'append', term: 1, beginLsn: MID_SEGMENT_LSN, commitLsn: 0, bytes });
  await proposer.next();
  const segment = `${timeline.timelineId}/${basename(segmentPath('', MID_SEGMENT_LSN))}`;
  assert(openFiles(served.dataDir).some((file) => file.endsWith(segment)));
  assert(openFiles(served.dataDir).length <= 3, 'its segment, its flush mark and the lock');
  const timers = process.getActiveResourcesInfo().filter((name) => name === 'Timeout');
  assert(timers.length < 100, `${timers.length} timers`);
  proposer.close();
  // One that has WAL is opened by who asks for its status, and is at rest again.
  await served.restart();
  const asked = new SafekeeperClient(served.endpoint);
  assert.equal((await asked.status(timeline.tenantId, timeline.timelineId)).flushLsn, MID_SEGMENT_LSN + bytes.length);
  const deadline = performance.now() + 10_000;
  while (openFiles(served.dataDir).length > 1 && performance.now() < deadline) await sleep(20);
  assert.deepEqual(openFiles(served.dataDir).length, 1, `the lock: ${openFiles(served.dataDir).join()}`);
  asked.close();
  client.close();
});

test('after a failed write the timeline is not served, others are, and it is again when the disk works', async (context) => {
  const served = await serve(context);
  const [broken, sound] = [newTimeline(), newTimeline()];
  const proposer = new RawProposer(served.endpoint, broken);
  await proposer.lead(1);
  const directory = join(served.dataDir, broken.tenantId, broken.timelineId);
  // The next segment cannot be made: a folder stands in its place.
  await mkdir(segmentPath(directory, MID_SEGMENT_LSN + 16 * 1024 * 1024));
  const wal = makeWal(MID_SEGMENT_LSN, [18_000_000]);
  const appendAll = (to: RawProposer, term: number): void => {
    for (let at = 0; at < wal.bytes.length; at += 500_000) {
      const bytes = wal.bytes.subarray(at, at + 500_000);
      to.send({ kind: 'append', term, beginLsn: MID_SEGMENT_LSN + at, commitLsn: 0, bytes });
    }
  };
  appendAll(proposer, 1);
  assert.equal((await proposer.closed).code, 'unavailable');
  const client = new SafekeeperClient(served.endpoint);
  await assert.rejects(client.status(broken.tenantId, broken.timelineId), { code: 'unavailable', message: /disk/ });
  await client.createTimeline(sound);
  assert.equal((await client.status(sound.tenantId, sound.timelineId)).flushLsn, MID_SEGMENT_LSN);
  await rmdir(segmentPath(directory, MID_SEGMENT_LSN + 16 * 1024 * 1024));
  let flushLsn: Lsn | undefined;
  for (const deadline = Date.now() + 10_000; flushLsn === undefined && Date.now() < deadline; await sleep(50)) {
    flushLsn = (await client.status(broken.tenantId, broken.timelineId).catch(() => undefined))?.flushLsn;
  }
  assert.equal(flushLsn, MID_SEGMENT_LSN, 'the record that did not fit was never acknowledged');
  const again = new RawProposer(served.endpoint, broken);
  await again.lead(2);
  appendAll(again, 2);
  while ((await client.status(broken.tenantId, broken.timelineId)).flushLsn !== wal.endLsn) await sleep(20);
  client.close();
});

function openFiles(directory: string): string[] {
  const files: string[] = [];
  for (const handle of readdirSync('/proc/self/fd')) {
    try {
      files.push(readlinkSync(`/proc/self/fd/${handle}`));
    } catch {
      // The handle by which the folder was read.
    }
  }
  return files.filter((file) => file.startsWith(directory));
}

test('a vote that cannot be written down is not given, and the log is served again when it can be', async (context) => {
  const served = await serve(context);
  const timeline = newTimeline();
  const first = new RawProposer(served.endpoint, timeline);
  await first.lead(1);
  const partial = join(served.dataDir, timeline.tenantId, timeline.timelineId, `${CONTROL_FILE_NAME}.partial`);
  await mkdir(partial); // Its place is taken, as a full or failing disk refuses it.
  const second = new RawProposer(served.endpoint, timeline);
  assert.equal(await second.next(), 'greeted');
  second.send({ kind: 'vote', term: 2, generation: 0, configuration: NO_CONFIGURATION });
  assert.equal((await second.closed).code, 'unavailable', 'no answer but the end');
  assert.equal((await first.closed).code, 'unavailable');
  await rmdir(partial);
  const client = new SafekeeperClient(served.endpoint);
  let term: number | undefined;
  for (
    const deadline = performance.now() + 20_000;
    term === undefined && performance.now() < deadline;
    await sleep(50)
  ) {
    term = (await client.status(timeline.tenantId, timeline.timelineId).catch(() => undefined))?.term;
  }
  const again = new RawProposer(served.endpoint, timeline);
  await again.lead(3);
  assert.equal((await client.status(timeline.tenantId, timeline.timelineId)).term, 3);
  again.close();
  client.close();
});

test('a timeline that is deleted while its disk fails stays deleted when the disk works', async (context) => {
  const served = await serve(context);
  const { tenantId, timelineId, ...timeline } = newTimeline();
  const ids = { tenantId, timelineId };
  const leader = new RawProposer(served.endpoint, { ...timeline, ...ids });
  await leader.lead(1);
  const directory = join(served.dataDir, tenantId, timelineId);
  const partial = join(directory, `${CONTROL_FILE_NAME}.partial`);
  await mkdir(partial); // Its place is taken, as a full or failing disk refuses it.
  const candidate = new RawProposer(served.endpoint, { ...timeline, ...ids });
  assert.equal(await candidate.next(), 'greeted');
  candidate.send({ kind: 'vote', term: 2, generation: 0, configuration: NO_CONFIGURATION });
  assert.equal((await candidate.closed).code, 'unavailable');
  const client = new SafekeeperClient(served.endpoint);
  await assert.rejects(client.deleteTimeline(tenantId, timelineId));
  await rmdir(partial);
  await client.deleteTimeline(tenantId, timelineId);
  await sleep(1_500); // After a second the disk is tried.
  assert.deepEqual(await readControlFile(directory), { kind: 'deleted', ...ids });
  client.close();
});

test('a history that no log of the timeline can have is refused, and stops nobody', async (context) => {
  const served = await serve(context);
  const begin = MID_SEGMENT_LSN;
  const histories = [
    [{ term: 7, startLsn: begin }],
    [{ term: 0, startLsn: begin + 8 }],
    [
      { term: 0, startLsn: begin },
      { term: 0, startLsn: begin },
    ],
    [],
  ].map((past) => (past.length === 0 ? [] : [...past, { term: 8, startLsn: begin + 8 }]));
  for (const history of histories) {
    const proposer = new RawProposer(served.endpoint, newTimeline());
    assert.equal(await proposer.next(), 'greeted');
    // At once: it is looked at when the vote is durable.
    proposer.send({ kind: 'vote', term: 8, generation: 0, configuration: NO_CONFIGURATION });
    proposer.send({ kind: 'elected', term: 8, startLsn: begin, history });
    const answer = await Promise.race([
      proposer.closed.then(({ code }) => code),
      proposer.next().then(async () => {
        const reply = await proposer.next();
        return reply === 'greeted' ? reply : reply.kind;
      }),
    ]);
    assert(answer === 'refusal' || answer === 'bad-request', answer);
    proposer.close();
  }
});

test('a connection has one use', async (context) => {
  const served = await serve(context);
  let refused: (error: StrataError) => void = () => {};
  const closed = new Promise<StrataError>((resolve) => (refused = resolve));
  const connection = new SafekeeperConnection(served.endpoint, {
    onFrame: () => {},
    onClose: (error) => refused(error),
  });
  connection.write(encodeJson(FRAME.watch, {}), encodeJson(FRAME.watch, {}));
  const error = await closed;
  assert.deepEqual([error.code, /a watcher's connection/.test(error.message)], ['bad-request', true]);
});
