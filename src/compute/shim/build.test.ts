import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { buildShim } from './build.ts';

const root = mkdtempSync(join(tmpdir(), 'strata-build-'));
after(() => rmSync(root, { recursive: true, force: true }));

test('the shim is compiled once, under a name that goes with its sources', async () => {
  const path = await buildShim(join(root, 'lib'));
  assert.match(path, /strata-shim-[0-9a-f]{16}\.so$/);
  assert.equal(statSync(path).mode & 0o777, 0o755);
  const { mtimeMs } = statSync(path);
  assert.equal(await buildShim(join(root, 'lib')), path);
  assert.equal(statSync(path).mtimeMs, mtimeMs);
  assert.deepEqual(readdirSync(join(root, 'lib')).length, 1);
});

test('two builds at once do not harm each other', async () => {
  const [first, second] = await Promise.all([buildShim(join(root, 'both')), buildShim(join(root, 'both'))]);
  assert.equal(first, second);
});

test('without a C compiler the error says what to install', async () => {
  const path = process.env['PATH'];
  process.env['PATH'] = '/nowhere';
  try {
    await assert.rejects(buildShim(join(root, 'none')), {
      code: 'bad-request',
      message: /no C compiler was found.*install gcc/,
    });
  } finally {
    process.env['PATH'] = path;
  }
});
