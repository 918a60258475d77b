import { test } from 'node:test';

import { assertReplays } from '../../../test/redo/check-replay.ts';
import { brinWorkload } from '../../../test/redo/brin-workload.ts';
import { RM_BRIN } from '../../postgres/rmgr.ts';
import { maskBrin, redoBrin } from './brin.ts';

test('every type of brin record replays to the bytes that Postgres made', async () => {
  await assertReplays(RM_BRIN, { redo: redoBrin, mask: maskBrin }, brinWorkload);
});
