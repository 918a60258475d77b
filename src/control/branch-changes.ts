/**
 * What changed in a branch, page by page of an answer: between two points of its history, since it began, or since it and another branch were one.
 * Storage knows it from the indexes of its layers (pageserver/changes.ts).
 *
 * A cursor holds the window's LSNs with the place, so that all pages of an answer are about the same window.
 */
import type { BlockPosition, ChangedFork } from '../api/pageserver.ts';
import { StrataError } from '../base/errors.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { formatLsn } from '../postgres/lsn.ts';
import { outsideHistory } from './branch-points.ts';
import type { Branches } from './branches.ts';
import type { ControlContext } from './context.ts';
import { decodeCursor, encodeCursor } from './pagination.ts';
import type { BranchRow } from './state.ts';

export interface BranchChangesOptions {
  readonly from_lsn?: string;
  readonly from_timestamp?: string;
  readonly to_lsn?: string;
  readonly to_timestamp?: string;
  /** Id of a branch: from where the two part. */
  readonly compare_to?: string;
  /** With the ranges of blocks. */
  readonly ranges?: 'true' | 'false';
  readonly cursor?: string;
}

export interface BranchChanges {
  readonly branch: BranchRow;
  readonly fromLsn: Lsn;
  readonly toLsn: Lsn;
  readonly forks: readonly ChangedFork[];
  readonly slruPageCount?: number;
  readonly keyBlocksRead: number;
  readonly cursor?: string;
}

export async function branchChanges(
  context: ControlContext,
  branches: Branches,
  projectId: string,
  branchId: string,
  options: BranchChangesOptions,
): Promise<BranchChanges> {
  const branch = branches.ready(projectId, branchId);
  const place = options.cursor === undefined ? undefined : decodePlace(options.cursor);
  const { fromLsn, toLsn } = place ?? (await windowOf(context, branches, branch, options));
  const page = await context.storage.changes({
    timelineId: branch.timeline_id,
    fromLsn,
    toLsn,
    withRanges: options.ranges === 'true',
    ...(place === undefined ? {} : { after: place.after }),
  });
  return {
    branch,
    fromLsn,
    toLsn,
    forks: page.forks,
    keyBlocksRead: page.keyBlocksRead,
    ...(page.slruPageCount === undefined ? {} : { slruPageCount: page.slruPageCount }),
    ...(page.next === undefined ? {} : { cursor: encodePlace(fromLsn, toLsn, page.next) }),
  };
}

async function windowOf(
  context: ControlContext,
  branches: Branches,
  branch: BranchRow,
  options: BranchChangesOptions,
): Promise<{ fromLsn: Lsn; toLsn: Lsn }> {
  const { storage } = context;
  const head = await storage.headLsn(branch.timeline_id);
  if (options.compare_to !== undefined) {
    const given = (['from_lsn', 'from_timestamp', 'to_lsn', 'to_timestamp'] as const).find((name) => options[name]);
    if (given !== undefined) {
      throw new StrataError('bad-request', `${given} and compare_to exclude each other: give one of them`);
    }
    const other = branches.ready(branch.project_id, options.compare_to);
    const otherHead = await storage.headLsn(other.timeline_id);
    const fromLsn = await storage.commonLsn(
      { timelineId: branch.timeline_id, lsn: head },
      { timelineId: other.timeline_id, lsn: otherHead },
    );
    return { fromLsn, toLsn: head };
  }
  const pointOf = async (lsn: string | undefined, timestamp: string | undefined, otherwise: Lsn): Promise<Lsn> => {
    if (lsn === undefined && timestamp === undefined) return otherwise;
    if (timestamp === undefined) {
      // Any LSN in between will do.
      const point = await branches.points.readLsn(branch, lsn!, head);
      const status = await storage.status(branch.timeline_id);
      if (point.lsn >= status.oldestLsn && point.lsn <= point.head) return point.lsn;
      throw outsideHistory(branch, point.lsn, { ...status, newestLsn: point.head });
    }
    // What is written of a transaction before its commit comes with that commit.
    return storage.lastCommitLsn(branch.timeline_id, (await branches.points.find(branch, { lsn, timestamp })).lsn);
  };
  const fromLsn = await pointOf(options.from_lsn, options.from_timestamp, branch.ancestor_lsn);
  const toLsn = await pointOf(options.to_lsn, options.to_timestamp, head);
  if (fromLsn <= toLsn) return { fromLsn, toLsn };
  const window = `from ${formatLsn(fromLsn)} to ${formatLsn(toLsn)}`;
  throw new StrataError('bad-request', `${window} goes backwards: give the earlier point as the first`);
}

function encodePlace(fromLsn: Lsn, toLsn: Lsn, { fork, blk }: BlockPosition): string {
  return encodeCursor([fromLsn, toLsn, fork.spc, fork.db, fork.rel, fork.fork, ...(blk === undefined ? [] : [blk])]);
}

function decodePlace(cursor: string): { fromLsn: Lsn; toLsn: Lsn; after: BlockPosition } {
  const parts = decodeCursor(cursor);
  const isOurs = (parts.length === 6 || parts.length === 7) && parts.every((part) => typeof part === 'number');
  if (!isOurs) throw new StrataError('bad-request', `cursor is not one of changes: ${JSON.stringify(cursor)}`);
  const [fromLsn, toLsn, spc, db, rel, fork, blk] = parts as [number, number, number, number, number, number, number?];
  return { fromLsn, toLsn, after: { fork: { spc, db, rel, fork }, ...(blk === undefined ? {} : { blk }) } };
}
