/**
 * Looks at committed WAL on this disk, record by record, and mends what is damaged or gone: the others have the same bytes, as what is committed never changes.
 * A start looks for the end of a log only, and readers take what is there; so silent damage would stay until the other disks have lost the same record.
 *
 * Invariants:
 *   - Nothing is written but whole records with the right CRC that follow what is sound here (sound-wal.ts), below the commit LSN.
 *   - Others give only what they know to be committed: above that, their logs may be those of leaders who lost.
 *
 * What is before the end of the first record on this disk cannot be looked at: that one begins elsewhere. When it is gone, it is taken from the object store.
 */
import { constants } from 'node:fs';
import { open, stat } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { readWal, type WalSource } from '../api/safekeeper.ts';
import { syncDirectory } from '../base/durable-file.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import { formatLsn, type Lsn, segmentOffset, segmentStart, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import { toPgVersion } from '../postgres/version.ts';
import { WholeRecords } from '../postgres/wal/whole-records.ts';
import { offloadedOrigin, soundWal, type WalOrigin } from './sound-wal.ts';
import type { Timeline } from './timeline.ts';
import { resumePoint } from './wal-cursor.ts';
import { segmentPath, WalFileReader, WalStore } from './wal-store.ts';

export interface MendOptions {
  readonly timeline: Timeline;
  /** Other safekeepers, each up to where it knows the log to be committed. */
  readonly sources: readonly WalSource[];
  /** Opens them. */
  readonly token: string;
  /** False: the log is not that of this folder any more. */
  readonly isHere: () => boolean;
  /** Of each place that was found: what is before it is sound. */
  readonly onDamage: (lsn: Lsn, reason: string) => void;
}

const CHECK_BYTES = 1024 * 1024;
/** After each of these, so that commits go on meanwhile. */
const REST_MS = 10;
const MEND_TIMEOUT_MS = 5 * 60_000;

/** How many places were mended. Throws `unavailable` when nobody has a record sound that is damaged here. */
export async function mendWal(options: MendOptions): Promise<number> {
  const { timeline, onDamage } = options;
  const { commitLsn, kept, identity } = timeline;
  const held = { lsn: kept.localStartLsn };
  const letGo = kept.hold(held);
  let count = 0;
  const noted = (lsn: Lsn, reason: string): void => {
    count++;
    onDamage(lsn, reason);
  };
  try {
    let lsn = await firstBoundary(options, noted);
    let prevLsn: Lsn | undefined;
    let mendBytes = 0;
    let mendedLsn: Lsn = -1;
    for (;;) {
      const sound = await soundPart(timeline, lsn, prevLsn, commitLsn);
      if (sound === undefined) return count;
      // What begins within what was mended last goes on behind it.
      const isNew = sound.endLsn > mendedLsn;
      if (!isNew && sound.endLsn === lsn && mendBytes > commitLsn - lsn) {
        const { timelineId } = identity;
        throw new StrataError('unavailable', `timeline ${timelineId} stays damaged at ${formatLsn(lsn)}`);
      }
      ({ endLsn: lsn, lastRecordStart: prevLsn } = sound);
      if (isNew) noted(lsn, sound.reason);
      mendBytes = isNew ? CHECK_BYTES : 2 * mendBytes;
      mendedLsn = await mend(options, lsn, prevLsn, commitLsn, lsn + mendBytes);
    }
  } finally {
    letGo();
  }
}

/** The end of the first record on this disk, from which on records can be checked. */
async function firstBoundary(options: MendOptions, onDamage: MendOptions['onDamage']): Promise<Lsn> {
  const { timeline } = options;
  const { localStartLsn } = timeline.kept;
  try {
    return await resumePoint(timeline);
  } catch (error) {
    const segment = await timeline.offloadedWal?.find(timeline.identity, localStartLsn);
    if (segment === undefined) throw error;
    onDamage(localStartLsn, toStrataError(error).message);
    const endLsn = Math.min(segment.endLsn, segmentStart(localStartLsn) + WAL_SEGMENT_SIZE);
    await writeWal(
      options,
      localStartLsn,
      segment.bytes.subarray(localStartLsn - segment.fromLsn, endLsn - segment.fromLsn),
    );
    return await resumePoint(timeline);
  }
}

interface SoundPart {
  readonly endLsn: Lsn;
  readonly lastRecordStart: Lsn | undefined;
  /** What is wrong after it. */
  readonly reason: string;
}

/** How far the WAL on this disk is sound; undefined: to the end. */
async function soundPart(
  timeline: Timeline,
  fromLsn: Lsn,
  prevLsn: Lsn | undefined,
  endLsn: Lsn,
): Promise<SoundPart | undefined> {
  const version = toPgVersion(timeline.identity.pgVersion);
  const whole = new WholeRecords(fromLsn, version, prevLsn === undefined ? {} : { prevLsn });
  const files = new WalFileReader(timeline.directory);
  let failure: string | undefined;
  try {
    for (let lsn = fromLsn; lsn < endLsn && whole.damage === undefined;) {
      const bytes = await files.read(lsn, Math.min(endLsn, lsn + CHECK_BYTES));
      lsn += bytes.length;
      whole.push(bytes);
      if (lsn < endLsn) await sleep(REST_MS);
    }
  } catch (error) {
    failure = toStrataError(error).message;
  } finally {
    await files.close();
  }
  if (whole.endLsn >= endLsn) return undefined;
  const reason = whole.damage?.message ?? failure ?? `no record ends at ${formatLsn(endLsn)}`;
  return { endLsn: whole.endLsn, lastRecordStart: whole.lastRecordStart ?? prevLsn, reason };
}

/** Up to `untilLsn` or a little further; how far. */
async function mend(
  options: MendOptions,
  fromLsn: Lsn,
  prevLsn: Lsn | undefined,
  endLsn: Lsn,
  untilLsn: Lsn,
): Promise<Lsn> {
  const { timeline, sources, token } = options;
  const { identity, offloadedWal } = timeline;
  const gone = new AbortController();
  const signal = AbortSignal.any([gone.signal, AbortSignal.timeout(MEND_TIMEOUT_MS)]);
  const origins = sources.map((source) => committedOrigin(timeline, source, token, signal));
  if (offloadedWal !== undefined) origins.push(offloadedOrigin(identity, offloadedWal));
  let lsn = fromLsn;
  try {
    for await (const bytes of soundWal({ timeline: identity, fromLsn, prevLsn, endLsn, origins, onDamage: () => {} })) {
      await writeWal(options, lsn, bytes);
      lsn += bytes.length;
      if (lsn >= untilLsn) break;
    }
  } finally {
    gone.abort();
  }
  if (lsn > fromLsn) return lsn;
  const { timelineId } = identity;
  throw new StrataError('unavailable', `nobody has the WAL of timeline ${timelineId} sound at ${formatLsn(fromLsn)}`);
}

function committedOrigin(
  { identity: { tenantId, timelineId } }: Timeline,
  { nodeId, address, endLsn }: WalSource,
  token: string,
  signal: AbortSignal,
): WalOrigin {
  async function* read(fromLsn: Lsn): AsyncGenerator<Buffer, void, void> {
    for await (const { bytes } of readWal({ address, token, tenantId, timelineId, fromLsn, signal }))
      if (bytes.length > 0) yield bytes;
  }
  return { name: `safekeeper ${nodeId}`, endLsn, endsWithRecord: true, read };
}

/** Over what is there; durable when it resolves. */
async function writeWal({ timeline, isHere }: MendOptions, fromLsn: Lsn, bytes: Buffer): Promise<void> {
  const { directory, identity, kept } = timeline;
  for (let lsn = fromLsn; lsn < fromLsn + bytes.length; lsn = segmentStart(lsn) + WAL_SEGMENT_SIZE) {
    if (!isHere()) throw new StrataError('conflict', `the log of timeline ${identity.timelineId} is another by now`);
    const path = segmentPath(directory, lsn);
    const size = await stat(path).then(
      (found) => found.size,
      () => undefined,
    );
    // Who writes there has it open, and would go on in what is gone.
    if (size === undefined && segmentStart(lsn) + WAL_SEGMENT_SIZE > timeline.commitLsn)
      throw new StrataError('unavailable', `${path}, which is being written, is gone`);
    // With the page headers that are before the log's start.
    if (size === undefined && segmentStart(lsn) === segmentStart(kept.logStartLsn))
      await new WalStore(directory, identity, kept.logStartLsn).create();
    const file = await open(path, constants.O_RDWR | constants.O_CREAT, 0o600);
    try {
      if (size !== WAL_SEGMENT_SIZE) await file.truncate(WAL_SEGMENT_SIZE);
      const part = bytes.subarray(lsn - fromLsn, segmentStart(lsn) + WAL_SEGMENT_SIZE - fromLsn);
      for (let at = 0; at < part.length;)
        at += (await file.write(part, at, part.length - at, segmentOffset(lsn) + at)).bytesWritten;
      await file.sync();
    } finally {
      await file.close();
    }
    if (size === undefined) await syncDirectory(directory);
  }
}
