import assert from 'node:assert/strict';
import fc from 'fast-check';
import { test } from 'node:test';
import { encodeFrame, FrameReader } from './frames.ts';

const STREAMED = 7;

test('frames are read as they were written, however the stream is cut, whole or in parts', () => {
  const frames = fc.array(
    fc.record({ type: fc.constantFrom(1, STREAMED), payload: fc.uint8Array({ maxLength: 300 }) }),
  );
  fc.assert(
    fc.property(frames, fc.array(fc.integer({ min: 1, max: 90 }), { minLength: 1 }), (written, cuts) => {
      const stream = Buffer.concat(written.map(({ type, payload }) => encodeFrame(type, payload)));
      const reader = new FrameReader();
      const read: { type: number; payload: Buffer }[] = [];
      let left = 0;
      for (let at = 0, cut = 0; at < stream.length; cut++) {
        const length = cuts[cut % cuts.length]!;
        reader.push(stream.subarray(at, at + length));
        at += length;
        for (let isDone = false; !isDone;) {
          const last = read.at(-1);
          const rest = left > 0 ? reader.rest(left) : undefined;
          if (left > 0 && rest === undefined) break;
          if (rest !== undefined) {
            last!.payload = Buffer.concat([last!.payload, rest]);
            left -= rest.length;
            continue;
          }
          const whole = reader.next();
          const partial = whole === undefined ? reader.nextPartial(STREAMED, 10) : undefined;
          if (whole !== undefined) read.push({ type: whole.type, payload: Buffer.from(whole.payload) });
          if (partial !== undefined) {
            assert(partial.payload.length >= 10 && partial.leftBytes > 0);
            read.push({ type: STREAMED, payload: Buffer.from(partial.payload) });
            left = partial.leftBytes;
          }
          isDone = whole === undefined && partial === undefined;
        }
      }
      assert.equal(left, 0);
      assert.deepEqual(
        read.map(({ type, payload }) => [type, payload.toString('hex')]),
        written.map(({ type, payload }) => [type, Buffer.from(payload).toString('hex')]),
      );
    }),
  );
});
