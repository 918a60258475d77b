/**
 * Looks at WAL that is about to go to the object store, so that a damaged disk does not spread: each record of which any part goes there, with what of it is
 * before and after in the log on this disk. A record that goes over the end of a segment is one of both.
 *
 * What began before the first byte on this disk cannot be looked at, and is not.
 */
import { setImmediate as yieldToOthers } from 'node:timers/promises';
import { formatLsn, type Lsn, WAL_PAGE_SIZE } from '../postgres/lsn.ts';
import { toPgVersion } from '../postgres/version.ts';
import { WalBoundaryTracker } from '../postgres/wal/boundary-tracker.ts';
import { WalError } from '../postgres/wal/error.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import type { Timeline } from './timeline.ts';
import { WalFileReader } from './wal-store.ts';

const CHECK_BYTES = 1024 * 1024;
/** By how much further back is looked each time for where a record began. */
const BACK_FACTOR = 8;

interface Part {
  readonly lsn: Lsn;
  readonly bytes: Buffer;
}

/** Of one timeline. */
export class SegmentCheck {
  /** The record that goes over the end of what was looked at last: it may go over several, and need not be read for each. */
  #over: { readonly segmentEnd: Lsn; readonly endLsn: Lsn } | undefined;

  /** `bytes` are what is on the disk from `fromLsn` on, within one segment, below the commit LSN. Throws WalError. */
  async check(timeline: Timeline, fromLsn: Lsn, bytes: Buffer): Promise<void> {
    const { commitLsn, directory, identity } = timeline;
    const endLsn = fromLsn + bytes.length;
    const files = new WalFileReader(directory);
    try {
      const over = this.#over?.segmentEnd === fromLsn ? this.#over.endLsn : undefined;
      if (over !== undefined && over >= endLsn) {
        this.#over = { segmentEnd: endLsn, endLsn: over };
        return;
      }
      const before = over === undefined ? await rest(timeline, files, fromLsn) : undefined;
      const beginLsn = before?.lsn ?? over ?? firstBoundary(timeline, fromLsn, bytes);
      if (beginLsn === undefined) return; // All of it is a record that began before this disk does.
      const reader = new WalReader(beginLsn, toPgVersion(identity.pgVersion));
      const read = ({ lsn, bytes: part }: Part): void => {
        reader.push(lsn, part);
        while (reader.next() !== undefined);
      };
      if (before !== undefined) read(before);
      for (let lsn = Math.max(beginLsn, fromLsn); lsn < endLsn; lsn += CHECK_BYTES) {
        read({ lsn, bytes: bytes.subarray(lsn - fromLsn, lsn - fromLsn + CHECK_BYTES) });
        await yieldToOthers();
      }
      while (reader.position < endLsn) {
        const lsn = reader.pushLsn;
        if (lsn >= commitLsn)
          throw new WalError(reader.position, `no record ends at the commit LSN ${formatLsn(commitLsn)}`);
        read({ lsn, bytes: await files.read(lsn, Math.min(commitLsn, lsn + CHECK_BYTES)) });
      }
      this.#over = { segmentEnd: endLsn, endLsn: reader.position };
    } finally {
      await files.close();
    }
  }
}

/** From the last end of a record before `lsn`, a segment's start or the log's, up to there; undefined when that is not on this disk. */
async function rest({ kept }: Timeline, files: WalFileReader, lsn: Lsn): Promise<Part | undefined> {
  const { localStartLsn, logStartLsn } = kept;
  for (let back = WAL_PAGE_SIZE; lsn > localStartLsn; back *= BACK_FACTOR) {
    const fromLsn = Math.max(lsn - back, localStartLsn);
    const bytes = await files.readAll(fromLsn, lsn);
    const endLsn = new WalBoundaryTracker(fromLsn).push(bytes);
    if (endLsn > fromLsn || fromLsn === logStartLsn) return { lsn: endLsn, bytes: bytes.subarray(endLsn - fromLsn) };
    if (fromLsn === localStartLsn) return undefined;
  }
  return undefined;
}

/** Where a record ends, or none goes on, at or after the beginning of these bytes; early as a rule. */
function firstBoundary({ kept }: Timeline, fromLsn: Lsn, bytes: Buffer): Lsn | undefined {
  if (fromLsn === kept.logStartLsn) return fromLsn;
  const tracker = new WalBoundaryTracker(fromLsn);
  for (let at = 0; at < bytes.length; at += WAL_PAGE_SIZE) {
    const endLsn = tracker.push(bytes.subarray(at, at + WAL_PAGE_SIZE));
    if (endLsn > fromLsn) return endLsn;
  }
  return undefined;
}
