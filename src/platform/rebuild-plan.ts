/**
 * What is done about a log that a quorum of safekeepers has lost: decided from what each of them says, what is offloaded, what the pageserver has ingested, and
 * what was found when the best survivor's log was read (survivor-check.ts). The rules are in log-rebuild.ts.
 *
 * Invariants:
 *   - Who has a log that is to be replaced is first: as long as the lost ones are a quorum, a crash leaves what the next look finishes.
 *   - A log that ends before a survivor's has a newer term at its end, so that the survivor, should it come back with its old log, leads nobody there.
 */
import type { RebuildDamage, RebuiltLog } from '../api/rebuilt-logs.ts';
import type { SafekeeperTimelineStatus, TimelineIdentity } from '../api/safekeeper.ts';
import type { AcceptorState } from '../consensus/acceptor.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import type { TermHistory } from '../consensus/messages.ts';
import { compareLogs, hasReached } from '../consensus/term-history.ts';
import type { Lsn } from '../postgres/lsn.ts';

/** What one safekeeper says. */
export type SafekeeperView =
  | { readonly kind: 'present'; readonly status: SafekeeperTimelineStatus }
  | { readonly kind: 'absent' }
  | { readonly kind: 'silent'; readonly reason: string };

/** What is offloaded, up to the end of its last whole record. */
export interface OffloadedEnd {
  readonly endLsn: Lsn;
  readonly history: TermHistory;
  /** Of the last commit in the last object; undefined when there is none. */
  readonly lastCommitMs: number | undefined;
}

export type RebuildPlan =
  | { readonly kind: 'none' }
  /** A majority may be lost, but these are silent. */
  | { readonly kind: 'wait'; readonly silent: readonly number[] }
  | {
      readonly kind: 'rebuild';
      /** Indexes of the safekeepers that get a log. */
      readonly targets: readonly number[];
      readonly logStartLsn: Lsn;
      readonly state: AcceptorState;
      readonly source: RebuiltLog['source'];
      /** Of the safekeeper whose log it is; with `source` another safekeeper. */
      readonly copied?: number;
      /** Everything before it is kept. */
      readonly keptLsn: Lsn;
      /** Up to where survivors may have acknowledged what is not kept. */
      readonly lostLsn?: Lsn;
    };

/** What of the best survivor's log can be had, from its disk or others'. */
export interface SurvivorCheck {
  /** Where the log may begin, the end of a record: nobody needs from safekeepers what is before. */
  readonly startLsn: Lsn;
  /** All from there to here, the end of a record, is sound. */
  readonly soundLsn: Lsn;
  readonly damage: readonly RebuildDamage[];
  /** Of the last commit before soundLsn, if there was one. */
  readonly lastCommitMs: number | undefined;
}

/** No proposer that was elected by what is lost has got so far ahead of what is known. */
const TERM_JUMP = 2 ** 20;

/**
 * Without `check` the best survivor's log is taken to be whole. `isAsked`: an operator wants to know, or has accepted what is lost. Then logs that give no vote count as
 * lost too, where no leader is at work that would heal them; what they have is kept as that of the others is.
 */
export function planRebuild(
  views: readonly SafekeeperView[],
  timeline: Pick<TimelineIdentity, 'startLsn'>,
  ingestedLsn: Lsn,
  offloaded: OffloadedEnd | undefined,
  nowMs: number,
  check?: SurvivorCheck,
  isAsked = false,
): RebuildPlan {
  const { startLsn } = timeline;
  const quorum = Math.floor(views.length / 2) + 1;
  const indexes = (kind: SafekeeperView['kind']): number[] =>
    views.flatMap((view, index) => (view.kind === kind ? [index] : []));
  const [absent, silent] = [indexes('absent'), indexes('silent')];
  const survivors = views.flatMap((view, index) => (view.kind === 'present' ? [{ ...view.status, index }] : []));
  const isLed = survivors.some(({ hasLeader }) => hasLeader);
  const voteless = isAsked && !isLed ? survivors.filter(({ isVoter }) => !isVoter).length : 0;
  const lostCount = absent.length + voteless;
  if (lostCount === 0 || lostCount + silent.length < quorum) return { kind: 'none' };
  if (silent.length > 0) return { kind: 'wait', silent };
  const isVoteless = absent.length < quorum; // All are given the log, so that they vote again.
  const history = offloaded?.history ?? [{ term: 0, startLsn }];
  const offloadedLsn = offloaded?.endLsn ?? startLsn;
  const best = survivors.reduce<(typeof survivors)[number] | undefined>(
    (most, each) => (most === undefined || compareLogs(each, most) > 0 ? each : most),
    undefined,
  );
  const knownTerms = survivors.map((status) => Math.max(status.term, status.lastLogTerm));
  const term = Math.max(nowMs, Math.max(history.at(-1)!.term, ...knownTerms) + TERM_JUMP);
  const generation = 1 + Math.max(0, ...survivors.map((status) => status.generation));
  const configuration = survivors.reduce(
    (newest, each) => (each.configuration.version > newest.version ? each.configuration : newest),
    NO_CONFIGURATION,
  );
  const stored = { lastLogTerm: history.at(-1)!.term, flushLsn: offloadedLsn };
  const isStoredPruned = stored.lastLogTerm === 0 && offloadedLsn > startLsn; // It is committed, but of a term that nobody knows any more.
  const isSurvivorBest =
    best !== undefined &&
    (isStoredPruned ? best.commitLsn >= offloadedLsn : hasReached(best.history, best.flushLsn, stored));
  const bestLsn = isSurvivorBest ? (check?.soundLsn ?? best.flushLsn) : offloadedLsn;
  const isCut = isSurvivorBest && bestLsn < best.flushLsn;
  const present = survivors.map(({ index }) => index);
  // Those that were given their log anew, or have damaged it, say what they had acknowledged.
  const acknowledged = survivors.flatMap(({ votesFrom, commitLsn }) => [votesFrom?.flushLsn ?? 0, commitLsn]);
  const wasLsn = Math.max(...acknowledged, isCut ? best.flushLsn : 0);
  // Then all begin a new term there, and what survivors have of before stays beside.
  const isEnded = isVoteless || wasLsn > bestLsn;
  const planned = (plan: PlannedLog): RebuildPlan => ({
    kind: 'rebuild',
    ...plan,
    ...(wasLsn > plan.keptLsn ? { lostLsn: wasLsn } : {}),
  });
  if (ingestedLsn > bestLsn || (isCut && ingestedLsn === bestLsn)) {
    return planned({
      targets: [...present, ...absent],
      logStartLsn: ingestedLsn,
      state: {
        term,
        generation,
        configuration,
        commitLsn: ingestedLsn,
        history: [...history, { term, startLsn: ingestedLsn }],
      },
      source: 'pageserver',
      keptLsn: ingestedLsn,
    });
  }
  if (isSurvivorBest) {
    const isDamaged = check !== undefined && check.damage.length > 0;
    const others = present.filter((index) => index !== best.index);
    const replaced = isEnded ? [best.index, ...others] : isDamaged ? [best.index] : [];
    const cutHistory = best.history.filter((entry, at) => at === 0 || entry.startLsn < bestLsn);
    return planned({
      targets: [...replaced, ...absent],
      logStartLsn: check?.startLsn ?? best.localStartLsn,
      state: {
        term,
        generation,
        configuration,
        // What is ingested is committed, and this log was compared with it.
        commitLsn: check === undefined ? best.commitLsn : Math.min(Math.max(best.commitLsn, ingestedLsn), bestLsn),
        history: isEnded ? [...cutHistory, { term, startLsn: bestLsn }] : best.history,
      },
      source: 'another safekeeper',
      copied: best.index,
      keptLsn: bestLsn,
    });
  }
  return planned({
    targets: isEnded ? [...present, ...absent] : absent,
    logStartLsn: startLsn,
    state: {
      term,
      generation,
      configuration,
      commitLsn: offloadedLsn,
      // So that it is more advanced than what survives of older terms.
      history: isStoredPruned || isEnded ? [...history, { term, startLsn: offloadedLsn }] : history,
    },
    source: 'object store',
    keptLsn: offloadedLsn,
  });
}

type PlannedLog = Omit<Extract<RebuildPlan, { kind: 'rebuild' }>, 'kind' | 'lostLsn'>;
