/**
 * Whatever connections do, no safekeeper is ever sent other bytes than the WAL at their LSN: the proposer's blocks are used anew (wal-buffer.ts), and sockets
 * send from them later.
 *
 * Between the proposer and each safekeeper is a way that is slow, hangs or breaks, with little room in the kernel (a Unix socket), so that much waits in the proposer's
 * process; it compares each byte that passes. Members come and go meanwhile. Random; the seed is printed, and STRATA_TEST_SEED and STRATA_TEST_RUNS choose.
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type SafekeeperAddress, SafekeeperClient, type TimelineIdentity } from '../api/safekeeper.ts';
import type { SafekeeperDirectory, SafekeeperSet } from '../api/safekeeper-set.ts';
import { APPEND_FIXED_BYTES, FRAME } from '../api/safekeeper-protocol.ts';
import { FRAME_HEADER_BYTES } from '../base/frames.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { blankState } from '../consensus/acceptor.ts';
import { type Configuration, finalConfiguration, jointConfiguration, nodesOf } from '../consensus/configuration.ts';
import { readLsn } from '../postgres/lsn.ts';
import { type Safekeeper, runSafekeeper } from '../safekeeper/main.ts';
import { type MadeWal, makeWal, MID_SEGMENT_LSN, SYSTEM_ID } from '../safekeeper/made-wal.test-data.ts';
import { electProposer, type Proposer } from './proposer.ts';

const SEED = Number(process.env['STRATA_TEST_SEED'] ?? randomBytes(4).readUInt32LE());
const RUNS = Number(process.env['STRATA_TEST_RUNS'] ?? 2);
const WAL_BYTES = 16 * 1024 * 1024;
const SECRET = randomBytes(32);
const log = createLog({ name: 'test', level: process.env['STRATA_LOG_LEVEL'] ?? 'silent' });

/** mulberry32; below 1 */
function randomOf(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** The appends in what a proposer sends on one connection, each byte of which must be that of `wal`. */
class AppendChecker {
  readonly #wal: MadeWal;
  #head = Buffer.alloc(0);
  /** Of the frame under way. */
  #leftBytes = 0;
  /** Undefined: no append. */
  #lsn: number | undefined;
  walBytes = 0;

  constructor(wal: MadeWal) {
    this.#wal = wal;
  }

  push(chunk: Buffer): void {
    let bytes = chunk;
    while (bytes.length > 0) {
      if (this.#leftBytes === 0) {
        const rest = Buffer.concat([this.#head, bytes]);
        const isAppend = rest[4] === FRAME.append;
        const headBytes = FRAME_HEADER_BYTES + (isAppend ? APPEND_FIXED_BYTES : 0);
        if (rest.length < headBytes) {
          this.#head = Buffer.from(rest);
          return;
        }
        this.#head = Buffer.alloc(0);
        this.#leftBytes = rest.readUInt32LE(0) + FRAME_HEADER_BYTES - headBytes;
        this.#lsn = isAppend ? readLsn(rest, FRAME_HEADER_BYTES + 8) : undefined;
        bytes = rest.subarray(headBytes);
        continue;
      }
      const piece = bytes.subarray(0, this.#leftBytes);
      if (this.#lsn !== undefined) {
        const at = this.#lsn - MID_SEGMENT_LSN;
        assert(piece.equals(this.#wal.bytes.subarray(at, at + piece.length)), `other bytes at ${at} were sent`);
        this.#lsn += piece.length;
        this.walBytes += piece.length;
      }
      this.#leftBytes -= piece.length;
      bytes = bytes.subarray(piece.length);
    }
  }
}

/** A way to a safekeeper. */
class Way {
  readonly address: SafekeeperAddress;
  readonly failures: unknown[] = [];
  walBytes = 0;
  readonly #server: Server;
  readonly #pairs = new Set<readonly [Socket, Socket]>();
  #delayMs = 0;
  #isHung = false;

  constructor(path: string, port: number, wal: MadeWal) {
    this.address = { host: 'way', port, socketPath: path };
    this.#server = createServer((client) => this.#accept(client, port, wal)).listen(path);
  }

  set delayMs(delayMs: number) {
    this.#delayMs = delayMs;
  }

  get isHung(): boolean {
    return this.#isHung;
  }

  set isHung(isHung: boolean) {
    this.#isHung = isHung;
    for (const [client] of this.#pairs) this.#resume(client);
  }

  cut(): void {
    for (const [client] of this.#pairs) client.destroy();
  }

  close(): void {
    this.#server.close();
    this.cut();
  }

  #resume(client: Socket): void {
    if (this.#isHung) client.pause();
    else client.resume();
  }

  #accept(client: Socket, port: number, wal: MadeWal): void {
    const server = connect({ host: '127.0.0.1', port, noDelay: true });
    const pair = [client, server] as const;
    this.#pairs.add(pair);
    const checker = new AppendChecker(wal);
    client.on('data', (chunk) => {
      try {
        const { walBytes } = checker;
        checker.push(chunk);
        this.walBytes += checker.walBytes - walBytes;
      } catch (error) {
        this.failures.push(error);
        client.destroy();
        return;
      }
      server.write(chunk);
      if (this.#delayMs === 0 && !this.#isHung) return;
      client.pause();
      setTimeout(() => this.#resume(client), this.#delayMs);
    });
    server.on('data', (chunk) => client.write(chunk));
    for (const [from, to] of [pair, [server, client]] as const) {
      from.on('error', () => {});
      from.on('close', () => {
        this.#pairs.delete(pair);
        to.destroy();
      });
    }
    this.#resume(client);
  }
}

class Directory implements SafekeeperDirectory {
  current: SafekeeperSet;
  settledVersion = 0;
  readonly #callbacks = new Set<() => void>();

  constructor(current: SafekeeperSet) {
    this.current = current;
  }

  watch(callback: () => void): () => void {
    this.#callbacks.add(callback);
    return () => this.#callbacks.delete(callback);
  }

  settled(_timelineId: string, version: number): void {
    this.settledVersion = version;
  }

  change(configuration: Configuration): void {
    this.current = { ...this.current, configuration };
    for (const callback of this.#callbacks) callback();
  }
}

class World {
  readonly wal: MadeWal;
  readonly ways: Way[] = [];
  readonly timeline: TimelineIdentity = {
    tenantId: randomBytes(16).toString('hex'),
    timelineId: randomBytes(16).toString('hex'),
    startLsn: MID_SEGMENT_LSN,
    pgVersion: 17,
    systemId: String(SYSTEM_ID),
  };
  directory!: Directory;
  proposer!: Proposer;
  token = '';
  readonly random: () => number;
  readonly #safekeepers: Safekeeper[] = [];

  constructor(seed: number) {
    this.random = randomOf(seed);
    const sizes: number[] = [];
    for (let bytes = 0; bytes < WAL_BYTES; bytes += sizes.at(-1)!) {
      sizes.push(Math.floor(10 ** (1 + 4.5 * this.random())));
    }
    this.wal = makeWal(MID_SEGMENT_LSN, sizes);
  }

  async start(context: TestContext): Promise<void> {
    const root = await mkdtemp(join(tmpdir(), 'strata-sent-wal-'));
    context.after(async () => {
      for (const way of this.ways) way.isHung = false;
      await this.proposer.close();
      for (const way of this.ways) way.close();
      for (const safekeeper of this.#safekeepers) await safekeeper.close();
      await rm(root, { recursive: true });
    });
    this.token = await signToken(SECRET, { scope: 'platform' });
    const addresses = new Map<number, SafekeeperAddress>();
    for (const nodeId of [1, 2, 3, 4]) {
      const config = { nodeId, dataDir: join(root, String(nodeId)), host: '127.0.0.1', port: 0, secret: SECRET, log };
      const safekeeper = await runSafekeeper(config);
      this.#safekeepers.push(safekeeper);
      const way = new Way(join(root, `${nodeId}.sock`), safekeeper.port, this.wal);
      this.ways.push(way);
      addresses.set(nodeId, way.address);
    }
    this.directory = new Directory({ configuration: { version: 1, members: [1, 2, 3] }, addresses });
    this.proposer = await electProposer({
      safekeepers: this.directory,
      token: this.token,
      timeline: this.timeline,
      mayCreate: true,
      maxPendingBytes: 4 * 1024 * 1024,
      retainedBytes: 16 * 1024,
      log,
    });
  }

  client(nodeId: number): SafekeeperClient {
    const { port } = this.#safekeepers[nodeId - 1]!;
    return new SafekeeperClient({ address: { host: '127.0.0.1', port }, token: this.token });
  }

  /** From {1, 2, 3} to {1, 2, 4} or back. */
  async beginChange(): Promise<void> {
    const from = this.directory.current.configuration;
    const joint = jointConfiguration(from, from.members.includes(4) ? [1, 2, 3] : [1, 2, 4]);
    const client = this.client(joint.newMembers!.at(-1)!);
    const { incarnation } = await client.configure(joint);
    await client.giveTimeline(this.timeline, incarnation, blankState(MID_SEGMENT_LSN, joint));
    client.close();
    this.directory.change(joint);
  }

  /** Something happens to the ways, or to who is a member. */
  async disturb(): Promise<void> {
    const { random, ways, directory } = this;
    const way = ways[Math.floor(random() * ways.length)]!;
    const what = random();
    if (what < 0.35) {
      for (const other of ways) other.isHung = false;
      way.isHung = true;
    } else if (what < 0.5) {
      way.isHung = false;
    } else if (what < 0.6) {
      way.delayMs = random() < 0.5 ? 0 : Math.floor(random() * 20);
    } else if (what < 0.75) {
      way.cut();
    } else {
      const { configuration } = directory.current;
      if (configuration.newMembers === undefined) await this.beginChange();
      else if (directory.settledVersion === configuration.version) directory.change(finalConfiguration(configuration));
    }
  }

  /** Whatever hangs, hangs no longer than that nothing can go on. */
  async drained(): Promise<void> {
    const drained = once(this.proposer, 'drain');
    await Promise.race([drained, sleep(300)]);
    for (const way of this.ways) way.isHung = false;
    await drained;
  }
}

for (let run = 0; run < RUNS; run++) {
  const seed = SEED + run;
  test('no byte but the WAL at its LSN is sent to any safekeeper, whatever connections and members do', async (context) => {
    context.diagnostic(`STRATA_TEST_SEED=${seed}`);
    const world = new World(seed);
    await world.start(context);
    const { proposer, wal, random, ways } = world;
    let disturbances = 0;
    for (let at = 0; at < wal.bytes.length;) {
      // Small ones as of commits, and much at once.
      const end = Math.min(wal.bytes.length, at + Math.floor(10 ** (2 + 3.7 * random())));
      const hasRoom = proposer.append(MID_SEGMENT_LSN + at, wal.bytes.subarray(at, end));
      at = end;
      if (!hasRoom) await world.drained();
      if (random() < 0.2) await sleep(random() * 3);
      if (random() < 0.25) {
        disturbances++;
        await world.disturb();
      }
      assert.deepEqual(
        ways.flatMap(({ failures }) => failures),
        [],
      );
    }
    for (const way of ways) way.isHung = false;
    await proposer.waitCommitted(wal.endLsn, AbortSignal.timeout(60_000));
    await proposer.waitEqual(AbortSignal.timeout(60_000));
    for (const nodeId of nodesOf(world.directory.current.configuration)) {
      const client = world.client(nodeId);
      const { tenantId, timelineId } = world.timeline;
      assert.equal((await client.status(tenantId, timelineId)).flushLsn, wal.endLsn);
      client.close();
    }
    assert.deepEqual(
      ways.flatMap(({ failures }) => failures),
      [],
    );
    context.diagnostic(`${disturbances} disturbances, sent: ${ways.map(({ walBytes }) => walBytes).join(', ')} bytes`);
  });
}
