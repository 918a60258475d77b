/** WAL that has left the safekeepers' disks: all that reads it goes on as if it were there. */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { PageserverClient } from '../../src/api/pageserver.ts';
import { SafekeeperClient, type SafekeeperTimelineStatus } from '../../src/api/safekeeper.ts';
import type { PlatformFile } from '../../src/api/control.ts';
import { signToken } from '../../src/base/token.ts';
import { openObjectStore } from '../../src/object-store/open-object-store.ts';
import { OffloadedWal } from '../../src/safekeeper/offloaded-wal.ts';
import { TestPlatform, waitUntil } from './platform.ts';

const ROWS = 24_000;
const SEGMENT_BYTES = 16 * 1024 * 1024;

describe('WAL that is in the object store only', () => {
  let platform: TestPlatform;
  let timelineId: string;
  let tenantId: string;
  let middle: string;

  before(async () => {
    platform = await TestPlatform.start({ env: { STRATA_TEST_OFFLOAD_SECONDS: '1' } });
    await platform.psql('CREATE TABLE long (n int, note text); ALTER TABLE long ALTER note SET STORAGE PLAIN');
    await platform.psql(`INSERT INTO long SELECT n, repeat('y', 4000) FROM generate_series(1, ${ROWS / 2}) AS n`);
    middle = await platform.psql('SELECT pg_current_wal_lsn()');
    await platform.psql(
      `INSERT INTO long SELECT n, repeat('z', 4000) FROM generate_series(${ROWS / 2 + 1}, ${ROWS}) AS n`,
    );
    const [branch] = await platform.cliJson<{ timeline_id: string }[]>(['branches', 'list']);
    timelineId = branch!.timeline_id;
    tenantId = readdirSync(join(platform.dataDir, 'safekeeper-1')).find((id) =>
      readdirSync(join(platform.dataDir, 'safekeeper-1', id)).includes(timelineId),
    )!;
  });
  after(async () => {
    await platform.destroy();
  });

  async function withServices<T>(
    work: (safekeepers: SafekeeperClient[], pageserver: PageserverClient) => Promise<T>,
  ): Promise<T> {
    const file = JSON.parse(readFileSync(join(platform.dataDir, 'platform.json'), 'utf8')) as PlatformFile;
    const token = await signToken(platform.platformSecret, { scope: 'platform' });
    const safekeepers = file.safekeepers.map((address) => new SafekeeperClient({ address, token }));
    const pageserver = new PageserverClient({ ...file.pageserver, token });
    try {
      return await work(safekeepers, pageserver);
    } finally {
      for (const safekeeper of safekeepers) safekeeper.close();
      await pageserver.close();
    }
  }

  function segments(safekeeper: number): number {
    const directory = join(platform.dataDir, `safekeeper-${safekeeper}`, tenantId, timelineId);
    return readdirSync(directory).filter((name) => /^[0-9A-F]{24}$/.test(name)).length;
  }

  test('leaves the disks of all safekeepers once its pages are in the store', async () => {
    await withServices(async (_, pageserver) => {
      await waitUntil(async () => {
        const { lastRecordLsn, commitLsn } = await pageserver.timelineStatus(timelineId);
        return lastRecordLsn >= (commitLsn ?? Infinity);
      }, 'all is ingested');
      const { lastRecordLsn, startLsn } = await pageserver.timelineStatus(timelineId);
      assert((lastRecordLsn - startLsn) / SEGMENT_BYTES >= 5, 'more segments than are kept');
      await pageserver.flush(timelineId);
    });
    await waitUntil(() => [1, 2, 3].every((number) => segments(number) <= 4), 'old segments are removed', 90_000);
    const { wal } = await platform.cliJson<{ wal: { timeline_id: string; kept_size: number }[] }>(['status']);
    assert(wal.find((each) => each.timeline_id === timelineId)!.kept_size < 70_000_000);
  });

  test('is printed from its beginning, and found by LSN', async () => {
    const { stdout } = await platform.cli(['wal', 'dump', '--rmgr', 'Transaction', '--output', 'json']);
    const lines = stdout.trim().split('\n');
    assert(lines.length >= 3, `${lines.length} transactions`);
    await platform.cli(['branches', 'create', '--name', 'half', '--at', middle]);
    const half = (await platform.cli(['connection-string', 'half'])).stdout.trim();
    assert.equal(await platform.psql('SELECT count(*) FROM long', half), String(ROWS / 2));
  });

  test('is not needed to give a safekeeper its log anew: it begins where the others’ disks do', async () => {
    await platform.stop();
    rmSync(join(platform.dataDir, 'safekeeper-2'), { recursive: true });
    await platform.start();
    await platform.psql('CREATE TABLE after_loss (n int)');
    const status = await withServices(async ([first, second]) => {
      let found: SafekeeperTimelineStatus | undefined;
      await waitUntil(async () => {
        found = await second!.status(tenantId, timelineId).catch(() => undefined);
        const other = await first!.status(tenantId, timelineId);
        return found !== undefined && found.isVoter && found.flushLsn >= other.commitLsn;
      }, 'it has caught up and votes');
      return found!;
    });
    assert(status.localStartLsn > status.startLsn, 'not from the beginning');
    assert(segments(2) <= 5);
    platform.killService('safekeeper 1');
    await platform.psql('INSERT INTO after_loss VALUES (1)');
    assert.equal(await platform.psql('SELECT count(*) FROM long'), String(ROWS));
  });

  test('is not needed to replace a safekeeper either, when it has left the object store too', async () => {
    await waitUntil(async () => {
      const { safekeepers } = await platform.cliJson<{ safekeepers: { state: string }[] }>(['safekeepers']);
      return safekeepers.every(({ state }) => state === 'up');
    }, 'all are up');
    const wal = new OffloadedWal(await openObjectStore(join(platform.dataDir, 'object-store')));
    const { localStartLsn } = await withServices(([, second]) => second!.status(tenantId, timelineId));
    await wal.removeBefore({ tenantId, timelineId }, localStartLsn);
    await platform.cli(['safekeepers', 'replace', '2']);
    const status = await withServices(([, , last]) => last!.status(tenantId, timelineId));
    assert(status.isVoter && status.localStartLsn > status.startLsn, 'it does not begin at the beginning');
    platform.killService('safekeeper 3');
    await platform.psql('INSERT INTO after_loss VALUES (2)');
    assert.equal(await platform.psql('SELECT count(*) FROM after_loss'), '2');
    assert.equal(await platform.psql('SELECT count(*) FROM long'), String(ROWS));
  });
});
