import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { WalBuffer } from './wal-buffer.ts';

test('what was appended and not let go of can be seen, and what is in use stays as it is, whatever the pieces', () => {
  const step = fc.oneof(
    fc.record({ kind: fc.constant('append' as const), length: fc.integer({ min: 0, max: 400_000 }) }),
    fc.record({
      kind: fc.constant('trim' as const),
      share: fc.double({ min: 0, max: 1, noNaN: true }),
      unusedShare: fc.double({ min: 0, max: 1, noNaN: true }),
    }),
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 12 }), (steps) => {
      const startLsn = 12_345;
      const buffer = new WalBuffer(startLsn);
      let all = Buffer.alloc(0);
      let inUse: { readonly lsn: number; readonly view: Buffer }[] = [];
      for (const [index, action] of steps.entries()) {
        if (action.kind === 'append') {
          const bytes = Buffer.alloc(action.length, index + 1);
          buffer.append(bytes);
          all = Buffer.concat([all, bytes]);
        } else {
          const { startLsn: from, endLsn: to } = buffer;
          const unusedLsn = startLsn + Math.floor((to - startLsn) * action.unusedShare);
          inUse = inUse.filter(({ lsn, view }) => lsn + view.length > unusedLsn);
          buffer.trim(from + Math.floor((to - from) * action.share), unusedLsn);
        }
        assert.equal(buffer.endLsn, startLsn + all.length);
        for (let lsn = buffer.startLsn; lsn < buffer.endLsn;) {
          const view = buffer.view(lsn);
          assert(view.length > 0);
          assert(view.equals(all.subarray(lsn - startLsn, lsn - startLsn + view.length)));
          inUse.push({ lsn, view });
          lsn += view.length;
        }
        for (const { lsn, view } of inUse) {
          assert(view.equals(all.subarray(lsn - startLsn, lsn - startLsn + view.length)));
        }
      }
    }),
    { numRuns: 100 },
  );
});

test('bytes are copied: the caller may use its memory again', () => {
  const buffer = new WalBuffer(0);
  const bytes = Buffer.from('abc');
  buffer.append(bytes);
  bytes.fill(0);
  assert.equal(buffer.view(0).toString(), 'abc');
});

test('a block of which no view is used any more is used anew, others are not', () => {
  const block = 256 * 1024;
  const buffer = new WalBuffer(0);
  buffer.append(Buffer.alloc(3 * block, 1));
  const memory = [0, 1, 2].map((index) => buffer.view(index * block).buffer);
  buffer.trim(2 * block, block);
  buffer.append(Buffer.alloc(2 * block, 2));
  assert.equal(buffer.view(3 * block).buffer, memory[0]);
  assert(!memory.includes(buffer.view(4 * block).buffer));
});
