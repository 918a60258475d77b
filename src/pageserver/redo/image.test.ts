import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';

import { ImageError, lz4Decompress, pglzDecompress } from './image.ts';

test('pglz literals and matches that overlap themselves are decoded', () => {
  // Control byte 0b10: a literal, then a match one byte back of 3 + 15 + 10 bytes.
  const target = Buffer.alloc(29);
  pglzDecompress(Buffer.from([0b10, 0x61, 0x0f, 0x01, 10]), target);
  assert.equal(target.toString(), 'a'.repeat(29));
});

test('lz4 sequences with long lengths are decoded', () => {
  // One literal, a match of 4 + 15 + 3 bytes one byte back, then two literals.
  const target = Buffer.alloc(25);
  lz4Decompress(Buffer.from([0x1f, 0x61, 0x01, 0x00, 3, 0x20, 0x62, 0x63]), target);
  assert.equal(target.toString(), `${'a'.repeat(23)}bc`);
});

test('an image that gives too few or too many bytes is refused', () => {
  assert.throws(() => pglzDecompress(Buffer.from([0, 0x61]), Buffer.alloc(2)), ImageError);
  assert.throws(() => pglzDecompress(Buffer.from([0, 0x61, 0x62]), Buffer.alloc(1)), ImageError);
  assert.throws(() => lz4Decompress(Buffer.from([0x10, 0x61]), Buffer.alloc(2)), ImageError);
  assert.throws(() => lz4Decompress(Buffer.from([0x20, 0x61, 0x62]), Buffer.alloc(1)), ImageError);
});

test('any bytes are decoded or refused, never read or written past their end', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 300 }), fc.nat(400), (bytes, size) => {
      for (const decompress of [pglzDecompress, lz4Decompress]) {
        try {
          decompress(Buffer.from(bytes), Buffer.alloc(size));
        } catch (error) {
          assert(error instanceof ImageError, String(error));
        }
      }
    }),
    { numRuns: 3000 },
  );
});
