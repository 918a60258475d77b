import assert from 'node:assert/strict';
import {
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { crc32 } from 'node:zlib';
import { Random } from '../../test/simulation/random.ts';
import { DiskCache } from './disk-cache.ts';
import type { CachedObject, PinnedFile } from './disk-cache.ts';
import { FaultyStore } from './faulty-store.ts';
import { FileSystemStore } from './file-system-store.ts';
import { ObjectStoreError } from './object-store.ts';
import { rejectsWith } from './object-store.contract.ts';

const SIZE = 1000;

describe('disk cache', () => {
  let directory: string;
  let cacheDirectory: string;
  let store: FaultyStore;
  let cache: DiskCache;
  let objects: CachedObject[];

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-disk-cache-'));
    cacheDirectory = join(directory, 'cache');
    store = new FaultyStore(await FileSystemStore.open(join(directory, 'store')));
    objects = [];
    for (let n = 0; n < 8; n++) {
      const bytes = contentOf(n);
      await store.put(`object-${n}`, bytes);
      objects.push({ name: `object-${n}`, sizeBytes: bytes.length, crc32: crc32(bytes) });
    }
    cache = await openCache(3 * SIZE);
  });
  afterEach(async () => {
    await cache.close();
    rmSync(directory, { recursive: true });
  });

  function contentOf(n: number): Buffer {
    return Buffer.alloc(SIZE, n + 1);
  }

  function openCache(limitBytes: number): Promise<DiskCache> {
    return DiskCache.open({ directory: cacheDirectory, limitBytes, store });
  }

  async function read(n: number): Promise<void> {
    using file = await cache.acquire(objects[n]!);
    assert.ok(contentOf(n).equals(readFileSync(file.path)), `object ${n}`);
  }

  function downloads(): number {
    return store.calls.filter((call) => call.operation === 'getToFile').length;
  }

  function bytesOnDisk(): number {
    const sizes = readdirSync(cacheDirectory).map((file) => statSync(join(cacheDirectory, file)).size);
    return sizes.reduce((sum, size) => sum + size, 0);
  }

  test('what was used the longest time ago makes room for what is new', async () => {
    for (const n of [0, 1, 2, 0, 3]) await read(n);
    assert.deepEqual([0, 1, 2, 3].map((n) => cache.has(objects[n]!.name)), [true, false, true, true]); // prettier-ignore
    assert.equal(downloads(), 4);
    const { hits, misses, evictions, usedBytes, pinnedBytes, fileCount } = cache.statistics;
    assert.deepEqual([hits, misses, evictions, usedBytes, pinnedBytes, fileCount], [1, 4, 1, 3 * SIZE, 0, 3]);
    assert.equal(bytesOnDisk(), 3 * SIZE);
  });

  test('callers at the same time share one download, and one who gives up does not spoil it for the others', async () => {
    store.plan = () => ({ kind: 'slow', delayMs: 30 });
    const controller = new AbortController();
    const impatient = cache.acquire(objects[0]!, { signal: controller.signal });
    const patient = Array.from({ length: 10 }, () => cache.acquire(objects[0]!));
    controller.abort(new Error('no longer wanted'));
    await assert.rejects(impatient, /no longer wanted/);
    for (const file of await Promise.all(patient)) {
      assert.ok(contentOf(0).equals(readFileSync(file.path)));
      file.release();
    }
    assert.equal(downloads(), 1);
    assert.equal(cache.statistics.pinnedBytes, 0);
  });

  test('a download is given up when nobody waits for it any more, and may begin anew at once', async () => {
    store.plan = ({ index }) => (index === 8 ? { kind: 'slow', delayMs: 60_000 } : undefined);
    await assert.rejects(cache.acquire(objects[0]!, { timeoutMs: 20 }), { kind: 'transient', code: 'timeout' });
    await read(0);
    assert.equal(downloads(), 2);
    await waitUntil(() => cache.statistics.usedBytes === SIZE);
    assert.equal(readdirSync(cacheDirectory).length, 1);
  });

  test('files in use stay, and who needs their room waits for it in turn', async () => {
    const pinned = await Promise.all([0, 1, 2].map((n) => cache.acquire(objects[n]!)));
    await assert.rejects(cache.acquire(objects[3]!, { timeoutMs: 20 }), { kind: 'transient', code: 'timeout' });
    const order: number[] = [];
    const waiting = [4, 5].map(async (n) => {
      const file = await cache.acquire(objects[n]!);
      order.push(n);
      return file;
    });
    await sleep(20);
    assert.deepEqual(order, []);
    for (const [n, file] of pinned.entries()) assert.ok(contentOf(n).equals(readFileSync(file.path)));
    pinned[0]!.release();
    pinned[0]!.release(); // twice is once
    await waiting[0];
    assert.deepEqual(order, [4]);
    pinned[1]!.release();
    await waiting[1];
    assert.deepEqual(order, [4, 5]);
    assert.equal(bytesOnDisk(), 3 * SIZE);
    for (const file of [...(await Promise.all(waiting)), pinned[2]!]) file.release();
  });

  test('an object larger than the cache is refused', async () => {
    await rejectsWith(cache.acquire({ name: 'large', sizeBytes: 3 * SIZE + 1, crc32: undefined }), 'rejected');
  });

  test('wrong bytes are never served: they are fetched once more, then refused, and leave nothing', async () => {
    store.plan = ({ index }) => (index === 8 ? { kind: 'truncated', keep: 0.5 } : undefined);
    await read(0);
    assert.equal(downloads(), 2);
    store.plan = () => ({ kind: 'truncated', keep: 0.5 });
    await rejectsWith(cache.acquire(objects[1]!), 'damaged');
    store.plan = () => undefined;
    await rejectsWith(cache.acquire({ ...objects[1]!, crc32: 1 }), 'damaged');
    await rejectsWith(cache.acquire({ ...objects[1]!, sizeBytes: SIZE + 1 }), 'damaged');
    await rejectsWith(cache.acquire({ ...objects[1]!, name: 'absent' }), 'not-found');
    assert.equal(cache.statistics.usedBytes, SIZE);
    assert.equal(bytesOnDisk(), SIZE);
    await read(1);
  });

  test('a file that was found damaged is fetched again, while those who have it keep theirs', async () => {
    const before = await cache.acquire(objects[0]!);
    cache.drop(objects[0]!.name);
    const after = await cache.acquire(objects[0]!);
    assert.notEqual(after.path, before.path);
    assert.ok(contentOf(0).equals(readFileSync(before.path)));
    assert.equal(cache.statistics.usedBytes, 2 * SIZE);
    before.release();
    await waitUntil(() => cache.statistics.usedBytes === SIZE);
    after.release();
    assert.equal(bytesOnDisk(), SIZE);
  });

  test('a file that was just uploaded becomes the cached one without a download', async () => {
    const path = join(directory, 'local');
    writeFileSync(path, contentOf(0));
    await cache.adopt(objects[0]!, path);
    await read(0);
    assert.equal(downloads(), 0);
    writeFileSync(path, contentOf(0));
    await cache.adopt(objects[0]!, path); // has it already
    assert.equal(bytesOnDisk(), SIZE);
    const pinned = await Promise.all([0, 1, 2].map((n) => cache.acquire(objects[n]!)));
    writeFileSync(path, contentOf(3));
    await cache.adopt(objects[3]!, path); // no room: not kept, not waited for
    assert.equal(cache.has(objects[3]!.name), false);
    assert.equal(bytesOnDisk(), 3 * SIZE);
    for (const file of pinned) file.release();
    await assert.rejects(cache.adopt(objects[4]!, path), /ENOENT/);
    assert.equal(cache.statistics.usedBytes, 3 * SIZE);
  });

  test('after a crash what is whole is used, and everything else removed', async () => {
    for (const n of [0, 1, 2]) await read(n);
    const files = readdirSync(cacheDirectory);
    const cut = join(cacheDirectory, files[0]!);
    truncateSync(cut, 10);
    writeFileSync(join(cacheDirectory, `${files[1]}.partial`), 'half');
    writeFileSync(join(cacheDirectory, 'something else'), 'x');
    cache = await openCache(3 * SIZE);
    assert.equal(bytesOnDisk(), 2 * SIZE);
    assert.equal(cache.statistics.usedBytes, 2 * SIZE);
    for (const n of [0, 1, 2]) await read(n);
    assert.equal(downloads(), 4);
  });

  test('a smaller limit after a restart keeps what came last', async () => {
    for (const n of [0, 1, 2]) {
      await read(n);
      const [newest] = readdirSync(cacheDirectory).map((file) => join(cacheDirectory, file)).sort((a, b) => statSync(b).mtimeMs - statSync(a).mtimeMs); // prettier-ignore
      utimesSync(newest!, 1000 + n, 1000 + n);
    }
    cache = await openCache(2 * SIZE);
    assert.equal(bytesOnDisk(), 2 * SIZE);
    assert.equal(cache.statistics.fileCount, 2);
  });

  test('closing ends what is under way', async () => {
    store.plan = () => ({ kind: 'slow', delayMs: 60_000 });
    const waiting = cache.acquire(objects[0]!);
    const isRefused = rejectsWith(waiting, 'rejected');
    await cache.close();
    await isRefused;
    await rejectsWith(cache.acquire(objects[0]!), 'rejected');
    assert.equal(bytesOnDisk(), 0);
  });

  test('random use by many at once: never over the limit, never a wrong byte, nothing left behind', async () => {
    const seed = Number(process.env['DISK_CACHE_SEED'] ?? Math.floor(Math.random() * 2 ** 31));
    const random = new Random(seed);
    store.plan = () => {
      if (random.chance(0.1)) return { kind: 'truncated', keep: random.next() };
      if (random.chance(0.1)) return { kind: 'error', errorKind: 'transient' };
      return random.chance(0.4) ? { kind: 'slow', delayMs: random.between(1, 4) } : undefined;
    };
    let maxBytes = 0;
    const work = async (): Promise<void> => {
      for (let step = 0; step < 60; step++) {
        const n = random.between(0, 7);
        if (random.chance(0.05)) cache.drop(objects[n]!.name);
        if (random.chance(0.05)) {
          const path = join(directory, `local-${random.next()}`);
          writeFileSync(path, contentOf(n));
          await cache.adopt(objects[n]!, path);
        }
        let file: PinnedFile;
        try {
          const options = random.chance(0.1) ? { timeoutMs: random.between(1, 3) } : { timeoutMs: 20_000 };
          file = await cache.acquire(objects[n]!, options);
        } catch (error) {
          assert.ok(error instanceof ObjectStoreError && ['transient', 'damaged'].includes(error.kind), String(error));
          continue;
        }
        if (random.chance(0.5)) await sleep(random.between(0, 3));
        assert.ok(contentOf(n).equals(readFileSync(file.path)), `object ${n}, seed ${seed}`);
        maxBytes = Math.max(maxBytes, bytesOnDisk());
        assert.ok(cache.statistics.usedBytes <= 3 * SIZE, `seed ${seed}`);
        file.release();
      }
    };
    await Promise.all(Array.from({ length: 6 }, work));
    await cache.close();
    const { usedBytes, pinnedBytes, fileCount } = cache.statistics;
    assert.ok(maxBytes <= 3 * SIZE, `${maxBytes} bytes on disk, seed ${seed}`);
    assert.deepEqual([pinnedBytes, usedBytes, bytesOnDisk()], [0, fileCount * SIZE, fileCount * SIZE], `seed ${seed}`);
    assert.deepEqual(readdirSync(directory).sort(), ['cache', 'store']);
  });
});

async function waitUntil(isTrue: () => boolean): Promise<void> {
  for (const deadline = Date.now() + 5000; !isTrue(); await sleep(2)) {
    assert.ok(Date.now() < deadline, 'not within 5 s');
  }
}
