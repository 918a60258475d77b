/**
 * The pageserver's disk is a cache: with an empty one it serves every branch, at any LSN, from the object store and the safekeepers; and while the store is away, all goes
 * on that does not need it.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { isDeepStrictEqual } from 'node:util';
import { parseIndexName } from '../../src/pageserver/remote/object-names.ts';
import { FaultProxy } from '../object-store/fault-proxy.ts';
import { startS3rver } from '../object-store/s3-servers.ts';
import type { S3Server } from '../object-store/s3-servers.ts';
import { TestPlatform, waitUntil } from './platform.ts';

interface StoreStatus {
  /** Not there while the pageserver does not answer. */
  readonly object_store?: { readonly location: string; readonly pending_branches: number; readonly failure?: string };
}

const SUM = "SELECT count(*) || ' ' || coalesce(sum(hashtext(id || note)::bigint), 0) FROM orders";

async function connectionString(platform: TestPlatform, branch: string): Promise<string> {
  return (await platform.cli(['connection-string', branch])).stdout.trim();
}

async function isUploaded(platform: TestPlatform): Promise<boolean> {
  const { object_store: store } = await platform.cliJson<StoreStatus>(['status']);
  return store?.pending_branches === 0 && store.failure === undefined;
}

function layerFiles(platform: TestPlatform): string[] {
  const found = readdirSync(join(platform.dataDir, 'pageserver/timelines'), { recursive: true, encoding: 'utf8' });
  return found.filter((name) => name.includes('__'));
}

/** Writes to several branches, and reads them again when the pageserver's disk is empty. */
async function survivesEmptyDisk(platform: TestPlatform): Promise<void> {
  await platform.psql(
    "CREATE TABLE orders AS SELECT i AS id, 'order ' || i AS note FROM generate_series(1, 30000) AS i",
  );
  const oldLsn = await platform.psql('SELECT pg_current_wal_insert_lsn()');
  const oldSum = await platform.psql(SUM);
  await platform.cli(['branches', 'create', '--name', 'dev']);
  await platform.psql('UPDATE orders SET note = note || $$!$$ WHERE id % 7 = 0');
  const dev = await connectionString(platform, 'dev');
  await platform.psql("INSERT INTO orders SELECT i, 'dev' FROM generate_series(1, 5000) AS i", dev);
  await platform.cli(['branches', 'create', '--name', 'dev2', '--parent', 'dev']);
  const dev2 = await connectionString(platform, 'dev2');
  await platform.psql('DELETE FROM orders WHERE id > 20000', dev2);
  const sums = [await platform.psql(SUM), await platform.psql(SUM, dev), await platform.psql(SUM, dev2)];
  await platform.stop();
  rmSync(join(platform.dataDir, 'pageserver'), { recursive: true });
  rmSync(join(platform.dataDir, 'computes'), { recursive: true, force: true });
  await platform.start();
  assert.deepEqual(layerFiles(platform).length < 5, true, 'layers are fetched when they are read');
  assert.deepEqual([await platform.psql(SUM), await platform.psql(SUM, dev), await platform.psql(SUM, dev2)], sums);
  await platform.cli(['branches', 'create', '--name', 'before', '--at', oldLsn]);
  assert.equal(await platform.psql(SUM, await connectionString(platform, 'before')), oldSum);
  // It goes on from there, and another loss is as good.
  await platform.psql("INSERT INTO orders VALUES (0, 'after')");
  const sum = await platform.psql(SUM);
  await waitUntil(() => isUploaded(platform), 'all is uploaded');
  await platform.killEverything();
  rmSync(join(platform.dataDir, 'pageserver'), { recursive: true });
  rmSync(join(platform.dataDir, 'computes'), { recursive: true, force: true });
  await platform.start();
  assert.equal(await platform.psql(SUM), sum);
  assert.equal(await platform.psql(SUM, dev2), sums[2]);
}

describe('with the object store in a directory', () => {
  let platform: TestPlatform;

  before(async () => {
    platform = await TestPlatform.start();
  });
  after(async () => {
    await platform.destroy();
  });

  test('a pageserver whose directory was removed serves every branch, old LSNs too', { timeout: 240_000 }, async () => {
    await survivesEmptyDisk(platform);
  });

  test('a store that is empty or another is refused', { timeout: 120_000 }, async () => {
    await platform.stop();
    const other = mkdtempSync(join(tmpdir(), 'strata-other-'));
    const refused = new RegExp(`${other} does not have what is in .*object-store: start with --object-store`);
    await assert.rejects(
      TestPlatform.start({ dataDir: platform.dataDir, args: ['--object-store', other] }),
      ({ message }: Error) => refused.test(message),
    );
    rmSync(other, { recursive: true });
    await platform.start();
    assert.match(await platform.psql(SUM), /^\d+ -?\d+$/);
  });

  test(
    'one whose content is lost is filled again from the local disk, when that is said',
    { timeout: 240_000 },
    async () => {
      const dev2 = await connectionString(platform, 'dev2');
      const sums = [await platform.psql(SUM), await platform.psql(SUM, dev2)];
      await platform.stop();
      // What an index was before it changed stays for a while, and is not to come back.
      const timelines = (): readonly string[] => {
        const names = readdirSync(join(platform.dataDir, 'object-store', 'indexes'), {
          recursive: true,
          encoding: 'utf8',
        });
        const found = names.flatMap((name) => parseIndexName(`indexes/${name}`) ?? []);
        const deleted = new Set(found.filter(({ isDeleted }) => isDeleted).map(({ timelineId }) => timelineId));
        return [...new Set(found.map(({ timelineId }) => timelineId))].filter((id) => !deleted.has(id)).sort();
      };
      const before = timelines();
      assert(before.length >= 3, `${before.length} timelines`);
      rmSync(join(platform.dataDir, 'object-store'), { recursive: true });
      await assert.rejects(TestPlatform.start({ dataDir: platform.dataDir }), /--refill-object-store fills this one/);
      await platform.start(['--refill-object-store']);
      const isBack = async (): Promise<boolean> =>
        isDeepStrictEqual(timelines(), before) && (await isUploaded(platform));
      await waitUntil(isBack, 'all is uploaded again', 60_000);
      const { stdout } = await platform.cli(['scrub', '--sample', '50']);
      assert.match(stdout, /damaged or missing +0/);
      await platform.stop();
      rmSync(join(platform.dataDir, 'pageserver'), { recursive: true });
      rmSync(join(platform.dataDir, 'computes'), { recursive: true, force: true });
      await platform.start();
      assert.deepEqual([await platform.psql(SUM), await platform.psql(SUM, dev2)], sums);
    },
  );
});

describe('with the object store in S3', () => {
  let server: S3Server;
  let proxy: FaultProxy;
  let platform: TestPlatform;
  const environment = { ...process.env };

  before(async () => {
    server = await startS3rver();
    proxy = await FaultProxy.start(server.endpoint);
    process.env['AWS_ACCESS_KEY_ID'] = server.credentials!.accessKeyId;
    process.env['AWS_SECRET_ACCESS_KEY'] = server.credentials!.secretAccessKey;
    const url = `s3://${server.bucket}/platform?endpoint=${proxy.url}&region=us-east-1`;
    platform = await TestPlatform.start({ args: ['--object-store', url] });
  });
  after(async () => {
    await platform?.destroy();
    await proxy?.stop();
    await server?.stop();
    process.env = environment;
  });

  test('a pageserver whose directory was removed serves every branch, old LSNs too', { timeout: 240_000 }, async () => {
    await survivesEmptyDisk(platform);
    const { object_store: store } = await platform.cliJson<StoreStatus>(['status']);
    assert.match(store?.location ?? '', /^s3:/);
  });

  test('while the store is away commits and reads go on, and it is caught up with', { timeout: 240_000 }, async () => {
    await platform.psql('SELECT 1');
    proxy.chooseFault = () => ({ kind: 'refuse' });
    await platform.psql("INSERT INTO orders SELECT i, 'while it was away' FROM generate_series(1, 2000) AS i");
    const sum = await platform.psql(SUM);
    // A pageserver that dies comes back on its disk, and goes on.
    platform.killService('pageserver');
    assert.equal(await platform.psql(SUM), sum);
    await platform.psql("INSERT INTO orders VALUES (-1, 'and again')");
    proxy.chooseFault = () => undefined;
    const sumAfter = await platform.psql(SUM);
    await waitUntil(() => isUploaded(platform), 'all is uploaded', 60_000);
    await platform.cli(['branches', 'create', '--name', 'later']);
    assert.equal(await platform.psql(SUM, await connectionString(platform, 'later')), sumAfter);
    await platform.stop();
    rmSync(join(platform.dataDir, 'pageserver'), { recursive: true });
    rmSync(join(platform.dataDir, 'computes'), { recursive: true, force: true });
    await platform.start();
    assert.equal(await platform.psql(SUM), sumAfter);
  });
});
