import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { WalBuffer } from './wal-buffer.ts';

test('what was appended and not let go of can be seen, whatever the pieces', () => {
  const step = fc.oneof(
    fc.record({ kind: fc.constant('append' as const), length: fc.integer({ min: 0, max: 400_000 }) }),
    fc.record({ kind: fc.constant('trim' as const), share: fc.double({ min: 0, max: 1, noNaN: true }) }),
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 12 }), (steps) => {
      const startLsn = 12_345;
      const buffer = new WalBuffer(startLsn);
      let all = Buffer.alloc(0);
      for (const [index, action] of steps.entries()) {
        if (action.kind === 'append') {
          const bytes = Buffer.alloc(action.length, index + 1);
          buffer.append(bytes);
          all = Buffer.concat([all, bytes]);
        } else {
          const { startLsn: from, endLsn: to } = buffer;
          buffer.trim(from + Math.floor((to - from) * action.share));
        }
        assert.equal(buffer.endLsn, startLsn + all.length);
        for (let lsn = buffer.startLsn; lsn < buffer.endLsn;) {
          const view = buffer.view(lsn);
          assert(view.length > 0);
          assert(view.equals(all.subarray(lsn - startLsn, lsn - startLsn + view.length)));
          lsn += view.length;
        }
      }
    }),
    { numRuns: 60 },
  );
});

test('bytes are copied: the caller may use its memory again', () => {
  const buffer = new WalBuffer(0);
  const bytes = Buffer.from('abc');
  buffer.append(bytes);
  bytes.fill(0);
  assert.equal(buffer.view(0).toString(), 'abc');
});
