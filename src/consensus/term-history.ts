/**
 * Whose log is whose: comparing logs by their term histories, without looking at entries.
 *
 * Two logs that both have an entry (term, startLsn) are equal up to there, since one leader wrote each term's part and every log of that term
 * begins as its leader's does.
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

/** Why the two are not histories of logs of one timeline; undefined when they may be. Each for itself is sound. */
export function contradiction(a: TermHistory, b: TermHistory): string | undefined {
  for (let index = 0; index < a.length && index < b.length && a[index]!.term === b[index]!.term; index++) {
    const [one, other] = [a[index]!, b[index]!];
    if (one.startLsn !== other.startLsn)
      return `term ${one.term} starts at ${formatLsn(one.startLsn)} and at ${formatLsn(other.startLsn)}`;
  }
  return a[0]?.term === b[0]?.term ? undefined : 'the histories do not begin with the same entry';
}

/** The highest LSN up to which the leader's log and that of an acceptor are the same; the leader's last term has no end. */
export function highestCommonPoint(leader: TermHistory, acceptor: TermHistory, acceptorFlushLsn: Lsn): Lsn {
  const known = historyUpTo(acceptor, acceptorFlushLsn);
  let common = -1;
  while (
    common + 1 < leader.length &&
    common + 1 < known.length &&
    leader[common + 1]!.term === known[common + 1]!.term
  ) {
    common++;
    assert(leader[common]!.startLsn === known[common]!.startLsn, 'a term starts at one LSN');
  }
  assert(common >= 0, 'all logs of a timeline begin with the same entry');
  const endInLeader = leader[common + 1]?.startLsn ?? Infinity;
  const endInAcceptor = known[common + 1]?.startLsn ?? acceptorFlushLsn;
  return Math.min(endInLeader, endInAcceptor);
}
