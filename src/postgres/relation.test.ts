import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { parseRelationPath, relationPath, relationSegmentPath } from './relation.ts';
import { PG_VERSIONS, toPgVersion, twoPhaseFileName, versionOfCatalog, versionOfWalMagic } from './version.ts';

test('relation files are named as Postgres names them', () => {
  assert.equal(relationPath({ spc: 1664, db: 0, rel: 1262, fork: 0 }, 17), 'global/1262');
  assert.equal(relationPath({ spc: 1663, db: 5, rel: 16384, fork: 2 }, 17), 'base/5/16384_vm');
  assert.equal(
    relationPath({ spc: 16400, db: 5, rel: 16384, fork: 3 }, 17),
    'pg_tblspc/16400/PG_17_202406281/5/16384_init',
  );
  assert.equal(relationSegmentPath({ spc: 1663, db: 5, rel: 16384, fork: 1, segment: 2 }, 17), 'base/5/16384_fsm.2');
  assert.throws(() => relationPath({ spc: 1663, db: 5, rel: 1, fork: 4 }, 17), RangeError);
});

test('a path is read back to what it names', () => {
  const oid = fc.integer({ min: 1, max: 0xffffffff });
  const place = fc.oneof(
    fc.constant({ spc: 1664, db: 0 }),
    fc.record({ spc: fc.constant(1663), db: oid }),
    fc.record({ spc: fc.integer({ min: 16384, max: 0xffffffff }), db: oid }),
  );
  fc.assert(
    fc.property(
      place,
      oid,
      fc.nat(3),
      fc.nat(40000),
      fc.constantFrom(...PG_VERSIONS),
      (where, rel, fork, segment, version) => {
        const file = { ...where, rel, fork, segment };
        assert.deepEqual(parseRelationPath(relationSegmentPath(file, version)), file);
      },
    ),
  );
});

test('other files of a data directory are no relation files', () => {
  for (const path of [
    'PG_VERSION',
    'base/5/PG_VERSION',
    'base/5/pg_filenode.map',
    'base/5/t3_16384',
    'base/5/16384_foo',
    'base/5/16384.0',
    'base/5/0',
    'base/5/016384',
    'base/16384',
    'global/pg_control',
    'pg_tblspc/16400/5/16384',
    'base/pgsql_tmp/pgsql_tmp1.0',
    '99999999999',
    'base/5/4294967296',
  ]) {
    assert.equal(parseRelationPath(path), undefined, path);
  }
});

test('a major is known by its WAL magic, its catalog version and its number', () => {
  assert.deepEqual([0xd110, 0xd113, 0xd116, 0xd118].map(versionOfWalMagic), [15, 16, 17, 18]);
  assert.deepEqual([202209061, 202307071, 202406281, 202506291].map(versionOfCatalog), [15, 16, 17, 18]);
  assert.equal(versionOfWalMagic(0xd119), undefined);
  assert.throws(() => toPgVersion(14), /Postgres 14 is not supported/);
});

test('a prepared transaction has a file of 8 digits until 16 and of 16 from 17 on', () => {
  assert.equal(twoPhaseFileName(16, 1, 0x2d0), '000002D0');
  assert.equal(twoPhaseFileName(17, 1, 0x2d0), '00000001000002D0');
});
