/** Stopping: everybody is told at once, nobody is there to take the last WAL. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import { type PlatformOptions, TestPlatform } from './platform.ts';

async function startPlatform(context: TestContext, options: PlatformOptions = {}): Promise<TestPlatform> {
  const platform = await TestPlatform.start(options);
  context.after(() => platform.destroy());
  await platform.psql('CREATE TABLE t AS SELECT generate_series(1, 1000) AS i');
  return platform;
}

function platformLog(platform: TestPlatform): string {
  return readFileSync(join(platform.dataDir, 'logs', 'platform.log'), 'utf8');
}

test('signals to every process of the platform but Postgres are a clean end', async (context) => {
  const platform = await startPlatform(context);
  const services = platform
    .descendants()
    .filter(({ command }) => /main\.ts (safekeeper|pageserver|proxy)/.test(command));
  assert.equal(services.length, 5);
  for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP']) for (const { pid } of services) process.kill(pid, signal);
  assert.equal(await platform.stop(), 0);
  assert(!platformLog(platform).includes('suspended uncleanly'), platformLog(platform));
  await platform.start();
  assert.equal(await platform.psql('SELECT count(*) FROM t'), '1000');
});

test('without a quorum the end comes soon, says what it waits for, and what was acknowledged is kept', async (context) => {
  const platform = await startPlatform(context);
  const held = platform.descendants().filter(({ command }) => /main\.ts safekeeper [23]$/.test(command));
  for (const { pid } of held) process.kill(pid, 'SIGSTOP');
  const startMs = Date.now();
  assert.equal(await platform.stop(), 0);
  assert(Date.now() - startMs < 30_000, `it took ${Date.now() - startMs} ms`);
  assert.match(platform.output, /waiting for a quorum of safekeepers to take the last WAL of ep-/);
  await platform.start();
  assert.equal(await platform.psql('SELECT count(*) FROM t'), '1000');
});

test('a platform that npm started ends by a signal to it alone', { timeout: 120_000 }, async (context) => {
  const platform = await startPlatform(context, { env: { npm_lifecycle_event: 'start' } });
  assert.equal(await platform.stop(), 0);
});
