/**
 * Points in a branch's history: from an LSN or a time to the LSN where a branch may begin, and back to the time of what is there.
 *
 * A branch's history is that of its parent below the point where it began, so a point may lie in any of its ancestors: then it is a point of that
 * ancestor, and a branch made there is the ancestor's child. Which state is meant by a time is said in pageserver/ingest/wal-index.ts.
 */
import { setTimeout as sleep } from 'node:timers/promises';

import type { TimelineStatus } from '../api/control.ts';
import { StrataError } from '../base/errors.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { formatLsn, parseLsn, withoutPageHeader } from '../postgres/lsn.ts';
import type { ControlContext } from './context.ts';
import type { BranchRow } from './state.ts';
import { formatTimestampMs, formatTimestampUs, parseTimestampUs } from './timestamps.ts';

/** How far before its flush a server may tell a position, in bytes, and for how long: its WAL writer comes every 200 ms (wal_writer_delay). */
const UNFLUSHED_MAX = 64 * 1024 * 1024;
const UNFLUSHED_WAIT_MS = 2000;
const UNFLUSHED_POLL_MS = 50;

export interface PointOptions {
  readonly lsn?: string | undefined;
  readonly timestamp?: string | undefined;
}

export interface PointInHistory {
  /** The branch that was asked about, or the ancestor in whose own history the point lies. */
  readonly branch: BranchRow;
  /** The end of a record. */
  readonly lsn: Lsn;
  /** Whether it is where the branch ended just now. */
  readonly isHead: boolean;
  /** The time that was asked for. */
  readonly timestampUs?: number;
}

export class BranchPoints {
  readonly #context: ControlContext;

  constructor(context: ControlContext) {
    this.#context = context;
  }

  /** The point that is asked for; the head when neither an LSN nor a time is. `bad-request` and `history-gone` name what there is. */
  async find(branch: BranchRow, { lsn, timestamp }: PointOptions): Promise<PointInHistory> {
    if (lsn !== undefined && timestamp !== undefined) {
      throw new StrataError('bad-request', 'an LSN and a timestamp exclude each other: give one of them');
    }
    if (lsn !== undefined) return this.#atLsn(branch, lsn);
    if (timestamp !== undefined) return this.#atTime(branch, parseTimestampUs(timestamp));
    return { branch, lsn: await this.#context.storage.headLsn(branch.timeline_id), isHead: true };
  }

  /** When the latest commit of the state at a point was made, in microseconds since 1970; undefined when nobody has committed yet. */
  async timestampUs({ branch, lsn }: PointInHistory): Promise<number | undefined> {
    const root = this.#rootOf(branch);
    // What is in the template was committed by us.
    if (branch.id === root.id && lsn <= root.ancestor_lsn) return undefined;
    const timestampUs = await this.#context.storage.timestampOfLsn(branch.timeline_id, lsn);
    return timestampUs === undefined || timestampUs < root.created_at * 1000 ? undefined : timestampUs;
  }

  /**
   * An LSN that a client gave, and the head, which is below it when the LSN is in the future. pg_current_wal_lsn() and pg_current_wal_insert_lsn() tell
   * positions that Postgres has still to flush: they are waited for. The head that a caller has just asked for is asked for again only when the LSN is past it.
   */
  async readLsn(branch: BranchRow, text: string, knownHead?: Lsn): Promise<{ lsn: Lsn; head: Lsn }> {
    const lsn = withoutPageHeader(parsedLsn(text));
    if (knownHead !== undefined && lsn <= knownHead) return { lsn, head: knownHead };
    const giveUpAt = performance.now() + UNFLUSHED_WAIT_MS;
    for (;;) {
      const head = await this.#context.storage.headLsn(branch.timeline_id);
      if (lsn <= head || lsn > head + UNFLUSHED_MAX || performance.now() > giveUpAt) return { lsn, head };
      await sleep(UNFLUSHED_POLL_MS);
    }
  }

  async #atLsn(branch: BranchRow, text: string): Promise<PointInHistory> {
    const { storage } = this.#context;
    const { lsn, head } = await this.readLsn(branch, text);
    const status = await storage.status(branch.timeline_id);
    const oldestLsn = Math.max(status.oldestLsn, this.#rootOf(branch).ancestor_lsn);
    if (lsn < oldestLsn || lsn > head) throw outsideHistory(branch, lsn, { ...status, oldestLsn, newestLsn: head });
    const resolved = await storage.resolveLsn(branch.timeline_id, lsn);
    return { ...this.#owned(branch, resolved), isHead: false };
  }

  async #atTime(branch: BranchRow, timestampUs: number): Promise<PointInHistory> {
    const { storage, now } = this.#context;
    const oldestUs = this.#rootOf(branch).created_at * 1000;
    const newestUs = (now() + 1) * 1000; // To the end of this millisecond.
    if (timestampUs < oldestUs || timestampUs > newestUs) {
      const where = timestampUs > newestUs ? 'in the future' : 'before the beginning';
      const range = `oldest ${formatTimestampUs(oldestUs)}, newest ${formatTimestampUs(newestUs)}`;
      throw new StrataError(
        'bad-request',
        `time ${formatTimestampUs(timestampUs)} is ${where} of branch ${branch.name}: ${range}`,
      );
    }
    await storage.headLsn(branch.timeline_id); // So that every commit up to now is known.
    const lsn = await storage.lsnForTimestamp(branch.timeline_id, timestampUs).catch(async (error: unknown) => {
      if (!(error instanceof StrataError) || error.code !== 'history-gone') throw error;
      const kept = keptText(await storage.status(branch.timeline_id)); // storage knows no names
      const state = `the state of ${formatTimestampUs(timestampUs)} of branch ${branch.name}`;
      throw new StrataError('history-gone', `${state} is no longer kept: ${kept}`, { cause: error });
    });
    return { ...this.#owned(branch, lsn), isHead: false, timestampUs };
  }

  /** The branch, or the ancestor that has the LSN in its own history; what is below all of them was made by us. */
  #owned(branch: BranchRow, lsn: Lsn): { branch: BranchRow; lsn: Lsn } {
    let owner = branch;
    while (lsn < owner.ancestor_lsn && owner.parent_id !== null) owner = this.#parentOf(owner.parent_id);
    return { branch: owner, lsn: Math.max(lsn, owner.ancestor_lsn) };
  }

  #rootOf(branch: BranchRow): BranchRow {
    let root = branch;
    while (root.parent_id !== null) root = this.#parentOf(root.parent_id);
    return root;
  }

  /** A branch that has children is there. */
  #parentOf(parentId: string): BranchRow {
    return this.#context.state.get<BranchRow>('SELECT * FROM branches WHERE id = ?', parentId)!;
  }
}

/** What there is of the branch is in `kept`. */
export function outsideHistory(branch: BranchRow, lsn: Lsn, kept: TimelineStatus): StrataError {
  const where = lsn < kept.oldestLsn ? 'before the beginning' : 'in the future';
  return new StrataError(
    'bad-request',
    `LSN ${formatLsn(lsn)} is ${where} of branch ${branch.name}: ${keptText(kept)}`,
  );
}

function keptText({ oldestLsn, oldestTimeMs, newestLsn }: TimelineStatus): string {
  const time = oldestTimeMs === undefined ? '' : ` (the state of ${formatTimestampMs(oldestTimeMs)})`;
  return `oldest ${formatLsn(oldestLsn)}${time}, newest ${formatLsn(newestLsn)}`;
}

function parsedLsn(text: string): Lsn {
  try {
    return parseLsn(text);
  } catch (error) {
    throw new StrataError('bad-request', `LSN ${JSON.stringify(text)} is not one such as 0/16B3748`, { cause: error });
  }
}
