/**
 * MultiXact: pages of offsets and members begin and end, and new multixacts are written to them.
 *
 *   zero offsets page, zero members page  page: 4 bytes until 16, 8 bytes from 17
 *   create    u32 multixact, u32 offset of its first member, i32 member count, then for each member u32 xid, u32 status
 *   truncate  u32 database, u32 first and u32 end of the multixacts removed, u32 first and u32 end of the member offsets removed
 *
 * (Postgres: multixact.h, multixact_redo, PerformMembersTruncation, PerformOffsetsTruncation.)
 */

import type { PgVersion } from '../../postgres/version.ts';
import { XLR_RMGR_INFO_MASK, mainData } from '../../postgres/wal/record.ts';
import type { WalRecord } from '../../postgres/wal/record.ts';
import { SLRU } from '../key.ts';
import {
  MULTIXACT_MEMBERS_PER_PAGE,
  MULTIXACT_OFFSETS_PER_PAGE,
  multixactMemberChanges,
  multixactOffsetChanges,
} from '../redo/derived.ts';
import type { DerivedChange, MultixactMember } from '../redo/derived.ts';
import { IngestError } from './ingest-error.ts';
import { readPageNumber } from './clog.ts';
import { PAGES_PER_SLRU_SEGMENT } from './slru.ts';
import type { Change } from './change.ts';

const ZERO_OFFSETS_PAGE = 0x00;
const ZERO_MEMBERS_PAGE = 0x10;
const CREATE = 0x20;
const TRUNCATE = 0x30;

const FIRST_MULTIXACT = 1;
const MAX_MULTIXACT = 0xffffffff;

export function multixactChanges(record: WalRecord, version: PgVersion): readonly Change[] {
  const main = mainData(record);
  switch (record.info & XLR_RMGR_INFO_MASK) {
    case ZERO_OFFSETS_PAGE:
      return [{ kind: 'zero-slru-page', slru: SLRU.multixactOffsets, page: readPageNumber(main, version).page }];
    case ZERO_MEMBERS_PAGE:
      return [{ kind: 'zero-slru-page', slru: SLRU.multixactMembers, page: readPageNumber(main, version).page }];
    case CREATE:
      return create(main);
    case TRUNCATE:
      return truncate(main);
    default:
      throw IngestError.unknownRecord(record);
  }
}

function create(main: Buffer): readonly Change[] {
  const multi = main.readUInt32LE(0);
  const offset = main.readUInt32LE(4);
  const count = main.readInt32LE(8);
  const members: MultixactMember[] = [];
  for (let i = 0; i < count; i++) {
    members.push({ xid: main.readUInt32LE(12 + i * 8), status: main.readUInt32LE(16 + i * 8) });
  }
  return [
    ...onPages(SLRU.multixactOffsets, multixactOffsetChanges(multi, offset, count)),
    ...onPages(SLRU.multixactMembers, multixactMemberChanges(offset, members)),
    { kind: 'next-multixact', multi: nextMultixact(multi), offset: (offset + count) % 2 ** 32 },
    { kind: 'xids', xids: members.map((member) => member.xid) },
  ];
}

function truncate(main: Buffer): readonly Change[] {
  const db = main.readUInt32LE(0);
  const oldestMulti = main.readUInt32LE(8);
  const changes: Change[] = [{ kind: 'oldest-multixact', multi: oldestMulti, db }];
  const lastSegment = memberSegment(0xffffffff);
  const endSegment = memberSegment(main.readUInt32LE(16));
  for (let segment = memberSegment(main.readUInt32LE(12)); segment !== endSegment;) {
    changes.push({ kind: 'drop-slru-segment', slru: SLRU.multixactMembers, segment });
    segment = segment === lastSegment ? 0 : segment + 1;
  }
  // One back, so that the cutoff is a page that exists even when no multixact was made since.
  const cutoff = oldestMulti === FIRST_MULTIXACT ? MAX_MULTIXACT : oldestMulti - 1;
  const cutoffPage = Math.floor(cutoff / MULTIXACT_OFFSETS_PER_PAGE);
  changes.push({ kind: 'truncate-slru', slru: SLRU.multixactOffsets, cutoffPage });
  return changes;
}

function nextMultixact(multi: number): number {
  return multi === MAX_MULTIXACT ? FIRST_MULTIXACT : multi + 1;
}

function memberSegment(offset: number): number {
  return Math.floor(offset / MULTIXACT_MEMBERS_PER_PAGE / PAGES_PER_SLRU_SEGMENT);
}

function onPages(slru: number, changes: readonly DerivedChange[]): Change[] {
  return changes.map((change) => ({ kind: 'change-slru-page', slru, change }));
}
