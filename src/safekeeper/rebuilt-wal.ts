/**
 * The WAL of a log that is made anew after a quorum has lost it: from the object store, or from other safekeepers, whose every record is checked on the way
 * (sound-wal.ts). Durable when it is there.
 */
import type { TimelineIdentity, WalSource } from '../api/safekeeper.ts';
import { StrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import type { LogPosition } from '../consensus/term-history.ts';
import { formatLsn, type Lsn, segmentStart } from '../postgres/lsn.ts';
import { FlushMark } from './flush-mark.ts';
import type { OffloadedWal } from './offloaded-wal.ts';
import { offloadedOrigin, safekeeperOrigin, soundWal, type WalDamage } from './sound-wal.ts';
import { type WalExtent, wholeExtent } from './wal-extent.ts';
import { WalStore } from './wal-store.ts';

const COPY_TIMEOUT_MS = 10 * 60_000;

/** The WAL of a log that ends at `endLsn`: nothing when it begins there, else its last segment, from the object store. */
export async function fetchWal(
  directory: string,
  identity: TimelineIdentity,
  logStartLsn: Lsn,
  endLsn: Lsn,
  wal: OffloadedWal | undefined,
): Promise<WalExtent> {
  const store = new WalStore(directory, identity, logStartLsn);
  if (endLsn === logStartLsn) {
    await store.create();
    return wholeExtent(logStartLsn);
  }
  if (wal === undefined) throw new StrataError('bad-request', 'this safekeeper has no object store to rebuild from');
  const localStartLsn = Math.max(logStartLsn, segmentStart(endLsn - 1));
  if (localStartLsn === logStartLsn) await store.create();
  for (let lsn = localStartLsn; lsn < endLsn;) {
    const bytes = await wal.read(identity, lsn, endLsn);
    await store.fill(lsn, bytes);
    lsn += bytes.length;
  }
  return { logStartLsn, localStartLsn, offloadedLsn: endLsn };
}

/** Who has the WAL of a log that is copied, the one that has most first; the store is asked after all of them. */
export interface CopySources {
  readonly safekeepers: readonly WalSource[];
  readonly token: string;
  readonly wal: OffloadedWal | undefined;
}

/** All of a log from `logStartLsn` to `endLsn`, both ends of records, as others have it sound. Throws `unavailable` when they have not: nothing is left out in silence. */
export async function copyWal(
  directory: string,
  identity: TimelineIdentity,
  logStartLsn: Lsn,
  end: LogPosition,
  sources: CopySources,
  log: Logger,
): Promise<WalExtent> {
  const { safekeepers, token, wal } = sources;
  const signal = AbortSignal.timeout(COPY_TIMEOUT_MS);
  const origins = safekeepers.map(({ nodeId, address, endLsn }) =>
    safekeeperOrigin(`safekeeper ${nodeId}`, identity, { address, token }, endLsn, signal),
  );
  if (wal !== undefined) origins.push(offloadedOrigin(identity, wal));
  const store = new WalStore(directory, identity, logStartLsn);
  await store.create();
  const found: string[] = [];
  const onDamage = ({ origin, lsn, reason }: WalDamage): void => {
    log.error(
      { timelineId: identity.timelineId, origin, lsn: formatLsn(lsn), reason },
      'the WAL that is copied is damaged',
    );
    found.push(`${origin}: ${reason}`);
  };
  let lsn = logStartLsn;
  for await (const bytes of soundWal({ timeline: identity, fromLsn: lsn, endLsn: end.flushLsn, origins, onDamage })) {
    await store.fill(lsn, bytes);
    lsn += bytes.length;
  }
  if (lsn < end.flushLsn) {
    throw new StrataError(
      'unavailable',
      `the WAL of timeline ${identity.timelineId} is sound up to ${formatLsn(lsn)} only, not ${formatLsn(end.flushLsn)} (${found.join('; ')})`,
    );
  }
  // Who ends before this one day is damaged, and says so.
  const mark = new FlushMark(directory, () => {});
  await mark.lower(end);
  await mark.release();
  return wholeExtent(logStartLsn);
}
