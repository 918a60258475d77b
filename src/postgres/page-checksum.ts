/**
 * The checksum of a page in a cluster with data checksums (pg_checksum_page in src/include/storage/checksum_impl.h; the same in 15, 16, 17
 * and 18): 32 FNV-1a hashes side by side over the page's words, folded, mixed with the block number. It is kept in the page's own header, where
 * it counts as 0. Pages that were never initialised (upper 0) carry none.
 */

import { pageChecksum, pageUpper, setPageChecksum } from './page.ts';
import { BLOCK_SIZE } from './page-size.ts';

const FNV_PRIME = 16_777_619;
const LANES = 32;
const WORDS = BLOCK_SIZE / 4;

const BASE_OFFSETS = new Int32Array([
  0x5b1f36e9, 0xb8525960, 0x02ab50aa, 0x1de66d2a, 0x79ff467a, 0x9bb9f8a3, 0x217e7cd2, 0x83e13d2c, 0xf8d4474f,
  0xe39eb970, 0x42c6ae16, 0x993216fa, 0x7b093b5d, 0x98daff3c, 0xf718902a, 0x0b1c9cdb, 0xe58f764b, 0x187636bc,
  0x5d7b3bb1, 0xe73de7de, 0x92bec979, 0xcca6c0b2, 0x304a0979, 0x85aa43d4, 0x783125bb, 0x6ca8eaa2, 0xe407eac6,
  0x4b5cfc3e, 0x9fbf8c76, 0x15ca20be, 0xf2ca9fd3, 0x959bd756,
]);

const sums = new Int32Array(LANES);
/** A copy of the page, aligned. */
const words = new Int32Array(WORDS);
const wordBytes = Buffer.from(words.buffer);

/** The checksum that the page ought to carry as block `blk` of its fork; what it carries now does not matter. */
export function computePageChecksum(page: Buffer, blk: number): number {
  page.copy(wordBytes, 0, 0, BLOCK_SIZE);
  wordBytes.writeUInt16LE(0, 8);
  sums.set(BASE_OFFSETS);
  for (let at = 0; at < WORDS; at += LANES) {
    for (let lane = 0; lane < LANES; lane++) {
      const mixed = sums[lane]! ^ words[at + lane]!;
      sums[lane] = Math.imul(mixed, FNV_PRIME) ^ (mixed >>> 17);
    }
  }
  let folded = 0;
  for (let lane = 0; lane < LANES; lane++) {
    let sum = sums[lane]!;
    sum = Math.imul(sum, FNV_PRIME) ^ (sum >>> 17);
    sum = Math.imul(sum, FNV_PRIME) ^ (sum >>> 17);
    folded ^= sum;
  }
  return (((folded ^ blk) >>> 0) % 65_535) + 1;
}

/** True when the page carries the checksum that it ought to, or none is due. */
export function verifyPageChecksum(page: Buffer, blk: number): boolean {
  return isUninitialised(page) || pageChecksum(page) === computePageChecksum(page, blk);
}

/** Has the page carry its checksum. */
export function stampPageChecksum(page: Buffer, blk: number): void {
  if (!isUninitialised(page)) setPageChecksum(page, computePageChecksum(page, blk));
}

function isUninitialised(page: Buffer): boolean {
  return pageUpper(page) === 0;
}
