import assert from 'node:assert/strict';
import { createServer } from 'node:net';
import { test } from 'node:test';
import { freePort, listenOnFreePort } from './free-port.ts';
import { listen } from './rpc.ts';

test('a free port is not one of those that outgoing connections get, and is taken once', async () => {
  const servers = Array.from({ length: 50 }, () => createServer());
  const ports = await Promise.all(servers.map((server) => listenOnFreePort(server, '127.0.0.1')));
  assert.equal(new Set(ports).size, servers.length);
  assert(ports.every((port) => port >= 10_000 && port < 32_768));
  const server = createServer();
  await listen(server, '127.0.0.1', await freePort());
  for (const each of [server, ...servers]) each.close();
});

test('a port that is reserved is not taken', async () => {
  const reserved = Array.from({ length: 22_768 }, (_, index) => 10_000 + index);
  const server = createServer();
  const port = await listenOnFreePort(server, '127.0.0.1', reserved);
  assert(!reserved.includes(port), 'one of the system, where all others are reserved');
  server.close();
});
