/**
 * Remote calls between the platform's processes, over TCP.
 *
 * Frames (see frames.ts):
 *   1 hello      client → server  token, UTF-8; must be the first frame
 *   2 request    client → server  {u32 LE json length, json {id, method, params}, attachment bytes}
 *   3 response   server → client  {u32 LE json length, json {id, result} or {id, error: {code, message}}, attachment}
 *
 * A lost connection fails the calls in flight as `unavailable`; the client connects anew for the next call and keeps trying until
 * that call's deadline. Methods are made to be repeatable.
 */
import { connect, createServer, type Server, type Socket } from 'node:net';
import { type ErrorCode, errorTable, StrataError, toStrataError } from './errors.ts';
import { encodeFrame, FrameReader } from './frames.ts';
import { type TokenClaims, verifyToken } from './token.ts';

const FRAME_HELLO = 1;
const FRAME_REQUEST = 2;
const FRAME_RESPONSE = 3;
const DEFAULT_TIMEOUT_MS = 60_000;
const HELLO_TIMEOUT_MS = 10_000;
const RECONNECT_DELAY_MS = 50;
/** Of who has not shown a token yet. */
const HELLO_BYTES_MAX = 8 * 1024;
const REQUEST_BYTES_MAX = 1 << 30;

export interface RpcReply {
  readonly result: unknown;
  readonly attachment?: Buffer;
}

export interface RpcContext {
  readonly claims: TokenClaims;
  /** Aborted when the caller's connection is gone. */
  readonly signal: AbortSignal;
  readonly attachment: Buffer;
}

export type RpcMethod = (params: never, context: RpcContext) => Promise<RpcReply> | RpcReply;

export interface RpcServerOptions {
  readonly host: string;
  readonly port: number;
  readonly secret: Uint8Array;
  readonly methods: Readonly<Record<string, RpcMethod>>;
  readonly onError?: (method: string, error: StrataError) => void;
}

export interface RpcServer {
  readonly port: number;
  close(): Promise<void>;
}

/** Listens and answers calls of callers whose token has scope `platform`. */
export async function serveRpc(options: RpcServerOptions): Promise<RpcServer> {
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    sockets.add(socket);
    socket.once('close', () => sockets.delete(socket));
    serveConnection(socket, options);
  });
  await listen(server, options.host, options.port);
  const address = server.address();
  return {
    port: typeof address === 'object' && address !== null ? address.port : options.port,
    close: async () => {
      for (const socket of sockets) socket.destroy();
      await new Promise<void>((resolve) => server.close(() => resolve()));
    },
  };
}

/** `server.listen` as a promise; rejects with the bind error. */
export async function listen(server: Server, host: string, port: number): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, host, () => {
      server.off('error', reject);
      resolve();
    });
  });
}

function serveConnection(socket: Socket, options: RpcServerOptions): void {
  const reader = new FrameReader(HELLO_BYTES_MAX);
  const gone = new AbortController();
  let claims: TokenClaims | undefined;
  let isChecking = false;
  socket.setNoDelay(true);
  const timer = setTimeout(() => {
    if (claims === undefined) socket.destroy();
  }, HELLO_TIMEOUT_MS);
  socket.on('error', () => socket.destroy());
  socket.on('close', () => {
    clearTimeout(timer);
    gone.abort();
  });

  const check = async (hello: Buffer): Promise<void> => {
    const found = await verifyToken(options.secret, hello.toString('utf8'));
    if (found.scope !== 'platform') throw new StrataError('forbidden', 'this token may not call this service');
    claims = found;
    reader.maxPayloadBytes = REQUEST_BYTES_MAX;
    isChecking = false;
    socket.resume();
    proceed();
  };
  const proceed = (): void => {
    try {
      while (!isChecking) {
        const frame = reader.next();
        if (frame === undefined) return;
        const { type, payload } = frame;
        if (type === FRAME_HELLO && claims === undefined) {
          isChecking = true;
          socket.pause();
          check(payload).catch(() => socket.destroy());
        } else if (type === FRAME_REQUEST && claims !== undefined) {
          answer(socket, payload, claims, gone.signal, options).catch(() => socket.destroy());
        } else {
          throw new StrataError('bad-request', `frame type ${type} is not expected here`);
        }
      }
    } catch {
      socket.destroy();
    }
  };
  socket.on('data', (chunk) => {
    reader.push(chunk);
    proceed();
  });
}

async function answer(
  socket: Socket,
  payload: Buffer,
  claims: TokenClaims,
  signal: AbortSignal,
  options: RpcServerOptions,
): Promise<void> {
  const { json, attachment } = decodeBody(payload);
  const { id, method, params } = json as { id: number; method: string; params: unknown };
  let reply: Buffer;
  try {
    const handler = Object.hasOwn(options.methods, method) ? options.methods[method] : undefined;
    if (handler === undefined) throw new StrataError('bad-request', `unknown method "${method}"`);
    const { result, attachment: bytes } = await handler(params as never, { claims, signal, attachment });
    reply = encodeBody(FRAME_RESPONSE, { id, result }, bytes);
  } catch (error) {
    const coded = toStrataError(error);
    if (!signal.aborted) options.onError?.(method, coded);
    reply = encodeBody(FRAME_RESPONSE, { id, error: { code: coded.code, message: coded.message } });
  }
  if (!socket.destroyed) socket.write(reply);
}

export interface RpcClientOptions {
  readonly host: string;
  readonly port: number;
  readonly token: string;
  /** For messages: the service that is called. */
  readonly service: string;
}

export interface CallOptions {
  readonly attachment?: Uint8Array;
  readonly timeoutMs?: number;
  readonly signal?: AbortSignal;
}

interface PendingCall {
  resolve(reply: RpcReply): void;
  reject(error: StrataError): void;
}

/** One connection to a service, made when first needed and made anew after a loss. */
export class RpcClient {
  readonly #options: RpcClientOptions;
  readonly #pending = new Map<number, PendingCall>();
  #socket: Promise<Socket> | undefined;
  #nextId = 1;
  #closed = false;

  constructor(options: RpcClientOptions) {
    this.#options = options;
  }

  /** Rejects with the callee's coded error, `timeout`, or `unavailable`. */
  async call(method: string, params: unknown, options: CallOptions = {}): Promise<RpcReply> {
    const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    const deadline = performance.now() + timeoutMs;
    const socket = await this.#connected(deadline, options.signal);
    const id = this.#nextId++;
    return new Promise<RpcReply>((resolve, reject) => {
      const finish = (): void => {
        this.#pending.delete(id);
        clearTimeout(timer);
        options.signal?.removeEventListener('abort', onAbort);
      };
      const onAbort = (): void => {
        finish();
        reject(new StrataError('unavailable', `${this.#options.service}.${method} was aborted`));
      };
      const timer = setTimeout(
        () => {
          finish();
          reject(new StrataError('timeout', `${this.#options.service}.${method} gave no answer in ${timeoutMs} ms`));
        },
        Math.max(1, deadline - performance.now()),
      );
      options.signal?.addEventListener('abort', onAbort, { once: true });
      this.#pending.set(id, {
        resolve: (reply) => {
          finish();
          resolve(reply);
        },
        reject: (error) => {
          finish();
          reject(error);
        },
      });
      socket.write(encodeBody(FRAME_REQUEST, { id, method, params }, options.attachment));
    });
  }

  async close(): Promise<void> {
    this.#closed = true;
    const socket = await this.#socket?.catch(() => undefined);
    socket?.destroy();
  }

  async #connected(deadline: number, signal: AbortSignal | undefined): Promise<Socket> {
    for (;;) {
      if (this.#closed) throw new StrataError('unavailable', `the client of ${this.#options.service} is closed`);
      signal?.throwIfAborted();
      this.#socket ??= this.#connect();
      const attempt = this.#socket;
      try {
        return await attempt;
      } catch (error) {
        if (this.#socket === attempt) this.#socket = undefined;
        if (performance.now() + RECONNECT_DELAY_MS >= deadline) {
          const { host, port, service } = this.#options;
          throw new StrataError('unavailable', `${service} at ${host}:${port} cannot be reached`, { cause: error });
        }
        await new Promise((resolve) => setTimeout(resolve, RECONNECT_DELAY_MS));
      }
    }
  }

  async #connect(): Promise<Socket> {
    const { host, port, token, service } = this.#options;
    const socket = connect({ host, port, noDelay: true });
    const reader = new FrameReader();
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve);
      socket.once('error', reject);
    });
    socket.removeAllListeners('error');
    socket.on('error', () => socket.destroy());
    socket.on('close', () => {
      this.#socket = undefined;
      const lost = new StrataError('unavailable', `the connection to ${service} was lost`);
      for (const call of [...this.#pending.values()]) call.reject(lost);
    });
    socket.on('data', (chunk) => {
      try {
        reader.push(chunk);
        for (let frame = reader.next(); frame !== undefined; frame = reader.next()) this.#receive(frame.payload);
      } catch {
        socket.destroy();
      }
    });
    socket.write(encodeFrame(FRAME_HELLO, Buffer.from(token, 'utf8')));
    return socket;
  }

  #receive(payload: Buffer): void {
    const { json, attachment } = decodeBody(payload);
    const { id, result, error } = json as {
      id: number;
      result?: unknown;
      error?: { code: string; message: string };
    };
    const call = this.#pending.get(id);
    if (call === undefined) return;
    if (error !== undefined) {
      const code: ErrorCode = Object.hasOwn(errorTable, error.code) ? (error.code as ErrorCode) : 'internal';
      call.reject(new StrataError(code, error.message));
    } else {
      call.resolve({ result, attachment });
    }
  }
}

function encodeBody(type: number, json: unknown, attachment?: Uint8Array): Buffer {
  const text = Buffer.from(JSON.stringify(json), 'utf8');
  const length = Buffer.allocUnsafe(4);
  length.writeUInt32LE(text.length, 0);
  return attachment === undefined ? encodeFrame(type, length, text) : encodeFrame(type, length, text, attachment);
}

function decodeBody(payload: Buffer): { json: unknown; attachment: Buffer } {
  if (payload.length < 4) throw new StrataError('bad-request', `a message of ${payload.length} bytes is too short`);
  const length = payload.readUInt32LE(0);
  if (4 + length > payload.length) {
    throw new StrataError('bad-request', `a message claims ${length} bytes of JSON but has ${payload.length - 4}`);
  }
  return { json: JSON.parse(payload.toString('utf8', 4, 4 + length)), attachment: payload.subarray(4 + length) };
}
