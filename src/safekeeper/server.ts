/**
 * A safekeeper's connections: proposers, readers, watchers and callers (api/safekeeper-protocol.ts), and Postgres' own replication clients
 * (replication.ts), on one port.
 *
 * Frames of a connection are handled in order. A frame whose handling must wait (checking the token, opening a timeline) holds those
 * behind it; a proposer's appends never wait. Who does not read what is answered is not listened to.
 */
import { once } from 'node:events';
import type { Socket } from 'node:net';
import { type Frame, FRAME_HEADER_BYTES, FrameReader } from '../base/frames.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import { mayReadTimeline, signToken, type TokenClaims, verifyToken } from '../base/token.ts';
import type { MendRequest, RebuildRequest, TimelineIdentity } from '../api/safekeeper.ts';
import {
  APPEND_FIXED_BYTES,
  decodeFeedback,
  decodeHello,
  decodeHurry,
  decodeJson,
  decodeProposerMessage,
  encodeAcceptorMessage,
  encodeFeedback,
  encodeGreetingReply,
  encodeHelloReply,
  encodeJson,
  encodeProgress,
  FRAME,
  type CreateRequest,
  type GiveRequest,
  type Greeting,
  type PageserverFeedback,
  MAX_FRAME_BYTES,
  type ReadRequest,
} from '../api/safekeeper-protocol.ts';
import type { Configuration } from '../consensus/configuration.ts';
import type { AcceptorMessage, Append, ProposerMessage } from '../consensus/messages.ts';
import { serveReplication } from './replication.ts';
import type { ProposerLink, Timeline } from './timeline.ts';
import { progressOf, type Timelines } from './timelines.ts';
import { resumePoint } from './wal-cursor.ts';
import { Hurry, streamWal } from './wal-stream.ts';

const HELLO_TIMEOUT_MS = 10_000;
/** How often progress is sent to watchers, the first after a silence at once: whoever follows a timeline closely reads its WAL. */
const WATCH_INTERVAL_MS = 100;
const WATCH_BATCH = 1_000;
const MAX_QUEUED_FRAMES = 64;
/** From who has not shown the platform's token. */
const MAX_STRANGER_FRAME_BYTES = 16 * 1024;
/** First bytes of the codes in startup packets: versions 3.x, and requests for encryption. */
const POSTGRES_CODES: readonly number[] = [0x00, 0x04];

export interface ServerContext {
  readonly nodeId: number;
  readonly secret: Uint8Array;
  readonly timelines: Timelines;
  readonly readerTimeoutMs: number | undefined;
}

/** Serves one accepted connection until it closes. Its first bytes tell whether it is one of ours or a Postgres client's. */
export function serveConnection(socket: Socket, context: ServerContext): void {
  let opening = Buffer.alloc(0);
  const timer = setTimeout(() => socket.destroy(), HELLO_TIMEOUT_MS);
  const onError = (): void => void socket.destroy();
  const onData = (chunk: Buffer): void => {
    opening = Buffer.concat([opening, chunk]);
    if (opening.length < FRAME_HEADER_BYTES) return;
    clearTimeout(timer);
    socket.off('data', onData);
    socket.off('error', onError);
    // A frame's type, or the first byte of a code of Postgres' protocol, all of which are others.
    if (POSTGRES_CODES.includes(opening[4]!)) serveReplication(socket, context, opening);
    else new Connection(socket, context).start(opening);
  };
  socket.on('error', onError);
  socket.on('close', () => clearTimeout(timer));
  socket.on('data', onData);
}

class Connection implements ProposerLink {
  readonly #socket: Socket;
  readonly #context: ServerContext;
  readonly #reader = new FrameReader(MAX_STRANGER_FRAME_BYTES);
  readonly #frames: Frame[] = [];
  readonly #gone = new AbortController();
  #claims: TokenClaims | undefined;
  #timeline: Timeline | undefined;
  /** Greeted for, and not there. */
  #offered: TimelineIdentity | undefined;
  /** The piece of a large append that was taken last, and how much of it is still to come. */
  #append: (Append & { readonly leftBytes: number }) | undefined;
  #busy = false;
  /** Its unwritten WAL is as much as may be in memory. */
  #isTimelineFull = false;
  #use: 'proposer' | 'reader' | 'watcher' | undefined;
  /** Of a reader. */
  readonly #hurry = new Hurry();

  constructor(socket: Socket, context: ServerContext) {
    this.#socket = socket;
    this.#context = context;
  }

  start(opening: Buffer): void {
    const socket = this.#socket;
    socket.setNoDelay(true);
    const timer = setTimeout(() => {
      if (this.#claims === undefined) socket.destroy();
    }, HELLO_TIMEOUT_MS);
    socket.on('error', () => socket.destroy());
    socket.on('close', () => {
      clearTimeout(timer);
      this.#gone.abort();
      this.#timeline?.detach(this);
    });
    const onData = (chunk: Buffer): void => {
      try {
        this.#reader.push(chunk);
        this.#readAppend();
        this.#readFrames();
      } catch (error) {
        this.fail(toStrataError(error));
      }
    };
    socket.on('data', onData);
    socket.on('drain', () => this.#listen());
    onData(opening);
  }

  /** Goes on with what comes, unless there is a reason left not to. */
  #listen(): void {
    if (!this.#isTimelineFull && this.#frames.length === 0 && !this.#socket.writableNeedDrain) this.#socket.resume();
  }

  #readFrames(): void {
    while (!this.#isBeingVerified) {
      const frame = this.#reader.next();
      if (frame === undefined) break;
      if (frame.type === FRAME.hurry && this.#timeline === undefined) this.#hurry.raise(decodeHurry(frame.payload));
      else if (this.#busy) this.#frames.push(frame);
      else this.#handle(frame);
    }
    if (this.#timeline !== undefined && this.#frames.length === 0) this.#beginAppend(this.#timeline);
    if (this.#frames.length > MAX_QUEUED_FRAMES || this.#isBeingVerified) this.#socket.pause();
  }

  /** The hello is looked at: what comes after it is not, before it is known whose it is. */
  get #isBeingVerified(): boolean {
    return this.#busy && this.#claims === undefined;
  }

  // ProposerLink

  send(message: AcceptorMessage): void {
    if (this.#socket.destroyed || this.#socket.write(encodeAcceptorMessage(message))) return;
    this.#socket.pause(); // Who does not read what it is answered is not listened to; 'drain' goes on.
  }

  tell(feedback: PageserverFeedback): void {
    if (!this.#socket.destroyed) this.#socket.write(encodeFeedback([feedback]));
  }

  fail(error: StrataError): void {
    if (this.#socket.destroyed) return;
    this.#socket.end(encodeJson(FRAME.error, { code: error.code, message: error.message }));
    this.#socket.destroySoon();
  }

  /** A large append is taken piece by piece, as if it were several: joining its pieces would cost more than all else. */
  #beginAppend(timeline: Timeline): void {
    const part = this.#reader.nextPartial(FRAME.append, APPEND_FIXED_BYTES);
    if (part === undefined) return;
    const append = decodeProposerMessage(FRAME.append, part.payload) as Append;
    this.#append = { ...append, leftBytes: part.leftBytes };
    this.#take(timeline, append);
  }

  /** The rest of a large append, as much as is here. */
  #readAppend(): void {
    while (this.#append !== undefined) {
      const bytes = this.#reader.rest(this.#append.leftBytes);
      if (bytes === undefined) return;
      const beginLsn = this.#append.beginLsn + this.#append.bytes.length;
      const leftBytes = this.#append.leftBytes - bytes.length;
      const append: Append = { ...this.#append, beginLsn, bytes };
      this.#append = leftBytes === 0 ? undefined : { ...append, leftBytes };
      this.#take(this.#timeline!, append);
    }
  }

  #take(timeline: Timeline, message: ProposerMessage): void {
    if (this.#socket.writableEnded) return; // It has failed.
    if (timeline.receive(this, message)) return;
    this.#isTimelineFull = true;
    this.#socket.pause();
    timeline.onWritable(() => {
      this.#isTimelineFull = false;
      this.#listen();
    });
  }

  #handle(frame: Frame): void {
    if (this.#socket.writableEnded) return; // It has failed.
    const pending = this.#dispatch(frame);
    if (pending === undefined) return;
    this.#busy = true;
    pending.then(
      () => this.#resume(),
      (error: unknown) => this.fail(toStrataError(error)),
    );
  }

  #resume(): void {
    this.#busy = false;
    try {
      while (!this.#busy && !this.#socket.destroyed) {
        const frame = this.#frames.shift();
        if (frame === undefined) break;
        this.#handle(frame);
      }
      if (this.#frames.length > 0) return;
      this.#listen();
      this.#readFrames();
    } catch (error) {
      this.fail(toStrataError(error));
    }
  }

  #dispatch(frame: Frame): Promise<void> | undefined {
    const { type, payload } = frame;
    if (this.#timeline !== undefined) {
      const message = decodeProposerMessage(type, payload);
      if (message === undefined) throw new StrataError('bad-request', `frame type ${type} from a proposer`);
      this.#take(this.#timeline, message);
      return undefined;
    }
    if (type === FRAME.hello) return this.#hello(payload);
    if (this.#claims === undefined) throw new StrataError('unauthorized', 'the first frame must be a hello');
    switch (type) {
      case FRAME.greeting:
        return this.#greeting(decodeJson(payload) as Greeting);
      case FRAME.create:
        return this.#create(decodeJson(payload) as CreateRequest);
      case FRAME.read:
        return this.#read(decodeJson(payload) as ReadRequest);
      case FRAME.feedback:
        this.#requirePlatform();
        this.#context.timelines.feedback(decodeFeedback(payload));
        return undefined;
      case FRAME.watch:
        this.#watch();
        return undefined;
      case FRAME.request:
        return this.#call(decodeJson(payload) as { id: number; method: string; params: unknown });
      default:
        throw new StrataError('bad-request', `unknown frame type ${type}`);
    }
  }

  async #hello(payload: Buffer): Promise<void> {
    if (this.#claims !== undefined) throw new StrataError('bad-request', 'a second hello');
    this.#claims = await verifyToken(this.#context.secret, decodeHello(payload));
    if (this.#claims.scope === 'platform') this.#reader.maxPayloadBytes = MAX_FRAME_BYTES;
    this.#socket.write(encodeHelloReply(this.#context.nodeId));
  }

  /** A connection has one use. */
  #begin(use: 'proposer' | 'reader' | 'watcher'): void {
    if (this.#use !== undefined) throw new StrataError('bad-request', `a ${this.#use}'s connection has no other use`);
    this.#use = use;
  }

  async #greeting(greeting: Greeting): Promise<void> {
    this.#begin('proposer');
    const { tenantId, timelineId, startLsn, pgVersion, systemId } = greeting;
    this.#requirePlatform(); // a compute's token lets it read; who may propose may also take the lead and write
    const identity: TimelineIdentity = { tenantId, timelineId, startLsn, pgVersion, systemId };
    const { timelines, nodeId } = this.#context;
    const timeline = await timelines.find(identity);
    if (timeline !== undefined) {
      await this.#follow(timeline);
      return;
    }
    this.#offered = identity;
    this.#socket.write(encodeGreetingReply({ kind: 'absent', nodeId, incarnation: timelines.incarnation }));
  }

  async #create(request: CreateRequest): Promise<void> {
    const { timelines } = this.#context;
    if (this.#offered === undefined) throw new StrataError('bad-request', 'a log is made after a greeting only');
    assertIncarnation(timelines, request.incarnation);
    await timelines.assertUnused(this.#offered, request.state);
    await this.#follow(await timelines.getOrCreate(this.#offered, request.state));
  }

  async #follow(timeline: Timeline): Promise<void> {
    await timeline.open();
    if (this.#gone.signal.aborted) return;
    this.#timeline = timeline;
    const { hasLeader } = timeline;
    timeline.attach(this);
    this.#socket.write(
      encodeGreetingReply({ kind: 'present', nodeId: this.#context.nodeId, hasLeader, ...timeline.greeting }),
    );
    const { feedback } = timeline.kept;
    if (feedback !== undefined) this.tell(feedback);
  }

  async #read(request: ReadRequest): Promise<void> {
    this.#begin('reader');
    this.#authorize(request.timelineId);
    const timeline = this.#context.timelines.get(request.tenantId, request.timelineId);
    if (request.isRebuild === true) this.#requirePlatform();
    if (request.term !== undefined || request.isRebuild === true) await timeline.open();
    await streamWal(this.#socket, timeline, request, this.#hurry, this.#gone.signal);
  }

  #watch(): void {
    this.#requirePlatform();
    this.#begin('watcher');
    const { timelines } = this.#context;
    const moved = new Set<Timeline>();
    let timer: NodeJS.Timeout | undefined;
    let flushedAtMs = 0;
    const schedule = (): void => {
      timer ??= setTimeout(flush, Math.max(0, flushedAtMs + WATCH_INTERVAL_MS - performance.now()));
    };
    const flush = (): void => {
      timer = undefined;
      flushedAtMs = performance.now();
      if (this.#socket.destroyed || this.#socket.writableNeedDrain) return; // 'drain' flushes.
      const batch = Array.from(moved, progressOf);
      moved.clear();
      if (batch.length > 0) this.#socket.write(encodeProgress(batch));
    };
    const stop = timelines.watch((timeline) => {
      moved.add(timeline);
      schedule();
    });
    this.#socket.on('drain', schedule);
    this.#gone.signal.addEventListener('abort', () => {
      stop();
      clearTimeout(timer);
    });
    const all = timelines.list();
    for (let from = 0; from === 0 || from < all.length; from += WATCH_BATCH) {
      this.#socket.write(encodeProgress(all.slice(from, from + WATCH_BATCH)));
    }
  }

  async #call(request: { id: number; method: string; params: unknown }): Promise<void> {
    const { id, method, params } = request;
    let reply: unknown;
    try {
      reply = { id, result: (await this.#answer(method, params)) ?? null };
    } catch (error) {
      const { code, message } = toStrataError(error);
      reply = { id, error: { code, message } };
    }
    if (this.#socket.destroyed || this.#socket.write(encodeJson(FRAME.response, reply))) return;
    await once(this.#socket, 'drain', { signal: this.#gone.signal }).catch(() => {});
  }

  async #answer(method: string, params: unknown): Promise<unknown> {
    const { timelines } = this.#context;
    const { tenantId, timelineId } = params as { tenantId: string; timelineId: string };
    switch (method) {
      case 'status': {
        this.#authorize(timelineId);
        const timeline = timelines.get(tenantId, timelineId);
        await timeline.open();
        return timeline.status;
      }
      case 'walStatus':
        this.#requirePlatform();
        return timelines.walStatus();
      case 'offloadAgain':
        this.#requirePlatform();
        await timelines.offloadAgain(tenantId, timelineId);
        return null;
      case 'list':
        this.#requirePlatform();
        return timelines.list();
      case 'resumePoint':
        this.#requirePlatform();
        return resumePoint(timelines.get(tenantId, timelineId));
      case 'rebuildTimeline':
        this.#requirePlatform();
        await timelines.rebuild(params as RebuildRequest, await signToken(this.#context.secret, { scope: 'platform' }));
        return null;
      case 'mendWal':
        this.#requirePlatform();
        return timelines.mend(params as MendRequest, await signToken(this.#context.secret, { scope: 'platform' }));
      case 'createTimeline':
        this.#requirePlatform();
        await timelines.getOrCreate(params as TimelineIdentity);
        return null;
      case 'configure':
        this.#requirePlatform();
        await timelines.configure((params as { configuration: Configuration }).configuration);
        return { incarnation: timelines.incarnation };
      case 'giveTimeline': {
        this.#requirePlatform();
        const { timeline, incarnation, state } = params as GiveRequest;
        assertIncarnation(timelines, incarnation);
        await timelines.getOrCreate(timeline, state);
        return null;
      }
      case 'deleteTimeline':
        this.#requirePlatform();
        await timelines.delete(tenantId, timelineId);
        return null;
      default:
        throw new StrataError('bad-request', `unknown method "${method}"`);
    }
  }

  #authorize(timelineId: string): void {
    if (this.#claims === undefined || !mayReadTimeline(this.#claims, timelineId)) {
      throw new StrataError('forbidden', `this token is not for timeline ${timelineId}`);
    }
  }

  #requirePlatform(): void {
    if (this.#claims?.scope !== 'platform') throw new StrataError('forbidden', 'this token is for one timeline only');
  }
}

function assertIncarnation(timelines: Timelines, incarnation: string): void {
  if (incarnation === timelines.incarnation) return;
  throw new StrataError('conflict', `this safekeeper is incarnation ${timelines.incarnation}, not ${incarnation}`);
}
