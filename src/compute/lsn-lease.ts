/**
 * A lease on the LSN at which a compute fetches absent pages, or an export reads, so that garbage collection never takes what it may still ask
 * for. A compute's is taken before Postgres starts and renewed as long as it runs; a pageserver that was started anew learns of it by the next renewal, and
 * collects nothing before everybody has had the time for one.
 */
import { randomUUID } from 'node:crypto';
import type { PageserverClient } from '../api/pageserver.ts';
import { toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';

/** A lease is renewed after this part of the time that it lasts, so that there are several tries. */
const RENEW_FRACTION = 1 / 5;
/** After a failure, at the latest. */
const RETRY_MS = 10_000;

export class LsnLease {
  readonly #pageserver: PageserverClient;
  readonly #timelineId: string;
  readonly #lsn: Lsn;
  readonly #holder: string;
  readonly #log: Logger;
  #timer: NodeJS.Timeout | undefined;
  #renewMs = 0;
  #isReleased = false;
  #resolveLost: (reason: string) => void = () => {};
  /** Resolves, with why, when the pageserver no longer has what the compute may ask for. */
  readonly lost = new Promise<string>((resolve) => (this.#resolveLost = resolve));

  private constructor(pageserver: PageserverClient, timelineId: string, lsn: Lsn, kind: string, log: Logger) {
    this.#holder = `${kind} ${randomUUID()}`;
    this.#pageserver = pageserver;
    this.#timelineId = timelineId;
    this.#lsn = lsn;
    this.#log = log;
  }

  /** `kind` says who holds it. Throws `history-gone` when the LSN cannot be read any more. */
  static async take(
    pageserver: PageserverClient,
    timelineId: string,
    lsn: Lsn,
    options: { readonly signal: AbortSignal; readonly log: Logger; readonly kind?: string },
  ): Promise<LsnLease> {
    const lease = new LsnLease(pageserver, timelineId, lsn, options.kind ?? 'compute', options.log);
    const { durationMs } = await pageserver.leaseLsn(timelineId, lsn, lease.#holder, options.signal);
    lease.#granted(durationMs);
    return lease;
  }

  release(): void {
    if (this.#isReleased) return;
    this.#isReleased = true;
    clearTimeout(this.#timer);
    // What is not released expires.
    this.#pageserver.releaseLsn(this.#timelineId, this.#holder).catch(() => {});
  }

  #granted(durationMs: number): void {
    this.#renewMs = durationMs * RENEW_FRACTION;
    this.#renewIn(this.#renewMs);
  }

  #renewIn(delayMs: number): void {
    if (this.#isReleased) return;
    this.#timer = setTimeout(() => void this.#renew(), delayMs);
    this.#timer.unref();
  }

  async #renew(): Promise<void> {
    try {
      const { durationMs } = await this.#pageserver.leaseLsn(this.#timelineId, this.#lsn, this.#holder);
      this.#granted(durationMs);
    } catch (error) {
      const { code, message } = toStrataError(error);
      if (code === 'history-gone' || code === 'not-found') {
        this.#resolveLost(message);
        return;
      }
      this.#log.warn({ lsn: formatLsn(this.#lsn), reason: message }, 'the lease on the start LSN could not be renewed');
      this.#renewIn(Math.min(RETRY_MS, this.#renewMs));
    }
  }
}
