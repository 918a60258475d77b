/**
 * A timeline in memory, the simplest that keeps the contract: every value of every key in a map. What tests compare real stores with.
 */

import assert from 'node:assert/strict';

import type { Lsn } from '../../src/postgres/lsn.ts';
import { BLOCK_SIZE } from '../../src/postgres/page-size.ts';
import type { PgVersion } from '../../src/postgres/version.ts';
import type { WalBlock, WalRecord } from '../../src/postgres/wal/record.ts';
import type { ImportSink } from '../../src/pageserver/import.ts';
import type { WalIndexChunk } from '../../src/pageserver/ingest/wal-index.ts';
import { compareKeys, formatKey, relationBlockKey, relationSizeKey } from '../../src/pageserver/key.ts';
import type { Key, KeyRange, RelationFork } from '../../src/pageserver/key.ts';
import { replayValue } from '../../src/pageserver/replay.ts';
import type { KeyImage } from '../../src/pageserver/read.ts';
import type { KeyValue, TimelineReader, TimelineWriter } from '../../src/pageserver/timeline-access.ts';
import { VALUE_KIND, encodeImage, encodeRecord, needsNoPrior } from '../../src/pageserver/value.ts';

interface Version {
  readonly lsn: Lsn;
  readonly value: Buffer;
}

export class MemoryTimeline implements TimelineWriter, TimelineReader, ImportSink {
  readonly pgVersion: PgVersion;
  readonly ancestor: { readonly timeline: MemoryTimeline; readonly lsn: Lsn } | undefined;
  lastRecordLsn: Lsn;
  lastRecordStartLsn: Lsn;
  beforeFlush?: () => void;
  inheritedIndex?: () => WalIndexChunk | undefined;
  readonly #versions = new Map<string, { readonly key: Key; readonly versions: Version[] }>();
  #pending: string[] = [];
  #putBytes = 0;

  constructor(
    pgVersion: PgVersion,
    lsn: Lsn,
    recordStartLsn: Lsn,
    ancestor?: { readonly timeline: MemoryTimeline; readonly lsn: Lsn },
  ) {
    this.pgVersion = pgVersion;
    this.lastRecordLsn = lsn;
    this.lastRecordStartLsn = recordStartLsn;
    this.ancestor = ancestor;
  }

  /** Bytes of all values put. */
  get putBytes(): number {
    return this.#putBytes;
  }

  put(key: Key, image: Uint8Array): void;
  put(key: Key, lsn: Lsn, value: Buffer): void;
  put(key: Key, lsnOrImage: Lsn | Uint8Array, value?: Buffer): void {
    const id = formatKey(key);
    const lsn = typeof lsnOrImage === 'number' ? lsnOrImage : this.lastRecordLsn;
    const bytes = typeof lsnOrImage === 'number' ? Buffer.from(value!) : encodeImage(lsnOrImage);
    assert(lsn >= this.lastRecordLsn, 'puts come in the order of the log');
    let entry = this.#versions.get(id);
    if (entry === undefined) this.#versions.set(id, (entry = { key, versions: [] }));
    entry.versions.push({ lsn, value: bytes });
    this.#putBytes += bytes.length;
    if (lsn > this.lastRecordLsn) this.#pending.push(id);
  }

  putRecord(record: WalRecord, block: WalBlock, needsNoPrior: boolean): void {
    const key = relationBlockKey(block.spc, block.db, block.rel, block.fork, block.blk);
    this.put(key, record.endLsn, encodeRecord(record.bytes, record.startLsn, block.id, needsNoPrior));
  }

  async putBulk(pieces: AsyncIterable<readonly KeyValue[]>, endLsn: Lsn): Promise<void> {
    this.discard();
    for await (const piece of pieces) for (const [key, value] of piece) this.put(key, endLsn, value);
  }

  drain(): Promise<void> {
    return Promise.resolve();
  }

  get(key: Key): Buffer | undefined {
    return this.getImage(key, Infinity);
  }

  advance(endLsn: Lsn, recordStartLsn: Lsn): void {
    assert(endLsn > this.lastRecordLsn, 'records come in order');
    this.lastRecordLsn = endLsn;
    this.lastRecordStartLsn = recordStartLsn;
    this.#pending = [];
  }

  discard(): void {
    for (const id of this.#pending.reverse()) this.#versions.get(id)?.versions.pop();
    this.#pending = [];
  }

  getImage(key: Key, lsn: Lsn): Buffer | undefined {
    const versions = this.#history(formatKey(key), lsn);
    let base = versions.length - 1;
    while (base >= 0 && !needsNoPrior(versions[base]!.value[0]!)) base--;
    const first = versions[base];
    let page: Buffer | undefined;
    if (first !== undefined && first.value[0] === VALUE_KIND.image) page = Buffer.from(first.value.subarray(1));
    const start = first?.value[0] === VALUE_KIND.initRecord ? base : base + 1;
    for (const version of versions.slice(start)) {
      page ??= Buffer.alloc(BLOCK_SIZE);
      replayValue(page, version.value, version.lsn, this.pgVersion);
    }
    return page;
  }

  getPages(fork: RelationFork, firstBlk: number, count: number, lsn: Lsn): Buffer {
    const pages = Buffer.alloc(count * BLOCK_SIZE);
    const { spc, db, rel } = fork;
    const size = this.getImage(relationSizeKey(spc, db, rel, fork.fork), lsn)?.readUInt32LE(0) ?? 0;
    for (let i = 0; i < count && firstBlk + i < size; i++) {
      this.getImage(relationBlockKey(spc, db, rel, fork.fork, firstBlk + i), lsn)?.copy(pages, i * BLOCK_SIZE);
    }
    return pages;
  }

  scan(range: KeyRange, lsn: Lsn = Infinity): KeyImage[] {
    const found: KeyImage[] = [];
    for (const key of this.#keys(range).values()) {
      const image = this.getImage(key, lsn);
      if (image !== undefined) found.push([key, image]);
    }
    return found.sort((a, b) => compareKeys(a[0], b[0]));
  }

  waitLsn(lsn: Lsn): Promise<void> {
    assert(lsn <= this.lastRecordLsn, 'only what is there can be waited for');
    return Promise.resolve();
  }

  #history(id: string, lsn: Lsn): Version[] {
    const own = (this.#versions.get(id)?.versions ?? []).filter((version) => version.lsn <= lsn);
    if (this.ancestor === undefined) return own;
    return [...this.ancestor.timeline.#history(id, Math.min(lsn, this.ancestor.lsn)), ...own];
  }

  #keys(range: KeyRange): Map<string, Key> {
    const keys = this.ancestor === undefined ? new Map<string, Key>() : this.ancestor.timeline.#keys(range);
    for (const [id, { key }] of this.#versions) {
      if (compareKeys(range.start, key) <= 0 && compareKeys(key, range.end) < 0) keys.set(id, key);
    }
    return keys;
  }
}
