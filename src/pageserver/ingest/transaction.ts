/**
 * Transaction: what the end of a transaction, or its preparation, changes. (Postgres: xact_redo in xact.c.)
 *
 * A commit or abort sets the status of the transaction and its subtransactions, a commit their timestamps where those are tracked;
 * either removes the files of the relations that it dropped or had created, and the state file of a transaction that had been
 * prepared. (Commits of one transaction that say nothing but their time, which are most, Ingest takes without asking here.)
 */

import { TRANSACTION_ABORTED, TRANSACTION_COMMITTED, transactionStatusChanges } from '../redo/derived.ts';
import type { PgVersion } from '../../postgres/version.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { parseXactRecord, twoPhaseFileBytes } from '../../postgres/xact-record.ts';
import type { XactEnd } from '../../postgres/xact-record.ts';
import { SLRU } from '../key.ts';
import { NO_CHANGES } from './change.ts';
import type { Change } from './change.ts';

export function transactionChanges(record: WalRecord, version: PgVersion): readonly Change[] {
  const parsed = parseXactRecord(record, version);
  if (parsed === undefined) return NO_CHANGES;
  if (parsed.kind !== 'prepare') return endChanges(parsed, record.originId);
  return [
    { kind: 'xids', xids: [parsed.xid, ...parsed.subxacts] },
    { kind: 'prepare', xid: parsed.xid, file: twoPhaseFileBytes(record) },
  ];
}

function endChanges(end: XactEnd, originId: number): readonly Change[] {
  const xids = [end.xid, ...end.subxacts];
  const isCommit = end.kind === 'commit';
  const changes: Change[] = [{ kind: 'xids', xids }];
  if (isCommit) {
    const timeUs = end.originTimeUs === 0 ? end.timeUs : end.originTimeUs;
    changes.push({ kind: 'commit', timeUs: end.timeUs }, { kind: 'commit-timestamps', timeUs, origin: originId, xids });
  }
  for (const change of transactionStatusChanges(isCommit ? TRANSACTION_COMMITTED : TRANSACTION_ABORTED, xids)) {
    changes.push({ kind: 'change-slru-page', slru: SLRU.clog, change });
  }
  for (const relation of end.droppedRelations) changes.push({ kind: 'drop-relation', relation });
  if (end.prepared) changes.push({ kind: 'forget-prepared', xid: end.xid });
  return changes;
}
