/**
 * The one executable: the command line for people, and the roles that the supervisor starts as child processes of its own (`pageserver`,
 * `safekeeper`, `proxy`), whose configuration comes on standard input. Each loads only what it runs: code takes memory, in every process anew.
 */
import { readFileSync } from 'node:fs';
import { flushCompileCache } from 'node:module';
import { join } from 'node:path';
import { StrataError } from './base/errors.ts';
import type { ExportTool } from './cli/export.ts';
import type { StartOptions } from './cli/start.ts';
import type { WalTools, WalVerification } from './cli/wal.ts';
import { WalError } from './postgres/wal/error.ts';
import type { OffloadLimits } from './safekeeper/offloader.ts';

interface SafekeeperProcessConfig {
  readonly nodeId: number;
  readonly dataDir: string;
  readonly host: string;
  readonly port: number;
  readonly socketPath?: string;
  readonly objectStore?: string;
  readonly safekeeperCount?: number;
  readonly offload?: Partial<OffloadLimits>;
  /** Hex. */
  readonly secret: string;
}

interface PageserverProcessConfig {
  readonly dataDir: string;
  readonly host: string;
  readonly rpcPort: number;
  readonly pagePort: number;
  readonly safekeepers: readonly { readonly host: string; readonly port: number }[];
  /** Hex. */
  readonly secret: string;
  readonly objectStore: {
    readonly url: string;
    /** Of whom generations are asked for. */
    readonly supervisor: { readonly host: string; readonly port: number };
    readonly cacheBytes?: number;
  };
}

interface ProxyProcessConfig {
  readonly host: string;
  readonly port: number;
  readonly certificate: { readonly cert: string; readonly key: string };
  readonly supervisor: { readonly host: string; readonly port: number };
  readonly refusedRoles: readonly string[];
  /** Hex. */
  readonly secret: string;
}

const PARENT_POLL_MS = 250;

const [role] = process.argv.slice(2);
// Everybody on the machine can read arguments, and one may hold a password: this overwrites them.
if (role === 'import') process.title = 'strata import';
if (role === 'safekeeper') {
  const { createLog, runServiceProcess } = await loadService();
  const { runSafekeeper } = await import('./safekeeper/main.ts');
  await runServiceProcess(async (config: SafekeeperProcessConfig) => {
    const log = createLog({ name: `safekeeper-${config.nodeId}` });
    const offloadSeconds = process.env['STRATA_TEST_OFFLOAD_SECONDS'];
    const quietMs = Number(offloadSeconds) * 1000;
    const offload = offloadSeconds === undefined ? {} : { offload: { quietMs, turnMs: quietMs / 5 } };
    const onLost = (path: string): never => {
      log.fatal({ path }, 'what was on the disk is gone: starting anew with what is there');
      process.exit(1);
    };
    const secret = Buffer.from(config.secret, 'hex');
    const service = await runSafekeeper({ ...offload, ...config, secret, log, onLost });
    flushCompileCache();
    return { service, ready: { port: service.port } };
  });
} else if (role === 'pageserver') {
  const { createLog, runServiceProcess } = await loadService();
  const { runPageserver } = await import('./pageserver/main.ts');
  await runServiceProcess(async (config: PageserverProcessConfig) => {
    const log = createLog({ name: 'pageserver' });
    const [{ GenerationsClient }, { signToken }, { openObjectStore }, { BRIEF_RETRY }] = await Promise.all([
      import('./api/generations.ts'),
      import('./base/token.ts'),
      import('./object-store/open-object-store.ts'),
      import('./object-store/retry.ts'),
    ]);
    const secret = Buffer.from(config.secret, 'hex');
    const { url, supervisor, cacheBytes } = config.objectStore;
    const generations = new GenerationsClient({ ...supervisor, token: await signToken(secret, { scope: 'platform' }) });
    const store = await openObjectStore(url, { retry: BRIEF_RETRY });
    const remote = { store, generations, ...(cacheBytes === undefined ? {} : { cacheBytes }) };
    const leaseSeconds = process.env['STRATA_TEST_LEASE_SECONDS'];
    const limits = leaseSeconds === undefined ? {} : { leaseMs: Number(leaseSeconds) * 1000 };
    const service = await runPageserver({ ...config, limits, secret, remote, log });
    flushCompileCache();
    return { service, ready: { rpcPort: service.rpcPort, pagePort: service.pagePort } };
  });
} else if (role === 'proxy') {
  const { createLog, runServiceProcess } = await loadService();
  const { runProxy } = await import('./proxy/main.ts');
  await runServiceProcess(async (config: ProxyProcessConfig) => {
    const log = createLog({ name: 'proxy' });
    const service = await runProxy({ ...config, secret: Buffer.from(config.secret, 'hex'), log });
    flushCompileCache();
    return { service, ready: { port: service.port } };
  });
} else {
  const { runCli } = await import('./cli/program.ts');
  process.exitCode = await runCli(process.argv.slice(2), {
    version: packageVersion(),
    start,
    wal: {
      verify: verifyDirectory,
      dump,
      connection: async ({ platform, timelineId }) => {
        const { branchWalConnection } = await import('./platform/branch-wal.ts');
        return branchWalConnection({ ...platform, timelineId });
      },
    },
    walLags: async (platform) => {
      const { readWalLags } = await import('./platform/branch-wal.ts');
      return readWalLags(platform);
    },
    export: exportDirectory,
    scrub: async ({ platform, ...rest }) => {
      const { scrubPlatform } = await import('./platform/scrub.ts');
      return scrubPlatform({ ...platform, ...rest });
    },
  });
}

/** What every service needs. */
async function loadService() {
  const [{ createLog }, { runServiceProcess }] = await Promise.all([
    import('./base/log.ts'),
    import('./base/service-process.ts'),
  ]);
  return { createLog, runServiceProcess };
}

/** `strata wal verify`. */
async function verifyDirectory(...[directory, options]: Parameters<WalTools['verify']>): Promise<WalVerification> {
  return withCodedErrors(async () => {
    const { startLsn, ...rest } = options;
    const { openWalDirectory, openWalDirectoryAtCheckpoint } = await import('./pageserver/wal-directory.ts');
    const { verifyWal } = await import('./pageserver/wal-verify.ts');
    const source =
      startLsn === undefined
        ? await openWalDirectoryAtCheckpoint(directory)
        : await openWalDirectory(directory, startLsn);
    return verifyWal(source, rest);
  });
}

/** `strata wal dump`. */
async function dump(...[place, filter, onRecords]: Parameters<WalTools['dump']>): Promise<string | undefined> {
  return withCodedErrors(async () => {
    const { startLsn } = filter;
    const { openWalDirectory } = await import('./pageserver/wal-directory.ts');
    const { openBranchWal } = await import('./platform/branch-wal.ts');
    const { dumpWal } = await import('./pageserver/wal-dump.ts');
    const source =
      place.kind === 'directory'
        ? await openWalDirectory(place.path, startLsn)
        : await openBranchWal({ ...place.platform, timelineId: place.timelineId, startLsn });
    return dumpWal(source, filter, onRecords);
  });
}

/** `strata export`. Ctrl-C ends it, and nothing is left. */
async function exportDirectory(...[request]: Parameters<ExportTool>): ReturnType<ExportTool> {
  const { platform, ...rest } = request;
  const interrupted = new AbortController();
  const onSignal = (): void => interrupted.abort(new StrataError('unavailable', 'interrupted; nothing is left of it'));
  process.once('SIGINT', onSignal);
  process.once('SIGTERM', onSignal);
  const { exportBranch } = await import('./platform/branch-export.ts');
  return exportBranch({ ...platform, ...rest, signal: interrupted.signal });
}

/** WAL that is not what it should be is the world's fault, to be told without a stack. */
async function withCodedErrors<T>(work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (error instanceof WalError) throw new StrataError('bad-request', error.message, { cause: error });
    throw error;
  }
}

/** `strata start`: runs in the foreground until SIGINT, SIGTERM or SIGHUP. */
async function start(options: StartOptions): Promise<void> {
  const stopping = new Promise<void>((resolve) => {
    process.once('SIGINT', resolve);
    process.once('SIGTERM', resolve);
    process.once('SIGHUP', resolve); // the terminal was closed
    if (process.env['npm_lifecycle_event'] === 'start') onceParentIsGone(resolve);
  });
  let isStarted = false;
  void stopping.then(() => console.error(isStarted ? 'stopping …' : 'stopping as soon as everything has started …'));
  const { startPlatform } = await import('./platform/platform.ts');
  const platform = await startPlatform(options, packageVersion(), (text) => console.error(`${text} …`));
  console.log(platform.connectionString);
  console.log(platform.apiUrl);
  console.log('ready');
  isStarted = true;
  flushCompileCache();
  await stopping;
  await platform.stop();
}

/** npm does not pass a SIGTERM on to what it runs: it just ends. Whoever stops `npm start` means us. */
function onceParentIsGone(callback: () => void): void {
  const parent = process.ppid;
  const timer = setInterval(() => {
    if (process.ppid === parent) return;
    clearInterval(timer);
    callback();
  }, PARENT_POLL_MS);
  timer.unref(); // it alone keeps no process, so that one that has stopped, or could not start, ends
}

function packageVersion(): string {
  const text = readFileSync(join(import.meta.dirname, '..', 'package.json'), 'utf8');
  const { version } = JSON.parse(text) as { version?: string };
  if (version === undefined) throw new StrataError('internal', 'package.json has no version');
  return version;
}
