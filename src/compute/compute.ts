/**
 * One compute: an unmodified Postgres for one branch, from election to shutdown.
 *
 *   start    elect a proposer (the branch's WAL is then whole and committed up to E) → data directory at E, from the page store or from the
 *            kept cache → Postgres with the page shim → its WAL goes to the safekeepers
 *            The election takes about as long as what follows it, and E is nearly always where the kept cache or the pageserver ends. So a
 *            Postgres is started there meanwhile. Until the election has confirmed its LSN nobody is told of it and nothing of its WAL
 *            leaves it; when the branch ends elsewhere it is killed, with its directory, and another is started at E.
 *   suspend  clean shutdown; the last WAL is on a quorum before it counts as one; the directory is kept as a cache
 *   death    whoever finds that Postgres is gone, or that another compute leads the branch, ends this one at once
 */
import { join } from 'node:path';
import type { Client } from 'pg';
import type { BackpressureLimits } from '../api/backpressure-limits.ts';
import type { ActivitySample, AdoptionReport, CatalogSpec, ComputeSpec } from '../api/control.ts';
import type { PageserverClient } from '../api/pageserver.ts';
import type { SafekeeperDirectory } from '../api/safekeeper-set.ts';
import { toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import type { SharedProcessor } from '../base/processors.ts';
import { signToken } from '../base/token.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import { ActivityMonitor, applyCatalog, connectAdmin } from './admin.ts';
import { adoptCluster, prepareAdoption } from './adoption.ts';
import { keepCache, newInstance, takeCache } from './cache.ts';
import { refreshDataDirectory, writeDataDirectory } from './data-directory.ts';
import type { PostgresInstallation, UnixUser } from './installation.ts';
import { LsnLease } from './lsn-lease.ts';
import { PostgresProcess } from './postgres-process.ts';
import { electProposer, type Proposer } from './proposer.ts';
import { ADMIN_ROLE, PROPOSER_NAME } from './settings.ts';
import { clearStaleSocket } from './stale-socket.ts';
import { startWalPush, type WalPush } from './wal-push.ts';

export interface ComputeEnvironment {
  readonly installation: PostgresInstallation;
  /** Whom Postgres runs as; undefined: as we do. */
  readonly user: UnixUser | undefined;
  readonly shimFile: string;
  readonly safekeepers: SafekeeperDirectory;
  readonly pageserver: PageserverClient;
  /** Where the shim asks for pages. */
  readonly pageAddress: { readonly host: string; readonly port: number };
  /** Undefined when the scheduler decides. */
  readonly processors?: SharedProcessor | undefined;
  readonly platformSecret: Uint8Array;
  readonly adminPassword: string;
  /** When storage lags; those of api/backpressure-limits.ts when absent. */
  readonly backpressure?: BackpressureLimits;
}

export interface ComputeOptions {
  readonly spec: ComputeSpec;
  /** Folder of this endpoint's instances; exists, owned by the user. */
  readonly cacheDir: string;
  /** Short path for the socket; exists, owned by the user. */
  readonly socketDir: string;
  readonly logFile: string;
  readonly environment: ComputeEnvironment;
  /** Aborting ends a start; a compute that is up goes on. */
  readonly signal?: AbortSignal;
  readonly log: Logger;
}

const SOCKET_NAME = '.s.PGSQL.5432';
const ELECTION_TIMEOUT_MS = 60_000;
const BASEBACKUP_TIMEOUT_MS = 120_000;
const SUSPEND_TIMEOUT_MS = 60_000;
const STALL_CHECK_MS = 250;

export class Compute {
  readonly #options: ComputeOptions;
  readonly #instanceDir: string;
  readonly #postgres: PostgresProcess;
  readonly #proposer: Proposer;
  readonly #walPush: WalPush;
  readonly #lease: LsnLease;
  #monitor: { readonly client: Client; readonly activity: ActivityMonitor } | undefined;
  #adoption: AdoptionReport | undefined;
  #isStopping = false;
  #resolveExited: (reason: string | undefined) => void = () => {};
  /** Resolves when the compute is gone: undefined when it was asked to, else why. */
  readonly exited: Promise<string | undefined>;

  private constructor(
    options: ComputeOptions,
    parts: { instanceDir: string; postgres: PostgresProcess; proposer: Proposer; walPush: WalPush; lease: LsnLease },
  ) {
    this.#options = options;
    this.#instanceDir = parts.instanceDir;
    this.#postgres = parts.postgres;
    this.#proposer = parts.proposer;
    this.#walPush = parts.walPush;
    this.#lease = parts.lease;
    this.exited = new Promise((resolve) => (this.#resolveExited = resolve));
    this.#watch();
  }

  /** Resolves when clients can connect. Throws coded errors; nothing is left running then. */
  static async start(options: ComputeOptions): Promise<Compute> {
    const { spec, environment, log } = options;
    const times = new Stopwatch();
    const identity = await environment.pageserver.timelineIdentity(spec.timelineId, options.signal);
    const token = await signToken(environment.platformSecret, { scope: 'platform' });
    const giveUp = new AbortController();
    const signal = options.signal === undefined ? giveUp.signal : AbortSignal.any([options.signal, giveUp.signal]);
    signal.throwIfAborted();
    const early = startInstance(options, undefined, signal, times).catch((error: unknown) => {
      if (!signal.aborted) log.info({ err: error }, 'nothing could be started before the election was won');
      return undefined;
    });
    const electionSignal = AbortSignal.any([signal, AbortSignal.timeout(ELECTION_TIMEOUT_MS)]);
    const { safekeepers, backpressure } = environment;
    const proposer = await times
      .lap(
        'election',
        electProposer({
          safekeepers,
          token,
          timeline: identity,
          mayCreate: !identity.hasWal,
          ...(backpressure === undefined ? {} : { backpressure }),
          signal: electionSignal,
          log,
        }),
      )
      .catch(async (error: unknown) => {
        giveUp.abort();
        await discard(await early);
        throw error;
      });
    let instance = await early;
    const onAbort = (): void => instance?.postgres.kill(); // whatever waits for it then ends
    signal.addEventListener('abort', onAbort);
    try {
      if (instance?.lsn !== proposer.startLsn) {
        await discard(instance);
        instance = undefined;
        instance = await startInstance(options, proposer.startLsn, signal, times);
      }
      const walPush = await times.lap(
        'walPush',
        startWalPush({
          socketDir: options.socketDir,
          port: 5432,
          user: ADMIN_ROLE,
          password: environment.adminPassword,
          slotName: PROPOSER_NAME,
          proposer,
          log,
          processor: environment.processors,
        }),
      );
      const { instanceDir, postgres, isKept, lease } = instance;
      const compute = new Compute(options, { instanceDir, postgres, proposer, walPush, lease });
      if (spec.adoption !== undefined) await times.lap('adoption', compute.#adopt(spec.adoption.ownerName));
      else if (spec.catalog !== undefined) await times.lap('catalog', compute.applyCatalog(spec.catalog));
      signal.throwIfAborted();
      log.info({ startLsn: formatLsn(proposer.startLsn), term: proposer.term, isKept, ...times.laps }, 'compute is up');
      return compute;
    } catch (error) {
      await discard(instance);
      await proposer.close();
      throw error;
    } finally {
      signal.removeEventListener('abort', onAbort);
    }
  }

  get timelineId(): string {
    return this.#options.spec.timelineId;
  }

  /** What the adoption found, when this start was one. */
  get adoption(): AdoptionReport | undefined {
    return this.#adoption;
  }

  get socketPath(): string {
    return join(this.#options.socketDir, SOCKET_NAME);
  }

  get commitLsn(): Lsn {
    return this.#proposer.commitLsn;
  }

  async applyCatalog(catalog: CatalogSpec): Promise<void> {
    const client = await this.#connectAdmin();
    try {
      await applyCatalog(client, catalog);
    } finally {
      await client.end();
    }
  }

  async #adopt(ownerName: string): Promise<void> {
    const { spec, environment } = this.#options;
    this.#adoption = await adoptCluster({
      connect: (database, options) => this.#connectAdmin(database, options),
      pgVersion: environment.installation.pgVersion,
      catalog: spec.catalog ?? { roles: [], databases: [] },
      ownerName,
    });
  }

  async activity(): Promise<ActivitySample> {
    if (this.#monitor === undefined) {
      const client = await this.#connectAdmin();
      client.once('end', () => (this.#monitor = undefined));
      this.#monitor = { client, activity: new ActivityMonitor(client) };
    }
    return this.#monitor.activity.sample();
  }

  /**
   * Clean shutdown. When the safekeepers cannot take the last WAL in time, or for `stallMs` take none, it is an unclean one, which loses nothing
   * acknowledged.
   */
  async suspend(timeoutMs = SUSPEND_TIMEOUT_MS, stallMs = timeoutMs): Promise<void> {
    this.#isStopping = true;
    const { log, cacheDir, environment } = this.#options;
    await this.#monitor?.client.end().catch(() => {});
    const stall = this.#killWhenStalled(stallMs);
    const isClean = await this.#postgres.stop('fast', timeoutMs);
    clearInterval(stall);
    const endLsn = this.#proposer.endLsn;
    const isWhole = isClean && !this.#proposer.fenced && this.#proposer.commitLsn === endLsn;
    if (isWhole && (await this.#postgres.exited).code === 0) {
      const { fullVersion } = environment.installation;
      keepCache(cacheDir, this.#instanceDir, { timelineId: this.timelineId, endLsn, fullVersion });
    } else {
      log.warn({ isClean, endLsn: formatLsn(endLsn), commitLsn: formatLsn(this.commitLsn) }, 'suspended uncleanly');
    }
    await this.#close();
    this.#resolveExited(undefined);
  }

  #killWhenStalled(stallMs: number): NodeJS.Timeout {
    let seenLsn = this.commitLsn;
    let movedAtMs = performance.now();
    return setInterval(() => {
      const { commitLsn, endLsn } = this.#proposer;
      if (commitLsn > seenLsn || commitLsn === endLsn) movedAtMs = performance.now();
      seenLsn = commitLsn;
      if (performance.now() - movedAtMs >= stallMs) this.#postgres.kill();
    }, STALL_CHECK_MS);
  }

  /** kill -9. */
  async kill(): Promise<void> {
    this.#isStopping = true;
    this.#postgres.kill();
    await this.#postgres.exited;
    await this.#close();
    this.#resolveExited(undefined);
  }

  #watch(): void {
    this.#proposer.once('fenced', (term) => this.#die(`another compute leads this branch (term ${term})`));
    if (this.#proposer.fenced) this.#die('another compute leads this branch');
    void this.#lease.lost.then((reason) => this.#die(`its pages are no longer kept: ${reason}`));
    void this.#walPush.closed.then((reason) => this.#die(`the WAL stream ended: ${reason}`));
    void this.#postgres.exited.then(({ code, signal }) => {
      this.#die(signal === null ? `Postgres exited with code ${code}` : `Postgres was killed by ${signal}`);
    });
  }

  #die(reason: string): void {
    if (this.#isStopping) return;
    this.#isStopping = true;
    this.#options.log.warn({ reason }, 'compute is gone');
    this.#postgres.kill();
    void this.#postgres.exited.then(() => this.#close()).finally(() => this.#resolveExited(reason));
  }

  async #close(): Promise<void> {
    this.#lease.release();
    await this.#walPush.close();
    await this.#proposer.close();
  }

  #connectAdmin(database?: string, options?: string): Promise<Client> {
    const { socketDir, environment } = this.#options;
    return connectAdmin({ socketDir, password: environment.adminPassword }, database, options);
  }
}

/** A Postgres that runs, at a state that was the branch's at `lsn`. */
interface Instance {
  readonly lsn: Lsn;
  readonly instanceDir: string;
  readonly isKept: boolean;
  readonly postgres: PostgresProcess;
  /** On the LSN at which absent pages are fetched. */
  readonly lease: LsnLease;
}

/** At `lsn`; undefined: wherever the kept cache ends, or else the pageserver. Nothing is left running when it throws. */
async function startInstance(
  options: ComputeOptions,
  lsn: Lsn | undefined,
  signal: AbortSignal,
  times: Stopwatch,
): Promise<Instance> {
  const { installation, user } = options.environment;
  const directory = await times.lap('directory', prepareDirectory(options, lsn, signal));
  const process = {
    installation,
    dataDir: join(directory.instanceDir, 'data'),
    logFile: options.logFile,
    user,
    env: shimEnvironment(options, directory.instanceDir),
  };
  try {
    signal.throwIfAborted();
    if (options.spec.adoption !== undefined) {
      await times.lap('prepareAdoption', prepareAdoption({ ...process, signal }, options.environment.adminPassword));
    }
    await clearStaleSocket(options.socketDir, SOCKET_NAME);
    const postgres = await times.lap('postgres', PostgresProcess.start(process, signal));
    return { ...directory, postgres };
  } catch (error) {
    directory.lease.release();
    throw error;
  }
}

/** Its directory is no cache (takeCache took the mark away): the next one puts it aside. */
async function discard(instance: Instance | undefined): Promise<void> {
  instance?.lease.release();
  instance?.postgres.kill();
  await instance?.postgres.exited;
}

/** The kept folder when the branch is exactly where it was left, else a new one. */
async function prepareDirectory(
  options: ComputeOptions,
  lsn: Lsn | undefined,
  signal: AbortSignal,
): Promise<Omit<Instance, 'postgres'>> {
  const { spec, cacheDir, socketDir, environment } = options;
  const { installation, user, pageserver, platformSecret } = environment;
  const { timelineId } = spec;
  const kept = takeCache(cacheDir, { timelineId, endLsn: lsn, fullVersion: installation.fullVersion });
  const token = await signToken(platformSecret, { scope: 'timeline', timelineId });
  const settings = { pgVersion: installation.pgVersion, socketDir };
  const common = { timelineId, user, token, settings };
  const leaseAt = (fetchLsn: Lsn): Promise<LsnLease> =>
    LsnLease.take(pageserver, timelineId, fetchLsn, { signal, log: options.log });
  if (kept !== undefined) {
    const fetchLsn = refreshDataDirectory({ ...common, instanceDir: kept.instanceDir });
    const lease = fetchLsn === undefined ? undefined : await leaseAt(fetchLsn).catch(unlessGone);
    if (lease !== undefined) return { lsn: kept.endLsn, instanceDir: kept.instanceDir, isKept: true, lease };
  }
  const basebackup = await pageserver.basebackup(timelineId, lsn, BASEBACKUP_TIMEOUT_MS, signal);
  signal.throwIfAborted();
  const instanceDir = newInstance(cacheDir);
  writeDataDirectory({ ...common, instanceDir }, basebackup);
  return { lsn: basebackup.lsn, instanceDir, isKept: false, lease: await leaseAt(basebackup.lsn) };
}

/** A cache whose absent pages are no longer kept is of no use. */
function unlessGone(error: unknown): undefined {
  if (toStrataError(error).code !== 'history-gone') throw error;
}

function shimEnvironment(options: ComputeOptions, instanceDir: string): Record<string, string> {
  const { shimFile, pageAddress, processors } = options.environment;
  return {
    LD_PRELOAD: shimFile,
    STRATA_PAGESERVER: `${pageAddress.host}:${pageAddress.port}`,
    STRATA_TIMELINE: options.spec.timelineId,
    STRATA_TOKEN_FILE: join(instanceDir, 'token'),
    STRATA_PAGE_MAP: join(instanceDir, 'pages.map'),
    STRATA_DATA_DIR: join(instanceDir, 'data'),
    STRATA_PARENT_DEATH: '1',
    ...(processors === undefined ? {} : { STRATA_PROCESSORS: processors.all }),
  };
}

/** How long the parts of a start took, in milliseconds, for the log. Some go on at the same time. */
class Stopwatch {
  readonly laps: Record<string, number> = {};
  readonly #startMs = performance.now();

  async lap<T>(name: string, work: Promise<T>): Promise<T> {
    const startMs = performance.now();
    try {
      return await work;
    } finally {
      this.laps[`${name}Ms`] = roundMs(performance.now() - startMs);
      this.laps['totalMs'] = roundMs(performance.now() - this.#startMs);
    }
  }
}

function roundMs(ms: number): number {
  return Math.round(ms * 10) / 10;
}
