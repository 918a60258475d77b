import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { checkpointStateAt } from '../../../test/ingest/checkpoint.ts';
import { u32 } from '../../../test/ingest/make-record.ts';
import { farStore, TestGenerations, TestNode } from '../../../test/pageserver/node.ts';
import { FileSystemStore } from '../../object-store/file-system-store.ts';
import { listAll } from '../../object-store/object-store.ts';
import { BLOCK_SIZE } from '../../postgres/page-size.ts';
import { RM_DBASE } from '../../postgres/rmgr.ts';
import { WalReader } from '../../postgres/wal/reader.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { encodeRecordAt } from '../../postgres/wal/writer.ts';
import { Ingest } from '../ingest/ingest.ts';
import { CHECKPOINT_STATE_KEY, databaseKey, relationBlockKey, relationSizeKey } from '../key.ts';
import type { Key } from '../key.ts';
import { LayerDamagedError } from '../layers/block.ts';
import { layerFileName, layerPath } from '../layers/layer-format.ts';
import type { Timeline } from '../timeline.ts';
import type { KeyValue } from '../timeline-access.ts';
import { encodeImage } from '../value.ts';
import { readWhole } from '../whole-reads.ts';
import type { Repair } from '../whole-reads.ts';

const TENANT = 'a'.repeat(32);
const ID = 'b'.repeat(32);
const LSN = 0x1000000;
const COPIED_LSN = LSN + 64;
const BLOCKS = 250;
const FROM = { spc: 1663, db: 5, rel: 16384, fork: 0 };

const WAL = encodeRecordAt({
  lsn: COPIED_LSN,
  prevLsn: LSN,
  rmid: RM_DBASE,
  info: 0,
  xid: 0,
  mainData: u32(6, FROM.spc, FROM.db, FROM.spc),
  version: 17,
  systemId: 1n,
});

describe('a copied database, and an object store', () => {
  const pages = Array.from({ length: BLOCKS }, () => randomBytes(BLOCK_SIZE));
  let root: string;
  let plain: FileSystemStore;
  let node: TestNode;
  let timeline: Timeline;
  let record: WalRecord;

  beforeEach(async () => {
    root = mkdtempSync(join(tmpdir(), 'strata-file-copy-'));
    plain = await FileSystemStore.open(join(root, 'store'));
    node = await TestNode.open({
      directory: join(root, 'pageserver'),
      store: farStore(plain),
      generations: new TestGenerations(),
      cacheBytes: 10_000,
      piecesFromBytes: 100_000,
      walOf: async function* () {
        yield { lsn: COPIED_LSN, bytes: WAL.bytes };
      },
    });
    const request = { tenantId: TENANT, timelineId: ID, pgVersion: 17, lsn: LSN, recordLsn: LSN - 64 } as const;
    timeline = await node.timelines.import(request, async (target) => {
      target.put(CHECKPOINT_STATE_KEY, checkpointStateAt(LSN));
      target.put(databaseKey(FROM.spc, FROM.db), Buffer.from('map'));
      target.put(relationSizeKey(FROM.spc, FROM.db, FROM.rel, FROM.fork), u32(BLOCKS));
      await target.drain();
    });
    // Pages lie in other layers than sizes do, as they do in a large database.
    const keyOf = (blk: number): Key => relationBlockKey(FROM.spc, FROM.db, FROM.rel, FROM.fork, blk);
    await timeline.putBulk(
      (async function* () {
        yield pages.map((page, blk): KeyValue => [keyOf(blk), encodeImage(page)]);
      })(),
      COPIED_LSN,
    );
    timeline.advance(COPIED_LSN, LSN);
    await timeline.flush();
    assert(await node.remote.settled());
    const reader = new WalReader(COPIED_LSN, 17);
    reader.push(COPIED_LSN, WAL.bytes);
    record = reader.next()!;
  });

  afterEach(async () => {
    await node.abandon();
    rmSync(root, { recursive: true, force: true, maxRetries: 5 });
  });

  async function evictAll(): Promise<void> {
    for (let i = 0; i < 2; i++) await node.eviction.run();
  }

  async function assertCopied(): Promise<void> {
    const copied = (): Buffer => timeline.getPages({ ...FROM, db: 6 }, 0, BLOCKS, record.endLsn);
    assert((await readWhole(copied, node.timelines.repair)).equals(Buffer.concat(pages)));
  }

  test('of a template larger than the disk it is made once, though layers go and come meanwhile', async () => {
    let copyCount = 0;
    const repair: Repair = async (damage) => {
      await node.timelines.repair(damage);
      await node.eviction.run();
    };
    while (timeline.lastRecordLsn < record.endLsn) {
      try {
        await evictAll();
        const ingest = new Ingest(timeline);
        await ingest.prepare(record, { repair });
        copyCount++;
        ingest.ingest(record);
      } catch (error) {
        if (!(error instanceof LayerDamagedError)) throw error;
        await repair(error);
      }
    }
    assert.equal(copyCount, 1);
    await assertCopied();
  });

  test('is made anew from WAL when store and disk have lost it, and the template is fetched for that', async () => {
    const ingest = new Ingest(timeline);
    await ingest.prepare(record);
    ingest.ingest(record);
    const older = timeline.index.layers;
    await timeline.flush();
    assert(await node.remote.settled());
    await evictAll();
    const lost = timeline.index.layers.filter((layer) => !older.includes(layer));
    assert.equal(lost.length, 3);
    for (const layer of lost) {
      const path = layerPath(timeline.directory, layer);
      rmSync(path, { force: true });
      timeline.findLayer(path)!.close();
      for await (const { name } of listAll(plain, 'layers/')) {
        if (name.includes(layerFileName(layer))) await plain.delete(name);
      }
    }
    await assertCopied();
    assert.equal(timeline.index.layers.length, 5);
  });

  test('is not begun when the timeline is gone', async () => {
    await node.timelines.delete(ID);
    async function* nothing(): AsyncGenerator<KeyValue[]> {
      yield assert.fail('nobody asks for it');
    }
    await assert.rejects(timeline.putBulk(nothing(), record.endLsn), { code: 'not-found' });
  });
});
