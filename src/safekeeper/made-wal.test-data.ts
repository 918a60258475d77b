/** WAL made for tests: valid records of any size from any LSN on, as Postgres would send them. */
import { type Lsn, WAL_SEGMENT_SIZE } from '../postgres/lsn.ts';
import { RM_XLOG } from '../postgres/rmgr.ts';
import type { PgVersion } from '../postgres/version.ts';
import { encodeRecordAt } from '../postgres/wal/writer.ts';

const XLOG_NOOP = 0x20;
export const SYSTEM_ID = 7_000_000_000_000_000_001n;

export interface MadeWal {
  readonly startLsn: Lsn;
  readonly endLsn: Lsn;
  readonly bytes: Buffer;
  /** End of each record. */
  readonly ends: readonly Lsn[];
}

/** One record for each size, which is that of its content. `salt` makes records of the same sizes differ. */
export function makeWal(startLsn: Lsn, sizes: readonly number[], salt = 0, version: PgVersion = 17): MadeWal {
  const parts: Buffer[] = [];
  const ends: Lsn[] = [];
  let lsn = startLsn;
  let prevLsn = startLsn - 8;
  for (const [index, size] of sizes.entries()) {
    const mainData = Buffer.alloc(size, (index + salt) & 0xff);
    const record = encodeRecordAt({
      lsn,
      prevLsn,
      rmid: RM_XLOG,
      info: XLOG_NOOP,
      xid: 0,
      mainData,
      version,
      systemId: SYSTEM_ID,
    });
    parts.push(record.bytes);
    prevLsn = record.startLsn;
    lsn = record.endLsn;
    ends.push(lsn);
  }
  return { startLsn, endLsn: lsn, bytes: Buffer.concat(parts), ends };
}

/** In the middle of a page in the middle of a segment. */
export const MID_SEGMENT_LSN: Lsn = 5 * WAL_SEGMENT_SIZE + 3 * 8192 + 1000;
