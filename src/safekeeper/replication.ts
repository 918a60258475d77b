/**
 * A safekeeper as Postgres' own clients see it: the streaming replication protocol, for pg_receivewal and hot standbys. (Commands and formats: the
 * chapter "Streaming Replication Protocol" of Postgres' documentation.)
 *
 *   user       the timeline's id
 *   password   a token that may read the timeline (base/token.ts), in clear: this listens where the platform trusts the network
 *   database   anything
 *
 *   IDENTIFY_SYSTEM, SHOW, TIMELINE_HISTORY, START_REPLICATION [SLOT s] [PHYSICAL] X/X [TIMELINE 1]
 *
 * What is sent is committed, never more. A timeline is always Postgres' timeline 1, whatever branch it is: a new primary is a new start, not a promotion.
 * The segment in which it begins may be read from the segment's start, as pg_receivewal does: before the timeline's start it holds zeroes and the page
 * headers that say so. There are no slots: nothing is kept for a reader.
 *
 * A reader that knows several safekeepers is sent to the next one, by an SQLSTATE that says so to libpq, when this one cannot serve it at all. A start beyond
 * what is committed here is waited for a little: this safekeeper may just have begun, and hear of it soon. A reader that has not been
 * heard of for a minute is gone; it is asked for a sign of life before. Whoever does not read is sent no more than a message or two.
 *
 * Inside CopyData, to the client:    'w' u64 start, u64 end of what is committed, i64 time, WAL bytes
 *                                    'k' u64 end of what is committed, i64 time, u8 reply wanted
 *                  from the client:  'r' … u8 reply wanted at offset 33; 'h' feedback, which nobody here needs
 */
import { once } from 'node:events';
import type { Socket } from 'node:net';
import { StrataError, toStrataError } from '../base/errors.ts';
import { mayReadTimeline, verifyToken } from '../base/token.ts';
import { formatLsn, type Lsn, lsnHigh, lsnLow, parseLsn, segmentStart } from '../postgres/lsn.ts';
import {
  cstring,
  decodeStartupPacket,
  encodeErrorResponse,
  encodeMessage,
  encodeNegotiation,
  MessageReader,
  ProtocolError,
  type StartupPacket,
  startupPacketLength,
  type WireMessage,
} from '../postgres/wire.ts';
import type { Timeline } from './timeline.ts';
import type { Timelines } from './timelines.ts';
import { WalCursor } from './wal-cursor.ts';

export interface ReplicationContext {
  readonly secret: Uint8Array;
  readonly timelines: Timelines;
  readonly readerTimeoutMs: number | undefined;
}

const LOGIN_TIMEOUT_MS = 10_000;
/** Shorter than half of Postgres' wal_receiver_timeout. */
const KEEPALIVE_MS = 10_000;
/** As Postgres' own walsender has it. */
const MAX_SEND_BYTES = 128 * 1024;
const MAX_MESSAGE_BYTES = 64 * 1024;
/** What a client has said and we have not looked at; beyond it we do not listen. */
const MAX_INPUT_BYTES = 256 * 1024;
/** As wal_sender_timeout. */
const READER_TIMEOUT_MS = 60_000;
/** One for TLS and one for GSSAPI. */
const MAX_ENCRYPTION_REQUESTS = 2;
const AHEAD_WAIT_MS = 5_000;
/** Between the Unix epoch and that of Postgres' times. */
const POSTGRES_EPOCH_US = 946_684_800_000_000n;
const AUTHENTICATION_OK = 0;
const AUTHENTICATION_CLEARTEXT = 3;
const TEXT_OID = 25;
const INT8_OID = 20;
const STATUS_REPLY_WANTED_OFFSET = 33;
const SQLSTATES: Readonly<Record<string, string>> = {
  unauthorized: '28P01',
  forbidden: '28000',
  'not-found': '58P01',
  'bad-request': '42601',
};
/** cannot_connect_now: libpq goes on with the next of several hosts. */
const TRY_NEXT_HOST = '57P03';

const START_REPLICATION =
  /^START_REPLICATION(?:\s+SLOT\s+\S+)?(?:\s+PHYSICAL)?\s+([0-9A-F]{1,8}\/[0-9A-F]{1,8})(?:\s+TIMELINE\s+(\d+))?$/i;

const SETTINGS: Readonly<Record<string, string>> = { wal_segment_size: '16MB', data_directory_mode: '0700' };

/** Serves a connection whose first bytes were Postgres' protocol, until it closes. */
export function serveReplication(socket: Socket, context: ReplicationContext, opening: Buffer): void {
  const connection = new ReplicationConnection(socket, context);
  connection.serve(opening).then(
    () => socket.end(),
    (error: unknown) => {
      const { code, message } = toStrataError(error);
      const isHere = connection.isLoggedIn || code === 'unauthorized' || code === 'forbidden';
      const sqlstate = error instanceof ProtocolError ? '08P01' : isHere ? (SQLSTATES[code] ?? '58000') : TRY_NEXT_HOST;
      if (!socket.destroyed) socket.end(encodeErrorResponse({ severity: 'FATAL', code: sqlstate, message }));
      socket.destroySoon();
    },
  );
}

class ReplicationConnection {
  readonly #socket: Socket;
  readonly #context: ReplicationContext;
  readonly #messages = new MessageReader(MAX_MESSAGE_BYTES);
  readonly #gone = new AbortController();
  #startup = Buffer.alloc(0);
  #isStarted = false;
  #isLoggedIn = false;
  #heardAtMs = 0;
  #wake: (() => void) | undefined;

  constructor(socket: Socket, context: ReplicationContext) {
    this.#socket = socket;
    this.#context = context;
  }

  get isLoggedIn(): boolean {
    return this.#isLoggedIn;
  }

  /** Resolves when the client has ended; rejects with what it is to be told. */
  async serve(opening: Buffer): Promise<void> {
    const socket = this.#socket;
    socket.setNoDelay(true);
    socket.on('error', () => socket.destroy());
    const onGone = (): void => {
      this.#gone.abort();
      this.#wake?.();
    };
    socket.on('close', onGone);
    socket.on('end', onGone);
    socket.on('data', (chunk) => this.#received(chunk));
    const timer = setTimeout(() => socket.destroy(), LOGIN_TIMEOUT_MS);
    this.#received(opening);
    let timeline: Timeline | undefined;
    try {
      timeline = await this.#login();
    } finally {
      clearTimeout(timer);
    }
    if (timeline === undefined) return;
    this.#isLoggedIn = true;
    for (let message = await this.#next(); message !== undefined; message = await this.#next()) {
      if (message.type === 'X') return;
      if (message.type !== 'Q')
        throw new ProtocolError(`message ${JSON.stringify(message.type)} where a command is due`);
      const command = message.payload
        .toString('utf8', 0, message.payload.length - 1)
        .trim()
        .replace(/;$/, '');
      await this.#execute(timeline, command);
      // Who asks without end and reads no answer is not answered any more.
      if (!this.#socket.write(readyForQuery())) await this.#drained();
    }
  }

  #received(chunk: Buffer): void {
    this.#heardAtMs = performance.now();
    if (this.#isStarted) this.#messages.push(chunk);
    else this.#startup = Buffer.concat([this.#startup, chunk]);
    if (this.#messages.bufferedBytes > MAX_INPUT_BYTES) this.#socket.pause();
    this.#wake?.();
  }

  #taken(): WireMessage | undefined {
    const message = this.#messages.next();
    if (message === undefined && this.#socket.isPaused()) this.#socket.resume();
    return message;
  }

  /** What was written is with the system, or the client is gone. */
  async #drained(): Promise<void> {
    await once(this.#socket, 'drain', { signal: this.#gone.signal }).catch(() => {});
  }

  /** Undefined for who only wanted to cancel something: there is nothing to cancel here. */
  async #login(): Promise<Timeline | undefined> {
    const packet = await this.#startupPacket();
    if (packet === undefined) return undefined;
    const { protocol, parameters } = packet;
    this.#isStarted = true;
    this.#messages.push(this.#startup);
    const negotiation = encodeNegotiation(protocol, parameters);
    if (negotiation !== undefined) this.#socket.write(negotiation);
    this.#socket.write(encodeMessage('R', u32(AUTHENTICATION_CLEARTEXT)));
    const message = await this.#next();
    if (message?.type !== 'p') throw new ProtocolError('a password is due');
    const claims = await verifyToken(
      this.#context.secret,
      message.payload.toString('utf8', 0, message.payload.length - 1),
    );
    const timelineId = parameters.get('user') ?? '';
    if (!mayReadTimeline(claims, timelineId)) {
      throw new StrataError('forbidden', `this token is not for timeline ${timelineId}`);
    }
    const timeline = this.#context.timelines.getById(timelineId);
    await timeline.open();
    this.#socket.write(encodeMessage('R', u32(AUTHENTICATION_OK)));
    const reported = {
      server_version: `${timeline.identity.pgVersion}.0 (Strata)`,
      server_encoding: 'UTF8',
      client_encoding: 'UTF8',
      integer_datetimes: 'on',
      standard_conforming_strings: 'on',
    };
    for (const [name, value] of Object.entries(reported)) {
      this.#socket.write(encodeMessage('S', cstring(name), cstring(value)));
    }
    this.#socket.write(readyForQuery());
    return timeline;
  }

  async #startupPacket(): Promise<Extract<StartupPacket, { kind: 'startup' }> | undefined> {
    for (let refusals = 0; ;) {
      const length = startupPacketLength(this.#startup);
      if (length !== undefined && this.#startup.length >= length) {
        const packet = decodeStartupPacket(this.#startup.subarray(0, length));
        this.#startup = this.#startup.subarray(length);
        if (packet.kind === 'startup') return packet;
        if (packet.kind === 'cancel') return undefined;
        if (++refusals > MAX_ENCRYPTION_REQUESTS)
          throw new ProtocolError('encryption was refused, and is asked for again');
        this.#socket.write('N');
        continue;
      }
      if (this.#gone.signal.aborted) throw new ProtocolError('the client left while it logged in');
      await this.#arrival();
    }
  }

  /** Undefined when the client is gone. */
  async #next(): Promise<WireMessage | undefined> {
    for (;;) {
      const message = this.#taken();
      if (message !== undefined) return message;
      if (this.#gone.signal.aborted) return undefined;
      await this.#arrival();
    }
  }

  /** Something has come from the client. */
  async #arrival(): Promise<void> {
    await new Promise<void>((resolve) => {
      this.#wake = resolve;
    });
    this.#wake = undefined;
  }

  async #execute(timeline: Timeline, command: string): Promise<void> {
    const start = START_REPLICATION.exec(command);
    const shown = /^SHOW\s+(\w+)$/i.exec(command)?.[1]?.toLowerCase();
    if (start !== null) {
      let fromLsn: Lsn;
      try {
        fromLsn = parseLsn(start[1]!);
      } catch (error) {
        this.#refuse('22023', (error as RangeError).message);
        return;
      }
      await this.#startReplication(timeline, fromLsn, Number(start[2] ?? 1));
    } else if (/^IDENTIFY_SYSTEM$/i.test(command)) {
      const { systemId } = timeline.identity;
      this.#row('IDENTIFY_SYSTEM', [
        ['systemid', TEXT_OID, systemId],
        ['timeline', INT8_OID, '1'],
        ['xlogpos', TEXT_OID, formatLsn(timeline.commitLsn)],
        ['dbname', TEXT_OID, undefined],
      ]);
    } else if (shown !== undefined && Object.hasOwn(SETTINGS, shown)) {
      this.#row('SHOW', [[shown, TEXT_OID, SETTINGS[shown]]]);
    } else if (/^TIMELINE_HISTORY\s+\d+$/i.test(command)) {
      this.#refuse('58P01', 'there is no timeline history: a branch is always timeline 1');
    } else if (/^(CREATE|DROP|READ)_REPLICATION_SLOT\b/i.test(command)) {
      this.#refuse('0A000', 'a safekeeper has no replication slots');
    } else {
      this.#refuse('42601', `not a command of a safekeeper: ${command.slice(0, 100)}`);
    }
  }

  async #startReplication(timeline: Timeline, fromLsn: Lsn, timelineNumber: number): Promise<void> {
    const { startLsn } = timeline.identity;
    if (timelineNumber !== 1) {
      this.#refuse('58P01', `requested timeline ${timelineNumber} is not 1`);
      return;
    }
    if (fromLsn < segmentStart(startLsn)) {
      this.#refuse('58P01', `the WAL of this branch begins at ${formatLsn(startLsn)}, not ${formatLsn(fromLsn)}`);
      return;
    }
    const cursor = new WalCursor({ timeline, fromLsn, signal: this.#gone.signal });
    this.#wake = () => cursor.poke();
    const watchdog = this.#watchReader();
    try {
      const deadlineMs = performance.now() + AHEAD_WAIT_MS;
      while (fromLsn > timeline.commitLsn && performance.now() < deadlineMs && !this.#gone.signal.aborted) {
        await cursor.arrival(deadlineMs - performance.now());
        timeline.throwIfFailed();
      }
      if (fromLsn > timeline.commitLsn) {
        const end = formatLsn(timeline.commitLsn);
        this.#refuse('58P01', `requested starting point ${formatLsn(fromLsn)} is ahead of what is committed, ${end}`);
        return;
      }
      this.#socket.write(encodeMessage('W', Buffer.from([0, 0, 0])));
      if (!(await this.#stream(timeline, cursor))) return;
    } finally {
      this.#wake = undefined;
      clearInterval(watchdog);
      await cursor.close();
    }
    this.#socket.write(encodeMessage('c'));
    this.#socket.write(encodeMessage('C', cstring('START_STREAMING')));
  }

  /** Ends the connection of a reader that is silent for too long, whatever is under way. */
  #watchReader(): NodeJS.Timeout {
    const timeoutMs = this.#context.readerTimeoutMs ?? READER_TIMEOUT_MS;
    const look = (): void => {
      if (performance.now() - this.#heardAtMs > timeoutMs) this.#socket.destroy();
    };
    return setInterval(look, timeoutMs / 4);
  }

  /** True when the client has ended the stream, false when it is gone. */
  async #stream(timeline: Timeline, cursor: WalCursor): Promise<boolean> {
    const silenceMs = (this.#context.readerTimeoutMs ?? READER_TIMEOUT_MS) / 3;
    const keepaliveMs = Math.min(KEEPALIVE_MS, silenceMs);
    let toldLsn = -1;
    let toldAtMs = 0;
    while (!this.#gone.signal.aborted) {
      for (let message = this.#taken(); message !== undefined; message = this.#taken()) {
        if (message.type === 'c') return true;
        if (message.type === 'X') return false;
        if (message.type !== 'd')
          throw new ProtocolError(`message ${JSON.stringify(message.type)} while WAL is streamed`);
        if (isReplyWanted(message)) toldLsn = -1;
      }
      const { lsn } = cursor;
      const bytes = await cursor.read(MAX_SEND_BYTES);
      const { commitLsn } = timeline;
      if (bytes !== undefined) {
        const hasRoom = this.#socket.write(encodeMessage('d', walHead(lsn, commitLsn), bytes));
        toldLsn = commitLsn;
        toldAtMs = performance.now();
        if (!hasRoom) await this.#drained();
      } else if (toldLsn < commitLsn || performance.now() - toldAtMs >= keepaliveMs) {
        this.#socket.write(encodeMessage('d', keepalive(commitLsn, performance.now() - this.#heardAtMs > silenceMs)));
        toldLsn = commitLsn;
        toldAtMs = performance.now();
      } else {
        await cursor.arrival(keepaliveMs);
      }
    }
    return false;
  }

  #row(tag: string, columns: readonly (readonly [name: string, oid: number, value: string | undefined])[]): void {
    const fields = columns.map(([name, oid]) => {
      const rest = Buffer.alloc(18);
      rest.writeUInt32BE(oid, 6);
      rest.writeInt16BE(oid === INT8_OID ? 8 : -1, 10);
      rest.writeInt32BE(-1, 12);
      return Buffer.concat([cstring(name), rest]);
    });
    const values = columns.map(([, , value]) => {
      if (value === undefined) return u32(0xffffffff);
      return Buffer.concat([u32(Buffer.byteLength(value)), Buffer.from(value)]);
    });
    this.#socket.write(encodeMessage('T', u16(columns.length), ...fields));
    this.#socket.write(encodeMessage('D', u16(columns.length), ...values));
    this.#socket.write(encodeMessage('C', cstring(tag)));
  }

  #refuse(code: string, message: string): void {
    this.#socket.write(encodeErrorResponse({ severity: 'ERROR', code, message }));
  }
}

function isReplyWanted({ type, payload }: WireMessage): boolean {
  return type === 'd' && payload[0] === 0x72 && payload[STATUS_REPLY_WANTED_OFFSET] === 1;
}

function walHead(lsn: Lsn, commitLsn: Lsn): Buffer {
  const head = Buffer.alloc(25);
  head.write('w', 0, 'latin1');
  writeLsnBE(head, lsn, 1);
  writeLsnBE(head, commitLsn, 9);
  head.writeBigInt64BE(postgresTimeUs(), 17);
  return head;
}

function keepalive(commitLsn: Lsn, isReplyWanted: boolean): Buffer {
  const bytes = Buffer.alloc(18);
  bytes.write('k', 0, 'latin1');
  writeLsnBE(bytes, commitLsn, 1);
  bytes.writeBigInt64BE(postgresTimeUs(), 9);
  bytes[17] = isReplyWanted ? 1 : 0;
  return bytes;
}

function writeLsnBE(bytes: Buffer, lsn: Lsn, offset: number): void {
  bytes.writeUInt32BE(lsnHigh(lsn), offset);
  bytes.writeUInt32BE(lsnLow(lsn), offset + 4);
}

function postgresTimeUs(): bigint {
  return BigInt(Date.now()) * 1_000n - POSTGRES_EPOCH_US;
}

function readyForQuery(): Buffer {
  return encodeMessage('Z', 'I');
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

function u16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
}
