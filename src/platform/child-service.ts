/**
 * A service of the platform as a supervised child process: started with its configuration on standard input, restarted when it dies.
 * The other end of the contract is base/service-process.ts.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { StrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';

export interface ChildServiceOptions {
  /** For messages, for example `safekeeper-2`. */
  readonly name: string;
  /** Arguments after the executable's own, for example `['safekeeper']`. */
  readonly command: readonly string[];
  /** Sent as one line of JSON; may hold secrets. */
  readonly config: unknown;
  readonly logFile: string;
  readonly log: Logger;
}

const READY_TIMEOUT_MS = 60_000;
const STOP_TIMEOUT_MS = 30_000;
const RESTART_DELAY_MIN_MS = 50;
const RESTART_DELAY_MAX_MS = 5_000;
/** A service that ran for this long starts again at once. */
const STABLE_MS = 10_000;

export class ChildService {
  readonly #options: ChildServiceOptions;
  #child: ChildProcess | undefined;
  #stopping = false;
  #restartDelayMs = RESTART_DELAY_MIN_MS;
  #restartCount = 0;

  private constructor(options: ChildServiceOptions) {
    this.#options = options;
  }

  /** Resolves when the service says that it is ready; throws `unavailable` when it dies before. */
  static async start(options: ChildServiceOptions): Promise<ChildService> {
    const service = new ChildService(options);
    await service.#launch();
    return service;
  }

  get pid(): number | undefined {
    return this.#child?.pid;
  }

  get restartCount(): number {
    return this.#restartCount;
  }

  async stop(): Promise<void> {
    this.#stopping = true;
    const child = this.#child;
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return;
    const gone = new Promise<void>((resolve) => child.once('exit', () => resolve()));
    child.kill('SIGTERM');
    const timer = setTimeout(() => child.kill('SIGKILL'), STOP_TIMEOUT_MS);
    await gone;
    clearTimeout(timer);
  }

  async #launch(): Promise<void> {
    const { name, command, config, logFile, log } = this.#options;
    const startedAtMs = Date.now();
    const logHandle = openSync(logFile, 'a', 0o600);
    const [, script] = process.argv;
    const child = spawn(process.execPath, [...process.execArgv, script ?? '', ...command], {
      stdio: ['pipe', 'pipe', logHandle],
      env: process.env,
    });
    closeSync(logHandle);
    this.#child = child;
    const exited = new Promise<string>((resolve) => {
      child.once('exit', (code, signal) => resolve(signal === null ? `exit code ${code}` : `signal ${signal}`));
      child.once('error', (error) => resolve(error.message));
    });
    child.stdin?.on('error', () => {});
    child.stdin?.write(`${JSON.stringify(config)}\n`); // and stays open: its end tells the service that we are gone
    const timeout = new AbortController();
    const ready = await Promise.race([
      firstLine(child),
      exited.then(
        (reason) => new StrataError('unavailable', `${name} stopped while starting (${reason}): see ${logFile}`),
      ),
      sleep(READY_TIMEOUT_MS, undefined, { signal: timeout.signal }).then(
        () => new StrataError('timeout', `${name} was not ready after ${READY_TIMEOUT_MS / 1000} s: see ${logFile}`),
        () => undefined,
      ),
    ]);
    timeout.abort();
    if (ready instanceof StrataError) {
      child.kill('SIGKILL');
      throw ready;
    }
    log.info({ service: name, pid: child.pid, startMs: Date.now() - startedAtMs }, 'service is ready');
    void exited.then((reason) => this.#restart(reason, Date.now() - startedAtMs));
  }

  async #restart(reason: string, ranMs: number): Promise<void> {
    const { name, log } = this.#options;
    if (ranMs > STABLE_MS) this.#restartDelayMs = RESTART_DELAY_MIN_MS;
    while (!this.#stopping) {
      log.warn({ service: name, reason, delayMs: this.#restartDelayMs }, 'service stopped, starting it again');
      await sleep(this.#restartDelayMs);
      this.#restartDelayMs = Math.min(2 * this.#restartDelayMs, RESTART_DELAY_MAX_MS);
      if (this.#stopping) return;
      try {
        this.#restartCount++;
        await this.#launch();
        return;
      } catch (error) {
        log.error({ service: name, err: error }, 'service did not start');
      }
    }
  }
}

async function firstLine(child: ChildProcess): Promise<string | undefined> {
  if (child.stdout === null) return undefined;
  const lines = createInterface({ input: child.stdout });
  return new Promise((resolve) => {
    lines.once('line', resolve);
  });
}
