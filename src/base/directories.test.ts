import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { makeDirectories, makeMissingDirectories } from './directories.ts';

test('folders are made with those above them, and again', async () => {
  const root = mkdtempSync(join(tmpdir(), 'strata-directories-'));
  const path = join(root, 'a', 'b', 'c');
  makeDirectories(path, 0o700);
  makeDirectories(path, 0o711);
  assert.equal(statSync(path).mode & 0o777, 0o700);
  assert.equal(await makeMissingDirectories(path, 0o700), undefined);
  assert.equal(await makeMissingDirectories(join(root, 'd', 'e'), 0o700), join(root, 'd'), 'the first that it made');
  writeFileSync(join(root, 'file'), '');
  assert.throws(() => makeDirectories(join(root, 'file'), 0o700), { code: 'EEXIST' });
  assert.throws(() => makeDirectories(join(root, 'file', 'below'), 0o700), /ENOTDIR|EEXIST/);
  rmSync(root, { recursive: true });
});

test('where no folder can be made the error comes at once', async () => {
  const root = mkdtempSync(join(tmpdir(), 'strata-directories-'));
  symlinkSync(join(root, 'not mounted'), join(root, 'link'));
  assert.throws(() => makeDirectories(join(root, 'link'), 0o700), { code: 'EEXIST' });
  assert.throws(() => makeDirectories(join(root, 'link', 'below'), 0o700), { code: 'EEXIST' });
  rmSync(root, { recursive: true });
  const refused = /ENOENT|EACCES|EPERM|EROFS/;
  assert.throws(() => makeDirectories('/proc/strata/below', 0o700), refused);
  await assert.rejects(makeMissingDirectories('/proc/strata/below', 0o700), refused);
});
