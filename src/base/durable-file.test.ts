import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { writeFileDurably } from './durable-file.ts';

test('a file that cannot be put in its place leaves nothing beside it', () => {
  const directory = mkdtempSync(join(tmpdir(), 'strata-durable-file-'));
  writeFileDurably(join(directory, 'file'), 'one', 0o600);
  writeFileDurably(join(directory, 'file'), 'two', 0o600);
  assert.equal(readFileSync(join(directory, 'file'), 'utf8'), 'two');
  mkdirSync(join(directory, 'folder'));
  assert.throws(() => writeFileDurably(join(directory, 'folder'), 'a secret', 0o600));
  assert.deepEqual(readdirSync(directory).sort(), ['file', 'folder']);
  rmSync(directory, { recursive: true });
});
