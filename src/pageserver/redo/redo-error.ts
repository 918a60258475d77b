/**
 * What redo throws when a record cannot be replayed on a page: the record is of no known type, refers to blocks that its type does not
 * have, or does not fit the page. It is the world's fault (damaged or unknown WAL, a page of another history), never the caller's.
 */

import { formatLsn } from '../../postgres/lsn.ts';
import type { Lsn } from '../../postgres/lsn.ts';

export class RedoError extends Error {
  override name = 'RedoError';
  /** Name of the resource manager, as pg_waldump prints it. */
  readonly rmgr: string;
  /** Name of the record's type as pg_waldump prints it, or its info bits where it has no name. */
  readonly recordType: string;
  /** Where the record starts. */
  readonly lsn: Lsn;

  constructor(rmgr: string, recordType: string, lsn: Lsn, reason: string, options?: ErrorOptions) {
    super(`cannot replay ${rmgr}/${recordType} at ${formatLsn(lsn)}: ${reason}`, options);
    this.rmgr = rmgr;
    this.recordType = recordType;
    this.lsn = lsn;
  }
}
