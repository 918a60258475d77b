import assert from 'node:assert/strict';
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { crc32c } from '../base/crc32c.ts';
import {
  CONTROL_FILE_NAME,
  type ControlFile,
  decodeControlFile,
  encodeControlFile,
  readControlFile,
  writeControlFile,
} from './control-file.ts';

const control: Extract<ControlFile, { kind: 'timeline' }> = {
  kind: 'timeline',
  identity: {
    tenantId: 'a'.repeat(32),
    timelineId: 'b'.repeat(32),
    startLsn: 0x1528a68,
    pgVersion: 17,
    systemId: '18446744073709551615',
  },
  acceptor: {
    term: 3,
    history: [{ term: 0, startLsn: 0x1528a68 }],
    commitLsn: 0x1528a68,
    generation: 1,
    configuration: { version: 2, members: [1], newMembers: [1, 2, 3] },
  },
};

test('a control file has the bytes that its header describes', () => {
  const bytes = encodeControlFile({ kind: 'deleted', tenantId: '0', timelineId: '1' });
  const payload = '{"kind":"deleted","tenantId":"0","timelineId":"1"}';
  const head = Buffer.from('STRATASK\x03\x00\x00\x00\x32\x00\x00\x00', 'latin1');
  assert.deepEqual(bytes.subarray(0, -4), Buffer.concat([head, Buffer.from(payload)]));
  assert.equal(bytes.readUInt32LE(bytes.length - 4), crc32c(bytes, 0, bytes.length - 4));
});

test('what was encoded is decoded', () => {
  assert.deepEqual(decodeControlFile(encodeControlFile(control)), control);
});

test('what older versions did not have is read as nothing', () => {
  const { configuration, ...acceptor } = control.acceptor;
  assert(configuration.version > 0);
  const bytes = encodeControlFile({ ...control, acceptor: acceptor as typeof control.acceptor });
  bytes.writeUInt32LE(2, 8);
  bytes.writeUInt32LE(crc32c(bytes, 0, bytes.length - 4), bytes.length - 4);
  const decoded = decodeControlFile(bytes);
  assert(decoded.kind === 'timeline');
  assert.deepEqual(decoded.acceptor.configuration, { version: 0, members: [] });
});

test('any flipped byte and any other length is refused', () => {
  const bytes = encodeControlFile(control);
  for (let at = 0; at < bytes.length; at++) {
    const damaged = Buffer.from(bytes);
    damaged[at]! ^= 0x10;
    assert.throws(() => decodeControlFile(damaged), /control file/, `byte ${at}`);
    assert.throws(() => decodeControlFile(bytes.subarray(0, at)), /control file/, `${at} bytes`);
  }
});

test('a file is replaced as a whole; an unfinished replacement changes nothing', async (context) => {
  const directory = await mkdtemp(join(tmpdir(), 'strata-control-'));
  context.after(() => rm(directory, { recursive: true }));
  assert.equal(await readControlFile(directory), undefined);
  await writeControlFile(directory, control);
  await writeFile(join(directory, `${CONTROL_FILE_NAME}.partial`), 'torn');
  assert.deepEqual(await readControlFile(directory), control);
  await writeControlFile(directory, { kind: 'deleted', tenantId: 'a', timelineId: 'b' });
  assert.equal((await readControlFile(directory))?.kind, 'deleted');
  assert.deepEqual(await readdir(directory), [CONTROL_FILE_NAME]);
});
