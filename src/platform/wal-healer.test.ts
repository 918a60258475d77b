/** Safekeepers of a sleeping branch, over real sockets and disks. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { type SafekeeperAddress, SafekeeperClient } from '../api/safekeeper.ts';
import { fixedSafekeepers } from '../api/safekeeper-set.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { electProposer } from '../compute/proposer.ts';
import { runSafekeeper, type Safekeeper } from '../safekeeper/main.ts';
import { makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from '../safekeeper/made-wal.test-data.ts';
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
