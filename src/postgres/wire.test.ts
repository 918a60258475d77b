import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import {
  cstring,
  decodeErrorResponse,
  decodeStartupPacket,
  encodeCancelRequest,
  encodeErrorResponse,
  encodeMessage,
  encodeSslRequest,
  encodeStartupPacket,
  MessageReader,
  PROTOCOL_3_0,
  ProtocolError,
  startupPacketLength,
} from './wire.ts';

test('a startup packet has the bytes that libpq sends', () => {
  const packet = encodeStartupPacket(
    new Map([
      ['user', 'ann'],
      ['database', 'shop'],
    ]),
  );
  assert.equal(packet.toString('latin1'), '\0\0\0\x20\0\x03\0\0user\0ann\0database\0shop\0\0');
  assert.equal(startupPacketLength(packet), packet.length);
  const decoded = decodeStartupPacket(packet);
  assert.ok(decoded.kind === 'startup');
  assert.equal(decoded.protocol, PROTOCOL_3_0);
  assert.deepEqual(
    [...decoded.parameters],
    [
      ['user', 'ann'],
      ['database', 'shop'],
    ],
  );
});

test('encryption and cancel requests are told apart', () => {
  assert.equal(encodeSslRequest().toString('hex'), '0000000804d2162f');
  assert.deepEqual(decodeStartupPacket(encodeSslRequest()), { kind: 'ssl-request' });
  assert.deepEqual(decodeStartupPacket(Buffer.from('0000000804d21630', 'hex')), { kind: 'gssenc-request' });
  const secretKey = Buffer.from('cafe0001', 'hex');
  const cancel = encodeCancelRequest(4711, secretKey);
  assert.equal(cancel.toString('hex'), '0000001004d2162e00001267cafe0001');
  assert.deepEqual(decodeStartupPacket(cancel), { kind: 'cancel', processId: 4711, secretKey });
  const long = Buffer.alloc(256, 7);
  assert.deepEqual(decodeStartupPacket(encodeCancelRequest(1, long)), {
    kind: 'cancel',
    processId: 1,
    secretKey: long,
  });
});

test('startup packets that are none are refused', () => {
  const refused = [
    '00000007', // too short
    '7fffffff', // too long
    '00000008000300ff'.replace('ff', ''), // shorter than it says
    '0000000800030000', // no end of the parameters
    '0000000a00030000' + '7500', // a name without a value
    '0000000a00030000' + '0000', // bytes after the end
    '000000090002000000', // protocol 2
    '0000000c04d2162f00000000', // an encryption request with more in it
    '0000000c04d2162e00000001', // a cancel request without a key
  ];
  for (const hex of refused) assert.throws(() => decodeStartupPacket(Buffer.from(hex, 'hex')), ProtocolError, hex);
  assert.equal(startupPacketLength(Buffer.alloc(3)), undefined);
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 60 }), fc.constantFrom(196608, 196610, 80877102, 80877103), (body, code) => {
      const bytes = Buffer.concat([Buffer.alloc(8), body]);
      bytes.writeUInt32BE(bytes.length, 0);
      bytes.writeUInt32BE(code, 4);
      try {
        decodeStartupPacket(bytes);
      } catch (error) {
        assert.ok(error instanceof ProtocolError, String(error));
      }
    }),
  );
  assert.throws(() => encodeStartupPacket(new Map([['user', 'a\0b']])), ProtocolError);
});

test('messages come out whole however the stream is cut', () => {
  const message = fc.record(
    { type: fc.constantFrom('Q', 'd', 'R', 'Z'), payload: fc.uint8Array({ maxLength: 400 }) },
    { noNullPrototype: true },
  );
  fc.assert(
    fc.property(fc.array(message), fc.array(fc.integer({ min: 1, max: 100 }), { minLength: 1 }), (messages, cuts) => {
      const stream = Buffer.concat(messages.map(({ type, payload }) => encodeMessage(type, Buffer.from(payload))));
      const reader = new MessageReader();
      const found: { type: string; payload: Uint8Array }[] = [];
      for (let at = 0, i = 0; at < stream.length; at += cuts[i++ % cuts.length]!) {
        reader.push(stream.subarray(at, at + cuts[i % cuts.length]!));
        for (let next = reader.next(); next !== undefined; next = reader.next()) {
          found.push({ type: next.type, payload: Uint8Array.from(next.payload) });
        }
      }
      assert.deepEqual(found, messages);
      assert.equal(reader.bufferedBytes, 0);
    }),
  );
});

test('a message longer than allowed is refused before it is held', () => {
  const reader = new MessageReader(1000);
  reader.push(Buffer.from('51000003e9', 'hex'));
  assert.throws(() => reader.next(), ProtocolError);
  const short = new MessageReader();
  short.push(Buffer.from('5100000003', 'hex'));
  assert.throws(() => short.next(), ProtocolError);
});

test('a relay gets the bytes that were not looked at', () => {
  const reader = new MessageReader();
  reader.push(Buffer.concat([encodeMessage('Z', 'I'), Buffer.from('Q\0')]));
  assert.equal(reader.next()?.type, 'Z');
  assert.equal(reader.next(), undefined);
  assert.equal(reader.takeRest().toString('latin1'), 'Q\0');
  assert.equal(reader.takeRest().length, 0);
});

test('an error has the fields that drivers read', () => {
  const error = {
    severity: 'FATAL',
    code: '57P03',
    message: 'the endpoint is starting',
    detail: undefined,
    hint: 'try again',
  };
  const bytes = encodeErrorResponse(error);
  assert.equal(bytes.toString('latin1', 5), 'SFATAL\0VFATAL\0C57P03\0Mthe endpoint is starting\0Htry again\0\0');
  assert.equal(bytes.readUInt32BE(1), bytes.length - 1);
  assert.deepEqual(decodeErrorResponse(bytes.subarray(5)), error);
  assert.throws(() => decodeErrorResponse(Buffer.from('Mno end')), ProtocolError);
  assert.equal(cstring('é').toString('hex'), 'c3a900');
});
