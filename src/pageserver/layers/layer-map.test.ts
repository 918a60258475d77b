import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import fc from 'fast-check';
import { relationBlockKey } from '../key.ts';
import type { Key } from '../key.ts';
import { encodeDerived, encodeImage, needsNoPrior } from '../value.ts';
import { Chain } from './chain.ts';
import { LayerCache, LayerFile } from './layer-file.ts';
import { layerFileName } from './layer-format.ts';
import type { LayerDescription } from './layer-format.ts';
import { LayerMap } from './layer-map.ts';
import { LayerWriter } from './layer-writer.ts';

const TIMELINE = '0'.repeat(32);
const KEYS = 12;
const LSNS = 60;

interface Entry {
  readonly blk: number;
  readonly lsn: number;
  readonly value: Buffer;
}

function keyOf(blk: number): Key {
  return relationBlockKey(1, 1, 1, 0, blk);
}

describe('the layer map', () => {
  let directory: string;
  before(() => (directory = mkdtempSync(join(tmpdir(), 'strata-map-'))));
  after(() => rmSync(directory, { recursive: true }));
  const cache = new LayerCache({ blockBytesMax: 1_000_000, openFilesMax: 10 });
  const open = (description: LayerDescription): LayerFile =>
    new LayerFile(join(directory, layerFileName(description)), description, cache);

  test('finds the way from any LSN down, through deltas cut anywhere and images at any LSN', async () => {
    const cuts = (max: number): fc.Arbitrary<number[]> =>
      fc
        .uniqueArray(fc.integer({ min: 1, max: max - 1 }), { maxLength: 4 })
        .map((found) => found.sort((a, b) => a - b));
    const drawn = fc.record({
      entries: fc.array(
        fc.tuple(fc.nat(KEYS - 1), fc.integer({ min: 1, max: LSNS - 1 }), fc.integer({ min: 0, max: 5 })),
        { minLength: 1, maxLength: 80 },
      ),
      keyCuts: cuts(KEYS),
      lsnCuts: fc.array(cuts(LSNS), { minLength: 5, maxLength: 5 }),
      images: fc.array(
        fc.tuple(fc.integer({ min: 1, max: LSNS - 1 }), fc.nat(KEYS - 1), fc.integer({ min: 1, max: KEYS })),
        {
          maxLength: 4,
        },
      ),
      reads: fc.array(
        fc.tuple(fc.nat(KEYS - 1), fc.integer({ min: 0, max: LSNS }), fc.integer({ min: -1, max: LSNS })),
        {
          minLength: 10,
          maxLength: 30,
        },
      ),
    });
    await fc.assert(
      fc.asyncProperty(drawn, async ({ entries: raw, keyCuts, lsnCuts, images, reads }) => {
        const entries = raw
          .map(([blk, lsn, what], i): Entry => {
            const payload = Buffer.from([i]);
            return { blk, lsn, value: what === 0 ? encodeImage(payload) : encodeDerived(1, payload) };
          })
          .sort((a, b) => a.blk - b.blk || a.lsn - b.lsn);
        const map = new LayerMap();

        // Delta layers: each range of keys has its own cuts of LSNs, so that ranges of different keys overlap.
        const keyEdges = [0, ...keyCuts, KEYS];
        for (let k = 0; k + 1 < keyEdges.length; k++) {
          const lsnEdges = [1, ...lsnCuts[k]!.filter((cut) => cut > 1), LSNS];
          for (let l = 0; l + 1 < lsnEdges.length; l++) {
            const [lsnStart, lsnEnd] = [lsnEdges[l]!, lsnEdges[l + 1]!];
            const inside = entries.filter(
              ({ blk, lsn }) => blk >= keyEdges[k]! && blk < keyEdges[k + 1]! && lsn >= lsnStart && lsn < lsnEnd,
            );
            if (inside.length === 0) continue;
            const writer = await LayerWriter.create(directory, {
              kind: 'delta',
              timelineId: TIMELINE,
              lsnStart,
              lsnEnd,
            });
            for (const { blk, lsn, value } of inside) writer.add(keyOf(blk), lsn, value);
            map.insert(open(await writer.finish()));
          }
        }

        // Image layers, which stand after every value at their LSN. Some keys of their range are not in them.
        const imageAt = new Map<string, Buffer | undefined>();
        for (const [lsn, from, count] of images) {
          const to = Math.min(KEYS, from + count);
          const blks = Array.from({ length: to - from }, (_, i) => from + i);
          const present = blks.filter((blk) => (blk + lsn) % 4 !== 0);
          if (present.length === 0 || blks.some((blk) => imageAt.has(`${blk}@${lsn}`))) continue;
          const writer = await LayerWriter.create(directory, {
            kind: 'image',
            timelineId: TIMELINE,
            lsnStart: lsn,
            lsnEnd: lsn + 1,
            keyStart: keyOf(from),
          });
          for (const blk of blks) imageAt.set(`${blk}@${lsn}`, undefined);
          for (const blk of present) {
            const image = encodeImage(Buffer.from(`${blk}@${lsn}`));
            imageAt.set(`${blk}@${lsn}`, image);
            writer.add(keyOf(blk), lsn, image);
          }
          const layer = open(await writer.finish(keyOf(to)));
          map.insert(layer);
        }

        for (const [blk, lsn, floor] of reads) {
          const chain = new Chain();
          const isOver = map.collect(keyOf(blk), lsn, floor, chain);
          assert.equal(isOver, chain.end !== undefined);
          const expected: Buffer[] = [];
          let end: string | undefined;
          for (let at = lsn; at > floor && end === undefined; at--) {
            const image = imageAt.get(`${blk}@${at}`);
            if (image !== undefined) {
              expected.push(image);
              end = 'base';
            } else if (imageAt.has(`${blk}@${at}`)) {
              end = 'absent';
            }
            const here = entries.filter((entry) => entry.blk === blk && entry.lsn === at).reverse();
            for (const { value } of here) {
              if (end !== undefined) break;
              expected.push(value);
              if (needsNoPrior(value[0]!)) end = 'base';
            }
          }
          assert.deepEqual(chain.values, expected);
          // Without a base the search may say that it met the floor, or that there is nothing more.
          if (end !== undefined || (chain.end !== 'floor' && chain.end !== undefined)) assert.equal(chain.end, end);
        }
        const layers = [...map.all()];
        assert.equal(map.count, layers.length);
        for (const layer of layers) {
          map.remove(layer);
          layer.close();
          rmSync(layer.path);
        }
        assert.equal(map.count, 0);
        assert.equal(map.oldestLsn, Infinity);
      }),
      { numRuns: Number(process.env['STRATA_TEST_RUNS'] ?? 60) },
    );
  });

  test('a key is found at once among thousands of layers', async () => {
    const map = new LayerMap();
    const writer = await LayerWriter.create(directory, { kind: 'delta', timelineId: TIMELINE, lsnStart: 1, lsnEnd: 2 });
    writer.add(keyOf(5), 1, encodeImage(Buffer.from('x')));
    const real = await writer.finish();
    map.insert(open(real));
    for (let i = 1; i < 20_000; i++) {
      map.insert(open({ ...real, keyStart: keyOf(10 + i), keyEnd: keyOf(11 + i), lsnStart: 1 + i, lsnEnd: 2 + i }));
    }
    const chain = new Chain();
    assert(map.collect(keyOf(5), 1, -1, chain));
    assert.equal(chain.values.length, 1);
    for (const layer of map.all()) layer.close();
  });
});
