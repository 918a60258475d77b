import assert from 'node:assert/strict';
import { test } from 'node:test';
import { BLOCK_SIZE, pageChecksum } from './page.ts';
import { computePageChecksum, stampPageChecksum, verifyPageChecksum } from './page-checksum.ts';

/** Bytes of every value, the same for pageinspect: `(i * 7 + 3 + i / 256) % 256`. */
function madePage(): Buffer {
  return Buffer.from(Array.from({ length: BLOCK_SIZE }, (_, i) => (i * 7 + 3 + Math.floor(i / 256)) % 256));
}

test('a page has the checksum that page_checksum of pageinspect gives, as any block', () => {
  assert.equal(computePageChecksum(madePage(), 0), 34_744);
  assert.equal(computePageChecksum(madePage(), 4_000_000_000), 6_669);
});

test('a stamped page is verified, and no other byte nor another place', () => {
  const page = madePage();
  assert.equal(verifyPageChecksum(page, 7), false);
  stampPageChecksum(page, 7);
  assert.equal(pageChecksum(page), computePageChecksum(page, 7));
  assert.ok(verifyPageChecksum(page, 7));
  assert.equal(verifyPageChecksum(page, 8), false);
  for (const at of [0, 8, 24, 4000, BLOCK_SIZE - 1]) {
    page[at]! ^= 1;
    assert.equal(verifyPageChecksum(page, 7), false, `byte ${at}`);
    page[at]! ^= 1;
  }
});

test('a page that was never initialised carries none', () => {
  const page = Buffer.alloc(BLOCK_SIZE);
  stampPageChecksum(page, 0);
  assert.ok(page.equals(Buffer.alloc(BLOCK_SIZE)));
  assert.ok(verifyPageChecksum(page, 0));
});
