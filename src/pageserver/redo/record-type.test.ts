import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { test } from 'node:test';

import { otherWorkload } from '../../../test/redo/other-workload.ts';
import { LOGICAL_TYPES, TYPES_NOT_MADE, heapTypes, otherTypes } from '../../../test/redo/record-types.ts';
import { recordWal } from '../../../test/redo/recorded-wal.ts';
import { formatLsn } from '../../postgres/lsn.ts';
import { PG_VERSIONS } from '../../postgres/version.ts';
import { openWalDirectory } from '../wal-directory.ts';
import { dumpWal } from '../wal-dump.ts';
import { verifyWal } from '../wal-verify.ts';
import { indexRecordTypes } from './index-tuple.ts';
import { recordTypes } from './record-type.ts';

/** Other builds to run on besides npm's: bin folders, separated by colons. */
const BIN_DIRS = [undefined, ...(process.env['STRATA_TEST_PG_BIN_DIRS'] ?? '').split(':').filter((dir) => dir !== '')];
/** The only pg_waldump that a package of ours brings is a distribution's. */
const DEBIAN_BIN_DIR = '/usr/lib/postgresql/15/bin';

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

test('a dump says of each record what pg_waldump says', { skip: !existsSync(DEBIAN_BIN_DIR) }, async () => {
  const workload = async ({ sql }: { sql: (text: string) => Promise<unknown> }): Promise<void> => {
    await sql(`CREATE TABLE t (id int PRIMARY KEY, n int, p point)`);
    await sql(`INSERT INTO t SELECT i, i % 7, point(i, i) FROM generate_series(1, 500) i`);
    for (const method of ['gist (p)', 'brin (n)', 'hash (n)', 'spgist (p)'])
      await sql(`CREATE INDEX ON t USING ${method}`);
    await sql(`UPDATE t SET n = n + 1 WHERE id % 3 = 0`);
    await sql(`DELETE FROM t WHERE id % 2 = 0`);
    await sql(`VACUUM t`);
  };
  const settings = `wal_consistency_checking = 'all'\nfull_page_writes = on`;
  using wal = await recordWal(workload, { pgBinDir: DEBIAN_BIN_DIR, settings });
  const ours: string[] = [];
  await dumpWal(await openWalDirectory(wal.directory, wal.startLsn), {}, (records) => {
    for (const record of records) {
      const blocks = record.blocks.map(({ id, spc, db, rel, blk, image }) => {
        const suffix = image === undefined ? '' : image === 'to apply' ? ' FPW' : ' FPW for WAL verification';
        return `#${id} ${spc}/${db}/${rel} ${blk}${suffix}`;
      });
      const { rmgr, type, recordBytes, totalBytes, xid, lsn } = record;
      ours.push([rmgr, type, recordBytes, totalBytes, xid, formatLsn(lsn), ...blocks].join(' '));
    }
  });
  // pg_waldump ends with an error at the end of WAL.
  const command = `pg_waldump -p "$0" -s "$1" 2>/dev/null || true`;
  const output = execFileSync('/bin/sh', ['-c', command, wal.directory, formatLsn(wal.startLsn)], {
    encoding: 'utf8',
    maxBuffer: 1 << 28,
    env: { PATH: `${DEBIAN_BIN_DIR}:/usr/bin:/bin` },
  });
  assert.deepEqual(ours, output.trimEnd().split('\n').map(parseLine));
});

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
