import assert from 'node:assert/strict';
import { createHash, createHmac, pbkdf2Sync } from 'node:crypto';
import { chmodSync, mkdtempSync, readFileSync, rmSync, statSync, unlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { test } from 'node:test';
import { ApiKeys } from './api-keys.ts';
import { connectionUri } from './connection-uri.ts';
import { quietSample } from './fake-world.ts';
import { newBranchId, newEndpointId, newProjectId, newTimelineId } from './ids.ts';
import { decodeCursor, encodeCursor } from './pagination.ts';
import { scramVerifier, SecretBox } from './secrets.ts';
import { State } from './state.ts';
import { decideSuspend } from './suspend.ts';
import { formatTimestampUs, parseTimestampUs } from './timestamps.ts';

function temporaryDirectory() {
  const path = mkdtempSync(join(tmpdir(), 'strata-state-'));
  return { path, [Symbol.dispose]: () => rmSync(path, { recursive: true }) };
}

test('ids have the forms that clients look for', () => {
  for (let count = 0; count < 1000; count++) {
    assert.match(newProjectId(), /^[a-z]+-[a-z]+-\d{8}$/);
    // What the published command line takes for a branch id; anything else is a name to it.
    assert.match(newBranchId(), /^br-[a-z0-9]+-[a-z0-9]+-[a-z0-9]+$/);
    assert.match(newEndpointId(), /^ep-[a-z]+-[a-z]+-\d{8}$/);
    assert.match(newTimelineId(), /^[0-9a-f]{32}$/);
  }
});

test('a verifier proves the password as RFC 5802 says', async () => {
  const verifier = await scramVerifier('correct horse', Buffer.from('0123456789abcdef'));
  const match = /^SCRAM-SHA-256\$(\d+):([^$]+)\$([^:]+):(.+)$/.exec(verifier)!;
  const salted = pbkdf2Sync('correct horse', Buffer.from(match[2]!, 'base64'), Number(match[1]), 32, 'sha256');
  const clientKey = createHmac('sha256', salted).update('Client Key').digest();
  assert.equal(createHash('sha256').update(clientKey).digest('base64'), match[3]);
  assert.equal(createHmac('sha256', salted).update('Server Key').digest('base64'), match[4]);
});

test('a sealed secret opens with its key and context only', () => {
  using directory = temporaryDirectory();
  const path = join(directory.path, 'key');
  const box = SecretBox.fromFile(path);
  assert.equal(statSync(path).mode & 0o777, 0o600);
  const sealed = box.seal('pässword', 'role a');
  assert.equal(SecretBox.fromFile(path).open(sealed, 'role a'), 'pässword');
  assert.throws(() => box.open(sealed, 'role b'), /role b/);
  for (let index = 0; index < sealed.length; index++) {
    const damaged = Buffer.from(sealed);
    damaged[index]! ^= 1;
    assert.throws(() => box.open(damaged, 'role a'), `byte ${index}`);
  }
  unlinkSync(path);
  assert.throws(() => SecretBox.fromFile(path).open(sealed, 'role a'));
});

test('a state file from a newer version is refused, with both versions named', () => {
  using directory = temporaryDirectory();
  const path = join(directory.path, 'state');
  State.open(path).close();
  const database = new DatabaseSync(path);
  database.exec('PRAGMA user_version = 99');
  database.close();
  assert.throws(() => State.open(path), /schema version 99.*up to \d+:/);
});

test('the state is private, journaled and flushed at each commit', () => {
  using directory = temporaryDirectory();
  const path = join(directory.path, 'state');
  const state = State.open(path);
  assert.equal(statSync(path).mode & 0o777, 0o600);
  assert.deepEqual({ ...state.get<object>('PRAGMA journal_mode') }, { journal_mode: 'wal' });
  assert.deepEqual({ ...state.get<object>('PRAGMA synchronous') }, { synchronous: 2 });
  state.close();
});

test('a transaction that throws leaves nothing, also around one that it joined', () => {
  using directory = temporaryDirectory();
  const state = State.open(join(directory.path, 'state'));
  const key = { name: 'k', hash: 'h', created_at: 1, last_used_at: null, last_used_from_addr: '' };
  assert.throws(() =>
    state.transaction(() => {
      state.transaction(() => state.insert('api_keys', key));
      throw new Error('after');
    }),
  );
  assert.deepEqual(state.all('SELECT * FROM api_keys'), []);
  state.transaction(() => state.insert('api_keys', key));
  assert.equal(state.all('SELECT * FROM api_keys').length, 1);
  state.close();
});

test('a transaction for which the disk has no room says so, leaves nothing, and the next one works', () => {
  using directory = temporaryDirectory();
  const state = State.open(join(directory.path, 'state'));
  const { page_count: pages } = state.get<{ page_count: number }>('PRAGMA page_count')!;
  state.get(`PRAGMA max_page_count = ${pages}`);
  const insert = (name: string, length: number): void =>
    void state.run('INSERT INTO settings (name, value) VALUES (?, ?)', name, 'x'.repeat(length));
  const fill = (): void => {
    insert('small', 1);
    insert('large', 1_000_000);
  };
  assert.throws(() => state.transaction(fill), /full/);
  state.transaction(() => insert('other', 1));
  assert.deepEqual(
    state.all<{ name: string }>('SELECT name FROM settings').map(({ name }) => name),
    ['other'],
  );
  state.close();
});

test('the first API key is private, works, and a lost file is replaced while the lost key stops working', () => {
  using directory = temporaryDirectory();
  const path = join(directory.path, 'api-key');
  const state = State.open(join(directory.path, 'state'));
  const keys = new ApiKeys(state, () => 5);
  keys.ensureFirstKey(path);
  const first = readFileSync(path, 'utf8').trim();
  chmodSync(path, 0o644);
  keys.ensureFirstKey(path);
  assert.equal(statSync(path).mode & 0o777, 0o600);
  assert.equal(readFileSync(path, 'utf8').trim(), first);
  keys.authenticate(`Bearer ${first}`, '127.0.0.1');

  unlinkSync(path);
  keys.ensureFirstKey(path);
  const second = readFileSync(path, 'utf8').trim();
  keys.authenticate(`bearer ${second}`, '127.0.0.1');
  for (const wrong of [undefined, '', 'Bearer', 'Bearer x', `Basic ${second}`, `Bearer ${first}`]) {
    assert.throws(() => keys.authenticate(wrong, '127.0.0.1'), { code: 'unauthorized' }, String(wrong));
  }
  state.close();
});

test('times are read to the microsecond, in any zone', () => {
  assert.equal(parseTimestampUs('1970-01-01T00:00:01.000002Z'), 1_000_002);
  assert.equal(parseTimestampUs('1970-01-01T01:00:01.5+01:00'), 1_500_000);
  assert.equal(parseTimestampUs('1970-01-01T00:00:00.1234567z'), 123_456);
  assert.equal(parseTimestampUs('2028-02-29T00:30:00+02:00'), Date.UTC(2028, 1, 28, 22, 30) * 1000);
  assert.equal(formatTimestampUs(1_000_002), '1970-01-01T00:00:01.000002Z');
  assert.equal(formatTimestampUs(1_500_000), '1970-01-01T00:00:01.500Z');
  for (const wrong of [
    '',
    'now',
    '2026-01-31',
    '2026-01-31T12:00:00',
    '2026-13-31T12:00:00Z',
    '2026-02-29T12:00:00+02:00',
    '2026-01-31T25:00:00Z',
  ]) {
    assert.throws(() => parseTimestampUs(wrong), { code: 'bad-request' }, wrong);
  }
});

test('cursors come back as they were, and others are refused', () => {
  assert.deepEqual(decodeCursor(encodeCursor([12, 'é/+'])), [12, 'é/+']);
  for (const wrong of ['', 'x', encodeCursor([]).slice(1), Buffer.from('{"a":1}').toString('base64url')]) {
    assert.throws(() => decodeCursor(wrong), { code: 'bad-request' }, wrong);
  }
});

test('connection strings quote what needs quoting', () => {
  const parts = { host: '::1', port: 1, role: 'a b', password: 'p@:/?#', database: 'd/b', endpointId: 'ep-a-b-1' };
  const url = new URL(connectionUri(parts));
  assert.equal(url.host, '[::1]:1');
  assert.equal(decodeURIComponent(url.username), parts.role);
  assert.equal(decodeURIComponent(url.password), parts.password);
  assert.equal(decodeURIComponent(url.pathname), `/${parts.database}`);
  assert.equal(url.searchParams.get('sslmode'), 'require');
  assert.equal(url.searchParams.get('options'), 'endpoint=ep-a-b-1');
});

test('the decision to suspend waits for the whole timeout without activity', () => {
  const base = { nowMs: 1_000_000, lastActiveMs: 700_000, timeoutSeconds: 300, sample: quietSample };
  const kind = (change: Partial<typeof base> & { sample?: typeof quietSample | undefined }) =>
    decideSuspend({ ...base, ...change }).kind;
  assert.equal(kind({}), 'suspend');
  assert.equal(kind({ nowMs: 999_999 }), 'stay');
  assert.equal(kind({ timeoutSeconds: -1 }), 'stay');
  assert.equal(kind({ sample: undefined }), 'stay');
  assert.equal(kind({ timeoutSeconds: 0, sample: undefined }), 'stay');
  for (const busy of [
    'busyBackendCount',
    'walsenderCount',
    'activeSubscriptionCount',
    'autovacuumWorkerCount',
  ] as const) {
    assert.equal(kind({ sample: { ...quietSample, [busy]: 1 } }), 'stay', busy);
  }
  const recent = decideSuspend({ ...base, sample: { ...quietSample, lastActivityMs: 700_001 } });
  assert.deepEqual(recent, { kind: 'stay', lastActiveMs: 700_001 });
  const ahead = decideSuspend({ ...base, sample: { ...quietSample, lastActivityMs: 9e15 } });
  assert.deepEqual(ahead, { kind: 'stay', lastActiveMs: base.nowMs });
});
