import assert from 'node:assert/strict';
import { test } from 'node:test';

import { assertReplays } from '../../../test/redo/check-replay.ts';
import { gistWorkload } from '../../../test/redo/gist-workload.ts';
import { RM_GIST } from '../../postgres/rmgr.ts';
import { BLOCK_SIZE, pageInit } from '../../postgres/page.ts';
import { BKPBLOCK_SAME_REL, decodeWalRecord } from '../../postgres/wal/record.ts';
import { maskGist, redoGist, redoGistOnImage } from './gist.ts';

const method = { redo: redoGist, mask: maskGist, redoOnImage: redoGistOnImage, fileMask: maskAllButSplitState };

test('every type of gist record replays to the bytes that Postgres made', async () => {
  await assertReplays(RM_GIST, method, gistWorkload, { absent: ['Gist/ASSIGN_LSN'] });
});

test('the left half of a split that is restored from an image learns when the split was completed', () => {
  // PAGE_UPDATE with block 0 of relation 1663/5/16384 and, of the same, block 1; main data of 4 bytes.
  const bytes = Buffer.alloc(24 + 20 + 8 + 2 + 4);
  bytes.writeUInt32LE(bytes.length, 0);
  bytes[17] = RM_GIST;
  bytes.writeUInt32LE(1663, 28);
  bytes.writeUInt32LE(5, 32);
  bytes.writeUInt32LE(16384, 36);
  bytes[44] = 1;
  bytes[45] = BKPBLOCK_SAME_REL;
  bytes[52] = 255;
  bytes[53] = 4;
  const record = decodeWalRecord(bytes, 0x1_23456700, 0x1_23456740);
  const page = Buffer.alloc(BLOCK_SIZE);
  pageInit(page, 16);
  const special = BLOCK_SIZE - 16;
  page.writeUInt16LE(0x09, special + 12);

  assert.equal(redoGistOnImage(page, record, 0, 17), false);
  assert.equal(page.readUInt16LE(special + 12), 0x09);
  assert.equal(redoGistOnImage(page, record, 1, 17), true);
  assert.equal(page.readUInt16LE(special + 12), 0x01);
  assert.deepEqual([page.readUInt32LE(special), page.readUInt32LE(special + 4)], [0x1, 0x23456740]);
});

/** As maskGist, but the NSN and the flag that leads to the right half stay to be compared. */
function maskAllButSplitState(page: Buffer, blk: number): void {
  const special = page.readUInt16LE(16);
  const nsn = Buffer.from(page.subarray(special, special + 8));
  const followRight = page.readUInt16LE(special + 12) & 0x08;
  maskGist(page, blk, 17);
  nsn.copy(page, special);
  page.writeUInt16LE((page.readUInt16LE(special + 12) & ~0x08) | followRight, special + 12);
}
