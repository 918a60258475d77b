/**
 * Database and RelMap: database directories come and go, and the maps from mapped catalogs to their files change.
 *
 *   create by file copy  u32 database, u32 tablespace, u32 source database, u32 source tablespace
 *   create by WAL        u32 database, u32 tablespace; its map and pages follow as records of their own
 *   drop                 u32 database, i32 n, n × u32 tablespace
 *   map                  u32 database, u32 tablespace, i32 n, n bytes: the file
 *
 * (Postgres: dbcommands_xlog.h, relmapper.h.)
 */

import { RM_DBASE } from '../../postgres/rmgr.ts';
import { XLR_RMGR_INFO_MASK, mainData } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { IngestError } from './ingest-error.ts';
import type { Change } from './change.ts';

const CREATE_FILE_COPY = 0x00;
const CREATE_WAL_LOG = 0x10;
const DROP = 0x20;

const RELMAP_UPDATE = 0x00;

/** Whether the record says that a database was copied and not what is in it. */
export function isFileCopy(record: WalRecord): boolean {
  return record.rmid === RM_DBASE && (record.info & XLR_RMGR_INFO_MASK) === CREATE_FILE_COPY;
}

export function databaseChanges(record: WalRecord): readonly Change[] {
  const main = mainData(record);
  const db = main.readUInt32LE(0);
  switch (record.info & XLR_RMGR_INFO_MASK) {
    case CREATE_FILE_COPY:
      return [
        {
          kind: 'copy-database',
          db,
          spc: main.readUInt32LE(4),
          fromDb: main.readUInt32LE(8),
          fromSpc: main.readUInt32LE(12),
        },
      ];
    case CREATE_WAL_LOG:
      return [{ kind: 'create-database', db, spc: main.readUInt32LE(4) }];
    case DROP: {
      const changes: Change[] = [];
      for (let i = 0; i < main.readInt32LE(4); i++) {
        changes.push({ kind: 'drop-database', db, spc: main.readUInt32LE(8 + i * 4) });
      }
      return changes;
    }
    default:
      throw IngestError.unknownRecord(record);
  }
}

export function relationMapChanges(record: WalRecord): readonly Change[] {
  if ((record.info & XLR_RMGR_INFO_MASK) !== RELMAP_UPDATE) throw IngestError.unknownRecord(record);
  const main = mainData(record);
  const map = main.subarray(12, 12 + main.readInt32LE(8));
  return [{ kind: 'relation-map', db: main.readUInt32LE(0), spc: main.readUInt32LE(4), map }];
}
