/** The thread of ThreadCompactor (compactor.ts): takes merges and answers each with a MergeReply. */

import { parentPort } from 'node:worker_threads';
import type { MergeReply } from './compactor.ts';
import { LayerAbsentError, LayerDamagedError } from './layers/block.ts';
import { MergeCancelled, mergeLayers } from './merge.ts';
import type { MergeJob } from './merge.ts';
import { replayValue } from './replay.ts';

parentPort?.on('message', (job: MergeJob) => {
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
    .then((reply) => parentPort?.postMessage(reply))
    .catch((error: unknown) => {
      throw error;
    });
});
