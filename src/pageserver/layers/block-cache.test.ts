import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { BlockCache } from './block-cache.ts';

test('what was given stays as it is until the next recycle, whatever is loaded, and comes again as it was', () => {
  const step = fc.oneof(
    { weight: 10, arbitrary: fc.record({ key: fc.nat(40), length: fc.constantFrom(10, 2000, 2048, 5000, 9000) }) },
    { weight: 2, arbitrary: fc.constantFrom('recycle' as const, 'recycle for a scan' as const) },
    { weight: 1, arbitrary: fc.constant('fail' as const) },
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 300 }), (steps) => {
      const cache = new BlockCache(30_000);
      const lengths = new Map<number, number>();
      let given: { key: number; block: Buffer }[] = [];
      for (const taken of steps) {
        if (taken === 'recycle' || taken === 'recycle for a scan') {
          for (const { key, block } of given) assert(block.equals(Buffer.alloc(lengths.get(key)!, key)));
          given = [];
          cache.recycle(taken === 'recycle for a scan');
        } else if (taken === 'fail') {
          const fail = (): never => {
            throw new Error('damaged');
          };
          assert.throws(() => cache.load(99, (memory) => (memory(2000).fill(99), fail())), /damaged/);
          assert.equal(cache.get(99), undefined);
        } else {
          const length = lengths.get(taken.key) ?? taken.length;
          lengths.set(taken.key, length);
          const block =
            cache.get(taken.key) ??
            cache.load(taken.key, (memory) =>
              memory(length + 1)
                .fill(taken.key)
                .subarray(0, length),
            );
          given.push({ key: taken.key, block });
        }
      }
      for (const { key, block } of given) assert(block.equals(Buffer.alloc(lengths.get(key)!, key)));
    }),
  );
});

test('memory is used again: however many blocks are loaded, they take no more than the bound', () => {
  const cache = new BlockCache(64 * 1024);
  const memories = new Set<ArrayBufferLike>();
  for (let key = 0; key < 2000; key++) {
    cache.recycle(key >= 1000);
    const sizeBytes = key % 1000 < 500 ? 8000 : 16_000;
    memories.add(cache.load(key, (memory) => memory(sizeBytes)).buffer);
  }
  const bytes = [...memories].reduce((sum, memory) => sum + memory.byteLength, 0);
  // Each half of each part of the cache ends with the block that passes its bound.
  assert(bytes <= 2 * 64 * 1024 + 4 * (8192 + 16_384), `${bytes} bytes for two bounds of 64 KiB`);
});

test('a scan, however long, leaves in the cache what others have read', () => {
  const cache = new BlockCache(256 * 1024);
  const load = (key: number): Buffer => cache.load(key, (memory) => memory(8000).fill(key));
  for (let key = 0; key < 10; key++) load(key);
  for (let key = 100; key < 1000; key++) {
    cache.recycle(true);
    load(key);
    assert(cache.get(key - 1) !== undefined || key === 100, 'what the scan has just read is there');
  }
  cache.recycle();
  for (let key = 0; key < 10; key++) assert(cache.get(key)?.equals(Buffer.alloc(8000, key)));
  assert.equal(cache.get(100), undefined);
});
