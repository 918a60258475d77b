/**
 * What an object store is to us: whole objects under names, the durable home of layers and indexes. Knows nothing of Postgres.
 *
 * Semantics that every implementation keeps (`object-store.contract.ts` holds them to it):
 * - *Whole or not at all.* A reader sees all of an object or `not-found`, never a part of one that is being written.
 * - *Durable.* When a put or delete has resolved, it survives the death of any process and of the machine.
 * - *Read after write.* What begins after a put or delete resolved sees it: get, head and list.
 * - *Lists* are in ascending order of the names' bytes. A listing in pages is no snapshot: a name that is there throughout is listed exactly
 *   once; one that is put or deleted meanwhile may be listed or not.
 * - *Lost replies.* A put or delete that failed with a transient error, a timeout or an abort may have taken effect, or may yet do so. Both may
 *   simply be repeated with the same bytes. But a late attempt can land after a newer put of the same name, so **a name should have one
 *   content for ever**; who needs the next version of something writes it under the next name.
 *
 * Names are paths of segments `[A-Za-z0-9_][A-Za-z0-9._-]*` separated by `/`, a segment at most 255 bytes and a name at most 900 (S3 allows 1,024,
 * prefix included). They mean the same in every store and in every file system. A name must not be the folder of another (`a` beside `a/b`).
 */
import { StrataError } from '../base/errors.ts';
import type { ErrorCode } from '../base/errors.ts';

export interface CallOptions {
  /** Ends the call early: it rejects with the signal's reason. What was under way may still take effect. */
  readonly signal?: AbortSignal;
  /** The whole call, with all its attempts, rejects with a `transient` error of code `timeout` after this time. Absent: the store's own limit. */
  readonly timeoutMs?: number;
}

export interface FileOptions extends CallOptions {
  /** The file's bytes never change, nor are they ever written to: a store on the same file system may keep one copy of them for both. */
  readonly share?: boolean;
}

export interface PutOptions extends CallOptions {
  /**
   * Fail with `exists` when the name is there already; exactly one of several such puts succeeds. After a lost reply `exists` can mean that this
   * very call wrote it: read it and compare. A store without `supportsIfAbsent` rejects with `unsupported` and writes nothing.
   */
  readonly ifAbsent?: boolean;
}

export interface ListOptions extends CallOptions {
  /** Only names after this one; `next` of the page before. */
  readonly after?: string;
  /** At most this many, 1 to 1,000 (the default). */
  readonly limit?: number;
}

export interface ListedObject {
  readonly name: string;
  readonly sizeBytes: number;
  /** When it was written, by the store's clock; precise to a second. */
  readonly modifiedMs: number;
}

export interface ListPage {
  readonly objects: readonly ListedObject[];
  /** Give it as `after` to go on; undefined at the end. */
  readonly next: string | undefined;
}

export interface ObjectInfo {
  readonly sizeBytes: number;
  readonly modifiedMs: number;
  /** CRC32 of the content, where the store keeps one. */
  readonly crc32: number | undefined;
}

/** What was received and written to the file. */
export interface Downloaded {
  readonly sizeBytes: number;
  /** Computed from the bytes that were received. */
  readonly crc32: number;
}

export interface ObjectStore {
  /** For messages: where it is, without secrets. */
  readonly description: string;
  readonly supportsIfAbsent: boolean;

  /** Writes or replaces an object. */
  put(name: string, bytes: Uint8Array, options?: PutOptions): Promise<void>;
  /** Writes or replaces an object with a file's content, in bounded memory; the file must not change meanwhile. */
  putFile(name: string, path: string, options?: PutOptions & FileOptions): Promise<void>;
  /** The whole object, in memory; for small ones. */
  get(name: string, options?: CallOptions): Promise<Buffer>;
  /** Bytes `[start, end)`, exactly; `damaged` when the object ends before `end`. Nothing is asked for an empty range. */
  getRange(name: string, start: number, end: number, options?: CallOptions): Promise<Buffer>;
  /** The whole object into a new or replaced file, in bounded memory, not fsynced; when it fails the file is gone or as it was. */
  getToFile(name: string, path: string, options?: FileOptions): Promise<Downloaded>;
  /** What is known of an object without reading it; `not-found` when it is not there. */
  head(name: string, options?: CallOptions): Promise<ObjectInfo>;
  /** One page of the names that begin with `prefix`, which need not end at a slash and may be empty. */
  list(prefix: string, options?: ListOptions): Promise<ListPage>;
  /** Removes an object; one that is not there is removed already. */
  delete(name: string, options?: CallOptions): Promise<void>;
  /** Removes any number of objects, in no order; after an error some may be left, and the call may be repeated. */
  deleteMany(names: readonly string[], options?: CallOptions): Promise<void>;
  /** Removes what puts that began more than `olderThanMs` ago, and never ended, have left behind; nobody else sees it. Tells how many. */
  removeUnfinished(olderThanMs: number, options?: CallOptions): Promise<number>;
}

/**
 * What callers tell apart.
 * - `not-found`: there is no such object (a missing bucket is `rejected`).
 * - `exists`: `ifAbsent` found one.
 * - `transient`: trying again may help: network, overload, timeout, disk full.
 * - `denied`: credentials or permissions; a person must act.
 * - `damaged`: the bytes are not what was stored: shorter, or with another checksum.
 * - `unsupported`: this store cannot do it.
 * - `rejected`: anything else that trying again will not change.
 */
export type ObjectErrorKind = 'not-found' | 'exists' | 'transient' | 'denied' | 'damaged' | 'unsupported' | 'rejected';

const CODES: Readonly<Record<ObjectErrorKind, ErrorCode>> = {
  'not-found': 'not-found',
  exists: 'conflict',
  transient: 'unavailable',
  denied: 'forbidden',
  damaged: 'internal',
  unsupported: 'not-implemented',
  rejected: 'internal',
};

export class ObjectStoreError extends StrataError {
  readonly kind: ObjectErrorKind;

  constructor(kind: ObjectErrorKind, message: string, options: ErrorOptions & { readonly code?: ErrorCode } = {}) {
    super(options.code ?? CODES[kind], message, options);
    this.name = 'ObjectStoreError';
    this.kind = kind;
  }
}

export function isObjectError(error: unknown, kind: ObjectErrorKind): error is ObjectStoreError {
  return error instanceof ObjectStoreError && error.kind === kind;
}

export const LIST_LIMIT = 1000;
export const NAME_LENGTH_MAX = 900;
const TIMER_MAX_MS = 2 ** 31 - 1;
const SEGMENT_LENGTH_MAX = 255;
const NAME = /^[A-Za-z0-9_][A-Za-z0-9._-]*(?:\/[A-Za-z0-9_][A-Za-z0-9._-]*)*$/;
const PREFIX = /^(?:[A-Za-z0-9_][A-Za-z0-9._-]*(?:\/[A-Za-z0-9_][A-Za-z0-9._-]*)*\/?)?$/;

/** Throws `rejected` unless `name` is a name. */
export function checkName(name: string): void {
  const isName = NAME.test(name) && name.length <= NAME_LENGTH_MAX;
  if (isName && name.split('/').every((segment) => segment.length <= SEGMENT_LENGTH_MAX)) return;
  throw new ObjectStoreError('rejected', `${JSON.stringify(name)} is not an object name`);
}

/** Throws `rejected` unless `prefix` is the beginning of some name. */
export function checkPrefix(prefix: string): void {
  if (PREFIX.test(prefix) && prefix.length <= NAME_LENGTH_MAX) return;
  throw new ObjectStoreError('rejected', `${JSON.stringify(prefix)} is not the beginning of an object name`);
}

/** Throws `rejected` unless `[start, end)` is a range of whole numbers. */
export function checkRange(name: string, start: number, end: number): void {
  if (Number.isSafeInteger(start) && Number.isSafeInteger(end) && start >= 0 && start <= end) return;
  throw new ObjectStoreError('rejected', `[${start}, ${end}) is not a range of ${name}`);
}

export function checkLimit(limit: number): void {
  if (Number.isInteger(limit) && limit >= 1 && limit <= LIST_LIMIT) return;
  throw new ObjectStoreError('rejected', `a list may have 1 to ${LIST_LIMIT} names, not ${limit}`);
}

/** Every object whose name begins with `prefix`, page by page. The deadline is each page's. */
export async function* listAll(
  store: ObjectStore,
  prefix: string,
  options: ListOptions = {},
): AsyncGenerator<ListedObject> {
  for (let after = options.after; ;) {
    const page = await store.list(prefix, { ...options, after });
    yield* page.objects;
    if (page.next === undefined) return;
    after = page.next;
  }
}

/**
 * Runs a call under its deadline and its caller's signal, joined to one. When the signal fired, whatever the work threw becomes the caller's
 * reason, or the timeout's error.
 */
export async function withDeadline<T>(
  what: string,
  options: CallOptions,
  timeoutMs: number,
  work: (signal: AbortSignal) => Promise<T>,
): Promise<T> {
  const limitMs = options.timeoutMs ?? timeoutMs;
  options.signal?.throwIfAborted();
  const controller = new AbortController();
  const onAbort = (): void => controller.abort(options.signal?.reason);
  options.signal?.addEventListener('abort', onAbort, { once: true });
  const expire = (): void => {
    const message = `${what}: no answer within ${limitMs} ms`;
    controller.abort(new ObjectStoreError('transient', message, { code: 'timeout' }));
  };
  const timer = limitMs <= TIMER_MAX_MS ? setTimeout(expire, limitMs) : undefined;
  try {
    return await work(controller.signal);
  } catch (error) {
    if (controller.signal.aborted) throw controller.signal.reason;
    throw error;
  } finally {
    clearTimeout(timer);
    options.signal?.removeEventListener('abort', onAbort);
  }
}
