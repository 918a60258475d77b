import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';

import { MemoryTimeline } from '../../../test/ingest/memory-timeline.ts';
import { skipPageHeader } from '../../postgres/lsn.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { NO_TIME, WalIndexError, decodeChunk, encodeChunk, walIndexBucket } from './wal-index.ts';
import { WalIndexWriter } from './wal-index-writer.ts';
import { lsnForTimestamp, resolveLsn } from './wal-search.ts';
import type { IndexedTimeline } from './wal-search.ts';

interface TestRecord {
  readonly startLsn: Lsn;
  readonly endLsn: Lsn;
  readonly timeUs?: number | undefined;
}

/** A timeline of records, as ingest would index it. */
class TestTimeline {
  readonly store: MemoryTimeline;
  readonly records: TestRecord[] = [];
  readonly startLsn: Lsn;
  readonly ancestor: TestTimeline | undefined;
  #index: WalIndexWriter;

  constructor(startLsn: Lsn, recordStartLsn: Lsn, ancestor?: TestTimeline) {
    this.startLsn = startLsn;
    this.ancestor = ancestor;
    const from = ancestor && { timeline: ancestor.store, lsn: startLsn };
    this.store = new MemoryTimeline(17, startLsn, recordStartLsn, from);
    this.#index = new WalIndexWriter(this.store);
  }

  add(lengthBytes: number, timeUs?: number, gapBytes = 0): TestRecord {
    const startLsn = skipPageHeader(this.store.lastRecordLsn + gapBytes);
    const record = { startLsn, endLsn: startLsn + lengthBytes, timeUs };
    this.#index.append(startLsn, record.endLsn, timeUs);
    this.store.advance(record.endLsn, startLsn);
    this.records.push(record);
    return record;
  }

  branch(at: TestRecord): TestTimeline {
    return new TestTimeline(at.endLsn, at.startLsn, this);
  }

  /** What is in memory is lost, but was flushed. */
  restart(): void {
    this.#index.flush();
    this.#index = new WalIndexWriter(this.store);
  }

  flush(): void {
    this.#index.flush();
  }

  get indexed(): IndexedTimeline {
    return {
      reader: this.store,
      startLsn: this.startLsn,
      tail: this.#index.tail,
      ancestor: this.ancestor?.indexed,
    };
  }
}

const START = 0x1000028;

test('a chunk decodes to what was encoded, times that step back and gaps between records among it', () => {
  const starts = [START, START + 64, START + 8000, START + 0x9000];
  const ends = [START + 64, START + 128, START + 8080, START + 0x9040];
  const commits = [
    { record: 0, timeUs: 800_000_000_000_000 },
    { record: 2, timeUs: 799_999_999_999_000 },
    { record: 3, timeUs: 800_000_000_000_001 },
  ];
  for (const timeBefore of [NO_TIME, 0, 700_000_000_000_123, -5]) {
    const bytes = encodeChunk({ timeBefore, starts, ends, commits });
    assert.deepEqual(decodeChunk(bytes), { timeBefore, starts, ends, commits });
  }
});

test('a damaged chunk is refused', () => {
  const bytes = encodeChunk({ timeBefore: NO_TIME, starts: [START], ends: [START + 64], commits: [] });
  assert.throws(() => decodeChunk(bytes.subarray(0, 10)), WalIndexError);
  assert.throws(() => decodeChunk(bytes.subarray(0, -1)), WalIndexError);
  assert.throws(() => decodeChunk(Buffer.concat([bytes, Buffer.from([0])])), WalIndexError);
  assert.throws(() => decodeChunk(Buffer.concat([Buffer.from([9]), bytes.subarray(1)])), WalIndexError);
});

test('any LSN resolves to the last record at it, across buckets, huge records, flushes and restarts', () => {
  const timeline = new TestTimeline(START + 112, START);
  for (let i = 0; i < 3000; i++) {
    timeline.add(i === 1500 ? 40 * 65536 : 64 + (i % 50) * 8);
    if (i % 700 === 0) timeline.flush();
    if (i % 1100 === 0) timeline.restart();
  }
  for (const [i, record] of timeline.records.entries()) {
    if (i === 0) continue;
    const { startLsn, endLsn } = record;
    assert.deepEqual(resolveLsn(timeline.indexed, endLsn), { startLsn, endLsn });
    const before = timeline.records[i - 1]!;
    assert.deepEqual(resolveLsn(timeline.indexed, endLsn - 1), { startLsn: before.startLsn, endLsn: before.endLsn });
  }
  const last = timeline.records.at(-1)!;
  assert.equal(resolveLsn(timeline.indexed, last.endLsn + 1_000_000).endLsn, last.endLsn);
  assert.throws(() => resolveLsn(timeline.indexed, START), WalIndexError);
});

test('the index takes 1 to 2 % of WAL of small records', () => {
  const timeline = new TestTimeline(START + 112, START);
  let bytes = 0;
  for (let i = 0; i < 20_000; i++) {
    const length = 64 + (i % 12) * 8;
    timeline.add(length, i % 6 === 0 ? 800_000_000_000_000 + i * 150 : undefined);
    bytes += length;
  }
  assert.ok(timeline.store.putBytes / bytes < 0.02, `${timeline.store.putBytes} of ${bytes} bytes`);
});

test('a time that steps back excludes what comes after a later commit', () => {
  const timeline = new TestTimeline(START + 112, START);
  const first = timeline.add(64, 100);
  const second = timeline.add(64);
  timeline.add(64, 300);
  timeline.add(64, 200);
  assert.deepEqual(lsnForTimestamp(timeline.indexed, 250), { kind: 'present', lsn: second.endLsn });
  assert.deepEqual(lsnForTimestamp(timeline.indexed, 100), { kind: 'present', lsn: second.endLsn });
  assert.deepEqual(lsnForTimestamp(timeline.indexed, 99), { kind: 'past', lsn: START + 112 });
  assert.deepEqual(lsnForTimestamp(timeline.indexed, 300), { kind: 'future', lsn: timeline.store.lastRecordLsn });
  assert.ok(first.endLsn < second.endLsn);
});

test('without commits there is no data; before the first time of an imported cluster is the past', () => {
  const empty = new TestTimeline(START + 112, START);
  empty.add(64);
  assert.deepEqual(lsnForTimestamp(empty.indexed, 5), { kind: 'nodata', lsn: empty.store.lastRecordLsn });

  const store = new MemoryTimeline(17, START + 112, START);
  const chunk = { timeBefore: 1000, starts: [START], ends: [START + 112], commits: [] };
  const timeline: IndexedTimeline = { reader: store, startLsn: START + 112, tail: chunk };
  assert.deepEqual(lsnForTimestamp(timeline, 999), { kind: 'past', lsn: START + 112 });
  assert.deepEqual(lsnForTimestamp(timeline, 1000), { kind: 'future', lsn: START + 112 });
});

/** The answer by looking at every record from the root on. */
function expectedLsn(path: readonly TestTimeline[], timeUs: number): { kind: string; lsn: Lsn } {
  let lsn = path[0]!.startLsn;
  let earlier = false;
  let any = false;
  for (const [i, timeline] of path.entries()) {
    const end = path[i + 1]?.startLsn ?? Infinity;
    for (const record of timeline.records) {
      if (record.endLsn > end) break;
      if (record.timeUs !== undefined) {
        any = true;
        if (record.timeUs > timeUs) return { kind: earlier ? 'present' : 'past', lsn };
        earlier = true;
      }
      lsn = record.endLsn;
    }
  }
  return { kind: any ? 'future' : 'nodata', lsn };
}

test('times and LSNs resolve through branches exactly as a walk over all records does', () => {
  const step = fc.record({
    length: fc.oneof({ weight: 5, arbitrary: fc.integer({ min: 3, max: 300 }) }, fc.integer({ min: 300, max: 30_000 })),
    delta: fc.option(fc.integer({ min: -50, max: 200 }), { nil: undefined }),
    action: fc.oneof(
      { weight: 30, arbitrary: fc.constant('add' as const) },
      fc.constantFrom('flush' as const, 'restart' as const, 'branch' as const),
    ),
    back: fc.nat(20),
  });
  fc.assert(
    fc.property(
      fc.array(step, { minLength: 5, maxLength: 200 }),
      fc.array(fc.nat(20_000), { maxLength: 20 }),
      (steps, probes) => {
        const path = [new TestTimeline(START + 112, START)];
        let timeUs = 1000;
        for (const { length, delta, action, back } of steps) {
          const timeline = path.at(-1)!;
          if (action === 'flush') timeline.flush();
          else if (action === 'restart') timeline.restart();
          else if (action === 'branch') {
            const at = timeline.records[Math.max(0, timeline.records.length - 1 - back)];
            if (at !== undefined) path.push(timeline.branch(at));
          } else {
            if (delta !== undefined) timeUs += delta;
            timeline.add(length * 8, delta === undefined ? undefined : timeUs);
          }
        }
        const { indexed } = path.at(-1)!;
        for (const probe of [...probes, timeUs, timeUs - 1]) {
          const found = lsnForTimestamp(indexed, probe);
          const expected = expectedLsn(path, probe);
          assert.equal(found.kind, expected.kind);
          assert.equal(found.lsn, expected.lsn);
        }
        for (const [i, timeline] of path.entries()) {
          const end = path[i + 1]?.startLsn ?? Infinity;
          for (const { startLsn, endLsn } of timeline.records) {
            if (endLsn <= end) assert.deepEqual(resolveLsn(indexed, endLsn + 1), { startLsn, endLsn });
          }
        }
      },
    ),
    { numRuns: 300 },
  );
});

test('a bucket is 64 KiB', () => {
  assert.equal(walIndexBucket(0x1ffff), 1);
  assert.equal(walIndexBucket(0x20000), 2);
});
