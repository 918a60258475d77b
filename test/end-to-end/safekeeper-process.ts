/** A safekeeper process of a test, on one port and one data directory for all of its lives. */
import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { resolve } from 'node:path';
import { createInterface } from 'node:readline';

export interface SafekeeperProcessOptions {
  readonly nodeId: number;
  readonly dataDir: string;
  readonly secret: Buffer;
  /** Where it listens; 127.0.0.1 when absent. */
  readonly host?: string;
  /** Before the command, as network-namespace.ts has it. */
  readonly prefix?: readonly string[];
  /** More of its configuration. */
  readonly config?: Readonly<Record<string, unknown>>;
}

export class SafekeeperProcess {
  readonly #options: SafekeeperProcessOptions;
  #child: ChildProcess | undefined;
  #port = 0;

  constructor(options: SafekeeperProcessOptions) {
    this.#options = options;
  }

  get address(): { host: string; port: number } {
    return { host: this.#options.host ?? '127.0.0.1', port: this.#port };
  }

  get pid(): number {
    return this.#child?.pid ?? 0;
  }

  async start(): Promise<void> {
    const { nodeId, dataDir, secret, config, prefix = [] } = this.#options;
    const { host } = this.address;
    const script = resolve(import.meta.dirname, '../../src/main.ts');
    const [command, ...args] = [...prefix, process.execPath, script, 'safekeeper'];
    const child = spawn(command!, args, {
      stdio: ['pipe', 'pipe', process.env['STRATA_LOG_LEVEL'] === undefined ? 'ignore' : 'inherit'],
    });
    this.#child = child;
    const whole = { nodeId, dataDir, port: this.#port, host, secret: secret.toString('hex'), ...config };
    child.stdin!.write(`${JSON.stringify(whole)}\n`);
    const [line] = (await once(createInterface({ input: child.stdout! }), 'line')) as [string];
    this.#port = (JSON.parse(line) as { port: number }).port;
  }

  signal(signal: NodeJS.Signals): void {
    this.#child?.kill(signal);
  }

  /** kill -9; resolves when it is gone. */
  async kill(): Promise<void> {
    const child = this.#child;
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return;
    const gone = once(child, 'exit');
    child.kill('SIGKILL');
    await gone;
  }
}
