/** A safekeeper read by Postgres' own client, where one is installed. */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { chmodSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { SafekeeperClient, SafekeeperConnection, greetingOf } from '../api/safekeeper.ts';
import {
  decodeAcceptorMessage,
  encodeAppendHead,
  encodeJson,
  encodeProposerMessage,
  FRAME,
} from '../api/safekeeper-protocol.ts';
import type { AcceptorMessage } from '../consensus/messages.ts';
import { formatLsn, segmentOffset, segmentStart, WAL_SEGMENT_SIZE, walFileName } from '../postgres/lsn.ts';
import { runSafekeeper } from './main.ts';
import { makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from './made-wal.test-data.ts';

/** Of the same major as the test's WAL: newer servers are refused by it. */
const BIN = '/usr/lib/postgresql/15/bin';
const SECRET = randomBytes(32);

test('pg_receivewal reads what is committed, from the start of the segment on and as it comes', async (context) => {
  if (!existsSync(join(BIN, 'pg_receivewal'))) {
    context.skip('there is no pg_receivewal of version 15');
    return;
  }
  const root = mkdtempSync(join(tmpdir(), 'strata-replication-'));
  const target = mkdtempSync(join(root, 'received-'));
  const log = createLog({ name: 'test', level: 'silent' });
  const safekeeper = await runSafekeeper({
    nodeId: 1,
    dataDir: join(root, 'sk'),
    host: '127.0.0.1',
    port: 0,
    secret: SECRET,
    log,
  });
  let receiver: ChildProcess | undefined;
  context.after(async () => {
    receiver?.kill('SIGKILL');
    await safekeeper.close();
    rmSync(root, { recursive: true });
  });
  const [tenantId, timelineId] = [randomBytes(16).toString('hex'), randomBytes(16).toString('hex')];
  const timeline = { tenantId, timelineId, startLsn: MID_SEGMENT_LSN, pgVersion: 15, systemId: String(SYSTEM_ID) };
  const token = await signToken(SECRET, { scope: 'platform' });
  const endpoint = { address: { host: '127.0.0.1', port: safekeeper.port }, token };
  const client = new SafekeeperClient(endpoint);
  await client.createTimeline(timeline);
  client.close();
  const replies: AcceptorMessage[] = [];
  const proposer = new SafekeeperConnection(endpoint, {
    onFrame: ({ type, payload }) => {
      const message = decodeAcceptorMessage(type, payload);
      if (message !== undefined) replies.push(message);
    },
    onClose: () => {},
  });
  context.after(() => proposer.close());
  const first = { term: 0, startLsn: MID_SEGMENT_LSN };
  proposer.write(encodeJson(FRAME.greeting, greetingOf(timeline)));
  proposer.write(encodeProposerMessage({ kind: 'vote', term: 1, generation: 0 }));
  const history = [first, { term: 1, startLsn: MID_SEGMENT_LSN }];
  proposer.write(encodeProposerMessage({ kind: 'elected', term: 1, startLsn: MID_SEGMENT_LSN, history }));
  const sizes = Array.from({ length: 500 }, (_, index) => 40_000 + index);
  const wal = makeWal(MID_SEGMENT_LSN, sizes, 0, 15);
  assert(wal.endLsn > segmentStart(MID_SEGMENT_LSN) + WAL_SEGMENT_SIZE, 'more than a segment');
  const append = (from: number, to: number, commitLsn: number): void => {
    for (let lsn = from; lsn < to; lsn += 100_000) {
      const bytes = wal.bytes.subarray(lsn - MID_SEGMENT_LSN, Math.min(to, lsn + 100_000) - MID_SEGMENT_LSN);
      proposer.write(encodeAppendHead({ kind: 'append', term: 1, beginLsn: lsn, commitLsn, bytes }), bytes);
    }
    proposer.write(encodeAppendHead({ kind: 'append', term: 1, beginLsn: to, commitLsn, bytes: Buffer.alloc(0) }));
  };
  const [half, last] = [wal.ends[100]!, wal.ends[450]!];
  append(MID_SEGMENT_LSN, half, half);
  for (;;) {
    const reply = replies.at(-1);
    if (reply?.kind === 'append-reply' && reply.flushLsn === half) break;
    await sleep(5);
  }

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
    env: { ...process.env, PGPASSWORD: await signToken(SECRET, { scope: 'timeline', timelineId: tenantId }) },
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let complaint = '';
  wrong.stderr.on('data', (chunk: Buffer) => (complaint += chunk.toString()));
  assert.notEqual((await once(wrong, 'close'))[0], 0);
  assert.match(complaint, /not for timeline/);

  const env = { ...process.env, PGPASSWORD: await signToken(SECRET, { scope: 'timeline', timelineId }) };
  receiver = spawn(join(BIN, 'pg_receivewal'), [...arguments_, '--synchronous', `--endpos=${formatLsn(last - 8)}`], {
    env,
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let said = '';
  receiver.stderr!.on('data', (chunk: Buffer) => (said += chunk.toString()));
  const closed = once(receiver, 'close');
  await sleep(200);
  append(half, wal.endLsn, last); // The rest comes while it streams, and not all of it is committed.
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
