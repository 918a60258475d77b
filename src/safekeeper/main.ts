/**
 * A safekeeper: keeps WAL of many timelines durable, as one of the quorum.
 *
 * One whose files are removed beneath it, or whose disk is empty when it works again, has lost what it acknowledged and whom it voted for. It must say so and not
 * go on with what is in memory: `onLost` ends the process, and the next one, a new incarnation, finds nothing and is given everything anew.
 */
import { chmod, rm, stat } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { lockDirectory } from '../base/directory-lock.ts';
import type { Logger } from '../base/log.ts';
import { listen } from '../base/rpc.ts';
import { openObjectStore } from '../object-store/open-object-store.ts';
import { OffloadedWal } from './offloaded-wal.ts';
import { type OffloadLimits, Offloader } from './offloader.ts';
import { serveConnection } from './server.ts';
import { type Offloading, Timelines } from './timelines.ts';

export interface SafekeeperConfig {
  /** Positive, unlike that of any other safekeeper. */
  readonly nodeId: number;
  readonly dataDir: string;
  readonly host: string;
  /** 0: any free port. */
  readonly port: number;
  /** A Unix socket to listen on too, for who is on the same machine. */
  readonly socketPath?: string;
  /** Of the platform; signs tokens. */
  readonly secret: Uint8Array;
  readonly log: Logger;
  /** After which a silent reader of the replication protocol is gone; a minute when absent. */
  readonly readerTimeoutMs?: number;
  /** Where WAL is offloaded to (object-store/open-object-store.ts); nowhere when absent, and all WAL stays here. */
  readonly objectStore?: string;
  /** Node ids are 1 to this, as a rule; 3 when absent. */
  readonly safekeeperCount?: number;
  readonly offload?: Partial<OffloadLimits>;
  /** Told once, with the path of what is gone from the disk. */
  readonly onLost?: (path: string) => void;
}

export interface Safekeeper {
  readonly port: number;
  /** Disconnects everybody, writes down what is known and stops. */
  close(): Promise<void>;
}

/** How long a predecessor that was just killed may take to let go of the data directory. */
const LOCK_WAIT_MS = 5_000;
/** How often it is looked whether the data directory is still there: a branch that sleeps would not notice. */
const PRESENCE_INTERVAL_MS = 5_000;

/** Resolves when the safekeeper accepts connections. Throws `conflict` when another process has the data directory. */
export async function runSafekeeper(config: SafekeeperConfig): Promise<Safekeeper> {
  const { nodeId, dataDir, host, secret, log, readerTimeoutMs } = config;
  const lock = await lockDirectory(dataDir, LOCK_WAIT_MS);
  try {
    const offloading = await startOffloading(config);
    let { onLost } = config;
    const lost = (path: string): void => {
      onLost?.(path);
      onLost = undefined;
    };
    const timelines = await Timelines.load(nodeId, dataDir, log, offloading, lost);
    const sockets = new Set<Socket>();
    const accept = (socket: Socket): void => {
      sockets.add(socket);
      socket.once('close', () => sockets.delete(socket));
      serveConnection(socket, { nodeId, secret, timelines, readerTimeoutMs });
    };
    const server = createServer(accept);
    await listen(server, host, config.port);
    const local = config.socketPath === undefined ? undefined : createServer(accept);
    if (local !== undefined) await listenUnix(local, config.socketPath!);
    const address = server.address();
    const port = typeof address === 'object' && address !== null ? address.port : config.port;
    const presence = watchPresence(lock.path, lost);
    log.info({ nodeId, port, timelineCount: timelines.list().length }, 'safekeeper is ready');
    return {
      port,
      close: async () => {
        clearInterval(presence);
        const closed = [server, ...(local === undefined ? [] : [local])].map(
          (each) => new Promise<void>((resolve) => each.close(() => resolve())),
        );
        for (const socket of sockets) socket.destroy();
        await Promise.all(closed);
        await offloading?.offloader.close();
        await timelines.close();
        lock.release();
      },
    };
  } catch (error) {
    lock.release();
    throw error;
  }
}

function watchPresence(path: string, onLost: (path: string) => void): NodeJS.Timeout {
  const look = async (): Promise<void> => {
    const found = await stat(path).catch((error: NodeJS.ErrnoException) => error);
    if (found instanceof Error && found.code === 'ENOENT') onLost(path);
  };
  return setInterval(() => void look(), PRESENCE_INTERVAL_MS).unref();
}

/** Only for the user that we are; the data directory's lock says that a socket that is there is a dead one's. */
async function listenUnix(server: Server, path: string): Promise<void> {
  await rm(path, { force: true });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(path, () => {
      server.off('error', reject);
      resolve();
    });
  });
  await chmod(path, 0o600);
}

async function startOffloading(config: SafekeeperConfig): Promise<Offloading | undefined> {
  const { objectStore, nodeId, safekeeperCount, log, offload } = config;
  if (objectStore === undefined) return undefined;
  const wal = new OffloadedWal(await openObjectStore(objectStore));
  const options = { wal, nodeId, safekeeperCount: safekeeperCount ?? 3, log };
  return { wal, offloader: new Offloader({ ...options, ...(offload === undefined ? {} : { limits: offload }) }) };
}
