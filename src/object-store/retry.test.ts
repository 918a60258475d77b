import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import fc from 'fast-check';
import { Random } from '../../test/simulation/random.ts';
import { FaultyStore, randomFaults, StoreCrash } from './faulty-store.ts';
import { FileSystemStore } from './file-system-store.ts';
import { ObjectStoreError } from './object-store.ts';
import { namesOf, rejectsWith } from './object-store.contract.ts';
import { backoffMs, retry, RetryingStore } from './retry.ts';
import type { RetriedFailure, RetryEnvironment, RetryPolicy } from './retry.ts';

const POLICY: RetryPolicy = {
  attempts: 6,
  firstDelayMs: 100,
  maxDelayMs: 1000,
  attemptTimeoutMs: 5000,
  totalTimeoutMs: 60_000,
};

/** A clock that only sleeping moves. */
class FakeEnvironment implements RetryEnvironment {
  nowMs = 0;
  readonly delays: number[] = [];
  readonly failures: RetriedFailure[] = [];
  readonly #random: Random;

  constructor(seed: number) {
    this.#random = new Random(seed);
  }

  now(): number {
    return this.nowMs;
  }

  random(): number {
    return this.#random.next();
  }

  async sleep(ms: number, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    this.delays.push(ms);
    this.nowMs += ms;
  }

  onRetry(failure: RetriedFailure): void {
    this.failures.push(failure);
  }
}

function transient(): ObjectStoreError {
  return new ObjectStoreError('transient', 'away');
}

describe('retry', () => {
  test('delays double up to a limit, with a random half, and a seed repeats them', async () => {
    const delaysOf = async (seed: number): Promise<number[]> => {
      const environment = new FakeEnvironment(seed);
      await assert.rejects(
        retry('x', POLICY, environment, {}, () => Promise.reject(transient())),
        /away/,
      );
      return environment.delays;
    };
    const delays = await delaysOf(1);
    assert.equal(delays.length, 5);
    for (const [index, ceiling] of [100, 200, 400, 800, 1000].entries()) {
      assert.ok(delays[index]! >= ceiling / 2 && delays[index]! < ceiling, `${delays[index]} below ${ceiling}`);
    }
    assert.deepEqual(await delaysOf(1), delays);
    assert.notDeepEqual(await delaysOf(2), delays);
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 2000 }),
        fc.double({ min: 0, max: 0.999, noNaN: true }),
        (attempt, random) => {
          const delayMs = backoffMs(POLICY, attempt, random);
          return delayMs >= POLICY.firstDelayMs / 2 && delayMs <= POLICY.maxDelayMs;
        },
      ),
    );
  });

  test('it ends with the first success', async () => {
    const environment = new FakeEnvironment(3);
    let count = 0;
    const result = await retry('x', POLICY, environment, {}, async () => {
      count += 1;
      if (count < 4) throw transient();
      return 'done';
    });
    assert.equal(result, 'done');
    assert.deepEqual(environment.failures.map((failure) => failure.attempt), [1, 2, 3]); // prettier-ignore
  });

  test('damage is tried once more, what cannot heal not at all', async () => {
    const counts: Record<string, number> = {};
    for (const kind of ['damaged', 'not-found', 'denied', 'exists', 'unsupported', 'rejected'] as const) {
      const failing = retry('x', POLICY, new FakeEnvironment(4), {}, async () => {
        counts[kind] = (counts[kind] ?? 0) + 1;
        throw new ObjectStoreError(kind, kind);
      });
      await rejectsWith(failing, kind);
    }
    assert.deepEqual(counts, { damaged: 2, 'not-found': 1, denied: 1, exists: 1, unsupported: 1, rejected: 1 });
    let bugs = 0;
    const bug = retry('x', POLICY, new FakeEnvironment(4), {}, async () => {
      bugs += 1;
      throw new TypeError('a bug');
    });
    await assert.rejects(bug, TypeError);
    assert.equal(bugs, 1);
  });

  test('no attempt is made after the deadline, and its error tells the last failure', async () => {
    const environment = new FakeEnvironment(5);
    const timeouts: number[] = [];
    const policy = { ...POLICY, attempts: Infinity };
    const failing = retry('get thing', policy, environment, { timeoutMs: 3000 }, async ({ timeoutMs }) => {
      timeouts.push(timeoutMs);
      environment.nowMs += Math.min(400, timeoutMs);
      throw transient();
    });
    await assert.rejects(failing, { code: 'timeout', kind: 'transient', message: /get thing.*3000 ms.*away/ });
    assert.ok(environment.nowMs <= 3000, `gave up at ${environment.nowMs} ms`);
    assert.ok(timeouts.every((timeoutMs, index) => timeoutMs <= 3000 - 400 * index));
  });

  test('an abort ends it while it waits', async () => {
    const controller = new AbortController();
    const environment = new FakeEnvironment(6);
    environment.sleep = async (_ms, signal) => {
      controller.abort(new Error('no longer wanted'));
      signal.throwIfAborted();
    };
    const failing = retry('x', POLICY, environment, { signal: controller.signal }, () => Promise.reject(transient()));
    await assert.rejects(failing, /no longer wanted/);
  });
});

describe('a store that is tried again', () => {
  let directory: string;
  let files: FileSystemStore;
  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-retry-'));
    files = await FileSystemStore.open(join(directory, 'store'));
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  test('random faults: every call succeeds and the store is what it would be without them', async () => {
    const seed = Math.floor(Math.random() * 2 ** 31);
    const random = new Random(seed);
    const rates = { error: 0.25, lostReply: 0.2, slow: 0.05, slowMs: 1 };
    const store = new RetryingStore(
      new FaultyStore(
        files,
        randomFaults(() => random.next(), rates),
      ),
      { ...POLICY, attempts: 40 },
      new FakeEnvironment(seed),
    );
    const model = new Map<string, string>();
    for (let step = 0; step < 150; step++) {
      const name = `random/${random.between(0, 9)}`;
      const context = `seed ${seed}, step ${step}`;
      if (random.chance(0.5)) {
        const path = join(directory, 'from');
        writeFileSync(path, `content ${step}`);
        if (random.chance(0.5)) await store.putFile(name, path);
        else await store.put(name, Buffer.from(`content ${step}`));
        model.set(name, `content ${step}`);
      } else if (random.chance(0.3)) {
        await store.deleteMany([name, 'random/none']);
        model.delete(name);
      } else if (model.has(name)) {
        assert.equal(String(await store.get(name)), model.get(name), context);
        assert.equal((await store.head(name)).sizeBytes, model.get(name)?.length, context);
      } else await rejectsWith(store.get(name), 'not-found');
      assert.deepEqual(await namesOf(store, 'random/'), [...model.keys()].sort(), context);
    }
  });

  test('after a lost reply a conditional put finds what it wrote itself', async () => {
    const faulty = new FaultyStore(files, ({ index }) => (index === 0 ? { kind: 'lost-reply' } : undefined));
    const store = new RetryingStore(faulty, POLICY, new FakeEnvironment(7));
    await rejectsWith(store.put('first', Buffer.from('mine'), { ifAbsent: true }), 'exists');
    assert.equal(String(await store.get('first')), 'mine');
  });

  test('a crash is nobody’s to handle, and lasts until the restart', async () => {
    const faulty = new FaultyStore(files, ({ name }) => (name === 'x' ? { kind: 'crash', when: 'after' } : undefined));
    const store = new RetryingStore(faulty, POLICY, new FakeEnvironment(8));
    await assert.rejects(store.put('x', Buffer.from('x')), StoreCrash);
    await assert.rejects(store.get('y'), StoreCrash);
    assert.equal(faulty.calls.length, 1);
    faulty.restart();
    assert.deepEqual(await namesOf(store, ''), ['x']);
  });

  test('a slow call ends at its attempt’s deadline', async () => {
    await files.put('slow', Buffer.from('x'));
    const faulty = new FaultyStore(files, ({ index }) => (index < 2 ? { kind: 'slow', delayMs: 10_000 } : undefined));
    const store = new RetryingStore(faulty, { ...POLICY, attemptTimeoutMs: 20 }, new FakeEnvironment(9));
    assert.equal(String(await store.get('slow')), 'x');
    assert.equal(faulty.calls.length, 3);
  });
});
