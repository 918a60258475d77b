/**
 * A store on a disk that fails, in each way in which disks do (test/pageserver/faults.c), for a moment or for long: it never reads a page wrong, never
 * calls durable what is not, goes on by itself when the disk does, and what a kill leaves after all that is whole.
 */

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { checkStore, newModel } from '../../test/pageserver/check-store.ts';
import { START_LSN } from '../../test/pageserver/crash-writer.ts';
import { FAULTS, FaultyDisk } from '../../test/pageserver/faulty-disk.ts';
import type { Fault } from '../../test/pageserver/faulty-disk.ts';

const WRITER = join(import.meta.dirname, '../../test/pageserver/crash-writer.ts');
const seed = Number(process.env['STRATA_TEST_SEED'] ?? Date.now() % 1_000_000);
const RECOVERY_MS = 30_000;
/** While these last, no flush can be confirmed. */
const BLOCKING: readonly Fault[] = ['no space', 'write errors', 'failing fsync', 'failing rename', 'no new files'];

/** A writer on the disk; it must not end by itself. */
class Writer {
  readonly #child;
  readonly #exited: Promise<void>;
  #output = '';
  #ended: string | undefined;

  constructor(directory: string, environment: Readonly<Record<string, string>>) {
    this.#child = spawn(process.execPath, [WRITER, directory, String(seed), 'faulty'], {
      stdio: ['ignore', 'pipe', 'inherit'],
      env: { ...process.env, ...environment },
    });
    this.#child.stdout.setEncoding('utf8').on('data', (text: string) => (this.#output += text));
    this.#exited = new Promise((resolve) => {
      this.#child.once('close', (code, signal) => {
        this.#ended = `the writer ended by itself: ${code ?? signal}`;
        resolve();
      });
    });
  }

  get confirmedLsn(): number {
    return Number(this.#output.split('\n').at(-2) ?? START_LSN);
  }

  async confirms(count: number): Promise<void> {
    const wanted = this.#output.split('\n').length + count;
    const deadlineMs = performance.now() + RECOVERY_MS;
    while (this.#output.split('\n').length < wanted) {
      assert.equal(this.#ended, undefined);
      assert(performance.now() < deadlineMs, `nothing was confirmed after ${this.confirmedLsn} for ${RECOVERY_MS} ms`);
      await sleep(10);
    }
  }

  /** Waits until it has had a call fail. */
  async meets(disk: FaultyDisk): Promise<void> {
    const deadlineMs = performance.now() + RECOVERY_MS;
    while (disk.failedCount === 0) {
      assert.equal(this.#ended, undefined);
      assert(performance.now() < deadlineMs, `nothing has failed for ${RECOVERY_MS} ms`);
      await sleep(10);
    }
  }

  /** From now on nothing can be confirmed but what was durable already: one flush, and what it has said and was not read here. */
  async confirmsNothingFor(ms: number): Promise<void> {
    let known = this.confirmedLsn;
    const deadlineMs = performance.now() + RECOVERY_MS;
    for (let quietSinceMs = performance.now(); performance.now() - quietSinceMs < ms;) {
      await sleep(20);
      if (this.confirmedLsn === known) continue;
      known = this.confirmedLsn;
      quietSinceMs = performance.now();
      assert(quietSinceMs < deadlineMs, 'it confirms more and more');
    }
  }

  async kill(): Promise<void> {
    assert.equal(this.#ended, undefined);
    this.#child.kill('SIGKILL');
    await this.#exited;
  }
}

// They mostly wait: for flushes that are tried again.
describe(`a store on a disk that fails (seed ${seed})`, { concurrency: 4 }, () => {
  for (const [number, fault] of (Object.keys(FAULTS) as Fault[]).entries()) {
    test(`${fault}: for a moment, and for long`, { timeout: 180_000 }, async (context) => {
      const scratch = mkdtempSync(join(tmpdir(), 'strata-faults-'));
      context.after(() => rmSync(scratch, { recursive: true, force: true }));
      const directory = join(scratch, 'store');
      mkdirSync(directory);
      const disk = FaultyDisk.make(directory, scratch);
      if (disk === undefined) return context.skip('there is no C compiler');
      const writer = new Writer(directory, disk.environment);
      await writer.confirms(1);
      for (let round = 0; round < 3; round++) {
        disk.fail(fault, (seed * 7 + number * 5 + round * 11) % 37, 1 + ((seed + round) % 3));
        await sleep(150);
        disk.recover();
        await writer.confirms(1);
      }
      disk.fail(fault);
      await writer.meets(disk);
      if (BLOCKING.includes(fault)) await writer.confirmsNothingFor(1200);
      else await sleep(1200);
      const failedCount = disk.recover();
      await writer.confirms(3);
      await writer.kill();
      await checkStore(directory, { seed, confirmedLsn: writer.confirmedLsn, model: newModel(), what: fault });
      context.diagnostic(`${failedCount} calls have failed`);
    });
  }
});

test(
  'a full disk, a real one, stops nothing but what needs space, and is taken up again',
  { timeout: 120_000 },
  async (context) => {
    const directory = mkdtempSync(join(tmpdir(), 'strata-full-'));
    try {
      execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', directory], { stdio: 'pipe' });
    } catch {
      rmSync(directory, { recursive: true });
      return context.skip('a file system cannot be mounted here');
    }
    try {
      const store = join(directory, 'store');
      const ballast = join(directory, 'ballast');
      mkdirSync(store);
      const writer = new Writer(store, {});
      await writer.confirms(2);
      assert.throws(() => writeFileSync(ballast, Buffer.alloc(17 * 1024 * 1024)), { code: 'ENOSPC' });
      await writer.confirmsNothingFor(1500);
      rmSync(ballast);
      await writer.confirms(3);
      await writer.kill();
      await checkStore(store, { seed, confirmedLsn: writer.confirmedLsn, model: newModel(), what: 'full disk' });
    } finally {
      execFileSync('umount', [directory]);
      rmSync(directory, { recursive: true });
    }
  },
);
