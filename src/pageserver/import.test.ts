import assert from 'node:assert/strict';
import { existsSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';

import { Cluster } from '../../test/ingest/cluster.ts';
import { crc32c } from '../base/crc32c.ts';
import {
  CONTROL_FILE_PATH,
  DB_IN_PRODUCTION,
  DB_SHUTDOWNED_IN_RECOVERY,
  decodeControlFile,
  encodeControlFile,
} from '../postgres/control-file.ts';
import type { ControlFile } from '../postgres/control-file.ts';
import { importDataDirectory } from './import.ts';
import { ImportError, inspectDataDirectory } from './import-check.ts';
import { KEY_KIND, compareKeys } from './key.ts';
import type { Key } from './key.ts';

const cluster = new Cluster();

before(() => cluster.initdb());
after(() => cluster[Symbol.asyncDispose]());

test('a fresh cluster is imported in the order of keys, each once, at the end of its checkpoint', async () => {
  const keys: Key[] = [];
  const sizes = new Map<string, number>();
  let drains = 0;
  const imported = await importDataDirectory(cluster.dataDir, {
    put(key, image) {
      keys.push(key);
      const fork = `${key.spc}/${key.db}/${key.rel}/${key.fork}`;
      if (key.kind === KEY_KIND.relationSize) sizes.set(fork, Buffer.from(image).readUInt32LE(0));
      if (key.kind === KEY_KIND.relationBlock) {
        assert.equal(image.length, 8192);
        assert.ok(key.blk < sizes.get(fork)!, `block ${key.blk} of ${fork}`);
      }
    },
    drain() {
      drains++;
      return Promise.resolve();
    },
  });
  for (let i = 1; i < keys.length; i++) assert.ok(compareKeys(keys[i - 1]!, keys[i]!) < 0);
  const control = decodeControlFile(readFileSync(join(cluster.dataDir, CONTROL_FILE_PATH)));
  assert.equal(imported.recordStartLsn, control.checkPoint);
  assert.equal(imported.lsn, control.checkPoint + 120);
  assert.equal(imported.systemId, control.systemId);
  assert.deepEqual(inspectDataDirectory(cluster.dataDir), imported);
  assert.ok(keys.length > 2000 && drains > 30);
  for (const kind of Object.values(KEY_KIND)) {
    assert.equal(
      keys.some((key) => key.kind === kind),
      kind !== KEY_KIND.twoPhase,
      `kind ${kind}`,
    );
  }
});

test('what cannot be imported is refused with the reason and the next step', async () => {
  const path = join(cluster.dataDir, CONTROL_FILE_PATH);
  const original = readFileSync(path);
  const sink = { put: () => {}, drain: () => Promise.resolve() };
  const refusedNow = (reason: RegExp): Promise<void> =>
    assert.rejects(importDataDirectory(cluster.dataDir, sink), (error) => {
      return error instanceof ImportError && reason.test(error.message);
    });
  const refused = async (change: Partial<ControlFile>, reason: RegExp): Promise<void> => {
    writeFileSync(path, encodeControlFile({ ...decodeControlFile(original), ...change }));
    await refusedNow(reason).finally(() => writeFileSync(path, original));
  };
  const refusedWith = async (name: string, content: string | Buffer, reason: RegExp): Promise<void> => {
    const file = join(cluster.dataDir, name);
    const before = existsSync(file) ? readFileSync(file) : undefined;
    writeFileSync(file, content);
    await refusedNow(reason);
    if (before === undefined) rmSync(file);
    else writeFileSync(file, before);
  };
  await refused({ state: DB_IN_PRODUCTION }, /was not stopped cleanly .*state 6.*: start it once .*pg_ctl stop/);
  await refused({ state: DB_SHUTDOWNED_IN_RECOVERY }, /is a standby: promote it/);
  await refused({ dataChecksumVersion: 1 }, /base\/1\/\d+ is damaged: block 0 does not have its checksum/);
  await refusedWith('PG_VERSION', '14\n', /is of Postgres 14; data directories of 15, 16, 17, 18 .*--from/);
  await refusedWith('postmaster.pid', `${process.pid}\n`, /a Postgres runs on .* stop it first/);
  await refusedWith('postmaster.pid', '4194304\n', /postmaster.pid of process 4194304, which is gone/);
  await refusedWith('backup_label', 'START WAL LOCATION', /has a file backup_label/);
  await refusedWith('base/1/112', Buffer.alloc(1000), /base\/1\/112 does not consist of whole pages/);
  const damaged = Buffer.from(original);
  damaged[100]! ^= 1;
  await refusedWith(CONTROL_FILE_PATH, damaged, /control file has CRC/);
  const otherSegments = Buffer.from(original);
  otherSegments.writeUInt32LE(64 << 20, 228);
  const crcAt = cluster.version >= 18 ? 292 : 288;
  otherSegments.writeUInt32LE(crc32c(otherSegments, 0, crcAt), crcAt);
  await refusedWith(CONTROL_FILE_PATH, otherSegments, /WAL segment size is 67108864 in this build/);
  const tablespace = join(cluster.dataDir, 'pg_tblspc', '16999');
  symlinkSync('/somewhere/fast', tablespace);
  await refused({}, /tablespaces of its own \(16999 in \/somewhere\/fast\).* SET TABLESPACE/);
  rmSync(tablespace);
  assert.throws(() => inspectDataDirectory('/nowhere'), /there is no directory \/nowhere/);
  assert.throws(() => inspectDataDirectory(join(cluster.dataDir, 'base')), /is no data directory of Postgres/);
  inspectDataDirectory(cluster.dataDir);
});
