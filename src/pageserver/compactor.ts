/**
 * Where merges run: in a thread of their own, so that page reads and ingest stay smooth; or, for tests and tools, in this one.
 *
 * The thread is started when it is first needed, and again when it died. Merges that run at the same time take turns in it, a few milliseconds each.
 */

import { Worker } from 'node:worker_threads';
import { LayerAbsentError, LayerDamagedError } from './layers/block.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { MergeCancelled, mergeLayers } from './merge.ts';
import type { MergeJob } from './merge.ts';
import type { Replay } from './read.ts';

export interface Compactor {
  /** The merged layers, durable under their names. Rejects with MergeCancelled when the job was cancelled, LayerAbsentError when a file is not here. */
  merge(job: MergeJob): Promise<LayerDescription[]>;
  close(): Promise<void>;
}

export type MergeReply =
  | { readonly kind: 'merged'; readonly layers: LayerDescription[] }
  | { readonly kind: 'cancelled' }
  | { readonly kind: 'absent'; readonly file: string }
  | { readonly kind: 'damaged'; readonly file: string; readonly offset: number; readonly reason: string }
  | { readonly kind: 'failed'; readonly message: string };

/** Merges in this thread, a few milliseconds at a time. */
export function inlineCompactor(replay: Replay): Compactor {
  return { merge: (job) => mergeLayers(job, replay), close: () => Promise.resolve() };
}

/** To the thread; `id` is in the answer. */
export interface MergeRequest {
  readonly id: number;
  readonly job: MergeJob;
}

export interface MergeAnswer {
  readonly id: number;
  readonly reply: MergeReply;
}

interface RunningMerge {
  readonly resolve: (layers: LayerDescription[]) => void;
  readonly reject: (error: Error) => void;
}

export class ThreadCompactor implements Compactor {
  #worker: Worker | undefined;
  readonly #running = new Map<number, RunningMerge>();
  #lastId = 0;

  merge(job: MergeJob): Promise<LayerDescription[]> {
    const worker = (this.#worker ??= this.#start());
    const id = ++this.#lastId;
    const { promise, resolve, reject } = Promise.withResolvers<LayerDescription[]>();
    this.#running.set(id, { resolve, reject });
    worker.ref();
    worker.postMessage({ id, job } satisfies MergeRequest);
    return promise;
  }

  async close(): Promise<void> {
    await this.#worker?.terminate();
  }

  #start(): Worker {
    const worker = new Worker(new URL('merge-thread.ts', import.meta.url));
    worker.on('message', ({ id, reply }: MergeAnswer) => {
      const merge = this.#running.get(id);
      this.#running.delete(id);
      if (this.#running.size === 0) worker.unref();
      if (reply.kind === 'merged') merge?.resolve(reply.layers);
      else merge?.reject(errorOf(reply));
    });
    const died = (error: Error): void => {
      if (this.#worker !== worker) return;
      this.#worker = undefined;
      const lost = [...this.#running.values()];
      this.#running.clear();
      for (const { reject } of lost) reject(error);
    };
    worker.on('error', (error) => died(error instanceof Error ? error : new Error(String(error))));
    worker.once('exit', () => died(new Error('the compaction thread ended')));
    return worker;
  }
}

function errorOf(reply: Exclude<MergeReply, { kind: 'merged' }>): Error {
  if (reply.kind === 'cancelled') return new MergeCancelled('the merge was given up');
  if (reply.kind === 'absent') return new LayerAbsentError(reply.file);
  if (reply.kind === 'damaged') return new LayerDamagedError(reply.file, reply.offset, reply.reason);
  return new Error(reply.message);
}
