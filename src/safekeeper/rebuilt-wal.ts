/** The WAL of a log that is made anew after a quorum has lost it: from the object store, or from another safekeeper. Durable when it is there. */
import { readWal, type SafekeeperAddress, type TimelineIdentity } from '../api/safekeeper.ts';
import { StrataError } from '../base/errors.ts';
import { formatLsn, type Lsn, segmentStart } from '../postgres/lsn.ts';
import type { OffloadedWal } from './offloaded-wal.ts';
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

/** All that another safekeeper has of the log, from `logStartLsn` on. */
export async function copyWal(
  directory: string,
  identity: TimelineIdentity,
  logStartLsn: Lsn,
  source: { readonly address: SafekeeperAddress; readonly endLsn: Lsn; readonly token: string },
): Promise<WalExtent> {
  const { tenantId, timelineId } = identity;
  const { endLsn, ...endpoint } = source;
  const store = new WalStore(directory, identity, logStartLsn);
  await store.create();
  const signal = AbortSignal.timeout(COPY_TIMEOUT_MS);
  let lsn = logStartLsn;
  const chunks = readWal({ ...endpoint, tenantId, timelineId, fromLsn: lsn, isRebuild: true, signal });
  while (lsn < endLsn) {
    const { value: chunk } = await chunks.next();
    if (chunk === undefined) throw new StrataError('timeout', `WAL was copied up to ${formatLsn(lsn)} only`);
    const bytes = chunk.bytes.subarray(0, endLsn - lsn);
    if (bytes.length > 0) await store.fill(lsn, bytes);
    lsn += bytes.length;
  }
  await chunks.return();
  return wholeExtent(logStartLsn);
}
