/** A way between two processes that can be cut: what passes it passes, is refused, or disappears. This one is a proxy; network-namespace.ts has a cable. */
import { connect, createServer, type Server, type Socket } from 'node:net';
import { resetSocket } from '../reset-socket.ts';

/** open: all passes. cut: connections are reset and refused. silent: nothing passes any more, and nobody is told. */
export type LinkMode = 'open' | 'cut' | 'silent';

export interface Link {
  readonly address: { readonly host: string; readonly port: number };
  mode: LinkMode;
  start(): Promise<void>;
  close(): void;
}

export class CutProxy implements Link {
  readonly #target: () => { readonly host: string; readonly port: number };
  readonly #pairs = new Set<readonly [Socket, Socket]>();
  #server: Server | undefined;
  #mode: LinkMode = 'open';
  #port = 0;

  constructor(target: () => { readonly host: string; readonly port: number }) {
    this.#target = target;
  }

  get address(): { host: string; port: number } {
    return { host: '127.0.0.1', port: this.#port };
  }

  async start(): Promise<void> {
    const server = createServer((socket) => this.#accept(socket));
    this.#server = server;
    await new Promise<void>((resolve) => server.listen(this.#port, '127.0.0.1', resolve));
    const address = server.address();
    this.#port = typeof address === 'object' && address !== null ? address.port : 0;
  }

  set mode(mode: LinkMode) {
    this.#mode = mode;
    for (const pair of this.#pairs) this.#apply(pair);
  }

  close(): void {
    this.#server?.close();
    this.mode = 'cut';
  }

  #accept(client: Socket): void {
    client.on('error', () => client.destroy());
    if (this.#mode === 'cut') {
      resetSocket(client);
      return;
    }
    const server = connect({ ...this.#target(), noDelay: true });
    client.setNoDelay(true);
    const pair = [client, server] as const;
    this.#pairs.add(pair);
    const end = (): void => {
      this.#pairs.delete(pair);
      client.destroy();
      server.destroy();
    };
    for (const [from, to] of [
      [client, server],
      [server, client],
    ] as const) {
      from.on('data', (chunk) => {
        if (!to.write(chunk)) from.pause();
      });
      to.on('drain', () => {
        if (this.#mode === 'open') from.resume();
      });
      from.on('error', end);
      from.on('close', end);
    }
    this.#apply(pair);
  }

  #apply([client, server]: readonly [Socket, Socket]): void {
    if (this.#mode === 'cut') {
      resetSocket(client);
      resetSocket(server);
    } else if (this.#mode === 'silent') {
      client.pause();
      server.pause();
    } else {
      client.resume();
      server.resume();
    }
  }
}
