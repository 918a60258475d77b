import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ResponseMemory } from './response-memory.ts';

test('a response has the length that is asked for, and memory that nobody else has until it is given back', () => {
  const memory = new ResponseMemory();
  for (const count of [1, 2, 3, 16, 17, 64, 128, 255, 256]) {
    const first = memory.take(count);
    const second = memory.take(count);
    assert.equal(first.length, 16 + count * 8192);
    assert.notEqual(first.buffer, second.buffer);
    memory.giveBack(first, count);
    assert.equal(memory.take(count).buffer, first.buffer);
  }
});
