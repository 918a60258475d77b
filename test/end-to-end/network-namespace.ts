/**
 * A network namespace of its own for a process, as another host has one, with a cable to ours that can be pulled. Needs root and `ip` (Debian: iproute2).
 *
 *   ours: <name>h 10.213.<number>.1/30  ────  <name>p 10.213.<number>.2/30: theirs
 */
import { execFileSync } from 'node:child_process';
import type { Link, LinkMode } from './cut-proxy.ts';

export class NetworkNamespace implements Link {
  readonly name: string;
  readonly host: string;
  readonly #cable: string;
  readonly #port: () => number;

  /** `number`: 1 to 254, once per machine. `port`: of who listens in there. */
  constructor(number: number, port: () => number) {
    this.name = `strata-${process.pid}-${number}`;
    this.#cable = `st${process.pid % 1_000_000}${number}`;
    this.host = `10.213.${number}.2`;
    this.#port = port;
  }

  get address(): { host: string; port: number } {
    return { host: this.host, port: this.#port() };
  }

  /** Before a command, runs it in there, under the same process id. */
  get prefix(): readonly string[] {
    return ['ip', 'netns', 'exec', this.name];
  }

  start(): Promise<void> {
    const [ours, theirs] = [`${this.#cable}h`, `${this.#cable}p`];
    ip('netns', 'add', this.name);
    ip('link', 'add', ours, 'type', 'veth', 'peer', 'name', theirs, 'netns', this.name);
    ip('address', 'add', this.host.replace(/2$/, '1/30'), 'dev', ours);
    ip('link', 'set', ours, 'up');
    ip('-n', this.name, 'address', 'add', `${this.host}/30`, 'dev', theirs);
    ip('-n', this.name, 'link', 'set', theirs, 'up');
    ip('-n', this.name, 'link', 'set', 'lo', 'up');
    return Promise.resolve();
  }

  /** Who is cut off is never told: packets disappear, either way. */
  set mode(mode: LinkMode) {
    ip('-n', this.name, 'link', 'set', `${this.#cable}p`, mode === 'open' ? 'up' : 'down');
  }

  close(): void {
    ip('netns', 'delete', this.name);
  }
}

function ip(...args: readonly string[]): void {
  execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'inherit'] });
}
