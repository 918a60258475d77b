/**
 * A service of the platform as a supervised child process: started with its configuration on standard input, restarted when it dies, and killed
 * when it is stuck. The other end of the contract is base/service-process.ts.
 *
 * Stuck is who leaves several pings in a row unanswered. They are counted, not timed: when this process itself, or the whole machine, was stopped
 * for a while, one ping at most has gone unanswered meanwhile.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { StrataError, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { keepTo } from '../base/processors.ts';
import { ALIVE, ASKED, PING } from '../base/service-process.ts';

export interface ChildServiceOptions {
  /** For messages, for example `safekeeper-2`. */
  readonly name: string;
  /** Arguments after the executable's own, for example `['safekeeper']`. */
  readonly command: readonly string[];
  /** Added to those of this process. */
  readonly nodeFlags?: readonly string[];
  /** It is kept to these (base/processors.ts); otherwise to those of this process. */
  readonly processors?: string | undefined;
  /** Sent as one line of JSON; may hold secrets. Asked for at each start of the process. */
  readonly config: () => unknown;
  readonly logFile: string;
  readonly log: Logger;
  /** Everything is being stopped, this service in its turn: a signal that it got for that is no reason to start it again. */
  readonly isPlatformStopping?: () => boolean;
  readonly pingIntervalMs?: number;
}

const READY_TIMEOUT_MS = 60_000;
const STOP_TIMEOUT_MS = 10_000;
/** Together generous: a service that is merely busy answers within this time. */
const PING_INTERVAL_MS = 5_000;
const MAX_UNANSWERED_PINGS = 6;
/** How long after a service's SIGTERM it is certain that the platform's own has been seen. */
const ASKED_GRACE_MS = 1_000;
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
  #unansweredPings = 0;

  private constructor(options: ChildServiceOptions) {
    this.#options = options;
  }

  /** Resolves when the service says that it is ready; throws `unavailable` when it dies before. */
  static async start(options: ChildServiceOptions): Promise<ChildService> {
    const service = new ChildService(options);
    await service.#launch();
    return service;
  }

  /** As `start`, but a first attempt that fails is told, and followed by others as after a death. */
  static async startPersistently(
    options: ChildServiceOptions,
    onFailure: (error: StrataError) => void,
  ): Promise<ChildService> {
    const service = new ChildService(options);
    try {
      await service.#launch();
    } catch (error) {
      const failure = toStrataError(error);
      onFailure(failure);
      void service.#restart(failure.message, 0);
    }
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
    child.stdin?.end();
    // Being killed costs a service nothing but the time to look at its files at the next start.
    const timer = setTimeout(() => child.kill('SIGKILL'), this.#unansweredPings > 1 ? 0 : STOP_TIMEOUT_MS);
    await gone;
    clearTimeout(timer);
  }

  async #launch(): Promise<void> {
    const { name, command, nodeFlags = [], processors, config, logFile, log } = this.#options;
    const startedAtMs = performance.now();
    const logHandle = openSync(logFile, 'a', 0o600);
    const [, script] = process.argv;
    const child = spawn(process.execPath, [...process.execArgv, ...nodeFlags, script ?? '', ...command], {
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
    child.stdin?.write(`${JSON.stringify(config())}\n`); // and stays open: its end tells the service that we are gone
    const timeout = new AbortController();
    const lines = createInterface({ input: child.stdout! });
    const ready = await Promise.race([
      new Promise<string>((resolve) => lines.once('line', resolve)),
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
    log.info(
      { service: name, pid: child.pid, startMs: Math.round(performance.now() - startedAtMs) },
      'service is ready',
    );
    if (processors !== undefined) void keepTo(processors, child.pid!, log);
    const pings = this.#ping(child);
    lines.on('line', (line) => {
      if (line === ALIVE) this.#unansweredPings = 0;
      else if (line === ASKED) this.#asked(child);
    });
    void exited.then((reason) => {
      clearInterval(pings);
      return this.#restart(reason, performance.now() - startedAtMs);
    });
  }

  #ping(child: ChildProcess): NodeJS.Timeout {
    const { name, log, pingIntervalMs } = this.#options;
    this.#unansweredPings = 0;
    const timer = setInterval(() => {
      if (this.#unansweredPings === MAX_UNANSWERED_PINGS) {
        log.error({ service: name, pid: child.pid, unansweredPings: this.#unansweredPings }, 'service is stuck: kill');
        child.kill('SIGKILL');
      } else if (!this.#stopping) {
        child.stdin?.write(`${PING}\n`);
      }
      this.#unansweredPings++;
    }, pingIntervalMs ?? PING_INTERVAL_MS);
    timer.unref();
    return timer;
  }

  /** Somebody sent SIGTERM to the service. If not to all of us, it was meant: the service stops, and starts again. */
  #asked(child: ChildProcess): void {
    const timer = setTimeout(() => {
      if (this.#options.isPlatformStopping?.() !== true) child.stdin?.end();
    }, ASKED_GRACE_MS);
    timer.unref();
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
