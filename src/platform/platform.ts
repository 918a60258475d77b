/**
 * The whole platform on one machine: safekeepers, a pageserver and the proxy as child processes, the control plane and the computes in this one.
 */
import { createServer } from 'node:net';
import { join } from 'node:path';
import { PLATFORM_FILE_NAME, type PlatformFile, type SafekeeperAdmin } from '../api/control.ts';
import { PageserverClient } from '../api/pageserver.ts';
import type { WakeService } from '../api/wake.ts';
import { wakeMethods } from '../api/wake-rpc.ts';
import { describeRebuiltLog, noteRebuiltLog, type RebuiltLog } from '../api/rebuilt-logs.ts';
import type { SafekeeperAddress } from '../api/safekeeper.ts';
import { addressesOf } from '../api/safekeeper-set.ts';
import { type DirectoryLock, lockDirectory } from '../base/directory-lock.ts';
import { writeFileDurably } from '../base/durable-file.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import { createLog, type Logger } from '../base/log.ts';
import { findProcessors, type Processors, SharedProcessor } from '../base/processors.ts';
import { listen, serveRpc } from '../base/rpc.ts';
import { signToken } from '../base/token.ts';
import { nodesOf } from '../consensus/configuration.ts';
import { findInstallation, Installations, unprivilegedUser } from '../compute/installation.ts';
import { ADMIN_ROLE } from '../compute/settings.ts';
import { backpressureLimits } from '../api/backpressure-limits.ts';
import type { StartOptions } from '../cli/start.ts';
import { buildShim } from '../compute/shim/build.ts';
import { Control } from '../control/control.ts';
import { createApiServer } from '../control/server.ts';
import { generationMethods, Settings } from '../control/settings.ts';
import { type Certificate, loadOrMakeCertificate } from '../proxy/certificate.ts';
import { openObjectStore } from '../object-store/open-object-store.ts';
import { OffloadedWal } from '../safekeeper/offloaded-wal.ts';
import { ChildService } from './child-service.ts';
import { LocalComputes } from './computes.ts';
import { LogRebuild } from './log-rebuild.ts';
import { rebuildWithout } from './lost-safekeepers.ts';
import { chooseObjectStore } from './object-store.ts';
import {
  loadOrMakeSecrets,
  openPlatformDirectory,
  withPlace,
  type PlatformDirectory,
  type Secrets,
} from './platform-directory.ts';
import { servicePorts } from './ports.ts';
import { changeToCount, chooseSafekeepers, directoryOf, Safekeepers } from './safekeepers.ts';
import { ClusterStorage } from './storage.ts';
import { WalHealer } from './wal-healer.ts';
import { rmSync } from 'node:fs';

export interface Platform {
  readonly connectionString: string;
  readonly apiUrl: string;
  /** Stops everything; all is kept for the next start. */
  stop(): Promise<void>;
}

const LOOPBACK = '127.0.0.1';
const LOCK_WAIT_MS = 3_000;
const FIRST_PROJECT_NAME = 'first';

/** `progress` is told what takes long. Throws coded errors before anything is started when something is wrong with the options or the machine. */
export async function startPlatform(
  options: StartOptions,
  version: string,
  progress: (text: string) => void,
): Promise<Platform> {
  const cleanup = new Cleanup();
  try {
    return await bringUp(options, version, progress, cleanup);
  } catch (error) {
    await cleanup.run();
    throw withPlace(error, options.dataDir);
  }
}

async function bringUp(
  options: StartOptions,
  version: string,
  progress: (text: string) => void,
  cleanup: Cleanup,
): Promise<Platform> {
  const user = unprivilegedUser();
  const found = findInstallation({
    ...(options.pgVersion === undefined ? {} : { pgVersion: options.pgVersion }),
    ...(options.pgBinDir === undefined ? {} : { pgBinDir: options.pgBinDir }),
  });
  const directory = openPlatformDirectory(options.dataDir, user);
  const lock = await lockPlatform(directory);
  cleanup.add(() => lock.release());
  await assertPortFree(options.pgPort, '--pg-port');
  await assertPortFree(options.httpPort, '--http-port');
  const shimFile = await buildShim(directory.runDir);
  const installations = new Installations(found, user, directory.runDir);
  const secrets = loadOrMakeSecrets(directory);
  const certificate = await loadOrMakeCertificate(
    join(directory.path, 'tls', 'cert.pem'),
    join(directory.path, 'tls', 'key.pem'),
  );
  const log = createLog({ name: 'platform', file: join(directory.logsDir, 'platform.log') });
  log.info({ ...options, version, postgres: found.fullVersion }, 'starting');

  const settings = Settings.open(directory.path);
  cleanup.add(() => settings.close());
  const objectStoreUrl = await chooseObjectStore(
    options.objectStore,
    directory.path,
    settings,
    options.refillObjectStore,
  );

  progress('starting storage');
  const few = findProcessors();
  const processors = few === undefined ? undefined : new SharedProcessor(few, log);
  const wakeService = Promise.withResolvers<WakeService>();
  const { safekeepers, pageserver, pageserverAddress, pageAddress, services, startProxy } = await startServices(
    options,
    directory,
    secrets,
    settings,
    objectStoreUrl,
    wakeService.promise,
    processors,
    progress,
    log,
    cleanup,
  );
  const proxy = startProxy(certificate);
  proxy.catch(() => {}); // awaited below
  const token = await signToken(secrets.platformSecret, { scope: 'platform' });
  const storage = new ClusterStorage({
    pageserver,
    safekeepers,
    token,
    installations,
    user,
    runDir: directory.runDir,
    adminPassword: secrets.adminPassword,
    commitLsnOf: (timelineId) => computes.commitLsnOf(timelineId),
    progress,
    log,
  });
  const wal = new OffloadedWal(await openObjectStore(objectStoreUrl));
  const rebuild = new LogRebuild({ safekeepers, pageserver, token, wal, log });
  cleanup.add(() => rebuild.close());
  const onRebuilt = (rebuilt: RebuiltLog): void => {
    noteRebuiltLog(directory.path, rebuilt);
    progress(describeRebuiltLog(rebuilt));
  };
  const healer = new WalHealer({ safekeepers, pageserver, token, log, rebuild, onRebuilt, onLoss: progress });
  cleanup.add(() => healer.close());
  await healer.heal(); // Before anything is woken: what was lost with a majority of the safekeepers' disks is rebuilt then.
  const computes = new LocalComputes({
    directory,
    installations,
    environment: {
      user,
      shimFile,
      safekeepers,
      pageserver,
      pageAddress,
      platformSecret: secrets.platformSecret,
      adminPassword: secrets.adminPassword,
      backpressure: backpressureLimits(options.walLimitBytes),
      processors,
    },
    progress,
    log,
  });
  cleanup.add(() => computes.suspendAll());

  const control = Control.open({
    dataDirectory: directory.path,
    storage,
    computes,
    log,
    config: {
      proxyHost: LOOPBACK,
      proxyPort: options.pgPort,
      domain: 'localhost',
      defaultPgVersion: found.pgVersion,
      availablePgVersions: installations.versions,
      suspendTimeoutSeconds: options.suspendTimeoutSeconds,
    },
  });
  cleanup.add(() => control.close());
  cleanup.add(() => computes.endStarts()); // first: closing the control plane waits for them
  let isReady = false;
  const safekeeperAdmin: SafekeeperAdmin = {
    list: () => safekeepers.list(),
    change: (change) => safekeepers.change(change),
    cancel: () => safekeepers.cancel(),
    rebuild: (ids, acceptsLoss) =>
      rebuildWithout({ safekeepers, rebuild, pageserver, onRebuilt, log }, ids, acceptsLoss),
  };
  const api = createApiServer({ control, safekeepers: safekeeperAdmin, isReady: () => isReady });
  cleanup.add(async () => {
    await api.close();
  });
  await api.listen({ host: LOOPBACK, port: options.httpPort }).catch((error: unknown) => {
    throw portRefused(options.httpPort, '--http-port', error); // a service has taken it meanwhile
  });
  await storage.ensureTemplate(found.pgVersion);
  await control.recover();
  if (control.projects.count() === 0) {
    progress('creating the first project');
    await control.projects.create({ name: FIRST_PROJECT_NAME });
  }
  wakeService.resolve(control);
  const proxyService = await proxy;
  cleanup.add(() => proxyService.stop()); // first of all: its clients
  control.startIdleMonitor();
  isReady = true;

  const platformFile = join(directory.path, PLATFORM_FILE_NAME);
  const file: PlatformFile = {
    pid: process.pid,
    host: LOOPBACK,
    httpPort: options.httpPort,
    pgPort: options.pgPort,
    pageserver: pageserverAddress,
    safekeepers: [],
    objectStore: objectStoreUrl,
    ...(options.walLimitBytes === undefined ? {} : { walLimitBytes: options.walLimitBytes }),
    installations: installations.all(),
    startedAtMs: Date.now(),
    version,
  };
  const writePlatformFile = (): void => {
    const addresses = Array.from(safekeepers.current.addresses, ([id, address]) => ({ id, ...address }));
    writeFileDurably(platformFile, `${JSON.stringify({ ...file, safekeepers: addresses }, undefined, 2)}\n`, 0o600);
  };
  writePlatformFile();
  const stopWriting = safekeepers.watch(writePlatformFile);
  cleanup.add(() => {
    stopWriting();
    rmSync(platformFile, { force: true });
  });
  safekeepers.resume();
  cleanup.add(() => safekeepers.close());
  if (options.safekeeperCount !== undefined) void changeCount(safekeepers, options.safekeeperCount, progress);
  log.info({ services: services.map((service) => service.pid), processors }, 'ready');
  return {
    connectionString: control.defaultConnectionUri(),
    apiUrl: `http://${LOOPBACK}:${options.httpPort}/api/v2`,
    stop: () => cleanup.run(),
  };
}

interface Services {
  readonly safekeepers: Safekeepers;
  readonly pageserver: PageserverClient;
  readonly pageserverAddress: SafekeeperAddress;
  readonly pageAddress: SafekeeperAddress;
  readonly services: readonly ChildService[];
  readonly startProxy: (certificate: Certificate) => Promise<ChildService>;
}

async function startServices(
  options: StartOptions,
  directory: PlatformDirectory,
  secrets: Secrets,
  settings: Settings,
  objectStoreUrl: string,
  wakeService: Promise<WakeService>,
  processors: Processors | undefined,
  progress: (text: string) => void,
  log: Logger,
  cleanup: Cleanup,
): Promise<Services> {
  const supervisor = await serveRpc({
    host: LOOPBACK,
    port: 0,
    secret: secrets.platformSecret,
    methods: { ...generationMethods(settings), ...wakeMethods(wakeService) },
  });
  cleanup.add(() => supervisor.close());
  const configuration = chooseSafekeepers(settings, directory.path, options.safekeeperCount);
  const nodes = nodesOf(configuration);
  const reserved = [options.pgPort, options.httpPort];
  const ports = await servicePorts(directory.path, LOOPBACK, Math.max(...nodes), reserved);
  const { rpcPort, pagePort, safekeeperPorts } = ports;
  const secret = secrets.platformSecret.toString('hex');
  const started: ChildService[] = [];
  const starts: Promise<ChildService>[] = [];
  const startOne = async (
    name: string,
    command: string[],
    config: () => Record<string, unknown>,
    onFailure?: (error: StrataError) => void,
  ): Promise<ChildService> => {
    const logFile = join(directory.logsDir, `${name}.log`);
    const serviceOptions = {
      name,
      command,
      config: () => ({ ...config(), host: LOOPBACK, secret }),
      logFile,
      log,
      // It makes much garbage when it has work: it gets Node's own defaults, which bin/strata lowers.
      processors: command[0] === 'safekeeper' ? processors?.shared : processors?.all,
      nodeFlags: name === 'pageserver' ? ['--max-semi-space-size=16', '--parallel-scavenge'] : [],
      isPlatformStopping: () => cleanup.isRunning,
    };
    const service = await (onFailure === undefined
      ? ChildService.start(serviceOptions)
      : ChildService.startPersistently(serviceOptions, onFailure));
    started.push(service);
    return service;
  };
  const start = (...args: Parameters<typeof startOne>): Promise<ChildService> => {
    const service = startOne(...args);
    starts.push(service);
    return service;
  };
  cleanup.add(async () => {
    // One that is still starting would hold up the end of a start that has failed: it is stopped as soon as it can be.
    await Promise.all(starts.map(async (service) => (await service.catch(() => undefined))?.stop()));
  });
  const token = await signToken(secrets.platformSecret, { scope: 'platform' });
  const pageserverAddress = { host: LOOPBACK, port: rpcPort };
  const pageserver = new PageserverClient({ ...pageserverAddress, token });
  cleanup.add(() => pageserver.close());
  const safekeepers = new Safekeepers({
    settings,
    dataDir: directory.path,
    host: LOOPBACK,
    socketDir: directory.runDir,
    startProcess: (nodeId, port, socketPath, onFailure) => {
      const config = () => ({
        nodeId,
        dataDir: directoryOf(directory.path, nodeId),
        port,
        socketPath,
        objectStore: objectStoreUrl,
        safekeeperCount: safekeepers.current.configuration.members.length,
      });
      return start(`safekeeper-${nodeId}`, ['safekeeper', String(nodeId)], config, onFailure);
    },
    identityOf: async (timelineId) => {
      const identity = await pageserver.timelineIdentity(timelineId).catch(unlessNotFound);
      return identity;
    },
    token,
    progress,
    log,
  });
  const safekeepersStarted = safekeepers.start(new Map(nodes.map((nodeId) => [nodeId, safekeeperPorts[nodeId - 1]!])));
  const pageserverStarted = start('pageserver', ['pageserver'], () => ({
    dataDir: join(directory.path, 'pageserver'),
    rpcPort,
    pagePort,
    safekeepers: addressesOf(safekeepers.current),
    objectStore: {
      url: objectStoreUrl,
      supervisor: { host: LOOPBACK, port: supervisor.port },
      ...(options.cacheBytes === undefined ? {} : { cacheBytes: options.cacheBytes }),
    },
  }));
  await Promise.all([safekeepersStarted, pageserverStarted]);
  // One that is just starting has been given them.
  safekeepers.watch(() => void pageserver.setSafekeepers(addressesOf(safekeepers.current)).catch(() => {}));
  return {
    safekeepers,
    pageserver,
    pageserverAddress,
    pageAddress: { host: LOOPBACK, port: pagePort },
    services: started,
    startProxy: (certificate) =>
      start('proxy', ['proxy'], () => ({
        port: options.pgPort,
        certificate,
        supervisor: { host: LOOPBACK, port: supervisor.port },
        refusedRoles: [ADMIN_ROLE],
      })),
  };
}

function unlessNotFound(error: unknown): undefined {
  if (toStrataError(error).code !== 'not-found') throw error;
}

/** In the background: the platform serves meanwhile. Never rejects. */
async function changeCount(safekeepers: Safekeepers, count: number, progress: (text: string) => void): Promise<void> {
  try {
    await safekeepers.changed();
    const change = changeToCount(safekeepers, count);
    if (change === undefined) return;
    progress(`changing from ${safekeepers.current.configuration.members.length} to ${count} safekeepers`);
    const members = await safekeepers.change(change);
    await safekeepers.changed();
    progress(`the safekeepers are ${members.join(', ')} now`);
  } catch (error) {
    progress(`the safekeepers could not be changed: ${toStrataError(error).message}`);
  }
}

async function lockPlatform(directory: PlatformDirectory): Promise<DirectoryLock> {
  try {
    return await lockDirectory(directory.path, LOCK_WAIT_MS);
  } catch (error) {
    if (!(error instanceof StrataError)) throw error;
    throw new StrataError(
      'conflict',
      `the data directory ${directory.path} is in use by another platform: stop that one, or choose another directory with --data-dir`,
      { cause: error },
    );
  }
}

async function assertPortFree(port: number, option: string): Promise<void> {
  const server = createServer();
  try {
    await listen(server, LOOPBACK, port);
  } catch (error) {
    throw portRefused(port, option, error);
  } finally {
    server.close();
  }
}

function portRefused(port: number, option: string, error: unknown): StrataError {
  const { code } = error as NodeJS.ErrnoException;
  const why = code === 'EADDRINUSE' ? 'is in use' : `cannot be listened on (${code})`;
  return new StrataError('conflict', `port ${port} ${why}: choose another with ${option}`, { cause: error });
}

/** What was started, to be stopped in the opposite order; each step is tried whatever the others do. */
class Cleanup {
  readonly #steps: (() => void | Promise<void>)[] = [];
  #isRunning = false;

  get isRunning(): boolean {
    return this.#isRunning;
  }

  add(step: () => void | Promise<void>): void {
    this.#steps.push(step);
  }

  async run(): Promise<void> {
    this.#isRunning = true;
    for (let step = this.#steps.pop(); step !== undefined; step = this.#steps.pop()) {
      try {
        await step();
      } catch (error) {
        console.error(`while stopping: ${error instanceof Error ? error.message : String(error)}`);
      }
    }
  }
}
