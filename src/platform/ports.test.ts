import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { freePort } from '../base/free-port.ts';
import { listen } from '../base/rpc.ts';
import { keepSafekeeperPort, servicePorts } from './ports.ts';

test('ports are kept, added to, and replaced where somebody else has them or the file is not readable', async (context) => {
  const directory = mkdtempSync(join(tmpdir(), 'strata-ports-'));
  context.after(() => rmSync(directory, { recursive: true }));
  const first = await servicePorts(directory, '127.0.0.1', 1);
  assert.deepEqual(await servicePorts(directory, '127.0.0.1', 1), first);

  const other = createServer();
  context.after(() => other.close());
  await listen(other, '127.0.0.1', first.pagePort);
  const second = await servicePorts(directory, '127.0.0.1', 3);
  assert.equal(second.rpcPort, first.rpcPort);
  assert.notEqual(second.pagePort, first.pagePort);
  assert.equal(second.safekeeperPorts[0], first.safekeeperPorts[0]);
  assert.equal(new Set([second.rpcPort, second.pagePort, ...second.safekeeperPorts]).size, 5);

  writeFileSync(join(directory, 'ports.json'), '{"ports":[0,"x",');
  assert.equal((await servicePorts(directory, '127.0.0.1', 3)).safekeeperPorts.length, 3);
});

test('a safekeeper that was added while others run has its port at the next start too', async (context) => {
  const directory = mkdtempSync(join(tmpdir(), 'strata-ports-'));
  context.after(() => rmSync(directory, { recursive: true }));
  const first = await servicePorts(directory, '127.0.0.1', 1);
  const port = await freePort('127.0.0.1');
  keepSafekeeperPort(directory, 4, port);
  const { ports } = JSON.parse(readFileSync(join(directory, 'ports.json'), 'utf8')) as { ports: unknown };
  assert.deepEqual(ports, [first.rpcPort, first.pagePort, ...first.safekeeperPorts, null, null, port]);
  const second = await servicePorts(directory, '127.0.0.1', 4);
  assert.equal(new Set(second.safekeeperPorts).size, 4);
});
