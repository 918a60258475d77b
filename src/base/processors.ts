/**
 * Where processors are few, those processes between which a commit goes to and fro keep to one of them: the supervisor, with the proposers, the safekeepers, and
 * the process of each Postgres that sends it WAL.
 *
 * Each works for some tens of microseconds and sleeps. Waking a process on another processor costs a multiple of waking it on the same, in a virtual machine
 * above all, and the scheduler prefers an idle processor to a near one. What clients and pages need stays free: the rest of Postgres, the pageserver, the proxy. Where
 * processors are many, one of them would be too few for bulk writes. Measured in docs/decisions/commit-path.md.
 */
import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { promisify } from 'node:util';
import type { Logger } from './log.ts';

const MOST_PROCESSORS = 4;

/** Processors as lists, in the kernel's form: `0-1,4`. */
export interface Processors {
  /** All that this process was started with. */
  readonly all: string;
  /** The one to share. */
  readonly shared: string;
}

/** What commits share. To start a Postgres takes half as long again from there, so this process keeps to it only while one sends it WAL. */
export class SharedProcessor implements Processors {
  readonly all: string;
  readonly shared: string;
  readonly #log: Logger;
  #senderCount = 0;
  #moved: Promise<void> = Promise.resolve();

  constructor({ all, shared }: Processors, log: Logger) {
    this.all = all;
    this.shared = shared;
    this.#log = log;
  }

  /** Keeps a process that sends WAL to it, and this process until the function that is returned is called for each. */
  keepSender(pid: number): () => void {
    void keepTo(this.shared, pid, this.#log);
    if (this.#senderCount++ === 0) this.#move(this.shared);
    let isThere = true;
    return () => {
      if (isThere && --this.#senderCount === 0) this.#move(this.all);
      isThere = false;
    };
  }

  /** One move after the other: the last one counts. */
  #move(processors: string): void {
    this.#moved = this.#moved.then(() => keepTo(processors, process.pid, this.#log));
  }
}

/** Undefined when the scheduler is to decide. Must be asked before this process itself is kept to one. */
export function findProcessors(): Processors | undefined {
  try {
    const status = readFileSync('/proc/self/status', 'latin1');
    return shareOf(/^Cpus_allowed_list:\s*(\S+)$/m.exec(status)?.[1] ?? '');
  } catch {
    return undefined; // Not Linux.
  }
}

/** The last is shared: interrupts and what else is bound to a processor go to the first, as a rule. */
export function shareOf(all: string): Processors | undefined {
  const ranges = all.split(',').map((range) => range.split('-').map(Number));
  const count = ranges.reduce((sum, [first = Number.NaN, last = first]) => sum + last - first + 1, 0);
  return count >= 2 && count <= MOST_PROCESSORS ? { all, shared: String(ranges.at(-1)!.at(-1)) } : undefined;
}

/** Keeps all threads of a process, and what it starts from then on, to a list of processors. Where that cannot be (no `taskset`, for example), it is only slower. */
export async function keepTo(processors: string, pid: number, log?: Logger): Promise<void> {
  try {
    await promisify(execFile)('taskset', ['-a', '-c', '-p', processors, String(pid)]);
  } catch (error) {
    log?.debug({ pid, processors, err: error }, 'a process cannot be kept to some processors');
  }
}
