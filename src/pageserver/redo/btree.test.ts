import assert from 'node:assert/strict';
import { test } from 'node:test';

import { btreeWorkload } from '../../../test/redo/btree-workload.ts';
import { assertReplays } from '../../../test/redo/check-replay.ts';
import { RM_BTREE } from '../../postgres/rmgr.ts';
import { decodeWalRecord } from '../../postgres/wal/record.ts';
import { maskBtree, redoBtree } from './btree.ts';
import { RedoError } from './redo-error.ts';

test('every type of btree record replays to the bytes that Postgres made', async () => {
  await assertReplays(RM_BTREE, { redo: redoBtree, mask: maskBtree }, btreeWorkload);
});

test('a btree record of no known type is refused by name and LSN', () => {
  // A record header, a reference to block 7 of relation 1663/5/16384, no data.
  const bytes = Buffer.alloc(44);
  bytes.writeUInt32LE(bytes.length, 0);
  bytes[16] = 0xf0;
  bytes[17] = RM_BTREE;
  bytes.writeUInt32LE(1663, 28);
  bytes.writeUInt32LE(5, 32);
  bytes.writeUInt32LE(16384, 36);
  bytes.writeUInt32LE(7, 40);
  const record = decodeWalRecord(bytes, 0x1234568, 0x1234598);
  assert.throws(
    () => redoBtree(Buffer.alloc(8192), record, 0, 17),
    (error) => error instanceof RedoError && error.message.includes('Btree/0xf0 at 0/1234568'),
  );
});
