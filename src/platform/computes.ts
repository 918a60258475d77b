/**
 * The computes of this host, by endpoint: what api/control.ts asks for, over compute/compute.ts.
 */
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import type {
  ActivitySample,
  CatalogSpec,
  ComputeExitListener,
  Computes,
  ComputeSpec,
  StartedCompute,
} from '../api/control.ts';
import type { RunningCompute } from '../api/wake.ts';
import { StrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { Compute, type ComputeEnvironment } from '../compute/compute.ts';
import type { Installations } from '../compute/installation.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { makeFolderFor, type PlatformDirectory } from './platform-directory.ts';

export interface LocalComputesOptions {
  readonly directory: PlatformDirectory;
  readonly environment: Omit<ComputeEnvironment, 'installation'>;
  readonly installations: Installations;
  readonly log: Logger;
  /** Is told what takes long. */
  readonly progress?: (text: string) => void;
}

/** How long the platform's end waits for the last WAL of a compute to reach a quorum. What was acknowledged is there already. */
const STOP_TIMEOUT_MS = 15_000;
/** Less when nothing moves: there is no quorum. */
const STOP_STALL_MS = 4_000;
/** After which whoever waits for the end is told what it waits for. */
const STOP_NOTICE_MS = 1_500;

export class LocalComputes implements Computes {
  readonly #options: LocalComputesOptions;
  readonly #computes = new Map<string, Compute>();
  /** By timeline. */
  readonly #starting = new Map<string, Promise<Compute>>();
  /** Starts and stops under way: after them the computes that run are those of #computes. */
  readonly #changes = new Set<Promise<unknown>>();
  readonly #closing = new AbortController();
  readonly #exitListeners: ComputeExitListener[] = [];

  constructor(options: LocalComputesOptions) {
    this.#options = options;
  }

  start(spec: ComputeSpec): Promise<StartedCompute> {
    return this.#change(() => this.#start(spec));
  }

  async #start(spec: ComputeSpec): Promise<StartedCompute> {
    this.#closing.signal.throwIfAborted();
    const existing = this.#computes.get(spec.endpointId);
    if (existing !== undefined) return toRunning(spec.endpointId, existing);
    const { directory, environment, installations, log } = this.#options;
    const cacheDir = join(directory.computesDir, spec.endpointId);
    const socketDir = join(directory.runDir, spec.endpointId);
    makeFolderFor(environment.user, cacheDir);
    makeFolderFor(environment.user, socketDir);
    const starting = Compute.start({
      spec,
      cacheDir,
      socketDir,
      logFile: join(directory.logsDir, `${spec.endpointId}.log`),
      environment: { ...environment, installation: installations.of(spec.pgVersion) },
      signal: this.#closing.signal,
      log: log.child({ endpoint: spec.endpointId }),
    });
    this.#starting.set(spec.timelineId, starting);
    let compute: Compute;
    try {
      compute = await starting;
    } finally {
      this.#starting.delete(spec.timelineId);
    }
    this.#computes.set(spec.endpointId, compute);
    void compute.exited.then((reason) => {
      if (this.#computes.get(spec.endpointId) === compute) this.#computes.delete(spec.endpointId);
      if (reason === undefined) return;
      for (const listener of this.#exitListeners) listener(spec.endpointId, reason);
    });
    const { adoption } = compute;
    return { ...toRunning(spec.endpointId, compute), ...(adoption === undefined ? {} : { adoption }) };
  }

  running(endpointId: string): RunningCompute | undefined {
    const compute = this.#computes.get(endpointId);
    return compute === undefined ? undefined : toRunning(endpointId, compute);
  }

  async suspend(endpointId: string, timeoutMs?: number, stallMs?: number): Promise<void> {
    const compute = this.#computes.get(endpointId);
    this.#computes.delete(endpointId);
    if (compute !== undefined) await this.#change(() => compute.suspend(timeoutMs, stallMs));
  }

  async kill(endpointId: string, forget: boolean): Promise<void> {
    const compute = this.#computes.get(endpointId);
    this.#computes.delete(endpointId);
    if (compute !== undefined) await this.#change(() => compute.kill());
    if (!forget) return;
    const { directory } = this.#options;
    for (const parent of [directory.computesDir, directory.runDir]) {
      // Not in this thread, which brings the commits of all computes to the safekeepers: it may be gigabytes.
      await rm(join(parent, endpointId), { recursive: true, force: true, maxRetries: 20 });
    }
  }

  async applyCatalog(endpointId: string, catalog: CatalogSpec): Promise<void> {
    await this.#require(endpointId).applyCatalog(catalog);
  }

  async activity(endpointId: string): Promise<ActivitySample> {
    return this.#require(endpointId).activity();
  }

  onExit(listener: ComputeExitListener): void {
    this.#exitListeners.push(listener);
  }

  /**
   * Everything acknowledged on the timeline is below this LSN; undefined when none of this host's computes writes it. Waits for one that is just
   * starting, whose election must not be disturbed by another.
   */
  async commitLsnOf(timelineId: string): Promise<Lsn | undefined> {
    await this.#starting.get(timelineId)?.catch(() => {});
    for (const compute of this.#computes.values()) {
      if (compute.timelineId === timelineId) return compute.commitLsn;
    }
    return undefined;
  }

  /** From now on nothing starts, and starts that are under way end. */
  endStarts(): void {
    this.#closing.abort(new StrataError('unavailable', 'the platform is stopping'));
  }

  /** For good: ends starts, waits for stops that are under way, and suspends all that run, side by side. No Postgres is left then. */
  async suspendAll(): Promise<void> {
    this.endStarts();
    const waiting = new Set(this.#computes.keys());
    const notice = setTimeout(() => {
      const names = [...waiting].join(', ');
      this.#options.progress?.(`waiting for a quorum of safekeepers to take the last WAL of ${names}`);
    }, STOP_NOTICE_MS);
    const suspend = async (endpointId: string): Promise<void> => {
      await this.suspend(endpointId, STOP_TIMEOUT_MS, STOP_STALL_MS).finally(() => waiting.delete(endpointId));
    };
    await Promise.allSettled([...[...this.#computes.keys()].map(suspend), ...this.#changes]);
    // A start that the abort came too late for.
    await Promise.allSettled([...this.#computes.keys()].map(suspend));
    clearTimeout(notice);
  }

  async #change<T>(work: () => Promise<T>): Promise<T> {
    const change = work();
    this.#changes.add(change);
    try {
      return await change;
    } finally {
      this.#changes.delete(change);
    }
  }

  #require(endpointId: string): Compute {
    const compute = this.#computes.get(endpointId);
    if (compute === undefined) throw new StrataError('unavailable', `endpoint "${endpointId}" is not running`);
    return compute;
  }
}

function toRunning(endpointId: string, compute: Compute): RunningCompute {
  return { endpointId, socketPath: compute.socketPath };
}
