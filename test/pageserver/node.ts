/**
 * For tests: what of a pageserver has to do with layers and the object store, in this process, without WAL, clients or timers. Several may use one store, each
 * with a directory and a generation of its own.
 */

import { mkdirSync } from 'node:fs';
import type { Generations } from '../../src/api/generations.ts';
import { StrataError } from '../../src/base/errors.ts';
import { createLog } from '../../src/base/log.ts';
import type { CallOptions, ObjectStore } from '../../src/object-store/object-store.ts';
import { Eviction } from '../../src/pageserver/eviction.ts';
import type { Key, KeyRange } from '../../src/pageserver/key.ts';
import { takeDamagedFromStore, takeGeneration } from '../../src/pageserver/remote/first-look.ts';
import { Remote } from '../../src/pageserver/remote/remote.ts';
import { restoreTimeline } from '../../src/pageserver/remote/restore.ts';
import { Repairs } from '../../src/pageserver/repair.ts';
import type { RepairsOptions } from '../../src/pageserver/repair.ts';
import type { KeyImage } from '../../src/pageserver/read.ts';
import type { OnStep, Step } from '../../src/pageserver/step.ts';
import { Timelines } from '../../src/pageserver/timelines.ts';
import type { StoreLimits, TimelinesOptions } from '../../src/pageserver/timelines.ts';
import { readWhole } from '../../src/pageserver/whole-reads.ts';
import { replayPoke } from './history-model.ts';

export interface NodeOptions {
  readonly directory: string;
  readonly store: ObjectStore;
  readonly generations: Generations;
  readonly limits?: Partial<StoreLimits>;
  readonly cacheBytes?: number;
  readonly storedWaitMs?: number;
  readonly piecesFromBytes?: number;
  readonly lsnAt?: TimelinesOptions['lsnAt'];
  readonly now?: () => number;
  /** For repairs; without it there is no WAL. */
  readonly walOf?: RepairsOptions['walOf'];
  /** Called at each step; when it throws, the node is as good as dead. */
  readonly onStep?: OnStep;
}

/** What every step throws once a node is dead. */
export class NodeDeath extends Error {
  override name = 'NodeDeath';
}

export const silent = createLog({ name: 'test', level: (process.env['STRATA_TEST_LOG'] ?? 'silent') as 'silent' });

export class TestNode {
  readonly timelines: Timelines;
  readonly remote: Remote;
  readonly eviction: Eviction;

  readonly #life: { isOver: boolean };

  private constructor(timelines: Timelines, remote: Remote, eviction: Eviction, life: { isOver: boolean }) {
    this.#life = life;
    this.timelines = timelines;
    this.remote = remote;
    this.eviction = eviction;
  }

  static async open(options: NodeOptions): Promise<TestNode> {
    const { directory, store, generations, limits = {}, storedWaitMs, lsnAt, now, onStep } = options;
    mkdirSync(directory, { recursive: true });
    const life = { isOver: false };
    const step = {
      onStep: (name: Step) => {
        if (life.isOver) throw new NodeDeath(`dead before: ${name}`);
        try {
          onStep?.(name);
        } catch (error) {
          life.isOver = true;
          throw error;
        }
      },
    };
    const first = await takeGeneration({ dataDir: directory, store, generations, log: silent, ...step });
    const remote = new Remote({
      store,
      generations,
      generation: first.generation,
      since: first.since,
      log: silent,
      retryDelayMs: 5,
      ...(storedWaitMs === undefined ? {} : { storedWaitMs }),
      ...step,
    });
    const timelines = await Timelines.open(directory, {
      replay: replayPoke,
      log: silent,
      limits,
      remote,
      brokenInStore: first.broken,
      takeDamaged: (ids) =>
        takeDamagedFromStore({ dataDir: directory, store, log: silent, ...step }, first.generation, ids),
      ...(lsnAt === undefined ? {} : { lsnAt }),
      ...(now === undefined ? {} : { now }),
      ...step,
    });
    const noWal = (): never => {
      throw new StrataError('unavailable', 'a test has no WAL');
    };
    const { piecesFromBytes, walOf = noWal } = options;
    const pieces = piecesFromBytes === undefined ? {} : { piecesFromBytes };
    const repairs = new Repairs({ timelines, remote, walOf, log: silent, ...pieces, ...step });
    timelines.repair = (damage) => repairs.repair(damage);
    timelines.fetch = (damage) => repairs.fetch(damage);
    const limitBytes = options.cacheBytes ?? Infinity;
    const restoring = { remote, repair: timelines.repair, log: silent };
    const eviction = new Eviction({
      timelines,
      remote,
      limitBytes,
      restore: (timeline) => restoreTimeline(restoring, timeline),
      log: silent,
    });
    return new TestNode(timelines, remote, eviction, life);
  }

  scan(timelineId: string, range: KeyRange, lsn: number): Promise<KeyImage[]> {
    return readWhole(() => this.timelines.get(timelineId).scan(range, lsn), this.timelines.repair);
  }

  get(timelineId: string, key: Key, lsn: number): Promise<Buffer | undefined> {
    return readWhole(() => this.timelines.get(timelineId).getImage(key, lsn), this.timelines.repair);
  }

  /** As a stop does. */
  async close(): Promise<void> {
    await this.timelines.close();
    await this.remote.settled(20_000);
    await this.remote.close();
  }

  get isDead(): boolean {
    return this.#life.isOver;
  }

  /** As when it is killed, as far as that can be in one process: no further step is taken, nothing is flushed or uploaded any more. */
  async abandon(): Promise<void> {
    this.#life.isOver = true;
    await this.remote.close();
    await this.timelines.close();
  }
}

/** Generations in memory, that can be asked unless told otherwise. */
export class TestGenerations implements Generations {
  latest = 0;
  isReachable = true;

  async next(above: number): Promise<number> {
    this.latest = Math.max(this.latest, above) + 1;
    return this.latest;
  }

  async isLatest(generation: number): Promise<boolean> {
    if (!this.isReachable) throw new StrataError('unavailable', 'the supervisor cannot be reached');
    return generation === this.latest;
  }
}

/** A store that never shares bytes with local files, as one elsewhere. */
export function farStore(inner: ObjectStore): ObjectStore {
  const alone = <Options extends CallOptions>(options: Options | undefined): Options =>
    ({ ...options, share: false }) as unknown as Options;
  return {
    description: inner.description,
    supportsIfAbsent: inner.supportsIfAbsent,
    put: (name, bytes, options) => inner.put(name, bytes, options),
    putFile: (name, path, options) => inner.putFile(name, path, alone(options)),
    get: (name, options) => inner.get(name, options),
    getRange: (name, start, end, options) => inner.getRange(name, start, end, options),
    getToFile: (name, path, options) => inner.getToFile(name, path, alone(options)),
    head: (name, options) => inner.head(name, options),
    list: (prefix, options) => inner.list(prefix, options),
    delete: (name, options) => inner.delete(name, options),
    deleteMany: (names, options) => inner.deleteMany(names, options),
    removeUnfinished: (olderThanMs, options) => inner.removeUnfinished(olderThanMs, options),
  };
}
