/** For tests: what a cluster that has done nothing since a checkpoint knows of itself. */

import type { Lsn } from '../../src/postgres/lsn.ts';
import { encodeCheckpointState } from '../../src/pageserver/ingest/checkpoint-state.ts';
import type { CheckPoint } from '../../src/postgres/checkpoint.ts';

export function checkPointAt(lsn: Lsn): CheckPoint {
  return {
    redo: lsn,
    timelineId: 1,
    prevTimelineId: 1,
    fullPageWrites: false,
    walLevel: 1,
    nextXid: 700,
    nextOid: 16384,
    nextMulti: 1,
    nextMultiOffset: 0,
    oldestXid: 3,
    oldestXidDb: 1,
    oldestMulti: 1,
    oldestMultiDb: 1,
    time: 1_700_000_000,
    oldestCommitTsXid: 0,
    newestCommitTsXid: 0,
    oldestActiveXid: 0,
  };
}

/** The checkpoint state (ingest/checkpoint-state.ts) where WAL begins at `lsn`. */
export function checkpointStateAt(lsn: Lsn, checkPoint = checkPointAt(lsn)): Buffer {
  return encodeCheckpointState({
    checkPoint,
    parameters: {
      walLevel: 1,
      walLogHints: false,
      maxConnections: 100,
      maxWorkerProcesses: 8,
      maxWalSenders: 10,
      maxPreparedTransactions: 0,
      maxLocksPerTransaction: 64,
      trackCommitTimestamp: false,
    },
    checkpointLsn: lsn - 64,
    shutdownLsn: lsn,
  });
}
