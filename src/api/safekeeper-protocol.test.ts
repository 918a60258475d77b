import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { FrameReader } from '../base/frames.ts';
import type { AcceptorMessage, ProposerMessage } from '../consensus/messages.ts';
import {
  decodeAcceptorMessage,
  decodeGreetingReply,
  decodeHello,
  decodeProgress,
  decodeProposerMessage,
  decodeWal,
  encodeAcceptorMessage,
  encodeAppendHead,
  encodeGreetingReply,
  type GreetingReply,
  encodeHello,
  encodeProgress,
  encodeProposerMessage,
  encodeWalHead,
} from './safekeeper-protocol.ts';

function frame(...bytes: Buffer[]): { type: number; payload: Buffer } {
  const reader = new FrameReader();
  reader.push(Buffer.concat(bytes));
  const found = reader.next();
  assert(found !== undefined && reader.next() === undefined, 'one whole frame');
  return found;
}

const plain = { noNullPrototype: true };
const u64 = fc.integer({ min: 0, max: Number.MAX_SAFE_INTEGER });
const u32 = fc.nat({ max: 0xffffffff });
/** Terms and LSNs in order. */
const history = fc
  .array(fc.record({ term: u64, startLsn: u64 }, plain), { minLength: 1, maxLength: 20 })
  .map((entries) => {
    const terms = [...new Set(entries.map(({ term }) => term))].sort((a, b) => a - b);
    const lsns = entries.map(({ startLsn }) => startLsn).sort((a, b) => a - b);
    return terms.map((term, index) => ({ term, startLsn: lsns[index]! }));
  });
const nodeIds = fc.array(u32, { maxLength: 7 });
const configuration = fc.oneof(
  fc.record({ version: u32, members: nodeIds }, plain),
  fc.record({ version: u32, members: nodeIds, newMembers: nodeIds }, plain),
);
const bytes = fc.uint8Array({ maxLength: 300 }).map((array) => Buffer.from(array));

test('an append has the bytes that the table of frames describes', () => {
  const message = {
    kind: 'append',
    term: 3,
    beginLsn: 0x1_0000_0008,
    commitLsn: 0xff,
    bytes: Buffer.from('wal'),
  } as const;
  assert.equal(
    Buffer.concat([encodeAppendHead(message), message.bytes]).toString('hex'),
    '1b0000000f' + '0300000000000000' + '0800000001000000' + 'ff00000000000000' + '77616c',
  );
});

test('what proposers send is decoded as it was encoded', () => {
  const messages: fc.Arbitrary<ProposerMessage> = fc.oneof(
    fc.record({ kind: fc.constant('vote' as const), term: u64, generation: u32, configuration }, plain),
    fc.record({ kind: fc.constant('renew' as const), term: u64, generation: u32, configuration }, plain),
    fc.record({ kind: fc.constant('elected' as const), term: u64, startLsn: u64, history }, plain),
    fc.record({ kind: fc.constant('append' as const), term: u64, beginLsn: u64, commitLsn: u64, bytes }, plain),
  );
  fc.assert(
    fc.property(messages, (message) => {
      const encoded =
        message.kind === 'append' ? [encodeAppendHead(message), message.bytes] : [encodeProposerMessage(message)];
      const { type, payload } = frame(...encoded);
      assert.deepEqual(decodeProposerMessage(type, payload), message);
    }),
  );
});

test('what acceptors send is decoded as it was encoded', () => {
  const messages: fc.Arbitrary<AcceptorMessage> = fc.oneof(
    fc.record(
      {
        kind: fc.constant('vote-reply' as const),
        term: u64,
        granted: fc.boolean(),
        isVoter: fc.boolean(),
        generation: u32,
        configuration,
        flushLsn: u64,
        commitLsn: u64,
        history,
      },
      plain,
    ),
    fc.record(
      {
        kind: fc.constant('append-reply' as const),
        term: u64,
        flushLsn: u64,
        writeLsn: u64,
        commitLsn: u64,
        generation: u32,
        configurationVersion: u32,
      },
      plain,
    ),
    fc.record({ kind: fc.constant('refusal' as const), term: u64, message: fc.string() }, plain),
    fc.record({ kind: fc.constant('term-notice' as const), term: u64 }, plain),
  );
  fc.assert(
    fc.property(messages, (message) => {
      const { type, payload } = frame(encodeAcceptorMessage(message));
      assert.deepEqual(decodeAcceptorMessage(type, payload), message);
    }),
  );
});

test('hello, greeting-reply, wal and progress are decoded as they were encoded', () => {
  assert.equal(decodeHello(frame(encodeHello('a.b.c')).payload), 'a.b.c');
  const joint = { version: 4, members: [1], newMembers: [1, 2, 3] };
  const none = { version: 0, members: [] };
  const replies: GreetingReply[] = [
    { kind: 'absent', nodeId: 7, incarnation: '00ff00112233aabb' },
    { kind: 'present', nodeId: 7, term: 9, generation: 3, configuration: joint, isBlank: false, hasLeader: true },
    { kind: 'present', nodeId: 7, term: 9, generation: 0, configuration: none, isBlank: true, hasLeader: false },
  ];
  for (const reply of replies) assert.deepEqual(decodeGreetingReply(frame(encodeGreetingReply(reply)).payload), reply);
  const wal = frame(encodeWalHead(80, 90, 3), Buffer.from('wal'));
  assert.deepEqual(decodeWal(wal.payload), { lsn: 80, commitLsn: 90, bytes: Buffer.from('wal') });
  const entries = [1, 2, 3].map((n) => ({
    tenantId: `${n}`.repeat(32),
    timelineId: 'ab'.repeat(16),
    commitLsn: n * 2 ** 40,
    flushLsn: n,
  }));
  assert.deepEqual(decodeProgress(frame(encodeProgress(entries)).payload), entries);
});

test('another protocol, another version and short frames are refused', () => {
  const hello = frame(encodeHello('token')).payload;
  const other = Buffer.from(hello);
  other.writeUInt16LE(9, 4);
  assert.throws(() => decodeHello(other), /version 9/);
  assert.throws(() => decodeHello(hello.subarray(0, 5)), /hello/);
  const elected = frame(
    encodeProposerMessage({ kind: 'elected', term: 1, startLsn: 8, history: [{ term: 0, startLsn: 8 }] }),
  );
  for (let length = 0; length < elected.payload.length; length++) {
    assert.throws(() => decodeProposerMessage(elected.type, elected.payload.subarray(0, length)), /frame has/);
  }
  assert.equal(decodeProposerMessage(99, hello), undefined);
});
