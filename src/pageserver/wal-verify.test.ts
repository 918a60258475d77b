import assert from 'node:assert/strict';
import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';

import pg from 'pg';

import { recordWal } from '../../test/redo/recorded-wal.ts';
import type { RecordedWal } from '../../test/redo/recorded-wal.ts';
import { WAL_PAGE_SIZE, parseWalFileName, segmentStart } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { RM_HEAP } from '../postgres/rmgr.ts';
import { WalReader, recordCrc } from '../postgres/wal/reader.ts';
import type { WalRecord } from '../postgres/wal/record.ts';
import { openWalDirectory, openWalDirectoryAtCheckpoint } from './wal-directory.ts';
import type { WalChunk, WalSource } from './wal-directory.ts';
import { verifyWal } from './wal-verify.ts';

let wal: RecordedWal;

before(async () => {
  wal = await recordWal(
    async ({ sql, connect }) => {
      await sql(`CREATE TABLE t (id int, v text)`);
      await sql(`INSERT INTO t VALUES (1, 'one')`);
      await sql(`INSERT INTO t SELECT i, repeat('x', i % 50) FROM generate_series(1, 1000) i`);
      await sql(`UPDATE t SET id = id + 1`);
      await sql(`DELETE FROM t WHERE id % 2 = 0`);
      await sql(`VACUUM t`);
      await sql(`UPDATE t SET v = 'last' WHERE id % 100 = 1`);
      await sql(`VACUUM t`);
      await copyDatabase(await connect());
    },
    { settings: `wal_consistency_checking = 'all'` },
  );
});

after(() => wal[Symbol.dispose]());

/** A database whose visibility maps lost their bits in WAL, and some of which are then changed. */
async function copyDatabase(client: pg.Client): Promise<void> {
  await client.query('CREATE DATABASE copied STRATEGY wal_log');
  const copied = new pg.Client({ host: client.host, port: client.port, user: 'postgres', database: 'copied' });
  await copied.connect();
  await copied.query(`CREATE TABLE c (id int PRIMARY KEY)`);
  await copied.query('VACUUM');
  await copied.end();
}

test('every page of a real workload is compared and none differs, however few pages are kept in memory', async () => {
  const report = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn));
  assert.equal(report.mismatches, 0);
  assert(report.compared > 2000, `${report.compared} pages compared`);
  assert.equal(report.version, wal.version);
  assert.equal(report.unchecked, 0);
  const spilled = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn), { memoryPages: 1 });
  assert.deepEqual(spilled, report);
});

test('a directory is read from the first record of its first segment when no LSN is given', async () => {
  const source = await openWalDirectory(wal.directory);
  const report = await verifyWal(source);
  assert(report.startLsn < wal.startLsn);
  assert.equal(report.mismatches, 0);
  assert.match(report.stoppedBy ?? '', /record length 0/);
  assert.equal(report.resumesAtLsn, undefined);
});

test('a directory is verified from its first checkpoint on, or from the first record at or after an LSN', async () => {
  const atCheckpoint = await openWalDirectoryAtCheckpoint(wal.directory);
  const first = await openWalDirectory(wal.directory);
  assert(atCheckpoint.startLsn >= first.startLsn && atCheckpoint.startLsn <= wal.startLsn);
  const record = findRecord(await recordedSource(), (each) => each.rmid === RM_HEAP);
  const inside = await openWalDirectory(wal.directory, record.startLsn + 1);
  assert.equal(inside.startLsn, record.endLsn);
  assert.equal((await openWalDirectory(wal.directory, record.startLsn)).startLsn, record.startLsn);
  assert.equal((await verifyWal(inside)).mismatches, 0);
});

test('WAL whose last record is cut off ends there, whatever stale segments follow', async () => {
  const { source, baseLsn, bytes } = await recordedSource();
  const whole = await verifyWal(toSource({ source, baseLsn, bytes }));
  const record = findRecord(
    { source, baseLsn, bytes },
    (each) => each.startLsn % WAL_PAGE_SIZE > 4000 && each.startLsn > wal.startLsn + 200_000,
  );
  bytes.fill(0, record.startLsn + 20 - baseLsn);
  // A segment that was reused under a new name: its pages say older addresses.
  bytes.copyWithin(bytes.length - 3 * WAL_PAGE_SIZE, 0, 3 * WAL_PAGE_SIZE);
  const cut = await verifyWal(toSource({ source, baseLsn, bytes }));
  assert.equal(cut.endLsn, record.startLsn);
  assert(cut.stoppedBy !== undefined && cut.endLsn < whole.endLsn);
  assert.equal(cut.resumesAtLsn, undefined);
});

test('a page of zeros in the middle, and a damaged length, are damage and no end', async () => {
  const zeroed = await recordedSource();
  const from = 20 * WAL_PAGE_SIZE + segmentStart(wal.startLsn) - zeroed.baseLsn;
  const at = Math.ceil((wal.startLsn - zeroed.baseLsn + 1) / WAL_PAGE_SIZE) * WAL_PAGE_SIZE + from;
  zeroed.bytes.fill(0, at, at + WAL_PAGE_SIZE);
  const report = await verifyWal(toSource(zeroed));
  assert.equal(report.resumesAtLsn, zeroed.baseLsn + at + WAL_PAGE_SIZE);

  const damaged = await recordedSource();
  const record = findRecord(damaged, (each) => each.rmid === RM_HEAP && each.startLsn % WAL_PAGE_SIZE < 4000);
  damaged.bytes.writeUInt32LE(0x00ffffff, record.startLsn - damaged.baseLsn);
  const second = await verifyWal(toSource(damaged));
  assert.equal(second.endLsn, record.startLsn);
  assert(second.resumesAtLsn !== undefined);
});

test('a missing segment is no end of WAL', async () => {
  const { source, baseLsn, bytes } = await recordedSource();
  const report = await verifyWal({ ...toSource({ source, baseLsn, bytes }), resumesAtLsn: baseLsn + 2 ** 30 });
  assert.equal(report.resumesAtLsn, baseLsn + 2 ** 30);
});

test("records of an extension's resource manager are refused apart, and images of theirs are used", async () => {
  const source = await recordedSource();
  const record = findRecord(source, (each) => {
    const inOnePage = (each.startLsn % WAL_PAGE_SIZE) + each.totalLength <= WAL_PAGE_SIZE;
    return each.rmid === RM_HEAP && inOnePage && each.blocks[0]?.applyImage === false;
  });
  const bytes = source.bytes.subarray(record.startLsn - source.baseLsn).subarray(0, record.totalLength);
  bytes[17] = 128;
  bytes.writeUInt32LE(recordCrc(bytes), 20);
  const report = await verifyWal(toSource(source));
  assert.equal(report.mismatches, 0);
  assert.equal(report.refused, 1);
  const custom = report.types.find((type) => type.rmgr === 'custom128');
  assert.deepEqual([custom?.records, custom?.refused], [1, 1]);
});

test('a byte of a record that redo gets wrong is one mismatch, with its place and both values', async () => {
  const source = await recordedSource();
  const record = findRecord(source, (each) => {
    const block = each.blocks[0];
    const inOnePage = (each.startLsn % WAL_PAGE_SIZE) + each.totalLength <= WAL_PAGE_SIZE;
    return each.rmid === RM_HEAP && (each.info & 0xf0) === 0x80 && inOnePage && block?.applyImage === false;
  });
  const block = record.blocks[0]!;
  const at = record.startLsn - source.baseLsn;
  const bytes = source.bytes.subarray(at, at + record.totalLength);
  const wrong = block.dataOffset + block.dataLength - 1;
  bytes[wrong] = bytes[wrong]! ^ 0xff;
  bytes.writeUInt32LE(recordCrc(bytes), 20);

  const report = await verifyWal(toSource(source));
  assert.equal(report.mismatches, 1);
  const insert = report.types.find((type) => type.rmgr === 'Heap' && type.type === 'INSERT+INIT');
  assert.equal(insert?.mismatches, 1);
  const mismatch = insert?.firstMismatch;
  assert.equal(mismatch?.lsn, record.startLsn);
  assert.equal(mismatch?.block?.rel, block.rel);
  assert.equal(mismatch?.block?.blk, block.blk);
  assert.match(mismatch?.expected ?? '', /^[0-9a-f]{2,32}$/);
  assert.equal(
    parseInt(mismatch?.expected?.slice(0, 2) ?? '', 16) ^ 0xff,
    parseInt(mismatch?.found?.slice(0, 2) ?? '', 16),
  );
});

test('damage that the CRC shows ends verification where it is', async () => {
  const source = await recordedSource();
  const record = findRecord(source, (each) => each.rmid === RM_HEAP);
  source.bytes[record.startLsn - source.baseLsn + 30]! ^= 1;
  const report = await verifyWal(toSource(source));
  assert(report.endLsn <= record.startLsn);
  assert.match(report.stoppedBy ?? '', /CRC/);
  assert(report.resumesAtLsn !== undefined && report.resumesAtLsn > record.startLsn, 'WAL goes on after the damage');
});

test('verification stops at the LSN asked for and when it is aborted', async () => {
  const endLsn = wal.startLsn + 100_000;
  const report = await verifyWal(await openWalDirectory(wal.directory, wal.startLsn), { endLsn });
  assert(report.endLsn <= endLsn && report.endLsn > wal.startLsn);
  assert.equal(report.stoppedBy, undefined);
  const signal = AbortSignal.abort();
  await assert.rejects(verifyWal(await openWalDirectory(wal.directory, wal.startLsn), { signal }), {
    name: 'AbortError',
  });
});

test('a directory without WAL, or without the segment asked for, is refused', async () => {
  await assert.rejects(openWalDirectory(import.meta.dirname), { code: 'not-found', message: /^no WAL segments in / });
  await assert.rejects(openWalDirectory(wal.directory, 2 ** 40), {
    code: 'not-found',
    message: /^no segment that holds 100\/0 in /,
  });
});

interface RecordedSource {
  readonly source: WalSource;
  readonly baseLsn: Lsn;
  readonly bytes: Buffer;
}

/** The whole WAL in memory, to be changed. */
async function recordedSource(): Promise<RecordedSource> {
  const source = await openWalDirectory(wal.directory, wal.startLsn);
  const baseLsn = segmentStart(wal.startLsn);
  const names = readdirSync(wal.directory).filter((name) => (parseWalFileName(name)?.startLsn ?? -1) >= baseLsn);
  return { source, baseLsn, bytes: Buffer.concat(names.sort().map((name) => readFileSync(join(wal.directory, name)))) };
}

function findRecord(source: RecordedSource, isWanted: (record: WalRecord) => boolean): WalRecord {
  const reader = new WalReader(wal.startLsn, wal.version);
  reader.push(wal.startLsn, source.bytes.subarray(wal.startLsn - source.baseLsn));
  for (let record = reader.next(); record !== undefined; record = reader.next()) if (isWanted(record)) return record;
  throw new Error('the workload made no such record');
}

function toSource({ source, baseLsn, bytes }: RecordedSource): WalSource {
  async function* chunks(): AsyncGenerator<WalChunk> {
    yield { lsn: baseLsn, bytes };
  }
  return { ...source, chunks: chunks() };
}
