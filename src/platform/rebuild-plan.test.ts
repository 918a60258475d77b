/** What is decided about a log that safekeepers have lost. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { SafekeeperTimelineStatus } from '../api/safekeeper.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import type { TermHistory } from '../consensus/messages.ts';
import { type OffloadedEnd, planRebuild, type RebuildPlan, type SafekeeperView } from './rebuild-plan.ts';

const START = 1_000;
const TIMELINE = {
  tenantId: 'a'.repeat(32),
  timelineId: 'b'.repeat(32),
  startLsn: START,
  pgVersion: 17,
  systemId: '1',
};
const ABSENT: SafekeeperView = { kind: 'absent' };
const SILENT: SafekeeperView = { kind: 'silent', reason: 'no answer' };
const history = (...terms: [number, number][]): TermHistory => [
  { term: 0, startLsn: START },
  ...terms.map(([term, startLsn]) => ({ term, startLsn })),
];

function present(flushLsn: number, lastLogTerm: number, more: Partial<SafekeeperTimelineStatus> = {}): SafekeeperView {
  const status: SafekeeperTimelineStatus = {
    ...TIMELINE,
    term: lastLogTerm,
    generation: 0,
    configuration: NO_CONFIGURATION,
    lastLogTerm,
    history: history([lastLogTerm, START]),
    flushLsn,
    commitLsn: flushLsn,
    localStartLsn: START,
    offloadedLsn: START,
    isVoter: true,
    hasLeader: false,
    proposerCount: 0,
    ...more,
  };
  return { kind: 'present', status };
}

const OFFLOADED: OffloadedEnd = { endLsn: 5_000, history: history([3, START]), lastCommitMs: 1 };

function plan(views: readonly SafekeeperView[], ingestedLsn: number, offloaded?: OffloadedEnd, nowMs = 0): RebuildPlan {
  return planRebuild(views, TIMELINE, ingestedLsn, offloaded, nowMs);
}

test('nothing is rebuilt while a quorum may have the log: absence is not silence', () => {
  const three = present(4_000, 2);
  for (const views of [
    [three, three, three],
    [three, three, ABSENT],
    [SILENT, SILENT, SILENT],
    [three, SILENT, SILENT],
  ]) {
    assert.deepEqual(plan(views, 4_000, OFFLOADED), { kind: 'none' });
  }
  assert.deepEqual(plan([three, SILENT, ABSENT], 4_000, OFFLOADED), { kind: 'wait', silent: [1] });
  assert.deepEqual(plan([ABSENT, SILENT, ABSENT], 4_000, OFFLOADED), { kind: 'wait', silent: [1] });
});

test('a log that is lost twice before anything of the first time is offloaded gets another term than then', () => {
  const [first, second] = [10_000_000, 10_000_001].map((nowMs) =>
    plan([ABSENT, ABSENT, ABSENT], 4_500, OFFLOADED, nowMs),
  );
  assert(first?.kind === 'rebuild' && second?.kind === 'rebuild');
  assert(second.state.term > first.state.term);
});

test('what is offloaded is where lost logs end again, under a term far above those known', () => {
  const found = plan([ABSENT, ABSENT, present(3_000, 2, { term: 9, generation: 4 })], 4_500, OFFLOADED);
  assert(found.kind === 'rebuild');
  assert.deepEqual([found.targets, found.source, found.keptLsn], [[0, 1], 'object store', 5_000]);
  assert.deepEqual(found.state.history, OFFLOADED.history);
  assert.equal(found.state.commitLsn, 5_000);
  assert(found.state.term > 1_000_000 && found.state.generation === 5);
});

test('a safekeeper whose log is more advanced than what is offloaded gives it to the others, all of it', () => {
  const survivor = present(6_000, 3, { commitLsn: 5_500, localStartLsn: 2_000 });
  const found = plan([ABSENT, survivor, ABSENT], 5_600, OFFLOADED);
  assert(found.kind === 'rebuild');
  assert.deepEqual([found.targets, found.copied, found.keptLsn], [[0, 2], 1, 6_000]);
  assert.deepEqual([found.state.commitLsn, found.logStartLsn], [5_500, 2_000]);
  const longerButOld = plan([ABSENT, present(9_000, 2), ABSENT], 5_000, OFFLOADED);
  assert(longerButOld.kind === 'rebuild' && longerButOld.source === 'object store', 'by term first, then by length');
  const withoutStore = plan([ABSENT, present(1_500, 1), ABSENT], 1_200);
  assert(withoutStore.kind === 'rebuild' && withoutStore.copied === 1);
});

test('of what is offloaded with a history that was pruned up to its end, it is known that it is committed, and no more', () => {
  const pruned: OffloadedEnd = { ...OFFLOADED, history: history() };
  const found = plan([ABSENT, present(9_000, 2, { commitLsn: 4_000 }), ABSENT], 4_500, pruned);
  assert(found.kind === 'rebuild');
  assert.deepEqual([found.source, found.keptLsn], ['object store', 5_000]);
  assert.deepEqual(found.state.history, [...pruned.history, { term: found.state.term, startLsn: 5_000 }]);
  const ahead = plan([ABSENT, present(9_000, 2, { commitLsn: 5_000 }), ABSENT], 4_500, pruned);
  assert(ahead.kind === 'rebuild' && ahead.source === 'another safekeeper' && ahead.keptLsn === 9_000);
});

test('a pageserver that is ahead of all logs is the truth, and all of them begin anew where it is', () => {
  const found = plan([ABSENT, present(5_500, 3), ABSENT], 7_000, OFFLOADED);
  assert(found.kind === 'rebuild');
  const { state } = found;
  assert.deepEqual([found.targets, found.source, found.logStartLsn], [[1, 0, 2], 'pageserver', 7_000]);
  assert.deepEqual(state.history, [...OFFLOADED.history, { term: state.term, startLsn: 7_000 }]);
  const alone = plan([ABSENT, ABSENT, ABSENT], 7_000);
  assert(alone.kind === 'rebuild' && alone.state.commitLsn === 7_000);
  assert.deepEqual(alone.state.history[0], { term: 0, startLsn: START });
});

const DAMAGE = { origin: 'safekeeper 2', lsn: 5_800, reason: 'a CRC' } as const;

test('a survivor that is damaged gets the log too, and first: it and the others then have what is sound', () => {
  const views = [ABSENT, present(6_000, 3, { commitLsn: 5_500 }), ABSENT];
  const check = {
    startLsn: 5_200,
    soundLsn: 6_000,
    damage: [{ ...DAMAGE, remedy: 'copied' as const }],
    lastCommitMs: 1,
  };
  const healed = planRebuild(views, TIMELINE, 5_600, OFFLOADED, 0, check);
  assert(healed.kind === 'rebuild');
  assert.deepEqual([healed.targets, healed.copied, healed.keptLsn, healed.lostLsn], [[1, 0, 2], 1, 6_000, undefined]);
  assert.deepEqual([healed.state.commitLsn, healed.logStartLsn], [5_600, 5_200], 'what is ingested is committed');
  assert.deepEqual(healed.state.history, history([3, START]));
});

test('a log that ends before its damage has a new term there, and all survivors are given it, before the lost ones', () => {
  const views = [ABSENT, present(6_000, 3), ABSENT, present(5_900, 3), ABSENT];
  const check = { startLsn: 2_000, soundLsn: 5_800, damage: [{ ...DAMAGE, remedy: 'none' as const }], lastCommitMs: 1 };
  const cut = planRebuild(views, TIMELINE, 5_600, OFFLOADED, 0, check);
  assert(cut.kind === 'rebuild');
  assert.deepEqual([cut.targets, cut.keptLsn, cut.lostLsn], [[1, 3, 0, 2, 4], 5_800, 6_000]);
  assert.deepEqual(cut.state.history, history([3, START], [cut.state.term, 5_800]));
  assert.equal(cut.state.commitLsn, 5_800);
  const behind = planRebuild(views, TIMELINE, 5_800, OFFLOADED, 0, check);
  assert(behind.kind === 'rebuild' && behind.source === 'pageserver' && behind.lostLsn === 6_000);
  assert.deepEqual(behind.targets, [1, 3, 0, 2, 4]);
});

test('what a survivor says that it had acknowledged, and nobody has, is lost', () => {
  const votesFrom = { lastLogTerm: 3, flushLsn: 6_500 };
  const found = plan([ABSENT, present(6_000, 3, { isVoter: false, votesFrom }), ABSENT], 4_000, OFFLOADED);
  assert(found.kind === 'rebuild' && found.lostLsn === 6_500);
  const kept = plan([ABSENT, present(6_000, 3, { isVoter: false, votesFrom }), ABSENT], 6_600, OFFLOADED);
  assert(kept.kind === 'rebuild' && kept.lostLsn === undefined);
});
