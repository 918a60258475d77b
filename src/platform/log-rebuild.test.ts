/** Logs that are made anew from the one safekeeper that still has them, with real safekeepers: what its disk has damaged does not become what a majority has. */
import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import type { ListedTimeline, PageserverTimelineStatus } from '../api/pageserver.ts';
import { readWal, SafekeeperClient, type SafekeeperTimelineStatus } from '../api/safekeeper.ts';
import { fixedSafekeepers } from '../api/safekeeper-set.ts';
import type { StrataError } from '../base/errors.ts';
import { createLog } from '../base/log.ts';
import { FileSystemStore } from '../object-store/file-system-store.ts';
import { formatLsn, type Lsn, segmentOffset } from '../postgres/lsn.ts';
import { findEndOfWal } from '../postgres/wal/reader.ts';
import { CONTROL_FILE_NAME } from '../safekeeper/control-file.ts';
import { startLedTimeline } from '../safekeeper/led-timeline.test-data.ts';
import { runSafekeeper, type Safekeeper } from '../safekeeper/main.ts';
import { makeWal, MID_SEGMENT_LSN } from '../safekeeper/made-wal.test-data.ts';
import { OffloadedWal } from '../safekeeper/offloaded-wal.ts';
import { segmentPath } from '../safekeeper/wal-store.ts';
import { LogRebuild } from './log-rebuild.ts';

const log = createLog({ name: 'test', level: process.env['STRATA_LOG_LEVEL'] ?? 'silent' });
const WAL = makeWal(
  MID_SEGMENT_LSN,
  Array.from({ length: 60 }, () => 3_000),
);
const HISTORY = [
  { term: 0, startLsn: MID_SEGMENT_LSN },
  { term: 1, startLsn: MID_SEGMENT_LSN },
];

interface Case {
  /** How many of the 60 records the survivor knows to be committed, the pageserver has ingested, and the store has. */
  readonly committed: number;
  readonly ingested: number;
  readonly offloaded?: number;
  /** The record whose bytes are changed on the survivor's disk. */
  readonly damaged?: number;
}

function endOf(records: number): Lsn {
  return records === 0 ? MID_SEGMENT_LSN : WAL.ends[records - 1]!;
}

/** Safekeeper 1 has the log, 2 and 3 have nothing. */
async function survivor(context: TestContext, { committed, ingested, offloaded, damaged }: Case) {
  const store = mkdtempSync(join(tmpdir(), 'strata-rebuild-store-'));
  const led = await startLedTimeline(context, { pgVersion: 17, objectStore: store });
  const { timeline, endpoint, secret, root } = led;
  const { tenantId, timelineId } = timeline;
  const running = new Map<number, Safekeeper>();
  const start = async (nodeId: number, port = 0): Promise<number> => {
    const dataDir = join(root, `sk-${nodeId}`);
    const config = { nodeId, dataDir, host: '127.0.0.1', port, secret, log, objectStore: store };
    running.set(nodeId, await runSafekeeper(config));
    return running.get(nodeId)!.port;
  };
  const addresses = [
    endpoint.address,
    ...[await start(2), await start(3)].map((port) => ({ host: '127.0.0.1', port })),
  ];
  led.append(WAL.bytes, MID_SEGMENT_LSN, WAL.endLsn, endOf(committed));
  await led.flushed(WAL.endLsn);
  const wal = new OffloadedWal(await FileSystemStore.open(store));
  if (offloaded !== undefined) {
    const endLsn = endOf(offloaded);
    const bytes = WAL.bytes.subarray(0, endLsn - MID_SEGMENT_LSN);
    await wal.put({ ...timeline, fromLsn: MID_SEGMENT_LSN, endLsn, history: HISTORY, bytes });
  }
  const directory = join(root, 'sk', tenantId, timelineId);
  if (damaged !== undefined) {
    const file = await open(segmentPath(directory, MID_SEGMENT_LSN), 'r+');
    await file.write(Buffer.from([0xff]), 0, 1, segmentOffset(endOf(damaged)) + 500);
    await file.close();
  }
  const { lastRecordStart } = await findEndOfWal(MID_SEGMENT_LSN, 17, [
    WAL.bytes.subarray(0, endOf(ingested) - MID_SEGMENT_LSN),
  ]);
  const status = {
    lastRecordLsn: endOf(ingested),
    lastRecordStartLsn: lastRecordStart ?? MID_SEGMENT_LSN - 8,
    diskConsistentLsn: endOf(ingested),
    remoteConsistentLsn: endOf(ingested),
    startLsn: MID_SEGMENT_LSN,
  } as PageserverTimelineStatus;
  const pageserver = {
    timelineIdentity: async () => ({ ...timeline, hasWal: true }),
    timelineStatus: async () => status,
    listTimelines: async (): Promise<ListedTimeline[]> => [],
    timestampOfLsn: async () => undefined,
    flush: async () => {},
  };
  const { token } = endpoint;
  const rebuild = new LogRebuild({ safekeepers: fixedSafekeepers(addresses), pageserver, token, wal, log });
  const clients = addresses.map((address) => new SafekeeperClient({ address, token }));
  context.after(async () => {
    rebuild.close();
    for (const client of clients) client.close();
    for (const each of running.values()) await each.close();
    rmSync(store, { recursive: true });
  });
  /** What each safekeeper has from the LSN on. */
  const contents = async (fromLsn: Lsn): Promise<Buffer[]> => {
    const found: Buffer[] = [];
    for (const [index, address] of addresses.entries()) {
      const { flushLsn } = await clients[index]!.status(tenantId, timelineId);
      const parts: Buffer[] = [];
      let lsn = fromLsn;
      const chunks = readWal({ address, token, tenantId, timelineId, fromLsn, isRebuild: true });
      while (lsn < flushLsn) {
        const { value } = await chunks.next();
        parts.push(value!.bytes);
        lsn += value!.bytes.length;
      }
      await chunks.return();
      found.push(Buffer.concat(parts));
    }
    return found;
  };
  const assertAllHave = async (fromLsn: Lsn, endLsn: Lsn): Promise<void> => {
    const expected = WAL.bytes.subarray(fromLsn - MID_SEGMENT_LSN, endLsn - MID_SEGMENT_LSN);
    for (const [index, bytes] of (await contents(fromLsn)).entries())
      assert(
        bytes.equals(expected),
        `safekeeper ${index + 1} has ${bytes.length} of ${expected.length} bytes, or others`,
      );
  };
  const statuses = (): Promise<SafekeeperTimelineStatus[]> =>
    Promise.all(clients.map((client) => client.status(tenantId, timelineId)));
  const preview = () => rebuild.preview(timelineId, new Set());
  const made = (acceptedLsn?: Lsn) => rebuild.rebuild(timelineId, acceptedLsn);
  /** Without the leader that it had. */
  const startSurvivor = async (): Promise<void> => {
    const config = { nodeId: 1, dataDir: join(root, 'sk'), host: '127.0.0.1', secret, log, objectStore: store };
    running.set(1, await runSafekeeper({ ...config, port: led.safekeeper.port }));
  };
  const stop = async (nodeId: number): Promise<number> => {
    const each = running.get(nodeId)!;
    running.delete(nodeId);
    await each.close();
    return each.port;
  };
  const aside = (): string[] => readdirSync(join(root, 'sk', tenantId)).filter((name) => name.includes('.aside-'));
  return { led, root, start, startSurvivor, stop, preview, made, assertAllHave, statuses, aside, tenantId, timelineId };
}

test('a sound survivor is copied to its flush LSN, without a word of damage', async (context) => {
  const { preview, made, assertAllHave, statuses, aside } = await survivor(context, { committed: 20, ingested: 30 });
  const planned = await preview();
  assert.deepEqual([planned?.keptLsn, planned?.source], [WAL.endLsn, 'another safekeeper']);
  const rebuilt = await made();
  assert.deepEqual(
    [rebuilt?.keptLsn, rebuilt?.safekeepers, rebuilt?.damage, rebuilt?.lostLsn],
    [WAL.endLsn, [2, 3], undefined, undefined],
  );
  await assertAllHave(MID_SEGMENT_LSN, WAL.endLsn);
  const [, two] = await statuses();
  assert.equal(two!.commitLsn, endOf(30), 'what is ingested is committed');
  assert.deepEqual([aside(), await made()], [[], undefined]);
});

test('damage below the commit LSN is healed from the object store, on the survivor too', async (context) => {
  const world = await survivor(context, { committed: 50, ingested: 10, offloaded: 40, damaged: 20 });
  const rebuilt = await world.made();
  assert.deepEqual([rebuilt?.keptLsn, rebuilt?.safekeepers, rebuilt?.lostLsn], [WAL.endLsn, [1, 2, 3], undefined]);
  const [damage] = rebuilt!.damage!;
  assert.deepEqual([rebuilt!.damage!.length, damage!.origin, damage!.lsn], [1, 'safekeeper 1', endOf(20)]);
  assert.match(damage!.reason, /CRC/);
  assert.equal(damage!.remedy, 'copied');
  await world.assertAllHave(MID_SEGMENT_LSN, WAL.endLsn);
  assert.equal(world.aside().length, 1, 'what was damaged is kept');
  assert((await world.statuses()).every(({ isVoter, lastLogTerm }) => isVoter && lastLogTerm === 1));
});

test('damage that nobody can heal, and whose pages are there, is left out: the log begins after it', async (context) => {
  const world = await survivor(context, { committed: 50, ingested: 30, damaged: 20 });
  const rebuilt = await world.made();
  assert.deepEqual([rebuilt?.keptLsn, rebuilt?.safekeepers, rebuilt?.lostLsn], [WAL.endLsn, [1, 2, 3], undefined]);
  assert.deepEqual(
    rebuilt!.damage!.map(({ lsn, remedy }) => [lsn, remedy]),
    [[endOf(20), 'ingested']],
  );
  await world.assertAllHave(endOf(30), WAL.endLsn);
  assert((await world.statuses()).every(({ localStartLsn }) => localStartLsn === endOf(30)));
});

for (const committed of [50, 5]) {
  const where = committed > 20 ? 'below' : 'above';
  test(`damage ${where} the commit LSN that nobody can heal: nothing is given up before it was said`, async (context) => {
    const world = await survivor(context, { committed, ingested: 10, offloaded: 15, damaged: 20 });
    const END = formatLsn(endOf(20));
    const before = await world.statuses().catch(({ code }: StrataError) => code);
    assert.equal(before, 'not-found');
    await assert.rejects(world.made(), {
      code: 'conflict',
      message: new RegExp(
        `up to ${END} only, .* acknowledged up to .*safekeeper 1 at ${END} .*CRC.*strata safekeepers rebuild`,
      ),
    });
    assert.deepEqual(world.aside(), []);
    const planned = await world.preview();
    assert.deepEqual([planned?.keptLsn, planned?.heardLsn, planned?.lostLsn], [endOf(20), WAL.endLsn, WAL.endLsn]);
    assert.deepEqual(
      planned!.damage!.map(({ lsn, remedy }) => [lsn, remedy]),
      [[endOf(20), 'none']],
    );
    await assert.rejects(world.made(endOf(21)), {
      code: 'conflict',
      message: new RegExp(`could be kept up to ${END} only`),
    });
    const rebuilt = await world.made(planned!.keptLsn);
    assert.deepEqual([rebuilt?.keptLsn, rebuilt?.safekeepers], [endOf(20), [1, 2, 3]]);
    await world.assertAllHave(MID_SEGMENT_LSN, endOf(20));
    const statuses = await world.statuses();
    assert.equal(new Set(statuses.map(({ lastLogTerm }) => lastLogTerm)).size, 1);
    assert(statuses[0]!.lastLogTerm > 2 ** 20, 'a log of before leads nobody');
    assert.equal(world.aside().length, 1);
  });
}

test('when the pageserver ends where the damage begins, its pages are the truth, once that is accepted', async (context) => {
  const world = await survivor(context, { committed: 50, ingested: 20, damaged: 20 });
  await assert.rejects(world.made(), { code: 'conflict' });
  const rebuilt = await world.made((await world.preview())!.keptLsn);
  assert.deepEqual([rebuilt?.source, rebuilt?.keptLsn], ['pageserver', endOf(20)]);
  await world.assertAllHave(endOf(20), endOf(20));
});

test('a crash in the middle leaves what the next look finishes: the survivor is mended first', async (context) => {
  const world = await survivor(context, { committed: 50, ingested: 10, offloaded: 40, damaged: 20 });
  const port = await world.stop(2);
  // Who is silent may have the log: before it is known nothing is done.
  await assert.rejects(world.made(), { code: 'unavailable', message: /safekeeper 2/ });
  await world.start(2, port);
  // Its disk takes nothing, after the survivor has got its log anew.
  const blocked = join(world.root, 'sk-2', world.tenantId);
  await open(blocked, 'w').then((file) => file.close());
  await assert.rejects(world.made());
  assert.equal(world.aside().length, 1);
  rmSync(blocked);
  const rebuilt = await world.made();
  assert.deepEqual([rebuilt?.safekeepers, rebuilt?.damage, rebuilt?.keptLsn], [[2, 3], undefined, WAL.endLsn]);
  await world.assertAllHave(MID_SEGMENT_LSN, WAL.endLsn);
});

test('a survivor that dies in the middle costs nothing: it is done when it is back', async (context) => {
  const world = await survivor(context, { committed: 50, ingested: 10 });
  const dies = world.led.safekeeper.close();
  await assert.rejects(world.made());
  await dies;
  await assert.rejects(world.made(), { code: 'unavailable', message: /safekeeper 1/ });
  await assert.rejects(world.statuses());
  await world.startSurvivor();
  assert.deepEqual([(await world.made())?.keptLsn], [WAL.endLsn]);
  await world.assertAllHave(MID_SEGMENT_LSN, WAL.endLsn);
});

for (const what of ['control file', 'WAL', 'end of the WAL'] as const) {
  test(`logs whose ${what} is damaged on a majority wait for an operator, who is told what can be kept`, async (context) => {
    const world = await survivor(context, { committed: 20, ingested: 10 });
    await world.made();
    const { tenantId, timelineId } = world;
    await world.led.safekeeper.close();
    await world.startSurvivor();
    for (const nodeId of [2, 3]) {
      const port = await world.stop(nodeId);
      const directory = join(world.root, `sk-${nodeId}`, tenantId, timelineId);
      const segment = segmentPath(directory, MID_SEGMENT_LSN);
      if (what === 'WAL') rmSync(segment);
      else {
        // After the commit LSN, from where on a start looks for the end.
        const file = await open(what === 'control file' ? join(directory, CONTROL_FILE_NAME) : segment, 'r+');
        await file.write(Buffer.alloc(64, 0xff), 0, 64, what === 'control file' ? 40 : segmentOffset(endOf(30)) + 40);
        await file.close();
      }
      await world.start(nodeId, port);
    }
    const isCut = what === 'end of the WAL';
    assert.equal(await world.made(), undefined, 'they may yet be mended');
    const planned = await world.preview();
    assert.deepEqual([planned?.keptLsn, planned?.safekeepers], [WAL.endLsn, isCut ? [1, 2, 3] : [2, 3]]);
    const rebuilt = await world.made(planned!.keptLsn);
    assert.deepEqual([rebuilt?.keptLsn, rebuilt?.lostLsn], [WAL.endLsn, undefined]);
    await world.assertAllHave(MID_SEGMENT_LSN, WAL.endLsn);
    assert((await world.statuses()).every(({ isVoter }) => isVoter));
    assert.equal(await world.preview(), undefined);
  });
}
