import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import {
  advanceLsn,
  formatLsn,
  lsnFromHex,
  lsnToHex,
  maxAlign,
  pageHeaderSize,
  pageOffset,
  pageStart,
  parseLsn,
  parseWalFileName,
  readLsn,
  segmentNumber,
  segmentOffset,
  segmentStart,
  skipPageHeader,
  walFileName,
  withoutPageHeader,
  writeLsn,
} from './lsn.ts';

const anyLsn = fc.maxSafeNat();

test('an LSN is printed and parsed as pg_lsn does', () => {
  assert.equal(formatLsn(0), '0/0');
  assert.equal(formatLsn(0x1_6b37_4d48), '1/6B374D48');
  assert.equal(formatLsn(0xff_0000_000a), 'FF/A');
  assert.equal(parseLsn('1/6b374d48'), 0x1_6b37_4d48);
  fc.assert(fc.property(anyLsn, (lsn) => parseLsn(formatLsn(lsn)) === lsn && lsnFromHex(lsnToHex(lsn)) === lsn));
});

test('what is no LSN is refused by name', () => {
  for (const text of ['', '0', '/', '1/', '/1', '0/123456789', 'g/0', '0/0 ', ' 0/0', '-1/0', '0/0/0', 'FFFFFFFF/0']) {
    assert.throws(
      () => parseLsn(text),
      (error) => error instanceof RangeError && error.message.includes(JSON.stringify(text)),
    );
  }
  for (const text of ['', '1/0', '000000000000000', '00000000000000000', 'FFFFFFFFFFFFFFFF'])
    assert.throws(() => lsnFromHex(text), RangeError);
});

test('the arithmetic of pages and segments is exact above 32 bits', () => {
  fc.assert(
    fc.property(anyLsn, (lsn) => {
      assert.equal(pageOffset(lsn), lsn % 8192);
      assert.equal(pageStart(lsn), lsn - (lsn % 8192));
      assert.equal(segmentOffset(lsn), lsn % 2 ** 24);
      assert.equal(segmentStart(lsn) + segmentOffset(lsn), lsn);
      assert.equal(segmentNumber(lsn), Math.floor(lsn / 2 ** 24));
      assert.equal(maxAlign(lsn - (lsn % 8)), lsn - (lsn % 8));
      const bytes = Buffer.alloc(8);
      writeLsn(bytes, lsn, 0);
      assert.equal(readLsn(bytes, 0), lsn);
      assert.equal(bytes.readBigUInt64LE(0), BigInt(lsn));
    }),
  );
  assert.equal(maxAlign(2 ** 40 + 1), 2 ** 40 + 8);
  assert.deepEqual([0, 1, 7, 8, 9].map(maxAlign), [0, 8, 8, 8, 16]);
});

test('a segment file is named by timeline, high 32 bits and segment', () => {
  assert.equal(walFileName(1, parseLsn('0/1A6C54C0')), '00000001000000000000001A');
  assert.equal(walFileName(1, parseLsn('1/FF000000')), '0000000100000001000000FF');
  assert.deepEqual(parseWalFileName('0000000100000001000000FF'), { tli: 1, startLsn: parseLsn('1/FF000000') });
  assert.equal(parseWalFileName('000000010000000100000100'), undefined);
  assert.equal(parseWalFileName('00000001000000010000000F.partial'), undefined);
  fc.assert(fc.property(anyLsn, (lsn) => parseWalFileName(walFileName(1, lsn))?.startLsn === segmentStart(lsn)));
});

test('page headers are counted when bytes are laid out', () => {
  assert.equal(pageHeaderSize(0), 40);
  assert.equal(pageHeaderSize(2 ** 24 + 8191), 40);
  assert.equal(pageHeaderSize(2 ** 24 + 8192), 24);
  assert.equal(skipPageHeader(2 ** 24), 2 ** 24 + 40);
  assert.equal(skipPageHeader(2 ** 24 + 8192), 2 ** 24 + 8192 + 24);
  assert.equal(skipPageHeader(2 ** 24 + 8), 2 ** 24 + 8);
  assert.equal(advanceLsn(2 ** 24, 10), 2 ** 24 + 50);
  assert.equal(advanceLsn(2 ** 24, 8152), 2 ** 24 + 8192, 'an end on a page boundary stays there');
  assert.equal(advanceLsn(2 ** 24, 8153), 2 ** 24 + 8192 + 25);
  assert.equal(advanceLsn(2 ** 24 - 1, 2), 2 ** 24 + 41);
  assert.equal(advanceLsn(100, 0), 100);
});

test('an insert position after a page’s header is the end of what is on the page before', () => {
  assert.equal(withoutPageHeader(0x200_0000 + 40), 0x200_0000);
  assert.equal(withoutPageHeader(0x200_0000 + 24), 0x200_0000 + 24, 'within the long header');
  assert.equal(withoutPageHeader(0x200_2000 + 24), 0x200_2000);
  for (const lsn of [0x200_2000, 0x200_2000 + 40, 0x200_2000 + 8184]) assert.equal(withoutPageHeader(lsn), lsn);
});
