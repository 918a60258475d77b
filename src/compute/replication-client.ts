/**
 * A physical replication connection to a local Postgres: log in, make the slot, stream WAL, report what is durable. (Formats: the chapters
 * "Streaming Replication Protocol" and "Message Formats" of Postgres' documentation; integers are big-endian.)
 *
 * Inside CopyData, from the server:   'w' u64 start, u64 server's end, i64 time, WAL bytes
 *                                     'k' u64 server's end, i64 time, u8 reply wanted
 *               from us:              'r' u64 written, u64 flushed, u64 applied, i64 time, u8 reply wanted
 *
 * WAL is passed on as it comes, also in pieces of a message: nothing is put together or copied here. All of it is received into one buffer, which is
 * used again once the handler has returned: every commit waits for this connection, and a stream's chunks cost as much again as reading them.
 */
import { connect, type Socket } from 'node:net';
import { StrataError } from '../base/errors.ts';
import { formatLsn, type Lsn, lsnHigh, lsnLow } from '../postgres/lsn.ts';
import {
  cstring,
  decodeErrorResponse,
  encodeMessage,
  encodeStartupPacket,
  MessageReader,
  type WireMessage,
} from '../postgres/wire.ts';
import { ScramClient } from './scram-client.ts';

const TYPE_COPY_DATA = 0x64; // d
const KIND_WAL = 0x77; // w
const KIND_KEEPALIVE = 0x6b; // k
const KIND_STATUS = 0x72; // r
const MESSAGE_HEADER_BYTES = 5;
const WAL_HEADER_BYTES = 25;
const KEEPALIVE_BYTES = 18;
const STATUS_BYTES = 34;
const DUPLICATE_OBJECT = '42710';
const NO_BYTES = Buffer.alloc(0);
const RECEIVE_BYTES = 64 * 1024;
const LOGIN_TIMEOUT_MS = 10_000;
const AUTHENTICATION = { ok: 0, sasl: 10, saslContinue: 11, saslFinal: 12 } as const;

export interface ReplicationOptions {
  readonly socketDir: string;
  readonly port: number;
  readonly user: string;
  readonly password: string;
  readonly applicationName: string;
}

export interface ReplicationHandlers {
  /** The bytes are there only until it returns. */
  onWal(lsn: Lsn, bytes: Buffer): void;
  /** The server wants to know at once how far we are. */
  onStatusWanted(): void;
  /** Called once, whoever closed. */
  onClose(reason: string): void;
}

export class ReplicationClient {
  readonly #socket: Socket;
  readonly #reader = new MessageReader();
  #waiting: { resolve(message: WireMessage): void; reject(error: Error): void } | undefined;
  #received: WireMessage[] = [];
  #handlers: ReplicationHandlers | undefined;
  #closeReason: string | undefined;
  #serverPid: number | undefined;

  // While streaming: bytes of an incomplete header, and what is left of the WAL of the current message.
  #rest: Buffer = NO_BYTES;
  #walLsn: Lsn = 0;
  #walLeft = 0;

  private constructor(path: string) {
    const buffer = Buffer.allocUnsafeSlow(RECEIVE_BYTES);
    const callback = (bytes: number): boolean => {
      this.#receivedBytes(buffer.subarray(0, bytes));
      return true;
    };
    const socket = connect({ path, onread: { buffer, callback } });
    this.#socket = socket;
    socket.on('error', (error) => this.#closed(error.message));
    socket.on('close', () => this.#closed('Postgres closed the connection'));
  }

  /** Logs in, by SCRAM or where Postgres trusts us. Throws `unavailable` with what Postgres says. */
  static async connect(options: ReplicationOptions): Promise<ReplicationClient> {
    const client = new ReplicationClient(`${options.socketDir}/.s.PGSQL.${options.port}`);
    const timer = setTimeout(() => client.#closed('no answer to the login'), LOGIN_TIMEOUT_MS);
    try {
      await client.#login(options);
    } catch (error) {
      client.close();
      throw error;
    } finally {
      clearTimeout(timer);
    }
    return client;
  }

  /** Of the process that serves this connection; undefined when it did not say so. */
  get serverPid(): number | undefined {
    return this.#serverPid;
  }

  /** Makes the physical slot unless it exists; from then on Postgres keeps WAL that was not reported as flushed. */
  async ensureSlot(name: string): Promise<void> {
    this.#query(`CREATE_REPLICATION_SLOT "${name}" PHYSICAL RESERVE_WAL`);
    for (;;) {
      const message = await this.#next();
      if (message.type === 'E') {
        const error = decodeErrorResponse(message.payload);
        if (error.code !== DUPLICATE_OBJECT) throw failure(error.message);
      } else if (message.type === 'Z') {
        return;
      }
    }
  }

  /** From when it resolves the handlers are called. */
  async stream(slotName: string, startLsn: Lsn, handlers: ReplicationHandlers): Promise<void> {
    this.#query(`START_REPLICATION SLOT "${slotName}" PHYSICAL ${formatLsn(startLsn)} TIMELINE 1`);
    for (;;) {
      const message = await this.#next();
      if (message.type === 'E') throw failure(decodeErrorResponse(message.payload).message);
      if (message.type === 'W') break; // CopyBothResponse
    }
    if (this.#closeReason !== undefined) throw failure(this.#closeReason);
    this.#handlers = handlers;
    // What came with the answer.
    const early = this.#received.splice(0).map(({ type, payload }) => encodeMessage(type, payload));
    this.#streamBytes(Buffer.concat([...early, this.#reader.takeRest()]));
  }

  /** Everything before `lsn` is durable. */
  sendStatus(lsn: Lsn): void {
    if (this.#closeReason !== undefined) return;
    const message = Buffer.alloc(MESSAGE_HEADER_BYTES + STATUS_BYTES);
    message[0] = TYPE_COPY_DATA;
    message.writeUInt32BE(4 + STATUS_BYTES, 1);
    message[5] = KIND_STATUS;
    for (let at = 6; at < 30; at += 8) {
      message.writeUInt32BE(lsnHigh(lsn), at);
      message.writeUInt32BE(lsnLow(lsn), at + 4);
    }
    this.#socket.write(message);
  }

  pause(): void {
    this.#socket.pause();
  }

  resume(): void {
    this.#socket.resume();
  }

  close(): void {
    this.#closed('closed by us');
  }

  async #login(options: ReplicationOptions): Promise<void> {
    const { user, password, applicationName } = options;
    const parameters = new Map([
      ['user', user],
      ['replication', 'true'],
      ['application_name', applicationName],
    ]);
    this.#socket.write(encodeStartupPacket(parameters));
    const scram = new ScramClient(password);
    for (;;) {
      const { type, payload } = await this.#next();
      if (type === 'E') throw failure(decodeErrorResponse(payload).message);
      if (type === 'Z') return;
      if (type === 'K') this.#serverPid = payload.readUInt32BE(0); // BackendKeyData
      if (type !== 'R') continue;
      const kind = payload.readUInt32BE(0);
      const text = payload.toString('utf8', 4);
      if (kind === AUTHENTICATION.sasl) {
        const first = Buffer.from(scram.first());
        const length = Buffer.alloc(4);
        length.writeUInt32BE(first.length);
        this.#socket.write(encodeMessage('p', cstring('SCRAM-SHA-256'), length, first));
      } else if (kind === AUTHENTICATION.saslContinue) {
        this.#socket.write(encodeMessage('p', scram.final(text)));
      } else if (kind === AUTHENTICATION.saslFinal) {
        scram.verify(text);
      } else if (kind !== AUTHENTICATION.ok) {
        throw failure(`it wants authentication method ${kind}`);
      }
    }
  }

  #query(text: string): void {
    this.#socket.write(encodeMessage('Q', cstring(text)));
  }

  #next(): Promise<WireMessage> {
    const message = this.#received.shift();
    if (message !== undefined) return Promise.resolve(message);
    if (this.#closeReason !== undefined) return Promise.reject(failure(this.#closeReason));
    return new Promise((resolve, reject) => {
      this.#waiting = { resolve, reject };
    });
  }

  #receivedBytes(chunk: Buffer): void {
    try {
      if (this.#handlers !== undefined) {
        this.#streamBytes(chunk);
        return;
      }
      this.#reader.push(Buffer.from(chunk));
      for (let message = this.#reader.next(); message !== undefined; message = this.#reader.next()) {
        const waiting = this.#waiting;
        this.#waiting = undefined;
        if (waiting === undefined) this.#received.push(message);
        else waiting.resolve(message);
      }
    } catch (error) {
      this.#closed(error instanceof Error ? error.message : String(error));
    }
  }

  #streamBytes(chunk: Buffer): void {
    let bytes = this.#rest.length > 0 ? Buffer.concat([this.#rest, chunk]) : chunk;
    const handlers = this.#handlers!;
    for (;;) {
      if (this.#walLeft > 0) {
        if (bytes.length === 0) break;
        const wal = bytes.subarray(0, this.#walLeft);
        handlers.onWal(this.#walLsn, wal);
        this.#walLsn += wal.length;
        this.#walLeft -= wal.length;
        bytes = bytes.subarray(wal.length);
        continue;
      }
      const taken = this.#takeHeader(bytes, handlers);
      if (taken === 0) break;
      bytes = bytes.subarray(taken);
    }
    this.#rest = bytes.length === 0 ? NO_BYTES : Buffer.from(bytes);
  }

  /** How many bytes were a message, or the part of it before its WAL; 0 when more are needed. */
  #takeHeader(bytes: Buffer, handlers: ReplicationHandlers): number {
    if (bytes.length < MESSAGE_HEADER_BYTES + 1) return 0;
    const end = 1 + bytes.readUInt32BE(1);
    const isCopyData = bytes[0] === TYPE_COPY_DATA;
    if (isCopyData && bytes[MESSAGE_HEADER_BYTES] === KIND_WAL) {
      const head = MESSAGE_HEADER_BYTES + WAL_HEADER_BYTES;
      if (bytes.length < head) return 0;
      this.#walLsn = bytes.readUInt32BE(6) * 2 ** 32 + bytes.readUInt32BE(10);
      this.#walLeft = end - head;
      return head;
    }
    if (bytes.length < end) return 0;
    if (isCopyData && bytes[MESSAGE_HEADER_BYTES] === KIND_KEEPALIVE) {
      if (bytes[MESSAGE_HEADER_BYTES + KEEPALIVE_BYTES - 1] === 1) handlers.onStatusWanted();
    } else if (bytes[0] === 0x45 /* E */) {
      this.#closed(decodeErrorResponse(bytes.subarray(MESSAGE_HEADER_BYTES, end)).message);
    }
    return end; // CopyDone and CommandComplete: Postgres is shutting down, and closes.
  }

  #closed(reason: string): void {
    if (this.#closeReason !== undefined) return;
    this.#closeReason = reason;
    this.#socket.destroy();
    this.#waiting?.reject(failure(reason));
    this.#handlers?.onClose(reason);
  }
}

function failure(reason: string): StrataError {
  return new StrataError('unavailable', `replication connection to Postgres: ${reason}`);
}
