/**
 * The one executable: the command line for people, and the roles that the supervisor starts as child processes of its own (`pageserver`,
 * `safekeeper`), whose configuration comes on standard input.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createLog } from './base/log.ts';
import { StrataError } from './base/errors.ts';
import { runServiceProcess } from './base/service-process.ts';
import { runCli } from './cli/program.ts';
import type { StartOptions } from './cli/start.ts';
import { runPageserver } from './pageserver/main.ts';
import { startPlatform } from './platform/platform.ts';
import { runSafekeeper } from './safekeeper/main.ts';

interface SafekeeperProcessConfig {
  readonly nodeId: number;
  readonly dataDir: string;
  readonly host: string;
  readonly port: number;
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
}

const PARENT_POLL_MS = 250;

const [role] = process.argv.slice(2);
if (role === 'safekeeper') {
  await runServiceProcess(async (config: SafekeeperProcessConfig) => {
    const log = createLog({ name: `safekeeper-${config.nodeId}` });
    const service = await runSafekeeper({ ...config, secret: Buffer.from(config.secret, 'hex'), log });
    return { service, ready: { port: service.port } };
  });
} else if (role === 'pageserver') {
  await runServiceProcess(async (config: PageserverProcessConfig) => {
    const log = createLog({ name: 'pageserver' });
    const service = await runPageserver({ ...config, secret: Buffer.from(config.secret, 'hex'), log });
    return { service, ready: { rpcPort: service.rpcPort, pagePort: service.pagePort } };
  });
} else {
  process.exitCode = await runCli(process.argv.slice(2), { version: packageVersion(), start });
}

/** `strata start`: runs in the foreground until SIGINT or SIGTERM. */
async function start(options: StartOptions): Promise<void> {
  const stopping = new Promise<void>((resolve) => {
    process.once('SIGINT', resolve);
    process.once('SIGTERM', resolve);
    if (process.env['npm_lifecycle_event'] === 'start') onceParentIsGone(resolve);
  });
  const platform = await startPlatform(options, packageVersion(), (text) => console.error(`${text} …`));
  console.log(platform.connectionString);
  console.log(platform.apiUrl);
  console.log('ready');
  await stopping;
  console.error('stopping …');
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
}

function packageVersion(): string {
  const text = readFileSync(join(import.meta.dirname, '..', 'package.json'), 'utf8');
  const { version } = JSON.parse(text) as { version?: string };
  if (version === undefined) throw new StrataError('internal', 'package.json has no version');
  return version;
}
