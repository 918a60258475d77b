/** A safekeeper read by Postgres' own client, where one is installed. */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { chmodSync, existsSync, mkdtempSync, readdirSync, readFileSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { signToken } from '../base/token.ts';
import { formatLsn, segmentOffset, segmentStart, WAL_SEGMENT_SIZE, walFileName } from '../postgres/lsn.ts';
import {
  cstring,
  decodeErrorResponse,
  encodeCancelRequest,
  encodeMessage,
  encodeSslRequest,
  encodeStartupPacket,
  MessageReader,
  PROTOCOL_3_0,
  PROTOCOL_3_2,
  type WireMessage,
} from '../postgres/wire.ts';
import { type LedTimeline, startLedTimeline } from './led-timeline.test-data.ts';
import { makeWal, MID_SEGMENT_LSN } from './made-wal.test-data.ts';

/** Of the same major as the test's WAL: newer servers are refused by it. */
const BIN = '/usr/lib/postgresql/15/bin';

test('pg_receivewal reads what is committed, from the start of the segment on and as it comes', async (context) => {
  if (!existsSync(join(BIN, 'pg_receivewal'))) {
    context.skip('there is no pg_receivewal of version 15');
    return;
  }
  const led = await startLedTimeline(context, { pgVersion: 15 });
  const { root, secret, safekeeper, append } = led;
  const { tenantId, timelineId } = led.timeline;
  const target = mkdtempSync(join(root, 'received-'));
  let receiver: ChildProcess | undefined;
  context.after(() => receiver?.kill('SIGKILL'));
  const sizes = Array.from({ length: 500 }, (_, index) => 40_000 + index);
  const wal = makeWal(MID_SEGMENT_LSN, sizes, 0, 15);
  assert(wal.endLsn > segmentStart(MID_SEGMENT_LSN) + WAL_SEGMENT_SIZE, 'more than a segment');
  const [half, last] = [wal.ends[100]!, wal.ends[450]!];
  append(wal.bytes, MID_SEGMENT_LSN, half, half);
  await led.flushed(half);

  const arguments_ = [
    '-D',
    target,
    '-h',
    '127.0.0.1',
    '-p',
    String(safekeeper.port),
    '-U',
    timelineId,
    '--no-loop',
    '-s',
    '1',
  ];
  const wrong = spawn(join(BIN, 'pg_receivewal'), arguments_, {
    env: { ...process.env, PGPASSWORD: await signToken(secret, { scope: 'timeline', timelineId: tenantId }) },
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let complaint = '';
  wrong.stderr.on('data', (chunk: Buffer) => (complaint += chunk.toString()));
  assert.notEqual((await once(wrong, 'close'))[0], 0);
  assert.match(complaint, /not for timeline/);

  const env = { ...process.env, PGPASSWORD: await signToken(secret, { scope: 'timeline', timelineId }) };
  receiver = spawn(join(BIN, 'pg_receivewal'), [...arguments_, '--synchronous', `--endpos=${formatLsn(last - 8)}`], {
    env,
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let said = '';
  receiver.stderr!.on('data', (chunk: Buffer) => (said += chunk.toString()));
  const closed = once(receiver, 'close');
  await sleep(200);
  append(wal.bytes, half, wal.endLsn, last); // The rest comes while it streams, and not all of it is committed.
  const [code] = (await closed) as [number];
  assert.equal(code, 0, said);

  const received = readdirSync(target).sort();
  assert.deepEqual(received, [walFileName(1, MID_SEGMENT_LSN), `${walFileName(1, last)}.partial`]);
  const whole = readFileSync(join(target, received[0]!));
  const offset = segmentOffset(MID_SEGMENT_LSN);
  assert.deepEqual(whole.subarray(offset), wal.bytes.subarray(0, WAL_SEGMENT_SIZE - offset));
  const partial = readFileSync(join(target, received[1]!));
  const partialBytes = segmentOffset(last);
  const from = wal.bytes.length - (wal.endLsn - segmentStart(last));
  assert.deepEqual(partial.subarray(0, partialBytes), wal.bytes.subarray(from, from + partialBytes));
  assert(
    partial.subarray(partialBytes).every((byte) => byte === 0),
    'nothing that is not committed',
  );

  chmodSync(root, 0o755);
  const dump = execFileSync(
    join(BIN, 'pg_waldump'),
    ['-p', target, '-s', formatLsn(MID_SEGMENT_LSN), '-e', formatLsn(wal.ends[300]!)],
    { encoding: 'utf8', maxBuffer: 1 << 26 },
  );
  assert.equal(dump.trim().split('\n').length, 301);
});

function liveBufferBytes(): number {
  setFlagsFromString('--expose-gc');
  (runInNewContext('gc') as () => void)();
  return process.memoryUsage().arrayBuffers;
}

/** A client of the protocol that says what no real one would. */
class RawClient {
  readonly socket: Socket;
  readonly #messages = new MessageReader();
  #wake: (() => void) | undefined;
  isClosed = false;

  constructor(context: TestContext, port: number) {
    this.socket = connect({ host: '127.0.0.1', port });
    this.socket.on('data', (chunk) => {
      this.#messages.push(chunk);
      this.#wake?.();
    });
    this.socket.on('close', () => {
      this.isClosed = true;
      this.#wake?.();
    });
    this.socket.on('error', () => {});
    context.after(() => this.socket.destroy());
  }

  async next(): Promise<WireMessage | undefined> {
    for (;;) {
      const message = this.#messages.next();
      if (message !== undefined || this.isClosed) return message;
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
  }

  async until(type: string): Promise<WireMessage> {
    for (let message = await this.next(); message !== undefined; message = await this.next()) {
      if (message.type === type) return message;
    }
    throw new Error(`the connection ended before ${type}`);
  }

  async logIn(led: LedTimeline, user = led.timeline.timelineId, password?: string): Promise<void> {
    this.socket.write(
      encodeStartupPacket(
        new Map([
          ['user', user],
          ['replication', 'true'],
        ]),
      ),
    );
    await this.until('R');
    const token = password ?? (await signToken(led.secret, { scope: 'timeline', timelineId: user }));
    this.socket.write(encodeMessage('p', cstring(token)));
  }

  query(text: string): void {
    this.socket.write(encodeMessage('Q', cstring(text)));
  }

  /** Resolves when it is; it may be already. */
  async closed(): Promise<void> {
    while ((await this.next()) !== undefined);
  }

  async error(): Promise<{ code: string; message: string }> {
    return decodeErrorResponse((await this.until('E')).payload);
  }
}

/** Another signature: the last digit of a token has two bits that mean nothing, so it is not that one. */
function altered(token: string): string {
  const at = token.lastIndexOf('.') + 1;
  return `${token.slice(0, at)}${token[at] === 'A' ? 'B' : 'A'}${token.slice(at + 1)}`;
}

test('who may not read, asks for what is not there, or speaks nonsense is told so and nothing else', async (context) => {
  const led = await startLedTimeline(context, { pgVersion: 17 });
  const { port } = led.safekeeper;
  const wal = makeWal(MID_SEGMENT_LSN, [400, 500, 600]);
  led.append(wal.bytes, MID_SEGMENT_LSN, wal.endLsn, wal.ends[1]!);
  await led.flushed(wal.endLsn);
  const open = (): RawClient => new RawClient(context, port);

  const stranger = open();
  await stranger.logIn(led, led.timeline.timelineId, 'no token');
  assert.equal((await stranger.error()).code, '28P01');
  const token = await signToken(led.secret, { scope: 'timeline', timelineId: led.timeline.timelineId });
  const otherToken = await signToken(led.secret, { scope: 'timeline', timelineId: 'e'.repeat(32) });
  const forged = await signToken(randomBytes(32), { scope: 'platform' });
  for (const [user, password, code] of [
    [led.timeline.timelineId, otherToken, '28000'],
    ['e'.repeat(32), token, '28000'],
    ['', token, '28000'],
    [led.timeline.timelineId, forged, '28P01'],
    [led.timeline.timelineId, altered(token), '28P01'],
    [led.timeline.timelineId, '', '28P01'],
  ] as const) {
    const thief = open();
    await thief.logIn(led, user, password);
    assert.equal((await thief.error()).code, code, `${user} ${password}`);
    await thief.closed();
  }
  const elsewhere = open();
  await elsewhere.logIn(led, 'f'.repeat(32));
  assert.equal((await elsewhere.error()).code, '57P03', 'libpq tries the next host');

  const client = open();
  await client.logIn(led);
  await client.until('Z');
  const refusals: readonly (readonly [string, string, RegExp])[] = [
    ['START_REPLICATION PHYSICAL 0/1', '58P01', /begins at/],
    ['START_REPLICATION 0/1 TIMELINE 7', '58P01', /timeline 7/],
    ['START_REPLICATION LOGICAL 0/1', '42601', /not a command/],
    ['SELECT 1', '42601', /not a command/],
    ['', '42601', /not a command/],
    ['CREATE_REPLICATION_SLOT "s" PHYSICAL', '0A000', /no replication slots/],
    ['TIMELINE_HISTORY 2', '58P01', /always timeline 1/],
    [`START_REPLICATION ${formatLsn(wal.endLsn)}`, '58P01', /ahead of what is committed/],
    ['START_REPLICATION FFFFFFFF/0', '22023', /not an LSN: "FFFFFFFF\/0"/],
  ];
  for (const [command, code, message] of refusals) {
    client.query(command);
    const error = await client.error();
    assert.deepEqual([error.code, message.test(error.message)], [code, true], `${command}: ${error.message}`);
    await client.until('Z');
  }
  client.query('IDENTIFY_SYSTEM');
  assert.match((await client.until('D')).payload.toString('latin1'), new RegExp(formatLsn(wal.ends[1]!)));
  await client.until('Z');

  for (const nonsense of [
    encodeMessage('B', 'x'),
    Buffer.from([0x51, 0, 0, 0, 1]),
    Buffer.from([0x51, 0x7f, 0, 0, 0]),
  ]) {
    const babbler = open();
    await babbler.logIn(led);
    await babbler.until('Z');
    babbler.socket.write(nonsense);
    assert.equal((await babbler.error()).code, '08P01');
    await babbler.closed();
  }
  const long = open();
  long.socket.write(Buffer.from([0, 0, 0xff, 0xff, 0, 3, 0, 0]));
  assert.equal((await long.error()).code, '08P01', 'a startup packet that is too long');
  const insisting = open();
  insisting.socket.write(Buffer.concat([encodeSslRequest(), encodeSslRequest(), encodeSslRequest()]));
  await once(insisting.socket, 'close');
  const cancelling = open();
  cancelling.socket.write(encodeCancelRequest(1, Buffer.alloc(4)));
  assert.equal(await cancelling.next(), undefined, 'a request to cancel has no answer');

  const listener = open();
  await listener.logIn(led);
  await listener.until('Z');
  listener.query(`START_REPLICATION SLOT "any" PHYSICAL ${formatLsn(segmentStart(MID_SEGMENT_LSN))} TIMELINE 1`);
  await listener.until('W');
  listener.socket.write(encodeMessage('Q', cstring('SELECT 1')));
  assert.equal((await listener.error()).code, '08P01', 'only replies while WAL is streamed');
});

test('who asks for a protocol or options that are not known here is told which are, and goes on', async (context) => {
  const led = await startLedTimeline(context, { pgVersion: 17 });
  const user = led.timeline.timelineId;
  for (const [protocol, option, answer] of [
    [PROTOCOL_3_0, 'replication', undefined],
    [PROTOCOL_3_2, 'replication', undefined],
    [PROTOCOL_3_2 + 1, 'replication', Buffer.from([0, 3, 0, 2, 0, 0, 0, 0])],
    [PROTOCOL_3_0, '_pq_.some', Buffer.from([0, 3, 0, 0, 0, 0, 0, 1, ...cstring('_pq_.some')])],
  ] as const) {
    const client = new RawClient(context, led.safekeeper.port);
    client.socket.write(encodeStartupPacket(new Map(Object.entries({ user, [option]: 'true' })), protocol));
    let message = await client.next();
    if (answer !== undefined) {
      assert.equal(message?.type, 'v');
      assert.deepEqual(message.payload, answer);
      message = await client.next();
    }
    assert.equal(message?.type, 'R');
    client.socket.destroy();
  }
});

test('a reader that does not read is sent little, one that is silent is let go, and the leader notices nothing', async (context) => {
  const led = await startLedTimeline(context, { pgVersion: 17, readerTimeoutMs: 1_000 });
  const sizes = Array.from({ length: 600 }, () => 100_000);
  const wal = makeWal(MID_SEGMENT_LSN, sizes);
  const reader = new RawClient(context, led.safekeeper.port);
  await reader.logIn(led);
  await reader.until('Z');
  reader.query(`START_REPLICATION ${formatLsn(MID_SEGMENT_LSN)}`);
  await reader.until('W');
  reader.socket.pause();
  const before = liveBufferBytes();
  led.append(wal.bytes, MID_SEGMENT_LSN, wal.endLsn, wal.endLsn);
  await led.flushed(wal.endLsn);
  let grown = Infinity;
  // Memory is given back a little after its collection.
  for (let look = 0; grown >= 4_000_000 && look < 10; look++) {
    await sleep(50);
    grown = liveBufferBytes() - before;
  }
  assert(grown < 4_000_000, `${grown} bytes more for a reader that lags ${wal.bytes.length} bytes`);
  await sleep(1_500);
  reader.socket.resume();
  while ((await reader.next()) !== undefined);
  assert(reader.isClosed, 'it said nothing for too long');

  const silent = new RawClient(context, led.safekeeper.port);
  await silent.logIn(led);
  await silent.until('Z');
  silent.query(`START_REPLICATION ${formatLsn(wal.endLsn)}`);
  let wasAsked = false;
  for (let message = await silent.next(); message !== undefined; message = await silent.next()) {
    wasAsked ||= message.type === 'd' && message.payload[0] === 0x6b && message.payload[17] === 1;
  }
  assert(wasAsked, 'asked for a sign of life before');
});
