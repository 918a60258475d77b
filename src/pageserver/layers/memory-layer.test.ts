import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { ALL_KEYS, KEY_KIND, compareKeys, formatKey, makeKey, prefixRange } from '../key.ts';
import type { Key } from '../key.ts';
import { encodeDerived, encodeImage, needsNoPrior } from '../value.ts';
import { Chain } from './chain.ts';
import { HOT_CHANGES, HOT_CHANGES_MAX, MemoryLayer } from './memory-layer.ts';

const PAGE = makeKey(KEY_KIND.relationBlock, 1663, 5, 16384, 0, 3);

const keys = fc.record({
  kind: fc.constantFrom(KEY_KIND.relationSize, KEY_KIND.relationBlock, KEY_KIND.walIndex),
  spc: fc.constantFrom(0, 1663),
  db: fc.constantFrom(1, 5),
  rel: fc.oneof(fc.nat(3), fc.constantFrom(16384, 0xffffffff)),
  fork: fc.nat(3),
  blk: fc.oneof(fc.nat(5), fc.nat(), fc.constant(0xffffffff)),
});

interface Put {
  readonly key: Key;
  readonly lsn: number;
  readonly value: Buffer;
}

test('it holds what was put and not discarded, by key and LSN', () => {
  const operations = fc.array(
    fc.oneof(
      { weight: 8, arbitrary: fc.record({ key: keys, isBase: fc.boolean(), bytes: fc.nat(40), further: fc.nat(2) }) },
      { weight: 1, arbitrary: fc.constant('discard' as const) },
      { weight: 3, arbitrary: fc.constant('advance' as const) },
    ),
    { maxLength: 300 },
  );
  fc.assert(
    fc.property(operations, fc.infiniteStream(keys), (all, others) => {
      const layer = new MemoryLayer(100, 0);
      let model: Put[] = [];
      let lsn = 100;
      let visibleLsn = 100;
      for (const operation of all) {
        if (operation === 'advance') visibleLsn = lsn;
        else if (operation === 'discard') {
          layer.discardAbove(visibleLsn);
          model = model.filter((put) => put.lsn <= visibleLsn);
          lsn = visibleLsn;
        } else {
          lsn += operation.further;
          const payload = Buffer.alloc(operation.bytes, model.length);
          const value = operation.isBase ? encodeImage(payload) : encodeDerived(1, payload);
          const before = layer.sizeBytes;
          assert.equal(layer.put(operation.key, lsn, value), layer.sizeBytes - before);
          model.push({ key: operation.key, lsn, value });
        }
      }
      const distinct = new Map(model.map((put) => [formatKey(put.key), put.key]));
      const sorted = [...distinct.values()].sort(compareKeys);
      const listed: { key: Key; count: number }[] = [];
      for (const each of layer.inOrder()) {
        if (each !== undefined) listed.push({ key: each.key, count: each.end - each.start });
      }
      const expected = sorted.map((key) => ({
        key: { ...key },
        count: model.filter((put) => compareKeys(put.key, key) === 0).length,
      }));
      assert.deepEqual(listed, expected);
      assert.equal(layer.isEmpty, model.length === 0);
      for (const range of [ALL_KEYS, prefixRange(KEY_KIND.relationBlock, 1663, 5)]) {
        const visited: Key[] = [];
        layer.forEachKey(range, (key) => visited.push(key));
        const inRange = sorted.filter((key) => compareKeys(key, range.start) >= 0 && compareKeys(key, range.end) < 0);
        assert.deepEqual(
          visited,
          inRange.map((key) => ({ ...key })),
        );
      }
      for (const key of [...sorted, others.next().value!]) {
        for (const [at, floor] of [[lsn, 0] as const, [visibleLsn, 101] as const]) {
          const chain = new Chain();
          const isOver = layer.collect(key, at, floor, chain);
          const values = modelValues(model, key, at, floor);
          assert.deepEqual(chain.values.map(String), values.found.map(String));
          assert.equal(isOver, values.isOver);
        }
      }
    }),
  );
});

function modelValues(
  model: readonly Put[],
  key: Key,
  lsn: number,
  floor: number,
): { found: Buffer[]; isOver: boolean } {
  const found: Buffer[] = [];
  for (const put of model.filter((each) => each.lsn <= lsn && compareKeys(each.key, key) === 0).reverse()) {
    if (put.lsn <= floor) return { found, isOver: true };
    found.push(put.value);
    if (needsNoPrior(put.value[0]!)) return { found, isOver: true };
  }
  return { found, isOver: false };
}

test('an image is due after many changes in a row that are as large as it, or after more of any size', () => {
  const layer = new MemoryLayer(100, 0);
  const put = (key: Key, count: number, bytes: number): void => {
    for (let i = 0; i < count; i++) layer.put(key, 200, encodeDerived(1, Buffer.alloc(bytes)));
  };
  put(PAGE, HOT_CHANGES - 1, 100);
  assert.deepEqual(layer.takeHot(), []);
  put(PAGE, 1, 100);
  assert.deepEqual(layer.takeHot(), [PAGE]);
  assert.deepEqual(layer.takeHot(), []);
  layer.put(PAGE, 200, encodeImage(Buffer.alloc(8192)));
  put(PAGE, HOT_CHANGES_MAX - 1, 5);
  assert.deepEqual(layer.takeHot(), []);
  put(PAGE, 1, 5);
  assert.deepEqual(layer.takeHot(), [PAGE]);
  put(makeKey(KEY_KIND.walIndex, 0, 0, 0, 0, 0), HOT_CHANGES_MAX * 2, 100);
  assert.deepEqual(layer.takeHot(), [], 'only pages are made by replaying');
});
