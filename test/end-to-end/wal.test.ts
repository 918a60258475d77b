/**
 * `strata wal`: what a branch's WAL says, and whether redo makes of WAL what Postgres made, as commands.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { parseLsn, segmentStart } from '../../src/postgres/lsn.ts';
import { recordWal } from '../redo/recorded-wal.ts';
import { TestPlatform } from './platform.ts';

interface DumpedRecord {
  readonly lsn: string;
  readonly end_lsn: string;
  readonly prev_lsn: string;
  readonly rmgr: string;
  readonly type: string;
  readonly blocks: readonly { readonly rel: number }[];
}

describe('strata wal dump', () => {
  let platform: TestPlatform;
  let relation: string;

  before(async () => {
    platform = await TestPlatform.start();
    await platform.psql('CREATE TABLE noted (n int)');
    await platform.psql('INSERT INTO noted VALUES (1)');
    const columns = 'CASE reltablespace WHEN 0 THEN 1663 ELSE reltablespace END, pg_relation_filenode(c.oid)';
    relation = await platform.psql(
      `SELECT concat_ws('/', spc, db, node) FROM (SELECT ${columns}, d.oid FROM pg_class c, pg_database d
         WHERE relname = 'noted' AND datname = current_database()) AS _ (spc, node, db)`,
    );
  });
  after(async () => {
    await platform.destroy();
  });

  async function dump(...args: string[]): Promise<DumpedRecord[]> {
    const { stdout } = await platform.cli(['wal', 'dump', ...args, '--output', 'json']);
    return stdout
      .split('\n')
      .filter((line) => line !== '')
      .map((line) => JSON.parse(line) as DumpedRecord);
  }

  test('a connection string opens the WAL of its branch, the same one after a restart, and nothing else', async () => {
    const text = async (...args: string[]): Promise<string> =>
      (await platform.cli(['wal', 'connection-string', ...args])).stdout.trim();
    const conninfo = await text();
    const identify = (target: string): Promise<{ stdout: string }> =>
      promisify(execFile)('psql', ['-X', '-At', '-c', 'IDENTIFY_SYSTEM', `${target} replication=true`]);
    assert.match((await identify(conninfo)).stdout, /^\d+\|1\|[0-9A-F]+\/[0-9A-F]+\|$/m);
    const passfile = join(platform.dataDir, 'wal.pgpass');
    const withoutSecret = await text('main', '--passfile', passfile);
    assert.doesNotMatch(withoutSecret, /password=/);
    assert.equal(statSync(passfile).mode & 0o777, 0o600);
    assert.match((await identify(withoutSecret)).stdout, /\|1\|/);
    await platform.cli(['branches', 'create', '--name', 'other']);
    const other = /user=(\S+)/.exec(await text('other'))![1]!;
    await assert.rejects(identify(conninfo.replace(/user=\S+/, `user=${other}`)), /not for timeline/);
    await platform.stop();
    await platform.start();
    assert.match((await identify(conninfo)).stdout, /\|1\|/, 'the ports are kept');
  });

  test("shows a branch's records in order, filtered by relation, resource manager and count", async () => {
    const all = await dump();
    for (let i = 1; i < all.length; i++) assert.equal(all[i]!.prev_lsn, all[i - 1]!.lsn);
    assert(all.some(({ rmgr, type }) => rmgr === 'Transaction' && type === 'COMMIT'));
    const ofTable = await dump('main', '--relation', relation);
    assert.deepEqual(
      ofTable.map(({ rmgr, type }) => `${rmgr}/${type}`),
      ['Heap/INSERT+INIT'],
    );
    const commits = await dump('main', '--rmgr', 'transaction', '--limit', '2');
    assert.deepEqual([...new Set(commits.map(({ rmgr }) => rmgr)), commits.length], ['Transaction', 2]);
    const { stdout } = await platform.cli(['wal', 'dump', '--relation', relation]);
    assert.match(
      stdout,
      /^rmgr: Heap {8}len \(rec\/tot\): .* desc: INSERT\+INIT off:? 1,? flags:? 0x00, blkref #0: rel \d+\/\d+\/\d+ blk 0\n$/,
    );
  });

  test('begins where a branch does, and goes back through its parent when asked to', async () => {
    const lsn = await platform.psql('SELECT pg_current_wal_flush_lsn()');
    await platform.psql('INSERT INTO noted VALUES (2)');
    await platform.cli(['branches', 'create', '--name', 'dev']);
    const dev = (await platform.cli(['connection-string', 'dev'])).stdout.trim();
    await platform.psql('INSERT INTO noted VALUES (3)', dev);
    await platform.psql('INSERT INTO noted VALUES (4)');
    assert.equal((await dump('dev', '--relation', relation)).length, 1);
    const both = await dump('dev', '--relation', relation, '--start', lsn);
    assert.equal(both.length, 2);
    assert(both.every((record) => parseLsn(record.lsn) >= parseLsn(lsn)));
    const first = await dump('dev', '--relation', relation, '--start', lsn, '--end', both[0]!.end_lsn);
    assert.deepEqual(first, both.slice(0, 1));
    await assert.rejects(dump('dev', '--start', '0/100'), /no WAL at|is before the first record/);
    await assert.rejects(dump('nowhere'), /there is no branch/);
  });
});

describe('strata wal verify', () => {
  let directory: string;
  let start: number;

  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-verify-'));
    const version = process.env['STRATA_TEST_PG_BIN_DIR'];
    using wal = await recordWal(
      async ({ sql }) => {
        await sql('CREATE TABLE t (id int PRIMARY KEY, v text)');
        await sql('INSERT INTO t SELECT i, repeat($$x$$, i % 50) FROM generate_series(1, 2000) i');
        await sql('UPDATE t SET v = $$new$$ WHERE id % 7 = 0');
      },
      {
        settings: "wal_consistency_checking = 'all'",
        ...(version === undefined || version === '' ? {} : { pgBinDir: version }),
      },
    );
    cpSync(wal.directory, directory, { recursive: true });
    start = wal.startLsn;
  });
  after(() => rmSync(directory, { recursive: true, force: true }));

  function verify(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
    const executable = resolve(import.meta.dirname, '../../bin/strata');
    return new Promise((done) => {
      execFile(executable, ['wal', 'verify', directory, ...args], (error, stdout, stderr) => {
        done({ code: typeof error?.code === 'number' ? error.code : 0, stdout, stderr });
      });
    });
  }

  test('prints what was compared and exits with 0 when nothing differs', async () => {
    const { code, stdout, stderr } = await verify();
    assert.equal(code, 0, stderr);
    assert.match(stdout, /^RESOURCE MANAGER +TYPE +RECORDS +COMPARED/);
    assert.match(stdout, /^Btree +INSERT_LEAF +\d+ +[1-9]/m);
    assert.match(stdout, /^mismatches +0$/m);
    const json = JSON.parse((await verify('--output', 'json')).stdout) as Record<string, unknown>;
    assert.equal(json['mismatches'], 0);
    assert.equal(json['damage'], null);
    assert(Number(json['compared']) > 2000);
  });

  test('says where WAL is damaged, and exits with 1', async () => {
    const name = readdirSync(directory)
      .filter((each) => /^[0-9A-F]{24}$/.test(each))
      .sort()
      .at(-1)!;
    const path = join(directory, name);
    const bytes = readFileSync(path);
    const original = Buffer.from(bytes);
    bytes[start - segmentStart(start) + 100_000]! ^= 1;
    writeFileSync(path, bytes);
    const { code, stderr, stdout } = await verify();
    writeFileSync(path, original);
    assert.equal(code, 1, stdout);
    assert.match(stderr, /WAL at 0\/[0-9A-F]+: .*it goes on at 0\/[0-9A-F]+/);
  });

  test('refuses what is no directory of WAL', async () => {
    const executable = resolve(import.meta.dirname, '../../bin/strata');
    const failure = await new Promise<string>((done) => {
      execFile(executable, ['wal', 'verify', import.meta.dirname], (error, _stdout, stderr) => {
        done(`${String(error?.code)} ${stderr}`);
      });
    });
    assert.match(failure, /^1 strata: .*no WAL segments in/);
  });
});
