/**
 * Layers that are not what they should be: random changes of a real file, as it lies there and, beneath checksums that are made right again, of what its blocks, its index and
 * its footer say. Whoever reads one gets what was written or a LayerDamagedError, soon and without memory that the file does not account for.
 */

import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { crc32c } from '../../base/crc32c.ts';
import { ALL_KEYS, compareKeys, relationBlockKey } from '../key.ts';
import { verifyLayer } from '../scrub-layer.ts';
import { encodeDerived, encodeImage } from '../value.ts';
import { BLOCK_HEADER_BYTES, BLOCK_TYPE, decodeBlock, LayerDamagedError } from './block.ts';
import { Chain } from './chain.ts';
import { LayerCache, LayerFile } from './layer-file.ts';
import { decodeFooter, decodeIndex, LAYER_FOOTER_BYTES, LAYER_HEADER_BYTES, layerFileName } from './layer-format.ts';
import type { LayerDescription } from './layer-format.ts';
import { LayerWriter } from './layer-writer.ts';

const TIMELINE = '0123456789abcdef0123456789abcdef';
const runs = Number(process.env['STRATA_TEST_RUNS'] ?? 200);
const KEYS = 60;
const LSNS = { lsnStart: 100, lsnEnd: 400 };
/** Of what one reading of a layer of some 100 KB may take. */
const MEMORY_MAX = 64 * 1024 * 1024;

/** One change: bytes are set, or left out, put in or made zero. */
interface Mutation {
  readonly at: number;
  readonly how: 'set' | 'big' | 'zero' | 'cut' | 'grow';
  readonly value: number;
  readonly length: number;
}

const mutation: fc.Arbitrary<Mutation> = fc.record({
  at: fc.nat(1_000_000),
  how: fc.constantFrom('set', 'big', 'zero', 'cut', 'grow'),
  value: fc.nat(255),
  length: fc.integer({ min: 1, max: 40 }),
});

function mutated(bytes: Buffer, { at, how, value, length }: Mutation): Buffer {
  if (bytes.length === 0) return bytes;
  const start = at % bytes.length;
  const end = Math.min(bytes.length, start + length);
  const copy = Buffer.from(bytes);
  if (how === 'set') copy[start] = value;
  else if (how === 'big') copy.fill(0xff, start, Math.min(end, start + 4));
  else if (how === 'zero') copy.fill(0, start, end);
  else if (how === 'cut') return Buffer.concat([bytes.subarray(0, start), bytes.subarray(end)]);
  else return Buffer.concat([bytes.subarray(0, start), Buffer.alloc(length, value), bytes.subarray(start)]);
  return copy;
}

/** A block as it would be stored uncompressed, with the right checksum. */
function blockOf(type: number, content: Buffer): Buffer {
  const block = Buffer.alloc(BLOCK_HEADER_BYTES + content.length);
  block[4] = type;
  block.writeUInt32LE(content.length, 8);
  block.writeUInt32LE(content.length, 12);
  content.copy(block, BLOCK_HEADER_BYTES);
  block[6] = 1;
  block.writeUInt32LE(crc32(block.subarray(4)), 0);
  return block;
}

describe('a layer file that is not what it should be', () => {
  let directory: string;
  let layer: LayerDescription;
  let whole: Buffer;
  let path: string;
  const written = new Map<string, Buffer>();
  const nameOf = (blk: number, lsn: number): string => `${blk} at ${lsn}`;

  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-fuzz-'));
    const writer = await LayerWriter.create(directory, {
      kind: 'delta',
      timelineId: TIMELINE,
      ...LSNS,
      valueBlockBytes: 16384,
    });
    for (let blk = 0; blk < KEYS; blk++) {
      const key = relationBlockKey(1663, 5, 16384, 0, blk);
      for (let lsn = 100; lsn < 140; lsn++) {
        const value =
          lsn % 20 === 0 ? encodeImage(Buffer.alloc(900, blk + lsn)) : encodeDerived(1, Buffer.from([blk, lsn, 1]));
        writer.add(key, lsn, value);
        written.set(nameOf(blk, lsn), value);
        if (writer.isBusy) await writer.drain();
      }
      if (blk % 3 > 0) continue;
      const value = encodeImage(Buffer.alloc(3000, blk));
      writer.addNewest(key, 200, value);
      written.set(nameOf(blk, 200), value);
    }
    layer = await writer.finish();
    path = join(directory, layerFileName(layer));
    whole = readFileSync(path);
  });
  after(() => rmSync(directory, { recursive: true }));

  /** Reads the file in every way. What is read is right when `isChecked`; whatever is wrong is a LayerDamagedError. */
  async function read(bytes: Buffer, isChecked: boolean): Promise<void> {
    writeFileSync(path, bytes);
    const description = { ...layer, sizeBytes: bytes.length };
    const file = new LayerFile(path, description, new LayerCache({ blockBytesMax: 1 << 20, openFilesMax: 4 }));
    const before = process.memoryUsage().arrayBuffers;
    const attempt = (work: () => void): void => {
      try {
        work();
      } catch (error) {
        if (!(error instanceof LayerDamagedError)) throw error;
      }
    };
    attempt(() =>
      file.forEachValue((key, lsn, value) => {
        if (isChecked) assert.deepEqual(written.get(nameOf(key.blk, lsn)), value);
      }),
    );
    for (const blk of [0, 7, 30, KEYS - 1]) {
      attempt(() => void file.collect(relationBlockKey(1663, 5, 16384, 0, blk), 150, 0, new Chain()));
    }
    attempt(() => file.forEachKey(ALL_KEYS, () => {}));
    attempt(() =>
      [...file.keysWithin(ALL_KEYS, 120, 130)].every((key) => key === undefined || compareKeys(key, key) === 0),
    );
    file.close();
    const bytesRead = (offset: number, length: number): Promise<Buffer> => {
      if (offset < 0 || offset + length > bytes.length) throw new LayerDamagedError(path, offset, 'past the end');
      return Promise.resolve(Buffer.from(bytes.subarray(offset, offset + length)));
    };
    const damages = await verifyLayer(description, TIMELINE, { sizeBytes: bytes.length, read: bytesRead }, path);
    assert(!isChecked || damages.length > 0 || bytes.equals(whole), 'scrub finds what is not as it was written');
    const grown = process.memoryUsage().arrayBuffers - before;
    assert(grown < MEMORY_MAX, `${grown} bytes for a file of ${bytes.length}`);
  }

  test('changed anywhere, it is read right or said to be damaged', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(mutation, { minLength: 1, maxLength: 3 }), async (mutations) => {
        await read(mutations.reduce(mutated, whole), true);
      }),
      { numRuns: runs },
    );
  });

  test('changed beneath checksums that are right, it is said to be damaged or read as something else, and nothing worse', async () => {
    const footerOffset = whole.length - LAYER_FOOTER_BYTES;
    const footer = decodeFooter(whole.subarray(footerOffset), path, footerOffset);
    const blockAt = (offset: number, length: number, type: number): Buffer =>
      Buffer.from(decodeBlock(whole.subarray(offset, offset + length), type, path, offset));
    const index = blockAt(footer.indexOffset, footer.indexLength, BLOCK_TYPE.index);
    const { history } = decodeIndex(index, path, 0);
    const part = fc.constantFrom('keys', 'values', 'index', 'footer', 'block header');
    await fc.assert(
      fc.asyncProperty(part, fc.nat(), mutation, async (what, which, change) => {
        const copy = Buffer.from(whole);
        if (what === 'index') return read(rebuilt(copy, footer.indexOffset, mutated(index, change)), false);
        if (what === 'footer') {
          mutated(whole.subarray(footerOffset + 4), change)
            .subarray(0, LAYER_FOOTER_BYTES - 4)
            .copy(copy, footerOffset + 4);
          copy.writeUInt32LE(crc32c(copy, footerOffset + 4), footerOffset);
          return read(copy, false);
        }
        const isKeys = what === 'keys';
        const offsets = isKeys ? history.keyBlockOffsets : history.valueBlockOffsets;
        const lengths = isKeys ? history.keyBlockLengths : history.valueBlockLengths;
        const number = which % offsets.length;
        const [offset, length] = [offsets[number]!, lengths[number]!];
        if (what === 'block header') {
          // What it says of its own length and compression.
          mutated(whole.subarray(offset + 5, offset + 16), change)
            .subarray(0, 11)
            .copy(copy, offset + 5);
          const summed = copy.subarray(offset + 4, offset + length);
          copy.writeUInt32LE(copy[offset + 6] === 0 ? crc32c(summed) : crc32(summed), offset);
          return read(copy, false);
        }
        // It goes to the end of the blocks, and the index says so.
        const content = mutated(blockAt(offset, length, isKeys ? BLOCK_TYPE.keys : BLOCK_TYPE.values), change);
        const block = blockOf(isKeys ? BLOCK_TYPE.keys : BLOCK_TYPE.values, content);
        const moved = Buffer.from(index);
        const item = isKeys ? 4 + number * 44 + 34 : 8 + history.keyBlockOffsets.length * 44 + number * 10;
        moved.writeUIntLE(footer.indexOffset, item, 6);
        moved.writeUInt32LE(block.length, item + 6);
        const blocks = Buffer.concat([whole.subarray(0, footer.indexOffset), block]);
        return read(rebuilt(Buffer.concat([blocks, whole.subarray(footerOffset)]), blocks.length, moved), false);
      }),
      { numRuns: runs },
    );
  });

  /** The file with another index, which begins at `offset`, and a footer that fits. */
  function rebuilt(file: Buffer, offset: number, index: Buffer): Buffer {
    const block = blockOf(BLOCK_TYPE.index, index);
    const footer = Buffer.from(whole.subarray(-LAYER_FOOTER_BYTES));
    footer.writeUInt32LE(block.length, 60);
    footer.writeBigUInt64LE(BigInt(offset), 80);
    footer.writeUInt32LE(crc32c(footer, 4), 0);
    return Buffer.concat([file.subarray(0, Math.max(LAYER_HEADER_BYTES, offset)), block, footer]);
  }
});
