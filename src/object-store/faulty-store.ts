/**
 * An object store that fails on purpose, around any other: for tests of those who use one.
 *
 * A plan says for each call what happens to it. `randomFaults` is a plan from a seed: the same seed and the same order of calls give the same faults.
 * After a crash every call fails until `restart`: the process that used the store is as good as dead.
 */
import { copyFile, readFile, rename, truncate } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { ObjectStoreError } from './object-store.ts';
import type {
  CallOptions,
  Downloaded,
  FileOptions,
  ListOptions,
  ListPage,
  ObjectErrorKind,
  ObjectInfo,
  ObjectStore,
  PutOptions,
} from './object-store.ts';

export type StoreOperation = Exclude<keyof ObjectStore, 'description' | 'supportsIfAbsent'>;

export interface StoreCall {
  readonly operation: StoreOperation;
  /** The object's name, the list's prefix, or the names of deleteMany joined by commas. */
  readonly name: string;
  /** Number of the call, from 0. */
  readonly index: number;
}

export type StoreFault =
  /** Fails before it has any effect. */
  | { readonly kind: 'error'; readonly errorKind: ObjectErrorKind }
  /** Happens later, or not at all when the caller gives up. */
  | { readonly kind: 'slow'; readonly delayMs: number }
  /** A read gives only the first `keep` (0 to 1) of the bytes, as if that were all: a store that does not notice. Other calls succeed. */
  | { readonly kind: 'truncated'; readonly keep: number }
  /** Takes effect, then fails as `transient`. */
  | { readonly kind: 'lost-reply' }
  /** A put fails as `transient` and takes effect later, whatever its caller does meanwhile. Other calls fail and have no effect. */
  | { readonly kind: 'late'; readonly delayMs: number }
  /** The process dies, before or after the effect. */
  | { readonly kind: 'crash'; readonly when: 'before' | 'after' };

export type FaultPlan = (call: StoreCall) => StoreFault | undefined;

/** What every call of a crashed store throws. Not an ObjectStoreError: nobody may handle it. */
export class StoreCrash extends Error {
  override name = 'StoreCrash';
}

export class FaultyStore implements ObjectStore {
  /** May be replaced at any time. */
  plan: FaultPlan;
  readonly calls: StoreCall[] = [];
  readonly #inner: ObjectStore;
  readonly #late = new Set<Promise<void>>();
  #isCrashed = false;

  constructor(inner: ObjectStore, plan: FaultPlan = () => undefined) {
    this.#inner = inner;
    this.plan = plan;
  }

  get description(): string {
    return `faulty ${this.#inner.description}`;
  }

  get supportsIfAbsent(): boolean {
    return this.#inner.supportsIfAbsent;
  }

  get isCrashed(): boolean {
    return this.#isCrashed;
  }

  /** Resolves when every late put has taken effect. */
  async settleLate(): Promise<void> {
    await Promise.all(this.#late);
  }

  /** The process was started again. */
  restart(): void {
    this.#isCrashed = false;
  }

  put(name: string, bytes: Uint8Array, options: PutOptions = {}): Promise<void> {
    const putLate = async (delayMs: number): Promise<void> => {
      await sleep(delayMs);
      await this.#inner.put(name, bytes).catch(() => {});
    };
    return this.#call('put', name, options, () => this.#inner.put(name, bytes, options), undefined, putLate);
  }

  putFile(name: string, path: string, options: PutOptions & FileOptions = {}): Promise<void> {
    const putLate = async (delayMs: number): Promise<void> => {
      const bytes = await readFile(path).catch(() => undefined); // it is on its way already
      await sleep(delayMs);
      if (bytes !== undefined) await this.#inner.put(name, bytes).catch(() => {});
    };
    return this.#call('putFile', name, options, () => this.#inner.putFile(name, path, options), undefined, putLate);
  }

  get(name: string, options: CallOptions = {}): Promise<Buffer> {
    const cut = (bytes: Buffer, keep: number): Buffer => bytes.subarray(0, Math.floor(bytes.length * keep));
    return this.#call('get', name, options, () => this.#inner.get(name, options), cut);
  }

  getRange(name: string, start: number, end: number, options: CallOptions = {}): Promise<Buffer> {
    const cut = (bytes: Buffer, keep: number): Buffer => bytes.subarray(0, Math.floor(bytes.length * keep));
    return this.#call('getRange', name, options, () => this.#inner.getRange(name, start, end, options), cut);
  }

  getToFile(name: string, path: string, options: FileOptions = {}): Promise<Downloaded> {
    const cut = async (received: Downloaded, keep: number): Promise<Downloaded> => {
      const sizeBytes = Math.floor(received.sizeBytes * keep);
      await copyFile(path, `${path}.copy`); // it may share its bytes with the store
      await rename(`${path}.copy`, path);
      await truncate(path, sizeBytes);
      return { sizeBytes, crc32: received.crc32 ^ 1 };
    };
    return this.#call('getToFile', name, options, () => this.#inner.getToFile(name, path, options), cut);
  }

  head(name: string, options: CallOptions = {}): Promise<ObjectInfo> {
    return this.#call('head', name, options, () => this.#inner.head(name, options));
  }

  list(prefix: string, options: ListOptions = {}): Promise<ListPage> {
    return this.#call('list', prefix, options, () => this.#inner.list(prefix, options));
  }

  delete(name: string, options: CallOptions = {}): Promise<void> {
    return this.#call('delete', name, options, () => this.#inner.delete(name, options));
  }

  deleteMany(names: readonly string[], options: CallOptions = {}): Promise<void> {
    return this.#call('deleteMany', names.join(','), options, () => this.#inner.deleteMany(names, options));
  }

  removeUnfinished(olderThanMs: number, options: CallOptions = {}): Promise<number> {
    return this.#inner.removeUnfinished(olderThanMs, options);
  }

  async #call<T>(
    operation: StoreOperation,
    name: string,
    options: CallOptions,
    run: () => Promise<T>,
    cut?: (result: T, keep: number) => T | Promise<T>,
    late?: (delayMs: number) => Promise<void>,
  ): Promise<T> {
    if (this.#isCrashed) throw new StoreCrash(`${operation} ${name}: the store has crashed`);
    const call = { operation, name, index: this.calls.length };
    this.calls.push(call);
    const fault = this.plan(call);
    if (fault?.kind === 'error') {
      throw new ObjectStoreError(fault.errorKind, `${operation} ${name}: a fault on purpose (${fault.errorKind})`);
    }
    if (fault?.kind === 'crash' && fault.when === 'before') throw this.#crash(call);
    if (fault?.kind === 'late') {
      if (late !== undefined) {
        const taken: Promise<void> = late(fault.delayMs).finally(() => this.#late.delete(taken));
        this.#late.add(taken);
      }
      throw new ObjectStoreError('transient', `${operation} ${name}: it lands later on purpose`);
    }
    if (fault?.kind === 'slow') await this.#wait(call, fault.delayMs, options);
    const result = await run();
    // Another call may have crashed the store meanwhile: this one's reply does not arrive any more.
    if (this.#isCrashed) throw new StoreCrash(`${operation} ${name}: the store has crashed`);
    if (fault?.kind === 'crash') throw this.#crash(call);
    if (fault?.kind === 'lost-reply') {
      throw new ObjectStoreError('transient', `${operation} ${name}: a reply lost on purpose`);
    }
    if (fault?.kind === 'truncated' && cut !== undefined) return cut(result, fault.keep);
    return result;
  }

  #crash(call: StoreCall): StoreCrash {
    this.#isCrashed = true;
    return new StoreCrash(`${call.operation} ${call.name}: a crash on purpose`);
  }

  async #wait(call: StoreCall, delayMs: number, options: CallOptions): Promise<void> {
    const limitMs = options.timeoutMs ?? Infinity;
    await sleep(Math.min(delayMs, limitMs), undefined, { signal: options.signal }).catch((error: unknown) => {
      throw options.signal?.aborted === true ? options.signal.reason : error;
    });
    if (delayMs < limitMs) return;
    const message = `${call.operation} ${call.name}: no answer within ${limitMs} ms`;
    throw new ObjectStoreError('transient', message, { code: 'timeout' });
  }
}

/** The chance, 0 to 1, of each fault per call. */
export interface FaultRates {
  readonly error?: number;
  readonly lostReply?: number;
  readonly truncated?: number;
  readonly crash?: number;
  readonly late?: number;
  readonly slow?: number;
  readonly slowMs?: number;
}

/** A plan from numbers in [0, 1): give a seeded generator. */
export function randomFaults(random: () => number, rates: FaultRates): FaultPlan {
  return () => {
    let left = random();
    const falls = (rate: number | undefined): boolean => {
      left -= rate ?? 0;
      return left < 0;
    };
    if (falls(rates.error)) return { kind: 'error', errorKind: 'transient' };
    if (falls(rates.lostReply)) return { kind: 'lost-reply' };
    if (falls(rates.truncated)) return { kind: 'truncated', keep: random() };
    if (falls(rates.crash)) return { kind: 'crash', when: random() < 0.5 ? 'before' : 'after' };
    if (falls(rates.late)) return { kind: 'late', delayMs: rates.slowMs ?? 5 };
    if (falls(rates.slow)) return { kind: 'slow', delayMs: rates.slowMs ?? 5 };
    return undefined;
  };
}
