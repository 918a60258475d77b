import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { test } from 'node:test';
import fc from 'fast-check';
import {
  itemFlags,
  itemId,
  itemLength,
  itemOffset,
  LP_DEAD,
  LP_NORMAL,
  LP_REDIRECT,
  LP_UNUSED,
  makeItemId,
  MAX_HEAP_TUPLES_PER_PAGE,
  PAI_IS_HEAP,
  PAI_OVERWRITE,
  PD_HAS_FREE_LINES,
  PageError,
  pageAddItem,
  pageFlags,
  pageGetHeapFreeSpace,
  pageIndexMultiDelete,
  pageIndexTupleDelete,
  pageIndexTupleDeleteNoCompact,
  pageIndexTupleOverwrite,
  pageInit,
  pageIsNew,
  pageItem,
  pageLower,
  pageLsn,
  pageMaxOffset,
  pagePruneXid,
  pageRepairFragmentation,
  pageSpecial,
  pageTruncateLinePointerArray,
  pageUpper,
  setItemDead,
  setItemRedirect,
  setItemUnused,
  setPageLsn,
  setPagePrunable,
  setPageUpper,
  xidPrecedes,
} from './page.ts';
import { applyPageOperation, randomPageOperations } from './page-operations.test-data.ts';

const PINNED: readonly { seed: number; kind: 'heap' | 'index'; sha256: string }[] = [
  { seed: 1, kind: 'heap', sha256: '6ba98f67b600f02a038e7c5529c5b23ecb49d1b09856e3f267b38539d7ff6c2a' },
  { seed: 1, kind: 'index', sha256: '29599e44e7a77b7301821e44b6e6cec3546b6080f210bf4de8f6889c81df291e' },
  { seed: 2, kind: 'heap', sha256: '3ed91960aa003d43f86f9a40bc37b8fc1f728b0a3741aa38b194b8940ecbcec1' },
  { seed: 2, kind: 'index', sha256: '0407f9810baeaa01e7cb9fd1720a3d7ab5fed12dbb2c4f5c95a41c1f74a92da1' },
  { seed: 3, kind: 'heap', sha256: '24a9dc8db12f26fc8440224f59c0c0e21b2c3fe1bfe92510b43eddd4d5d8ac89' },
  { seed: 3, kind: 'index', sha256: '259c76aef5c2894e2a2ecb2682b77eeca803da2dbb65c47d3adb28c8dac7acee' },
];

test('an empty page has the header that Postgres writes', () => {
  const page = Buffer.alloc(8192, 0xff);
  pageInit(page, 16);
  assert.equal(page.subarray(0, 24).toString('hex'), '000000000000000000000000' + '1800f01ff01f042000000000');
  assert.ok(page.subarray(24).every((byte) => byte === 0));
  assert.ok(!pageIsNew(page));
  assert.ok(pageIsNew(Buffer.alloc(8192)));
});

test("a page's LSN is stored high half first", () => {
  const page = Buffer.alloc(8192);
  setPageLsn(page, 0x1_2345_6789);
  assert.equal(page.subarray(0, 8).toString('hex'), '0100000089674523');
  assert.equal(pageLsn(page), 0x1_2345_6789);
});

test('a line pointer packs offset, flags and length', () => {
  const page = Buffer.alloc(8192);
  pageInit(page, 0);
  pageAddItem(page, Buffer.alloc(61, 1), 0, 0);
  assert.equal(itemId(page, 1), makeItemId(8128, LP_NORMAL, 61));
  assert.deepEqual([itemOffset(page, 1), itemFlags(page, 1), itemLength(page, 1)], [8128, LP_NORMAL, 61]);
  setItemRedirect(page, 1, 7);
  assert.deepEqual([itemOffset(page, 1), itemFlags(page, 1), itemLength(page, 1)], [7, LP_REDIRECT, 0]);
  setItemDead(page, 1);
  assert.deepEqual([itemOffset(page, 1), itemFlags(page, 1), itemLength(page, 1)], [0, LP_DEAD, 0]);
});

test('an item takes the first free line pointer only where the hint says that there is one', () => {
  const page = Buffer.alloc(8192);
  pageInit(page, 0);
  for (let i = 0; i < 3; i++) assert.equal(pageAddItem(page, Buffer.alloc(40, i), 0, PAI_IS_HEAP), i + 1);
  setItemUnused(page, 2);
  assert.equal(pageAddItem(page, Buffer.alloc(8), 0, PAI_IS_HEAP), 4);
  pageRepairFragmentation(page);
  assert.equal(pageFlags(page) & PD_HAS_FREE_LINES, PD_HAS_FREE_LINES);
  assert.equal(pageAddItem(page, Buffer.alloc(8), 0, PAI_IS_HEAP), 2);
  assert.equal(pageAddItem(page, Buffer.alloc(8), 0, PAI_IS_HEAP), 5);
  assert.equal(pageFlags(page) & PD_HAS_FREE_LINES, 0, 'the hint was wrong and is gone');
});

test('overwriting refuses a used line pointer, inserting moves the others up', () => {
  const page = Buffer.alloc(8192);
  pageInit(page, 16);
  for (let i = 1; i <= 3; i++) pageAddItem(page, Buffer.alloc(8, i), 0, 0);
  assert.equal(pageAddItem(page, Buffer.alloc(8, 9), 2, PAI_OVERWRITE), 0);
  assert.equal(pageAddItem(page, Buffer.alloc(8, 9), 5, 0), 0);
  assert.equal(pageAddItem(page, Buffer.alloc(8, 9), 2, 0), 2);
  assert.deepEqual(
    [1, 2, 3, 4].map((offset) => pageItem(page, offset)[0]),
    [1, 9, 2, 3],
  );
});

test('a heap page never has more than 291 line pointers', () => {
  const page = Buffer.alloc(8192);
  pageInit(page, 0);
  for (let i = 1; i <= MAX_HEAP_TUPLES_PER_PAGE; i++)
    assert.equal(pageAddItem(page, Buffer.alloc(1), 0, PAI_IS_HEAP), i);
  assert.equal(pageAddItem(page, Buffer.alloc(1), 0, PAI_IS_HEAP), 0);
  assert.equal(pageGetHeapFreeSpace(page), 0);
  assert.notEqual(pageAddItem(page, Buffer.alloc(1), 0, 0), 0);
});

test('the oldest prunable xid stays, in the order of xids that wraps around', () => {
  const page = Buffer.alloc(8192);
  setPagePrunable(page, 100);
  setPagePrunable(page, 200);
  assert.equal(pagePruneXid(page), 100);
  setPagePrunable(page, 0xfffffff0);
  assert.equal(pagePruneXid(page), 0xfffffff0);
  assert.ok(
    xidPrecedes(2, 3) && xidPrecedes(2, 0xfffffff0) && !xidPrecedes(3, 0xfffffff0) && xidPrecedes(0xfffffff0, 3),
  );
});

test('a page that contradicts itself is refused and left as it was', () => {
  const page = Buffer.alloc(8192);
  pageInit(page, 0);
  for (let i = 0; i < 5; i++) pageAddItem(page, Buffer.alloc(24, i), 0, 0);
  setPageUpper(page, pageLower(page) - 4);
  const before = Buffer.from(page);
  assert.throws(() => pageAddItem(page, Buffer.alloc(8), 0, 0), PageError);
  assert.throws(() => pageRepairFragmentation(page), PageError);
  assert.throws(() => pageIndexTupleDelete(page, 1), PageError);
  assert.throws(() => pageIndexMultiDelete(page, [1, 2, 3]), PageError);
  assert.throws(() => pageIndexTupleDeleteNoCompact(page, 1), PageError);
  assert.throws(() => pageIndexTupleOverwrite(page, 1, Buffer.alloc(8)), PageError);
  assert.ok(page.equals(before));
});

test('offset numbers to delete must rise and exist', () => {
  const page = Buffer.alloc(8192);
  pageInit(page, 16);
  for (let i = 0; i < 5; i++) pageAddItem(page, Buffer.alloc(24, i), 0, 0);
  assert.throws(() => pageIndexMultiDelete(page, [3, 2, 1]), PageError);
  assert.throws(() => pageIndexMultiDelete(page, [1, 2, 6]), PageError);
  assert.throws(() => pageIndexTupleDelete(page, 6), PageError);
  assert.throws(() => pageIndexTupleDelete(page, 0), PageError);
});

test('random operations leave, byte for byte, the pages that Postgres 17 leaves', () => {
  // The hashes are those of the pages after each operation as bufpage.c, compiled from Postgres 17, makes them.
  for (const { seed, kind, sha256 } of PINNED) {
    const page = Buffer.alloc(8192);
    const hash = createHash('sha256');
    for (const operation of randomPageOperations(seed, kind, page)) {
      const result = applyPageOperation(page, operation);
      hash.update(page).update(Buffer.from([result & 255, (result >> 8) & 255]));
    }
    assert.equal(hash.digest('hex'), sha256, `${kind} page, seed ${seed}`);
  }
});

test('removing items keeps the bytes of all others', () => {
  fc.assert(
    fc.property(
      fc.array(fc.integer({ min: 1, max: 120 }), { minLength: 4, maxLength: 60 }),
      fc.nat(),
      (lengths, pick) => {
        const page = Buffer.alloc(8192);
        pageInit(page, 16);
        lengths.forEach((length, i) => pageAddItem(page, Buffer.alloc(length, i + 1), 0, 0));
        const gone = lengths.map((_, i) => i + 1).filter((offset) => ((pick >>> (offset % 31)) & 1) === 1);
        pageIndexMultiDelete(page, gone);
        const kept = lengths.map((_, i) => i + 1).filter((offset) => !gone.includes(offset));
        assert.equal(pageMaxOffset(page), kept.length);
        kept.forEach((before, i) =>
          assert.ok(pageItem(page, i + 1).equals(Buffer.alloc(lengths[before - 1]!, before))),
        );
        assert.ok(pageUpper(page) <= pageSpecial(page));
      },
    ),
  );
});

test('trailing unused line pointers go, but the first one stays', () => {
  const page = Buffer.alloc(8192);
  pageInit(page, 0);
  for (let i = 0; i < 4; i++) pageAddItem(page, Buffer.alloc(24, i), 0, 0);
  for (let i = 1; i <= 4; i++) setItemUnused(page, i);
  pageTruncateLinePointerArray(page);
  assert.equal(pageMaxOffset(page), 1);
  assert.equal(itemFlags(page, 1), LP_UNUSED);
  assert.equal(pageFlags(page) & PD_HAS_FREE_LINES, PD_HAS_FREE_LINES);
});
