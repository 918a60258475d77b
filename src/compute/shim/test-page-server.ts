/**
 * A pageserver for the shim's tests: answers from a function, and misbehaves on request.
 */
import { createServer, type Server, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  decodePageHello,
  decodePageRequest,
  encodeHelloReply,
  encodePageError,
  encodePagesHeader,
  PAGE_REQUEST_BYTES,
  type PageRange,
} from '../../api/pages.ts';
import { listen } from '../../base/rpc.ts';

/** Returns count × 8192 bytes; throws what the client is to be told. */
export type PageSource = (range: PageRange) => Buffer;

export type Fault = 'none' | 'disconnect' | 'short' | 'wrong-id' | 'wrong-length' | 'error' | 'slow';

export interface TestPageServerOptions {
  readonly token?: string;
  /** Asked for each request. */
  readonly fault?: () => Fault;
}

export class TestPageServer {
  readonly #source: PageSource;
  readonly #options: TestPageServerOptions;
  readonly #sockets = new Set<Socket>();
  #server: Server | undefined;
  port = 0;
  requestCount = 0;
  pageCount = 0;
  connectionCount = 0;

  constructor(source: PageSource, options: TestPageServerOptions = {}) {
    this.#source = source;
    this.#options = options;
  }

  /** On the same port as before, when there was one. */
  async start(): Promise<void> {
    const server = createServer((socket) => this.#serve(socket));
    await listen(server, '127.0.0.1', this.port);
    const address = server.address();
    if (typeof address === 'object' && address !== null) this.port = address.port;
    this.#server = server;
  }

  /** As when its process is killed: connections are cut in the middle of whatever they do. */
  async stop(): Promise<void> {
    const server = this.#server;
    this.#server = undefined;
    for (const socket of this.#sockets) socket.destroy();
    await new Promise<void>((resolve) => (server === undefined ? resolve() : server.close(() => resolve())));
  }

  #serve(socket: Socket): void {
    this.connectionCount++;
    this.#sockets.add(socket);
    socket.setNoDelay(true);
    socket.on('error', () => {});
    socket.once('close', () => this.#sockets.delete(socket));
    let received: Buffer = Buffer.alloc(0);
    let greeted = false;
    let queue = Promise.resolve();
    socket.on('data', (chunk: Buffer) => {
      received = received.length === 0 ? chunk : Buffer.concat([received, chunk]);
      if (!greeted) {
        const hello = decodePageHello(received);
        if (hello === undefined) return;
        received = received.subarray(hello.bytes);
        greeted = true;
        if (this.#options.token !== undefined && hello.value.token !== this.#options.token) {
          socket.end(encodeHelloReply({ kind: 'refused', message: 'the token is not known' }));
          return;
        }
        socket.write(encodeHelloReply({ kind: 'welcome' }));
      }
      for (;;) {
        const request = decodePageRequest(received, 0);
        if (request === undefined) break;
        received = received.subarray(PAGE_REQUEST_BYTES);
        const fault = this.#options.fault?.() ?? 'none';
        queue = queue.then(async () => {
          if (fault === 'slow') await sleep(5);
          this.#answer(socket, request, request.requestId, fault);
        });
      }
    });
  }

  #answer(socket: Socket, range: PageRange, requestId: number, fault: Fault): void {
    if (socket.destroyed) return;
    this.requestCount++;
    if (fault === 'disconnect') {
      socket.destroy();
      return;
    }
    let pages: Buffer;
    try {
      if (fault === 'error') throw new Error('an error was asked for');
      pages = this.#source(range);
    } catch (error) {
      socket.write(encodePageError(requestId, (error as Error).message));
      return;
    }
    this.pageCount += range.count;
    socket.cork();
    socket.write(
      encodePagesHeader(
        fault === 'wrong-id' ? requestId + 1 : requestId,
        pages.length - (fault === 'wrong-length' ? 8192 : 0),
      ),
    );
    socket.write(fault === 'short' ? pages.subarray(0, 100) : pages);
    socket.uncork();
    if (fault === 'short') socket.end();
  }
}
