/** A safekeeper whose disk is full refuses cleanly, the others go on, and it comes back when there is room. Needs root, for a small file system. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { SafekeeperClient } from '../../src/api/safekeeper.ts';
import { signToken } from '../../src/base/token.ts';
import { electProposer } from '../../src/compute/proposer.ts';
import { makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from '../../src/safekeeper/made-wal.test-data.ts';
import { waitUntil } from './platform.ts';
import { SafekeeperProcess } from './safekeeper-process.ts';

const SECRET = randomBytes(32);
const DISK_MB = 40;

test('a full disk of one safekeeper stops neither commits nor, for long, that safekeeper', async (context) => {
  const root = mkdtempSync(join(tmpdir(), 'strata-full-'));
  const small = join(root, '3');
  mkdirSync(small);
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${DISK_MB}m`, 'tmpfs', small], { stdio: 'pipe' });
  } catch {
    rmSync(root, { recursive: true });
    context.skip('no file system can be mounted here');
    return;
  }
  const safekeepers = [1, 2, 3].map(
    (nodeId) => new SafekeeperProcess({ nodeId, dataDir: join(root, String(nodeId)), secret: SECRET }),
  );
  await Promise.all(safekeepers.map((safekeeper) => safekeeper.start()));
  const [tenantId, timelineId] = [randomBytes(16).toString('hex'), randomBytes(16).toString('hex')];
  const timeline = { tenantId, timelineId, startLsn: MID_SEGMENT_LSN, pgVersion: 17, systemId: String(SYSTEM_ID) };
  const token = await signToken(SECRET, { scope: 'platform' });
  const addresses = safekeepers.map(({ address }) => address);
  const proposer = await electProposer({ safekeepers: addresses, token, timeline, mayCreate: true });
  const wal = makeWal(
    MID_SEGMENT_LSN,
    Array.from({ length: 600 }, () => 100_000),
  );
  const half = wal.ends[199]!;
  const client = new SafekeeperClient({ address: addresses[2]!, token });
  context.after(async () => {
    client.close();
    await proposer.close();
    await Promise.all(safekeepers.map((safekeeper) => safekeeper.kill()));
    execFileSync('umount', [small]);
    rmSync(root, { recursive: true, force: true });
  });
  const status = () => client.status(tenantId, timelineId);

  const append = async (from: number, to: number): Promise<void> => {
    for (let lsn = from; lsn < to; lsn += 1_000_000) {
      const end = Math.min(to, lsn + 1_000_000);
      const hasRoom = proposer.append(lsn, wal.bytes.subarray(lsn - MID_SEGMENT_LSN, end - MID_SEGMENT_LSN));
      if (!hasRoom) await new Promise<void>((resolve) => proposer.once('drain', resolve));
    }
    await proposer.waitCommitted(to, AbortSignal.timeout(30_000));
  };
  await append(MID_SEGMENT_LSN, half);
  await waitUntil(async () => (await status()).flushLsn === half, 'all three have the first half');
  const ballast = join(small, 'ballast');
  writeFileSync(ballast, Buffer.alloc(16 * 1024 * 1024));

  await append(half, wal.endLsn); // 40 MB more: it cannot take them.
  await assert.rejects(status(), { code: 'unavailable', message: /disk is full/ });
  const [described] = (await client.walStatus()).filter((each) => each.timelineId === timelineId);
  assert.match(described?.failure ?? '', /disk is full/);

  execFileSync('mount', ['-o', 'remount,size=200m', small]);
  await waitUntil(
    async () => (await status().catch(() => undefined))?.flushLsn === wal.endLsn,
    'it has caught up',
    60_000,
  );
  assert.equal((await status()).isVoter, true);
});
