import { test } from 'node:test';

import { assertReplays } from '../../../test/redo/check-replay.ts';
import { hashWorkload } from '../../../test/redo/hash-workload.ts';
import { RM_HASH } from '../../postgres/rmgr.ts';
import { maskHash, redoHash } from './hash.ts';

test('every type of hash record replays to the bytes that Postgres made', async () => {
  await assertReplays(RM_HASH, { redo: redoHash, mask: maskHash }, hashWorkload);
});
