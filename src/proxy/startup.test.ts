import assert from 'node:assert/strict';
import { test } from 'node:test';
import { findTarget } from './startup.ts';

function target(options: string, serverName?: string): ReturnType<typeof findTarget> {
  return findTarget(
    new Map([
      ['user', 'alice'],
      ['options', options],
    ]),
    serverName,
  );
}

test('an endpoint in the options is taken out, the rest goes to Postgres', () => {
  const found = target('-c geqo=off endpoint=ep-calm-sea-12345678 -c work_mem=1MB');
  assert.equal(found.endpointId, 'ep-calm-sea-12345678');
  assert.equal(found.parameters.get('options'), '-c geqo=off -c work_mem=1MB');
  assert.equal(target('-c endpoint=ep-a-b-1').parameters.has('options'), false);
});

test('the TLS server name is used when the options name none', () => {
  assert.equal(target('', 'ep-calm-sea-12345678.db.example.com').endpointId, 'ep-calm-sea-12345678');
  assert.equal(target('', 'ep-calm-sea-12345678-pooler.db.example.com').endpointId, 'ep-calm-sea-12345678');
  assert.equal(target('', 'localhost').endpointId, undefined);
});

test('names that contradict each other, and malformed ones, are refused by value', () => {
  assert.throws(() => target('endpoint=ep-a-b-1', 'ep-a-b-2.example.com'), /"ep-a-b-1".*"ep-a-b-2"/);
  assert.throws(() => target('endpoint=ep-a endpoint=ep-b'), /"ep-a" and "ep-b"/);
  assert.throws(() => target('endpoint=../x'), /"\.\.\/x" is not an endpoint id/);
  assert.throws(() => findTarget(new Map(), undefined), /names no user/);
});

test('the database is the user when none is named', () => {
  assert.equal(target('').database, 'alice');
});
