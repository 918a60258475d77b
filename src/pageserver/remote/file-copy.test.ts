import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { makeRecord, u32 } from '../../../test/ingest/make-record.ts';
import { farStore, TestGenerations, TestNode } from '../../../test/pageserver/node.ts';
import { FileSystemStore } from '../../object-store/file-system-store.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { RM_DBASE } from '../../postgres/rmgr.ts';
import { encodeCheckpointState } from '../ingest/checkpoint-state.ts';
import { Ingest } from '../ingest/ingest.ts';
import { CHECKPOINT_STATE_KEY, databaseKey, relationBlockKey, relationSizeKey } from '../key.ts';
import { LayerDamagedError } from '../layers/block.ts';
import { encodeImage } from '../value.ts';
import { readWhole } from '../whole-reads.ts';
import type { Repair } from '../whole-reads.ts';

const TENANT = 'a'.repeat(32);
const ID = 'b'.repeat(32);
const LSN = 0x1000000;
const BLOCKS = 250;
const FROM = { spc: 1663, db: 5, rel: 16384, fork: 0 };

const STATE = encodeCheckpointState({
  checkPoint: {
    redo: LSN,
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
  },
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
  checkpointLsn: LSN - 64,
  shutdownLsn: LSN,
});

test('a template that is larger than the disk is copied once, though layers go and come meanwhile', async (context) => {
  const root = mkdtempSync(join(tmpdir(), 'strata-file-copy-'));
  const store = farStore(await FileSystemStore.open(join(root, 'store')));
  const directory = join(root, 'pageserver');
  const node = await TestNode.open({
    directory,
    store,
    generations: new TestGenerations(),
    cacheBytes: 10_000,
    piecesFromBytes: 100_000,
  });
  context.after(async () => {
    await node.abandon();
    rmSync(root, { recursive: true, force: true, maxRetries: 5 });
  });
  const pages = Array.from({ length: BLOCKS }, () => randomBytes(BLOCK_SIZE));
  const request = { tenantId: TENANT, timelineId: ID, pgVersion: 17, lsn: LSN, recordLsn: LSN - 64 } as const;
  const timeline = await node.timelines.import(request, async (target) => {
    target.put(CHECKPOINT_STATE_KEY, STATE);
    target.put(databaseKey(FROM.spc, FROM.db), Buffer.from('map'));
    target.put(relationSizeKey(FROM.spc, FROM.db, FROM.rel, FROM.fork), u32(BLOCKS));
    await target.drain();
  });
  // Pages lie in other layers than sizes do, as they do in a large database.
  const endLsn = LSN + 64;
  await timeline.putBulk(
    (async function* () {
      yield pages.map(
        (page, blk) => [relationBlockKey(FROM.spc, FROM.db, FROM.rel, FROM.fork, blk), encodeImage(page)] as const,
      );
    })(),
    endLsn,
  );
  timeline.advance(endLsn, LSN);
  await timeline.flush();
  assert(await node.remote.settled());

  let copyCount = 0;
  const repair: Repair = async (damage) => {
    await node.timelines.repair(damage);
    await node.eviction.run();
  };
  const record = makeRecord({ rmid: RM_DBASE, info: 0, main: u32(6, 1663, 5, 1663), lsn: endLsn });
  for (let ingest: Ingest | undefined; timeline.lastRecordLsn < record.endLsn;) {
    try {
      await node.eviction.run();
      await node.eviction.run();
      ingest ??= new Ingest(timeline);
      await ingest.prepare(record, { repair });
      copyCount++;
      ingest.ingest(record);
    } catch (error) {
      if (!(error instanceof LayerDamagedError)) throw error;
      ingest = undefined;
      await repair(error);
    }
    assert(copyCount < 5);
  }
  assert.equal(copyCount, 1);
  const copied = await readWhole(() => timeline.getPages({ ...FROM, db: 6 }, 0, BLOCKS, record.endLsn), repair);
  assert(copied.equals(Buffer.concat(pages)));
});
