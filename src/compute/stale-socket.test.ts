import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { clearStaleSocket } from './stale-socket.ts';

const NAME = '.s.PGSQL.5432';

test('the lock of a process that is no Postgres of that folder is removed, and the process is left alone', async (context) => {
  const folder = mkdtempSync(join(tmpdir(), 'strata-socket-'));
  context.after(() => rmSync(folder, { recursive: true }));
  await clearStaleSocket(folder, NAME); // Nothing is there.
  writeFileSync(join(folder, NAME), '');
  writeFileSync(join(folder, `${NAME}.lock`), `${process.pid}\n/some/data\n1700000000\n5432\n`);
  await clearStaleSocket(folder, NAME);
  assert.deepEqual(readdirSync(folder), []);
  writeFileSync(join(folder, `${NAME}.lock`), 'what is this');
  await clearStaleSocket(folder, NAME);
  assert.deepEqual(readdirSync(folder), []);
});

test('who runs with the data directory that the lock names is killed first', async (context) => {
  const folder = mkdtempSync(join(tmpdir(), 'strata-socket-'));
  context.after(() => rmSync(folder, { recursive: true }));
  const script = 'process.stdout.write("up"); setInterval(() => {}, 1000)';
  const child = spawn(process.execPath, ['-e', script, '--', '-D', '/some/data'], {
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  await once(child.stdout, 'data');
  const gone = once(child, 'exit');
  writeFileSync(join(folder, `${NAME}.lock`), `${child.pid}\n/some/data\n1700000000\n5432\n`);
  await clearStaleSocket(folder, NAME);
  assert.deepEqual(await gone, [null, 'SIGKILL']);
  assert.deepEqual(readdirSync(folder), []);
});
