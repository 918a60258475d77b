import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import { FlushQueue } from './flush-queue.ts';
import type { FrozenLayer } from './flush-queue.ts';
import { MemoryLayer } from './layers/memory-layer.ts';

function frozen(lsn: number): FrozenLayer {
  return { layer: new MemoryLayer(lsn, 0), bulk: [], lastRecordLsn: lsn, lastRecordStartLsn: lsn - 8 };
}

test('a layer that comes in the moment in which the last one is done is written too', async () => {
  for (let steps = 0; steps < 12; steps++) {
    let count = 0;
    const queue: FlushQueue = new FlushQueue({
      write: async () => {
        await turn();
        queue.shift();
      },
      onFlush: () => {
        if (count++ > 0) return;
        let comes = Promise.resolve();
        for (let step = 0; step < steps; step++) comes = comes.then(() => {});
        void comes.then(() => queue.push(frozen(16)));
      },
      layersMax: 1,
    });
    queue.push(frozen(8));
    while (count === 0) await turn();
    for (let i = 0; i < 5; i++) await turn();
    assert.equal(queue.layers.length, 0, `after ${steps} steps`);
  }
});
