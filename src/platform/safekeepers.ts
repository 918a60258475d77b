/**
 * The safekeepers of one machine: their processes, and who of them are members. The configuration is in the control plane's state (control/settings.ts),
 * which assigns versions by compare-and-set; proposers, readers and the pageserver follow it here while they are at work.
 *
 * A change starts new processes, sets a joint configuration, has every timeline moved (membership-change.ts), and then stops who is no member any
 * more and removes its directory. What a crash leaves behind is taken up at the next start: a joint configuration is finished, a directory that belongs to no
 * member is removed.
 */
import { existsSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { SafekeeperAdmin, SafekeeperChange, SafekeeperListing } from '../api/control.ts';
import { type SafekeeperAddress, SafekeeperClient, type TimelineProgress } from '../api/safekeeper.ts';
import type { SafekeeperDirectory, SafekeeperSet } from '../api/safekeeper-set.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { freePort } from '../base/free-port.ts';
import { abandonedConfiguration, type Configuration, jointConfiguration, nodesOf } from '../consensus/configuration.ts';
import type { Settings } from '../control/settings.ts';
import type { ChildService } from './child-service.ts';
import { type ChangeWorld, finishChange } from './membership-change.ts';
import { keepSafekeeperPort } from './ports.ts';

export interface SafekeepersOptions {
  readonly settings: Settings;
  /** The platform's; each safekeeper has `safekeeper-<id>` in it. */
  readonly dataDir: string;
  readonly host: string;
  /** For the Unix sockets of the safekeepers. */
  readonly socketDir: string;
  /** With `onFailure`, one that does not start is told, and tried again; without, it throws. */
  readonly startProcess: (
    nodeId: number,
    port: number,
    socketPath: string,
    onFailure?: (error: StrataError) => void,
  ) => Promise<ChildService>;
  readonly identityOf: ChangeWorld['identityOf'];
  /** Scope `platform`. */
  readonly token: string;
  /** Is told what a person should know. */
  readonly progress: (text: string) => void;
  readonly log: Logger;
}

const DEFAULT_COUNT = 3;
const COUNT_MAX = 7;
const RETRY_MS = 2_000;
const LIST_TIMEOUT_MS = 2_000;
const DIRECTORY_NAME = /^safekeeper-(\d+)$/;

export class Safekeepers implements SafekeeperDirectory, Omit<SafekeeperAdmin, 'rebuild'> {
  readonly #options: SafekeepersOptions;
  readonly #addresses = new Map<number, SafekeeperAddress>();
  readonly #processes = new Map<number, ChildService>();
  readonly #watchers = new Set<() => void>();
  readonly #settledVersions = new Map<string, number>();
  readonly #closing = new AbortController();
  #current: SafekeeperSet;
  #isChanging = false;
  #run: { readonly aborter: AbortController; readonly ended: Promise<void> } | undefined;
  #progress: { readonly done: number; readonly total: number } | undefined;
  #lastError: string | undefined;

  constructor(options: SafekeepersOptions) {
    this.#options = options;
    const configuration = options.settings.safekeepers;
    if (configuration === undefined) throw new StrataError('internal', 'there is no configuration of the safekeepers');
    this.#current = { configuration, addresses: new Map() };
  }

  get current(): SafekeeperSet {
    return this.#current;
  }

  watch(callback: () => void): () => void {
    this.#watchers.add(callback);
    return () => this.#watchers.delete(callback);
  }

  settled(timelineId: string, version: number): void {
    this.#settledVersions.set(timelineId, version);
  }

  /**
   * Starts the processes of the configuration at these ports; their addresses are there at once. Who does not start, because its disk does not work for
   * example, is tried again while the platform runs. Throws when none starts.
   */
  async start(ports: ReadonlyMap<number, number>): Promise<void> {
    const nodes = nodesOf(this.#current.configuration);
    this.#removeStrangers();
    const failures: StrataError[] = [];
    const start = async (nodeId: number): Promise<void> =>
      this.#startNode(nodeId, ports.get(nodeId)!, (error) => failures.push(error));
    await Promise.all(nodes.map(start));
    if (failures.length === nodes.length) throw failures[0]!;
    const { progress, log } = this.#options;
    for (const { message } of failures) {
      log.error({ reason: message }, 'a safekeeper does not start');
      progress(`${message}; the platform goes on without it, and tries again`);
    }
  }

  /** Goes on with a change that a crash has left behind, if there is one. Returns at once. */
  resume(): void {
    if (this.#current.configuration.newMembers !== undefined) this.#startRun();
  }

  async list(): Promise<SafekeeperListing> {
    const { configuration } = this.#current;
    const { version, members, newMembers } = configuration;
    const nodes = nodesOf(configuration);
    const lists = await Promise.all(nodes.map((nodeId) => this.#timelinesOf(nodeId)));
    const newest = new Map<string, number>();
    for (const { timelineId, commitLsn } of lists.flatMap((list) => list ?? [])) {
      newest.set(timelineId, Math.max(newest.get(timelineId) ?? 0, commitLsn));
    }
    return {
      version,
      safekeepers: nodes.map((nodeId, index) => {
        const list = lists[index];
        const behind = (list ?? []).map(({ timelineId, commitLsn }) => newest.get(timelineId)! - commitLsn);
        const role = newMembers === undefined || (members.includes(nodeId) && newMembers.includes(nodeId));
        const missingCount = list === undefined ? 0 : newest.size - list.length;
        return {
          id: nodeId,
          address: addressText(this.#current.addresses.get(nodeId)),
          state: list === undefined ? 'down' : 'up',
          role: role ? 'member' : members.includes(nodeId) ? 'leaving' : 'joining',
          timelineCount: list?.length ?? 0,
          behindCount: behind.filter((bytes) => bytes > 0).length + missingCount,
          behindBytes: behind.reduce((sum, bytes) => sum + bytes, 0),
        };
      }),
      ...(newMembers === undefined
        ? {}
        : {
            change: {
              members: newMembers,
              movedTimelines: this.#progress?.done ?? 0,
              timelineCount: this.#progress?.total ?? 0,
              ...(this.#lastError === undefined ? {} : { lastError: this.#lastError }),
            },
          }),
    };
  }

  /** Begins a change; `list` tells when it is done. Throws `conflict` when another is under way, `bad-request`. */
  async change(change: SafekeeperChange): Promise<readonly number[]> {
    const { configuration } = this.#current;
    this.#assertStable();
    const target = this.#targetOf(configuration.members, change);
    this.#isChanging = true;
    try {
      const newcomers = target.filter((nodeId) => !this.#addresses.has(nodeId));
      const { dataDir, host, log } = this.#options;
      for (const nodeId of newcomers) rmSync(directoryOf(dataDir, nodeId), { recursive: true, force: true });
      await Promise.all(
        newcomers.map(async (nodeId) => {
          const port = await freePort(host);
          keepSafekeeperPort(dataDir, nodeId, port);
          await this.#startNode(nodeId, port);
        }),
      );
      if (!this.replace(configuration.version, jointConfiguration(configuration, target))) {
        throw new StrataError('conflict', 'the safekeepers were changed by somebody else at the same time');
      }
      log.info({ from: configuration.members, to: target }, 'the safekeepers change');
    } catch (error) {
      await this.#stopStrangers();
      throw error;
    } finally {
      this.#isChanging = false;
    }
    this.#startRun();
    return target;
  }

  /** Back to the members that there were before the change under way. Throws `conflict` when there is none. */
  async cancel(): Promise<void> {
    this.#run?.aborter.abort(new StrataError('conflict', 'the change was cancelled'));
    await this.#run?.ended;
    const { configuration } = this.#current;
    const isCancelled =
      configuration.newMembers !== undefined &&
      this.replace(configuration.version, abandonedConfiguration(configuration));
    if (!isCancelled) throw new StrataError('conflict', 'no change of the safekeepers is under way');
    this.#options.log.warn({ members: configuration.members }, 'the change of the safekeepers was cancelled');
    await this.#stopStrangers();
  }

  /** What those kept is put aside, and they begin again without anything. Throws when that cannot be. */
  async giveUp(ids: readonly number[]): Promise<void> {
    this.#assertStable();
    this.#isChanging = true;
    try {
      for (const nodeId of ids) {
        await this.#processes.get(nodeId)?.stop();
        const { port } = this.#addresses.get(nodeId)!;
        const directory = directoryOf(this.#options.dataDir, nodeId);
        try {
          if (existsSync(directory)) renameSync(directory, `${directory}.given-up-${Date.now()}`);
        } catch (error) {
          await this.#startNode(nodeId, port, () => {});
          const { code } = error as NodeJS.ErrnoException;
          throw new StrataError(
            'conflict',
            `${directory} cannot be put aside (${code}): put an empty directory in its place`,
            { cause: error },
          );
        }
        await this.#startNode(nodeId, port);
      }
    } finally {
      this.#isChanging = false;
    }
  }

  /** Resolves when no change is under way; `onProgress` is told how far it is. Rejects when one cannot go on at the moment. */
  async changed(): Promise<void> {
    await this.#run?.ended;
    if (this.#current.configuration.newMembers !== undefined)
      throw new StrataError('unavailable', this.#lastError ?? 'the safekeepers could not be changed');
  }

  async close(): Promise<void> {
    this.#closing.abort(new StrataError('unavailable', 'the platform is stopping'));
    await this.#run?.ended;
  }

  /** The only way in which the configuration changes. */
  replace(expectedVersion: number, next: Configuration): boolean {
    if (!this.#options.settings.replaceSafekeepers(expectedVersion, next)) return false;
    this.#current = { ...this.#current, configuration: next };
    this.#publish();
    return true;
  }

  #publish(): void {
    this.#current = { ...this.#current, addresses: new Map(this.#addresses) };
    for (const callback of [...this.#watchers]) callback();
  }

  #assertStable(): void {
    if (!this.#isChanging && this.#run === undefined && this.#current.configuration.newMembers === undefined) return;
    throw new StrataError(
      'conflict',
      'a change of the safekeepers is under way: wait until "strata safekeepers" shows none, or give it up with "strata safekeepers cancel"',
    );
  }

  #targetOf(members: readonly number[], change: SafekeeperChange): number[] {
    const named = change.kind === 'add' ? [] : change.ids;
    const unknown = named.find((nodeId) => !members.includes(nodeId));
    if (unknown !== undefined) {
      throw new StrataError('bad-request', `there is no safekeeper ${unknown} (safekeepers: ${members.join(', ')})`);
    }
    const newCount = change.kind === 'add' ? change.count : change.kind === 'replace' ? named.length : 0;
    const stay = members.filter((nodeId) => !named.includes(nodeId));
    const target = [...stay, ...this.#options.settings.newSafekeeperIds(newCount)];
    if (target.length % 2 === 1 && target.length <= COUNT_MAX) return target;
    throw new StrataError(
      'bad-request',
      `that would be ${target.length} safekeepers: choose 1, 3, 5 or ${COUNT_MAX}${target.length % 2 === 0 ? ', as an even number survives no more failures than one less' : ''}`,
    );
  }

  #startRun(): void {
    this.#progress = undefined;
    this.#lastError = undefined;
    const aborter = new AbortController();
    const signal = AbortSignal.any([aborter.signal, this.#closing.signal]);
    const ended = this.#finish(signal).finally(() => (this.#run = undefined));
    this.#run = { aborter, ended };
  }

  /** Never rejects. */
  async #finish(signal: AbortSignal): Promise<void> {
    const { log, token, identityOf } = this.#options;
    const world: ChangeWorld = {
      directory: this,
      replace: (expectedVersion, next) => this.replace(expectedVersion, next),
      settledVersion: (timelineId) => this.#settledVersions.get(timelineId) ?? 0,
      identityOf,
      token,
      log,
      progress: (done, total) => (this.#progress = { done, total }),
    };
    while (!signal.aborted) {
      try {
        await finishChange(world, signal);
        this.#lastError = undefined;
        await this.#stopStrangers();
        log.info({ members: this.#current.configuration.members }, 'the safekeepers are changed');
        return;
      } catch (error) {
        if (signal.aborted) return;
        this.#lastError = toStrataError(error).message;
        log.warn({ err: error }, 'the change of the safekeepers cannot go on yet');
        await sleep(RETRY_MS, undefined, { signal }).catch(() => {});
      }
    }
  }

  async #startNode(nodeId: number, port: number, onFailure?: (error: StrataError) => void): Promise<void> {
    const { host, socketDir, startProcess } = this.#options;
    const socketPath = join(socketDir, `safekeeper-${nodeId}.sock`);
    this.#addresses.set(nodeId, { host, port, socketPath });
    this.#publish();
    this.#processes.set(nodeId, await startProcess(nodeId, port, socketPath, onFailure));
  }

  /** Who is no member is stopped, and what it kept removed. */
  async #stopStrangers(): Promise<void> {
    const nodes = nodesOf(this.#current.configuration);
    for (const nodeId of [...this.#addresses.keys()].filter((each) => !nodes.includes(each))) {
      this.#addresses.delete(nodeId);
      this.#publish();
      await this.#processes.get(nodeId)?.stop();
      this.#processes.delete(nodeId);
    }
    this.#removeStrangers();
  }

  #removeStrangers(): void {
    const nodes = nodesOf(this.#current.configuration);
    for (const nodeId of directoryIds(this.#options.dataDir)) {
      if (!nodes.includes(nodeId)) rmSync(directoryOf(this.#options.dataDir, nodeId), { recursive: true, force: true });
    }
  }

  async #timelinesOf(nodeId: number): Promise<readonly TimelineProgress[] | undefined> {
    const address = this.#current.addresses.get(nodeId);
    if (address === undefined) return undefined;
    const client = new SafekeeperClient({ address, token: this.#options.token });
    const timeout = sleep(LIST_TIMEOUT_MS, undefined, { ref: false });
    try {
      return await Promise.race([client.list().catch(() => undefined), timeout]);
    } finally {
      client.close();
    }
  }
}

/**
 * The configuration, written down at the first start: `count` safekeepers, or as many as a data directory has that knows none yet. Later `count` changes
 * nothing here.
 */
export function chooseSafekeepers(settings: Settings, dataDir: string, count: number | undefined): Configuration {
  if (settings.safekeepers === undefined) {
    const found = directoryIds(dataDir);
    const members = found.length > 0 ? found : Array.from({ length: count ?? DEFAULT_COUNT }, (_, index) => index + 1);
    settings.replaceSafekeepers(0, { version: 1, members });
  }
  return settings.safekeepers!;
}

/** What it takes to have so many; undefined: nothing. */
export function changeToCount({ current }: SafekeeperDirectory, count: number): SafekeeperChange | undefined {
  const { members } = current.configuration;
  if (count > members.length) return { kind: 'add', count: count - members.length };
  if (count < members.length) return { kind: 'remove', ids: members.slice(count) };
  return undefined;
}

export function directoryOf(dataDir: string, nodeId: number): string {
  return join(dataDir, `safekeeper-${nodeId}`);
}

function directoryIds(dataDir: string): number[] {
  if (!existsSync(dataDir)) return [];
  const ids = readdirSync(dataDir).flatMap((name) => {
    const match = DIRECTORY_NAME.exec(name);
    return match === null ? [] : [Number(match[1])];
  });
  return ids.sort((a, b) => a - b);
}

function addressText(address: SafekeeperAddress | undefined): string {
  return address === undefined ? 'none' : `${address.host}:${address.port}`;
}
