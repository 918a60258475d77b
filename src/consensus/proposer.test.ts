import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { Configuration } from './configuration.ts';
import type { AcceptorMessage, TermHistory } from './messages.ts';
import { type AcceptorGreeting, type ProposerAction, ProposerState } from './proposer.ts';
import {
  acknowledgedBound,
  compareLogs,
  contradiction,
  hasReached,
  highestCommonPoint,
  historyUpTo,
  type KnownLog,
  lastLogTerm,
  prunedHistory,
} from './term-history.ts';

const START: TermHistory = [{ term: 0, startLsn: 100 }];

const THREE: Configuration = { version: 0, members: [1, 2, 3] };
const ORIGIN = { startLsn: 100, mayCreate: false };

function at(term: number, generation = 0): AcceptorGreeting {
  return { term, generation, configuration: THREE, isBlank: false };
}

function vote(term: number, flushLsn: number, history = START, granted = true): AcceptorMessage {
  const position = { flushLsn, commitLsn: 100, history };
  return { kind: 'vote-reply', term, granted, isVoter: true, generation: 0, configuration: THREE, ...position };
}

function ack(term: number, flushLsn: number): AcceptorMessage {
  const position = { flushLsn, writeLsn: flushLsn, commitLsn: 100 };
  return { kind: 'append-reply', term, ...position, generation: 0, configurationVersion: 0 };
}

function kinds(actions: readonly ProposerAction[]): string[] {
  return actions.map((action) => (action.kind === 'send' ? `${action.message.kind} to ${action.peer}` : action.kind));
}

test('the term is above all that a quorum knows, and the log is that of the most advanced voter', () => {
  const proposer = new ProposerState(THREE, ORIGIN);
  assert.deepEqual(proposer.greeted(0, at(4)), []);
  assert.deepEqual(kinds(proposer.greeted(2, at(7))), ['vote to 0', 'vote to 2']);
  assert.equal(proposer.term, 8);
  // The longer log is of an older term.
  assert.deepEqual(proposer.receive(0, vote(8, 900, [...START, { term: 3, startLsn: 100 }])), []);
  const history = [...START, { term: 3, startLsn: 100 }, { term: 6, startLsn: 300 }];
  const won = proposer.receive(2, vote(8, 400, history));
  assert.deepEqual(kinds(won), ['leading', 'elected to 0', 'elected to 2']);
  assert.deepEqual([proposer.startLsn, proposer.donor], [400, 2]);
  assert.deepEqual(proposer.history, [...history, { term: 8, startLsn: 400 }]);
  assert.deepEqual([proposer.peer(0).sendLsn, proposer.peer(2).sendLsn], [300, 400]);
});

function leader(): ProposerState {
  const proposer = new ProposerState(THREE, ORIGIN);
  proposer.greeted(0, at(0));
  proposer.greeted(1, at(0));
  proposer.receive(0, vote(1, 200));
  proposer.receive(1, vote(1, 150));
  return proposer;
}

test('nothing is committed before a quorum has the log up to the start of the term', () => {
  const proposer = leader();
  assert.equal(proposer.startLsn, 200);
  assert.deepEqual(kinds(proposer.receive(0, ack(1, 200))), ['stream']);
  assert.deepEqual(kinds(proposer.receive(1, ack(1, 150))), ['stream']);
  assert.deepEqual(proposer.receive(1, ack(1, 190)), []);
  assert.equal(proposer.phase, 'leading');
  assert.deepEqual(proposer.receive(1, ack(1, 200)), [{ kind: 'committed', lsn: 200 }]);
  assert.equal(proposer.phase, 'established');
  assert.deepEqual(proposer.receive(0, ack(1, 300)), []);
  assert.deepEqual(proposer.receive(1, ack(1, 250)), [{ kind: 'committed', lsn: 250 }]);
});

test('a leader is fenced by a higher term; a candidate tries again under one still higher', () => {
  const candidate = new ProposerState(THREE, ORIGIN);
  candidate.greeted(0, at(0));
  candidate.greeted(1, at(0));
  assert.deepEqual(kinds(candidate.receive(0, vote(5, 100, START, false))), ['retry']);
  assert.deepEqual(candidate.receive(1, vote(1, 100)), []);
  assert.deepEqual(kinds(candidate.elect()), ['vote to 0', 'vote to 1']);
  assert.equal(candidate.term, 6);

  const proposer = leader();
  proposer.receive(0, ack(1, 200));
  proposer.receive(1, ack(1, 200));
  assert.deepEqual(proposer.receive(1, { kind: 'term-notice', term: 2 }), [{ kind: 'fenced', term: 2 }]);
  assert.deepEqual(proposer.receive(0, ack(1, 900)), []);
  assert.equal(proposer.commitLsn, 200);
});

test('a vote that may have gone to another proposer is not counted', () => {
  const proposer = new ProposerState(THREE, ORIGIN);
  proposer.greeted(0, at(0));
  proposer.greeted(1, at(0));
  proposer.receive(0, vote(1, 100));
  assert.deepEqual(kinds(proposer.receive(1, vote(1, 100, START, false))), ['retry']);
  assert.equal(proposer.phase, 'electing');
});

test('when the only voter with the newest log is gone before a quorum has it, there is a new election', () => {
  const proposer = leader();
  proposer.receive(1, ack(1, 150));
  assert.deepEqual(kinds(proposer.lost(0)), ['retry']);
  proposer.greeted(2, at(0));
  assert.deepEqual(kinds(proposer.elect()), ['vote to 1', 'vote to 2']);
  assert.equal(proposer.term, 2);
});

test('a peer that comes back is brought on from where the logs part', () => {
  const proposer = leader();
  proposer.receive(0, ack(1, 200));
  proposer.receive(1, ack(1, 200));
  assert.deepEqual(kinds(proposer.greeted(2, at(1))), ['vote to 2']);
  const joined = proposer.receive(2, vote(1, 120, START, false));
  assert.deepEqual(kinds(joined), ['elected to 2']);
  assert.equal(proposer.peer(2).sendLsn, 120);
  proposer.receive(2, ack(1, 120));
  assert.equal(proposer.recoverySource(2), 0);
  assert.equal(proposer.recoverySource(2, new Set([0])), 1);
  assert.equal(proposer.recoverySource(2, new Set([0, 1])), undefined);
});

test('logs are compared by their histories', () => {
  const history = [...START, { term: 2, startLsn: 150 }, { term: 5, startLsn: 300 }];
  assert.deepEqual(historyUpTo(history, 299), history.slice(0, 2));
  assert.equal(lastLogTerm(history, 300), 5);
  assert(compareLogs({ lastLogTerm: 5, flushLsn: 1 }, { lastLogTerm: 4, flushLsn: 9 }) > 0);
  // The same history: the shorter log is the beginning of the other.
  assert.equal(highestCommonPoint(history, log(history, 400)), 400);
  // The acceptor lags: entries past its end mean nothing.
  assert.equal(highestCommonPoint(history, log(history, 200)), 200);
  // It wrote more in term 2 than the leader of term 5 had.
  assert.equal(highestCommonPoint(history, log(history.slice(0, 2), 500)), 300);
  // It followed another leader after term 0.
  assert.equal(highestCommonPoint(history, log([...START, { term: 3, startLsn: 100 }], 500)), 100);
});

test('a pruned history tells the same of every log that has what was committed, and cuts others to what they know to be committed', () => {
  const terms = [100, 100, 150, 200, 200, 300, 350].map((startLsn, term) => ({ term, startLsn }));
  // Committed up to 300: term 4 wrote what is before, and nothing of term 5 is.
  const pruned = prunedHistory(terms, 300);
  assert.deepEqual(pruned, [terms[0], terms[4], terms[5], terms[6]]);
  assert.deepEqual(prunedHistory(pruned, 300), pruned);
  assert.deepEqual(prunedHistory(terms, 100), terms);
  for (const leader of [terms, pruned]) {
    for (const history of [terms, pruned]) assert.equal(highestCommonPoint(leader, log(history, 330, 250)), 330);
    // It wrote more in term 4 than the leader of term 5 had.
    assert.equal(highestCommonPoint(leader, log([terms[0]!, terms[4]!], 340, 200)), 300);
    assert.equal(contradiction(leader, pruned), undefined);
    assert.match(contradiction(leader, [terms[0]!, { term: 5, startLsn: 310 }])!, /term 5 starts/);
  }
  // An older log that has nothing of term 4: it ends before, or goes on in its own way.
  assert.equal(highestCommonPoint(terms, log(terms.slice(0, 3), 180, 160)), 180);
  assert.equal(highestCommonPoint(pruned, log(terms.slice(0, 3), 180, 160)), 160);
  assert.equal(highestCommonPoint(pruned, log(terms.slice(0, 3), 400, 160)), 160);
  // It was brought on from a pruned log, not far enough yet; then by a leader that knows more.
  assert.equal(highestCommonPoint(pruned, log(pruned, 180, 160)), 180);
  assert.equal(highestCommonPoint(terms, log(pruned, 180, 160)), 180);
  assert.equal(highestCommonPoint(terms.slice(0, 2).concat({ term: 9, startLsn: 170 }), log(pruned, 180, 160)), 170);
});

test('a log that ends where its history is pruned has got as far as all that is committed before', () => {
  const pruned = [...START, { term: 4, startLsn: 200 }, { term: 5, startLsn: 300 }];
  assert(hasReached(pruned, 150, { lastLogTerm: 2, flushLsn: 150 }));
  assert(!hasReached(pruned, 150, { lastLogTerm: 2, flushLsn: 151 }));
  assert(hasReached(pruned, 100, { lastLogTerm: 2, flushLsn: 100 }));
  assert(hasReached(START, 150, { lastLogTerm: 2, flushLsn: 150 }));
  assert(hasReached(pruned, 320, { lastLogTerm: 5, flushLsn: 320 }));
  assert(!hasReached(pruned, 310, { lastLogTerm: 5, flushLsn: 320 }));
  // Nobody has led it yet, or it has nothing of a later term.
  assert(!hasReached(START, 100, { lastLogTerm: 1, flushLsn: 100 }));
  assert(!hasReached([...START, { term: 1, startLsn: 100 }], 120, { lastLogTerm: 2, flushLsn: 110 }));
});

function log(history: TermHistory, flushLsn: number, commitLsn = 100): KnownLog {
  return { history, flushLsn, commitLsn };
}

test('a lost log is given anew when a majority without it knows the new generation', () => {
  const proposer = leader();
  proposer.receive(0, ack(1, 200));
  proposer.receive(1, ack(1, 200));
  assert.equal(proposer.phase, 'established');
  assert.deepEqual(kinds(proposer.absent(2, 'aa')), ['renew to 0', 'renew to 1']);
  assert.deepEqual(proposer.receive(0, { ...ack(1, 200), generation: 1 } as AcceptorMessage), []);
  const actions = proposer.receive(1, { ...ack(1, 200), generation: 1 } as AcceptorMessage);
  const votesFrom = { lastLogTerm: 1, flushLsn: 200 };
  const state = { term: 1, history: START, commitLsn: 100, generation: 1, configuration: THREE, votesFrom };
  assert.deepEqual(actions, [{ kind: 'create', peer: 2, incarnation: 'aa', state }]);
});

test('a log is made where it is missing only when it is known to be unused and nobody of a quorum has used it', () => {
  const origin = { startLsn: 100, mayCreate: true };
  const fresh = new ProposerState(THREE, origin);
  assert.deepEqual(fresh.absent(0, 'aa'), []);
  assert.deepEqual(kinds(fresh.absent(1, 'bb')), ['create', 'create']);
  const used = new ProposerState(THREE, origin);
  used.absent(0, 'aa');
  assert.deepEqual(used.greeted(1, at(3)), []);
  assert.deepEqual(used.absent(2, 'cc'), []);
});

const FROM_1: Configuration = { version: 1, members: [1, 2, 3] };
const TO_4: Configuration = { version: 2, members: [1, 2, 3], newMembers: [1, 2, 4] };
const AT_4: Configuration = { version: 3, members: [1, 2, 4] };

function ackOf(version: number, flushLsn: number): AcceptorMessage {
  return { ...ack(1, flushLsn), configurationVersion: version } as AcceptorMessage;
}

/** Established under configuration 1, followed by nodes 1 and 2. */
function leaderOf1(): ProposerState {
  const proposer = new ProposerState(FROM_1, ORIGIN);
  for (const peer of [0, 1]) proposer.greeted(peer, { ...at(0), configuration: FROM_1 });
  for (const peer of [0, 1]) proposer.receive(peer, { ...vote(1, 200), configuration: FROM_1 } as AcceptorMessage);
  proposer.receive(0, ackOf(1, 200));
  assert.deepEqual(kinds(proposer.receive(1, ackOf(1, 200))), ['stream', 'committed', 'settled']);
  return proposer;
}

test('a leader takes a joint configuration over, and commits by a majority of both sets', () => {
  const proposer = leaderOf1();
  assert.deepEqual(kinds(proposer.configure(TO_4)), ['added', 'renew to 0', 'renew to 1']);
  assert.deepEqual(proposer.configure(FROM_1), [], 'an older one is nothing');
  proposer.receive(2, ackOf(1, 300));
  proposer.receive(0, ackOf(1, 300));
  assert.equal(proposer.commitLsn, 200, 'node 3 is lost');
  proposer.greeted(3, { ...at(0), configuration: FROM_1 });
  proposer.receive(3, { ...vote(1, 200, START, false), configuration: FROM_1 } as AcceptorMessage);
  assert.deepEqual(kinds(proposer.receive(3, ackOf(1, 300))), ['stream', 'renew to 3']);
  assert.equal(proposer.commitLsn, 200, 'of nodes 1, 2 and 3 only 1 has it');
  assert.deepEqual(proposer.receive(1, ackOf(2, 300)), []);
  assert.deepEqual([proposer.commitLsn, proposer.settledVersion], [200, 1], 'node 1 has not confirmed it');
  assert.deepEqual(kinds(proposer.receive(0, ackOf(2, 300))), ['committed', 'settled']);
  assert.deepEqual(kinds(proposer.configure(AT_4)), ['removed', 'renew to 0', 'renew to 1', 'renew to 3']);
  assert.deepEqual(proposer.receive(2, { kind: 'term-notice', term: 9 }), [], 'who is gone is not listened to');
  assert.equal(proposer.phase, 'established');
});

test('a candidate that hears of a newer configuration begins anew under it, and needs votes of both sets', () => {
  const proposer = new ProposerState(FROM_1, ORIGIN);
  proposer.greeted(0, { ...at(0), configuration: FROM_1 });
  proposer.greeted(1, { ...at(0), configuration: FROM_1 });
  proposer.receive(0, { ...vote(1, 200), configuration: FROM_1 } as AcceptorMessage);
  const heard = proposer.receive(1, { ...vote(1, 200, START, false), configuration: TO_4 } as AcceptorMessage);
  assert.deepEqual(kinds(heard), ['added', 'retry']);
  assert.deepEqual(kinds(proposer.elect()), ['vote to 0', 'vote to 1']);
  assert.equal(proposer.term, 2);
  proposer.receive(0, { ...vote(2, 200), configuration: TO_4 } as AcceptorMessage);
  assert.deepEqual(kinds(proposer.receive(1, { ...vote(2, 200), configuration: TO_4 } as AcceptorMessage)), [
    'leading',
    'elected to 0',
    'elected to 1',
  ]);
});

test('what was acknowledged is bounded by reading positions, the closer the more answer', () => {
  const at3 = [300, 200, 100].map((flushLsn) => ({ flushLsn }));
  assert.equal(acknowledgedBound(at3, 3), 200, 'what is past 200 is on one of three');
  assert.equal(acknowledgedBound(at3.slice(0, 2), 3), 300, 'the third may have 300 too');
  assert.equal(acknowledgedBound(at3.slice(0, 1), 3), undefined);
  assert.equal(acknowledgedBound(at3.slice(2), 1), 100);
});
