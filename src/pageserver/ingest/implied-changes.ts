/**
 * What a record implies beyond its block references: a pure function of the record, one file for each resource manager.
 *
 * A record of an extension's resource manager means what only the extension knows. It can be taken only when each of its blocks comes
 * with an image that restores it, as then at least the pages are right.
 */

import {
  RM_BRIN,
  RM_BTREE,
  RM_CLOG,
  RM_COMMIT_TS,
  RM_DBASE,
  RM_GENERIC,
  RM_GIN,
  RM_GIST,
  RM_HASH,
  RM_HEAP,
  RM_HEAP2,
  RM_LOGICALMSG,
  RM_MULTIXACT,
  RM_RELMAP,
  RM_REPLORIGIN,
  RM_SEQ,
  RM_SMGR,
  RM_SPGIST,
  RM_STANDBY,
  RM_TBLSPC,
  RM_XACT,
  RM_XLOG,
} from '../../postgres/rmgr.ts';
import type { PgVersion } from '../../postgres/version.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { NO_CHANGES } from './change.ts';
import type { Change } from './change.ts';
import { clogChanges, commitTsChanges } from './clog.ts';
import { databaseChanges, relationMapChanges } from './database.ts';
import { heapChanges } from './heap.ts';
import { IngestError } from './ingest-error.ts';
import { multixactChanges } from './multixact.ts';
import { storageChanges } from './storage.ts';
import { transactionChanges } from './transaction.ts';
import { standbyChanges, xlogChanges } from './xlog.ts';

/** Throws IngestError for a record whose meaning is not known. */
export function impliedChanges(record: WalRecord, version: PgVersion): readonly Change[] {
  switch (record.rmid) {
    case RM_HEAP:
    case RM_HEAP2:
      return heapChanges(record);
    case RM_XACT:
      return transactionChanges(record, version);
    case RM_XLOG:
      return xlogChanges(record, version);
    case RM_STANDBY:
      return standbyChanges(record);
    case RM_SMGR:
      return storageChanges(record);
    case RM_CLOG:
      return clogChanges(record, version);
    case RM_COMMIT_TS:
      return commitTsChanges(record, version);
    case RM_MULTIXACT:
      return multixactChanges(record, version);
    case RM_DBASE:
      return databaseChanges(record);
    case RM_RELMAP:
      return relationMapChanges(record);
    // Index pages and sequences are all named by their records.
    case RM_BTREE:
    case RM_HASH:
    case RM_GIN:
    case RM_GIST:
    case RM_SEQ:
    case RM_SPGIST:
    case RM_BRIN:
    case RM_GENERIC:
    // Logical messages are for subscribers; replication origins are not kept.
    case RM_LOGICALMSG:
    case RM_REPLORIGIN:
      return NO_CHANGES;
    case RM_TBLSPC:
      throw new IngestError(
        record,
        'tablespaces are not supported: there is one store, and no folder of its own to give',
      );
    default:
      if (record.blocks.length > 0 && record.blocks.every((block) => block.hasImage && block.applyImage)) {
        return NO_CHANGES;
      }
      throw new IngestError(record, 'only the extension that wrote it knows what it changes');
  }
}
