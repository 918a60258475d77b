/**
 * The safekeeper as other services see it: a client for each use of a connection. The bytes are in safekeeper-protocol.ts.
 *
 *   SafekeeperClient   status, list, create and delete timelines
 *   readWal            a timeline's WAL from an LSN on, following the commit LSN
 *   watchCommits       the commit LSNs of all timelines, as they move
 *   SafekeeperConnection   frames, for who speaks the protocol itself (the proposer)
 *
 * Nothing here connects anew: a stream that ends rejects with `unavailable` and the caller starts another one from where it got to.
 */
import { connect, type OnReadOpts, type Socket } from 'node:net';
import { errorTable, type ErrorCode, StrataError } from '../base/errors.ts';
import { type Frame, FrameReader } from '../base/frames.ts';
import type { AcceptorState } from '../consensus/acceptor.ts';
import type { Configuration } from '../consensus/configuration.ts';
import type { TermHistory } from '../consensus/messages.ts';
import type { LogPosition } from '../consensus/term-history.ts';
import type { Lsn } from '../postgres/lsn.ts';
import {
  decodeJson,
  decodeProgress,
  decodeWal,
  type ErrorBody,
  encodeFeedback,
  encodeHello,
  encodeHurry,
  encodeJson,
  FRAME,
  type GiveRequest,
  type Greeting,
  type PageserverFeedback,
  type ReadRequest,
  type TimelineProgress,
  type TimelineWalStatus,
  type WalChunk,
} from './safekeeper-protocol.ts';

export type { PageserverFeedback, TimelineProgress, TimelineWalStatus, WalChunk } from './safekeeper-protocol.ts';

const CONNECT_TIMEOUT_MS = 5_000;
const CALL_TIMEOUT_MS = 30_000;
/** All of a log may be copied. */
const REBUILD_TIMEOUT_MS = 660_000;
const RECEIVE_BYTES = 16 * 1024;
/** What is smaller is joined by copying: that costs less than a write of several buffers. */
const JOINED_BYTES_MAX = 4 * 1024;
/** Frames that a stream's consumer has not taken yet; beyond it the socket is paused. */
const MAX_QUEUED_FRAMES = 16;

export interface SafekeeperAddress {
  readonly host: string;
  readonly port: number;
  /** Of a Unix socket, for who is on the same machine: it takes half of TCP's processor time. */
  readonly socketPath?: string;
}

/** What must be known to start a timeline's log. */
export interface TimelineIdentity {
  readonly tenantId: string;
  readonly timelineId: string;
  /** Where the branch begins: its ancestor's LSN, the end of a whole record. */
  readonly startLsn: Lsn;
  readonly pgVersion: number;
  /** Postgres' system identifier, a u64 in decimal. */
  readonly systemId: string;
}

export interface SafekeeperTimelineStatus extends TimelineIdentity {
  readonly term: number;
  readonly generation: number;
  readonly configuration: Configuration;
  readonly lastLogTerm: number;
  /** Of what is flushed. */
  readonly history: TermHistory;
  readonly flushLsn: Lsn;
  readonly commitLsn: Lsn;
  /** The first byte that is on its disk; what is before is in the object store, if anywhere. */
  readonly localStartLsn: Lsn;
  /** What is before was seen in the object store. */
  readonly offloadedLsn: Lsn;
  /** False: the log was lost and given anew, and is not complete yet; or damaged. */
  readonly isVoter: boolean;
  /** Of who is no voter: from where on it is one. What is before was perhaps acknowledged by the log that was here. */
  readonly votesFrom?: LogPosition;
  /** A proposer whose log this is, is connected. */
  readonly hasLeader: boolean;
  /** Proposers that are connected now. */
  readonly proposerCount: number;
}

/** A safekeeper that has a log's WAL up to there. */
export interface WalSource {
  readonly nodeId: number;
  readonly address: SafekeeperAddress;
  readonly endLsn: Lsn;
}

/** A log whose committed WAL is to be looked at, and mended from these: each has it up to where it knows it to be committed. */
export interface MendRequest {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly sources: readonly WalSource[];
}

/** A log that was lost with a quorum of its disks, as it is to be again. */
export interface RebuildRequest {
  readonly timeline: TimelineIdentity;
  /** Its first byte: the timeline's start, or later when what is before is nowhere. */
  readonly logStartLsn: Lsn;
  /** The state of its acceptor; its commitLsn is the end of a record, and of the log unless it is copied. */
  readonly state: AcceptorState;
  /**
   * The log is copied, from logStartLsn to endLsn, both ends of records, from these, the one that has most of it first; where that is damaged, from the others and
   * the object store. May be the safekeeper itself. Without it the log's last segment is in the object store.
   */
  readonly copy?: { readonly endLsn: Lsn; readonly sources: readonly WalSource[] };
  /** A log that is there is put aside; otherwise it is refused. */
  readonly replace: boolean;
}

export interface SafekeeperEndpoint {
  readonly address: SafekeeperAddress;
  readonly token: string;
}

export interface ReadWalOptions extends SafekeeperEndpoint, ReadRequest {
  readonly signal?: AbortSignal;
  /** Is given what tells the safekeeper that somebody waits for the WAL before an LSN; otherwise what is new comes several times a second. */
  readonly onConnected?: (hurry: (lsn: Lsn) => void) => void;
}

/**
 * Reads WAL from `fromLsn` up to the commit LSN and follows it. Each chunk begins where the one before ended; a chunk without bytes only
 * brings a newer commit LSN. Ends by the signal; rejects with `not-found`, `bad-request` (before the timeline's start), `unavailable`.
 */
export async function* readWal(options: ReadWalOptions): AsyncGenerator<WalChunk, void, void> {
  const { tenantId, timelineId, fromLsn, term, isRebuild, onConnected, signal } = options;
  const request: ReadRequest = {
    tenantId,
    timelineId,
    fromLsn,
    ...(term === undefined ? {} : { term }),
    ...(isRebuild === undefined ? {} : { isRebuild }),
  };
  const onOpen = (connection: SafekeeperConnection): void => {
    onConnected?.((lsn) => connection.write(encodeHurry(lsn)));
  };
  for await (const frame of streamFrames(options, encodeJson(FRAME.read, request), signal, onOpen)) {
    if (frame.type === FRAME.wal) yield decodeWal(frame.payload);
  }
}

export interface WatchCommitsOptions extends SafekeeperEndpoint {
  readonly signal?: AbortSignal;
  /** For a pageserver: is given, once connected, what tells the safekeeper how far it has got. */
  readonly onConnected?: (tell: (entries: readonly PageserverFeedback[]) => void) => void;
}

/**
 * All timelines of the safekeeper first (possibly in several batches, possibly an empty one), then each that moved, coalesced. A commit LSN
 * may be lower than one seen before the safekeeper restarted: the consumer keeps the highest.
 */
export async function* watchCommits(options: WatchCommitsOptions): AsyncGenerator<TimelineProgress[], void, void> {
  const { onConnected, signal } = options;
  const onOpen = (connection: SafekeeperConnection): void => {
    onConnected?.((entries) => connection.write(encodeFeedback(entries)));
  };
  for await (const frame of streamFrames(options, encodeJson(FRAME.watch, {}), signal, onOpen)) {
    if (frame.type === FRAME.progress) yield decodeProgress(frame.payload);
  }
}

/** Calls to one safekeeper, over one connection made when first needed and made anew after a loss. */
export class SafekeeperClient {
  readonly #endpoint: SafekeeperEndpoint;
  readonly #pending = new Map<number, { resolve(result: unknown): void; reject(error: Error): void }>();
  #connection: SafekeeperConnection | undefined;
  #nextId = 1;

  constructor(endpoint: SafekeeperEndpoint) {
    this.#endpoint = endpoint;
  }

  /** Rejects with `not-found` for a timeline that this safekeeper does not have. */
  async status(tenantId: string, timelineId: string): Promise<SafekeeperTimelineStatus> {
    return (await this.#call('status', { tenantId, timelineId })) as SafekeeperTimelineStatus;
  }

  /** Where a log that is given anew may begin: the end of a record before which everybody has what he needs. */
  async resumePoint(tenantId: string, timelineId: string): Promise<Lsn> {
    return (await this.#call('resumePoint', { tenantId, timelineId })) as Lsn;
  }

  /** Durable when it resolves. Rejects with `conflict` when the safekeeper has the log and is not told to replace it. */
  async rebuildTimeline(rebuild: RebuildRequest): Promise<void> {
    await this.#call('rebuildTimeline', rebuild, REBUILD_TIMEOUT_MS);
  }

  /** Has the committed WAL on its disk looked at, record by record; how many places were damaged, and are mended. Rejects when nobody has what is damaged. */
  async mendWal(request: MendRequest): Promise<number> {
    return (await this.#call('mendWal', request, REBUILD_TIMEOUT_MS)) as number;
  }

  async walStatus(): Promise<TimelineWalStatus[]> {
    return (await this.#call('walStatus', {})) as TimelineWalStatus[];
  }

  /** Has all WAL that is on its disk brought to the object store again, where that does not have it any more. */
  async offloadAgain(tenantId: string, timelineId: string): Promise<void> {
    await this.#call('offloadAgain', { tenantId, timelineId });
  }

  async list(): Promise<TimelineProgress[]> {
    return (await this.#call('list', {})) as TimelineProgress[];
  }

  /** Durable when it resolves. Repeatable with the same identity. For a timeline that was never used; proposers make theirs themselves. */
  async createTimeline(timeline: TimelineIdentity): Promise<void> {
    await this.#call('createTimeline', timeline);
  }

  /** Durable when it resolves; the id can never be used again. Repeatable; deleting what never was leaves a tombstone too. */
  async deleteTimeline(tenantId: string, timelineId: string): Promise<void> {
    await this.#call('deleteTimeline', { tenantId, timelineId });
  }

  /** Durable when it resolves: from then on the safekeeper makes no timeline under an older configuration. Tells its incarnation. */
  async configure(configuration: Configuration): Promise<{ readonly incarnation: string }> {
    return (await this.#call('configure', { configuration })) as { incarnation: string };
  }

  /** Gives it an empty log, if it has none. Rejects with `conflict` when it has been started anew since `incarnation`. */
  async giveTimeline(timeline: TimelineIdentity, incarnation: string, state: AcceptorState): Promise<void> {
    await this.#call('giveTimeline', { timeline: greetingOf(timeline), incarnation, state } satisfies GiveRequest);
  }

  close(): void {
    this.#connection?.close();
    this.#connection = undefined;
  }

  #call(method: string, params: unknown, timeoutMs = CALL_TIMEOUT_MS): Promise<unknown> {
    this.#connection ??= this.#connect();
    const connection = this.#connection;
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#pending.delete(id);
        reject(new StrataError('timeout', `safekeeper ${method} gave no answer in ${timeoutMs} ms`));
      }, timeoutMs);
      this.#pending.set(id, {
        resolve: (result) => {
          clearTimeout(timer);
          resolve(result);
        },
        reject: (error) => {
          clearTimeout(timer);
          reject(error);
        },
      });
      connection.write(encodeJson(FRAME.request, { id, method, params }));
    });
  }

  #connect(): SafekeeperConnection {
    const connection = new SafekeeperConnection(this.#endpoint, {
      onFrame: (frame) => {
        if (frame.type === FRAME.response) this.#answered(frame);
      },
      onClose: (error) => {
        if (this.#connection === connection) this.#connection = undefined;
        const calls = [...this.#pending.values()];
        this.#pending.clear();
        for (const call of calls) call.reject(error);
      },
    });
    return connection;
  }

  #answered(frame: Frame): void {
    const { id, result, error } = decodeJson(frame.payload) as { id: number; result?: unknown; error?: ErrorBody };
    const call = this.#pending.get(id);
    this.#pending.delete(id);
    if (error === undefined) call?.resolve(result);
    else call?.reject(toError(error));
  }
}

export interface ConnectionHandlers {
  onFrame(frame: Frame): void;
  /** False: a frame is needed until `onFrame` returns and no longer, so that all are received into one buffer, which is cheaper. */
  readonly keepsFrames?: boolean;
  /** Called once, whoever closed. */
  onClose(error: StrataError): void;
}

/** One connection, greeted with the token; writing may begin at once. */
export class SafekeeperConnection {
  readonly #socket: Socket;
  readonly #handlers: ConnectionHandlers;
  readonly #name: string;
  #closed = false;

  constructor(endpoint: SafekeeperEndpoint, handlers: ConnectionHandlers) {
    const { keepsFrames = true } = handlers;
    const { host, port, socketPath } = endpoint.address;
    this.#handlers = handlers;
    this.#name = `safekeeper ${host}:${port}`;
    const reader = new FrameReader();
    const receive = (chunk: Buffer): void => {
      try {
        reader.push(chunk);
        for (let frame = reader.next(); frame !== undefined && !this.#closed; frame = reader.next()) {
          if (frame.type === FRAME.helloReply) clearTimeout(timer);
          else if (frame.type === FRAME.error) this.#close(toError(decodeJson(frame.payload) as ErrorBody));
          else handlers.onFrame(frame);
        }
        if (!keepsFrames) reader.keepRest();
      } catch (error) {
        this.#close(
          error instanceof StrataError
            ? error
            : new StrataError('internal', `${this.#name}: ${String(error)}`, { cause: error }),
        );
      }
    };
    const onread = keepsFrames ? undefined : receiveInto(Buffer.allocUnsafeSlow(RECEIVE_BYTES), receive);
    const socket = connect({
      ...(socketPath === undefined ? { host, port, noDelay: true } : { path: socketPath }),
      onread,
    });
    this.#socket = socket;
    if (keepsFrames) socket.on('data', receive);
    const timer = setTimeout(
      () => this.#close(new StrataError('unavailable', `${this.#name} gave no answer in ${CONNECT_TIMEOUT_MS} ms`)),
      CONNECT_TIMEOUT_MS,
    );
    socket.on('error', (error) => {
      this.#close(new StrataError('unavailable', `${this.#name}: ${error.message}`, { cause: error }));
    });
    socket.on('close', () => {
      clearTimeout(timer);
      this.#close(new StrataError('unavailable', `${this.#name} closed the connection`));
    });
    socket.write(encodeHello(endpoint.token));
  }

  /** Bytes that wait in this process to be sent. */
  get queuedBytes(): number {
    return this.#socket.writableLength;
  }

  /** The parts leave as one write. */
  write(...parts: readonly Uint8Array[]): void {
    if (this.#closed) return;
    let bytes = 0;
    for (const part of parts) bytes += part.length;
    if (bytes <= JOINED_BYTES_MAX) {
      this.#socket.write(parts.length === 1 ? parts[0]! : Buffer.concat(parts, bytes));
      return;
    }
    this.#socket.cork();
    for (const part of parts) this.#socket.write(part);
    this.#socket.uncork();
  }

  /** Calls back once when all that was written has left this process. */
  onceDrained(callback: () => void): void {
    this.#socket.once('drain', callback);
  }

  pause(): void {
    this.#socket.pause();
  }

  resume(): void {
    this.#socket.resume();
  }

  close(): void {
    this.#close(new StrataError('unavailable', `the connection to ${this.#name} was closed`));
  }

  /** Sends what was written, then closes; resolves when that is done, or after the timeout. */
  async end(timeoutMs: number): Promise<void> {
    if (this.#closed) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, timeoutMs);
      this.#socket.once('close', () => {
        clearTimeout(timer);
        resolve();
      });
      this.#socket.end();
    });
    this.close();
  }

  #close(error: StrataError): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#socket.destroy();
    this.#handlers.onClose(error);
  }
}

/** For net.connect: everything comes into this one buffer. */
function receiveInto(buffer: Buffer, receive: (chunk: Buffer) => void): OnReadOpts {
  const callback = (bytes: number): boolean => {
    receive(buffer.subarray(0, bytes));
    return true;
  };
  return { buffer, callback };
}

/** The frames that answer one opening frame, with a bound on those that wait to be taken. */
async function* streamFrames(
  endpoint: SafekeeperEndpoint,
  opening: Buffer,
  signal: AbortSignal | undefined,
  onOpen?: (connection: SafekeeperConnection) => void,
): AsyncGenerator<Frame, void, void> {
  if (signal?.aborted) return;
  const queue: Frame[] = [];
  let closed: StrataError | undefined;
  let wake: (() => void) | undefined;
  const connection = new SafekeeperConnection(endpoint, {
    onFrame: (frame) => {
      queue.push(frame);
      if (queue.length >= MAX_QUEUED_FRAMES) connection.pause();
      wake?.();
    },
    onClose: (error) => {
      closed = error;
      wake?.();
    },
  });
  const onAbort = (): void => connection.close();
  signal?.addEventListener('abort', onAbort, { once: true });
  connection.write(opening);
  onOpen?.(connection);
  try {
    for (;;) {
      const frame = queue.shift();
      if (signal?.aborted) return;
      if (frame !== undefined) {
        if (queue.length === 0) connection.resume();
        yield frame;
      } else if (closed !== undefined) {
        throw closed;
      } else {
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
        wake = undefined;
      }
    }
  } finally {
    signal?.removeEventListener('abort', onAbort);
    connection.close();
  }
}

function toError(body: ErrorBody): StrataError {
  const code: ErrorCode = Object.hasOwn(errorTable, body.code) ? (body.code as ErrorCode) : 'internal';
  return new StrataError(code, body.message);
}

/** The greeting of a proposer for this timeline. */
export function greetingOf(timeline: TimelineIdentity): Greeting {
  const { tenantId, timelineId, startLsn, pgVersion, systemId } = timeline;
  return { tenantId, timelineId, startLsn, pgVersion, systemId };
}
