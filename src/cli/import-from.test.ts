import assert from 'node:assert/strict';
import { test } from 'node:test';
import { splitPassword, withoutPostgresVariables } from './import-from.ts';

test('a password is taken out of a connection string wherever libpq finds one', () => {
  const cases: readonly (readonly [from: string, uri: string, password?: string])[] = [
    ['postgresql://me@host/db', 'postgresql://me@host/db'],
    ['postgresql://me:a%40b%25@host:5432/db?sslmode=require', 'postgresql://me@host:5432/db?sslmode=require', 'a@b%'],
    ['postgres://me:secret@one:1,two:2/db', 'postgres://me@one:1,two:2/db', 'secret'],
    ['postgresql://me@/db?host=%2Ftmp&password=secret', 'postgresql://me@/db?host=%2Ftmp', 'secret'],
    ['postgresql:///db?password=secret&host=x', 'postgresql:///db?host=x', 'secret'],
    ['postgresql://[::1]:5432/db', 'postgresql://[::1]:5432/db'],
    ['postgresql://me:@host', 'postgresql://me@host'],
    ['postgresql://host/db?options=endpoint%3Dep-x', 'postgresql://host/db?options=endpoint%3Dep-x'],
  ];
  for (const [from, uri, password] of cases) {
    assert.deepEqual(splitPassword(from), password === undefined ? { uri } : { uri, password });
  }
});

test('what is none is refused without being quoted', () => {
  for (const from of ['host=x password=secret', 'mysql://me:secret@host', 'postgresql://me:secret%@host']) {
    assert.throws(
      () => splitPassword(from),
      (error: Error) => !error.message.includes('secret'),
    );
  }
});

test('what the environment says of the source is not said of the target', () => {
  const environment = { PATH: '/bin', PGHOSTADDR: '10.0.0.1', PGSERVICE: 'shop', PGPASSWORD: 'secret', HOME: '/root' };
  assert.deepEqual(withoutPostgresVariables(environment), { PATH: '/bin', HOME: '/root' });
});
