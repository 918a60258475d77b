import assert from 'node:assert/strict';
import { test } from 'node:test';

import { MemoryTimeline } from '../../test/ingest/memory-timeline.ts';
import { decodeBasebackup, encodeBasebackup } from '../api/basebackup.ts';
import type { BasebackupHeader } from '../api/basebackup.ts';
import { CONTROL_FILE_SIZE } from '../postgres/control-file.ts';
import { FORK_FSM, FORK_INIT, FORK_MAIN, FORK_VM } from '../postgres/relation.ts';
import { BasebackupError, takeBasebackup } from './basebackup.ts';
import { encodeCheckpointState } from './ingest/checkpoint-state.ts';
import {
  CHECKPOINT_STATE_KEY,
  CONTROL_FILE_KEY,
  databaseKey,
  relationSizeKey,
  slruPageKey,
  slruSizeKey,
  twoPhaseKey,
} from './key.ts';

const LSN = 0x2000098;

function timelineWithEverything(): MemoryTimeline {
  const timeline = new MemoryTimeline(17, LSN, LSN - 112);
  timeline.put(CONTROL_FILE_KEY, Buffer.alloc(CONTROL_FILE_SIZE, 7));
  timeline.put(
    CHECKPOINT_STATE_KEY,
    encodeCheckpointState({
      checkPoint: {
        redo: 1,
        timelineId: 1,
        prevTimelineId: 1,
        fullPageWrites: true,
        walLevel: 1,
        nextXid: 2 ** 32 * 5 + 1000,
        nextOid: 20000,
        nextMulti: 3,
        nextMultiOffset: 4,
        oldestXid: 700,
        oldestXidDb: 1,
        oldestMulti: 1,
        oldestMultiDb: 1,
        time: 1_700_000_000,
        oldestCommitTsXid: 900,
        newestCommitTsXid: 901,
        oldestActiveXid: 0,
      },
      parameters: {
        walLevel: 1,
        walLogHints: true,
        maxConnections: 50,
        maxWorkerProcesses: 8,
        maxWalSenders: 10,
        maxPreparedTransactions: 2,
        maxLocksPerTransaction: 64,
        trackCommitTimestamp: true,
      },
      checkpointLsn: LSN - 112,
      shutdownLsn: LSN,
    }),
  );
  timeline.put(databaseKey(1664, 0), Buffer.from('global map'));
  timeline.put(databaseKey(1663, 5), Buffer.from('map of 5'));
  timeline.put(databaseKey(1663, 6), Buffer.alloc(0));
  const size = (rel: number, fork: number, blocks: number): void => {
    const bytes = Buffer.alloc(4);
    bytes.writeUInt32LE(blocks);
    timeline.put(relationSizeKey(1663, 5, rel, fork), bytes);
  };
  size(100, FORK_MAIN, 9);
  size(100, FORK_FSM, 3);
  size(100, FORK_VM, 1);
  size(200, FORK_MAIN, 4);
  size(200, FORK_FSM, 3);
  size(200, FORK_INIT, 1);
  size(201, FORK_INIT, 0);
  timeline.put(slruSizeKey(0, 1), Buffer.from([2, 0, 0, 0]));
  timeline.put(slruPageKey(0, 1, 1), Buffer.alloc(8192, 3));
  timeline.put(twoPhaseKey(5, 999), Buffer.from('two-phase'));
  return timeline;
}

test('a basebackup has the files, the forks and the state of its LSN', () => {
  const backup = takeBasebackup({ reader: timelineWithEverything(), startLsn: LSN }, LSN);
  assert.deepEqual(
    backup.files.map(({ path, bytes }) => [path, bytes.length]),
    [
      ['PG_VERSION', 3],
      ['base/5/PG_VERSION', 3],
      ['base/5/pg_filenode.map', 8],
      ['base/6/PG_VERSION', 3],
      ['global/pg_filenode.map', 10],
      ['pg_xact/0001', 16384],
      ['pg_twophase/00000005000003E7', 9],
    ],
  );
  assert.equal(backup.files[5]!.bytes[8192], 3);
  assert.deepEqual(
    backup.relations.map(({ rel, fork, sourceFork, blocks }) => [rel, fork, sourceFork, blocks]),
    [
      [100, FORK_MAIN, FORK_MAIN, 9],
      [100, FORK_FSM, FORK_FSM, 3],
      [100, FORK_VM, FORK_VM, 1],
      [200, FORK_MAIN, FORK_INIT, 1],
      [200, FORK_INIT, FORK_INIT, 1],
      [201, FORK_MAIN, FORK_INIT, 0],
      [201, FORK_INIT, FORK_INIT, 0],
    ],
  );
  assert.deepEqual(backup.databases, [
    { spc: 1663, db: 5 },
    { spc: 1663, db: 6 },
    { spc: 1664, db: 0 },
  ]);
  assert.equal(backup.prevRecordLsn, LSN - 112);
  assert.equal(backup.checkPoint.newestCommitTsXid, 999);
});

test('a basebackup survives the wire, and one whose parts do not fit is refused', () => {
  const backup = takeBasebackup({ reader: timelineWithEverything(), startLsn: LSN }, LSN);
  const { header, attachment } = encodeBasebackup(backup);
  const sent = JSON.parse(JSON.stringify(header)) as BasebackupHeader;
  assert.deepEqual(decodeBasebackup(sent, attachment), backup);
  assert.throws(() => decodeBasebackup(sent, attachment.subarray(1)), RangeError);
});

test('a timeline that lacks its control file gives none', () => {
  const empty = new MemoryTimeline(17, LSN, LSN - 112);
  assert.throws(() => takeBasebackup({ reader: empty, startLsn: LSN }, LSN), BasebackupError);
});
