/** Safekeepers of a sleeping branch, over real sockets and disks. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, open, readdir, readFile, rm, truncate } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { type SafekeeperAddress, SafekeeperClient } from '../api/safekeeper.ts';
import { fixedSafekeepers } from '../api/safekeeper-set.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { electProposer } from '../compute/proposer.ts';
import { segmentOffset, segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import { runSafekeeper, type Safekeeper } from '../safekeeper/main.ts';
import { makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from '../safekeeper/made-wal.test-data.ts';
import { segmentPath } from '../safekeeper/wal-store.ts';
import { WalHealer } from './wal-healer.ts';

const SECRET = randomBytes(32);
const log = createLog({ name: 'test', level: process.env['STRATA_LOG_LEVEL'] ?? 'silent' });

test('a safekeeper that was down, and then one that has lost its disk, get everything although no compute runs', async (context) => {
  const root = await mkdtemp(join(tmpdir(), 'strata-healer-'));
  const safekeepers: Safekeeper[] = [];
  const addresses: SafekeeperAddress[] = [];
  const start = async (index: number): Promise<void> => {
    const dataDir = join(root, String(index));
    const port = addresses[index]?.port ?? 0;
    const options = { nodeId: index + 1, dataDir, host: '127.0.0.1', port, secret: SECRET, log };
    safekeepers[index] = await runSafekeeper(options);
    addresses[index] = { host: '127.0.0.1', port: safekeepers[index].port };
  };
  for (const index of [0, 1, 2]) await start(index);
  const token = await signToken(SECRET, { scope: 'platform' });
  const [tenantId, timelineId] = [randomBytes(16).toString('hex'), randomBytes(16).toString('hex')];
  const identity = { tenantId, timelineId, startLsn: MID_SEGMENT_LSN, pgVersion: 17, systemId: String(SYSTEM_ID) };
  const pageserver = {
    listTimelines: () => Promise.resolve([]),
    timelineIdentity: () => Promise.resolve({ ...identity, hasWal: true }),
  };
  const directory = fixedSafekeepers(addresses);
  const healer = new WalHealer({ safekeepers: directory, pageserver, token, log, intervalMs: 1 << 30 });
  context.after(async () => {
    await healer.close();
    for (const safekeeper of safekeepers) await safekeeper.close();
    await rm(root, { recursive: true });
  });
  const commitLsnOf = async (index: number): Promise<number> => {
    const client = new SafekeeperClient({ address: addresses[index]!, token });
    return client.status(tenantId, timelineId).then((status) => (client.close(), status.commitLsn));
  };

  const wal = makeWal(MID_SEGMENT_LSN, [1_000, 90_000, 1_000]);
  const signal = AbortSignal.timeout(10_000);
  const election = { safekeepers: addresses, token, timeline: identity, signal, log };
  const proposer = await electProposer({ ...election, mayCreate: true });
  proposer.append(MID_SEGMENT_LSN, wal.bytes.subarray(0, 1_000));
  await proposer.waitEqual(signal);
  await safekeepers[2]!.close();
  proposer.append(MID_SEGMENT_LSN + 1_000, wal.bytes.subarray(1_000));
  await proposer.waitCommitted(wal.endLsn);
  await healer.heal();
  await healer.heal();
  assert(!proposer.fenced, 'a leader is left alone');
  await proposer.close();

  await start(2);
  await healer.heal();
  assert((await commitLsnOf(2)) < wal.endLsn, 'the first look only notes it');
  await healer.heal();
  assert.equal(await commitLsnOf(2), wal.endLsn);

  await safekeepers[0]!.close();
  await rm(join(root, '0'), { recursive: true });
  await start(0);
  await assert.rejects(commitLsnOf(0), { code: 'not-found' });
  await healer.heal();
  await healer.heal();
  assert.equal(await commitLsnOf(0), wal.endLsn);
});

test('committed WAL that is damaged or gone on a disk is mended by the others, what nobody has stays as it is', async (context) => {
  const root = await mkdtemp(join(tmpdir(), 'strata-healer-'));
  const safekeepers: Safekeeper[] = [];
  for (const index of [0, 1, 2]) {
    const options = {
      nodeId: index + 1,
      dataDir: join(root, String(index)),
      host: '127.0.0.1',
      port: 0,
      secret: SECRET,
      log,
    };
    safekeepers[index] = await runSafekeeper(options);
  }
  context.after(async () => {
    for (const safekeeper of safekeepers) await safekeeper.close();
    await rm(root, { recursive: true });
  });
  const addresses = safekeepers.map(({ port }) => ({ host: '127.0.0.1', port }));
  const token = await signToken(SECRET, { scope: 'platform' });
  const [tenantId, timelineId] = [randomBytes(16).toString('hex'), randomBytes(16).toString('hex')];
  const startLsn = segmentStart(MID_SEGMENT_LSN) + WAL_SEGMENT_SIZE - 400_000;
  const identity = { tenantId, timelineId, startLsn, pgVersion: 17, systemId: String(SYSTEM_ID) };
  const pageserver = {
    listTimelines: () => Promise.resolve([]),
    timelineIdentity: () => Promise.resolve({ ...identity, hasWal: true }),
  };
  const wal = makeWal(startLsn, Array<number>(360).fill(50_000));
  assert(segmentStart(wal.endLsn) >= segmentStart(startLsn) + 2 * WAL_SEGMENT_SIZE, 'three segments');
  const signal = AbortSignal.timeout(60_000);
  const proposer = await electProposer({
    safekeepers: addresses,
    token,
    timeline: identity,
    signal,
    log,
    mayCreate: true,
  });
  for (const [record, to] of wal.ends.entries()) {
    if (record % 20 !== 19) continue;
    proposer.append(proposer.endLsn, wal.bytes.subarray(proposer.endLsn - startLsn, to - startLsn));
    await proposer.waitCommitted(to);
  }
  await proposer.waitEqual(signal);
  await proposer.close();

  const directoryOf = (index: number): string => join(root, String(index), tenantId, timelineId);
  const walOf = async (index: number): Promise<Buffer> => {
    const names = (await readdir(directoryOf(index))).filter((name) => name.startsWith('0000')).sort();
    const bytes = Buffer.concat(await Promise.all(names.map((name) => readFile(join(directoryOf(index), name)))));
    return bytes;
  };
  const whole = await walOf(0);
  assert(whole.subarray(segmentOffset(startLsn)).subarray(0, wal.bytes.length).equals(wal.bytes));
  const flip = async (index: number, lsn: number): Promise<void> => {
    const file = await open(segmentPath(directoryOf(index), lsn), 'r+');
    await file.write(Buffer.from([0x77]), 0, 1, segmentOffset(lsn));
    await file.close();
  };
  const secondLsn = segmentStart(startLsn) + WAL_SEGMENT_SIZE;
  const mend = async (index: number): Promise<number> => {
    const client = new SafekeeperClient({ address: addresses[index]!, token });
    const all = addresses.map((address, other) => ({ nodeId: other + 1, address, endLsn: wal.endLsn }));
    const sources = all.filter((_, other) => other !== index);
    return client.mendWal({ tenantId, timelineId, sources }).finally(() => client.close());
  };
  const damages: Readonly<Record<string, { readonly at: readonly number[]; readonly damage: () => Promise<void> }>> = {
    'bytes of the first and the last record': {
      at: [0],
      damage: async () => {
        await flip(0, startLsn + 1_000);
        await flip(0, wal.endLsn - 1_000);
      },
    },
    'a page header': { at: [1], damage: () => flip(1, secondLsn) },
    'a segment that is gone': { at: [1], damage: () => rm(segmentPath(directoryOf(1), secondLsn)) },
    'the first segment': { at: [2], damage: () => rm(segmentPath(directoryOf(2), startLsn)) },
    'a short segment': { at: [2], damage: () => truncate(segmentPath(directoryOf(2), secondLsn), 100_000) },
    'all disks, in different places': {
      at: [0, 1, 2],
      damage: async () => {
        for (const index of [0, 1, 2]) await flip(index, secondLsn + 1_000_000 * index);
      },
    },
    'two disks in the same place': {
      at: [0, 1],
      damage: async () => {
        for (const index of [0, 1]) await flip(index, secondLsn + 1_000_000);
      },
    },
  };
  for (const [what, { at, damage }] of Object.entries(damages)) {
    await damage();
    for (const index of at) {
      assert((await mend(index)) > 0, what);
      assert((await walOf(index)).equals(whole), `${what}, safekeeper ${index + 1}`);
    }
  }

  await flip(0, secondLsn + 1_000_000);
  const healer = new WalHealer({
    safekeepers: fixedSafekeepers(addresses),
    pageserver,
    token,
    log,
    intervalMs: 1 << 30,
  });
  context.after(() => healer.close());
  // The first look leaves the disks alone.
  for (let look = 0; look < 2; look++) {
    await healer.heal();
    await healer.mended();
  }
  assert((await walOf(0)).equals(whole), 'nobody had to ask for it');

  for (const index of [0, 1, 2]) await flip(index, secondLsn + 2_000_000);
  const damaged = await walOf(0);
  await assert.rejects(mend(0), { code: 'unavailable', message: /nobody has the WAL/ });
  assert((await walOf(0)).equals(damaged), 'nothing is made up');
});
