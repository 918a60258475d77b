/**
 * Sends a timeline's WAL to one reader: what is there, then what comes.
 *
 * Readers get what is committed. The leader's recovery of another safekeeper names its term and gets what is flushed here, as long as this
 * log is that leader's; the term is looked at again after each read, as a new leader may have cut the log meanwhile.
 */
import { once } from 'node:events';
import type { Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { StrataError } from '../base/errors.ts';
import { encodeWalHead, MAX_WAL_BYTES, type ReadRequest } from '../api/safekeeper-protocol.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import type { Timeline } from './timeline.ts';
import { WalFileReader } from './wal-store.ts';

/** How long new WAL is gathered for a reader that has caught up: a message for each commit would cost more than the commit. */
const GATHER_MS = 2;

/** Streams until the signal aborts; throws when there is nothing to stream. */
export async function streamWal(
  socket: Socket,
  timeline: Timeline,
  request: ReadRequest,
  signal: AbortSignal,
): Promise<void> {
  const { startLsn } = timeline.identity;
  if (!Number.isSafeInteger(request.fromLsn) || request.fromLsn < startLsn) {
    throw new StrataError(
      'bad-request',
      `the WAL of timeline ${timeline.identity.timelineId} begins at ${formatLsn(startLsn)}, not ${request.fromLsn}`,
    );
  }
  let wake: (() => void) | undefined;
  const notify = (): void => wake?.();
  const stop = timeline.listen(notify);
  signal.addEventListener('abort', notify, { once: true });
  const files = new WalFileReader(timeline.directory);
  let lsn = request.fromLsn;
  let sentCommitLsn = -1;
  try {
    while (!signal.aborted) {
      const endLsn = readableEnd(timeline, request.term);
      if (lsn < endLsn) {
        const bytes = await files.read(lsn, Math.min(endLsn, lsn + MAX_WAL_BYTES));
        readableEnd(timeline, request.term);
        sentCommitLsn = timeline.commitLsn;
        await send(socket, lsn, sentCommitLsn, bytes, signal);
        lsn += bytes.length;
      } else if (sentCommitLsn < timeline.commitLsn) {
        sentCommitLsn = timeline.commitLsn;
        await send(socket, lsn, sentCommitLsn, undefined, signal);
      } else {
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
        wake = undefined;
        if (request.term === undefined && !signal.aborted)
          await sleep(GATHER_MS, undefined, { signal }).catch(() => {});
      }
    }
  } finally {
    stop();
    signal.removeEventListener('abort', notify);
    await files.close();
  }
}

function readableEnd(timeline: Timeline, term: number | undefined): Lsn {
  timeline.throwIfFailed();
  if (term === undefined) return timeline.commitLsn;
  if (timeline.leaderTerm !== term) {
    throw new StrataError('conflict', `the WAL here is not that of the leader of term ${term}`);
  }
  return timeline.flushLsn;
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
