/**
 * One postmaster as a child process: start under the unprivileged user, wait until it accepts connections, stop.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, openSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { StrataError } from '../base/errors.ts';
import { installationEnvironment, type PostgresInstallation, type UnixUser } from './installation.ts';

export interface PostgresProcessOptions {
  readonly installation: PostgresInstallation;
  readonly dataDir: string;
  readonly logFile: string;
  readonly user: UnixUser | undefined;
  /** Added to a minimal environment. */
  readonly env?: Readonly<Record<string, string>>;
}

export type ShutdownMode = 'fast' | 'immediate';

const READY_POLL_MS = 2;
const READY_TIMEOUT_MS = 60_000;
const LOG_TAIL_BYTES = 2_000;

export interface PostgresExit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

export class PostgresProcess {
  readonly #child: ChildProcess;
  readonly #options: PostgresProcessOptions;
  readonly exited: Promise<PostgresExit>;
  #exit: PostgresExit | undefined;

  private constructor(child: ChildProcess, options: PostgresProcessOptions) {
    this.#child = child;
    this.#options = options;
    this.exited = new Promise((resolve) => {
      const finish = (code: number | null, signal: NodeJS.Signals | null): void => {
        this.#exit ??= { code, signal };
        resolve(this.#exit);
      };
      child.once('exit', finish);
      child.once('error', () => finish(null, null));
    });
  }

  /** Resolves when the postmaster says `ready` in its pid file. Throws `unavailable` with the end of its log when it dies before. */
  static async start(options: PostgresProcessOptions, signal?: AbortSignal): Promise<PostgresProcess> {
    const log = openSync(options.logFile, 'a', 0o600);
    const child = spawn(join(options.installation.binDir, 'postgres'), ['-D', options.dataDir], {
      cwd: options.dataDir,
      detached: true, // its own process group: a Ctrl-C in the terminal is the supervisor's to handle
      stdio: ['ignore', log, log],
      env: { ...installationEnvironment(options.installation), LC_ALL: 'C.UTF-8', ...options.env },
      ...(options.user === undefined ? {} : { uid: options.user.uid, gid: options.user.gid }),
    });
    closeSync(log);
    const postgres = new PostgresProcess(child, options);
    try {
      await postgres.#waitUntilReady(signal);
    } catch (error) {
      postgres.kill();
      await postgres.exited;
      throw error;
    }
    return postgres;
  }

  get pid(): number | undefined {
    return this.#child.pid;
  }

  get hasExited(): boolean {
    return this.#exit !== undefined;
  }

  /** Asks for a shutdown (SIGINT fast, SIGQUIT immediate) and waits; after `timeoutMs` it is killed. True when it went by itself. */
  async stop(mode: ShutdownMode, timeoutMs: number): Promise<boolean> {
    if (this.hasExited) return true;
    this.#child.kill(mode === 'fast' ? 'SIGINT' : 'SIGQUIT');
    const timeout = new AbortController();
    const gone = await Promise.race([
      this.exited.then(() => true),
      sleep(timeoutMs, false, { signal: timeout.signal }).catch(() => false),
    ]);
    timeout.abort();
    if (gone) return true;
    this.kill();
    await this.exited;
    return false;
  }

  /** kill -9 of the postmaster and all of its children. */
  kill(): void {
    const pid = this.#child.pid;
    if (pid === undefined || this.hasExited) return;
    const children = childrenOf(pid); // read first: they are orphans afterwards
    this.#child.kill('SIGKILL');
    for (const child of children) killQuietly(child);
  }

  async #waitUntilReady(signal: AbortSignal | undefined): Promise<void> {
    const pidFile = join(this.#options.dataDir, 'postmaster.pid');
    const deadline = performance.now() + READY_TIMEOUT_MS;
    for (;;) {
      signal?.throwIfAborted();
      if (this.#exit !== undefined) {
        throw new StrataError('unavailable', `Postgres did not start (${this.#describeExit()}): ${this.#logTail()}`);
      }
      if (isReady(pidFile, this.#child.pid)) return;
      if (performance.now() > deadline) {
        throw new StrataError(
          'timeout',
          `Postgres was not ready after ${READY_TIMEOUT_MS / 1000} s: ${this.#logTail()}`,
        );
      }
      await sleep(READY_POLL_MS);
    }
  }

  #describeExit(): string {
    const { code, signal } = this.#exit ?? { code: null, signal: null };
    return signal === null ? `exit code ${code}` : `signal ${signal}`;
  }

  #logTail(): string {
    try {
      return readFileSync(this.#options.logFile, 'utf8').slice(-LOG_TAIL_BYTES).trim();
    } catch {
      return `no log in ${this.#options.logFile}`;
    }
  }
}

/** Line 8 of postmaster.pid is the postmaster's state (src/include/utils/pidfile.h). */
function isReady(pidFile: string, pid: number | undefined): boolean {
  let lines: string[];
  try {
    lines = readFileSync(pidFile, 'utf8').split('\n');
  } catch {
    return false;
  }
  return Number(lines[0]) === pid && lines[7]?.trim() === 'ready';
}

/** Backends are in process groups of their own; those that are missed notice the postmaster's death themselves. */
function childrenOf(parentPid: number): readonly number[] {
  try {
    const text = readFileSync(`/proc/${parentPid}/task/${parentPid}/children`, 'utf8');
    return text.trim().split(/\s+/).filter(Boolean).map(Number);
  } catch {
    return [];
  }
}

function killQuietly(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch {
    // Gone already.
  }
}
