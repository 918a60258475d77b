import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import { silent } from '../../../test/pageserver/node.ts';
import { FileSystemStore } from '../../object-store/file-system-store.ts';
import { DeletionQueue } from './deletion-queue.ts';

test('what is added in the moment in which the last deletion is done is deleted too', async (context) => {
  const root = mkdtempSync(join(tmpdir(), 'strata-deletions-'));
  context.after(() => rmSync(root, { recursive: true }));
  const store = await FileSystemStore.open(root);
  for (let steps = 0; steps < 12; steps++) {
    for (const name of ['a', 'b']) await store.put(name, Buffer.from(name));
    const { promise: isAdded, resolve } = Promise.withResolvers<void>();
    let count = 0;
    const queue: DeletionQueue = new DeletionQueue(
      {
        store,
        log: silent,
        retryDelayMs: 5,
        onStep: () => {
          if (count++ > 0) return;
          let comes = Promise.resolve();
          for (let step = 0; step < steps; step++) comes = comes.then(() => {});
          void comes.then(() => {
            queue.add([{ kind: 'object', name: 'b' }]);
            resolve();
          });
        },
      },
      new AbortController().signal,
    );
    queue.add([{ kind: 'object', name: 'a' }]);
    await isAdded;
    await turn();
    await queue.settled();
    assert.equal(queue.length, 0, `after ${steps} steps`);
    assert.deepEqual((await store.list('')).objects, []);
  }
});
