import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { Worker } from 'node:worker_threads';
import fc from 'fast-check';
import { crc32c } from '../../base/crc32c.ts';
import { ALL_KEYS, compareKeys, formatKey, makeKey, relationBlockKey } from '../key.ts';
import type { Key } from '../key.ts';
import { encodeDerived, encodeImage, VALUE_KIND } from '../value.ts';
import { BLOCK_HEADER_BYTES } from './block.ts';
import { Chain } from './chain.ts';
import { LayerCache, LayerFile } from './layer-file.ts';
import { LAYER_FOOTER_BYTES, LAYER_HEADER_BYTES, layerFileName } from './layer-format.ts';
import type { LayerDescription, LayerKind } from './layer-format.ts';
import { LayerWriter } from './layer-writer.ts';

const TIMELINE = '0123456789abcdef0123456789abcdef';

interface Entry {
  readonly key: Key;
  readonly lsn: number;
  readonly value: Buffer;
}

describe('layer files', () => {
  let directory: string;
  before(() => (directory = mkdtempSync(join(tmpdir(), 'strata-layers-'))));
  after(() => rmSync(directory, { recursive: true }));

  /** Of the images that are their key's last entry, those of even LSNs go to the newest section. */
  async function write(
    entries: readonly Entry[],
    kind: LayerKind,
    lsnStart: number,
    lsnEnd: number,
  ): Promise<LayerFile> {
    const writer = await LayerWriter.create(directory, { kind, timelineId: TIMELINE, lsnStart, lsnEnd });
    for (const [i, { key, lsn, value }] of entries.entries()) {
      const next = entries[i + 1];
      const isLast = next === undefined || compareKeys(next.key, key) !== 0;
      if (isLast && value[0] === VALUE_KIND.image && lsn % 2 === 0) writer.addNewest(key, lsn, value);
      else writer.add(key, lsn, value);
      if (writer.isBusy) await writer.drain();
    }
    return openLayer(await writer.finish());
  }

  function openLayer(description: LayerDescription): LayerFile {
    const cache = new LayerCache({ blockBytesMax: 1024 * 1024, openFilesMax: 4 });
    return new LayerFile(join(directory, layerFileName(description)), description, cache);
  }

  test('threads write layers to one directory at the same time', async () => {
    const begin = `const { workerData, parentPort } = require('node:worker_threads');
      import(workerData.module).then(({ LayerWriter }) => LayerWriter.create(workerData.directory, workerData.options))
        .then(() => parentPort.postMessage('begun'))`;
    const options = { kind: 'delta', timelineId: TIMELINE, lsnStart: 1, lsnEnd: 2 } as const;
    const module = new URL('layer-writer.ts', import.meta.url).href;
    const own = mkdtempSync(join(directory, 'own-'));
    for (let i = 0; i < 2; i++) {
      const worker = new Worker(begin, { eval: true, workerData: { module, directory: own, options } });
      assert.deepEqual(await once(worker, 'message'), ['begun']);
    }
    assert.equal(readdirSync(own).length, 2);
  });

  test('a small delta layer has exactly these bytes', async () => {
    const entries = [
      { key: relationBlockKey(1663, 5, 16384, 0, 7), lsn: 0x1000, value: encodeImage(Buffer.from('abc')) },
      { key: relationBlockKey(1663, 5, 16384, 0, 7), lsn: 0x1010, value: encodeDerived(9, Buffer.from('xy')) },
      { key: relationBlockKey(1663, 5, 16384, 0, 8), lsn: 0x1008, value: encodeImage(Buffer.from('de')) },
    ];
    const layer = await write(entries, 'delta', 0x1000, 0x1011);
    const name =
      '030000067f0000000500004000' +
      '0000000007-' +
      '030000067f0000000500004000' +
      '0000000009__0000000000001000-0000000000001011';
    assert.equal(layerFileName(layer.description), name);
    const bytes = readFileSync(layer.path);
    const expected = [
      '53545241' + '54414c59' + '0300' + '01' + '0000000000', // header
      '........' + '01' + '00' + '0100' + '08000000' + '08000000', // history: value block, not compressed
      '01' + '616263' + '04' + '09' + '7879',
      '........' + '02' + '00' + '0100' + '28000000' + '28000000', // key block
      '02000000' + '00000000' + '00000000',
      '00' + '030000067f00000005000040000000000007' + '00' + '00' + '04' + '01',
      '12' + '10' + '00' + '04' + '04',
      '........' + '01' + '00' + '0100' + '03000000' + '03000000', // newest: value block
      '01' + '6465',
      '........' + '02' + '00' + '0100' + '23000000' + '23000000', // key block
      '01000000' + '00000000' + '00000000',
      '00' + '030000067f00000005000040000000000008' + '08' + '00' + '03' + '01',
    ].join('');
    assert.match(bytes.toString('hex'), new RegExp(`^${expected}`));
    assert.equal(bytes.subarray(-8).toString('latin1'), 'STRATALY');
    assert.equal(bytes.subarray(-120, -104).toString('hex'), TIMELINE);
    assert.deepEqual(layer.footer, {
      kind: 'delta',
      timelineId: TIMELINE,
      keyStart: entries[0]!.key,
      keyEnd: relationBlockKey(1663, 5, 16384, 0, 9),
      lsnStart: 0x1000,
      lsnEnd: 0x1011,
      indexOffset: 16 + (16 + 8) + (16 + 40) + (16 + 3) + (16 + 35),
      indexLength: layer.footer.indexLength,
      entryCount: 3,
      valueBytes: 11,
    });
    layer.close();
  });

  test('what is written is read: every value in order, every chain, every key range', async () => {
    const key = fc
      .tuple(
        fc.constantFrom(0, 3, 7),
        fc.constantFrom(1663, 0xffffffff),
        fc.constantFrom(0, 5, 0xfffffffe),
        fc.constantFrom(1, 16384),
        fc.constantFrom(0, 2),
        fc.constantFrom(0, 1, 2, 500, 0xffffffff),
      )
      .map((fields) => makeKey(...fields));
    const entry = fc.record({
      key,
      lsn: fc.integer({ min: 2 ** 40, max: 2 ** 40 + 40 }),
      length: fc.oneof(fc.integer({ min: 0, max: 50 }), fc.constantFrom(8192, 40_000)),
      isImage: fc.boolean(),
    });
    await fc.assert(
      fc.asyncProperty(fc.array(entry, { minLength: 1, maxLength: 300 }), async (drawn) => {
        const entries = drawn
          .map(({ key: k, lsn, length, isImage }, i) => {
            const payload = Buffer.alloc(length, i);
            return { key: k, lsn, value: isImage ? encodeImage(payload) : encodeDerived(1, payload) };
          })
          .sort((a, b) => compareKeys(a.key, b.key) || a.lsn - b.lsn);
        const layer = await write(entries, 'delta', 2 ** 40, 2 ** 40 + 41);
        const read: Entry[] = [];
        layer.forEachValue((k, lsn, value) => read.push({ key: k, lsn, value }));
        assert.deepEqual(read, entries);
        for (const { key: k } of drawn) {
          const lsn = 2 ** 40 + 20;
          const chain = new Chain();
          layer.collect(k, lsn, 2 ** 40 + 5, chain);
          const expected = entries.filter((e) => compareKeys(e.key, k) === 0 && e.lsn <= lsn && e.lsn > 2 ** 40 + 5);
          const base = expected.findLastIndex((e) => e.value[0] === 1);
          const wanted = expected.slice(Math.max(0, base)).reverse();
          assert.deepEqual(
            chain.values,
            wanted.map((e) => e.value),
          );
          assert.deepEqual(
            chain.lsns,
            wanted.map((e) => e.lsn),
          );
          const above: string[] = [];
          layer.forEachKey({ start: k, end: ALL_KEYS.end }, (found) => above.push(formatKey(found)));
          const distinct = new Set(entries.filter((e) => compareKeys(e.key, k) >= 0).map((e) => formatKey(e.key)));
          assert.deepEqual(above, [...distinct]);
        }
        assert.equal(layer.collect(makeKey(5, 0, 0, 0, 0, 0), 2 ** 40, -1, new Chain()), false);
        layer.close();
        rmSync(layer.path);
      }),
      { numRuns: 40 },
    );
  });

  test('memory that a merge has left has no value that is still to come', async () => {
    const written: Entry[] = [];
    for (let blk = 0; blk < 400; blk++) {
      const key = relationBlockKey(1663, 5, 16384, 0, blk);
      for (let lsn = 0; lsn < 1 + ((blk * 7) % 40); lsn++) {
        const payload = Buffer.from(`${blk}.${lsn} `.repeat(100));
        written.push({ key, lsn: 2000 + lsn, value: encodeDerived(1, payload) });
      }
      if (blk % 3 === 0) written.push({ key, lsn: 3000 + (blk % 2), value: encodeImage(Buffer.alloc(8192, blk)) });
    }
    const layer = await write(written, 'delta', 2000, 4000);
    const found: { key: string; lsn: number; value: Buffer }[] = [];
    let leftCount = 0;
    for (const { key, entries, left } of layer.entries((sizeBytes) => Buffer.allocUnsafeSlow(sizeBytes))) {
      for (const { lsn, value } of entries) found.push({ key: formatKey(key), lsn, value: Buffer.from(value) });
      for (const memory of left) {
        Buffer.from(memory).fill(0xee);
        leftCount++;
      }
    }
    assert.ok(leftCount > 100, `${leftCount} blocks were left`);
    const expected = written.map(({ key, lsn, value }) => ({ key: formatKey(key), lsn, value }));
    assert.deepEqual(found, expected);
  });

  test('blocks with the checksum of older ones are read, and damage in them is found', async () => {
    const entries = Array.from({ length: 40 }, (_, i) => ({
      key: relationBlockKey(1663, 5, 16384, 0, i),
      lsn: 100 + i,
      value: encodeImage(Buffer.alloc(3000, `page ${i}`)),
    }));
    const layer = await write(entries, 'delta', 100, 201);
    const bytes = readFileSync(layer.path);
    for (let at = LAYER_HEADER_BYTES; at < bytes.length - LAYER_FOOTER_BYTES;) {
      const block = bytes.subarray(at, at + BLOCK_HEADER_BYTES + bytes.readUInt32LE(at + 12));
      block[6] = 0;
      block.writeUInt32LE(crc32c(block, 4), 0);
      at += block.length;
    }
    writeFileSync(layer.path, bytes);
    const read: Entry[] = [];
    layer.forEachValue((key, lsn, value) => read.push({ key, lsn, value }));
    assert.deepEqual(read, entries);
    layer.close();
    bytes[LAYER_HEADER_BYTES + BLOCK_HEADER_BYTES + 5]! ^= 1;
    writeFileSync(layer.path, bytes);
    assert.throws(() => layer.forEachValue(() => {}), /checksum is/);
    layer.close();
  });

  test('any damaged byte is found, and the error names the file', async () => {
    const entries = Array.from({ length: 40 }, (_, i) => ({
      key: relationBlockKey(1663, 5, 16384, 0, i),
      lsn: 100 + i,
      value: encodeImage(Buffer.alloc(3000, `page ${i}`)),
    }));
    const layer = await write(entries, 'delta', 100, 200);
    const whole = readFileSync(layer.path);
    for (let at = 16; at < whole.length; at += at < whole.length - 400 ? 13 : 1) {
      const damaged = Buffer.from(whole);
      damaged[at]! ^= 1 << (at % 8);
      writeFileSync(layer.path, damaged);
      const opened = openLayer(layer.description);
      assert.throws(
        () => opened.forEachValue(() => {}),
        (error: Error) => error.name === 'LayerDamagedError' && error.message.includes(layer.path),
        `a bit flipped at ${at} is found`,
      );
      opened.close();
    }
    writeFileSync(layer.path, whole.subarray(0, -1));
    const short = openLayer(layer.description);
    assert.throws(() => short.forEachValue(() => {}), /file has \d+ bytes, the timeline's index says/);
  });

  test('a layer that is given up leaves no file', async () => {
    const before = readdirSync(directory).length;
    const writer = await LayerWriter.create(directory, { kind: 'image', timelineId: TIMELINE, lsnStart: 1, lsnEnd: 2 });
    for (let i = 0; i < 20; i++) writer.add(relationBlockKey(1, 1, 1, 0, i), 1, encodeImage(Buffer.alloc(8192, i)));
    await writer.abort();
    assert.equal(readdirSync(directory).length, before);
  });
});
