/**
 * The WAL of a log that is made anew, from all who have some of it: the one that has most is read, and where a record of it is damaged, or cannot be read,
 * the others are asked for it. Only whole records with the right CRC come out, each linked to the one before (postgres/wal/whole-records.ts).
 *
 * Where nobody has the next record sound, it ends: what is before is all that can be had without a gap.
 */
import { readWal, type SafekeeperEndpoint, type TimelineIdentity } from '../api/safekeeper.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import { ObjectStoreError } from '../object-store/object-store.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import { toPgVersion } from '../postgres/version.ts';
import type { WalRecord } from '../postgres/wal/record.ts';
import { WholeRecords } from '../postgres/wal/whole-records.ts';
import type { OffloadedWal } from './offloaded-wal.ts';

/** Who has WAL of a log. */
export interface WalOrigin {
  readonly name: string;
  /** It has nothing from there on. */
  readonly endLsn: Lsn;
  /** What it has ends with a whole record. */
  readonly endsWithRecord: boolean;
  /** Bytes from the LSN on. Ends before `endLsn` where it has no more. */
  readonly read: (fromLsn: Lsn) => AsyncIterable<Buffer>;
}

export interface WalDamage {
  readonly origin: string;
  /** What is before it is sound. */
  readonly lsn: Lsn;
  readonly reason: string;
}

export interface SoundWalOptions {
  readonly timeline: TimelineIdentity;
  /** The end of a record. */
  readonly fromLsn: Lsn;
  /** Where the record before begins, when it is known: the first one must say so. */
  readonly prevLsn?: Lsn | undefined;
  /** The end of a record too: a record that goes on over it is not sound. */
  readonly endLsn: Lsn;
  /** Whom to ask, in this order. */
  readonly origins: readonly WalOrigin[];
  readonly onDamage: (damage: WalDamage) => void;
  readonly onRecord?: (record: WalRecord) => void;
}

/** Pieces that follow each other, from `fromLsn` on; together they end with a record, at `endLsn` or where nobody has the next one. */
export async function* soundWal(options: SoundWalOptions): AsyncGenerator<Buffer, void, void> {
  const { timeline, fromLsn, endLsn, origins, onDamage, onRecord } = options;
  const version = toPgVersion(timeline.pgVersion);
  const uselessAt = new Map<WalOrigin, Lsn>();
  let { prevLsn } = options;
  for (let lsn = fromLsn; lsn < endLsn;) {
    const origin = origins.find((each) => lsn < each.endLsn && uselessAt.get(each) !== lsn);
    if (origin === undefined) return;
    const whole = new WholeRecords(lsn, version, {
      ...(prevLsn === undefined ? {} : { prevLsn }),
      ...(onRecord === undefined ? {} : { onRecord }),
    });
    const untilLsn = Math.min(endLsn, origin.endLsn);
    let readLsn = lsn;
    let failure: string | undefined;
    try {
      for await (const bytes of origin.read(lsn)) {
        const wanted = bytes.subarray(0, untilLsn - readLsn);
        readLsn += wanted.length;
        for (const piece of whole.push(wanted)) yield piece;
        if (whole.damage !== undefined || readLsn >= untilLsn) break;
      }
    } catch (error) {
      failure = whatIsDamaged(error);
    }
    const reason = whole.damage?.message ?? failure;
    lsn = whole.endLsn;
    prevLsn = whole.lastRecordStart ?? prevLsn;
    if (lsn >= endLsn) return;
    uselessAt.set(origin, lsn);
    if (reason !== undefined) onDamage({ origin: origin.name, lsn, reason });
    else if (lsn < untilLsn && (origin.endsWithRecord || readLsn === endLsn))
      onDamage({ origin: origin.name, lsn, reason: `no record ends at ${formatLsn(untilLsn)}` });
  }
}

/** What says that it cannot be read, not only now. Throws what is no damage. */
function whatIsDamaged(error: unknown): string {
  if (error instanceof ObjectStoreError && error.kind !== 'not-found')
    throw new StrataError('unavailable', `the object store: ${error.message}`, { cause: error });
  const { code, message } = toStrataError(error);
  if (code !== 'internal' && code !== 'history-gone') throw error;
  return message;
}

/** What a safekeeper has flushed, up to `endLsn`. */
export function safekeeperOrigin(
  name: string,
  { tenantId, timelineId }: TimelineIdentity,
  endpoint: SafekeeperEndpoint,
  endLsn: Lsn,
  signal: AbortSignal,
): WalOrigin {
  async function* read(fromLsn: Lsn): AsyncGenerator<Buffer, void, void> {
    for await (const { bytes } of readWal({ ...endpoint, tenantId, timelineId, fromLsn, isRebuild: true, signal }))
      if (bytes.length > 0) yield bytes;
    throw new StrataError('timeout', `${name} did not give all of its WAL of timeline ${timelineId} in time`);
  }
  return { name, endLsn, endsWithRecord: true, read };
}

export function offloadedOrigin(timeline: TimelineIdentity, wal: OffloadedWal): WalOrigin {
  async function* read(fromLsn: Lsn): AsyncGenerator<Buffer, void, void> {
    for (let lsn = fromLsn; ;) {
      const segment = await wal.find(timeline, lsn);
      if (segment === undefined) return;
      yield segment.bytes.subarray(lsn - segment.fromLsn);
      lsn = segment.endLsn;
    }
  }
  return { name: 'the object store', endLsn: Infinity, endsWithRecord: false, read };
}
