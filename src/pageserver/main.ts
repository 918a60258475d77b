/** A pageserver: pulls WAL from safekeepers, keeps its history by page, and serves pages at any LSN. */

import { lockDirectory } from '../base/directory-lock.ts';
import type { Logger } from '../base/log.ts';
import { serveRpc } from '../base/rpc.ts';
import { signToken } from '../base/token.ts';
import type { SafekeeperAddress } from '../api/safekeeper.ts';
import { ThreadCompactor } from './compactor.ts';
import { Indexed, lsnAtTime } from './indexed-timeline.ts';
import { pageserverMethods } from './methods.ts';
import { PageService } from './page-service.ts';
import { Repairs } from './repair.ts';
import { replayValue } from './replay.ts';
import { Eviction } from './eviction.ts';
import type { ObjectStore } from '../object-store/object-store.ts';
import type { Generations } from '../api/generations.ts';
import { takeDamagedFromStore, takeGeneration } from './remote/first-look.ts';
import { Remote } from './remote/remote.ts';
import { restoreAtStart, restoreTimeline } from './remote/restore.ts';
import { Timelines } from './timelines.ts';
import type { StoreLimits } from './timelines.ts';
import { readWalOfAny, WalReceiver } from './wal-receiver.ts';

export interface PageserverConfig {
  readonly dataDir: string;
  readonly host: string;
  /** 0: any free port. */
  readonly rpcPort: number;
  /** 0: any free port. */
  readonly pagePort: number;
  readonly safekeepers: readonly SafekeeperAddress[];
  /** Of the platform; signs tokens. */
  readonly secret: Uint8Array;
  readonly limits?: Partial<StoreLimits>;
  /** Where timelines are kept for good; without it only here. */
  readonly remote?: RemoteConfig;
  readonly log: Logger;
}

export interface RemoteConfig {
  readonly store: ObjectStore;
  readonly generations: Generations;
  /** Layers beyond it that the store has are taken away from the local disk. */
  readonly cacheBytes?: number;
}

export interface Pageserver {
  readonly rpcPort: number;
  readonly pagePort: number;
  /** Stops serving and ingesting, flushes what is in memory and closes. */
  close(): Promise<void>;
}

/** How long a predecessor that was just killed may take to let go of the data directory. */
const LOCK_WAIT_MS = 5_000;
const FLUSH_CHECK_MS = 10_000;
const GARBAGE_PERIOD_MS = 10 * 60_000;
const CACHE_BYTES = 64 * 1024 ** 3;
/** How long a stop waits for uploads: what is left comes after the next start. */
const CLOSE_UPLOADS_MS = 5_000;

/** Resolves when the pageserver accepts connections. Throws `conflict` when another process has the data directory. */
export async function runPageserver(config: PageserverConfig): Promise<Pageserver> {
  const { dataDir, host, secret, safekeepers, log } = config;
  const startMs = performance.now();
  const lock = await lockDirectory(dataDir, LOCK_WAIT_MS);
  try {
    const limits = config.limits ?? {};
    const compactor = new ThreadCompactor();
    const first = config.remote === undefined ? undefined : await takeGeneration({ ...config.remote, dataDir, log });
    const remote =
      config.remote === undefined || first === undefined ? undefined : new Remote({ ...config.remote, ...first, log });
    const takeDamaged = async (timelineIds: readonly string[]): Promise<void> => {
      if (config.remote === undefined || first === undefined) return;
      await takeDamagedFromStore({ ...config.remote, dataDir, log }, first.generation, timelineIds);
    };
    const timelines = await Timelines.open(dataDir, {
      replay: replayValue,
      log,
      limits,
      compactor,
      lsnAt: (timeline, timeMs) => lsnAtTime(new Indexed(timeline), timeMs),
      ...(remote === undefined || first === undefined ? {} : { remote, takeDamaged, brokenInStore: first.broken }),
      repair: (damage) => repairs.repair(damage),
    });
    const token = await signToken(secret, { scope: 'platform' });
    const receiver = new WalReceiver({
      safekeepers,
      token,
      timelines,
      log,
      repair: (damage) => repairs.repair(damage),
    });
    const repairs = new Repairs({
      timelines,
      ...(remote === undefined ? {} : { remote }),
      walOf: ({ tenantId, timelineId }, fromLsn, signal) =>
        readWalOfAny(receiver.safekeepers, { token, tenantId, timelineId, fromLsn, signal }),
      log,
    });
    timelines.repair = (damage) => repairs.repair(damage);
    timelines.fetch = (damage) => repairs.fetch(damage);
    if (remote !== undefined) remote.onLost = (lost) => void repairs.repair(lost).catch(() => {});
    const restoring = { repair: timelines.repair, log };
    const eviction =
      remote === undefined
        ? undefined
        : new Eviction({
            timelines,
            remote,
            limitBytes: config.remote?.cacheBytes ?? CACHE_BYTES,
            restore: (timeline) => restoreTimeline({ ...restoring, remote }, timeline),
            log,
          });
    const rpc = await serveRpc({
      host,
      port: config.rpcPort,
      secret,
      methods: pageserverMethods({ timelines, receiver, log, ...(remote === undefined ? {} : { remote }) }),
      onError: (method, error) => {
        if (error.code === 'internal') log.error({ method, err: error }, 'call failed');
      },
    });
    const pages = await PageService.start({
      host,
      port: config.pagePort,
      secret,
      timelines,
      log,
      repair: timelines.repair,
    });
    receiver.start();
    const looked =
      config.remote === undefined || remote === undefined
        ? Promise.resolve(false)
        : restoreAtStart({ ...restoring, remote, store: config.remote.store, timelines: () => timelines.all() });
    // What the store has lost may be here alone.
    let isClosing = false;
    void looked.then((isDone) => (isDone && !isClosing ? eviction?.start() : undefined));
    const flushTimer = setInterval(() => timelines.flushAged(), FLUSH_CHECK_MS);
    const garbageTimer = setInterval(() => void timelines.garbage.run(timelines.all()), GARBAGE_PERIOD_MS);
    const timelineCount = [...timelines.all()].length;
    const tookMs = Math.round(performance.now() - startMs);
    log.info({ rpcPort: rpc.port, pagePort: pages.port, timelineCount, tookMs }, 'pageserver is ready');
    return {
      rpcPort: rpc.port,
      pagePort: pages.port,
      close: async () => {
        isClosing = true;
        clearInterval(flushTimer);
        clearInterval(garbageTimer);
        await Promise.all([rpc.close(), pages.close()]);
        await receiver.stop();
        await eviction?.stop();
        await timelines.close();
        if (remote?.isWorking === true) await remote.settled(CLOSE_UPLOADS_MS);
        await remote?.close();
        await looked;
        lock.release();
      },
    };
  } catch (error) {
    lock.release();
    throw error;
  }
}
