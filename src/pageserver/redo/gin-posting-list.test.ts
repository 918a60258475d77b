import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';

import { compressUncompressedLeaf, decodeList, encodeList, recompressLeaf } from './gin-posting-list.ts';
import { writeItemPointer } from './index-tuple.ts';

const OFFSET_NUMBERS = 2048;
const items = fc
  .uniqueArray(fc.integer({ min: 1, max: 2 ** 43 - 1 }), { minLength: 1, maxLength: 200 })
  .map((all) => all.sort((a, b) => a - b));

test('a posting list has the bytes that Postgres gives it', () => {
  // (0,1), (0,2), (1,1), (300,7): distances 1, 2047, 612358.
  const list = encodeList([1, 2, OFFSET_NUMBERS + 1, 300 * OFFSET_NUMBERS + 7]);
  assert.equal(list.toString('hex'), '000000000100' + '0600' + '01' + 'ff0f' + '86b025');
});

test('posting lists decode to the items that went in, up to the highest block number', () => {
  fc.assert(
    fc.property(items, (all) => {
      const list = encodeList(all);
      assert.equal(list.length % 2, 0);
      assert.deepEqual(decodeList(list, 0), all);
    }),
  );
});

test('actions insert, replace, delete and add to segments, and leave the others alone', () => {
  const segments = [encodeList([10, 20]), encodeList([30, 40]), encodeList([50, 60]), encodeList([70])];
  const area = Buffer.alloc(4096);
  const size = Buffer.concat(segments).copy(area);
  const added = Buffer.alloc(2 + 2 * 6);
  added.writeUInt16LE(2, 0);
  writeItemPointer(added, 0, 35, 2);
  writeItemPointer(added, 0, 40, 8);
  const actions = Buffer.concat([
    Buffer.from([5, 0]),
    Buffer.from([0, 2]),
    encodeList([5]),
    Buffer.from([1, 4]),
    added,
    Buffer.from([2, 1]),
    Buffer.from([3, 3]),
    encodeList([71]),
    Buffer.from([4, 2]),
    encodeList([80]),
  ]);
  const expected = Buffer.concat([[5], [10, 20], [30, 35, 40], [71], [80]].map((list) => encodeList(list)));
  assert.equal(recompressLeaf(area, size, actions, 0), expected.length);
  assert.deepEqual(area.subarray(0, expected.length), expected);
});

test('actions that do not fit the segments are refused', () => {
  const area = Buffer.alloc(64);
  const size = encodeList([10, 20]).copy(area);
  for (const action of [
    [1, 1],
    [1, 3],
    [0, 9],
    [5, 2],
  ]) {
    const actions = Buffer.concat([Buffer.from([1, 0, ...action]), encodeList([1])]);
    assert.equal(recompressLeaf(Buffer.from(area), size, actions, 0), undefined, `action ${action.join()}`);
  }
  const tooLong = Buffer.concat([Buffer.from([1, 0, 1, 2]), encodeList(Array.from({ length: 90 }, (_, i) => i + 1))]);
  assert.equal(recompressLeaf(Buffer.from(area), size, tooLong, 0), undefined);
});

test('a leaf from before 9.4 becomes one posting list', () => {
  const page = Buffer.alloc(8192);
  [3, 9, 2049].forEach((item, i) => writeItemPointer(page, item >> 11, item & 2047, 32 + i * 6));
  assert.equal(compressUncompressedLeaf(page, 32, 3), encodeList([3, 9, 2049]).length);
  assert.deepEqual(decodeList(page, 32), [3, 9, 2049]);
  assert.equal(compressUncompressedLeaf(page, 32, 0), 0);
});
