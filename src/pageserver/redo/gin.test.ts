import { test } from 'node:test';

import { assertReplays } from '../../../test/redo/check-replay.ts';
import { ginWorkload } from '../../../test/redo/gin-workload.ts';
import { RM_GIN } from '../../postgres/rmgr.ts';
import { maskGin, redoGin } from './gin.ts';

test('every type of gin record replays to the bytes that Postgres made', async () => {
  await assertReplays(RM_GIN, { redo: redoGin, mask: maskGin }, ginWorkload);
});
