import { test } from 'node:test';

import { assertReplays } from '../../../test/redo/check-replay.ts';
import { genericWorkload } from '../../../test/redo/generic-workload.ts';
import { RM_GENERIC } from '../../postgres/rmgr.ts';
import { maskGeneric, redoGeneric } from './generic.ts';

test('generic records replay to the bytes that Postgres made', async () => {
  await assertReplays(RM_GENERIC, { redo: redoGeneric, mask: maskGeneric }, genericWorkload);
});
