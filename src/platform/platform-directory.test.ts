import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { State } from '../control/state.ts';
import { loadOrMakeSecrets, openPlatformDirectory, withPlace } from './platform-directory.ts';

test('a platform begins in no data directory of Postgres, and leaves it as it is', (context) => {
  const path = mkdtempSync(join(tmpdir(), 'strata-platform-directory-'));
  context.after(() => rmSync(path, { recursive: true }));
  writeFileSync(join(path, 'PG_VERSION'), '17\n');
  const message = /is a data directory of Postgres: choose another with --data-dir/;
  assert.throws(() => openPlatformDirectory(path, undefined), { code: 'bad-request', message });
  assert.deepEqual(readdirSync(path), ['PG_VERSION']);
});

test('secrets that are lost or damaged are not made anew, and a damaged state is named', (context) => {
  const path = mkdtempSync(join(tmpdir(), 'strata-platform-directory-'));
  const directory = openPlatformDirectory(path, undefined);
  context.after(() => {
    for (const each of [path, directory.runDir]) rmSync(each, { recursive: true });
  });
  State.open(join(path, 'state.db')).close();
  assert.throws(() => loadOrMakeSecrets(directory), {
    code: 'conflict',
    message: /secrets\.json is missing: bring it/,
  });
  for (const damaged of ['{"version"', '{}']) {
    writeFileSync(join(path, 'secrets.json'), damaged);
    assert.throws(() => loadOrMakeSecrets(directory), {
      message: /secrets\.json is damaged: bring it back from a copy/,
    });
  }
  writeFileSync(join(path, 'state.db'), 'x'.repeat(5_000));
  assert.throws(() => State.open(join(path, 'state.db')), {
    code: 'conflict',
    message: /state\.db cannot be used: .*copy/,
  });
});

test('a disk without space is named with what to do, and other errors are left as they are', () => {
  const full = new Error('ENOSPC: no space left on device, write');
  const named = withPlace(full, '/the/data') as Error;
  assert.match(named.message, /no space left in \/the\/data or \/.*: make room there, or .*--data-dir .*ENOSPC/);
  const other = new Error('x');
  assert.equal(withPlace(other, '/the/data'), other);
});
