/**
 * What ingest throws when a record cannot be taken: its meaning for pages it does not name is unknown, or it does not fit what is
 * stored. Nothing of the record has been kept then. It is the world's fault (an extension's own records, damaged or foreign WAL).
 */

import { formatLsn } from '../../postgres/lsn.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { rmgrName } from '../../postgres/rmgr.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';

export class IngestError extends Error {
  override name = 'IngestError';
  /** Where the record starts. */
  readonly lsn: Lsn;

  constructor(record: WalRecord, reason: string) {
    const info = `0x${(record.info & 0xf0).toString(16).padStart(2, '0')}`;
    super(`cannot ingest ${rmgrName(record.rmid)} record ${info} at ${formatLsn(record.startLsn)}: ${reason}`);
    this.lsn = record.startLsn;
  }

  static unknownRecord(record: WalRecord): IngestError {
    return new IngestError(record, 'this type of record is not known, so what it changes cannot be told');
  }
}
