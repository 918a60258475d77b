/**
 * Objects that nobody needs any more, and whose removal was confirmed (remote.ts): removed in batches, in the background.
 *
 * It is in memory and bounded: what a crash loses, or what is too much, stays in the store as orphans, which scrub finds. Never a hole.
 */

import type { Logger } from '../../base/log.ts';
import { SingleRun } from '../../base/single-run.ts';
import { listAll } from '../../object-store/object-store.ts';
import type { ObjectStore } from '../../object-store/object-store.ts';
import { setTimeout as sleep } from 'node:timers/promises';
import type { OnStep } from '../step.ts';

/** Either one object, or all whose names begin with `prefix` but `except`. */
export type Deletion =
  | { readonly kind: 'object'; readonly name: string }
  | { readonly kind: 'prefix'; readonly prefix: string; readonly except: string | undefined };

export interface DeletionQueueOptions {
  readonly store: ObjectStore;
  readonly log: Logger;
  readonly retryDelayMs: number;
  readonly onStep?: OnStep;
}

const DELETIONS_MAX = 100_000;
const BATCH = 1000;

export class DeletionQueue {
  readonly #options: DeletionQueueOptions;
  readonly #stopped: AbortSignal;
  #waiting: Deletion[] = [];
  readonly #runs = new SingleRun(
    () => this.#run(),
    () => this.#isWanted,
  );
  #isFull = false;

  constructor(options: DeletionQueueOptions, stopped: AbortSignal) {
    this.#options = options;
    this.#stopped = stopped;
  }

  get length(): number {
    return this.#waiting.length;
  }

  add(deletions: readonly Deletion[]): void {
    const room = DELETIONS_MAX - this.#waiting.length;
    if (deletions.length > room && !this.#isFull) {
      this.#isFull = true;
      this.#options.log.warn(
        { waiting: this.#waiting.length },
        'too many objects wait to be deleted: scrub will find the rest',
      );
    }
    this.#waiting.push(...deletions.slice(0, room));
    if (this.#isWanted) this.#runs.start();
  }

  get #isWanted(): boolean {
    return this.#waiting.length > 0 && !this.#stopped.aborted;
  }

  /** Resolves when nothing waits. */
  settled(): Promise<void> {
    return this.#runs.settled();
  }

  async #run(): Promise<void> {
    const { store, log, retryDelayMs, onStep } = this.#options;
    const signal = this.#stopped;
    let isFailing = false;
    while (this.#waiting.length > 0 && !signal.aborted) {
      const batch = this.#waiting.slice(0, BATCH);
      try {
        await store.deleteMany(
          batch.flatMap((each) => (each.kind === 'object' ? [each.name] : [])),
          { signal },
        );
        for (const each of batch) if (each.kind === 'prefix') await this.#deletePrefix(each);
        this.#waiting = this.#waiting.slice(batch.length);
        this.#isFull = false;
        isFailing = false;
        onStep?.('objects deleted');
      } catch (error) {
        if (signal.aborted) return;
        if (!isFailing) log.warn({ err: error, waiting: this.#waiting.length }, 'objects cannot be deleted yet');
        isFailing = true;
        await sleep(retryDelayMs, undefined, { signal }).catch(() => {});
      }
    }
  }

  async #deletePrefix({ prefix, except }: Extract<Deletion, { kind: 'prefix' }>): Promise<void> {
    const { store } = this.#options;
    const signal = this.#stopped;
    const names: string[] = [];
    for await (const { name } of listAll(store, prefix, { signal })) if (name !== except) names.push(name);
    for (let at = 0; at < names.length; at += BATCH) await store.deleteMany(names.slice(at, at + BATCH), { signal });
  }
}
