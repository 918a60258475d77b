import { test } from 'node:test';

import { assertReplays } from '../../../test/redo/check-replay.ts';
import { spgistWorkload } from '../../../test/redo/spgist-workload.ts';
import { RM_SPGIST } from '../../postgres/rmgr.ts';
import { maskSpgist, redoSpgist } from './spgist.ts';

test('every type of spgist record replays to the bytes that Postgres made', async () => {
  await assertReplays(RM_SPGIST, { redo: redoSpgist, mask: maskSpgist }, spgistWorkload);
});
