import assert from 'node:assert/strict';
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';

import { Cluster } from '../../test/ingest/cluster.ts';
import { CONTROL_FILE_PATH, DB_IN_PRODUCTION, decodeControlFile, encodeControlFile } from '../postgres/control-file.ts';
import type { ControlFile } from '../postgres/control-file.ts';
import { ImportError, importDataDirectory, inspectDataDirectory } from './import.ts';
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
  assert.ok(keys.length > 2000 && drains > 100);
  for (const kind of Object.values(KEY_KIND)) {
    assert.equal(
      keys.some((key) => key.kind === kind),
      kind !== KEY_KIND.twoPhase,
      `kind ${kind}`,
    );
  }
});

test('what cannot be imported is refused with the reason', async () => {
  const path = join(cluster.dataDir, CONTROL_FILE_PATH);
  const original = readFileSync(path);
  const sink = { put: () => {}, drain: () => Promise.resolve() };
  const refused = async (change: Partial<ControlFile>, reason: RegExp): Promise<void> => {
    writeFileSync(path, encodeControlFile({ ...decodeControlFile(original), ...change }));
    try {
      await assert.rejects(importDataDirectory(cluster.dataDir, sink), (error) => {
        return error instanceof ImportError && reason.test(error.message);
      });
    } finally {
      writeFileSync(path, original);
    }
  };
  await refused({ state: DB_IN_PRODUCTION }, /was not stopped cleanly/);
  await refused({ dataChecksumVersion: 1 }, /has data checksums/);
  const tablespace = join(cluster.dataDir, 'pg_tblspc', '16999');
  mkdirSync(tablespace);
  await refused({}, /has tablespaces of its own/);
  rmSync(tablespace, { recursive: true });
});
