/**
 * A timeline's frozen memory layers on their way to disk: oldest first, one at a time. While writing fails they stay, to be read, and it is tried again every
 * second; so that memory is bounded, whoever brings more has to wait meanwhile (`room`).
 */

import { setTimeout as sleep } from 'node:timers/promises';
import { SingleRun } from '../base/single-run.ts';
import type { Lsn } from '../postgres/lsn.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import type { MemoryLayer } from './layers/memory-layer.ts';

export interface FrozenLayer {
  readonly layer: MemoryLayer;
  /** What was put in bulk for its one record. */
  readonly bulk: readonly LayerDescription[];
  readonly lastRecordLsn: Lsn;
  readonly lastRecordStartLsn: Lsn;
}

export interface FlushQueueOptions {
  /** Makes it durable, and has it read from there from then on. */
  readonly write: (frozen: FrozenLayer) => Promise<void>;
  /** Called after each, with the error when it failed. */
  readonly onFlush: (error: unknown) => void;
  /** Layers that may wait before more have to. */
  readonly layersMax: number;
}

const RETRY_DELAY_MS = 1_000;

export class FlushQueue {
  readonly #options: FlushQueueOptions;
  readonly #layers: FrozenLayer[] = [];
  #isStopped = false;
  #isGivenUp = false;
  readonly #flushes = new SingleRun(
    () => this.#flushAll(),
    () => this.#layers.length > 0 && this.#error === undefined && !this.#isStopped,
  );
  /** Resolves when a failed flush is tried again. */
  #retry: Promise<void> | undefined;
  #error: Error | undefined;

  constructor(options: FlushQueueOptions) {
    this.#options = options;
  }

  /** Oldest first. */
  get layers(): readonly FrozenLayer[] {
    return this.#layers;
  }

  get isFull(): boolean {
    return this.#layers.length > this.#options.layersMax && !this.#isStopped;
  }

  /** Why the last flush failed, if it did. */
  get error(): Error | undefined {
    return this.#error;
  }

  push(frozen: FrozenLayer): void {
    this.#layers.push(frozen);
    this.#flushes.start();
  }

  /** To be called by `write` when the oldest layer is read from disk. */
  shift(): void {
    this.#layers.shift();
  }

  /** Resolves when all that is here now is written, or the queue is stopped; rejects when writing fails. */
  async flushed(): Promise<void> {
    const last = this.#layers.at(-1);
    if (last === undefined) return;
    if (!this.#isStopped) this.#flushes.start();
    while (this.#layers.includes(last) && !this.#isStopped) {
      await this.#flushes.current;
      if (this.#error !== undefined) throw this.#error;
    }
  }

  /** Resolves when it is not full, or stopped. */
  async room(): Promise<void> {
    while (this.isFull) await (this.#flushes.current ?? this.#retry ?? sleep(RETRY_DELAY_MS));
  }

  /** Resolves when nothing is written any more. What fails is not tried again; `isGivenUp`: only what is being written now is. */
  async stop(isGivenUp: boolean): Promise<void> {
    this.#isStopped = true;
    this.#isGivenUp = isGivenUp;
    await this.#flushes.current;
  }

  async #flushAll(): Promise<void> {
    for (let oldest = this.#layers[0]; oldest !== undefined && !this.#isGivenUp; oldest = this.#layers[0]) {
      try {
        await this.#options.write(oldest);
        this.#error = undefined;
        this.#options.onFlush(undefined);
      } catch (error) {
        this.#error = error instanceof Error ? error : new Error(String(error));
        this.#options.onFlush(error);
        if (this.#isStopped) return;
        this.#retry ??= sleep(RETRY_DELAY_MS, undefined, { ref: false }).then(() => {
          this.#retry = undefined;
          if (!this.#isStopped && this.#layers.length > 0) this.#flushes.start();
        });
        return;
      }
    }
  }
}
