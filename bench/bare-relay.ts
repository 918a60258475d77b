/**
 * The least that a relay in Node can be: bytes from one socket to the other and back, with TLS or without. What the proxy is measured against. A process of
 * its own, as the proxy is; run as a program it relays one TCP port to one Unix socket.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';
import { createSecureContext, TLSSocket } from 'node:tls';
import { freePort } from '../src/base/free-port.ts';

interface RelayOptions {
  readonly port: number;
  readonly socketPath: string;
  /** Absent: without TLS. */
  readonly certificate?: { readonly cert: string; readonly key: string };
}

export interface BareRelay {
  readonly port: number;
  stop(): Promise<void>;
}

export async function startBareRelay(options: Omit<RelayOptions, 'port'>): Promise<BareRelay> {
  const port = await freePort();
  const child: ChildProcess = fork(import.meta.filename);
  child.send({ ...options, port });
  await once(child, 'message');
  return {
    port,
    stop: async () => {
      const gone = once(child, 'exit');
      child.kill();
      await gone;
    },
  };
}

if (import.meta.main) process.once('message', (options: RelayOptions) => relay(options));

function relay({ port, socketPath, certificate }: RelayOptions): void {
  const secureContext = certificate === undefined ? undefined : createSecureContext(certificate);
  const server = createServer({ noDelay: true }, (plain) => {
    plain.on('error', () => plain.destroy());
    if (secureContext === undefined) {
      join(plain, socketPath);
      return;
    }
    // libpq asks for encryption in 8 bytes, which are answered by one.
    plain.once('data', () => {
      plain.pause();
      plain.write('S');
      const tls = new TLSSocket(plain, { isServer: true, secureContext });
      tls.on('error', () => tls.destroy());
      tls.once('secure', () => join(tls, socketPath));
    });
  });
  server.listen(port, '127.0.0.1', () => process.send?.('listening'));
}

function join(client: Socket, socketPath: string): void {
  const upstream = connect(socketPath);
  upstream.on('error', () => client.destroy());
  upstream.on('close', () => client.destroy());
  client.on('close', () => upstream.destroy());
  upstream.pipe(client);
  client.pipe(upstream);
}
