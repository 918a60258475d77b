/**
 * The proxy: one port for every endpoint. It answers TLS requests, reads the startup message, asks the control plane to wake the endpoint while the
 * client waits, connects to its Postgres over a Unix socket, and from then on only relays bytes. The password exchange (SCRAM) is relayed too, so it is
 * Postgres that knows the passwords and the proxy that never does.
 *
 * A Postgres that is just going down or coming up says so (SQLSTATE 57P03), or nothing, before it asks for a password. The client does not get to see
 * that: the endpoint is woken again, and the same startup message goes to the Postgres that is up then.
 *
 * A cancel request comes on a connection of its own and carries only the key that the backend gave at its start: the proxy reads the keys that pass by
 * and remembers which compute each belongs to.
 *
 * Protocol: https://www.postgresql.org/docs/17/protocol-flow.html
 */
import { connect, createServer, type Server, Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { createSecureContext, TLSSocket } from 'node:tls';
import type { Admission, WakeService } from '../api/wake.ts';
import { errorTable, StrataError, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { listen } from '../base/rpc.ts';
import type { Certificate } from './certificate.ts';
import { findTarget, type Target } from './startup.ts';

export interface ProxyOptions {
  readonly host: string;
  readonly port: number;
  readonly certificate: Certificate;
  readonly wakeService: WakeService;
  readonly log: Logger;
  /** Roles that may not come in by this door (the platform's own superuser). */
  readonly refusedRoles: readonly string[];
}

export interface Proxy {
  readonly port: number;
  close(): Promise<void>;
}

const SSL_REQUEST = 80877103;
const GSSENC_REQUEST = 80877104;
const CANCEL_REQUEST = 80877102;
const PROTOCOL_MAJOR = 3;
const MAX_STARTUP_BYTES = 10_000; // MAX_STARTUP_PACKET_LENGTH in src/include/libpq/pqcomm.h
const STARTUP_TIMEOUT_MS = 60_000; // authentication_timeout of Postgres
/** How long a Postgres that refuses for now is asked again. */
const REFUSED_FOR_MS = 30_000;
const RETRY_DELAY_MAX_MS = 250;
/** What a client may send before it was answered; no client sends anything, but some might on purpose. */
const EARLY_BYTES_MAX = 16 * 1024;
/** The other side of a connection that is silent for this long is asked by TCP whether it is still there. */
const KEEP_ALIVE_MS = 60_000;
const TLS_HANDSHAKE_BYTE = 0x16;
const MESSAGE_HEADER_BYTES = 5;
const BACKEND_KEY_DATA = 0x4b; // 'K'
const READY_FOR_QUERY = 0x5a; // 'Z'
const ERROR_RESPONSE = 0x45; // 'E'
const CANNOT_CONNECT_NOW = '57P03';

export async function startProxy(options: ProxyOptions): Promise<Proxy> {
  const proxy = new RunningProxy(options);
  await proxy.listen();
  return proxy;
}

class RunningProxy implements Proxy {
  readonly #options: ProxyOptions;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  /** Cancel key (pid and secret, hex) → socket path of its compute. */
  readonly #cancelKeys = new Map<string, string>();
  readonly #secureContext;
  #port: number;

  constructor(options: ProxyOptions) {
    this.#options = options;
    this.#port = options.port;
    this.#secureContext = createSecureContext({ ...options.certificate, minVersion: 'TLSv1.2' });
    const keepAlive = { keepAlive: true, keepAliveInitialDelay: KEEP_ALIVE_MS };
    this.#server = createServer({ noDelay: true, pauseOnConnect: false, ...keepAlive }, (socket) => {
      this.#sockets.add(socket);
      socket.once('close', () => this.#sockets.delete(socket));
      socket.on('error', () => socket.destroy());
      void this.#serve(socket);
    });
  }

  async listen(): Promise<void> {
    await listen(this.#server, this.#options.host, this.#options.port);
    const address = this.#server.address();
    if (typeof address === 'object' && address !== null) this.#port = address.port;
  }

  get port(): number {
    return this.#port;
  }

  async close(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
  }

  async #serve(socket: Socket): Promise<void> {
    let client: Socket = socket;
    const startupTimer = setTimeout(() => client.destroy(), STARTUP_TIMEOUT_MS);
    try {
      const startup = await this.#negotiate(socket, (secured) => (client = secured));
      if (startup === undefined) return;
      clearTimeout(startupTimer);
      await this.#connectAndRelay(startup);
    } catch (error) {
      const coded = toStrataError(error);
      if (coded.code === 'internal') this.#options.log.warn({ err: error }, 'a client connection failed');
      if (!client.destroyed) client.end(encodeFatal(coded));
    } finally {
      clearTimeout(startupTimer);
    }
  }

  /** Answers TLS and encryption requests until the startup message is there. Undefined when there is nothing to relay (cancel, or gone). */
  async #negotiate(plain: Socket, secured: (socket: Socket) => void): Promise<Startup | undefined> {
    let socket: Socket = plain;
    let serverName: string | undefined;
    const first = await readBytes(socket, 1);
    if (first === undefined) return undefined;
    socket.unshift(first);
    if (first[0] === TLS_HANDSHAKE_BYTE) {
      // sslnegotiation=direct of libpq 17
      const tls = await this.#upgrade(socket, ['postgresql']);
      ({ socket, serverName } = tls);
      secured(socket);
    }
    for (;;) {
      const message = await readStartupPacket(socket);
      if (message === undefined) return undefined;
      const code = message.readUInt32BE(0);
      if (code === SSL_REQUEST && socket === plain) {
        socket.write('S');
        ({ socket, serverName } = await this.#upgrade(socket));
        secured(socket);
      } else if (code === SSL_REQUEST || code === GSSENC_REQUEST) {
        socket.write('N');
      } else if (code === CANCEL_REQUEST) {
        this.#cancel(message);
        socket.end();
        return undefined;
      } else if (code >>> 16 !== PROTOCOL_MAJOR) {
        throw new StrataError('bad-request', `protocol ${code >>> 16}.${code & 0xffff} is not supported, only 3.x is`);
      } else {
        return { client: socket, protocol: code, parameters: decodeParameters(message), serverName };
      }
    }
  }

  async #upgrade(socket: Socket, alpn?: string[]): Promise<{ socket: Socket; serverName: string | undefined }> {
    const tls = new TLSSocket(socket, {
      isServer: true,
      secureContext: this.#secureContext,
      ...(alpn === undefined ? {} : { ALPNProtocols: alpn }),
    });
    tls.on('error', () => tls.destroy());
    let serverName: string | undefined;
    await new Promise<void>((resolve, reject) => {
      tls.once('secure', resolve);
      tls.once('close', () => reject(new StrataError('bad-request', 'the TLS handshake failed')));
    });
    const name = (tls as TLSSocket & { servername?: string | false }).servername;
    if (typeof name === 'string') serverName = name;
    return { socket: tls, serverName };
  }

  async #connectAndRelay(startup: Startup): Promise<void> {
    const { client } = startup;
    const target = findTarget(startup.parameters, startup.serverName);
    if (this.#options.refusedRoles.includes(target.user)) {
      throw new StrataError('unauthorized', `role "${target.user}" belongs to the platform`);
    }
    const gone = new AbortController();
    const onGone = (): void => gone.abort();
    client.once('close', onGone);
    client.once('end', onGone);
    client.resume(); // without reading, a client that leaves while its endpoint wakes would not be noticed
    const early: Buffer[] = [];
    let earlyBytes = 0;
    const collect = (chunk: Buffer): void => {
      early.push(chunk);
      earlyBytes += chunk.length;
      if (earlyBytes > EARLY_BYTES_MAX) client.pause();
    };
    client.on('data', collect);
    const { socket, compute } = await this.#connectUpstream(target, startup.protocol, gone.signal);
    client.off('data', collect);
    client.off('end', onGone);
    client.off('close', onGone);
    client.pause();
    if (client.destroyed) {
      socket.destroy();
      compute.settled();
      return;
    }
    for (const chunk of early) socket.write(chunk);
    this.#relay(client, socket, compute);
  }

  /** A connection to the endpoint's Postgres that has answered the startup message; the answer is still to be read from it. */
  async #connectUpstream(
    target: Target,
    protocol: number,
    signal: AbortSignal,
  ): Promise<{ socket: Socket; compute: Admission }> {
    const startup = encodeStartup(protocol, target.parameters);
    const deadline = Date.now() + REFUSED_FOR_MS;
    for (let attempt = 1; ; attempt++) {
      const compute = await this.#options.wakeService.wake(target, signal);
      let cause: unknown;
      try {
        const socket = await connectUnix(compute.socketPath);
        if (await isAnswered(socket, startup, signal)) return { socket, compute };
      } catch (error) {
        cause = error;
      }
      compute.settled();
      signal.throwIfAborted();
      if (Date.now() > deadline) {
        throw new StrataError(
          'unavailable',
          `endpoint "${compute.endpointId}" is up but does not accept connections`,
          cause === undefined ? {} : { cause },
        );
      }
      await sleep(Math.min(20 * attempt, RETRY_DELAY_MAX_MS));
    }
  }

  #relay(client: Socket, upstream: Socket, compute: Admission): void {
    const { socketPath } = compute;
    let cancelKey: string | undefined;
    const watcher = new SessionStartWatcher((key) => {
      cancelKey = key;
      this.#cancelKeys.set(key, socketPath);
    });
    const watch = (chunk: Buffer): void => {
      if (!watcher.push(chunk)) return;
      upstream.off('data', watch);
      compute.settled();
    };
    upstream.on('data', watch);
    let ended = false;
    const end = (): void => {
      if (ended) return;
      ended = true;
      compute.settled();
      if (cancelKey !== undefined) this.#cancelKeys.delete(cancelKey);
    };
    upstream.once('close', () => {
      end();
      client.end();
    });
    client.once('close', () => {
      end();
      upstream.destroy();
    });
    upstream.pipe(client);
    client.pipe(upstream);
  }

  #cancel(message: Buffer): void {
    const socketPath = this.#cancelKeys.get(message.toString('hex', 4));
    if (socketPath === undefined) return;
    const socket = connect(socketPath);
    socket.on('error', () => socket.destroy());
    const length = Buffer.allocUnsafe(4);
    length.writeUInt32BE(message.length + 4, 0);
    socket.end(Buffer.concat([length, message]));
  }
}

interface Startup {
  readonly client: Socket;
  /** Protocol version as the client sent it, major << 16 | minor. */
  readonly protocol: number;
  readonly parameters: ReadonlyMap<string, string>;
  readonly serverName: string | undefined;
}

/**
 * Watches what Postgres sends until the session is ready, for the BackendKeyData message ('K': process id, secret).
 * push() is true when the session is ready or refused.
 */
class SessionStartWatcher {
  readonly #found: (key: string) => void;
  #buffer: Buffer = Buffer.alloc(0);

  constructor(found: (key: string) => void) {
    this.#found = found;
  }

  push(chunk: Buffer): boolean {
    this.#buffer = this.#buffer.length === 0 ? chunk : Buffer.concat([this.#buffer, chunk]);
    for (;;) {
      if (this.#buffer.length < MESSAGE_HEADER_BYTES) return false;
      const type = this.#buffer[0];
      const end = 1 + this.#buffer.readUInt32BE(1);
      if (type === READY_FOR_QUERY || type === ERROR_RESPONSE) return true;
      if (this.#buffer.length < end) return false;
      if (type === BACKEND_KEY_DATA) this.#found(this.#buffer.toString('hex', MESSAGE_HEADER_BYTES, end));
      this.#buffer = this.#buffer.subarray(end);
    }
  }
}

/**
 * Sends the startup message and reads the first answer, which is put back. False, and the socket destroyed, when Postgres cannot take clients now.
 */
async function isAnswered(socket: Socket, startup: Buffer, signal: AbortSignal): Promise<boolean> {
  const drop = (): void => void socket.destroy();
  const timer = setTimeout(drop, STARTUP_TIMEOUT_MS);
  signal.addEventListener('abort', drop, { once: true });
  try {
    socket.write(startup);
    const header = await readBytes(socket, MESSAGE_HEADER_BYTES);
    const body = header && (await readBytes(socket, Math.max(0, header.readUInt32BE(1) - 4)));
    if (header === undefined || body === undefined || signal.aborted) {
      socket.destroy();
      return false;
    }
    // Fields of an error: a letter, then text that ends with a zero byte; C is the SQLSTATE.
    if (header[0] === ERROR_RESPONSE && body.toString('latin1').split('\0').includes(`C${CANNOT_CONNECT_NOW}`)) {
      socket.destroy();
      return false;
    }
    socket.unshift(Buffer.concat([header, body]));
    return true;
  } finally {
    clearTimeout(timer);
    signal.removeEventListener('abort', drop);
  }
}

function connectUnix(path: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect(path);
    socket.once('connect', () => resolve(socket));
    socket.on('error', (error) => {
      socket.destroy();
      reject(error);
    });
  });
}

/**
 * Exactly `count` bytes, or undefined when the other side goes first. The listener stays for the whole wait: a new one is called at once while
 * anything is buffered, and adding one again and again for the rest of a message would keep the event loop from ever reading that rest.
 */
function readBytes(socket: Socket, count: number): Promise<Buffer | undefined> {
  if (count === 0) return Promise.resolve(Buffer.alloc(0));
  return new Promise((resolve) => {
    const finish = (bytes: Buffer | undefined): void => {
      for (const event of ['readable', 'end', 'close']) socket.off(event, attempt);
      resolve(bytes);
    };
    const attempt = (): void => {
      const bytes = socket.read(count) as Buffer | null;
      if (bytes !== null) finish(bytes.length === count ? bytes : undefined);
      else if (socket.readableEnded || socket.destroyed) finish(undefined);
    };
    for (const event of ['readable', 'end', 'close']) socket.on(event, attempt);
    attempt();
  });
}

/** The packet without its length: code, then parameters. */
async function readStartupPacket(socket: Socket): Promise<Buffer | undefined> {
  const header = await readBytes(socket, 4);
  if (header === undefined) return undefined;
  const length = header.readUInt32BE(0);
  if (length < 8 || length > MAX_STARTUP_BYTES) {
    throw new StrataError('bad-request', `a startup packet of ${length} bytes is not a Postgres client's`);
  }
  return readBytes(socket, length - 4);
}

function decodeParameters(message: Buffer): ReadonlyMap<string, string> {
  const words = message.toString('utf8', 4).split('\0');
  const parameters = new Map<string, string>();
  for (let i = 0; i + 1 < words.length && words[i] !== ''; i += 2) parameters.set(words[i] ?? '', words[i + 1] ?? '');
  return parameters;
}

function encodeStartup(protocol: number, parameters: ReadonlyMap<string, string>): Buffer {
  const text = [...parameters].map(([name, value]) => `${name}\0${value}\0`).join('');
  const body = Buffer.from(`${text}\0`, 'utf8');
  const packet = Buffer.allocUnsafe(8 + body.length);
  packet.writeUInt32BE(packet.length, 0);
  packet.writeUInt32BE(protocol, 4);
  packet.set(body, 8);
  return packet;
}

function encodeFatal(error: StrataError): Buffer {
  const { sqlState } = errorTable[error.code];
  const fields = `SFATAL\0VFATAL\0C${sqlState}\0M${error.message}\0\0`;
  const body = Buffer.from(fields, 'utf8');
  const message = Buffer.allocUnsafe(5 + body.length);
  message[0] = 0x45;
  message.writeUInt32BE(4 + body.length, 1);
  message.set(body, 5);
  return message;
}
