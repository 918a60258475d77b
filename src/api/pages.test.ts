import assert from 'node:assert/strict';
import { createServer, type AddressInfo, type Socket } from 'node:net';
import { test } from 'node:test';
import {
  decodeHelloReply,
  decodePageHello,
  decodePageRequest,
  decodePageResponse,
  encodeHelloReply,
  encodePageError,
  encodePageHello,
  encodePageRequest,
  encodePagesHeader,
  PAGE_REQUEST_BYTES,
  PageClient,
  type PageRange,
} from './pages.ts';

const hello = { token: 'a token', timelineId: '00112233445566778899aabbccddeeff' };
const range: PageRange = { lsn: 0x1_2345_6789, spc: 1663, db: 5, rel: 16384, fork: 2, blk: 7, count: 3 };

test('a hello is these bytes, and is read back from its first part on', () => {
  const bytes = encodePageHello(hello);
  assert.equal(bytes.toString('hex', 0, 8), '5354525001000700');
  assert.equal(bytes.toString('latin1', 8), `a token${hello.timelineId}`);
  for (let length = 0; length < bytes.length; length++)
    assert.equal(decodePageHello(bytes.subarray(0, length)), undefined);
  assert.deepEqual(decodePageHello(Buffer.concat([bytes, Buffer.from('more')])), { value: hello, bytes: bytes.length });
});

test('what is no hello is refused', () => {
  const bytes = encodePageHello(hello);
  for (const at of [0, 4, bytes.length - 1]) {
    const damaged = Buffer.from(bytes);
    damaged[at] = 0x7a;
    assert.throws(() => decodePageHello(damaged), { code: 'bad-request' });
  }
});

test('a request is these 40 bytes', () => {
  const bytes = encodePageRequest({ ...range, requestId: 9 });
  assert.equal(
    bytes.toString('hex'),
    '01000000' +
      '09000000' +
      '8967452301000000' +
      '7f060000' +
      '05000000' +
      '00400000' +
      '02000000' +
      '07000000' +
      '03000000',
  );
  assert.deepEqual(decodePageRequest(Buffer.concat([Buffer.alloc(3), bytes]), 3), { ...range, requestId: 9 });
  assert.equal(decodePageRequest(bytes, 1), undefined);
});

test('an impossible request is refused', () => {
  for (const change of [{ count: 0 }, { count: 257 }, { fork: 4 }, { blk: 0xffff_ffff, count: 1 }]) {
    assert.throws(() => decodePageRequest(encodePageRequest({ ...range, ...change, requestId: 1 }), 0), {
      code: 'bad-request',
    });
  }
  const unknown = encodePageRequest({ ...range, requestId: 1 });
  unknown[0] = 2;
  assert.throws(() => decodePageRequest(unknown, 0), { code: 'bad-request' });
});

test('responses and replies are read back; lengths that cannot be are refused', () => {
  const pages = Buffer.alloc(2 * 8192, 5);
  const bytes = Buffer.concat([encodePagesHeader(4, pages.length), pages]);
  assert.equal(bytes.toString('hex', 0, 16), '04000000000000000040000000000000');
  assert.equal(decodePageResponse(bytes.subarray(0, -1)), undefined);
  assert.deepEqual(decodePageResponse(bytes), { value: { kind: 'pages', requestId: 4, pages }, bytes: bytes.length });
  const error = encodePageError(4, 'no such relation');
  assert.deepEqual(decodePageResponse(error), {
    value: { kind: 'error', requestId: 4, message: 'no such relation' },
    bytes: error.length,
  });
  assert.throws(() => decodePageResponse(encodePagesHeader(4, 8193)));
  for (const reply of [{ kind: 'welcome' } as const, { kind: 'refused', message: 'unknown token' } as const]) {
    const encoded = encodeHelloReply(reply);
    assert.equal(decodeHelloReply(encoded.subarray(0, -1)), undefined);
    assert.deepEqual(decodeHelloReply(encoded), { value: reply, bytes: encoded.length });
  }
});

/** Answers each request with pages filled with its first block's number; block 13 is an error, block 14 ends the connection. */
async function serve(): Promise<{ port: number; close: () => void }> {
  const server = createServer((socket: Socket) => {
    let received: Buffer = Buffer.alloc(0);
    let greeted = false;
    socket.on('error', () => {});
    socket.on('data', (chunk: Buffer) => {
      received = Buffer.concat([received, chunk]);
      if (!greeted) {
        const decoded = decodePageHello(received);
        if (decoded === undefined) return;
        received = received.subarray(decoded.bytes);
        greeted = true;
        if (decoded.value.token !== hello.token) {
          socket.end(encodeHelloReply({ kind: 'refused', message: 'unknown token' }));
          return;
        }
        socket.write(encodeHelloReply({ kind: 'welcome' }));
      }
      for (
        let request;
        (request = decodePageRequest(received, 0)) !== undefined;
        received = received.subarray(PAGE_REQUEST_BYTES)
      ) {
        if (request.blk === 14) socket.destroy();
        else if (request.blk === 13) socket.write(encodePageError(request.requestId, 'unlucky'));
        else {
          socket.write(encodePagesHeader(request.requestId, request.count * 8192));
          socket.write(Buffer.alloc(request.count * 8192, request.blk));
        }
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { port: (server.address() as AddressInfo).port, close: () => server.close() };
}

test('a client has many requests under way; an error is one request, a lost connection is all', async () => {
  const server = await serve();
  const client = await PageClient.connect({ ...hello, host: '127.0.0.1', port: server.port });
  const answers = await Promise.all([1, 2, 3, 4].map((blk) => client.getPages({ ...range, blk, count: 200 })));
  answers.forEach((pages, i) => assert.ok(pages.length === 200 * 8192 && pages.every((byte) => byte === i + 1)));
  const [failed, fine] = await Promise.allSettled([
    client.getPages({ ...range, blk: 13 }),
    client.getPages({ ...range, blk: 5 }),
  ]);
  assert.equal(failed.status === 'rejected' && (failed.reason as Error).message, 'unlucky');
  assert.equal(fine.status, 'fulfilled');
  await assert.rejects(client.getPages({ ...range, blk: 14 }), { code: 'unavailable' });
  await assert.rejects(client.getPages({ ...range, blk: 1 }), { code: 'unavailable' });
  server.close();
});

test('a refused client learns why; an unreachable server is unavailable', async () => {
  const server = await serve();
  await assert.rejects(PageClient.connect({ ...hello, token: 'wrong', host: '127.0.0.1', port: server.port }), {
    code: 'unauthorized',
    message: /unknown token/,
  });
  server.close();
  await assert.rejects(PageClient.connect({ ...hello, host: '127.0.0.1', port: 1 }), { code: 'unavailable' });
});
