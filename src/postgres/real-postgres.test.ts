/**
 * Against real servers: the WAL and control file that Postgres writes, and Postgres started from a checkpoint that we forged.
 *
 * The server from npm is always used. STRATA_TEST_PG_BIN_DIRS may name more bin folders, separated by colons; where one has pg_waldump,
 * its view of the WAL is compared with ours, record by record.
 */

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { chownSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import pg from 'pg';
import { recordWal } from '../../test/redo/recorded-wal.ts';
import type { RecordedWal, WorkloadSessions } from '../../test/redo/recorded-wal.ts';
import { findInstallation, reachableInstallation, unprivilegedUser } from '../compute/installation.ts';
import { PostgresProcess } from '../compute/postgres-process.ts';
import { CONTROL_FILE_PATH, DB_SHUTDOWNED, decodeControlFile, encodeControlFile } from './control-file.ts';
import { forgeShutdownCheckpoint } from './forge-checkpoint.ts';
import { formatLsn, lsnHigh, lsnLow, parseWalFileName, segmentStart } from './lsn.ts';
import type { Lsn } from './lsn.ts';
import { forkName, relationPath } from './relation.ts';
import { RM_XACT, rmgrName } from './rmgr.ts';
import type { PgVersion } from './version.ts';
import { WalBoundaryTracker } from './wal/boundary-tracker.ts';
import { chunksOf } from './wal/made-wal.test-data.ts';
import { WalReader } from './wal/reader.ts';
import type { WalBlock, WalRecord } from './wal/record.ts';
import { writeSparseSegments } from './wal/writer.ts';
import { parseXactRecord } from './xact-record.ts';

const BIN_DIRS: readonly (string | undefined)[] = [
  undefined,
  ...(process.env['STRATA_TEST_PG_BIN_DIRS'] ?? '').split(':').filter((path) => path !== ''),
];
const PORT = 5432;

async function workload({ sql, connect }: WorkloadSessions): Promise<void> {
  await sql('CREATE TABLE accounts (id int PRIMARY KEY, balance int, note text)');
  await sql('INSERT INTO accounts SELECT i, 0, repeat(md5(i::text), i % 40) FROM generate_series(1, 20000) i');
  await sql('CREATE INDEX ON accounts USING gin (to_tsvector($$simple$$, note))');
  const other = await connect();
  for (let i = 1; i <= 200; i++) {
    await sql(`UPDATE accounts SET balance = balance + ${i} WHERE id = ${i * 7}`);
    await other.query(`INSERT INTO accounts VALUES (${100_000 + i}, ${i}, NULL)`);
  }
  await sql(
    'BEGIN; SAVEPOINT a; INSERT INTO accounts VALUES (-1); SAVEPOINT b; INSERT INTO accounts VALUES (-2); COMMIT',
  );
  await sql("BEGIN; INSERT INTO accounts VALUES (-3); PREPARE TRANSACTION 'a name'");
  await sql("COMMIT PREPARED 'a name'");
  await sql("CREATE TABLE gone (x text); INSERT INTO gone VALUES (repeat('x', 100000))");
  await sql('DROP TABLE gone');
  await sql("SELECT pg_logical_emit_message(true, 'prefix', repeat('z', 50000))");
  await sql('SELECT pg_switch_wal()');
  await sql("SET wal_compression = 'pglz'");
  await sql('VACUUM FREEZE accounts');
}

for (const pgBinDir of BIN_DIRS) {
  test(`the WAL of a real ${pgBinDir === undefined ? 'server from npm' : 'server named by path'}`, async (context) => {
    using recorded = await recordWal(workload, pgBinDir === undefined ? {} : { pgBinDir });
    const { version } = recorded;
    const dataDir = dirname(recorded.directory);
    const controlBytes = readFileSync(join(dataDir, CONTROL_FILE_PATH));
    const controlFile = decodeControlFile(controlBytes);
    const wal = readWal(recorded);
    const records = readRecords(wal, version);
    const last = records.at(-1);
    assert.ok(last !== undefined);

    await context.test('the control file is written back byte for byte', () => {
      assert.equal(controlFile.version, version);
      assert.equal(controlFile.state, DB_SHUTDOWNED);
      assert.ok(encodeControlFile(controlFile).equals(controlBytes));
    });

    await context.test('every record is whole and CRC-valid, and the last is the shutdown checkpoint', () => {
      assert.equal(last.startLsn, controlFile.checkPoint);
      const tracker = new WalBoundaryTracker(wal.startLsn);
      for (const chunk of chunksOf(wal.bytes.subarray(0, last.endLsn - wal.startLsn), [7, 100_000, 31]))
        tracker.push(chunk);
      assert.deepEqual([tracker.endLsn, tracker.lastRecordStart], [last.endLsn, last.startLsn]);
    });

    await context.test('ends of transactions are parsed', () => {
      const kinds = new Set<string>();
      for (const record of records) {
        const parsed = record.rmid === RM_XACT ? parseXactRecord(record, version) : undefined;
        if (parsed === undefined) continue;
        kinds.add(parsed.kind === 'prepare' ? 'prepare' : `${parsed.kind}${parsed.prepared ? ' prepared' : ''}`);
        if (parsed.kind === 'commit' && parsed.droppedRelations.length > 0) {
          kinds.add('drop');
          for (const relation of parsed.droppedRelations) {
            const path = join(dataDir, relationPath({ ...relation, fork: 0 }, version));
            assert.ok(!existsSync(path), `${path} was dropped`);
          }
        }
      }
      assert.deepEqual([...kinds].sort(), ['commit', 'commit prepared', 'drop', 'prepare']);
    });

    const waldump = pgBinDir === undefined ? undefined : join(pgBinDir, 'pg_waldump');
    await context.test(
      'pg_waldump sees the same records',
      { skip: waldump === undefined || !existsSync(waldump) },
      () => {
        assert.ok(waldump !== undefined);
        const seen = runWaldump(waldump, recorded, wal.startLsn, last.endLsn);
        assert.deepEqual(records.map(describe), seen);
      },
    );

    await context.test(
      'Postgres starts from a forged checkpoint, in mid-segment and at each kind of boundary',
      async () => {
        const base = segmentStart(last.endLsn) + 2 ** 24;
        const places: readonly Lsn[] = [last.endLsn, base, base + 8192, base + 3 * 8192 - 8, base + 2 ** 24 - 96];
        let lsn = last.endLsn;
        let prevLsn = last.startLsn;
        for (const place of places) {
          // Places past the true end leave a gap in the WAL, which Postgres cannot see: it reads nothing before the checkpoint.
          if (place > lsn) [prevLsn, lsn] = [place - 128, place];
          const state = decodeControlFile(readFileSync(join(dataDir, CONTROL_FILE_PATH))).checkPointCopy;
          const forged = forgeShutdownCheckpoint({
            controlFile,
            state,
            lsn,
            prevLsn,
            time: Math.floor(Date.now() / 1000),
          });
          const rows = await startFrom(dataDir, forged, pgBinDir);
          assert.deepEqual(rows, [{ count: '20203', sum: '40200' }]);
          const after = readRecords(readWal(recorded, lsn), version, prevLsn);
          assert.equal(after[0]?.startLsn, forged.startLsn, 'the forged record is the first of the new WAL');
          const shutdown = decodeControlFile(readFileSync(join(dataDir, CONTROL_FILE_PATH))).checkPoint;
          assert.equal(after.at(-1)?.startLsn, shutdown, 'and the WAL goes on from it in one chain');
          [prevLsn, lsn] = [shutdown, after.at(-1)!.endLsn];
        }
      },
    );
  });
}

/** Starts the cluster from the forged files, asks for its rows, writes something, and shuts it down. */
async function startFrom(
  dataDir: string,
  forged: ReturnType<typeof forgeShutdownCheckpoint>,
  pgBinDir: string | undefined,
): Promise<unknown[]> {
  const walDir = join(dataDir, 'pg_wal');
  for (const name of readdirSync(walDir)) if (parseWalFileName(name) !== undefined) rmSync(join(walDir, name));
  await writeSparseSegments(walDir, forged.segments);
  writeFileSync(join(dataDir, CONTROL_FILE_PATH), forged.controlFile);
  const user = unprivilegedUser();
  if (user !== undefined) for (const { name } of forged.segments) chownSync(join(walDir, name), user.uid, user.gid);
  const directory = dirname(dataDir);
  const found = findInstallation(pgBinDir === undefined ? {} : { pgBinDir });
  const installation = reachableInstallation(found, user, join(directory, 'bin'));
  const server = await PostgresProcess.start({ installation, dataDir, logFile: join(directory, 'log'), user });
  try {
    const client = new pg.Client({ host: directory, port: PORT, user: 'postgres', database: 'postgres' });
    await client.connect();
    const { rows } = await client.query('SELECT count(*), sum(balance) FROM accounts');
    await client.query('CREATE TABLE written (x int)');
    await client.query('INSERT INTO written SELECT generate_series(1, 10000)');
    await client.query('CHECKPOINT');
    const { rows: written } = await client.query('SELECT count(*)::int AS n FROM written');
    assert.deepEqual(written, [{ n: 10000 }]);
    await client.query('DROP TABLE written');
    await client.end();
    assert.ok(await server.stop('fast', 30_000));
    return rows;
  } finally {
    server.kill();
  }
}

interface Wal {
  readonly startLsn: Lsn;
  readonly bytes: Buffer;
}

/** The WAL in pg_wal, from its start or from an LSN on. */
function readWal(recorded: RecordedWal, fromLsn?: Lsn): Wal {
  const files = readdirSync(recorded.directory)
    .map((name) => ({ name, startLsn: parseWalFileName(name)?.startLsn ?? -1 }))
    .filter(({ startLsn }) => startLsn >= (fromLsn === undefined ? 0 : segmentStart(fromLsn)))
    .sort((a, b) => a.startLsn - b.startLsn);
  const bytes = Buffer.concat(files.map(({ name }) => readFileSync(join(recorded.directory, name))));
  const first = files[0]!.startLsn;
  const startLsn = fromLsn ?? first;
  return { startLsn, bytes: bytes.subarray(startLsn - first) };
}

function readRecords(wal: Wal, version: PgVersion, prevLsn?: Lsn): WalRecord[] {
  const reader = new WalReader(wal.startLsn, version, prevLsn === undefined ? {} : { prevLsn });
  const records: WalRecord[] = [];
  const read = (): void => {
    for (const chunk of chunksOf(wal.bytes, [1, 50_000, 8191, 300_000])) {
      reader.push(reader.pushLsn, chunk);
      for (let record = reader.next(); record !== undefined; record = reader.next()) records.push(record);
    }
  };
  assert.throws(read, /record length 0$|page magic is 0x0/, 'the WAL ends before its last segment does');
  return records;
}

function describe(record: WalRecord): string {
  let images = 0;
  for (const block of record.blocks) images += block.imageLength;
  const blocks = record.blocks.map(describeBlock).join('');
  const lengths = `${record.totalLength - images}/${record.totalLength}`;
  return `${rmgrName(record.rmid)} ${lengths} ${record.xid} ${paddedLsn(record.startLsn)} ${paddedLsn(record.prevLsn)}${blocks}`;
}

function describeBlock(block: WalBlock): string {
  const image = block.hasImage ? (block.applyImage ? ' image' : ' image to check') : '';
  return ` #${block.id} ${block.spc}/${block.db}/${block.rel} ${forkName(block.fork)} ${block.blk}${image}`;
}

function runWaldump(waldump: string, recorded: RecordedWal, startLsn: Lsn, endLsn: Lsn): string[] {
  const text = execFileSync(
    waldump,
    ['-p', recorded.directory, '-s', formatLsn(startLsn + 40), '-e', formatLsn(endLsn)],
    {
      encoding: 'utf8',
      maxBuffer: 2 ** 30,
      stdio: ['ignore', 'pipe', 'ignore'],
    },
  );
  const lines = text.split('\n').filter((line) => line !== '');
  return lines.map((line) => {
    const head = /^rmgr: (\S+)\s+len \(rec\/tot\):\s+(\d+)\/\s*(\d+), tx:\s+(\d+), lsn: (\S+), prev (\S+),/.exec(line);
    assert.ok(head !== null, line);
    const blocks = line.matchAll(
      /blkref #(\d+): rel (\d+\/\d+\/\d+) (?:fork (\w+) )?blk (\d+)( \(?FPW( for WAL verification)?\)?)?/g,
    );
    const texts = [...blocks].map((block) => {
      const image = block[5] === undefined ? '' : block[6] === undefined ? ' image' : ' image to check';
      return ` #${block[1]} ${block[2]} ${block[3] ?? 'main'} ${block[4]}${image}`;
    });
    return `${head[1]} ${head[2]}/${head[3]} ${head[4]} ${head[5]} ${head[6]}${texts.join('')}`;
  });
}

/** pg_waldump pads the low half. */
function paddedLsn(lsn: Lsn): string {
  return `${lsnHigh(lsn).toString(16).toUpperCase()}/${lsnLow(lsn).toString(16).toUpperCase().padStart(8, '0')}`;
}
