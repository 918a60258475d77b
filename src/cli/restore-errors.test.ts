import assert from 'node:assert/strict';
import { test } from 'node:test';
import { RestoreErrors } from './restore-errors.ts';

const HARMLESS = `pg_restore: connecting to database for restore
pg_restore: creating EXTENSION "pageinspect"
pg_restore: while PROCESSING TOC:
pg_restore: from TOC entry 2; 3079 16404 EXTENSION pageinspect (no owner)
pg_restore: error: could not execute query: ERROR:  permission denied to create extension "pageinspect"
HINT:  Must be superuser to create this extension.
Command was: CREATE EXTENSION IF NOT EXISTS pageinspect WITH SCHEMA public;


pg_restore: creating ACL "public.TABLE items"
pg_restore: from TOC entry 3421; 0 0 ACL TABLE items postgres
pg_restore: error: could not execute query: ERROR:  role "app" does not exist
Command was: GRANT SELECT ON TABLE public.items TO app;


pg_restore: processing data for table "public.items"
`;

test('what an owner cannot restore is listed by entry, whatever the pieces in which it comes', () => {
  for (const size of [1, 7, 100_000]) {
    const errors = new RestoreErrors();
    for (let at = 0; at < HARMLESS.length; at += size) {
      assert.equal(errors.push(HARMLESS.slice(at, at + size)), undefined);
    }
    assert.deepEqual(errors.all, [
      {
        kind: 'EXTENSION',
        name: 'pageinspect',
        message: 'permission denied to create extension "pageinspect"',
        isFatal: false,
      },
      { kind: 'ACL', name: 'TABLE items', message: 'role "app" does not exist', isFatal: false },
    ]);
    assert.deepEqual([errors.tableCount, errors.currentTable], [1, 'public.items']);
  }
});

test('lost data, a broken rule about data and a lost connection are fatal', () => {
  const fatal = (entry: string, message: string) =>
    new RestoreErrors().push(
      `${entry === '' ? '' : `pg_restore: from TOC entry 7; 0 1 ${entry}\n`}pg_restore: error: ${message}\n`,
    );
  assert.equal(
    fatal('TABLE DATA t me', 'COPY failed for table "t": ERROR:  invalid byte sequence')?.kind,
    'TABLE DATA',
  );
  assert.ok(fatal('SEQUENCE SET S me', 'could not execute query: ERROR:  permission denied'));
  assert.ok(fatal('CONSTRAINT t t_pkey me', 'could not execute query: ERROR:  could not create unique index "t_pkey"'));
  assert.ok(
    fatal(
      'FK CONSTRAINT t fk me',
      'could not execute query: ERROR:  insert or update on table "t" violates foreign key constraint "fk"',
    ),
  );
  assert.ok(
    fatal('INDEX i me', 'could not execute query: FATAL:  terminating connection due to administrator command'),
  );
  assert.ok(fatal('', 'could not read from input file: end of file'));
  assert.equal(fatal('EVENT TRIGGER watch me', 'could not execute query: ERROR:  permission denied'), undefined);
});
