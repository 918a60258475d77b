/** WAL made for tests: a chain of records without block references, from any LSN on. */

import type { Lsn } from '../lsn.ts';
import { RM_LOGICALMSG, RM_XLOG } from '../rmgr.ts';
import type { PgVersion } from '../version.ts';
import { encodeRecordAt } from './writer.ts';

export interface MadeWal {
  readonly startLsn: Lsn;
  readonly prevLsn: Lsn;
  readonly bytes: Buffer;
  readonly records: readonly { readonly startLsn: Lsn; readonly endLsn: Lsn; readonly mainLength: number }[];
}

export const TEST_SYSTEM_ID = 0x1234_5678_9abc_def0n;
export const TEST_VERSION: PgVersion = 17;
const XLOG_NOOP = 0x20;

/** Records with main data of these lengths, filled with their number. */
export function makeWal(startLsn: Lsn, lengths: readonly number[]): MadeWal {
  const prevLsn = startLsn - 32;
  const parts: Buffer[] = [];
  const records: { startLsn: Lsn; endLsn: Lsn; mainLength: number }[] = [];
  let lsn = startLsn;
  let prev = prevLsn;
  lengths.forEach((mainLength, i) => {
    const record = encodeRecordAt({
      lsn,
      prevLsn: prev,
      rmid: i % 2 === 0 ? RM_XLOG : RM_LOGICALMSG,
      info: i % 2 === 0 ? XLOG_NOOP : 0,
      xid: i,
      mainData: Buffer.alloc(mainLength, i),
      version: TEST_VERSION,
      systemId: TEST_SYSTEM_ID,
    });
    parts.push(record.bytes);
    records.push({ startLsn: record.startLsn, endLsn: record.endLsn, mainLength });
    lsn = record.endLsn;
    prev = record.startLsn;
  });
  return { startLsn, prevLsn, bytes: Buffer.concat(parts), records };
}

/** Cuts bytes into chunks whose lengths repeat. */
export function* chunksOf(bytes: Buffer, lengths: readonly number[]): Generator<Buffer, void, void> {
  for (let at = 0, i = 0; at < bytes.length; i++) {
    const length = Math.max(1, lengths[i % lengths.length] ?? bytes.length);
    yield bytes.subarray(at, at + length);
    at += length;
  }
}
