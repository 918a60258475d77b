/** What a safekeeper is told of a timeline that it does not know yet: nothing of it is believed before it was looked at here. */
import type { TimelineIdentity } from '../api/safekeeper.ts';
import { StrataError } from '../base/errors.ts';
import type { AcceptorState } from '../consensus/acceptor.ts';
import { toPgVersion } from '../postgres/version.ts';

export function isId(text: string): boolean {
  return /^[0-9a-f]{32}$/.test(text);
}

export function checkIdentity(identity: TimelineIdentity): void {
  const { tenantId, timelineId, startLsn, pgVersion, systemId } = identity;
  const isSound =
    isId(tenantId) && isId(timelineId) && Number.isSafeInteger(startLsn) && startLsn > 0 && /^\d{1,20}$/.test(systemId);
  if (!isSound) {
    throw new StrataError('bad-request', `not a timeline: ${JSON.stringify(identity)}`);
  }
  try {
    toPgVersion(pgVersion);
  } catch (error) {
    throw new StrataError('bad-request', (error as Error).message, { cause: error });
  }
}

/** What a proposer may give to who has nothing: an empty log, from the timeline's start or, when that is gone, a later point of the leader's log. */
export function checkState(identity: TimelineIdentity, state: AcceptorState): void {
  const { term, history, commitLsn, generation, votesFrom } = state;
  const { startLsn } = identity;
  const numbers = [term, generation, votesFrom?.lastLogTerm ?? 0, votesFrom?.flushLsn ?? 0];
  const isSound =
    numbers.every((number) => Number.isSafeInteger(number) && number >= 0) &&
    Number.isSafeInteger(commitLsn) &&
    commitLsn >= startLsn &&
    history.length >= 1 &&
    history[0]!.term === 0 &&
    history[0]!.startLsn === startLsn &&
    history.every((entry) => entry.startLsn <= commitLsn && entry.term <= term);
  if (!isSound) throw new StrataError('bad-request', `not the state of an empty log: ${JSON.stringify(state)}`);
}

export function assertSameIdentity(known: TimelineIdentity, told: TimelineIdentity): void {
  for (const field of ['startLsn', 'pgVersion', 'systemId'] as const) {
    if (known[field] !== told[field]) {
      throw new StrataError(
        'conflict',
        `timeline ${known.timelineId} has ${field} ${known[field]}, not ${told[field]}`,
      );
    }
  }
}
