/**
 * Whose log is whose: comparing logs by their term histories, without looking at entries.
 *
 * Two logs that both have an entry (term, startLsn) are equal up to there, since one leader wrote each term's part and every log of that term
 * begins as its leader's does.
 *
 * A history is *pruned* at an LSN below which all is committed: of the entries that begin below it only the last is kept, and the first of all, whose
 * term 0 then stands for all that were left out. Nothing is ever written in term 0, so where bytes seem to be of that term, they are of terms that were left
 * out, and committed. Only the last log that has the byte at the kept entry's start counts for that byte's quorum: who has another history there
 * has none of what was committed after it, and may be cut to what it knows to be committed, as no quorum needs it for more.
 */
import assert from 'node:assert/strict';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import type { TermHistory } from './messages.ts';

/** The entries of a log that ends at `endLsn`. */
export function historyUpTo(history: TermHistory, endLsn: Lsn): TermHistory {
  let count = history.length;
  while (count > 0 && history[count - 1]!.startLsn > endLsn) count--;
  return count === history.length ? history : history.slice(0, count);
}

/** The term in which the last of a log that ends at `endLsn` was written. */
export function lastLogTerm(history: TermHistory, endLsn: Lsn): number {
  const known = historyUpTo(history, endLsn);
  assert(known.length > 0, 'a history begins at or before the end of its log');
  return known[known.length - 1]!.term;
}

export interface LogPosition {
  readonly lastLogTerm: number;
  readonly flushLsn: Lsn;
}

/** Positive when `a` is the more advanced log: by the last log term first, then by length. */
export function compareLogs(a: LogPosition, b: LogPosition): number {
  return a.lastLogTerm - b.lastLogTerm || a.flushLsn - b.flushLsn;
}

/** Whether a log with this history that ends at `flushLsn` has got as far as the position. Where it ends in what was pruned, all that it has is committed. */
export function hasReached(history: TermHistory, flushLsn: Lsn, position: LogPosition): boolean {
  const log = { lastLogTerm: lastLogTerm(history, flushLsn), flushLsn };
  const isPruned = (history[1]?.startLsn ?? flushLsn) > history[0]!.startLsn;
  if (log.lastLogTerm === 0 && isPruned) return flushLsn >= position.flushLsn;
  return compareLogs(log, position) >= 0;
}

/**
 * Everything acknowledged before these positions were read ends at or below this LSN: it was durable on a quorum, so on some of those that were asked, however the
 * others stand. `voters` are positions of acceptors that vote. Undefined when they are no quorum.
 */
export function acknowledgedBound(
  voters: readonly { readonly flushLsn: Lsn }[],
  acceptorCount: number,
): Lsn | undefined {
  const quorum = Math.floor(acceptorCount / 2) + 1;
  if (voters.length < quorum) return undefined;
  const silent = acceptorCount - voters.length;
  return voters.map((position) => position.flushLsn).sort((a, b) => b - a)[quorum - silent - 1];
}

/** Of a log that is committed up to the LSN. The last entry that begins *before* it has a committed byte, so that every log that has this byte has the entry. */
export function prunedHistory(history: TermHistory, committedLsn: Lsn): TermHistory {
  let kept = history.length - 1;
  while (kept > 0 && history[kept]!.startLsn >= committedLsn) kept--;
  return kept <= 1 ? history : [history[0]!, ...history.slice(kept)];
}

/** Why the two are not histories of logs of one timeline; undefined when they may be. Each for itself is sound. */
export function contradiction(a: TermHistory, b: TermHistory): string | undefined {
  for (let [atA, atB] = [0, 0]; atA < a.length && atB < b.length;) {
    const [one, other] = [a[atA]!, b[atB]!];
    if (one.term <= other.term) atA++;
    if (other.term <= one.term) atB++;
    if (one.term === other.term && one.startLsn !== other.startLsn)
      return `term ${one.term} starts at ${formatLsn(one.startLsn)} and at ${formatLsn(other.startLsn)}`;
  }
  return a[0]?.term === b[0]?.term ? undefined : 'the histories do not begin with the same entry';
}

/** An acceptor's log, as its leader knows it from the vote. */
export interface KnownLog {
  readonly history: TermHistory;
  readonly flushLsn: Lsn;
  readonly commitLsn: Lsn;
}

/** The highest LSN up to which the leader's log and that of an acceptor are known to be the same; the leader's last term has no end. */
export function highestCommonPoint(leader: TermHistory, { history, flushLsn, commitLsn }: KnownLog): Lsn {
  const known = historyUpTo(history, flushLsn);
  let [inLeader, inKnown] = [leader.length - 1, known.length - 1];
  while (leader[inLeader]!.term !== known[inKnown]!.term) {
    if (leader[inLeader]!.term > known[inKnown]!.term) inLeader--;
    else inKnown--;
    assert(inLeader >= 0 && inKnown >= 0, 'all logs of a timeline begin with the same entry');
  }
  assert(leader[inLeader]!.startLsn === known[inKnown]!.startLsn, 'a term starts at one LSN');
  const endInLeader = leader[inLeader + 1]?.startLsn ?? Infinity;
  const endInKnown = known[inKnown + 1]?.startLsn ?? flushLsn;
  const isPruned = inLeader === 0 && (endInLeader > leader[0]!.startLsn || endInKnown > leader[0]!.startLsn);
  if (!isPruned) return Math.min(endInLeader, endInKnown);
  // The leader has all that is committed.
  return Math.min(Math.max(endInKnown, commitLsn), leader.at(-1)!.startLsn);
}
