/**
 * Storage: forks created and relations truncated.
 *
 *   create    u32 tablespace, u32 database, u32 relation, i32 fork
 *   truncate  u32 blocks, u32 tablespace, u32 database, u32 relation, i32 flags
 *
 * What is removed is not here: it is part of a commit or abort. (Postgres: storage_xlog.h, smgr_redo in storage.c.)
 */

import { XLR_RMGR_INFO_MASK, mainData } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { IngestError } from './ingest-error.ts';
import type { Change } from './change.ts';

const SMGR_CREATE = 0x10;
const SMGR_TRUNCATE = 0x20;

const TRUNCATE_HEAP = 0x01;
const TRUNCATE_VM = 0x02;
const TRUNCATE_FSM = 0x04;

export function storageChanges(record: WalRecord): readonly Change[] {
  const main = mainData(record);
  switch (record.info & XLR_RMGR_INFO_MASK) {
    case SMGR_CREATE:
      return [{ kind: 'create-fork', fork: { ...readRelation(main, 0), fork: main.readInt32LE(12) } }];
    case SMGR_TRUNCATE: {
      const flags = main.readInt32LE(16);
      return [
        {
          kind: 'truncate-relation',
          blocks: main.readUInt32LE(0),
          relation: readRelation(main, 4),
          main: (flags & TRUNCATE_HEAP) !== 0,
          freeSpace: (flags & TRUNCATE_FSM) !== 0,
          visibility: (flags & TRUNCATE_VM) !== 0,
        },
      ];
    }
    default:
      throw IngestError.unknownRecord(record);
  }
}

function readRelation(bytes: Buffer, at: number): { spc: number; db: number; rel: number } {
  return { spc: bytes.readUInt32LE(at), db: bytes.readUInt32LE(at + 4), rel: bytes.readUInt32LE(at + 8) };
}
