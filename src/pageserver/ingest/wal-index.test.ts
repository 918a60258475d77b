import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';

import { MemoryTimeline } from '../../../test/ingest/memory-timeline.ts';
import { skipPageHeader } from '../../postgres/lsn.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { NO_TIME, SET_BACK_US, WalIndexError, decodeChunk, encodeChunk, walIndexBucket } from './wal-index.ts';
import { WalIndexWriter } from './wal-index-writer.ts';
import { chunkAt, lsnForTimestamp, resolveLsn, timestampOfLsn } from './wal-search.ts';
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
    this.store.inheritedIndex = () =>
      ancestor === undefined || this.store.lastRecordLsn > startLsn ? undefined : chunkAt(ancestor.indexed, startLsn);
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
    for (const setBackLsn of [0, START - 8000]) {
      const bytes = encodeChunk({ timeBefore, setBackLsn, starts, ends, commits });
      assert.deepEqual(decodeChunk(bytes), { timeBefore, setBackLsn, starts, ends, commits });
      const first = Buffer.concat([Buffer.from([1]), bytes.subarray(1, 15), bytes.subarray(21)]);
      assert.deepEqual(decodeChunk(first), { timeBefore, setBackLsn: 0, starts, ends, commits }, 'version 1');
    }
  }
});

test('a damaged chunk is refused', () => {
  const bytes = encodeChunk({ timeBefore: NO_TIME, setBackLsn: 0, starts: [START], ends: [START + 64], commits: [] });
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

test('of commits whose order in the log is not that of their times, none that is later is included', () => {
  const timeline = new TestTimeline(START + 112, START);
  const first = timeline.add(64, 100);
  const second = timeline.add(64);
  timeline.add(64, 300);
  const third = timeline.add(64, 200);
  const fourth = timeline.add(64, 300);
  assert.deepEqual(lsnForTimestamp(timeline.indexed, 250), { kind: 'present', lsn: second.endLsn });
  assert.deepEqual(lsnForTimestamp(timeline.indexed, 100), { kind: 'present', lsn: second.endLsn });
  assert.deepEqual(lsnForTimestamp(timeline.indexed, 99), { kind: 'past', lsn: START + 112 });
  assert.deepEqual(lsnForTimestamp(timeline.indexed, 300), { kind: 'future', lsn: timeline.store.lastRecordLsn });
  assert.equal(timeline.store.lastRecordLsn, fourth.endLsn, 'commits of one microsecond go together');
  assert.equal(timestampOfLsn(timeline.indexed, START + 112), undefined);
  assert.equal(timestampOfLsn(timeline.indexed, first.endLsn), 100);
  assert.equal(timestampOfLsn(timeline.indexed, third.endLsn), 300);
});

test('where the clock was set back, a time means the pass after that; what was before is reached by LSN', () => {
  const second = 1_000_000;
  const timeline = new TestTimeline(START + 112, START);
  const before = timeline.add(64, 100 * second);
  timeline.add(64, 3700 * second); // an hour ahead
  const ahead = timeline.add(64, 3710 * second);
  timeline.add(64, 105 * second); // set right
  const between = timeline.add(64);
  const last = timeline.add(64, 4000 * second);
  const at = (s: number) => lsnForTimestamp(timeline.indexed, s * second);
  assert.deepEqual(at(100), { kind: 'present', lsn: before.endLsn });
  assert.deepEqual(at(104), { kind: 'present', lsn: before.endLsn });
  assert.deepEqual(
    at(105),
    { kind: 'present', lsn: between.endLsn },
    'with what was committed while the clock was ahead',
  );
  assert.deepEqual(at(3705), { kind: 'present', lsn: between.endLsn });
  assert.deepEqual(at(4000), { kind: 'future', lsn: last.endLsn });
  assert.deepEqual(at(99), { kind: 'past', lsn: START + 112 });
  assert.equal(timestampOfLsn(timeline.indexed, ahead.endLsn), 3710 * second);
  assert.equal(timestampOfLsn(timeline.indexed, between.endLsn), 105 * second);
});

test('with backends that are held up between reading the clock and committing, a time has what was acknowledged by then, and nothing later', () => {
  const backend = fc.record({ beginUs: fc.nat(100_000), toLogUs: fc.nat(30_000), toClientUs: fc.nat(5000) });
  fc.assert(
    fc.property(fc.array(backend, { minLength: 1, maxLength: 300 }), fc.array(fc.nat(140_000)), (backends, probes) => {
      const timeline = new TestTimeline(START + 112, START);
      const log = backends.map((each) => ({ ...each, loggedUs: each.beginUs + each.toLogUs }));
      const commits = log
        .sort((a, b) => a.loggedUs - b.loggedUs)
        .map((each) => ({ ...each, endLsn: timeline.add(6000, each.beginUs).endLsn }));
      for (const timeUs of [...probes, ...commits.map((commit) => commit.beginUs)]) {
        const { lsn } = lsnForTimestamp(timeline.indexed, timeUs);
        for (const { beginUs, loggedUs, toClientUs, endLsn } of commits) {
          if (beginUs > timeUs) assert.ok(endLsn > lsn, 'a later commit is not included');
          if (loggedUs + toClientUs <= timeUs) assert.ok(endLsn <= lsn, 'an acknowledged commit is included');
        }
      }
    }),
    { numRuns: 200 },
  );
});

test('without commits there is no data; before the first time of an imported cluster is the past', () => {
  const empty = new TestTimeline(START + 112, START);
  empty.add(64);
  assert.deepEqual(lsnForTimestamp(empty.indexed, 5), { kind: 'nodata', lsn: empty.store.lastRecordLsn });

  const store = new MemoryTimeline(17, START + 112, START);
  const chunk = { timeBefore: 1000, setBackLsn: 0, starts: [START], ends: [START + 112], commits: [] };
  const timeline: IndexedTimeline = { reader: store, startLsn: START + 112, tail: chunk };
  assert.deepEqual(lsnForTimestamp(timeline, 999), { kind: 'past', lsn: START + 112 });
  assert.deepEqual(lsnForTimestamp(timeline, 1000), { kind: 'future', lsn: START + 112 });
});

/** The answers by looking at every record from the root on. */
function walk(path: readonly TestTimeline[]): { record: TestRecord; latestUs: number; division: number }[] {
  const steps: { record: TestRecord; latestUs: number; division: number }[] = [];
  let latestUs = NO_TIME;
  let division = 0;
  for (const [i, timeline] of path.entries()) {
    const end = path[i + 1]?.startLsn ?? Infinity;
    for (const record of timeline.records) {
      if (record.endLsn > end) break;
      const { timeUs } = record;
      if (timeUs !== undefined && timeUs <= latestUs - SET_BACK_US) {
        division++;
        latestUs = timeUs;
      } else latestUs = Math.max(latestUs, timeUs ?? latestUs);
      steps.push({ record, latestUs, division });
    }
  }
  return steps;
}

function expectedLsn(path: readonly TestTimeline[], timeUs: number): { kind: string; lsn: Lsn } {
  const steps = walk(path);
  const firsts = new Map<number, TestRecord>();
  for (const { record, division } of steps) {
    if (record.timeUs !== undefined && !firsts.has(division)) firsts.set(division, record);
  }
  if (firsts.size === 0) return { kind: 'nodata', lsn: steps.at(-1)?.record.endLsn ?? path[0]!.startLsn };
  const newest = [...firsts].findLast(([, record]) => record.timeUs! <= timeUs);
  const from = newest?.[1].startLsn ?? 0;
  let lsn = path[0]!.startLsn;
  for (const { record } of steps) {
    if (record.timeUs !== undefined && record.startLsn >= from && record.timeUs > timeUs) {
      return { kind: newest === undefined ? 'past' : 'present', lsn };
    }
    lsn = record.endLsn;
  }
  return { kind: 'future', lsn };
}

test('times and LSNs resolve through branches exactly as a walk over all records does', () => {
  const step = fc.record({
    length: fc.oneof({ weight: 5, arbitrary: fc.integer({ min: 3, max: 300 }) }, fc.integer({ min: 300, max: 30_000 })),
    delta: fc.option(
      fc.oneof(
        { weight: 30, arbitrary: fc.integer({ min: -50, max: 200 }) },
        fc.integer({ min: -2 * SET_BACK_US, max: 2 * SET_BACK_US }),
      ),
      { nil: undefined },
    ),
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
        const times = path.flatMap(({ records }) => records.flatMap((record) => record.timeUs ?? []));
        for (const probe of [...probes, ...times, timeUs - 1]) {
          const found = lsnForTimestamp(indexed, probe);
          const expected = expectedLsn(path, probe);
          assert.equal(found.kind, expected.kind);
          assert.equal(found.lsn, expected.lsn);
        }
        const walked = walk(path);
        for (const { record, latestUs } of walked) {
          const time = timestampOfLsn(indexed, record.endLsn);
          assert.equal(time ?? NO_TIME, latestUs);
        }
        for (const { record, latestUs, division } of walked) {
          if (latestUs === NO_TIME || division !== walked.at(-1)!.division) continue;
          assert.ok(lsnForTimestamp(indexed, latestUs).lsn >= record.endLsn, 'the time of an LSN has what the LSN has');
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
