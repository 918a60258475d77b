/** Those who wait until a timeline has reached an LSN. */

import { StrataError } from '../base/errors.ts';
import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';

interface Waiter {
  readonly lsn: Lsn;
  resolve(): void;
  reject(error: StrataError): void;
}

export class LsnWaiters {
  /** For messages. */
  readonly #name: string;
  readonly #waiters = new Set<Waiter>();
  #lowestLsn: Lsn = Infinity;
  /** Called with the LSN when somebody begins to wait. */
  onWait: ((lsn: Lsn) => void) | undefined;

  constructor(name: string) {
    this.#name = name;
  }

  /** Resolves by `reached`; rejects with `timeout`, `unavailable` on abort, or what `fail` gives. */
  wait(lsn: Lsn, timeoutMs: number, signal: AbortSignal | undefined): Promise<void> {
    return new Promise((resolve, reject) => {
      const finish = (): void => {
        clearTimeout(timer);
        signal?.removeEventListener('abort', onAbort);
        this.#waiters.delete(waiter);
      };
      const waiter: Waiter = {
        lsn,
        resolve: () => {
          finish();
          resolve();
        },
        reject: (error) => {
          finish();
          reject(error);
        },
      };
      const what = `${formatLsn(lsn)} of ${this.#name}`;
      const onAbort = (): void => waiter.reject(new StrataError('unavailable', `the wait for ${what} was given up`));
      const onTimeout = (): void =>
        waiter.reject(new StrataError('timeout', `${what} is not ingested after ${Math.round(timeoutMs)} ms`));
      const timer = setTimeout(onTimeout, Math.max(0, timeoutMs));
      this.#waiters.add(waiter);
      this.#lowestLsn = Math.min(this.#lowestLsn, lsn);
      this.onWait?.(lsn);
      signal?.addEventListener('abort', onAbort, { once: true });
      if (signal?.aborted) onAbort();
    });
  }

  /** The highest LSN that is waited for; 0 when none is. */
  get highestLsn(): Lsn {
    let highest = 0;
    for (const { lsn } of this.#waiters) highest = Math.max(highest, lsn);
    return highest;
  }

  /** To be called with every new LSN; costs nothing while nobody waits for it. */
  reached(lsn: Lsn): void {
    if (lsn < this.#lowestLsn) return;
    this.#lowestLsn = Infinity;
    for (const waiter of this.#waiters) {
      if (waiter.lsn <= lsn) waiter.resolve();
      else this.#lowestLsn = Math.min(this.#lowestLsn, waiter.lsn);
    }
  }

  fail(error: StrataError): void {
    for (const waiter of this.#waiters) waiter.reject(error);
    this.#lowestLsn = Infinity;
  }
}
