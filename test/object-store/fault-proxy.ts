/**
 * A TCP proxy between an HTTP client and its server that spoils chosen requests: for tests of what a client does when the network or the server fails.
 * It knows of HTTP only that a request begins with its request line, and that a client sends that at the start of a chunk.
 */
import { once } from 'node:events';
import { connect, createServer } from 'node:net';
import type { AddressInfo, Server, Socket } from 'node:net';
import { resetSocket } from '../reset-socket.ts';

export type ProxyFault =
  /** The connection breaks before the server sees anything. */
  | { readonly kind: 'refuse' }
  /** The connection breaks when this much of the request went through. */
  | { readonly kind: 'cut-request'; readonly afterBytes: number }
  /** The server does it, but its reply never arrives. */
  | { readonly kind: 'lose-reply' }
  /** The connection breaks after this much of the reply, headers included. */
  | { readonly kind: 'cut-reply'; readonly afterBytes: number }
  /** A bit of the reply is wrong, at this distance from the end of its headers. */
  | { readonly kind: 'damage-reply'; readonly atBodyByte: number }
  /** The reply comes late. */
  | { readonly kind: 'slow'; readonly delayMs: number }
  /** Nothing ever comes. */
  | { readonly kind: 'hang' }
  /** The proxy answers itself, without the server. */
  | { readonly kind: 'answer'; readonly status: number; readonly code: string };

export class FaultProxy {
  readonly port: number;
  /** Request lines, in order of arrival. */
  readonly requests: string[] = [];
  /** Says what happens to a request; told its line, `PUT /bucket/name?query HTTP/1.1`. */
  chooseFault: (requestLine: string) => ProxyFault | undefined = () => undefined;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();

  private constructor(server: Server, target: { readonly host: string; readonly port: number }) {
    this.#server = server;
    this.port = (server.address() as AddressInfo).port;
    server.on('connection', (client) => this.#relay(client, connect(target.port, target.host)));
  }

  static async start(targetUrl: string): Promise<FaultProxy> {
    const { hostname, port } = new URL(targetUrl);
    const server = createServer().listen(0, '127.0.0.1');
    await once(server, 'listening');
    return new FaultProxy(server, { host: hostname, port: Number(port) });
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  /** The first request whose line matches gets the fault, later ones do not. */
  failOnce(pattern: RegExp, fault: ProxyFault): void {
    let isDone = false;
    this.chooseFault = (line) => {
      if (isDone || !pattern.test(line)) return undefined;
      isDone = true;
      return fault;
    };
  }

  async stop(): Promise<void> {
    const closed = once(this.#server, 'close');
    this.#server.close();
    for (const socket of this.#sockets) socket.destroy();
    await closed;
  }

  #relay(client: Socket, server: Socket): void {
    let fault: ProxyFault | undefined;
    let requestBytes = 0;
    let replyBytes = 0;
    let headerEnd: number | undefined;
    const breakOff = (): void => {
      client.destroy();
      server.destroy();
    };
    for (const socket of [client, server]) {
      this.#sockets.add(socket);
      socket.setNoDelay(true);
      socket.on('error', breakOff).on('close', () => {
        this.#sockets.delete(socket);
        breakOff();
      });
    }
    client.on('data', (chunk: Buffer) => {
      const line = requestLine(chunk);
      if (line !== undefined) {
        this.requests.push(line);
        fault = this.chooseFault(line);
        requestBytes = 0;
        replyBytes = 0;
        headerEnd = undefined;
      }
      if (fault?.kind === 'refuse') return breakOff();
      if (fault?.kind === 'hang') return;
      if (fault?.kind === 'answer') {
        client.end(answer(fault.status, fault.code));
        return;
      }
      if (fault?.kind === 'cut-request' && requestBytes + chunk.length >= fault.afterBytes) {
        server.end(chunk.subarray(0, fault.afterBytes - requestBytes));
        client.destroy();
        return;
      }
      requestBytes += chunk.length;
      server.write(chunk);
    });
    server.on('data', (chunk: Buffer) => {
      if (isContinue(chunk)) {
        client.write(chunk);
        return;
      }
      if (fault?.kind === 'lose-reply') return breakOff();
      if (fault?.kind === 'cut-reply' && replyBytes + chunk.length >= fault.afterBytes) {
        client.write(chunk.subarray(0, fault.afterBytes - replyBytes), () => resetSocket(client));
        server.destroy();
        return;
      }
      if (fault?.kind === 'damage-reply') {
        if (headerEnd === undefined && chunk.includes('\r\n\r\n')) {
          headerEnd = replyBytes + chunk.indexOf('\r\n\r\n') + 4;
        }
        const at = (headerEnd ?? Infinity) + fault.atBodyByte - replyBytes;
        if (at >= 0 && at < chunk.length) chunk[at]! ^= 1;
      }
      replyBytes += chunk.length;
      if (fault?.kind === 'slow') setTimeout(() => client.write(chunk), fault.delayMs);
      else client.write(chunk);
    });
  }
}

function requestLine(chunk: Buffer): string | undefined {
  return /^(?:GET|HEAD|PUT|POST|DELETE) \S+ HTTP\/1\.1(?=\r\n)/.exec(chunk.toString('latin1', 0, 4096))?.[0];
}

function isContinue(chunk: Buffer): boolean {
  return chunk.toString('latin1', 0, 12) === 'HTTP/1.1 100';
}

function answer(status: number, code: string): string {
  const body = `<?xml version="1.0" encoding="UTF-8"?><Error><Code>${code}</Code><Message>by the proxy</Message></Error>`;
  const headers = `Content-Type: application/xml\r\nContent-Length: ${body.length}\r\nConnection: close`;
  return `HTTP/1.1 ${status} Fault\r\n${headers}\r\n\r\n${body}`;
}
