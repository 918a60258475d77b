import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { zstdCompressSync, zstdDecompressSync } from 'node:zlib';
import fc from 'fast-check';
import { compressedLengthMax, compressTo, decompress } from './zstd.ts';

const pieces = fc.oneof(
  fc.uint8Array({ maxLength: 3000 }).map((bytes) => Buffer.from(bytes)),
  fc.tuple(fc.nat(255), fc.nat(200_000)).map(([byte, length]) => Buffer.alloc(length, byte)),
  fc.integer({ min: 0, max: 100_000 }).map((length) => randomBytes(length)),
);

test('frames are those of any zstd, both ways, also after frames that are damaged, cut short or longer than was said', () => {
  const steps = fc.array(
    fc.tuple(pieces, fc.constantFrom('right', 'right', 'damaged', 'short', 'longer', 'shorter'), fc.nat()),
    { maxLength: 20 },
  );
  fc.assert(
    fc.property(steps, (all) => {
      for (const [piece, how, at] of all) {
        const before = at % 100;
        const out = Buffer.alloc(before + compressedLengthMax(piece.length), 0xee);
        const frame = out.subarray(before, before + compressTo(piece, out, before));
        assert(out.subarray(0, before).every((byte) => byte === 0xee));
        assert(zstdDecompressSync(frame).equals(piece));
        if (how === 'right') {
          assert(decompress(frame, 0, piece.length).equals(piece));
          assert(decompress(zstdCompressSync(piece), 0, piece.length).equals(piece));
        } else if (how === 'shorter') {
          // The caller compares lengths.
          assert(decompress(frame, 0, piece.length + 10).equals(piece));
        } else {
          const wrong = Buffer.from(frame);
          if (how === 'damaged') wrong[at % wrong.length]! ^= 0xff;
          try {
            decompress(
              how === 'short' ? wrong.subarray(0, at % wrong.length) : wrong,
              0,
              how === 'longer' ? Math.max(0, piece.length - 1 - (at % 100)) : piece.length,
            );
          } catch (error) {
            assert(error instanceof Error);
          }
        }
      }
    }),
    { numRuns: 200 },
  );
});
