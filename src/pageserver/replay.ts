/** Replays values of the page store on pages: redo for WAL records, derived changes for what records imply. */

import type { Lsn } from '../postgres/lsn.ts';
import type { PgVersion } from '../postgres/version.ts';
import { decodeWalRecord } from '../postgres/wal/record.ts';
import { applyDerived } from './redo/derived.ts';
import { applyRecord } from './redo/redo.ts';
import { decodeValue } from './value.ts';

/** See Replay in read.ts. */
export function replayValue(page: Buffer, value: Buffer, lsn: Lsn, pgVersion: PgVersion): void {
  const change = decodeValue(value);
  switch (change.kind) {
    case 'record':
    case 'init-record':
      applyRecord(page, decodeWalRecord(change.record, change.startLsn, lsn), change.blockId, pgVersion);
      return;
    case 'derived':
      applyDerived(page, change.subtype, change.payload);
      return;
    case 'image':
    case 'tombstone':
      throw new Error(`a value of kind ${change.kind} is not replayed`);
  }
}
