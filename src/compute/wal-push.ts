/**
 * Takes WAL from the local Postgres to the proposer, as Postgres' only synchronous standby: a commit returns to its client when the proposer
 * has brought it to a quorum and we have told Postgres so.
 *
 * Nothing waits for a timer on this way: WAL is appended as it arrives, and each move of the commit LSN is reported at once. When the proposer
 * has no room, reading stops; the slot keeps Postgres' WAL meanwhile. When storage lags too far behind, reading is slowed (backpressure.ts).
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Logger } from '../base/log.ts';
import type { SharedProcessor } from '../base/processors.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { DELAY_MS_MAX, delayMs } from './backpressure.ts';
import type { Proposer } from './proposer.ts';
import { ReplicationClient, type ReplicationOptions } from './replication-client.ts';
import { PROPOSER_NAME } from './settings.ts';

export interface WalPushOptions extends Omit<ReplicationOptions, 'applicationName'> {
  readonly slotName: string;
  readonly proposer: Proposer;
  readonly signal?: AbortSignal;
  readonly log?: Logger;
  /** Postgres' process that sends the WAL is kept to it, and this one. */
  readonly processor?: SharedProcessor | undefined;
}

/** How long a lost connection to a Postgres that may be gone is tried again. */
const RECONNECT_FOR_MS = 5_000;
const RECONNECT_DELAY_MS = 50;
/** Postgres drops a standby that is silent for wal_sender_timeout. */
const STATUS_INTERVAL_MS = 10_000;
/** Shorter delays are not worth a timer: the next bytes bring more. */
const SLOW_MS_MIN = 1;
/** A Postgres that has just started has better to do. */
const KEEP_AFTER_MS = 1_000;

/** Resolves when Postgres streams to us. Throws `unavailable` with what Postgres says. */
export async function startWalPush(options: WalPushOptions): Promise<WalPush> {
  const push = new WalPush(options);
  await push.start();
  return push;
}

export class WalPush {
  /** Resolves, with the reason, when the stream has ended for good: Postgres is gone, the proposer is fenced, or it was closed. */
  readonly closed: Promise<string>;
  readonly #options: WalPushOptions;
  readonly #onCommit = (lsn: Lsn): void => this.#client?.sendStatus(lsn);
  readonly #onDrain = (): void => {
    this.#isFull = false;
    this.#resume();
  };
  readonly #onFenced = (): void => this.#end('another proposer leads');
  readonly #onAbort = (): void => this.#end('aborted');
  readonly #statusTimer: NodeJS.Timeout;
  #resolveClosed: ((reason: string) => void) | undefined;
  #client: ReplicationClient | undefined;
  #isFull = false;
  /** Storage lags: no WAL is taken until it fires. */
  #slowTimer: NodeJS.Timeout | undefined;
  #keepTimer: NodeJS.Timeout | undefined;
  #leaveProcessor: (() => void) | undefined;
  #ended = false;

  constructor(options: WalPushOptions) {
    this.#options = options;
    this.closed = new Promise((resolve) => {
      this.#resolveClosed = resolve;
    });
    const { proposer, signal } = options;
    proposer.on('commit', this.#onCommit);
    proposer.on('drain', this.#onDrain);
    proposer.on('fenced', this.#onFenced);
    signal?.addEventListener('abort', this.#onAbort, { once: true });
    this.#statusTimer = setInterval(() => this.#client?.sendStatus(proposer.commitLsn), STATUS_INTERVAL_MS);
    this.#statusTimer.unref();
  }

  async start(): Promise<void> {
    try {
      this.#options.signal?.throwIfAborted();
      await this.#connect();
    } catch (error) {
      this.#end('could not start');
      throw error;
    }
  }

  close(): Promise<void> {
    this.#end('closed');
    return Promise.resolve();
  }

  async #connect(): Promise<void> {
    const { slotName, proposer } = this.#options;
    const client = await ReplicationClient.connect({ ...this.#options, applicationName: PROPOSER_NAME });
    try {
      await client.ensureSlot(slotName);
      this.#client = client;
      await client.stream(slotName, proposer.endLsn, {
        onWal: (lsn, bytes) => {
          if (!proposer.append(lsn, bytes)) this.#isFull = true;
          const waitMs = delayMs(bytes.length, proposer.allowedRate);
          if (waitMs >= SLOW_MS_MIN) this.#slow(waitMs);
          if (this.#isFull || this.#slowTimer !== undefined) client.pause();
        },
        onStatusWanted: () => client.sendStatus(proposer.commitLsn),
        onClose: (reason) => void this.#lost(reason),
      });
    } catch (error) {
      client.close();
      throw error;
    }
    client.sendStatus(proposer.commitLsn);
    if (this.#ended) client.close();
    else this.#keepSenderSoon(client);
  }

  #keepSenderSoon(client: ReplicationClient): void {
    const { processor } = this.#options;
    const { serverPid } = client;
    this.#leaveSender();
    if (processor === undefined || serverPid === undefined) return;
    this.#keepTimer = setTimeout(() => {
      if (this.#client === client) this.#leaveProcessor = processor.keepSender(serverPid);
    }, KEEP_AFTER_MS);
    this.#keepTimer.unref();
  }

  #leaveSender(): void {
    clearTimeout(this.#keepTimer);
    this.#leaveProcessor?.();
    this.#leaveProcessor = undefined;
  }

  #slow(waitMs: number): void {
    if (this.#slowTimer !== undefined) return;
    this.#slowTimer = setTimeout(() => {
      this.#slowTimer = undefined;
      // At the hard limit nothing is taken until the lag is less.
      if (this.#options.proposer.allowedRate === 0 && !this.#ended) this.#slow(DELAY_MS_MAX);
      else this.#resume();
    }, waitMs);
  }

  #resume(): void {
    if (!this.#isFull && this.#slowTimer === undefined) this.#client?.resume();
  }

  async #lost(reason: string): Promise<void> {
    this.#client = undefined;
    if (this.#ended) return;
    this.#options.log?.info({ reason }, 'the WAL stream broke, connecting anew');
    const deadline = performance.now() + RECONNECT_FOR_MS;
    for (;;) {
      try {
        await sleep(RECONNECT_DELAY_MS);
        if (!this.#ended) await this.#connect();
        return;
      } catch (error) {
        if (performance.now() > deadline) {
          this.#end(error instanceof Error ? error.message : String(error));
          return;
        }
      }
    }
  }

  #end(reason: string): void {
    if (this.#ended) return;
    this.#ended = true;
    const { proposer, signal } = this.#options;
    proposer.off('commit', this.#onCommit);
    proposer.off('drain', this.#onDrain);
    proposer.off('fenced', this.#onFenced);
    signal?.removeEventListener('abort', this.#onAbort);
    clearInterval(this.#statusTimer);
    clearTimeout(this.#slowTimer);
    this.#leaveSender();
    this.#client?.close();
    this.#resolveClosed?.(reason);
  }
}
