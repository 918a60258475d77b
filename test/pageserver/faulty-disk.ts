/**
 * For tests: a folder on a disk that fails when it is told to, and a clock that is set, for the processes that are started with
 * `environment`. (faults.c has the way.)
 */

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

export const FAULTS = {
  'no space': 1,
  'short writes': 2,
  'write errors': 3,
  'failing fsync': 4,
  'failing fsync of folders': 5,
  'failing rename': 6,
  'read errors': 7,
  'short reads': 8,
  garbage: 9,
  'failing unlink': 10,
  'no new files': 11,
} as const;

/** Not a failure of the disk: the process is killed before one of its changes. */
const DEATH = 12;

const CONTROL_BYTES = 20;

export type Fault = keyof typeof FAULTS;

export class FaultyDisk {
  readonly environment: Readonly<Record<string, string>>;
  readonly #control: string;
  #clockAhead = 0;

  private constructor(control: string, environment: Readonly<Record<string, string>>) {
    this.#control = control;
    this.environment = environment;
  }

  /** For files below `directory`; what the test itself needs lies in `scratch`. Undefined where there is no C compiler. `onlyProcess`: how its command line ends. */
  static make(directory: string, scratch: string, onlyProcess?: string): FaultyDisk | undefined {
    const library = join(scratch, 'faults.so');
    try {
      const source = join(import.meta.dirname, 'faults.c');
      execFileSync(process.env['CC'] ?? 'cc', ['-shared', '-fPIC', '-O1', '-o', library, source, '-ldl']);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
      throw error;
    }
    const control = join(scratch, 'faults');
    writeFileSync(control, Buffer.alloc(CONTROL_BYTES));
    return new FaultyDisk(control, {
      LD_PRELOAD: library,
      STRATA_FAULT_DIRECTORY: directory,
      STRATA_FAULT_CONTROL: control,
      UV_USE_IO_URING: '0',
      ...(onlyProcess === undefined ? {} : { STRATA_FAULT_PROCESS: onlyProcess }),
    });
  }

  /** From the call after `succeed` more on, `fail` calls fail. */
  fail(fault: Fault, succeed = 0, fail = 2 ** 31): void {
    this.#write([0, 0, 0, 0]);
    this.#write([FAULTS[fault], succeed, fail, 0]);
  }

  /** Whoever changes the disk after `changes` more changes is killed (SIGKILL) in that moment. */
  killAfter(changes: number): void {
    this.#write([0, 0, 0, 0]);
    this.#write([DEATH, changes, 1, 0]);
  }

  /** Nothing fails any more. Returns how many calls have failed. */
  recover(): number {
    const { failedCount } = this;
    this.#write([0, 0, 0, 0]);
    return failedCount;
  }

  get failedCount(): number {
    return readFileSync(this.#control).readUInt32LE(12);
  }

  /** By how much the clock is ahead from now on. */
  setClockAhead(seconds: number): void {
    this.#clockAhead = seconds;
    this.recover();
  }

  #write(words: readonly number[]): void {
    const bytes = Buffer.from(new Uint32Array([...words, this.#clockAhead]).buffer);
    assert.equal(bytes.length, CONTROL_BYTES);
    // In place: it is mapped by others.
    writeFileSync(this.#control, bytes, { flag: 'r+' });
  }
}
