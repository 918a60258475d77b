/**
 * Serves pages to computes, by the protocol of api/pages.ts.
 *
 * A connection is for one timeline, whose token it must show. Its requests are answered in order; one whose LSN is not ingested yet holds
 * up those after it. Pages are read and answered without a promise, one write for each response; after SLICE_MS, or when the client does
 * not take what was written, others come first. A large response is made in pieces: between them others come first when it took long, and this
 * client's socket when it has not taken the response before, so that of a scan one response travels while the next is made.
 */

import { createServer } from 'node:net';
import type { Server, Socket } from 'node:net';
import { setImmediate as yieldToOthers } from 'node:timers/promises';
import {
  decodePageHello,
  decodePageRequest,
  encodeHelloReply,
  encodePageError,
  encodePagesHeader,
  PAGE_REQUEST_BYTES,
  PAGE_RESPONSE_HEADER_BYTES,
} from '../api/pages.ts';
import type { PageRequest } from '../api/pages.ts';
import { StrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { listen } from '../base/rpc.ts';
import { mayReadTimeline, verifyToken } from '../base/token.ts';
import { formatLsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { LayerAbsentError, LayerDamagedError } from './layers/block.ts';
import type { Timeline } from './timeline.ts';
import type { Timelines } from './timelines.ts';
import { ResponseMemory } from './response-memory.ts';
import { RepairBound } from './whole-reads.ts';
import type { Repair } from './whole-reads.ts';

export interface PageServiceOptions {
  readonly host: string;
  readonly port: number;
  readonly secret: Uint8Array;
  readonly timelines: Timelines;
  readonly log: Logger;
  /** How long a request waits for its LSN. */
  readonly waitLsnTimeoutMs?: number;
  /** Without it damage is an error at once. */
  readonly repair?: Repair;
}

const HELLO_TIMEOUT_MS = 10_000;
const HELLO_BYTES_MAX = 8 * 1024;
const WAIT_LSN_TIMEOUT_MS = 60_000;
const SLICE_MS = 5;
/** About half a millisecond of work. */
const PIECE_PAGES = 16;
/** Who waits for one page waits no longer than this for each of those who want many. */
const PIECES_SLICE_MS = 1;
/** Requests not yet answered; beyond it no more are taken from the socket. */
const PENDING_BYTES_MAX = 64 * 1024;
/** Responses that the client has not taken; beyond it no more are made. */
const UNSENT_BYTES_MAX = 8 * 1024 * 1024;

export class PageService {
  readonly #options: PageServiceOptions;
  readonly #server: Server;
  readonly #connections = new Set<PageConnection>();
  readonly #memory = new ResponseMemory();

  private constructor(options: PageServiceOptions) {
    this.#options = options;
    this.#server = createServer((socket) => {
      const connection = new PageConnection(socket, this.#options, this.#memory);
      this.#connections.add(connection);
      socket.once('close', () => this.#connections.delete(connection));
    });
  }

  /** Resolves when it accepts connections. */
  static async start(options: PageServiceOptions): Promise<PageService> {
    const service = new PageService(options);
    await listen(service.#server, options.host, options.port);
    return service;
  }

  get port(): number {
    const address = this.#server.address();
    return typeof address === 'object' && address !== null ? address.port : this.#options.port;
  }

  async close(): Promise<void> {
    for (const connection of this.#connections) connection.destroy();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
  }
}

class PageConnection {
  readonly #socket: Socket;
  readonly #options: PageServiceOptions;
  readonly #memory: ResponseMemory;
  readonly #gone = new AbortController();
  readonly #helloTimer: NodeJS.Timeout;
  #input: Buffer = Buffer.alloc(0);
  /** Undefined until the hello is accepted. */
  #timeline: Timeline | undefined;
  /** Something is under way that will look at the input when it is done. */
  #isBusy = false;
  #loggedErrors = 0;

  constructor(socket: Socket, options: PageServiceOptions, memory: ResponseMemory) {
    this.#socket = socket;
    this.#options = options;
    this.#memory = memory;
    socket.setNoDelay(true);
    this.#helloTimer = setTimeout(() => socket.destroy(), HELLO_TIMEOUT_MS);
    socket.on('error', () => socket.destroy());
    socket.once('close', () => {
      clearTimeout(this.#helloTimer);
      this.#gone.abort();
    });
    socket.on('data', (chunk: Buffer) => {
      this.#input = this.#input.length === 0 ? chunk : Buffer.concat([this.#input, chunk]);
      if (!this.#isBusy) this.#proceed();
      if (this.#isBusy && this.#input.length > PENDING_BYTES_MAX) socket.pause();
    });
  }

  destroy(): void {
    this.#socket.destroy();
  }

  #proceed(): void {
    try {
      if (this.#timeline === undefined) this.#takeHello();
      else this.#answerRequests(this.#timeline);
    } catch (error) {
      // Not a message of this protocol: nothing that follows can be understood.
      this.#options.log.warn({ err: error, client: this.#socket.remoteAddress }, 'page connection broken off');
      this.#socket.destroy();
    }
  }

  #takeHello(): void {
    const hello = decodePageHello(this.#input);
    if (hello === undefined) {
      if (this.#input.length > HELLO_BYTES_MAX) throw new StrataError('bad-request', 'the hello is too long');
      return;
    }
    this.#input = this.#input.subarray(hello.bytes);
    const { token, timelineId } = hello.value;
    this.#after(
      verifyToken(this.#options.secret, token).then((claims) => {
        if (!mayReadTimeline(claims, timelineId)) {
          throw new StrataError('forbidden', `this token is not for timeline ${timelineId}`);
        }
        this.#timeline = this.#options.timelines.get(timelineId);
        clearTimeout(this.#helloTimer);
        this.#socket.write(encodeHelloReply({ kind: 'welcome' }));
      }),
      (error) => {
        this.#options.log.warn({ timelineId, reason: error.message }, 'page connection refused');
        this.#socket.end(encodeHelloReply({ kind: 'refused', message: error.message }));
      },
    );
  }

  #answerRequests(timeline: Timeline): void {
    const startMs = performance.now();
    let at = 0;
    const socket = this.#socket;
    try {
      for (;;) {
        const request = decodePageRequest(this.#input, at);
        if (request === undefined) return;
        if (socket.writableLength > UNSENT_BYTES_MAX) {
          this.#after(new Promise<void>((resolve) => this.#onceWritable(resolve)));
          return;
        }
        if (!timeline.isVisible(request.lsn)) {
          this.#waitFor(timeline, request);
          at += PAGE_REQUEST_BYTES; // It is answered with an error when the wait fails, else read below.
          return;
        }
        at += PAGE_REQUEST_BYTES;
        if (request.count > PIECE_PAGES) {
          this.#after(this.#answerInPieces(timeline, request));
          return;
        }
        const damage = this.#answer(timeline, request);
        if (damage !== undefined) {
          this.#repair(timeline, request, damage);
          return;
        }
        if (performance.now() - startMs > SLICE_MS) {
          this.#after(new Promise<void>((resolve) => setImmediate(resolve)));
          return;
        }
      }
    } finally {
      if (at > 0) this.#input = this.#input.subarray(at);
    }
  }

  async #answerInPieces(timeline: Timeline, request: PageRequest): Promise<void> {
    const { lsn, blk, count } = request;
    const response = this.#memory.take(count);
    let sliceStartMs = performance.now();
    for (let done = 0; done < count; done += PIECE_PAGES) {
      if (done > 0 && (this.#socket.writableLength > 0 || performance.now() - sliceStartMs > PIECES_SLICE_MS)) {
        await yieldToOthers();
        sliceStartMs = performance.now();
      }
      try {
        const pieceCount = Math.min(PIECE_PAGES, count - done);
        const offset = PAGE_RESPONSE_HEADER_BYTES + done * BLOCK_SIZE;
        timeline.readPages(request, blk + done, pieceCount, lsn, response, offset);
      } catch (error) {
        if (error instanceof LayerDamagedError) return this.#repairNow(timeline, request, error);
        this.#socket.write(this.#errorOf(timeline, request, error));
        return;
      }
    }
    this.#writePages(request, response);
  }

  #waitFor(timeline: Timeline, request: PageRequest): void {
    const timeoutMs = this.#options.waitLsnTimeoutMs ?? WAIT_LSN_TIMEOUT_MS;
    this.#after(
      timeline.waitLsn(request.lsn, timeoutMs, this.#gone.signal).then(() => this.#answerRepaired(timeline, request)),
      (error) => this.#socket.write(encodePageError(request.requestId, error.message)),
    );
  }

  /** Answers when the layer is here and whole, or with why it cannot be. */
  #repair(timeline: Timeline, request: PageRequest, damage: LayerDamagedError): void {
    this.#after(this.#repairNow(timeline, request, damage));
  }

  async #repairNow(timeline: Timeline, request: PageRequest, damage: LayerDamagedError): Promise<void> {
    try {
      await this.#answerRepaired(timeline, request, damage);
    } catch (error) {
      if (this.#socket.destroyed) return;
      this.#socket.write(this.#errorOf(timeline, request, damage instanceof LayerAbsentError ? error : damage));
    }
  }

  async #answerRepaired(timeline: Timeline, request: PageRequest, known?: LayerDamagedError): Promise<void> {
    const bound = new RepairBound(this.#options.repair ?? ((damage) => Promise.reject(damage)));
    let damage = known ?? this.#answer(timeline, request);
    while (damage !== undefined) {
      await bound.repair(damage);
      damage = this.#answer(timeline, request);
    }
  }

  /** Answers, unless a layer is damaged or absent: that is returned. */
  #answer(timeline: Timeline, request: PageRequest): LayerDamagedError | undefined {
    const { lsn, blk, count } = request;
    try {
      const response = this.#memory.take(count);
      timeline.readPages(request, blk, count, lsn, response, PAGE_RESPONSE_HEADER_BYTES);
      this.#writePages(request, response);
    } catch (error) {
      if (error instanceof LayerDamagedError) return error;
      this.#socket.write(this.#errorOf(timeline, request, error));
    }
    return undefined;
  }

  /** Sends a response in whose memory the pages are. */
  #writePages({ requestId, count }: PageRequest, response: Buffer): void {
    encodePagesHeader(requestId, count * BLOCK_SIZE).copy(response);
    this.#socket.write(response, (error) => {
      // After an error the system may still be at it.
      if (error === undefined || error === null) this.#memory.giveBack(response, count);
    });
  }

  #errorOf(timeline: Timeline, request: PageRequest, error: unknown): Buffer {
    const { requestId, spc, db, rel, fork, blk, count, lsn } = request;
    const what = `pages ${spc}/${db}/${rel}.${fork} ${blk} + ${count} at ${formatLsn(lsn)}`;
    const reason = error instanceof Error ? error.message : String(error);
    // A client that asks again and again does not fill the log.
    if (this.#loggedErrors++ < 10) {
      this.#options.log.error({ timelineId: timeline.timelineId, err: error }, `${what} cannot be served`);
    }
    return encodePageError(requestId, `${what}: ${reason}`);
  }

  /** Calls back when the client has taken what was written, or is gone. */
  #onceWritable(callback: () => void): void {
    this.#socket.once('drain', callback);
    this.#gone.signal.addEventListener('abort', () => callback(), { once: true });
  }

  /** Goes on with the input when the promise is settled. */
  #after(promise: Promise<void>, failed?: (error: Error) => void): void {
    this.#isBusy = true;
    promise
      .catch((error: unknown) => {
        if (!this.#socket.destroyed) failed?.(error instanceof Error ? error : new Error(String(error)));
      })
      .finally(() => {
        this.#isBusy = false;
        if (this.#socket.destroyed || this.#socket.writableEnded) return;
        this.#proceed();
        if (!this.#isBusy || this.#input.length <= PENDING_BYTES_MAX) this.#socket.resume();
      })
      .catch(() => this.#socket.destroy());
  }
}
