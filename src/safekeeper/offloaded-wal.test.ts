import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { FileSystemStore } from '../object-store/file-system-store.ts';
import type { ObjectStore } from '../object-store/object-store.ts';
import { offloadedName } from './offloaded-segment.ts';
import { OffloadedWal } from './offloaded-wal.ts';

const id = (n: number): string => n.toString(16).padStart(32, '0');

test('the timelines that have WAL in the store are found by few lists, however many objects each has', async (context) => {
  const directory = await mkdtemp(join(tmpdir(), 'strata-offloaded-'));
  context.after(() => rm(directory, { recursive: true }));
  const store = await FileSystemStore.open(directory);
  const SEGMENT = 0x1000000;
  for (const [tenant, timeline, segments] of [
    [1, 1, 5],
    [1, 2, 1],
    [1, 3, 9],
    [2, 4, 1],
    [2, 5, 3],
  ] as const) {
    for (let n = 1; n <= segments; n++) {
      const name = { tenantId: id(tenant), timelineId: id(timeline), fromLsn: n * SEGMENT, endLsn: (n + 1) * SEGMENT };
      await store.put(offloadedName(name), Buffer.from('WAL'));
    }
  }
  await store.put('waltz', Buffer.from('something else'));
  let lists = 0;
  const paged = Object.assign(Object.create(store) as ObjectStore, {
    list: (prefix: string, options: object) => (lists++, store.list(prefix, { ...options, limit: 4 })),
  });
  const found = await new OffloadedWal(paged).timelineIds();
  assert.deepEqual([...found], [1, 2, 3, 4, 5].map(id));
  assert.equal(lists, 3);
});
