/**
 * Ports for services that keep theirs over restarts. They lie below those that Linux gives to outgoing connections (net.ipv4.ip_local_port_range, from
 * 32768 on by default): one out of that range may be some connection's when the service comes back to it.
 */
import { randomInt } from 'node:crypto';
import { createServer, type Server } from 'node:net';
import { listen } from './rpc.ts';

const FIRST_PORT = 10_000;
const END_PORT = 32_768;
const ATTEMPTS_MAX = 100;

/** Has the server listen on a port that nobody else has, and that is none of `reserved`; resolves to it. */
export async function listenOnFreePort(
  server: Server,
  host: string,
  reserved: readonly number[] = [],
): Promise<number> {
  for (let attempt = 1; ; attempt++) {
    // Where all are taken, the system's choice is better than none.
    const port = attempt < ATTEMPTS_MAX ? randomInt(FIRST_PORT, END_PORT) : 0;
    if (reserved.includes(port)) continue;
    try {
      await listen(server, host, port);
      const address = server.address();
      return typeof address === 'object' && address !== null ? address.port : port;
    } catch (error) {
      if (port === 0 || (error as NodeJS.ErrnoException).code !== 'EADDRINUSE') throw error;
    }
  }
}

/** One that was free a moment ago. */
export async function freePort(host = '127.0.0.1'): Promise<number> {
  const server = createServer();
  const port = await listenOnFreePort(server, host);
  await new Promise((resolve) => server.close(resolve));
  return port;
}
