import assert from 'node:assert/strict';
import { test } from 'node:test';

import { pageInit, pageLsn, setPageLsn } from '../../postgres/page.ts';
import {
  DERIVED,
  HEAP_BLOCKS_PER_VISIBILITY_PAGE,
  MULTIXACT_MEMBERS_PER_PAGE,
  TRANSACTIONS_PER_CLOG_PAGE,
  TRANSACTION_ABORTED,
  TRANSACTION_COMMITTED,
  VISIBILITYMAP_ALL_FROZEN,
  VISIBILITYMAP_VALID_BITS,
  applyDerived,
  clearVisibilityChanges,
  commitTimestampChanges,
  multixactMemberChanges,
  multixactOffsetChanges,
  transactionStatusChanges,
  truncateFreeSpace,
  truncateVisibility,
} from './derived.ts';
import type { DerivedChange } from './derived.ts';

function fullMap(): Buffer {
  const page = Buffer.alloc(8192);
  pageInit(page, 0);
  setPageLsn(page, 0x1234);
  page.fill(0xff, 24);
  return page;
}

function apply(page: Buffer, change: DerivedChange | undefined): Buffer {
  assert(change !== undefined);
  applyDerived(page, change.subtype, change.payload);
  return page;
}

test('clearing visibility touches exactly the bits named and not the LSN', () => {
  const [change, ...more] = clearVisibilityChanges([
    { heapBlock: 5, flags: VISIBILITYMAP_VALID_BITS },
    { heapBlock: 6, flags: VISIBILITYMAP_ALL_FROZEN },
  ]);
  assert.deepEqual(more, []);
  const page = apply(fullMap(), change);
  // Byte 1 holds heap blocks 4 to 7: 5 has bits 2 and 3, 6 has bits 4 (visible) and 5 (frozen).
  assert.equal(page[25], 0b1101_0011);
  assert.equal(page[24], 0xff);
  assert.equal(page[26], 0xff);
  assert.equal(pageLsn(page), 0x1234);
});

test('visibility cleared on two map pages is two changes, each of its own page', () => {
  const changes = clearVisibilityChanges([
    { heapBlock: 0, flags: VISIBILITYMAP_VALID_BITS },
    { heapBlock: HEAP_BLOCKS_PER_VISIBILITY_PAGE, flags: VISIBILITYMAP_VALID_BITS },
  ]);
  assert.deepEqual(
    changes.map((change) => change.page),
    [0, 1],
  );
  for (const change of changes) assert.equal(apply(fullMap(), change)[24], 0b1111_1100);
});

test('a map page that was never written becomes an empty page', () => {
  const [change] = clearVisibilityChanges([{ heapBlock: 3, flags: VISIBILITYMAP_VALID_BITS }]);
  const expected = Buffer.alloc(8192);
  pageInit(expected, 0);
  assert.deepEqual(apply(Buffer.alloc(8192), change), expected);
});

test('truncating a heap zeroes the bits after its end', () => {
  const { mapBlocks, change } = truncateVisibility(6);
  assert.equal(mapBlocks, 1);
  const page = apply(fullMap(), change);
  assert.equal(page[24], 0xff);
  assert.equal(page[25], 0b0000_1111);
  assert(page.subarray(26).every((byte) => byte === 0));
  assert.deepEqual(truncateVisibility(HEAP_BLOCKS_PER_VISIBILITY_PAGE), { mapBlocks: 1, change: undefined });
  assert.deepEqual(truncateVisibility(0), { mapBlocks: 0, change: undefined });
});

test('truncating a heap zeroes its slots of the free space map and what the upper nodes say of them', () => {
  const page = Buffer.alloc(8192);
  pageInit(page, 0);
  const leaf = (slot: number): number => 28 + 4095 + slot;
  page[leaf(0)] = 10;
  page[leaf(1)] = 200;
  // The path from slot 1 up to the root, as in an array that holds a binary tree.
  for (let node = 4095; node > 0;) {
    node = (node - 1) >> 1;
    page[28 + node] = 200;
  }
  const { mapBlocks, change } = truncateFreeSpace(1);
  assert.equal(mapBlocks, 3);
  assert.equal(change?.page, 2);
  apply(page, change);
  assert.equal(page[leaf(0)], 10);
  assert.equal(page[leaf(1)], 0);
  assert.equal(page[28], 10);
});

test('transaction statuses are set two bits each, on the page of each xid', () => {
  const next = TRANSACTIONS_PER_CLOG_PAGE;
  const changes = transactionStatusChanges(TRANSACTION_COMMITTED, [4, 5, next - 1, next]);
  assert.deepEqual(
    changes.map((change) => change.page),
    [0, 1],
  );
  const page = apply(Buffer.alloc(8192), changes[0]);
  assert.equal(page[1], 0b0101);
  assert.equal(page[8191], 0b0100_0000);
  apply(page, transactionStatusChanges(TRANSACTION_ABORTED, [5])[0]);
  assert.equal(page[1], 0b1001);
});

test('a multixact sets its own offset and that of the next, also across pages and the wrap of either', () => {
  const [change] = multixactOffsetChanges(7, 100, 3);
  const page = apply(Buffer.alloc(8192), change);
  assert.equal(page.readUInt32LE(28), 100);
  assert.equal(page.readUInt32LE(32), 103);
  assert.deepEqual(
    multixactOffsetChanges(2047, 1, 2).map((each) => each.page),
    [0, 1],
  );
  const [last, first] = multixactOffsetChanges(0xffffffff, 0xfffffffe, 2);
  assert.equal(last?.page, 2 ** 32 / 2048 - 1);
  assert.equal(first?.page, 0);
  // Offset 0 is skipped, and the multixact after the last is 1.
  assert.equal(apply(Buffer.alloc(8192), first).readUInt32LE(4), 1);
});

test('members of a multixact stand in groups of four with their flags before them', () => {
  const members = [
    { xid: 1000, status: 0 },
    { xid: 1001, status: 4 },
    { xid: 1002, status: 5 },
  ];
  const [change] = multixactMemberChanges(3, members);
  const page = apply(Buffer.alloc(8192), change);
  assert.deepEqual([...page.subarray(0, 4)], [0, 0, 0, 0]);
  assert.equal(page.readUInt32LE(16), 1000);
  assert.deepEqual([...page.subarray(20, 24)], [4, 5, 0, 0]);
  assert.equal(page.readUInt32LE(24), 1001);
  assert.equal(page.readUInt32LE(28), 1002);
  const split = multixactMemberChanges(MULTIXACT_MEMBERS_PER_PAGE - 1, members);
  assert.deepEqual(
    split.map((each) => each.page),
    [0, 1],
  );
  assert.equal(apply(Buffer.alloc(8192), split[1]).readUInt32LE(4), 1001);
});

test('commit timestamps stand in entries of ten bytes', () => {
  const [change] = commitTimestampChanges(-5, 9, [2, 3]);
  const page = apply(Buffer.alloc(8192), change);
  assert.equal(page.readBigInt64LE(20), -5n);
  assert.equal(page.readUInt16LE(28), 9);
  assert.equal(page.readBigInt64LE(30), -5n);
});

test('a change of a kind that is not known is refused', () => {
  assert.throws(() => applyDerived(Buffer.alloc(8192), 99, Buffer.alloc(4)), /unknown subtype 99/);
  assert.throws(() => applyDerived(Buffer.alloc(8192), DERIVED.truncateVisibility, Buffer.alloc(2)), RangeError);
});
