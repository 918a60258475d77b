/**
 * The records of a WAL source that pass a filter, as they are named by pg_waldump: which blocks they refer to and how large they are.
 */

import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { rmgrName } from '../postgres/rmgr.ts';
import type { PgVersion } from '../postgres/version.ts';
import { WalError } from '../postgres/wal/error.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import type { WalRecord } from '../postgres/wal/record.ts';
import { describeRecord } from './record-description.ts';
import { recordTypeName } from './redo/record-type.ts';
import type { WalSource } from './wal-directory.ts';

export interface WalFilter {
  readonly startLsn?: Lsn;
  /** Records that end after this are left out. */
  readonly endLsn?: Lsn;
  readonly relation?: { readonly spc: number; readonly db: number; readonly rel: number };
  /** As rmgrName gives it. */
  readonly rmgr?: string;
  readonly limit?: number;
}

export interface RecordSummary {
  readonly rmgr: string;
  readonly type: string;
  /** What the record says besides; may be empty. */
  readonly description: string;
  readonly lsn: Lsn;
  readonly endLsn: Lsn;
  readonly prevLsn: Lsn;
  readonly xid: number;
  /** Without images. */
  readonly recordBytes: number;
  readonly totalBytes: number;
  readonly blocks: readonly BlockSummary[];
}

export interface BlockSummary {
  readonly id: number;
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
  readonly fork: number;
  readonly blk: number;
  readonly image: 'to apply' | 'for verification' | undefined;
}

/**
 * Gives the records to `onRecords`, some at a time. Resolves to why there is nothing after the last one, or undefined where the filter
 * ended it or the bytes end with a record.
 */
export async function dumpWal(
  source: WalSource,
  filter: WalFilter,
  onRecords: (records: readonly RecordSummary[]) => void,
): Promise<string | undefined> {
  const reader = new WalReader(source.startLsn, source.version, { anyTimeline: true });
  const { startLsn = 0, endLsn = Infinity, limit = Infinity } = filter;
  let given = 0;
  for await (const chunk of source.chunks) {
    const batch: RecordSummary[] = [];
    try {
      reader.push(chunk.lsn, chunk.bytes);
      for (let record = reader.next(); record !== undefined; record = reader.next()) {
        if (record.endLsn > endLsn) {
          onRecords(batch);
          return undefined;
        }
        if (record.startLsn < startLsn || !passes(record, filter)) continue;
        batch.push(summaryOf(record, source.version));
        if (++given < limit) continue;
        onRecords(batch);
        return undefined;
      }
    } catch (error) {
      if (!(error instanceof WalError)) throw error;
      onRecords(batch);
      return error.message;
    }
    onRecords(batch);
  }
  return source.resumesAtLsn === undefined
    ? undefined
    : `a segment is missing: WAL goes on at ${formatLsn(source.resumesAtLsn)}`;
}

function passes(record: WalRecord, { relation, rmgr }: WalFilter): boolean {
  if (rmgr !== undefined && rmgrName(record.rmid) !== rmgr) return false;
  if (relation === undefined) return true;
  return record.blocks.some(({ spc, db, rel }) => spc === relation.spc && db === relation.db && rel === relation.rel);
}

export function summaryOf(record: WalRecord, version: PgVersion): RecordSummary {
  let imageBytes = 0;
  const blocks: BlockSummary[] = [];
  for (const block of record.blocks) {
    const { id, spc, db, rel, fork, blk } = block;
    imageBytes += block.imageLength;
    const image = !block.hasImage ? undefined : block.applyImage ? 'to apply' : 'for verification';
    blocks.push({ id, spc, db, rel, fork, blk, image });
  }
  return {
    rmgr: rmgrName(record.rmid),
    type: recordTypeName(record, version),
    description: describeRecord(record, version),
    lsn: record.startLsn,
    endLsn: record.endLsn,
    prevLsn: record.prevLsn,
    xid: record.xid,
    recordBytes: record.totalLength - imageBytes,
    totalBytes: record.totalLength,
    blocks,
  };
}
