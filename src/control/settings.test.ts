import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, test } from 'node:test';
import { GenerationsClient } from '../api/generations.ts';
import { serveRpc } from '../base/rpc.ts';
import { signToken } from '../base/token.ts';
import { generationMethods, Settings } from './settings.ts';

let directory: string;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'strata-settings-'));
});

afterEach(() => rmSync(directory, { recursive: true, force: true }));

test('each generation is higher than all before, also after a start and above what a caller has seen', async () => {
  let settings = Settings.open(directory);
  assert.equal(await settings.next(0), 1);
  assert.equal(await settings.next(1), 2);
  assert.equal(await settings.isLatest(2), true);
  assert.equal(await settings.isLatest(1), false);
  settings.close();
  settings = Settings.open(directory);
  assert.equal(await settings.next(2), 3);
  assert.equal(await settings.next(40), 41);
  assert.equal(await settings.isLatest(3), false);
  await assert.rejects(settings.next(-1), { code: 'bad-request' });
  settings.close();
});

test('a setting is kept, and replaced', () => {
  const settings = Settings.open(directory);
  assert.equal(settings.get('object-store-url'), undefined);
  settings.set('object-store-url', 'a');
  settings.set('object-store-url', 'b');
  settings.close();
  const again = Settings.open(directory);
  assert.equal(again.get('object-store-url'), 'b');
  again.close();
});

test('a pageserver asks over a connection', async () => {
  const settings = Settings.open(directory);
  const secret = Buffer.alloc(32, 7);
  const server = await serveRpc({ host: '127.0.0.1', port: 0, secret, methods: generationMethods(settings) });
  const token = await signToken(secret, { scope: 'platform' });
  const client = new GenerationsClient({ host: '127.0.0.1', port: server.port, token });
  const generation = await client.next(6);
  assert.equal(generation, 7);
  assert.equal(await client.isLatest(generation), true);
  await settings.next(0);
  assert.equal(await client.isLatest(generation), false);
  await server.close();
  await assert.rejects(client.isLatest(generation), { code: 'unavailable' });
  await client.close();
  settings.close();
});

test('a configuration of the safekeepers follows only the one that it was made from, and ids are never given twice', () => {
  let settings = Settings.open(directory);
  assert(settings.replaceSafekeepers(0, { version: 1, members: [1, 2, 3] }));
  const other = Settings.open(directory);
  const [newId] = settings.newSafekeeperIds(1);
  assert.equal(newId, 4);
  assert(settings.replaceSafekeepers(1, { version: 2, members: [1, 2, 3], newMembers: [1, 2, 4] }));
  assert(!other.replaceSafekeepers(1, { version: 2, members: [1] }), 'somebody else was first');
  assert(other.replaceSafekeepers(2, { version: 3, members: [1, 2, 3] }));
  other.close();
  settings.close();
  settings = Settings.open(directory);
  assert.deepEqual(settings.safekeepers, { version: 3, members: [1, 2, 3] });
  assert.deepEqual(settings.newSafekeeperIds(2), [5, 6]);
  settings.close();
});
