import assert from 'node:assert/strict';
import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { encodePoke, replayPoke } from '../../test/pageserver/history-model.ts';
import { createLog } from '../base/log.ts';
import { startS3rver } from '../../test/object-store/s3-servers.ts';
import { FileSystemStore } from '../object-store/file-system-store.ts';
import type { ObjectStore } from '../object-store/object-store.ts';
import { S3Store } from '../object-store/s3-store.ts';
import { relationBlockKey, relationSizeKey } from './key.ts';
import { layerFileName } from './layers/layer-format.ts';
import { indexObjectName, layerObjectName } from './remote/object-names.ts';
import { encodeRemoteIndex } from './remote/remote-index.ts';
import { ORPHAN_AGE_MS } from './remote/timeline-objects.ts';
import { scrubStore } from './scrub.ts';
import type { StoreScrub } from './scrub.ts';
import type { Timeline } from './timeline.ts';
import { decodeTimelineIndex, encodeTimelineIndex } from './timeline-index.ts';
import { Timelines } from './timelines.ts';
import { encodeCountImage, encodeImage } from './value.ts';

const TENANT = 'a'.repeat(32);
const LSN = 0x1000000;
const ID = '1'.padStart(32, '0');
const log = createLog({ name: 'test', level: 'silent' });

const PLACES = {
  directory: async (directory: string): Promise<Place> => ({
    store: await FileSystemStore.open(join(directory, 'store')),
    stop: async () => {},
  }),
  S3: async (): Promise<Place> => {
    const server = await startS3rver();
    const { endpoint, bucket, credentials } = server;
    const store = new S3Store({ endpoint, bucket, credentials, prefix: 'scrub', supportsIfAbsent: false });
    const stop = async (): Promise<void> => {
      store.close();
      await server.stop();
    };
    return { store, stop };
  },
};

interface Place {
  readonly store: ObjectStore;
  readonly stop: () => Promise<void>;
}

for (const [kind, open] of Object.entries(PLACES))
  describe(`scrub, with an object store in ${kind === 'S3' ? 'S3' : 'a directory'}`, () => {
    let directory: string;
    let timelines: Timelines;
    let timeline: Timeline;
    let store: ObjectStore;
    let place: Place;

    beforeEach(async () => {
      directory = mkdtempSync(join(tmpdir(), 'strata-scrub-test-'));
      mkdirSync(join(directory, 'scratch'));
      place = await open(directory);
      ({ store } = place);
      timelines = await Timelines.open(directory, { replay: replayPoke, log });
      timeline = await timelines.import(
        { tenantId: TENANT, timelineId: ID, pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 },
        async (target) => {
          for (let blk = 0; blk < 10; blk++)
            target.put(relationBlockKey(1663, 5, 100, 0, blk), Buffer.alloc(8192, blk));
          await target.drain();
        },
      );
      for (let round = 0; round < 2; round++) {
        const lsn = timeline.lastRecordLsn + 8;
        timeline.put(relationSizeKey(1663, 5, 100, 0), lsn, encodeCountImage(3000));
        for (let blk = 0; blk < 3000; blk++) {
          const value = blk % 10 === 0 ? encodeImage(Buffer.alloc(8192, blk)) : encodePoke('record', blk % 100, 7);
          timeline.put(relationBlockKey(1663, 5, 100, 0, blk), lsn, value);
        }
        timeline.advance(lsn, lsn - 8);
        await timeline.flush();
      }
    });
    afterEach(async () => {
      await timelines.close();
      await place.stop();
      rmSync(directory, { recursive: true });
    });

    /** Of what has nothing to do with the object store. */
    const testOnce = kind === 'S3' ? (): void => {} : test;
    const layerNames = (): string[] => timeline.index.layers.map(layerFileName);
    const pathOf = (name: string): string => join(directory, 'timelines', ID, name);
    const objectOf = (name: string, generation = 1): string =>
      layerObjectName({ tenantId: TENANT, timelineId: ID, fileName: name, generation });

    function scrub(options: { withStore?: boolean; deleteOrphans?: boolean; now?: number } = {}): Promise<StoreScrub> {
      return scrubStore({
        directory: join(directory, 'timelines'),
        ...(options.withStore === true ? { store, generation: { generation: 2, since: 1 } } : {}),
        scratchDirectory: join(directory, 'scratch'),
        isWanted: () => true,
        deleteOrphans: options.deleteOrphans ?? false,
        now: () => options.now ?? Date.now(),
        onProgress: () => {},
      });
    }

    async function upload(sequence = 1, names = layerNames()): Promise<void> {
      for (const name of names) await store.put(objectOf(name), readFileSync(pathOf(name)));
      const index = encodeRemoteIndex({
        generation: 1,
        sequence,
        timeline: timeline.index,
        layers: timeline.index.layers
          .filter((layer) => names.includes(layerFileName(layer)))
          .map((description) => ({
            description,
            crc32: crc32(readFileSync(pathOf(layerFileName(description)))),
            generation: 1,
          })),
      });
      await store.put(
        indexObjectName({ tenantId: TENANT, timelineId: ID, generation: 1, sequence, isDeleted: false }),
        index,
      );
    }

    test('what is whole passes, here and in the store', async () => {
      await upload();
      const { findings, orphans, local, remote, timelines: count } = await scrub({ withStore: true });
      assert.deepEqual({ findings, orphans, count }, { findings: [], orphans: [], count: 1 });
      assert.equal(local.layers, 3);
      assert.equal(remote.layers, 3);
      assert.equal(
        local.bytes,
        timeline.index.layers.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
      );
      assert.deepEqual(readdirSync(join(directory, 'scratch')), []);
    });

    testOnce('every flipped byte of a layer is found, with the file, wherever it is', async () => {
      await fc.assert(
        fc.asyncProperty(fc.nat(2), fc.nat(), fc.integer({ min: 1, max: 255 }), async (which, at, bits) => {
          const path = pathOf(layerNames()[which]!);
          const bytes = readFileSync(path);
          const damaged = Buffer.from(bytes);
          damaged[at % bytes.length]! ^= bits;
          writeFileSync(path, damaged);
          const { findings } = await scrub();
          writeFileSync(path, bytes);
          assert(findings.length > 0, `byte ${at % bytes.length} of ${bytes.length}`);
          assert(findings.every(({ name, where }) => name === path && where === 'local'));
        }),
        { numRuns: 60 },
      );
    });

    testOnce(
      'a damaged block is named with its offset, and others of the file are looked at all the same',
      async () => {
        const path = pathOf(layerNames()[1]!);
        const bytes = readFileSync(path);
        bytes[100]! ^= 1;
        const middle = Math.floor(bytes.length / 2);
        bytes[middle]! ^= 1;
        writeFileSync(path, bytes);
        const { findings } = await scrub();
        assert(
          findings.some(({ offset, reason }) => offset === 16 && /checksum/.test(reason)),
          JSON.stringify(findings),
        );
        assert(findings.some(({ offset }) => offset > 16 && offset <= middle));
      },
    );

    testOnce(
      'layers that are missing, cut off, under another name or of another length than the index says are found',
      async () => {
        const [first, second, third] = layerNames() as [string, string, string];
        const saved = [first, second, third].map((name) => [pathOf(name), readFileSync(pathOf(name))] as const);
        const reset = (): void => saved.forEach(([path, bytes]) => writeFileSync(path, bytes));
        const finds = async (name: string, words: RegExp): Promise<void> => {
          const { findings } = await scrub();
          assert(
            findings.some((finding) => finding.name === pathOf(name) && words.test(finding.reason)),
            JSON.stringify(findings),
          );
          reset();
        };
        rmSync(pathOf(second));
        await finds(second, /is not there/);
        truncateSync(pathOf(second), 1000);
        await finds(second, /it has 1000 bytes, the timeline's index says \d+/);
        truncateSync(pathOf(second), 20);
        await finds(second, /too short/);
        copyFileSync(pathOf(third), pathOf(second));
        await finds(second, /another kind or range than its name/);
        const indexPath = pathOf('index');
        const index = decodeTimelineIndex(readFileSync(indexPath), indexPath);
        const layers = index.layers.map((layer, i) => (i === 1 ? { ...layer, sizeBytes: layer.sizeBytes + 1 } : layer));
        const wholeIndex = readFileSync(indexPath);
        writeFileSync(indexPath, encodeTimelineIndex({ ...index, layers }));
        await finds(second, /the timeline's index says/);
        const broken = Buffer.from(wholeIndex);
        broken[200]! ^= 1;
        writeFileSync(indexPath, broken);
        await finds('index', /is damaged/);
        writeFileSync(indexPath, wholeIndex);
        assert.deepEqual((await scrub()).findings, []);
      },
    );

    test('objects that are damaged, cut off, missing or misnamed in the index are found, and nothing else is', async () => {
      await upload();
      const [first, second, third] = layerNames() as [string, string, string];
      const flipped = await store.get(objectOf(second));
      flipped[3000]! ^= 4;
      await store.put(objectOf(second), flipped);
      await store.put(objectOf(third), (await store.get(objectOf(third))).subarray(0, 500));
      await store.delete(objectOf(first));
      const { findings, remote } = await scrub({ withStore: true });
      const of = (name: string): string[] =>
        findings.filter((each) => each.name === objectOf(name)).map(({ reason }) => reason);
      assert.match(of(second).join(), /its checksum is [0-9a-f]{8}, the index says.*checksum is/);
      assert.match(of(third).join(), /it has 500 bytes, the index says \d+/);
      assert.deepEqual(of(first), ['the object is not there']);
      assert(findings.every(({ where }) => where === 'object store'));
      assert(remote.layers > 0);
    });

    test('a layer that only the store has is no loss; one that neither has is', async () => {
      await upload();
      const [, second, third] = layerNames() as [string, string, string];
      rmSync(pathOf(second));
      const evicted = await scrub({ withStore: true });
      assert.deepEqual(evicted.findings, []);
      assert.equal(evicted.evictedLayers, 1);
      await upload(
        2,
        layerNames().filter((name) => name !== second && name !== third),
      );
      const { findings } = await scrub({ withStore: true });
      assert.deepEqual(
        findings.map(({ name }) => name),
        [pathOf(second)],
      );
    });

    test('orphans are what the newest index does not name and nobody is about to; they go when that is asked for', async () => {
      await upload(1);
      await upload(2);
      const older = layerNames()[0]!;
      await store.put(objectOf(older, 2), readFileSync(pathOf(older)));
      await store.put(objectOf(`${older}.7`, 1), Buffer.from('left behind'));
      const other = layerObjectName({ tenantId: TENANT, timelineId: 'f'.repeat(32), fileName: older, generation: 1 });
      await store.put(other, Buffer.from('of a timeline without an index'));
      const oldIndex = indexObjectName({
        tenantId: TENANT,
        timelineId: ID,
        generation: 1,
        sequence: 1,
        isDeleted: false,
      });
      const expected = [objectOf(`${older}.7`, 1), oldIndex, other].sort();
      const found = await scrub({ withStore: true });
      assert.deepEqual(found.orphans.map(({ name }) => name).sort(), expected);
      assert.equal(found.orphansDeleted, 0);
      assert.deepEqual(found.findings, []);
      const deleted = await scrub({ withStore: true, deleteOrphans: true });
      assert.equal(deleted.orphansDeleted, 3);
      const after = await scrub({ withStore: true });
      assert.deepEqual([after.orphans, after.findings], [[], []]);
      // What the latest generation has uploaded is about to be named, for a day.
      const later = await scrub({ withStore: true, now: Date.now() + ORPHAN_AGE_MS + 60_000 });
      assert.deepEqual(
        later.orphans.map(({ name }) => name),
        [objectOf(older, 2)],
      );
    });

    test('a damaged newest index is said, and none of the layers is called an orphan', async () => {
      await upload(1);
      await upload(2);
      const name = indexObjectName({ tenantId: TENANT, timelineId: ID, generation: 1, sequence: 2, isDeleted: false });
      const bytes = await store.get(name);
      bytes[100]! ^= 1;
      await store.put(name, bytes);
      const { findings, orphans } = await scrub({ withStore: true, deleteOrphans: true });
      assert.deepEqual(
        findings.map((finding) => finding.name),
        [name],
      );
      assert.deepEqual(orphans, []);
    });

    testOnce('there is no false alarm while layers are flushed, merged and collected', async () => {
      let isOver = false;
      const writing = (async () => {
        while (!isOver) {
          for (let i = 0; i < 4; i++) {
            const lsn = timeline.lastRecordLsn + 8;
            timeline.put(relationBlockKey(1663, 5, 100, 0, i), lsn, encodeImage(Buffer.alloc(8192, lsn)));
            timeline.advance(lsn, lsn - 8);
            await timeline.flush();
          }
          await timelines.compaction.settled();
        }
      })();
      for (let i = 0; i < 20; i++) {
        const { findings, local } = await scrub();
        assert.deepEqual(findings, []);
        assert(local.layers > 0);
      }
      isOver = true;
      await writing;
    });
  });
