/**
 * Where merges run: in a thread of their own, so that page reads and ingest stay smooth; or, for tests and tools, in this one.
 *
 * The thread is started when it is first needed, and again when it died. One merge at a time.
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

export class ThreadCompactor implements Compactor {
  #worker: Worker | undefined;

  merge(job: MergeJob): Promise<LayerDescription[]> {
    const worker = (this.#worker ??= this.#start());
    worker.ref();
    return new Promise<LayerDescription[]>((resolve, reject) => {
      const finish = (): void => {
        worker.off('message', onMessage);
        worker.off('error', onError);
        worker.off('exit', onExit);
        worker.unref();
      };
      const onMessage = (reply: MergeReply): void => {
        finish();
        if (reply.kind === 'merged') resolve(reply.layers);
        else reject(errorOf(reply));
      };
      const onError = (error: unknown): void => {
        finish();
        reject(error instanceof Error ? error : new Error(String(error)));
      };
      const onExit = (): void => onError(new Error('the compaction thread ended'));
      worker.on('message', onMessage);
      worker.on('error', onError);
      worker.on('exit', onExit);
      worker.postMessage(job);
    });
  }

  async close(): Promise<void> {
    await this.#worker?.terminate();
  }

  #start(): Worker {
    const worker = new Worker(new URL('merge-thread.ts', import.meta.url));
    worker.once('exit', () => {
      if (this.#worker === worker) this.#worker = undefined;
    });
    // Without a job nobody listens; an error then ends the thread, and the next job starts another.
    worker.on('error', () => {});
    return worker;
  }
}

function errorOf(reply: Exclude<MergeReply, { kind: 'merged' }>): Error {
  if (reply.kind === 'cancelled') return new MergeCancelled('the merge was given up');
  if (reply.kind === 'absent') return new LayerAbsentError(reply.file);
  if (reply.kind === 'damaged') return new LayerDamagedError(reply.file, reply.offset, reply.reason);
  return new Error(reply.message);
}
