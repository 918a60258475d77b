import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { startS3rver } from '../../test/object-store/s3-servers.ts';
import type { S3Server } from '../../test/object-store/s3-servers.ts';
import { namesOf, rejectsWith } from './object-store.contract.ts';
import { openObjectStore } from './open-object-store.ts';

describe('opening an object store by its URL', () => {
  let directory: string;
  let server: S3Server;
  const environment = { ...process.env };
  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-open-store-'));
    server = await startS3rver();
  });
  after(async () => {
    process.env = environment;
    await server.stop();
    rmSync(directory, { recursive: true });
  });

  test('a path and a file URL are the same directory', async () => {
    const byPath = await openObjectStore(join(directory, 'store'));
    await byPath.put('a/b', Buffer.from('x'));
    const byUrl = await openObjectStore(pathToFileURL(join(directory, 'store')).href);
    assert.deepEqual(await namesOf(byUrl, ''), ['a/b']);
  });

  test('a bucket behind an endpoint, with credentials from the environment, and from a profile', async () => {
    const url = `s3://${server.bucket}/some/prefix?endpoint=${server.endpoint}&conditional-puts=false`;
    const { accessKeyId, secretAccessKey } = server.credentials!;
    process.env['AWS_ACCESS_KEY_ID'] = accessKeyId;
    process.env['AWS_SECRET_ACCESS_KEY'] = secretAccessKey;
    const byEnvironment = await openObjectStore(url);
    assert.equal(byEnvironment.description, `s3://${server.bucket}/some/prefix`);
    assert.equal(byEnvironment.supportsIfAbsent, false);
    await byEnvironment.put('a/b', Buffer.from('x'));

    delete process.env['AWS_ACCESS_KEY_ID'];
    delete process.env['AWS_SECRET_ACCESS_KEY'];
    const file = join(directory, 'credentials');
    writeFileSync(file, `[keeper]\naws_access_key_id = ${accessKeyId}\naws_secret_access_key = ${secretAccessKey}\n`);
    process.env['AWS_SHARED_CREDENTIALS_FILE'] = file;
    process.env['AWS_CONFIG_FILE'] = join(directory, 'no-config');
    const byProfile = await openObjectStore(`${url}&profile=keeper`);
    assert.equal(String(await byProfile.get('a/b')), 'x');
    process.env['AWS_EC2_METADATA_DISABLED'] = 'true';
    const byNobody = await openObjectStore(`${url}&profile=nobody`);
    await rejectsWith(byNobody.get('a/b'), 'denied');
  });

  test('what is not understood is refused, and no secret is repeated', async () => {
    const base = `s3://${server.bucket}`;
    for (const url of [
      'ftp://host/x',
      's3://',
      `${base}?speed=11`,
      `${base}?path-style=yes`,
      `${base}?checksums=md5`,
    ]) {
      await rejectsWith(openObjectStore(url), 'rejected');
    }
    await assert.rejects(
      openObjectStore('s3://key:hidden@bucket/x'),
      (error: Error) => !error.message.includes('hidden'),
    );
  });
});
