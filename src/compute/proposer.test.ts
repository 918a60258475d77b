/** Proposers against real safekeepers, in this process, over real sockets and disks. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, open, rm } from 'node:fs/promises';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  readWal,
  type SafekeeperAddress,
  SafekeeperClient,
  type SafekeeperTimelineStatus,
  type TimelineIdentity,
} from '../api/safekeeper.ts';
import type { StrataError } from '../base/errors.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { blankState } from '../consensus/acceptor.ts';
import { segmentOffset, segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import { type Safekeeper, type SafekeeperConfig, runSafekeeper } from '../safekeeper/main.ts';
import { makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from '../safekeeper/made-wal.test-data.ts';
import { segmentPath } from '../safekeeper/wal-store.ts';
import { electProposer, type Proposer, type ProposerOptions } from './proposer.ts';

const SECRET = randomBytes(32);
const log = createLog({ name: 'test', level: process.env['STRATA_LOG_LEVEL'] ?? 'silent' });

class Cluster {
  readonly timeline: TimelineIdentity = {
    tenantId: randomBytes(16).toString('hex'),
    timelineId: randomBytes(16).toString('hex'),
    startLsn: MID_SEGMENT_LSN,
    pgVersion: 17,
    systemId: String(SYSTEM_ID),
  };
  readonly addresses: SafekeeperAddress[] = [];
  readonly #root: string;
  readonly #safekeepers: (Safekeeper | undefined)[] = [];
  readonly #proposers: Proposer[] = [];

  readonly #config: Partial<SafekeeperConfig>;

  private constructor(root: string, config: Partial<SafekeeperConfig>) {
    this.#root = root;
    this.#config = config;
  }

  get root(): string {
    return this.#root;
  }

  static async start(context: TestContext, count = 3, config: Partial<SafekeeperConfig> = {}): Promise<Cluster> {
    const cluster = new Cluster(await mkdtemp(join(tmpdir(), 'strata-proposer-')), config);
    for (let index = 0; index < count; index++) await cluster.startOne(index);
    context.after(async () => {
      await Promise.all(cluster.#proposers.map((proposer) => proposer.close()));
      for (const safekeeper of cluster.#safekeepers) await safekeeper?.close();
      await rm(cluster.#root, { recursive: true });
    });
    return cluster;
  }

  async startOne(index: number): Promise<void> {
    const port = this.addresses[index]?.port ?? 0;
    const dataDir = join(this.#root, `safekeeper-${index}`);
    const safekeeper = await runSafekeeper({
      nodeId: index + 1,
      dataDir,
      host: '127.0.0.1',
      port,
      secret: SECRET,
      log,
      ...this.#config,
    });
    this.#safekeepers[index] = safekeeper;
    this.addresses[index] = { host: '127.0.0.1', port: safekeeper.port };
  }

  async stopOne(index: number): Promise<void> {
    await this.#safekeepers[index]!.close();
    this.#safekeepers[index] = undefined;
  }

  /** Its disk is lost. */
  async wipeOne(index: number): Promise<void> {
    await this.stopOne(index);
    await rm(join(this.#root, `safekeeper-${index}`), { recursive: true });
  }

  /** Behind the back of the safekeeper. */
  async flipByte(index: number, lsn: number): Promise<void> {
    const { tenantId, timelineId } = this.timeline;
    const directory = join(this.#root, `safekeeper-${index}`, tenantId, timelineId);
    const file = await open(segmentPath(directory, lsn), 'r+');
    const byte = Buffer.alloc(1);
    await file.read(byte, 0, 1, segmentOffset(lsn));
    byte[0]! ^= 0x40;
    await file.write(byte, 0, 1, segmentOffset(lsn));
    await file.close();
  }

  /** Behind the back of the safekeeper. */
  async removeSegment(index: number, lsn: number): Promise<void> {
    const { tenantId, timelineId } = this.timeline;
    await rm(segmentPath(join(this.#root, `safekeeper-${index}`, tenantId, timelineId), lsn));
  }

  async elect(options: Partial<ProposerOptions> = {}): Promise<Proposer> {
    const proposer = await electProposer({
      safekeepers: this.addresses,
      token: await this.token(),
      timeline: this.timeline,
      mayCreate: true,
      signal: AbortSignal.timeout(5_000),
      log,
      ...options,
    });
    this.#proposers.push(proposer);
    return proposer;
  }

  token(): Promise<string> {
    return signToken(SECRET, { scope: 'platform' });
  }

  async client(index: number): Promise<SafekeeperClient> {
    return new SafekeeperClient({ address: this.addresses[index]!, token: await this.token() });
  }

  /** Resolves when the safekeeper has everything up to the LSN and knows that it is committed. */
  async reaches(index: number, lsn: number): Promise<void> {
    const client = await this.client(index);
    const deadline = Date.now() + 30_000;
    for (;;) {
      const { tenantId, timelineId } = this.timeline;
      const status = await client.status(tenantId, timelineId).catch((error: StrataError) => {
        if (error.code !== 'not-found') throw error;
        return { flushLsn: 0, commitLsn: 0 }; // It is about to get the timeline.
      });
      const { flushLsn, commitLsn } = status;
      if (flushLsn === lsn && commitLsn === lsn) break;
      assert(Date.now() < deadline, `safekeeper ${index} is at ${flushLsn}, committed ${commitLsn}, not ${lsn}`);
      await sleep(5);
    }
    client.close();
  }

  async status(index: number): Promise<SafekeeperTimelineStatus> {
    const client = await this.client(index);
    const { tenantId, timelineId } = this.timeline;
    return client.status(tenantId, timelineId).finally(() => client.close());
  }

  async flushLsn(index: number): Promise<number> {
    return (await this.status(index)).flushLsn;
  }

  /** Resolves when the safekeeper has so much. */
  async flushes(index: number, lsn: number): Promise<void> {
    while ((await this.flushLsn(index)) < lsn) await sleep(5);
  }

  async walOf(index: number, endLsn: number): Promise<Buffer> {
    const { tenantId, timelineId, startLsn } = this.timeline;
    const endpoint = { address: this.addresses[index]!, token: await this.token() };
    const parts: Buffer[] = [];
    for await (const { lsn, bytes } of readWal({ ...endpoint, tenantId, timelineId, fromLsn: startLsn })) {
      parts.push(Buffer.from(bytes));
      if (lsn + bytes.length >= endLsn) break;
    }
    return Buffer.concat(parts);
  }
}

/** A way to a safekeeper on which nothing passes any more, and nobody is told, once so much has come back on one connection since `arm` was called. */
async function hangAfter(
  context: TestContext,
  port: number,
  bytes: number,
): Promise<SafekeeperAddress & { readonly hangs: Promise<void>; arm(): void }> {
  let hang: () => void;
  let isArmed = false;
  let isHung = false;
  const hangs = new Promise<void>((resolve) => (hang = resolve));
  const sockets: Socket[] = [];
  const server = createServer((client) => {
    const target = connect({ host: '127.0.0.1', port, noDelay: true });
    sockets.push(client, target);
    let left = bytes;
    client.on('data', (chunk) => !isHung && target.write(chunk));
    target.on('data', (chunk) => {
      if (isArmed) left -= chunk.length;
      if (left < 0) {
        isHung = true;
        hang();
      }
      if (!isHung) client.write(chunk);
    });
    for (const socket of [client, target]) socket.on('error', () => {});
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  context.after(() => {
    server.close();
    for (const socket of sockets) socket.destroy();
  });
  return { host: '127.0.0.1', port: (server.address() as AddressInfo).port, hangs, arm: () => (isArmed = true) };
}

test('what is appended is committed and is then on all safekeepers, the commit LSN too', async (context) => {
  const cluster = await Cluster.start(context);
  const proposer = await cluster.elect();
  assert.equal(proposer.startLsn, MID_SEGMENT_LSN);
  const wal = makeWal(MID_SEGMENT_LSN, [100, 30_000, 5, 1_000_000, 77]);
  // In pieces that end anywhere.
  for (let at = 0; at < wal.bytes.length; at += 9_999) {
    proposer.append(MID_SEGMENT_LSN + at, wal.bytes.subarray(at, at + 9_999));
  }
  await proposer.waitCommitted(wal.endLsn);
  assert.equal(proposer.commitLsn, wal.endLsn);
  for (const index of [0, 1, 2]) {
    await cluster.reaches(index, wal.endLsn);
    assert((await cluster.walOf(index, wal.endLsn)).equals(wal.bytes));
  }
});

test('a proposer that is closed has sent everything to all safekeepers, to those that get it late too', async (context) => {
  const cluster = await Cluster.start(context);
  const wal = makeWal(
    MID_SEGMENT_LSN,
    Array.from({ length: 40 }, () => 300),
  );
  let at = MID_SEGMENT_LSN;
  for (let round = 0; round < 10; round++) {
    const proposer = await cluster.elect();
    await proposer.waitEqual(AbortSignal.timeout(20_000)); // All are connected, also on a busy machine.
    for (const endLsn of wal.ends.slice(4 * round, 4 * round + 4)) {
      proposer.append(at, wal.bytes.subarray(at - MID_SEGMENT_LSN, endLsn - MID_SEGMENT_LSN));
      at = endLsn;
      await proposer.waitCommitted(endLsn);
      await sleep(round);
    }
    await proposer.close();
    for (const index of [0, 1, 2]) await cluster.reaches(index, at);
  }
});

test('only whole records are committed, and a new leader starts after the last of them', async (context) => {
  const cluster = await Cluster.start(context);
  const first = await cluster.elect();
  const wal = makeWal(MID_SEGMENT_LSN, [100, 200, 20_000]);
  first.append(MID_SEGMENT_LSN, wal.bytes.subarray(0, wal.bytes.length - 8));
  await first.waitCommitted(wal.ends[1]!);
  await sleep(20);
  assert.equal(first.commitLsn, wal.ends[1]);

  const second = await cluster.elect();
  assert.equal(second.startLsn, wal.ends[1]);
  const other = makeWal(MID_SEGMENT_LSN, [100, 200, 50, 60], 0);
  second.append(second.startLsn, other.bytes.subarray(second.startLsn - MID_SEGMENT_LSN));
  await second.waitCommitted(other.endLsn);
  for (const index of [0, 1, 2]) {
    await cluster.reaches(index, other.endLsn);
    assert((await cluster.walOf(index, other.endLsn)).equals(other.bytes));
  }
});

test('a proposer is fenced at once when another one is elected, even if it is idle', async (context) => {
  const cluster = await Cluster.start(context);
  const first = await cluster.elect();
  const fenced = once(first, 'fenced');
  const waiting = assert.rejects(first.waitCommitted(MID_SEGMENT_LSN + 8), { code: 'conflict' });
  const second = await cluster.elect();
  assert.deepEqual(await fenced, [second.term]);
  await waiting;
  assert(first.fenced && !second.fenced);
  const wal = makeWal(MID_SEGMENT_LSN, [100]);
  first.append(MID_SEGMENT_LSN, wal.bytes);
  await assert.rejects(first.waitCommitted(wal.endLsn), { code: 'conflict' });
});

test('one of three may be away; it catches up from another one while commits go on', async (context) => {
  const cluster = await Cluster.start(context);
  const proposer = await cluster.elect({ retainedBytes: 10_000 });
  const wal = makeWal(MID_SEGMENT_LSN, Array<number>(400).fill(5_000));
  const append = async (to: number): Promise<void> => {
    proposer.append(proposer.endLsn, wal.bytes.subarray(proposer.endLsn - MID_SEGMENT_LSN, to - MID_SEGMENT_LSN));
    await proposer.waitCommitted(to);
  };
  await append(wal.ends[10]!);
  await cluster.stopOne(2);
  await append(wal.ends[300]!);
  await cluster.startOne(2);
  for (let record = 301; record < 400; record++) await append(wal.ends[record]!);
  for (const index of [0, 1, 2]) {
    await cluster.reaches(index, wal.endLsn);
    assert((await cluster.walOf(index, wal.endLsn)).equals(wal.bytes));
  }
});

for (const where of ['in what is read before it is sent', 'in a large record, of which a part is there']) {
  test(`a flipped byte on one disk, ${where}: another one is asked, and alone it makes no quorum with who has no whole log`, async (context) => {
    const cluster = await Cluster.start(context);
    const proposer = await cluster.elect({ retainedBytes: 10_000 });
    const wal = makeWal(MID_SEGMENT_LSN, [
      ...Array<number>(100).fill(5_000),
      900_000,
      ...Array<number>(100).fill(5_000),
    ]);
    const append = async (record: number): Promise<void> => {
      const to = wal.ends[record]!;
      proposer.append(proposer.endLsn, wal.bytes.subarray(proposer.endLsn - MID_SEGMENT_LSN, to - MID_SEGMENT_LSN));
      await proposer.waitCommitted(to);
    };
    await append(10);
    await cluster.stopOne(2);
    for (let record = 11; record < 190; record++) await append(record);
    const damaged = where.includes('large') ? wal.ends[100]! - 20_000 : wal.ends[50]! - 2_000;
    await cluster.flipByte(0, damaged);
    await cluster.reaches(1, wal.ends[189]!);
    await cluster.stopOne(1);
    const written = append(190);

    await cluster.startOne(2);
    const whole = where.includes('large') ? wal.ends[99]! : wal.ends[49]!;
    await cluster.flushes(2, whole);
    await sleep(300);
    assert.equal(await cluster.flushLsn(2), whole, 'no damaged record is taken in');
    assert(proposer.commitLsn < wal.ends[190]!, 'nothing is committed with it');

    await cluster.startOne(1);
    await written;
    await append(200);
    await cluster.reaches(2, wal.endLsn);
    assert((await cluster.walOf(2, wal.endLsn)).equals(wal.bytes));
  });
}

test('a segment that is gone from one disk: another one is asked', async (context) => {
  const cluster = await Cluster.start(context);
  const proposer = await cluster.elect({ retainedBytes: 10_000 });
  const wal = makeWal(MID_SEGMENT_LSN, Array<number>(400).fill(50_000));
  assert(wal.endLsn > segmentStart(MID_SEGMENT_LSN) + WAL_SEGMENT_SIZE, 'more than a segment');
  await cluster.stopOne(2);
  for (const [record, to] of wal.ends.entries()) {
    if (record % 20 !== 19) continue;
    proposer.append(proposer.endLsn, wal.bytes.subarray(proposer.endLsn - MID_SEGMENT_LSN, to - MID_SEGMENT_LSN));
    await proposer.waitCommitted(to);
  }
  await cluster.reaches(0, wal.endLsn);
  await cluster.reaches(1, wal.endLsn);
  await cluster.removeSegment(0, MID_SEGMENT_LSN);
  await cluster.startOne(2);
  await cluster.reaches(2, wal.endLsn);
  assert((await cluster.walOf(2, wal.endLsn)).equals(wal.bytes));
});

test('who hangs while another one recovers from it holds up nothing: what it has not told is asked of the others', async (context) => {
  const cluster = await Cluster.start(context);
  const hanging = await hangAfter(context, cluster.addresses[1]!.port, 200_000);
  const safekeepers = cluster.addresses.with(1, hanging);
  const proposer = await cluster.elect({ safekeepers, retainedBytes: 10_000, stallMs: 1_000 });
  const wal = makeWal(MID_SEGMENT_LSN, Array<number>(400).fill(5_000));
  const append = async (to: number): Promise<void> => {
    proposer.append(proposer.endLsn, wal.bytes.subarray(proposer.endLsn - MID_SEGMENT_LSN, to - MID_SEGMENT_LSN));
    await proposer.waitCommitted(to, AbortSignal.timeout(30_000));
  };
  await append(wal.ends[10]!);
  await cluster.stopOne(0);
  for (let record = 11; record < 300; record++) await append(wal.ends[record]!);
  // Of both that have it, that with the lower index is asked, as a rule.
  for (const index of [1, 2]) await cluster.reaches(index, wal.ends[299]!);
  hanging.arm(); // One of them may have been brought on from the other before.
  await cluster.startOne(0);
  await Promise.race([hanging.hangs, cluster.flushes(0, wal.ends[299]!)]);
  await append(wal.endLsn);
  assert((await cluster.walOf(0, wal.endLsn)).equals(wal.bytes));
});

test('two of three away: appending is held back, and nothing is lost when one returns', async (context) => {
  const cluster = await Cluster.start(context);
  const proposer = await cluster.elect({ maxPendingBytes: 200_000 });
  await cluster.stopOne(0);
  await cluster.stopOne(1);
  const wal = makeWal(MID_SEGMENT_LSN, Array<number>(100).fill(5_000));
  assert(proposer.append(MID_SEGMENT_LSN, wal.bytes.subarray(0, 100_000)));
  assert(!proposer.append(proposer.endLsn, wal.bytes.subarray(100_000, 300_000)), 'there is no room');
  await sleep(50);
  assert.equal(proposer.commitLsn, MID_SEGMENT_LSN);
  const drained = once(proposer, 'drain');
  await cluster.startOne(0);
  await drained;
  proposer.append(proposer.endLsn, wal.bytes.subarray(300_000));
  await proposer.waitCommitted(wal.endLsn);
  await cluster.reaches(0, wal.endLsn);
  assert((await cluster.walOf(0, wal.endLsn)).equals(wal.bytes));
});

test('one record larger than the bound on what is pending gets through', async (context) => {
  const cluster = await Cluster.start(context);
  const proposer = await cluster.elect({ maxPendingBytes: 100_000 });
  const wal = makeWal(MID_SEGMENT_LSN, [3_000_000]);
  for (let at = 0; at < wal.bytes.length; at += 64_000) {
    if (!proposer.append(MID_SEGMENT_LSN + at, wal.bytes.subarray(at, at + 64_000))) await once(proposer, 'drain');
  }
  await proposer.waitCommitted(wal.endLsn);
});

test('an election brings the log that only one safekeeper has to a quorum', async (context) => {
  const cluster = await Cluster.start(context);
  const wal = makeWal(MID_SEGMENT_LSN, [100, 200_000]);
  const first = await cluster.elect();
  await cluster.stopOne(1);
  await cluster.stopOne(2);
  first.append(MID_SEGMENT_LSN, wal.bytes);
  const client = await cluster.client(0);
  for (let flushLsn = 0; flushLsn < wal.endLsn; await sleep(5)) {
    ({ flushLsn } = await client.status(cluster.timeline.tenantId, cluster.timeline.timelineId));
  }
  client.close();
  await first.close();
  await cluster.startOne(1);
  const second = await cluster.elect();
  assert.equal(second.startLsn, wal.endLsn);
  await cluster.startOne(2);
  await cluster.reaches(1, wal.endLsn);
  await cluster.reaches(2, wal.endLsn);
  assert((await cluster.walOf(2, wal.endLsn)).equals(wal.bytes));
});

test('one safekeeper alone is a quorum of one', async (context) => {
  const cluster = await Cluster.start(context, 1);
  const wal = makeWal(MID_SEGMENT_LSN, [100]);
  const proposer = await cluster.elect();
  proposer.append(MID_SEGMENT_LSN, wal.bytes);
  await proposer.waitCommitted(wal.endLsn);
});

test('an election ends with the reason when it cannot be won', async (context) => {
  const cluster = await Cluster.start(context);
  const { tenantId, timelineId } = cluster.timeline;
  await assert.rejects(cluster.elect({ token: 'forged' }), { code: 'unauthorized' });
  const otherTimeline = await signToken(SECRET, { scope: 'timeline', timelineId: 'f'.repeat(32) });
  await assert.rejects(cluster.elect({ token: otherTimeline }), { code: 'forbidden' });
  await assert.rejects(cluster.elect({ mayCreate: false }), { code: 'not-found' });
  for (const index of [0, 1, 2]) {
    const client = await cluster.client(index);
    await client.deleteTimeline(tenantId, timelineId);
    client.close();
  }
  await assert.rejects(cluster.elect(), { code: 'not-found', message: /was deleted/ });
  await cluster.stopOne(0);
  await cluster.stopOne(1);
  await assert.rejects(
    cluster.elect({ signal: AbortSignal.timeout(200), timeline: { ...cluster.timeline, timelineId: 'e'.repeat(32) } }),
    { code: 'unavailable', message: /ECONNREFUSED/ },
  );
});

test('two proposers at once: one of them leads in the end', async (context) => {
  const cluster = await Cluster.start(context);
  const [a, b] = await Promise.all([cluster.elect(), cluster.elect()]);
  await sleep(50);
  const leaders = [a, b].filter((proposer) => !proposer.fenced);
  assert(leaders.length <= 1);
  const next = await cluster.elect();
  assert(next.term > Math.max(a.term, b.term));
});

test('a safekeeper that has lost its disk is given everything again, and counts only then', async (context) => {
  const cluster = await Cluster.start(context);
  const first = await cluster.elect();
  const wal = makeWal(MID_SEGMENT_LSN, [1_000, 50_000, 1_000]);
  first.append(MID_SEGMENT_LSN, wal.bytes);
  await first.waitCommitted(wal.endLsn);
  await first.close();

  // With one disk lost, nobody can know without both others what it had acknowledged.
  await cluster.wipeOne(0);
  await cluster.startOne(0);
  await cluster.stopOne(1);
  await assert.rejects(cluster.elect({ mayCreate: false, signal: AbortSignal.timeout(300) }), { code: 'unavailable' });

  await cluster.startOne(1);
  const second = await cluster.elect({ mayCreate: false });
  assert.equal(second.startLsn, wal.endLsn);
  await cluster.reaches(0, wal.endLsn);
  assert.deepEqual(await cluster.walOf(0, wal.endLsn), wal.bytes);
  await second.close();

  await cluster.stopOne(2);
  const third = await cluster.elect({ mayCreate: false });
  assert.equal(third.startLsn, wal.endLsn, 'it votes again');
});

test('a safekeeper that loses its disk under a running leader is made whole while commits go on', async (context) => {
  const cluster = await Cluster.start(context);
  const proposer = await cluster.elect();
  const wal = makeWal(MID_SEGMENT_LSN, [1_000, 50_000, 1_000]);
  proposer.append(MID_SEGMENT_LSN, wal.bytes.subarray(0, 500));
  await cluster.wipeOne(1);
  proposer.append(MID_SEGMENT_LSN + 500, wal.bytes.subarray(500));
  await proposer.waitCommitted(wal.endLsn);
  await cluster.startOne(1);
  await cluster.reaches(1, wal.endLsn);
  assert.deepEqual(await cluster.walOf(1, wal.endLsn), wal.bytes);
});

test('a leader whose quorum has lost its disks hears of the log that is rebuilt under a higher term, and ends', async (context) => {
  const cluster = await Cluster.start(context);
  const proposer = await cluster.elect();
  const wal = makeWal(MID_SEGMENT_LSN, [1_000]);
  proposer.append(MID_SEGMENT_LSN, wal.bytes);
  await proposer.waitCommitted(wal.endLsn);
  await cluster.reaches(2, wal.endLsn);
  const fenced = once(proposer, 'fenced', { signal: AbortSignal.timeout(30_000) });
  for (const index of [0, 1]) {
    await cluster.wipeOne(index);
    await cluster.startOne(index);
  }
  await sleep(1_500); // It has been told by both that they do not have it.
  const { history } = await cluster.status(2);
  const state = { ...blankState(MID_SEGMENT_LSN), term: 1_000, commitLsn: wal.endLsn, history };
  const { endLsn } = wal;
  const copy = { endLsn, sources: [{ nodeId: 3, address: cluster.addresses[2]!, endLsn }] };
  for (const index of [0, 1]) {
    const client = await cluster.client(index);
    const { timeline } = cluster;
    await client.rebuildTimeline({ timeline, logStartLsn: MID_SEGMENT_LSN, state, copy, replace: false });
    client.close();
  }
  assert.deepEqual(await fenced, [1_000]);
});

test('when a quorum has lost its disks, nothing is made up in its place', async (context) => {
  const cluster = await Cluster.start(context);
  const proposer = await cluster.elect();
  const wal = makeWal(MID_SEGMENT_LSN, [1_000]);
  proposer.append(MID_SEGMENT_LSN, wal.bytes);
  await proposer.waitCommitted(wal.endLsn);
  await cluster.reaches(2, wal.endLsn);
  await proposer.close();
  for (const index of [0, 1]) {
    await cluster.wipeOne(index);
    await cluster.startOne(index);
  }
  await assert.rejects(cluster.elect({ mayCreate: false }), { code: 'not-found' });
  const third = await cluster.client(2);
  const { tenantId, timelineId } = cluster.timeline;
  assert.equal((await third.status(tenantId, timelineId)).flushLsn, wal.endLsn);
  third.close();
});

test('who yields to a leader raises no term while one is connected, and leads when it is gone', async (context) => {
  const cluster = await Cluster.start(context);
  const leader = await cluster.elect();
  const wal = makeWal(MID_SEGMENT_LSN, [1_000]);
  leader.append(MID_SEGMENT_LSN, wal.bytes);
  await leader.waitCommitted(wal.endLsn);
  await cluster.reaches(0, wal.endLsn);
  await assert.rejects(cluster.elect({ yieldsToLeader: true }), { code: 'conflict' });
  assert(!leader.fenced);
  await leader.close();
  const next = await cluster.elect({ yieldsToLeader: true });
  assert.equal(next.startLsn, wal.endLsn);
  assert.equal(next.term, leader.term + 1);
});

test('of many leaders the history of a log keeps the last ones, and who was away for all of them follows', async (context) => {
  const objectStore = await mkdtemp(join(tmpdir(), 'strata-proposer-store-'));
  context.after(() => rm(objectStore, { recursive: true }));
  const offload = { quietMs: 20, turnMs: 20, lookMs: 10 };
  const cluster = await Cluster.start(context, 3, { objectStore, offload });
  const wal = makeWal(MID_SEGMENT_LSN, Array<number>(50).fill(3_000));
  for (const [wake, endLsn] of wal.ends.slice(0, 12).entries()) {
    const proposer = await cluster.elect();
    if (wake === 2) {
      await cluster.reaches(2, proposer.startLsn);
      await cluster.stopOne(2);
    }
    proposer.append(
      proposer.startLsn,
      wal.bytes.subarray(proposer.startLsn - MID_SEGMENT_LSN, endLsn - MID_SEGMENT_LSN),
    );
    await proposer.waitCommitted(endLsn);
    for (const index of [0, 1]) await cluster.reaches(index, endLsn);
    await proposer.close();
    for (const index of [0, 1]) while ((await cluster.status(index)).offloadedLsn < endLsn) await sleep(10);
  }
  for (const index of [0, 1]) {
    const { history, term } = await cluster.status(index);
    assert(term >= 12 && history.length <= 4, JSON.stringify(history));
    assert.deepEqual(history[0], { term: 0, startLsn: MID_SEGMENT_LSN });
  }
  await cluster.startOne(2);
  const last = await cluster.elect();
  last.append(last.startLsn, wal.bytes.subarray(last.startLsn - MID_SEGMENT_LSN));
  await last.waitCommitted(wal.endLsn);
  await cluster.reaches(2, wal.endLsn);
  assert((await cluster.walOf(2, wal.endLsn)).equals(wal.bytes));
  assert.deepEqual((await cluster.status(2)).history, (await cluster.status(0)).history);
});
