/** Services that are this very file, started as one (a service runs the main script of the process that supervises it). */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readlinkSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { createLog } from '../base/log.ts';
import { runServiceProcess } from '../base/service-process.ts';
import { ChildService, type ChildServiceOptions } from './child-service.ts';

const ROLE = 'a-service-for-tests';

if (process.argv[2] === ROLE) {
  await runServiceProcess(() => Promise.resolve({ service: { close: () => Promise.resolve() }, ready: {} }));
}

async function startService(context: TestContext, options: Partial<ChildServiceOptions> = {}): Promise<ChildService> {
  const directory = mkdtempSync(join(tmpdir(), 'strata-child-service-'));
  const service = await ChildService.start({
    name: 'test',
    command: [ROLE],
    config: () => ({}),
    logFile: join(directory, 'log'),
    log: createLog({ name: 'test', level: 'silent' }),
    ...options,
  });
  context.after(async () => {
    await service.stop();
    rmSync(directory, { recursive: true });
  });
  return service;
}

test('a person who starts a service is told what it is, without a stack', () => {
  for (const input of ['', 'status\n']) {
    const { status, stderr } = spawnSync(process.execPath, [import.meta.filename, ROLE], { input, encoding: 'utf8' });
    assert.equal(status, 2);
    assert.match(stderr, new RegExp(`^strata: ${ROLE} is a part of the platform: "strata start" .*\n$`));
  }
});

async function until(condition: () => boolean, what: string): Promise<void> {
  const deadline = Date.now() + 20_000;
  while (!condition()) {
    assert(Date.now() < deadline, `in vain: ${what}`);
    await sleep(20);
  }
}

function isAlive(pid: number | undefined): boolean {
  try {
    readlinkSync(`/proc/${pid}/exe`);
    return true;
  } catch {
    return false;
  }
}

test('a service that hangs is killed and started again', async (context) => {
  const service = await startService(context, { pingIntervalMs: 50 });
  const { pid } = service;
  await sleep(1_000);
  assert.equal(service.pid, pid, 'it answers, so it is left alone');
  process.kill(pid!, 'SIGSTOP');
  await until(() => service.pid !== pid && isAlive(service.pid), 'it runs again');
  assert(!isAlive(pid));
  assert.equal(service.restartCount, 1);
});

test('SIGTERM to one service starts it anew', async (context) => {
  const service = await startService(context);
  const { pid } = service;
  process.kill(pid!, 'SIGTERM');
  await until(() => service.pid !== pid && isAlive(service.pid), 'it runs again');
});

test('SIGTERM and SIGINT to everything leave the order of stopping to the supervisor', async (context) => {
  const service = await startService(context, { isPlatformStopping: () => true });
  process.kill(service.pid!, 'SIGTERM');
  process.kill(service.pid!, 'SIGINT');
  await sleep(1_500);
  assert(isAlive(service.pid));
  await service.stop();
  assert(!isAlive(service.pid));
});

test('a service that hangs does not hold up the end', async (context) => {
  const service = await startService(context, { pingIntervalMs: 200 });
  process.kill(service.pid!, 'SIGSTOP');
  await sleep(700);
  const startMs = Date.now();
  await service.stop();
  assert(Date.now() - startMs < 5_000);
});
