/**
 * Trying again: exponential backoff with jitter, over one call (`retry`) or over a whole store (`RetryingStore`).
 *
 * - Before attempt n + 1 it waits a random time between half and all of `min(maxDelayMs, firstDelayMs * 2^(n - 1))`: the random half keeps many
 *   clients that failed together from coming back together.
 * - `transient` errors are tried again up to `attempts` times. `damaged` ones once: damage on the way heals, damage at rest does not. Others never.
 * - The caller's signal and deadline end it at any moment, also while it waits. The deadline's error tells the last failure.
 * - Every operation of a store may be repeated (see object-store.ts); with `ifAbsent` a repeated put may find what its first attempt wrote.
 *
 * Clock, sleep and randomness are passed in, so that a test repeats by its seed and takes no time.
 */
import { setTimeout as sleepMs } from 'node:timers/promises';
import { isObjectError, ObjectStoreError, withDeadline } from './object-store.ts';
import type {
  CallOptions,
  Downloaded,
  FileOptions,
  ListOptions,
  ListPage,
  ObjectInfo,
  ObjectStore,
  PutOptions,
} from './object-store.ts';

export interface RetryPolicy {
  /** At most this many attempts, the first included; may be Infinity, when there is a deadline or a signal. */
  readonly attempts: number;
  readonly firstDelayMs: number;
  readonly maxDelayMs: number;
  /** Deadline of one attempt. */
  readonly attemptTimeoutMs: number;
  /** Deadline of all attempts together, where the call does not give one. */
  readonly totalTimeoutMs: number;
}

export interface RetryEnvironment {
  /** Milliseconds, never backwards. */
  now(): number;
  /** Rejects with the signal's reason when that fires. */
  sleep(ms: number, signal: AbortSignal): Promise<void>;
  /** In [0, 1). */
  random(): number;
  /** Told of each failure that is tried again; for logs and metrics. */
  onRetry?(failure: RetriedFailure): void;
}

export interface RetriedFailure {
  readonly what: string;
  /** From 1. */
  readonly attempt: number;
  readonly delayMs: number;
  readonly error: unknown;
}

/** About five minutes of attempts: longer than a store is usually away, shorter than a person waits. */
export const DEFAULT_RETRY: RetryPolicy = {
  attempts: 12,
  firstDelayMs: 100,
  maxDelayMs: 20_000,
  attemptTimeoutMs: 120_000,
  totalTimeoutMs: 300_000,
};

/** About ten seconds of attempts: for those who try again themselves, and for readers, who would rather be told. */
export const BRIEF_RETRY: RetryPolicy = {
  attempts: 8,
  firstDelayMs: 100,
  maxDelayMs: 5_000,
  attemptTimeoutMs: 120_000,
  totalTimeoutMs: 300_000,
};

export const REAL_ENVIRONMENT: RetryEnvironment = {
  now: () => performance.now(),
  sleep: (ms, signal) => sleepMs(ms, undefined, { signal }),
  random: Math.random,
};

const DAMAGED_ATTEMPTS = 2;

/** Runs `operation` until it succeeds, fails for good, or there is no time left. It gets the deadline and signal of its attempt. */
export async function retry<T>(
  what: string,
  policy: RetryPolicy,
  environment: RetryEnvironment,
  options: CallOptions,
  operation: (attempt: Required<CallOptions>) => Promise<T>,
): Promise<T> {
  const startMs = environment.now();
  const totalMs = options.timeoutMs ?? policy.totalTimeoutMs;
  let last: unknown;
  const run = async (signal: AbortSignal): Promise<T> => {
    for (let attempt = 1, damaged = 0; ; attempt++) {
      const leftMs = totalMs - (environment.now() - startMs);
      if (leftMs <= 0) throw outOfTime(what, totalMs, last);
      try {
        return await operation({ signal, timeoutMs: Math.min(policy.attemptTimeoutMs, leftMs) });
      } catch (error) {
        if (signal.aborted) throw error;
        last = error;
        if (isObjectError(error, 'damaged')) damaged += 1;
        else if (!isObjectError(error, 'transient')) throw error;
        if (attempt >= policy.attempts || damaged >= DAMAGED_ATTEMPTS) throw error;
        const delayMs = backoffMs(policy, attempt, environment.random());
        if (environment.now() - startMs + delayMs >= totalMs) throw outOfTime(what, totalMs, error);
        environment.onRetry?.({ what, attempt, delayMs, error });
        await environment.sleep(delayMs, signal);
      }
    }
  };
  // The timer of withDeadline runs by the real clock: a net under attempts that do not return.
  try {
    return await withDeadline(what, options, totalMs, run);
  } catch (error) {
    const isDeadline = isObjectError(error, 'transient') && error.code === 'timeout' && error.cause === undefined;
    if (isDeadline && last !== undefined && last !== error) throw outOfTime(what, totalMs, last);
    throw error;
  }
}

/** How long to wait after attempt number `attempt` (from 1) failed; `random` in [0, 1). */
export function backoffMs(policy: RetryPolicy, attempt: number, random: number): number {
  const ceilingMs = Math.min(policy.maxDelayMs, policy.firstDelayMs * 2 ** (attempt - 1));
  return ceilingMs * (0.5 + random / 2);
}

function outOfTime(what: string, totalMs: number, last: unknown): ObjectStoreError {
  const reason = last instanceof Error ? last.message : String(last);
  return new ObjectStoreError('transient', `${what}: gave up after ${totalMs} ms; the last failure was: ${reason}`, {
    code: 'timeout',
    cause: last,
  });
}

/** A store whose every call is tried again by a policy. */
export class RetryingStore implements ObjectStore {
  readonly #inner: ObjectStore;
  readonly #policy: RetryPolicy;
  readonly #environment: RetryEnvironment;

  constructor(
    inner: ObjectStore,
    policy: RetryPolicy = DEFAULT_RETRY,
    environment: RetryEnvironment = REAL_ENVIRONMENT,
  ) {
    this.#inner = inner;
    this.#policy = policy;
    this.#environment = environment;
  }

  get description(): string {
    return this.#inner.description;
  }

  get supportsIfAbsent(): boolean {
    return this.#inner.supportsIfAbsent;
  }

  put(name: string, bytes: Uint8Array, options: PutOptions = {}): Promise<void> {
    return this.#retry(`put ${name}`, options, (attempt) => this.#inner.put(name, bytes, { ...options, ...attempt }));
  }

  putFile(name: string, path: string, options: PutOptions & FileOptions = {}): Promise<void> {
    return this.#retry(`put ${name}`, options, (attempt) =>
      this.#inner.putFile(name, path, { ...options, ...attempt }),
    );
  }

  get(name: string, options: CallOptions = {}): Promise<Buffer> {
    return this.#retry(`get ${name}`, options, (attempt) => this.#inner.get(name, attempt));
  }

  getRange(name: string, start: number, end: number, options: CallOptions = {}): Promise<Buffer> {
    const what = `get ${name} [${start}, ${end})`;
    return this.#retry(what, options, (attempt) => this.#inner.getRange(name, start, end, attempt));
  }

  getToFile(name: string, path: string, options: FileOptions = {}): Promise<Downloaded> {
    return this.#retry(`get ${name}`, options, (attempt) =>
      this.#inner.getToFile(name, path, { ...options, ...attempt }),
    );
  }

  head(name: string, options: CallOptions = {}): Promise<ObjectInfo> {
    return this.#retry(`head ${name}`, options, (attempt) => this.#inner.head(name, attempt));
  }

  list(prefix: string, options: ListOptions = {}): Promise<ListPage> {
    return this.#retry(`list ${prefix}`, options, (attempt) => this.#inner.list(prefix, { ...options, ...attempt }));
  }

  delete(name: string, options: CallOptions = {}): Promise<void> {
    return this.#retry(`delete ${name}`, options, (attempt) => this.#inner.delete(name, attempt));
  }

  deleteMany(names: readonly string[], options: CallOptions = {}): Promise<void> {
    const what = `delete ${names.length} objects`;
    return this.#retry(what, options, (attempt) => this.#inner.deleteMany(names, attempt));
  }

  removeUnfinished(olderThanMs: number, options: CallOptions = {}): Promise<number> {
    return this.#retry('remove unfinished uploads', options, (attempt) =>
      this.#inner.removeUnfinished(olderThanMs, attempt),
    );
  }

  #retry<T>(what: string, options: CallOptions, operation: (attempt: Required<CallOptions>) => Promise<T>): Promise<T> {
    return retry(`${what} (${this.description})`, this.#policy, this.#environment, options, operation);
  }
}
