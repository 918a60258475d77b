/**
 * WAL for the questions about decoding and redo, written by a throw-away Postgres: single-row statements of many kinds, as an application
 * makes them, and pages that are changed a thousand times.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseWalFileName, segmentStart, type Lsn } from '../src/postgres/lsn.ts';
import type { PgVersion } from '../src/postgres/version.ts';
import { recordWal } from '../test/redo/recorded-wal.ts';

export interface BenchedWal {
  readonly version: PgVersion;
  readonly startLsn: Lsn;
  /** From startLsn on. */
  readonly bytes: Buffer;
}

export async function benchedWal(options: {
  readonly transactions: number;
  readonly images: boolean;
}): Promise<BenchedWal> {
  const settings = [
    "wal_consistency_checking = ''",
    `full_page_writes = ${options.images ? 'on' : 'off'}`,
    'track_commit_timestamp = off',
    'synchronous_commit = off',
  ];
  using wal = await recordWal(
    async ({ sql }) => {
      await sql(
        'CREATE TABLE accounts (id int PRIMARY KEY, branch int, balance int, filler char(84)) WITH (fillfactor = 90)',
      );
      await sql("INSERT INTO accounts SELECT i, i % 10, 0, '' FROM generate_series(1, 100000) AS i");
      await sql('CREATE TABLE history (id int, account int, delta int, at timestamptz)');
      await sql('CREATE INDEX history_account ON history (account)');
      await sql('CREATE TABLE counter (n int)');
      await sql('INSERT INTO counter VALUES (0)');
      await sql('CREATE TABLE alike (k int)');
      await sql('CREATE INDEX alike_k ON alike (k)');
      await sql('CREATE SEQUENCE ids');
      await sql('CHECKPOINT');
      await sql(`
        CREATE PROCEDURE work(count int) LANGUAGE plpgsql AS $$
        BEGIN
          FOR i IN 1..count LOOP
            UPDATE accounts SET balance = balance + 1 WHERE id = 1 + (i * 7919) % 100000;
            INSERT INTO history VALUES (i, (i * 7919) % 100000, 1, now());
            IF i % 4 = 0 THEN
              UPDATE counter SET n = n + 1;
              INSERT INTO alike VALUES (1);
              COMMIT;
            END IF;
          END LOOP;
        END $$`);
      await sql(`CALL work(${options.transactions})`);
    },
    { settings: settings.join('\n') },
  );
  const first = segmentStart(wal.startLsn);
  const names = readdirSync(wal.directory).filter((name) => (parseWalFileName(name)?.startLsn ?? -1) >= first);
  const segments = names.sort().map((name) => readFileSync(join(wal.directory, name)));
  return {
    version: wal.version,
    startLsn: wal.startLsn,
    bytes: Buffer.concat(segments).subarray(wal.startLsn - first),
  };
}
