import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, test } from 'node:test';
import fc from 'fast-check';
import { StrataError } from '../../base/errors.ts';
import { FileSystemStore } from '../../object-store/file-system-store.ts';
import { ALL_KEYS } from '../key.ts';
import { decodeTimelineIndex, encodeChecked, encodeTimelineIndex } from '../timeline-index.ts';
import type { TimelineIndex } from '../timeline-index.ts';
import { indexObjectName, layerObjectName, parseIndexName, parseLayerName } from './object-names.ts';
import { decodeRemoteIndex, encodeRemoteIndex, objectNameOf } from './remote-index.ts';
import type { RemoteIndex, RemoteLayer } from './remote-index.ts';
import {
  listIndexes,
  listTimelineObjects,
  newestIndex,
  ORPHAN_AGE_MS,
  orphansOf,
  readIndex,
  TOMBSTONE_AGE_MS,
} from './timeline-objects.ts';

const TENANT = 'a'.repeat(32);
const TIMELINE = 'b'.repeat(32);

function layer(lsn: number, generation: number): RemoteLayer {
  const description = {
    kind: 'delta',
    keyStart: ALL_KEYS.start,
    keyEnd: ALL_KEYS.end,
    lsnStart: lsn,
    lsnEnd: lsn + 100,
    sizeBytes: 1000 + lsn,
  } as const;
  return { description, crc32: lsn * 7, generation };
}

function index(generation: number, sequence: number, layers: readonly RemoteLayer[], isDeleted = false): RemoteIndex {
  const timeline: TimelineIndex = {
    tenantId: TENANT,
    timelineId: TIMELINE,
    pgVersion: 17,
    ancestor: { timelineId: 'c'.repeat(32), lsn: 0x1000 },
    startLsn: 0x1000,
    startRecordLsn: 0xff0,
    diskConsistentLsn: 0x5000,
    diskConsistentRecordLsn: 0x4ff0,
    isDeleted,
    layers: layers.map(({ description }) => description),
  };
  return { generation, sequence, timeline, layers };
}

test('names say what they are and back', () => {
  const name = { tenantId: TENANT, timelineId: TIMELINE, generation: 10, sequence: 0x1ff, isDeleted: false };
  assert.equal(indexObjectName(name), `indexes/${TENANT}/${TIMELINE}-0000000a-000001ff`);
  assert.deepEqual(parseIndexName(indexObjectName(name)), name);
  const tombstone = { ...name, isDeleted: true };
  assert.equal(indexObjectName(tombstone), `indexes/${TENANT}/${TIMELINE}-0000000a-000001ff-deleted`);
  assert.deepEqual(parseIndexName(indexObjectName(tombstone)), tombstone);
  const fileName = `${'0'.repeat(36)}-${'f'.repeat(36)}__0000000000001000-0000000000002000.3`;
  const layerName = { tenantId: TENANT, timelineId: TIMELINE, fileName, generation: 7 };
  assert.equal(layerObjectName(layerName), `layers/${TENANT}/${TIMELINE}/${fileName}-00000007`);
  assert.deepEqual(parseLayerName(layerObjectName(layerName)), layerName);
  assert.equal(parseIndexName(layerObjectName(layerName)), undefined);
  assert.equal(parseLayerName(indexObjectName(name)), undefined);
});

test('an index comes back as it was, and a damaged one is refused', () => {
  const written = index(3, 9, [layer(0x2000, 1), layer(0x3000, 3)]);
  const bytes = encodeRemoteIndex(written);
  assert.match(bytes.toString('latin1'), /^strata-remote-index 1 \d+ [0-9a-f]{8}\n\{"generation":3,"sequence":9,/);
  assert.deepEqual(decodeRemoteIndex(bytes, 'x'), written);
  for (let at = 0; at < bytes.length; at += 7) {
    const damaged = Buffer.from(bytes);
    damaged[at]! ^= 0x41;
    assert.throws(() => decodeRemoteIndex(damaged, 'the object'), /index object the object is damaged/);
  }
  assert.throws(() => decodeRemoteIndex(bytes.subarray(0, bytes.length - 1), 'x'), /damaged/);
});

let directory: string;
let store: FileSystemStore;

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), 'strata-remote-'));
  store = await FileSystemStore.open(directory);
});

afterEach(() => rmSync(directory, { recursive: true, force: true }));

async function put(written: RemoteIndex): Promise<void> {
  const { generation, sequence, timeline } = written;
  const name = { tenantId: TENANT, timelineId: TIMELINE, generation, sequence, isDeleted: timeline.isDeleted };
  await store.put(indexObjectName(name), encodeRemoteIndex(written));
}

test('an index whose checksum is right and that says what cannot be is damaged too, whatever it says', () => {
  const written = index(3, 9, [layer(0x2000, 1), layer(0x3000, 3)]);
  const files = [
    { bytes: encodeRemoteIndex(written), decode: (bytes: Buffer) => void decodeRemoteIndex(bytes, 'its name') },
    {
      bytes: encodeTimelineIndex(written.timeline),
      decode: (bytes: Buffer) => void decodeTimelineIndex(bytes, 'its name'),
    },
  ];
  const values = [null, -1, 1e300, '', 'x', '0'.repeat(16), [], {}, [[]], true];
  for (const { bytes, decode } of files) {
    const [head, rest] = bytes.toString('utf8').split('\n') as [string, string];
    fc.assert(
      fc.property(fc.nat(), fc.constantFrom(...values), fc.boolean(), (which, value, isRemoved) => {
        const places: (() => void)[] = [];
        const json = JSON.parse(rest) as Record<string, unknown>;
        const visit = (of: Record<string, unknown>): void => {
          for (const key of Object.keys(of)) {
            places.push(() => {
              if (isRemoved) delete of[key];
              else of[key] = value;
            });
            if (typeof of[key] === 'object' && of[key] !== null) visit(of[key] as Record<string, unknown>);
          }
        };
        visit(json);
        places[which % places.length]!();
        const [magic, version] = head.split(' ') as [string, string];
        try {
          decode(encodeChecked(magic, Number(version), json));
        } catch (error) {
          assert(error instanceof StrataError && error.code === 'internal', String(error));
          assert.match(error.message, /its name is damaged/);
        }
      }),
      { numRuns: 500 },
    );
  }
});

test('the newest index is of the highest generation that counts, and tells what is nobody’s', async () => {
  const old = layer(0x1000, 1);
  const kept = layer(0x2000, 2);
  const made = layer(0x3000, 3);
  const stale = layer(0x4000, 2);
  for (const each of [old, kept, made, stale])
    await store.put(objectNameOf(index(1, 1, []).timeline, each), Buffer.alloc(3));
  await put(index(1, 2, [old]));
  await put(index(2, 0x20, [old, kept, stale]));
  await put(index(3, 1, [kept, made]));
  const all = await listIndexes(store);
  assert.deepEqual([...all.keys()], [TIMELINE]);
  assert.equal(newestIndex(all.get(TIMELINE)!, 2)?.sequence, 0x20);
  const objects = await listTimelineObjects(store, TENANT, TIMELINE);
  const newest = await readIndex(store, newestIndex(objects.indexes)!);
  assert.deepEqual(newest, index(3, 1, [kept, made]));
  const names = orphansOf(objects, newest, { generation: 4, since: 1 }, Date.now()).map(({ name }) => name);
  const expected = [old, stale].map((each) => objectNameOf(newest.timeline, each));
  assert.deepEqual(names.slice(0, 2).sort(), expected.sort());
  assert.equal(names.length, 4);
});

test('what the latest generation has uploaded may still be named, for a day', async () => {
  const early = layer(0x3000, 3);
  await store.put(objectNameOf(index(1, 1, []).timeline, early), Buffer.alloc(3));
  await put(index(2, 1, []));
  const objects = await listTimelineObjects(store, TENANT, TIMELINE);
  const newest = await readIndex(store, newestIndex(objects.indexes)!);
  assert.deepEqual(orphansOf(objects, newest, { generation: 3, since: 1 }, Date.now()), []);
  assert.equal(orphansOf(objects, newest, { generation: 3, since: 1 }, Date.now() + ORPHAN_AGE_MS + 60_000).length, 1);
  assert.equal(orphansOf(objects, newest, { generation: 4, since: 1 }, Date.now()).length, 1);
  // A timeline without any index is one whose making did not end.
  assert.equal(orphansOf({ ...objects, indexes: [] }, undefined, { generation: 4, since: 1 }, Date.now()).length, 1);
});

test('a tombstone stays for a week, after everything else', async () => {
  await store.put(objectNameOf(index(1, 1, []).timeline, layer(0x1000, 1)), Buffer.alloc(3));
  await put(index(1, 1, [layer(0x1000, 1)]));
  await put(index(1, 2, [], true));
  let objects = await listTimelineObjects(store, TENANT, TIMELINE);
  const newest = await readIndex(store, newestIndex(objects.indexes)!);
  assert(newest.timeline.isDeleted);
  const late = Date.now() + TOMBSTONE_AGE_MS + 60_000;
  const orphans = orphansOf(objects, newest, { generation: 2, since: 1 }, late);
  assert.equal(orphans.length, 2);
  await store.deleteMany(orphans.map(({ name }) => name));
  objects = await listTimelineObjects(store, TENANT, TIMELINE);
  assert.deepEqual(orphansOf(objects, newest, { generation: 2, since: 1 }, Date.now()), []);
  assert.equal(orphansOf(objects, newest, { generation: 2, since: 1 }, late).length, 1);
});
