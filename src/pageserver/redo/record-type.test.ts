import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { test } from 'node:test';

import { otherWorkload } from '../../../test/redo/other-workload.ts';
import { LOGICAL_TYPES, TYPES_NOT_MADE, heapTypes, otherTypes } from '../../../test/redo/record-types.ts';
import { recordWal } from '../../../test/redo/recorded-wal.ts';
import type { WorkloadSessions } from '../../../test/redo/recorded-wal.ts';
import { formatLsn } from '../../postgres/lsn.ts';
import { PG_VERSIONS } from '../../postgres/version.ts';
import type { PgVersion } from '../../postgres/version.ts';
import { openWalDirectory } from '../wal-directory.ts';
import { dumpWal } from '../wal-dump.ts';
import type { RecordSummary } from '../wal-dump.ts';
import { verifyWal } from '../wal-verify.ts';
import { indexRecordTypes } from './index-tuple.ts';
import { recordTypes } from './record-type.ts';

/** Other builds to run on besides npm's: bin folders, separated by colons. */
const BIN_DIRS = [undefined, ...(process.env['STRATA_TEST_PG_BIN_DIRS'] ?? '').split(':').filter((dir) => dir !== '')];
/** The only pg_waldump that a package of ours brings is a distribution's. */
const DEBIAN_BIN_DIR = '/usr/lib/postgresql/15/bin';

const TIME = /\d{4}-\d\d-\d\d [\d:.]+(\+00| UTC)/g;
const LEFT_OUT =
  /; relcache init file inval dbid \d+ tsid \d+|; inval msgs:[^;,]*|; (commit|abort) dropped stats:[^;]*|, (offsets|deleted|updated): ?\[.*/g;

for (const version of PG_VERSIONS) {
  test(`the workloads make every record type of Postgres ${version} appear, but for those with a reason`, () => {
    const made = new Set([
      ...heapTypes(version),
      ...LOGICAL_TYPES,
      ...otherTypes(version),
      ...indexRecordTypes(),
      ...Object.keys(TYPES_NOT_MADE),
    ]);
    assert.deepEqual(
      recordTypes(version).filter((type) => !made.has(type)),
      [],
    );
    const known = new Set(recordTypes(version));
    assert.deepEqual(
      [...made].filter((type) => !known.has(type)),
      [],
    );
  });
}

for (const pgBinDir of BIN_DIRS) {
  const where = pgBinDir === undefined ? '' : ` (${pgBinDir})`;
  test(`records that change no page of an access method all appear and are known${where}`, async () => {
    using wal = await recordWal(otherWorkload, { pgBinDir });
    const report = await verifyWal(await openWalDirectory(wal.directory));
    const types = new Set(report.types.map(({ rmgr, type }) => `${rmgr}/${type}`));
    assert.deepEqual(
      otherTypes(wal.version).filter((type) => !types.has(type)),
      [],
      'types that never appeared',
    );
    const known = new Set(recordTypes(wal.version));
    assert.deepEqual(
      [...types].filter((type) => !known.has(type)),
      [],
      'types that have no name',
    );
    assert.equal(report.mismatches, 0);
    assert.equal(report.resumesAtLsn, undefined);
    assert.deepEqual(
      report.types.filter(({ refused }) => refused > 0).map(({ rmgr }) => rmgr),
      ['Tablespace', 'Tablespace'],
    );
  });
}

/** Every usual type of record. */
async function usualWorkload({ sql }: Pick<WorkloadSessions, 'sql'>): Promise<void> {
  await sql(`CREATE TABLE t (id int PRIMARY KEY, n int, p point)`);
  await sql(`INSERT INTO t SELECT i, i % 7, point(i, i) FROM generate_series(1, 500) i`);
  for (const method of ['gist (p)', 'brin (n)', 'hash (n)', 'spgist (p)'])
    await sql(`CREATE INDEX ON t USING ${method}`);
  await sql(`UPDATE t SET n = n + 1 WHERE id % 3 = 0`);
  await sql(`DELETE FROM t WHERE id % 2 = 0`);
  await sql(`VACUUM t`);
  await sql(`INSERT INTO t SELECT i, 1, point(i, i) FROM generate_series(2000, 9000) i`);
  await sql(`DELETE FROM t WHERE id > 2500`);
  await sql(`VACUUM (FREEZE) t`);
  await sql(`CREATE INDEX t_n ON t (n); INSERT INTO t SELECT -i, 1, NULL FROM generate_series(1, 2000) i`);
  await sql(`VACUUM t`);
  await sql(`BEGIN; SAVEPOINT s; SELECT * FROM t WHERE id < 9 FOR UPDATE; CREATE TABLE u (n int); COMMIT`);
  await sql(`BEGIN; DROP TABLE u; ROLLBACK`);
  await sql(`BEGIN; CREATE TABLE v (n int); INSERT INTO v VALUES (1); PREPARE TRANSACTION 'p'`);
  await sql(`COMMIT PREPARED 'p'`);
  await sql(`UPDATE v SET n = 2`);
  await sql(`TRUNCATE v; DROP TABLE u`);
  await sql(`SELECT pg_create_restore_point('here')`);
  await sql(`CHECKPOINT`);
}

test('a dump says of each record what pg_waldump says', { skip: !existsSync(DEBIAN_BIN_DIR) }, async () => {
  const settings = `wal_consistency_checking = 'all'\nfull_page_writes = on`;
  using wal = await recordWal(usualWorkload, { pgBinDir: DEBIAN_BIN_DIR, settings });
  const ours: string[] = [];
  const ourWords: RecordSummary[] = [];
  await dumpWal(await openWalDirectory(wal.directory, wal.startLsn), {}, (records) => {
    for (const record of records) {
      const blocks = record.blocks.map(({ id, spc, db, rel, blk, image }) => {
        const suffix = image === undefined ? '' : image === 'to apply' ? ' FPW' : ' FPW for WAL verification';
        return `#${id} ${spc}/${db}/${rel} ${blk}${suffix}`;
      });
      const { rmgr, type, recordBytes, totalBytes, xid, lsn } = record;
      ours.push([rmgr, type, recordBytes, totalBytes, xid, formatLsn(lsn), ...blocks].join(' '));
      ourWords.push(record);
    }
  });
  // pg_waldump ends with an error at the end of WAL.
  const command = `pg_waldump -p "$0" -s "$1" 2>/dev/null || true`;
  const output = execFileSync('/bin/sh', ['-c', command, wal.directory, formatLsn(wal.startLsn)], {
    encoding: 'utf8',
    maxBuffer: 1 << 28,
    env: { PATH: `${DEBIAN_BIN_DIR}:/usr/bin:/bin`, TZ: 'UTC' },
  });
  const lines = output.trimEnd().split('\n');
  assert.deepEqual(ours, lines.map(parseLine));
  const words = lines.map((line) => line.replace(/.* desc: \S+ /, '').replace(/, blkref #0.*/, ''));
  assertDescriptions(ourWords, words, wal.version);
});

for (const pgBinDir of BIN_DIRS) {
  const where = pgBinDir === undefined ? '' : ` (${pgBinDir})`;
  test(`a dump says of each record what the server itself says${where}`, async () => {
    const words = new Map<string, string>();
    const workload = async ({ sql }: WorkloadSessions): Promise<void> => {
      await sql(`CREATE EXTENSION pg_walinspect; SET timezone = 'UTC'`);
      const { rows: starts } = await sql('SELECT pg_current_wal_flush_lsn() AS lsn');
      await usualWorkload({ sql });
      const { lsn } = starts[0] as { lsn: string };
      const { rows } = await sql(
        `SELECT start_lsn::text AS lsn, description FROM pg_get_wal_records_info('${lsn}', pg_current_wal_flush_lsn())`,
      );
      for (const row of rows as { lsn: string; description: string }[]) words.set(row.lsn, row.description);
    };
    using wal = await recordWal(workload, { pgBinDir });
    const records: RecordSummary[] = [];
    await dumpWal(await openWalDirectory(wal.directory, wal.startLsn), {}, (some) => {
      records.push(...some.filter(({ lsn }) => words.has(formatLsn(lsn))));
    });
    const theirs = records.map(({ lsn }) => words.get(formatLsn(lsn))!);
    assertDescriptions(records, theirs, wal.version);
  });
}

/** Every description that we have is theirs, but for what we leave out; and the usual types have one. */
function assertDescriptions(records: readonly RecordSummary[], theirs: readonly string[], version: PgVersion): void {
  const described = new Set<string>();
  for (const [i, { rmgr, type, description }] of records.entries()) {
    if (description === '') continue;
    described.add(`${rmgr}/${type.replace('+INIT', '')}`);
    const words = theirs[i]!.replace(LEFT_OUT, '');
    // The server writes times in another form than pg_waldump.
    assert.equal(description.replace(TIME, 'time'), words.replace(TIME, 'time'), `${rmgr}/${type}: ${theirs[i]}`);
  }
  const usual = 'INSERT DELETE UPDATE HOT_UPDATE LOCK INPLACE'.split(' ').map((type) => `Heap/${type}`);
  usual.push('Heap2/VISIBLE', 'Heap2/MULTI_INSERT');
  if (version === 15) usual.push('Heap2/PRUNE', 'Heap2/VACUUM', 'Heap2/FREEZE_PAGE');
  usual.push(...['INSERT_LEAF', 'INSERT_UPPER', 'SPLIT_R', 'DEDUP', 'VACUUM'].map((type) => `Btree/${type}`));
  usual.push(...['MARK_PAGE_HALFDEAD', 'UNLINK_PAGE', 'NEWROOT'].map((type) => `Btree/${type}`));
  usual.push(...['COMMIT', 'ABORT', 'PREPARE', 'COMMIT_PREPARED'].map((type) => `Transaction/${type}`));
  usual.push('XLOG/CHECKPOINT_ONLINE', 'XLOG/RESTORE_POINT');
  usual.push('Storage/CREATE', 'Storage/TRUNCATE', 'Standby/RUNNING_XACTS', 'Standby/LOCK');
  assert.deepEqual(
    usual.filter((type) => !described.has(type)),
    [],
  );
}

/** A line of pg_waldump in the words above. */
function parseLine(line: string): string {
  const match =
    /^rmgr: (\S+) +len \(rec\/tot\): +(\d+)\/ *(\d+), tx: +(\d+), lsn: ([0-9A-F]+)\/([0-9A-F]+), prev \S+, desc: ([^ ,;]+)/.exec(
      line,
    );
  assert(match !== null, line);
  const [, rmgr, recordBytes, totalBytes, xid, high, low, type] = match;
  const blocks = [
    ...line.matchAll(/blkref #(\d+): rel (\S+)(?: fork \S+)? blk (\d+)( FPW(?: for WAL verification)?)?/g),
  ];
  const blockTexts = blocks.map(([, id, relation, blk, image]) => `#${id} ${relation} ${blk}${image ?? ''}`);
  const lsn = `${high}/${low!.replace(/^0+(?=.)/, '')}`;
  return [rmgr, type, recordBytes, totalBytes, xid, lsn, ...blockTexts].join(' ');
}
