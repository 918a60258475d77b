import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import fc from 'fast-check';
import {
  countPresentPages,
  createPageMap,
  createSparseRelationFiles,
  readPageMap,
  type RelationFork,
  reusePageMap,
} from './page-map.ts';

const TIMELINE = '00112233445566778899aabbccddeeff';
const root = mkdtempSync(join(tmpdir(), 'strata-page-map-'));
const path = join(root, 'map');
after(() => rmSync(root, { recursive: true, force: true }));

const table: RelationFork = { spc: 1663, db: 5, rel: 16384, fork: 0, blocks: 131_072 + 3 };
const unlogged: RelationFork = { spc: 1663, db: 5, rel: 16390, fork: 0, blocks: 2, source: { rel: 16390, fork: 3 } };
const empty: RelationFork = { spc: 1664, db: 0, rel: 1262, fork: 2, blocks: 0 };

function create(relations: readonly RelationFork[]): void {
  createPageMap(path, { startLsn: 0x1_2345_6789, timelineId: TIMELINE, relations });
}

function damage(change: (bytes: Buffer) => void): void {
  const bytes = readFileSync(path);
  change(bytes);
  writeFileSync(path, bytes);
}

test('the bytes are those of the header comment', () => {
  create([unlogged]);
  const bytes = readFileSync(path);
  const tableEnd = 128 + 48 + 16 * 4;
  assert.equal(bytes.toString('latin1', 0, 8), 'STRPGMAP');
  assert.equal(bytes.readUInt32LE(8), 1);
  assert.equal(bytes.readBigUInt64LE(16), 0x1_2345_6789n);
  assert.equal(bytes.readBigUInt64LE(24), BigInt(bytes.length));
  assert.deepEqual(
    [bytes.readUInt32LE(32), bytes.readUInt32LE(36), bytes.readUInt32LE(40), bytes.readUInt32LE(44)],
    [1, 16, 131_072, 8192],
  );
  assert.equal(bytes.readBigUInt64LE(48), 256n); // table end 240, rounded up to 64
  assert.equal(bytes.readBigUInt64LE(56), 320n);
  assert.equal(bytes.toString('hex', 80, 96), TIMELINE);
  const fields = Array.from({ length: 8 }, (_, i) => bytes.readUInt32LE(128 + i * 4));
  assert.deepEqual(fields, [1663, 5, 16390, 0, 0, 16390, 3, 2]);
  assert.equal(bytes.readBigUInt64LE(160), 320n);
  assert.equal(bytes.length, 384);
  assert.ok(bytes.subarray(tableEnd).every((byte) => byte === 0));
});

test('what is written is read back: a fork of more than a GiB is two entries, one without blocks is none', () => {
  create([table, unlogged, empty]);
  const map = readPageMap(path);
  assert.equal(map.startLsn, 0x1_2345_6789);
  assert.equal(map.timelineId, TIMELINE);
  assert.deepEqual(
    map.entries.map((entry) => [entry.rel, entry.segment, entry.blocks, entry.sourceRel, entry.sourceFork, entry.gone]),
    [
      [16384, 0, 131_072, 16384, 0, false],
      [16384, 1, 3, 16384, 0, false],
      [16390, 0, 2, 16390, 3, false],
    ],
  );
  assert.deepEqual(countPresentPages(path), { present: 0, total: 131_077 });
});

test('with files on first use an empty fork is an entry too, and the flag is kept', () => {
  createPageMap(path, { startLsn: 1, timelineId: TIMELINE, relations: [table, empty], filesOnFirstUse: true });
  const map = readPageMap(path);
  assert.equal(map.filesOnFirstUse, true);
  assert.equal(readFileSync(path).readUInt32LE(96), 1);
  assert.deepEqual(
    map.entries.map((entry) => [entry.rel, entry.segment, entry.blocks]),
    [
      [16384, 0, 131_072],
      [16384, 1, 3],
      [1262, 0, 0],
    ],
  );
  damage((bytes) => [3, 2, 1].forEach((name, i) => bytes.writeUInt32LE(name, map.namesOffset + i * 4)));
  assert.equal(reusePageMap(path, { timelineId: TIMELINE }).kind, 'ready');
  assert.deepEqual(
    [0, 1, 2].map((i) => readFileSync(path).readUInt32LE(map.namesOffset + i * 4)),
    [0, 2, 1],
  );
  assert.deepEqual(
    readPageMap(path).entries.map((entry) => entry.gone),
    [false, false, true],
  );
});

test('any set of forks is read back, page states lie apart', () => {
  const shape = {
    spc: fc.constantFrom(1663, 1664, 70_000),
    db: fc.integer({ min: 0, max: 0xffff_ffff }),
    rel: fc.integer({ min: 1, max: 0xffff_ffff }),
    fork: fc.integer({ min: 0, max: 3 }),
    blocks: fc.integer({ min: 1, max: 400 }),
  };
  const fork = fc.record(shape, { noNullPrototype: true });
  fc.assert(
    fc.property(
      fc.uniqueArray(fork, { maxLength: 60, selector: (each) => `${each.spc}/${each.db}/${each.rel}/${each.fork}` }),
      (relations) => {
        create(relations);
        const { entries } = readPageMap(path);
        assert.deepEqual(
          entries.map(({ spc, db, rel, fork, blocks }) => ({ spc, db, rel, fork, blocks })),
          relations,
        );
        let end = 0;
        for (const entry of entries) {
          assert.ok(entry.statesOffset >= end && entry.statesOffset % 64 === 0);
          end = entry.statesOffset + entry.blocks;
        }
        assert.ok(end <= statSync(path).size);
      },
    ),
    { numRuns: 50 },
  );
});

test('reuse returns claims that were cut short to absent and keeps the rest', () => {
  create([table, unlogged]);
  const [first, second] = readPageMap(path).entries;
  damage((bytes) => {
    bytes[first!.statesOffset] = 2;
    bytes[first!.statesOffset + 1] = 1;
    bytes[first!.statesOffset + 2] = 3;
    bytes[second!.statesOffset + 2] = 1;
  });
  assert.equal(reusePageMap(path, { timelineId: TIMELINE }).kind, 'ready');
  const bytes = readFileSync(path);
  assert.deepEqual([...bytes.subarray(first!.statesOffset, first!.statesOffset + 4)], [2, 0, 0, 0]);
  assert.equal(bytes[second!.statesOffset + 2], 0);
  assert.equal(countPresentPages(path).present, 1);
});

test('a map that cannot be trusted is unusable, and why is said', () => {
  const refusals: [(bytes: Buffer) => void, RegExp][] = [
    [(bytes) => bytes.write('X', 0), /not a page map/],
    [(bytes) => bytes.writeUInt32LE(9, 8), /version 9/],
    [(bytes) => bytes.writeUInt32LE(77, 128 + 28), /checksum/],
    [(bytes) => (bytes[bytes.length - 64] = 9), /state 9/],
  ];
  for (const [change, reason] of refusals) {
    create([unlogged]);
    damage(change);
    const reuse = reusePageMap(path, { timelineId: TIMELINE });
    assert.ok(reuse.kind === 'unusable' && reason.test(reuse.reason), JSON.stringify(reuse));
  }
  create([unlogged]);
  assert.equal(reusePageMap(path, { timelineId: 'f'.repeat(32) }).kind, 'unusable');
  truncateSync(path, statSync(path).size - 1);
  assert.equal(reusePageMap(path, { timelineId: TIMELINE }).kind, 'unusable');
  assert.equal(reusePageMap(join(root, 'missing'), { timelineId: TIMELINE }).kind, 'unusable');
});

test('relation files are sparse, of full length, in segments', () => {
  const dataDir = join(root, 'data');
  createSparseRelationFiles(dataDir, 17, [table, unlogged, empty]);
  assert.equal(statSync(join(dataDir, 'base/5/16384')).size, 2 ** 30);
  assert.equal(statSync(join(dataDir, 'base/5/16384.1')).size, 3 * 8192);
  assert.equal(statSync(join(dataDir, 'base/5/16390')).size, 2 * 8192);
  assert.equal(statSync(join(dataDir, 'global/1262_vm')).size, 0);
  assert.ok(!existsSync(join(dataDir, 'base/5/16384.2')));
  assert.ok(Number(execFileSync('du', ['-sk', dataDir], { encoding: 'utf8' }).split('\t')[0]) < 100);
});
