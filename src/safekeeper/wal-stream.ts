/** Sends a timeline's WAL to one reader in frames of api/safekeeper-protocol.ts: what is there, then what comes (wal-cursor.ts). */
import { once } from 'node:events';
import type { Socket } from 'node:net';
import { StrataError } from '../base/errors.ts';
import { encodeWalHead, MAX_WAL_BYTES, type ReadRequest } from '../api/safekeeper-protocol.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import type { Timeline } from './timeline.ts';
import { WalCursor } from './wal-cursor.ts';

/**
 * How often a reader that has caught up gets new WAL, the first after a silence at once: a message for each commit would cost more than the
 * commit, here and at the reader. Sooner when there is much, or when somebody waits for it.
 */
export const GATHER_MS = 50;
const GATHER_BYTES = 256 * 1024;

/** Up to where somebody waits for the WAL that a reader gets. */
export class Hurry {
  #lsn: Lsn = 0;
  /** Called when it is raised. */
  onRaised: (() => void) | undefined;

  get lsn(): Lsn {
    return this.#lsn;
  }

  raise(lsn: Lsn): void {
    if (lsn <= this.#lsn) return;
    this.#lsn = lsn;
    this.onRaised?.();
  }
}

/** Streams until the signal aborts; throws when there is nothing to stream. */
export async function streamWal(
  socket: Socket,
  timeline: Timeline,
  request: ReadRequest,
  hurry: Hurry,
  signal: AbortSignal,
): Promise<void> {
  const { startLsn } = timeline.identity;
  const { fromLsn, term, isRebuild } = request;
  if (!Number.isSafeInteger(fromLsn) || fromLsn < startLsn) {
    throw new StrataError(
      'bad-request',
      `the WAL of timeline ${timeline.identity.timelineId} begins at ${formatLsn(startLsn)}, not ${fromLsn}`,
    );
  }
  const cursor = new WalCursor({ timeline, fromLsn, signal, term, isRebuild });
  hurry.onRaised = () => cursor.poke();
  const isEnough = (): boolean =>
    timeline.isFailed || cursor.lsn < hurry.lsn || timeline.commitLsn - cursor.lsn >= GATHER_BYTES;
  let sentCommitLsn = -1;
  let sentAtMs = 0;
  try {
    while (!signal.aborted) {
      const { lsn } = cursor;
      const bytes = await cursor.read(MAX_WAL_BYTES);
      if (bytes !== undefined || sentCommitLsn < timeline.commitLsn) {
        sentCommitLsn = timeline.commitLsn;
        await send(socket, lsn, sentCommitLsn, bytes, signal);
        continue;
      }
      await cursor.arrival();
      const leftMs = sentAtMs + GATHER_MS - performance.now();
      if (term === undefined && leftMs > 0 && !isEnough()) await cursor.arrival(leftMs, isEnough);
      sentAtMs = performance.now();
    }
  } finally {
    await cursor.close();
  }
}

async function send(
  socket: Socket,
  lsn: Lsn,
  commitLsn: Lsn,
  bytes: Buffer | undefined,
  signal: AbortSignal,
): Promise<void> {
  socket.cork();
  let hasRoom = socket.write(encodeWalHead(lsn, commitLsn, bytes?.length ?? 0));
  if (bytes !== undefined) hasRoom = socket.write(bytes);
  socket.uncork();
  if (!hasRoom) await once(socket, 'drain', { signal }).catch(() => {});
}
