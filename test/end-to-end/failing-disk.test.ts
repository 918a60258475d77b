/** A whole platform while its pageserver's disk fails: commits and reads go on, what fails says so, and it is taken up again by itself. */
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { FaultyDisk } from '../pageserver/faulty-disk.ts';
import type { Fault } from '../pageserver/faulty-disk.ts';
import { TestPlatform, waitUntil } from './platform.ts';

describe('a platform whose pageserver’s disk fails', () => {
  let scratch: string;
  let platform: TestPlatform | undefined;
  let disk: FaultyDisk | undefined;
  let rows = 0;

  before(async () => {
    scratch = mkdtempSync(join(tmpdir(), 'strata-failing-disk-'));
    const dataDir = join(scratch, 'data');
    mkdirSync(dataDir);
    disk = FaultyDisk.make(join(dataDir, 'pageserver'), scratch, 'pageserver');
    if (disk === undefined) return;
    const env = { ...disk.environment, STRATA_TEST_LEASE_SECONDS: '1' };
    platform = await TestPlatform.start({ dataDir, env });
    await platform.psql('CREATE TABLE t (id int PRIMARY KEY, pad text)');
  });
  after(async () => {
    await platform?.destroy();
    rmSync(scratch, { recursive: true, force: true });
  });

  async function commit(): Promise<void> {
    await platform!.psql(`INSERT INTO t SELECT i, md5(i::text) FROM generate_series(${rows + 1}, ${rows + 500}) i`);
    rows += 500;
    assert.equal(await platform!.psql('SELECT count(*) FROM t'), String(rows));
  }

  for (const [fault, word] of [
    ['no space', 'ENOSPC'],
    ['failing fsync', 'EIO'],
  ] as const satisfies readonly (readonly [Fault, string])[]) {
    test(`${fault}: commits go on, a flush says why it fails, and works again afterwards`, async (context) => {
      if (platform === undefined || disk === undefined) return context.skip('there is no C compiler');
      await commit();
      disk.fail(fault);
      await commit();
      // It flushes what is in memory first.
      await waitUntil(async () => {
        const failure = await platform!.cli(['storage', '--collect']).then(
          () => '',
          (error: unknown) => String(error),
        );
        return failure.includes(word);
      }, `the failure names ${word}`);
      await commit();
      assert(disk.recover() > 0);
      await waitUntil(
        () =>
          platform!.cli(['storage', '--collect']).then(
            () => true,
            () => false,
          ),
        'it flushes again',
      );
    });
  }

  test('garbage in every layer: ingest goes on after a repair, and every row is right from nothing', async (context) => {
    if (platform === undefined) return context.skip('there is no C compiler');
    await platform.cli(['storage', '--collect']);
    const timelines = join(platform.dataDir, 'pageserver', 'timelines');
    let damagedCount = 0;
    for (const folder of readdirSync(timelines)) {
      for (const name of readdirSync(join(timelines, folder))) {
        if (!/__[0-9A-F]{16}-[0-9A-F]{16}/.test(name)) continue; // deltas: an import's layers no WAL can replace
        const path = join(timelines, folder, name);
        const bytes = readFileSync(path);
        for (let at = 50; at < bytes.length; at += 500) bytes[at]! ^= 0x55;
        writeFileSync(path, bytes);
        damagedCount++;
      }
    }
    assert(damagedCount > 0);
    const before = platform.killService('pageserver');
    await waitUntil(
      () => platform!.descendants().some(({ pid, command }) => command.endsWith('pageserver') && pid !== before),
      'the pageserver is back',
    );
    await commit();
    await platform.cli(['branches', 'create', '--name', 'check']);
    const { stdout } = await platform.cli(['connection-string', 'check']);
    assert.equal(
      await platform.psql('SELECT count(*), count(*) FILTER (WHERE pad = md5(id::text)) FROM t', stdout.trim()),
      `${rows}|${rows}`,
    );
    assert.match(readFileSync(join(platform.dataDir, 'logs', 'pageserver.log'), 'utf8'), /damaged/);
  });
});
