/**
 * The page protocol: how a compute's page shim asks the pageserver for pages as they were at an LSN. TCP, little-endian.
 *
 *   hello, client → server                        answer, server → client
 *   offset  size  field                           offset  size  field
 *        0     4  magic 0x50525453, "STRP"             0     4  status: 0 welcome, 1 refused
 *        4     2  version, 1                           4     4  message length
 *        6     2  token length n                       8     ·  message, UTF-8 (why it was refused)
 *        8     n  token, UTF-8
 *      8+n    32  timeline id, hex
 *
 *   request                                       response
 *        0     4  op: 1 = get pages                    0     4  request id
 *        4     4  request id, chosen by the client     4     4  status: 0 pages, 1 error
 *        8     8  LSN                                  8     4  length of what follows
 *       16     4  tablespace                          12     4  zero
 *       20     4  database                            16     ·  pages (count × 8192 bytes), or the error's text, UTF-8
 *       24     4  relation file number
 *       28     4  fork
 *       32     4  first block of the relation fork
 *       36     4  count of blocks, 1 to 256
 *
 * Responses come in the order of their requests; a client may send the next request before. A block at or past the relation's size at that LSN
 * is a page of zeroes. An error is about its request only. The same bytes are in C in compute/shim/format.h.
 */
import { connect, type Socket } from 'node:net';
import { StrataError } from '../base/errors.ts';
import { type Lsn, readLsn, writeLsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import type { RelationForkKey } from '../postgres/relation.ts';

export const PAGE_PROTOCOL_MAGIC = 0x50525453;
export const PAGE_PROTOCOL_VERSION = 1;
export const MAX_PAGES_PER_REQUEST = 256;
export const PAGE_REQUEST_BYTES = 40;
export const PAGE_RESPONSE_HEADER_BYTES = 16;

const OP_GET_PAGES = 1;
const STATUS_OK = 0;
const STATUS_ERROR = 1;
const HELLO_HEADER_BYTES = 8;
const HELLO_REPLY_HEADER_BYTES = 8;
const TIMELINE_ID_BYTES = 32;
const MAX_MESSAGE_BYTES = 65_536;
const MAX_BLOCK = 0xffff_ffff;

export interface PageHello {
  readonly token: string;
  readonly timelineId: string;
}

export interface PageRange extends RelationForkKey {
  readonly lsn: Lsn;
  /** First block, counted in the whole fork. */
  readonly blk: number;
  readonly count: number;
}

export interface PageRequest extends PageRange {
  readonly requestId: number;
}

/** Something decoded from the start of a buffer, and how many bytes it took. */
export interface Decoded<T> {
  readonly value: T;
  readonly bytes: number;
}

export type HelloReply = { readonly kind: 'welcome' } | { readonly kind: 'refused'; readonly message: string };

export type PageResponse =
  | { readonly kind: 'pages'; readonly requestId: number; readonly pages: Buffer }
  | { readonly kind: 'error'; readonly requestId: number; readonly message: string };

export function encodePageHello(hello: PageHello): Buffer {
  const token = Buffer.from(hello.token);
  const bytes = Buffer.alloc(HELLO_HEADER_BYTES + token.length + TIMELINE_ID_BYTES);
  bytes.writeUInt32LE(PAGE_PROTOCOL_MAGIC, 0);
  bytes.writeUInt16LE(PAGE_PROTOCOL_VERSION, 4);
  bytes.writeUInt16LE(token.length, 6);
  token.copy(bytes, HELLO_HEADER_BYTES);
  bytes.write(hello.timelineId, HELLO_HEADER_BYTES + token.length, 'latin1');
  return bytes;
}

/** Undefined while bytes are missing. Throws `bad-request` for anything that is not a hello of this version. */
export function decodePageHello(bytes: Buffer): Decoded<PageHello> | undefined {
  if (bytes.length < HELLO_HEADER_BYTES) return undefined;
  if (bytes.readUInt32LE(0) !== PAGE_PROTOCOL_MAGIC)
    throw new StrataError('bad-request', 'not a client of the page protocol');
  const version = bytes.readUInt16LE(4);
  if (version !== PAGE_PROTOCOL_VERSION) {
    throw new StrataError(
      'bad-request',
      `version ${version} of the page protocol is unknown; this is ${PAGE_PROTOCOL_VERSION}`,
    );
  }
  const tokenEnd = HELLO_HEADER_BYTES + bytes.readUInt16LE(6);
  const end = tokenEnd + TIMELINE_ID_BYTES;
  if (bytes.length < end) return undefined;
  const timelineId = bytes.toString('latin1', tokenEnd, end);
  if (!/^[0-9a-f]{32}$/.test(timelineId)) throw new StrataError('bad-request', 'the timeline id is not 32 hex digits');
  return { value: { token: bytes.toString('utf8', HELLO_HEADER_BYTES, tokenEnd), timelineId }, bytes: end };
}

export function encodeHelloReply(reply: HelloReply): Buffer {
  const message = messageBytes(reply.kind === 'refused' ? reply.message : '');
  const header = Buffer.alloc(HELLO_REPLY_HEADER_BYTES);
  header.writeUInt32LE(reply.kind === 'welcome' ? STATUS_OK : STATUS_ERROR, 0);
  header.writeUInt32LE(message.length, 4);
  return Buffer.concat([header, message]);
}

/** Undefined while bytes are missing. */
export function decodeHelloReply(bytes: Buffer): Decoded<HelloReply> | undefined {
  if (bytes.length < HELLO_REPLY_HEADER_BYTES) return undefined;
  const end = HELLO_REPLY_HEADER_BYTES + checkedMessageLength(bytes.readUInt32LE(4));
  if (bytes.length < end) return undefined;
  if (bytes.readUInt32LE(0) === STATUS_OK) return { value: { kind: 'welcome' }, bytes: end };
  return { value: { kind: 'refused', message: bytes.toString('utf8', HELLO_REPLY_HEADER_BYTES, end) }, bytes: end };
}

export function encodePageRequest(request: PageRequest): Buffer {
  const bytes = Buffer.allocUnsafe(PAGE_REQUEST_BYTES);
  bytes.writeUInt32LE(OP_GET_PAGES, 0);
  bytes.writeUInt32LE(request.requestId, 4);
  writeLsn(bytes, request.lsn, 8);
  bytes.writeUInt32LE(request.spc, 16);
  bytes.writeUInt32LE(request.db, 20);
  bytes.writeUInt32LE(request.rel, 24);
  bytes.writeUInt32LE(request.fork, 28);
  bytes.writeUInt32LE(request.blk, 32);
  bytes.writeUInt32LE(request.count, 36);
  return bytes;
}

/**
 * The request at `offset`, or undefined while bytes are missing; it takes PAGE_REQUEST_BYTES. Throws `bad-request` when it is none: the stream is
 * of no use from there on.
 */
export function decodePageRequest(bytes: Buffer, offset: number): PageRequest | undefined {
  if (bytes.length - offset < PAGE_REQUEST_BYTES) return undefined;
  const op = bytes.readUInt32LE(offset);
  if (op !== OP_GET_PAGES) throw new StrataError('bad-request', `operation ${op} of the page protocol is unknown`);
  const lsn = readLsn(bytes, offset + 8);
  if (!Number.isSafeInteger(lsn)) throw new StrataError('bad-request', 'the LSN of a page request is out of range');
  const fork = bytes.readUInt32LE(offset + 28);
  const blk = bytes.readUInt32LE(offset + 32);
  const count = bytes.readUInt32LE(offset + 36);
  if (fork > 3 || count < 1 || count > MAX_PAGES_PER_REQUEST || blk + count > MAX_BLOCK) {
    throw new StrataError(
      'bad-request',
      `a page request for ${count} blocks from block ${blk} of fork ${fork} cannot be`,
    );
  }
  return {
    requestId: bytes.readUInt32LE(offset + 4),
    lsn,
    spc: bytes.readUInt32LE(offset + 16),
    db: bytes.readUInt32LE(offset + 20),
    rel: bytes.readUInt32LE(offset + 24),
    fork,
    blk,
    count,
  };
}

/** What goes before `pagesBytes` bytes of pages. */
export function encodePagesHeader(requestId: number, pagesBytes: number): Buffer {
  return encodeResponseHeader(requestId, STATUS_OK, pagesBytes);
}

export function encodePageError(requestId: number, message: string): Buffer {
  const text = messageBytes(message);
  return Buffer.concat([encodeResponseHeader(requestId, STATUS_ERROR, text.length), text]);
}

/** The response at the start of the buffer, or undefined while bytes are missing. Its pages share memory with the buffer. */
export function decodePageResponse(bytes: Buffer): Decoded<PageResponse> | undefined {
  const total = pageResponseBytes(bytes);
  if (total === undefined || bytes.length < total) return undefined;
  const requestId = bytes.readUInt32LE(0);
  const body = bytes.subarray(PAGE_RESPONSE_HEADER_BYTES, total);
  if (bytes.readUInt32LE(4) === STATUS_OK) return { value: { kind: 'pages', requestId, pages: body }, bytes: total };
  return { value: { kind: 'error', requestId, message: body.toString('utf8') }, bytes: total };
}

/** Size of the response that begins the buffer, or undefined when not even its header is there. */
function pageResponseBytes(bytes: Buffer): number | undefined {
  if (bytes.length < PAGE_RESPONSE_HEADER_BYTES) return undefined;
  const length = bytes.readUInt32LE(8);
  if (bytes.readUInt32LE(4) !== STATUS_OK) checkedMessageLength(length);
  else if (length % BLOCK_SIZE !== 0 || length > MAX_PAGES_PER_REQUEST * BLOCK_SIZE) {
    throw new StrataError('internal', `a page response of ${length} bytes cannot be`);
  }
  return PAGE_RESPONSE_HEADER_BYTES + length;
}

function encodeResponseHeader(requestId: number, status: number, length: number): Buffer {
  const bytes = Buffer.alloc(PAGE_RESPONSE_HEADER_BYTES);
  bytes.writeUInt32LE(requestId, 0);
  bytes.writeUInt32LE(status, 4);
  bytes.writeUInt32LE(length, 8);
  return bytes;
}

function messageBytes(message: string): Buffer {
  return Buffer.from(message).subarray(0, MAX_MESSAGE_BYTES);
}

function checkedMessageLength(length: number): number {
  if (length > MAX_MESSAGE_BYTES)
    throw new StrataError('internal', `a message of ${length} bytes in the page protocol cannot be`);
  return length;
}

export interface PageClientOptions extends PageHello {
  readonly host: string;
  readonly port: number;
  /** For connecting, and for each answer. */
  readonly timeoutMs?: number;
}

const DEFAULT_TIMEOUT_MS = 30_000;

interface Waiting {
  readonly requestId: number;
  readonly count: number;
  readonly resolve: (pages: Buffer) => void;
  readonly reject: (error: StrataError) => void;
}

/** A client of the page protocol, for tests and tools. One connection; when it is lost every call fails as `unavailable`. */
export class PageClient {
  readonly #socket: Socket;
  readonly #waiting: Waiting[] = [];
  #received: Buffer[] = [];
  #receivedBytes = 0;
  #wantedBytes = HELLO_REPLY_HEADER_BYTES;
  #welcomed: { resolve: () => void; reject: (error: StrataError) => void } | undefined;
  #lastRequestId = 0;
  #lost: StrataError | undefined;

  private constructor(socket: Socket, timeoutMs: number) {
    this.#socket = socket;
    socket.setNoDelay(true);
    socket.setTimeout(timeoutMs, () => {
      if (this.#waiting.length > 0 || this.#welcomed !== undefined) this.#lose(`no answer for ${timeoutMs} ms`);
    });
    socket.on('data', (chunk: Buffer) => this.#receive(chunk));
    socket.on('error', (error) => this.#lose(error.message));
    socket.on('close', () => this.#lose('the connection was closed'));
  }

  /** Throws `unauthorized` when the pageserver refuses the hello, `unavailable` when it cannot be reached. */
  static async connect(options: PageClientOptions): Promise<PageClient> {
    const client = new PageClient(connect(options.port, options.host), options.timeoutMs ?? DEFAULT_TIMEOUT_MS);
    const welcomed = new Promise<void>((resolve, reject) => (client.#welcomed = { resolve, reject }));
    client.#socket.write(encodePageHello(options));
    await welcomed;
    return client;
  }

  /** The pages, `count` × 8192 bytes. Throws `internal` with the pageserver's words when it answers with an error. */
  async getPages(range: PageRange): Promise<Buffer> {
    if (this.#lost !== undefined) throw this.#lost;
    const requestId = (this.#lastRequestId = (this.#lastRequestId + 1) >>> 0);
    const pages = new Promise<Buffer>((resolve, reject) => {
      this.#waiting.push({ requestId, count: range.count, resolve, reject });
    });
    this.#socket.write(encodePageRequest({ ...range, requestId }));
    return pages;
  }

  close(): void {
    this.#socket.destroy();
    this.#lose('the connection was closed');
  }

  #receive(chunk: Buffer): void {
    this.#received.push(chunk);
    this.#receivedBytes += chunk.length;
    try {
      while (this.#lost === undefined && this.#receivedBytes >= this.#wantedBytes) {
        const bytes = this.#received.length === 1 ? this.#received[0]! : Buffer.concat(this.#received);
        const taken = this.#welcomed === undefined ? this.#takeResponse(bytes) : this.#takeHelloReply(bytes);
        const rest = bytes.subarray(taken);
        this.#received = [rest];
        this.#receivedBytes = rest.length;
        if (taken === 0) break;
      }
    } catch (error) {
      this.#lose(error instanceof Error ? error.message : String(error));
    }
  }

  #takeHelloReply(bytes: Buffer): number {
    const reply = decodeHelloReply(bytes);
    if (reply === undefined) return 0;
    const welcomed = this.#welcomed;
    this.#welcomed = undefined;
    this.#wantedBytes = PAGE_RESPONSE_HEADER_BYTES;
    if (reply.value.kind === 'welcome') {
      welcomed?.resolve();
    } else {
      welcomed?.reject(
        new StrataError('unauthorized', `the pageserver refused the connection: ${reply.value.message}`),
      );
      this.close();
    }
    return reply.bytes;
  }

  #takeResponse(bytes: Buffer): number {
    this.#wantedBytes = pageResponseBytes(bytes) ?? PAGE_RESPONSE_HEADER_BYTES;
    const response = decodePageResponse(bytes);
    if (response === undefined) return 0;
    this.#wantedBytes = PAGE_RESPONSE_HEADER_BYTES;
    const waiting = this.#waiting.shift();
    const { value } = response;
    if (waiting === undefined || waiting.requestId !== value.requestId)
      throw new Error('the pageserver answered what was not asked');
    if (value.kind === 'error') waiting.reject(new StrataError('internal', value.message));
    else if (value.pages.length === waiting.count * BLOCK_SIZE) waiting.resolve(value.pages);
    else
      waiting.reject(
        new StrataError('internal', `the pageserver sent ${value.pages.length} bytes for ${waiting.count} pages`),
      );
    return response.bytes;
  }

  #lose(reason: string): void {
    this.#lost ??= new StrataError('unavailable', `the pageserver is not available: ${reason}`);
    this.#socket.destroy();
    this.#welcomed?.reject(this.#lost);
    this.#welcomed = undefined;
    for (const waiting of this.#waiting.splice(0)) waiting.reject(this.#lost);
  }
}
