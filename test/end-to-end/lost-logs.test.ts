/** A majority of the safekeepers' disks, or all of them, lost: what was offloaded or ingested is there again, and it is said up to where. */
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import type { PlatformFile } from '../../src/api/control.ts';
import { PageserverClient } from '../../src/api/pageserver.ts';
import { readRebuiltLogs, type RebuiltLog } from '../../src/api/rebuilt-logs.ts';
import { SafekeeperClient } from '../../src/api/safekeeper.ts';
import { signToken } from '../../src/base/token.ts';
import { parseLsn, segmentOffset } from '../../src/postgres/lsn.ts';
import { FlushMark } from '../../src/safekeeper/flush-mark.ts';
import { segmentPath } from '../../src/safekeeper/wal-store.ts';
import { TestPlatform, waitUntil } from './platform.ts';

interface Rebuild {
  readonly done: boolean;
  readonly logs: readonly { kept_lsn: string; lost_lsn: string | null; source: string; safekeepers: number[] }[];
  readonly failed: readonly unknown[];
}

interface Listing {
  readonly safekeepers: readonly { state: string; behind_count: number }[];
}

interface Status {
  readonly rebuilt_logs: readonly {
    timeline_id: string;
    kept_lsn: string;
    lost_lsn: string | null;
    source: string;
    safekeepers: number[];
    damage: { origin: string; remedy: string }[];
  }[];
}

describe('safekeepers that have lost their disks', () => {
  let platform: TestPlatform;
  let rows = 0;

  before(async () => {
    platform = await TestPlatform.start({ env: { STRATA_TEST_OFFLOAD_SECONDS: '1' } });
    await platform.psql('CREATE TABLE kept (n int PRIMARY KEY, note text)');
  });
  after(async () => {
    await platform.destroy();
  });

  async function write(count: number): Promise<void> {
    await platform.psql(
      `INSERT INTO kept SELECT n, repeat('x', 500) FROM generate_series(${rows + 1}, ${rows + count}) AS n`,
    );
    rows += count;
  }

  async function assertAllThere(): Promise<void> {
    assert.equal(await platform.psql('SELECT count(*), max(n) FROM kept'), `${rows}|${rows}`);
  }

  /** Rebuilt logs know who their safekeepers are, before any leader has told them. */
  async function assertConfigured(): Promise<void> {
    const { timelineId, safekeeper, close } = await services();
    const { tenantId } = (await safekeeper.list()).find((each) => each.timelineId === timelineId)!;
    const { configuration, isVoter } = await safekeeper.status(tenantId, timelineId);
    await close();
    assert.deepEqual(configuration.members, [1, 2, 3]);
    assert(configuration.version > 0 && isVoter);
  }

  function loseDisks(...numbers: number[]): void {
    for (const number of numbers) rmSync(join(platform.dataDir, `safekeeper-${number}`), { recursive: true });
  }

  /** The first branch's timeline, as a safekeeper and the pageserver see it. */
  async function services(): Promise<{
    timelineId: string;
    safekeeper: SafekeeperClient;
    pageserver: PageserverClient;
    close: () => Promise<void>;
  }> {
    const [branch] = await platform.cliJson<{ timeline_id: string }[]>(['branches', 'list']);
    const file = JSON.parse(readFileSync(join(platform.dataDir, 'platform.json'), 'utf8')) as PlatformFile;
    const token = await signToken(platform.platformSecret, { scope: 'platform' });
    const safekeeper = new SafekeeperClient({ address: file.safekeepers[0]!, token });
    const pageserver = new PageserverClient({ ...file.pageserver, token });
    const close = async (): Promise<void> => {
      safekeeper.close();
      await pageserver.close();
    };
    return { timelineId: branch!.timeline_id, safekeeper, pageserver, close };
  }

  /** Everything committed is in the object store. */
  async function offloaded(): Promise<void> {
    const { timelineId, safekeeper, close } = await services();
    const { tenantId } = (await safekeeper.list()).find((each) => each.timelineId === timelineId)!;
    const isDone = async (): Promise<boolean> => {
      const status = await safekeeper.status(tenantId, timelineId);
      return status.offloadedLsn === status.commitLsn;
    };
    await waitUntil(isDone, 'the WAL is offloaded', 60_000);
    await close();
  }

  /** All pages are in the object store. */
  async function uploaded(): Promise<void> {
    const { timelineId, pageserver, close } = await services();
    const { commitLsn } = await pageserver.timelineStatus(timelineId);
    await pageserver.waitLsn(timelineId, commitLsn ?? 0, 10_000);
    const { lastRecordLsn } = await pageserver.timelineStatus(timelineId);
    await pageserver.flush(timelineId);
    const isDone = async (): Promise<boolean> =>
      (await pageserver.timelineStatus(timelineId)).remoteConsistentLsn >= lastRecordLsn;
    await waitUntil(isDone, 'the pages are uploaded');
    await close();
  }

  function rebuiltFile(): readonly RebuiltLog[] {
    return readRebuiltLogs(platform.dataDir);
  }

  async function rebuilt(): Promise<Status['rebuilt_logs']> {
    return (await platform.cliJson<Status>(['status'])).rebuilt_logs;
  }

  test('all of them, with everything offloaded: nothing is lost', async () => {
    await write(20_000);
    await offloaded();
    assert.deepEqual(await rebuilt(), []);
    await platform.killEverything();
    loseDisks(1, 2, 3);
    await platform.start(undefined, { STRATA_TEST_OFFLOAD_SECONDS: '600' }); // The next test wants WAL that is not there.
    assert.match(platform.output, /had lost the log of timeline [0-9a-f]{32}: rebuilt from the object store up to/);
    await assertConfigured();
    await assertAllThere();
    const [log] = await rebuilt();
    assert.equal(log?.source, 'object store');
    assert.deepEqual(log?.safekeepers, [1, 2, 3]);
    await write(1_000);
    await assertAllThere();
  });

  test('all of them, with the pageserver ahead of what is offloaded: its pages are the truth', async () => {
    await write(5_000);
    await uploaded();
    await platform.killEverything();
    loseDisks(1, 2, 3);
    await platform.start();
    await assertConfigured();
    await assertAllThere();
    assert.equal((await rebuilt()).at(-1)?.source, 'pageserver');
    await write(1_000);
    await assertAllThere();
  });

  test('two of three: the third one’s log is the truth; one alone is given it by the others, without a word', async () => {
    await write(500);
    await platform.killEverything();
    loseDisks(2, 3);
    await platform.start();
    await assertAllThere();
    const count = (await rebuilt()).length;
    assert.deepEqual((await rebuilt()).at(-1)?.safekeepers, [2, 3]);
    await write(500);
    await platform.stop();
    loseDisks(1);
    await platform.start();
    await write(500);
    await assertAllThere();
    assert.equal((await rebuilt()).length, count);
  });

  test('two that will not come back: given up when an operator says so, who is told before what is kept', async () => {
    const rebuild = async (...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> =>
      platform.cli(['safekeepers', 'rebuild', ...args]).then(
        (result) => ({ ...result, code: 0 }),
        (error: unknown) => error as { code: number; stdout: string; stderr: string },
      );
    assert.match((await rebuild('1', '2')).stderr, /safekeeper 1 answers: only who is gone can be given up/);
    await waitUntil(async () => {
      const { safekeepers } = await platform.cliJson<Listing>(['safekeepers']);
      return safekeepers.every(({ state, behind_count }) => state === 'up' && behind_count === 0);
    }, 'all have everything');
    await platform.stop();
    for (const id of [1, 2]) {
      renameSync(join(platform.dataDir, `safekeeper-${id}`), join(platform.dataDir, `was-${id}`));
      writeFileSync(join(platform.dataDir, `safekeeper-${id}`), 'a disk that does not work');
    }
    await platform.start();
    assert.match(platform.output, /safekeeper-1 stopped while starting .* the platform goes on without it/);
    const { safekeepers } = await platform.cliJson<Listing>(['safekeepers']);
    assert.deepEqual(
      safekeepers.map(({ state }) => state),
      ['down', 'down', 'up'],
    );
    assert.match((await rebuild('1')).stderr, /safekeeper 2 does not answer either/);
    assert.match((await rebuild('1', '9')).stderr, /there is no safekeeper 9/);

    const before = (await rebuilt()).length;
    const preview = await rebuild('1', '2', '--output', 'json');
    assert.equal(preview.code, 1);
    assert.match(preview.stderr, /nothing was changed: with --accept-loss it is done/);
    const plan = JSON.parse(preview.stdout) as Rebuild;
    assert.deepEqual([plan.done, plan.failed, plan.logs.length], [false, [], 1]);
    assert.deepEqual([plan.logs[0]?.source, plan.logs[0]?.safekeepers], ['another safekeeper', [1, 2]]);
    assert.equal((await rebuilt()).length, before);
    assert(statSync(join(platform.dataDir, 'safekeeper-1')).isFile(), 'nothing was touched');

    const done = await rebuild('1', '2', '--accept-loss');
    assert.equal(done.code, 0, done.stderr);
    assert.match(done.stdout, new RegExp(`first/main +${plan.logs[0]?.kept_lsn} .*another safekeeper +nothing`));
    await assertAllThere();
    await write(500);
    await assertAllThere();
    assert.equal((await rebuilt()).at(-1)?.kept_lsn, plan.logs[0]?.kept_lsn);
    const kept = readdirSync(platform.dataDir).filter((name) => name.includes('.given-up-'));
    assert.equal(kept.length, 2, 'what they kept is put aside');
  });

  /** Where the first branch's WAL ends now. */
  async function walEnd(): Promise<number> {
    return parseLsn((await platform.psql('SELECT pg_current_wal_flush_lsn()')).trim());
  }

  /** On safekeeper 1's disk. */
  function folderOf(timelineId: string): string {
    const disk = join(platform.dataDir, 'safekeeper-1');
    const tenantId = readdirSync(disk).find((name) => existsSync(join(disk, name, timelineId)));
    return join(disk, tenantId!, timelineId);
  }

  /** Changes more bytes on safekeeper 1's disk, soon after the LSN, than a record's padding has. */
  async function damage(timelineId: string, lsn: number): Promise<void> {
    const path = segmentPath(folderOf(timelineId), lsn + 4_000);
    const file = await open(path, 'r+');
    await file.write(Buffer.alloc(64, 0xff), 0, 64, segmentOffset(lsn + 4_000));
    await file.close();
  }

  async function firstTimeline(): Promise<string> {
    const { timelineId, close } = await services();
    await close();
    return timelineId;
  }

  test('two of three, and the third one’s disk has silently damaged what others have too: it is healed, and told', async () => {
    const timelineId = await firstTimeline();
    await write(500);
    const lsn = await walEnd();
    await write(500);
    await uploaded();
    await platform.stop();
    loseDisks(2, 3);
    await damage(timelineId, lsn);
    await platform.start(undefined, { STRATA_TEST_OFFLOAD_SECONDS: '600' }); // The next test wants WAL that is not there.
    assert.match(platform.output, /damaged in safekeeper 1 at/);
    const log = (await rebuilt()).at(-1)!;
    assert.deepEqual([log.safekeepers, log.lost_lsn, log.damage.length], [[1, 2, 3], null, 1]);
    assert.equal(log.damage[0]!.origin, 'safekeeper 1');
    assert(['copied', 'ingested'].includes(log.damage[0]!.remedy));
    await assertAllThere();
    await write(500);
    await assertAllThere();
  });

  test('two of three, and what only the third one has is damaged: nothing is given up before an operator was told', async () => {
    const timelineId = await firstTimeline();
    const client = await platform.connect();
    const insert = async (): Promise<void> => {
      const numbers = `generate_series(${rows + 1}, ${rows + 500})`;
      await client.query(`INSERT INTO kept SELECT n, repeat('x', 500) FROM ${numbers} AS n`);
      rows += 500;
    };
    await insert();
    const lsn = await walEnd();
    const keptRows = rows;
    const pageserver = platform.descendants().find(({ command }) => command.endsWith('pageserver'))!;
    process.kill(pageserver.pid, 'SIGSTOP');
    await insert();
    const endLsn = parseLsn(
      (await client.query<{ lsn: string }>('SELECT pg_current_wal_flush_lsn() AS lsn')).rows[0]!.lsn,
    );
    const mark = new FlushMark(folderOf(timelineId), () => {});
    await waitUntil(
      async () => ((await mark.read())?.flushLsn ?? 0) >= endLsn,
      'safekeeper 1 says how much is durable',
    );
    await platform.killEverything();
    await client.end().catch(() => {});
    loseDisks(2, 3);
    await damage(timelineId, lsn);
    const before = rebuiltFile().length;
    await platform.start();
    assert.match(platform.output, /can be had up to .* only, and may have been acknowledged up to/);
    assert.equal(rebuiltFile().length, before);

    const rebuild = async (...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> =>
      platform.cli(['safekeepers', 'rebuild', ...args]).then(
        (result) => ({ ...result, code: 0 }),
        (error: unknown) => error as { code: number; stdout: string; stderr: string },
      );
    const preview = await rebuild('--output', 'json');
    assert.equal(preview.code, 1);
    const plan = JSON.parse(preview.stdout) as Rebuild;
    const [log] = plan.logs;
    assert(log !== undefined && parseLsn(log.kept_lsn) >= lsn && parseLsn(log.lost_lsn!) > parseLsn(log.kept_lsn));
    const done = await rebuild('--accept-loss');
    assert.equal(done.code, 0, done.stderr);
    assert.match(done.stdout, new RegExp(`first/main +${log.kept_lsn} .* up to ${log.lost_lsn}`));
    rows = keptRows;
    await assertAllThere();
    await write(500);
    await assertAllThere();
  });

  test('a branch of it, and WAL after all that, are read as ever', async () => {
    await platform.cli(['branches', 'create', '--name', 'later']);
    const later = (await platform.cli(['connection-string', 'later'])).stdout.trim();
    assert.equal(await platform.psql('SELECT count(*) FROM kept', later), String(rows));
    const { stdout } = await platform.cli(['wal', 'dump', 'later', '--limit', '5']);
    assert.match(stdout, /rmgr/);
  });
});
