import assert from 'node:assert/strict';
import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, test } from 'node:test';
import { startS3rver } from '../../test/object-store/s3-servers.ts';
import { Settings } from '../control/settings.ts';
import { chooseObjectStore } from './object-store.ts';

let directory: string;
let settings: Settings;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'strata-store-'));
  settings = Settings.open(directory);
});

afterEach(() => {
  settings.close();
  rmSync(directory, { recursive: true, force: true });
});

test('without a word it is in the data directory, and later the one that was used before', async () => {
  const own = join(directory, 'object-store');
  assert.equal(await chooseObjectStore(undefined, directory, settings), own);
  assert.equal(await chooseObjectStore(undefined, directory, settings), own);
  assert.equal(await chooseObjectStore(own, directory, settings), own);
  assert.equal(await chooseObjectStore(undefined, directory, settings), own);
});

test('a store elsewhere is remembered, and another is refused unless it has the same content', async () => {
  const [first, second] = [join(directory, 'first'), join(directory, 'second')];
  assert.equal(await chooseObjectStore(`file://${first}`, directory, settings), `file://${first}`);
  assert.equal(await chooseObjectStore(undefined, directory, settings), `file://${first}`);
  await assert.rejects(chooseObjectStore(second, directory, settings), {
    code: 'conflict',
    message: new RegExp(
      `${second} does not have what is in file://${first}: start with --object-store file://${first}`,
    ),
  });
  cpSync(first, second, { recursive: true });
  assert.equal(await chooseObjectStore(second, directory, settings), second);
  assert.equal(await chooseObjectStore(undefined, directory, settings), second);
});

test('an empty directory in the place of the store is noticed', async () => {
  const own = await chooseObjectStore(undefined, directory, settings);
  rmSync(own, { recursive: true });
  await assert.rejects(chooseObjectStore(undefined, directory, settings), { code: 'conflict', message: /not mounted/ });
});

test('a store whose content is lost is taken empty when that is said, and only when there is something to fill it with', async () => {
  const own = await chooseObjectStore(undefined, directory, settings);
  rmSync(own, { recursive: true });
  const next = /bring its content back, and start again; if that is lost for good, --refill-object-store/;
  await assert.rejects(chooseObjectStore(undefined, directory, settings), { code: 'conflict', message: next });
  const nothing = /cannot be refilled: .*pageserver\/timelines has nothing either/;
  await assert.rejects(chooseObjectStore(undefined, directory, settings, true), { message: nothing });
  mkdirSync(join(directory, 'pageserver', 'timelines', 'a'.repeat(32)), { recursive: true });
  assert.equal(await chooseObjectStore(undefined, directory, settings, true), own);
  assert.equal(await chooseObjectStore(undefined, directory, settings), own, 'it is ours now');
  assert.equal(await chooseObjectStore(undefined, directory, settings, true), own, 'nothing is to be done');
  const elsewhere = join(directory, 'elsewhere');
  assert.equal(await chooseObjectStore(elsewhere, directory, settings, true), elsewhere);
  assert.equal(await chooseObjectStore(undefined, directory, settings), elsewhere);
});

test('a directory that cannot be made is refused at once, with the next step', async () => {
  const file = join(directory, 'file');
  writeFileSync(file, '');
  for (const path of [join(file, 'below'), file, '/proc/strata', '/proc/strata/below']) {
    await assert.rejects(chooseObjectStore(path, directory, settings), {
      message: new RegExp(`^the object store ${path} cannot be used: .*; check`),
    });
  }
});

test('a store belongs to one platform', async () => {
  const shared = join(directory, 'shared');
  await chooseObjectStore(shared, directory, settings);
  const other = mkdtempSync(join(tmpdir(), 'strata-store-'));
  const otherSettings = Settings.open(other);
  try {
    await assert.rejects(chooseObjectStore(shared, other, otherSettings), { message: /belongs to another platform/ });
  } finally {
    otherSettings.close();
    rmSync(other, { recursive: true });
  }
});

test('what is wrong with an S3 store is told, with the next step', { timeout: 120_000 }, async (context) => {
  const server = await startS3rver();
  context.after(() => server.stop());
  const keys = ['AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'];
  const before = keys.map((key) => process.env[key]);
  context.after(() =>
    keys.forEach((key, index) => {
      if (before[index] === undefined) delete process.env[key];
      else process.env[key] = before[index];
    }),
  );
  const choose = (url: string): Promise<string> => chooseObjectStore(url, directory, settings);
  const place = `endpoint=${server.endpoint}&region=us-east-1`;
  for (const key of keys) process.env[key] = 'wrong';
  const wrong = `s3://${server.bucket}/p?${place}`;
  await assert.rejects(choose(wrong), ({ code, message }: { code: string; message: string }) => {
    assert.equal(code, 'forbidden', message);
    assert(message.includes(wrong) && /check the credentials/.test(message), message);
    return true;
  });
  for (const key of keys) process.env[key] = 'S3RVER';
  await assert.rejects(choose(`s3://no-such-bucket?${place}`), {
    code: 'bad-request',
    message: /no-such-bucket.*check the name of the bucket, or make it/,
  });
  await assert.rejects(choose('s3://strata?endpoint=http://127.0.0.1:9&region=us-east-1'), {
    code: 'unavailable',
    message: /check endpoint=… in the URL, and that the server runs/,
  });
  await assert.rejects(choose('gopher://x'), { code: 'bad-request', message: /neither a path nor s3/ });
  assert.equal(await choose(wrong), wrong);
});
