/** The thread of ThreadCompactor (compactor.ts): takes merges, several at a time, and answers each. */

import { parentPort } from 'node:worker_threads';
import type { MergeAnswer, MergeReply, MergeRequest } from './compactor.ts';
import { LayerAbsentError, LayerDamagedError } from './layers/block.ts';
import { MergeCancelled, mergeLayers } from './merge.ts';
import { replayValue } from './replay.ts';

parentPort?.on('message', ({ id, job }: MergeRequest) => {
  mergeLayers(job, replayValue)
    .then((layers): MergeReply => ({ kind: 'merged', layers }))
    .catch((error: unknown): MergeReply => {
      if (error instanceof MergeCancelled) return { kind: 'cancelled' };
      if (error instanceof LayerAbsentError) return { kind: 'absent', file: error.file };
      if (error instanceof LayerDamagedError) {
        return { kind: 'damaged', file: error.file, offset: error.offset, reason: error.reason };
      }
      return { kind: 'failed', message: error instanceof Error ? error.message : String(error) };
    })
    .then((reply) => parentPort?.postMessage({ id, reply } satisfies MergeAnswer))
    .catch((error: unknown) => {
      throw error;
    });
});
