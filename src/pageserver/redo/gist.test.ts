import { test } from 'node:test';

import { assertReplays } from '../../../test/redo/check-replay.ts';
import { gistWorkload } from '../../../test/redo/gist-workload.ts';
import { RM_GIST } from '../../postgres/rmgr.ts';
import { maskGist, redoGist, redoGistOnImage } from './gist.ts';

test('every type of gist record replays to the bytes that Postgres made', async () => {
  await assertReplays(RM_GIST, { redo: redoGist, mask: maskGist, redoOnImage: redoGistOnImage }, gistWorkload, [
    'Gist/ASSIGN_LSN',
  ]);
});
