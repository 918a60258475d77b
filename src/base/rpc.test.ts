import assert from 'node:assert/strict';
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { test, type TestContext } from 'node:test';
import { encodeFrame } from './frames.ts';
import { RpcClient, serveRpc } from './rpc.ts';
import { signToken } from './token.ts';

const SECRET = Buffer.alloc(32, 7);
const HELLO = 1;
const REQUEST = 2;

async function serve(context: TestContext): Promise<number> {
  const server = await serveRpc({
    host: '127.0.0.1',
    port: 0,
    secret: SECRET,
    methods: {
      echo: (params: unknown, { attachment }) => ({ result: params, attachment: Buffer.from(attachment) }),
    },
  });
  context.after(() => server.close());
  return server.port;
}

async function client(context: TestContext, port: number, token?: string): Promise<RpcClient> {
  const own = token ?? (await signToken(SECRET, { scope: 'platform' }));
  const made = new RpcClient({ host: '127.0.0.1', port, token: own, service: 'echo' });
  context.after(() => made.close());
  return made;
}

async function raw(port: number, ...writes: readonly Buffer[]): Promise<Socket> {
  const socket = connect(port, '127.0.0.1');
  socket.on('error', () => {});
  await once(socket, 'connect');
  for (const bytes of writes) socket.write(bytes);
  return socket;
}

test('calls and their attachments come back, large ones too and many at once', async (context) => {
  const rpc = await client(context, await serve(context));
  const attachment = Buffer.alloc(3 << 20, 5);
  const replies = await Promise.all([1, 2, 3].map((n) => rpc.call('echo', { n }, { attachment })));
  for (const [index, reply] of replies.entries()) {
    assert.deepEqual(reply.result, { n: index + 1 });
    assert(reply.attachment?.equals(attachment));
  }
  await assert.rejects(rpc.call('none', {}), { code: 'bad-request' });
});

test('who shows no token, a forged one, or one of a compute is cut off', async (context) => {
  const port = await serve(context);
  const request = encodeFrame(REQUEST, Buffer.from([2, 0, 0, 0]), Buffer.from('{}'));
  await once(await raw(port, request), 'close');
  await once(await raw(port, encodeFrame(HELLO, Buffer.from('a.b.c')), request), 'close');
  const ofCompute = await signToken(SECRET, { scope: 'timeline', timelineId: '1'.repeat(32) });
  await once(await raw(port, encodeFrame(HELLO, Buffer.from(ofCompute)), request), 'close');
});

test('a frame that is long before a token was shown is refused by its header', async (context) => {
  const header = Buffer.alloc(5);
  header.writeUInt32LE(1 << 20, 0);
  header[4] = HELLO;
  await once(await raw(await serve(context), header), 'close');
});

test('a request that cannot be read ends its connection and nothing else', async (context) => {
  const port = await serve(context);
  const token = await signToken(SECRET, { scope: 'platform' });
  const hello = encodeFrame(HELLO, Buffer.from(token));
  for (const payload of ['', '\x05\0\0\0{', '\x02\0\0\0{]']) {
    await once(await raw(port, hello, encodeFrame(REQUEST, Buffer.from(payload, 'latin1'))), 'close');
  }
  assert.deepEqual((await (await client(context, port)).call('echo', [1])).result, [1]);
});
