/**
 * Reads the log of the safekeeper from which a lost one is to be made anew, before anything is decided: what a start of that safekeeper has looked at is only what
 * follows its commit LSN, and disks damage in silence. The copy is checked again, record by record (safekeeper/rebuilt-wal.ts).
 *
 * Where a record is damaged, the object store and the other survivors are asked for it. Where nobody has it,
 *   - and the pageserver has ingested it, nobody needs it: the log may begin where the pageserver is;
 *   - and the pageserver has not, what can be had ends there.
 * The pageserver took its last record from what was committed. If the survivor's log has no such record there, it is that of a leader who lost, and ends there too.
 */
import type { RebuildDamage } from '../api/rebuilt-logs.ts';
import type { TimelineIdentity } from '../api/safekeeper.ts';
import { toStrataError } from '../base/errors.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { RM_XACT } from '../postgres/rmgr.ts';
import { toPgVersion } from '../postgres/version.ts';
import type { WalRecord } from '../postgres/wal/record.ts';
import { parseXactRecord, timestampToDate } from '../postgres/xact-record.ts';
import { soundWal, type WalDamage, type WalOrigin } from '../safekeeper/sound-wal.ts';
import type { SurvivorCheck } from './rebuild-plan.ts';

export interface SurvivorCheckOptions {
  readonly timeline: TimelineIdentity;
  /** The survivor first, then who else may have what is damaged there. */
  readonly origins: readonly WalOrigin[];
  /** Where the survivor's log may be taken from; rejects when its disk is damaged there. */
  readonly resumePoint: () => Promise<Lsn>;
  /** The survivor's log is on its disk from here on, and ends there. */
  readonly localStartLsn: Lsn;
  readonly flushLsn: Lsn;
  /** End and start of the last record that the pageserver has ingested; not after flushLsn. */
  readonly ingested: { readonly endLsn: Lsn; readonly startLsn: Lsn };
  /** Of what is offloaded without a gap from there on. */
  readonly offloadedLsn: Lsn | undefined;
}

export async function checkSurvivor(options: SurvivorCheckOptions): Promise<SurvivorCheck> {
  const { timeline, origins, localStartLsn, flushLsn, ingested, offloadedLsn } = options;
  const version = toPgVersion(timeline.pgVersion);
  const damage: RebuildDamage[] = [];
  let lastCommitMs: number | undefined;
  const onRecord = (record: WalRecord): void => {
    lastCommitMs = commitTimeMs(record, version) ?? lastCommitMs;
  };
  /** How far all is sound. */
  const read = async (
    fromLsn: Lsn,
    endLsn: Lsn,
    prevLsn: Lsn | undefined,
    otherwise: RebuildDamage['remedy'],
  ): Promise<Lsn> => {
    const found: WalDamage[] = [];
    const onDamage = (each: WalDamage): void => void found.push(each);
    let lsn = fromLsn;
    for await (const bytes of soundWal({ timeline, fromLsn, prevLsn, endLsn, origins, onDamage, onRecord }))
      lsn += bytes.length;
    for (const each of found) damage.push({ ...each, remedy: each.lsn === lsn && lsn < endLsn ? otherwise : 'copied' });
    return lsn;
  };
  let startLsn: Lsn;
  try {
    startLsn = await options.resumePoint();
  } catch (error) {
    const { code, message } = toStrataError(error);
    const later = [ingested.endLsn, offloadedLsn].find(
      (lsn) => lsn !== undefined && lsn >= localStartLsn && lsn <= flushLsn,
    );
    if (code !== 'internal' || later === undefined) throw error;
    damage.push({ origin: origins[0]!.name, lsn: localStartLsn, reason: message, remedy: 'ingested' });
    startLsn = later;
  }
  if (startLsn < ingested.endLsn) {
    const reachedLsn = await read(startLsn, ingested.endLsn, undefined, 'ingested');
    if (reachedLsn < ingested.endLsn) startLsn = ingested.endLsn;
  }
  const fromLsn = Math.max(startLsn, ingested.endLsn);
  const prevLsn = fromLsn === ingested.endLsn ? ingested.startLsn : undefined;
  const soundLsn = await read(fromLsn, flushLsn, prevLsn, 'none');
  return { startLsn, soundLsn, damage, lastCommitMs };
}

/** When the record is a commit. */
export function commitTimeMs(record: WalRecord, version: ReturnType<typeof toPgVersion>): number | undefined {
  if (record.rmid !== RM_XACT) return undefined;
  const xact = parseXactRecord(record, version);
  return xact?.kind === 'commit' ? timestampToDate(xact.timeUs).getTime() : undefined;
}
