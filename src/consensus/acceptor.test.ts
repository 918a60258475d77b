import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Acceptor, type AcceptorAction, type AcceptorState, blankState, type BoundaryTracker } from './acceptor.ts';
import { NO_CONFIGURATION } from './configuration.ts';
import type { AcceptorMessage, Elected, Renew, TermHistory, VoteRequest } from './messages.ts';

/** A log whose records are 10 bytes long. */
class Tens implements BoundaryTracker {
  boundaryLsn: number;
  #lsn: number;

  constructor(startLsn: number) {
    this.boundaryLsn = startLsn;
    this.#lsn = startLsn;
  }

  push(_lsn: number, bytes: Buffer): void {
    if (bytes.includes(0xff)) throw new Error('no record');
    this.#lsn += bytes.length;
    this.boundaryLsn = Math.floor(this.#lsn / 10) * 10;
  }
}

const START: TermHistory = [{ term: 0, startLsn: 100 }];

function acceptorAt(flushLsn: number, state: Partial<AcceptorState> = {}): Acceptor<string> {
  return new Acceptor({
    nodeId: 1,
    state: { ...blankState(100), ...state },
    flushLsn,
    trackBoundaries: (startLsn) => new Tens(startLsn),
  });
}

function append(
  term: number,
  beginLsn: number,
  length: number,
  commitLsn = 0,
): Parameters<Acceptor<string>['receive']>[1] {
  return { kind: 'append', term, beginLsn, commitLsn, bytes: Buffer.alloc(length, 1) };
}

function vote(term: number, generation = 0, configuration = NO_CONFIGURATION): VoteRequest {
  return { kind: 'vote', term, generation, configuration };
}

function renew(term: number, generation: number, configuration = NO_CONFIGURATION): Renew {
  return { kind: 'renew', term, generation, configuration };
}

function elected(term: number, startLsn: number, history: TermHistory): Elected {
  return { kind: 'elected', term, startLsn, history };
}

function kinds(actions: readonly AcceptorAction<string>[]): string[] {
  return actions.map((action) => (action.kind === 'send' ? action.message.kind : action.kind));
}

function sent(actions: readonly AcceptorAction<string>[]): AcceptorMessage[] {
  return actions.flatMap((action) => (action.kind === 'send' ? [action.message] : []));
}

/** An acceptor that follows the leader of term 1 from its start. */
function follower(): Acceptor<string> {
  const acceptor = acceptorAt(100);
  acceptor.receive('a', vote(1, 0));
  acceptor.completed();
  acceptor.receive('a', elected(1, 100, [...START, { term: 1, startLsn: 100 }]));
  acceptor.completed();
  return acceptor;
}

test('a vote is replied to once its term is durable, and is granted once in a term', () => {
  const acceptor = acceptorAt(100);
  const asked = acceptor.receive('a', vote(5, 0));
  assert.deepEqual(asked, [{ kind: 'persist', state: { ...blankState(100), term: 5 } }]);
  assert.deepEqual(acceptor.receive('b', vote(5, 0)), []);
  const replies = sent(acceptor.completed());
  assert.deepEqual(
    replies.map((reply) => reply.kind === 'vote-reply' && [reply.term, reply.granted]),
    [
      [5, true],
      [5, false],
    ],
  );
});

test('a vote waits until all that was received is durable', () => {
  const acceptor = follower();
  acceptor.receive('a', append(1, 100, 10));
  acceptor.receive('a', append(1, 110, 10));
  assert.deepEqual(acceptor.receive('b', vote(2, 0)), []);
  assert.deepEqual(kinds(acceptor.completed()), ['progress', 'append-reply', 'write']);
  assert.deepEqual(kinds(acceptor.completed()), ['progress', 'append-reply', 'persist']);
  const [reply] = sent(acceptor.completed());
  assert(reply?.kind === 'vote-reply' && reply.granted && reply.flushLsn === 120);
});

test('appends that come during a write make up the next one, with one acknowledgement', () => {
  const acceptor = follower();
  assert.deepEqual(kinds(acceptor.receive('a', append(1, 100, 10))), ['write']);
  for (const lsn of [110, 120, 130]) assert.deepEqual(acceptor.receive('a', append(1, lsn, 10)), []);
  const [, , write] = acceptor.completed();
  assert(write?.kind === 'write' && write.beginLsn === 110 && write.chunks.length === 3);
  assert.deepEqual(sent(acceptor.completed()), [
    {
      kind: 'append-reply',
      term: 1,
      flushLsn: 140,
      writeLsn: 140,
      commitLsn: 100,
      generation: 0,
      configurationVersion: 0,
    },
  ]);
});

test('appends behind something else that waits for the disk are counted, and make up one write after it', () => {
  const acceptor = follower();
  assert.deepEqual(kinds(acceptor.receive('a', append(1, 100, 10))), ['write']);
  assert.deepEqual(acceptor.receive('a', renew(1, 1)), []);
  for (const lsn of [110, 120, 130]) assert.deepEqual(acceptor.receive('a', append(1, lsn, 10)), []);
  assert.deepEqual(acceptor.receive('b', append(1, 140, 10)), []);
  assert.equal(acceptor.unwrittenBytes, 40);
  acceptor.forget('b');
  assert.equal(acceptor.unwrittenBytes, 30);
  assert.deepEqual(acceptor.receive('a', vote(2, 1)), []);
  assert.deepEqual(kinds(acceptor.completed()), ['progress', 'append-reply', 'persist']);
  const [reply, write, ...others] = acceptor.completed();
  assert(reply?.kind === 'send' && write?.kind === 'write' && others.length === 0);
  assert.deepEqual([write.beginLsn, write.chunks.length, acceptor.unwrittenBytes], [110, 3, 0]);
  assert.deepEqual(kinds(acceptor.completed()), ['progress', 'append-reply', 'persist']);
});

test('the commit LSN is saved between two writes: while much WAL comes the disk is never idle', () => {
  const acceptor = follower();
  acceptor.receive('a', append(1, 100, 10, 110));
  assert.deepEqual(acceptor.save(), []);
  assert.deepEqual(acceptor.receive('a', append(1, 110, 10)), []);
  const actions = acceptor.completed();
  assert.deepEqual(kinds(actions), ['progress', 'append-reply', 'persist']);
  assert(actions[2]?.kind === 'persist' && actions[2].state.commitLsn === 110);
  assert.deepEqual(kinds(acceptor.completed()), ['write']);
  assert.deepEqual(kinds(acceptor.completed()), ['progress', 'append-reply']);
  assert.deepEqual(acceptor.save(), [], 'it has not moved');
});

test('the flush LSN is the end of a whole record', () => {
  const acceptor = follower();
  acceptor.receive('a', append(1, 100, 17));
  assert.deepEqual(sent(acceptor.completed()), [
    {
      kind: 'append-reply',
      term: 1,
      flushLsn: 110,
      writeLsn: 117,
      commitLsn: 100,
      generation: 0,
      configurationVersion: 0,
    },
  ]);
  acceptor.receive('a', append(1, 117, 3));
  acceptor.completed();
  assert.equal(acceptor.flushLsn, 120);
});

test('the commit LSN follows the leader up to what is durable here', () => {
  const acceptor = follower();
  acceptor.receive('a', append(1, 100, 10, 120));
  assert.equal(acceptor.commitLsn, 100);
  acceptor.completed();
  assert.equal(acceptor.commitLsn, 110);
  acceptor.receive('a', append(1, 110, 10, 90));
  acceptor.completed();
  assert.equal(acceptor.commitLsn, 120);
  assert.deepEqual(kinds(acceptor.save()), ['persist']);
  acceptor.completed();
  assert.deepEqual(acceptor.save(), [], 'nothing new to write down');
});

test('appends are taken from the leader of the log only, and only at the write position', () => {
  const acceptor = follower();
  for (const message of [append(1, 110, 10), append(1, 90, 10), append(0, 100, 10), append(2, 100, 10)]) {
    assert.deepEqual(kinds(acceptor.receive('x', message)), ['refusal']);
  }
  acceptor.receive('b', vote(2, 0));
  acceptor.completed();
  assert.deepEqual(kinds(acceptor.receive('a', append(1, 100, 10))), ['refusal'], 'the old leader is over');
  assert.deepEqual(kinds(acceptor.receive('b', append(2, 100, 10))), ['refusal'], 'the new one is not elected yet');
});

test('bytes that are no log are refused, and what came before them is not harmed', () => {
  const acceptor = follower();
  acceptor.receive('a', append(1, 100, 10));
  acceptor.receive('a', append(1, 110, 10));
  const garbage = { kind: 'append', term: 1, beginLsn: 120, commitLsn: 0, bytes: Buffer.alloc(30, 0xff) } as const;
  assert.deepEqual(kinds(acceptor.receive('a', garbage)), ['refusal']);
  acceptor.completed();
  acceptor.completed();
  assert.equal(acceptor.flushLsn, 120);
  assert.deepEqual(kinds(acceptor.receive('a', append(1, 120, 10))), ['refusal'], 'the leader introduces itself anew');
  assert.deepEqual(kinds(acceptor.receive('a', elected(1, 120, acceptor.history))), ['append-reply']);
});

test('a divergent tail is cut before the history that leaves it out is persisted', () => {
  const history = [...START, { term: 1, startLsn: 100 }];
  const acceptor = acceptorAt(200, { term: 3, history, commitLsn: 120 });
  const newer = [...history, { term: 2, startLsn: 150 }, { term: 3, startLsn: 160 }];
  const cut = acceptor.receive('a', elected(3, 150, newer));
  assert.deepEqual(cut, [{ kind: 'truncate', lsn: 150 }]);
  assert.deepEqual(kinds(acceptor.completed()), ['progress', 'persist']);
  assert.deepEqual(sent(acceptor.completed()), [
    {
      kind: 'append-reply',
      term: 3,
      flushLsn: 150,
      writeLsn: 150,
      commitLsn: 120,
      generation: 0,
      configurationVersion: 0,
    },
  ]);
  assert.equal(acceptor.lastLogTerm, 2, 'the log ends where term 2 begins');
  assert.equal(acceptor.leaderTerm, undefined, 'up to here it is the log of an older leader');
  acceptor.receive('a', append(3, 150, 10));
  acceptor.completed();
  assert.equal(acceptor.leaderTerm, 3);
});

test('a leader that is wrong about the common point, or would cut committed WAL, is refused', () => {
  const history = [...START, { term: 1, startLsn: 100 }];
  const acceptor = acceptorAt(200, { term: 3, history, commitLsn: 160 });
  assert.deepEqual(kinds(acceptor.receive('a', elected(3, 200, [...history, { term: 3, startLsn: 180 }]))), [
    'refusal',
  ]);
  assert.deepEqual(kinds(acceptor.receive('a', elected(3, 150, [...history, { term: 3, startLsn: 150 }]))), [
    'refusal',
  ]);
  assert.deepEqual(kinds(acceptor.receive('a', elected(2, 200, [...history, { term: 2, startLsn: 200 }]))), [
    'refusal',
  ]);
  assert.equal(acceptor.flushLsn, 200);
});

test('an election under a term it has not heard of makes the term durable first', () => {
  const acceptor = acceptorAt(100);
  const [persist] = acceptor.receive('a', elected(7, 100, [...START, { term: 7, startLsn: 100 }]));
  assert.deepEqual(persist, { kind: 'persist', state: { ...blankState(100), term: 7 } });
  assert.deepEqual(kinds(acceptor.completed()), ['term-raised', 'persist']);
  assert.deepEqual(kinds(acceptor.completed()), ['append-reply']);
});

test('who knows of a newer generation gives no vote to a candidate that does not', () => {
  const acceptor = follower();
  assert.deepEqual(kinds(acceptor.receive('a', renew(1, 3))), ['persist']);
  assert.deepEqual(kinds(acceptor.completed()), ['append-reply']);
  const [refused] = sent(acceptor.receive('b', vote(7, 2)));
  assert(refused?.kind === 'vote-reply' && !refused.granted && refused.generation === 3 && refused.term === 1);
  acceptor.receive('b', vote(7, 3));
  const [granted] = sent(acceptor.completed());
  assert(granted?.kind === 'vote-reply' && granted.granted);
  const [late] = sent(acceptor.receive('a', renew(1, 4)));
  assert(late?.kind === 'refusal', 'only the leader whose log it is renews');
});

test('a log given anew votes only when it has come to where the lost one may have been', () => {
  const acceptor = acceptorAt(100, { term: 4, generation: 1, votesFrom: { lastLogTerm: 4, flushLsn: 120 } });
  assert(!acceptor.isVoter && !acceptor.isBlank);
  acceptor.receive('a', vote(5, 1));
  const [reply] = sent(acceptor.completed());
  assert(reply?.kind === 'vote-reply' && !reply.granted && !reply.isVoter && reply.term === 5);
  acceptor.receive('a', elected(5, 100, [...START, { term: 4, startLsn: 100 }, { term: 5, startLsn: 130 }]));
  acceptor.completed();
  acceptor.receive('a', append(5, 100, 20));
  acceptor.completed();
  assert(acceptor.isVoter, 'the same term and as long');
});

test('a newer configuration is taken over and durable before the vote is given; under an older one there is none', () => {
  const acceptor = acceptorAt(100);
  const configuration = { version: 3, members: [1, 2, 3] };
  const [persist] = acceptor.receive('a', vote(1, 0, configuration));
  assert(persist?.kind === 'persist' && persist.state.configuration === configuration);
  const [granted] = sent(acceptor.completed());
  assert(granted?.kind === 'vote-reply' && granted.granted);
  const [refused] = sent(acceptor.receive('b', vote(2, 0, { version: 2, members: [1] })));
  assert(refused?.kind === 'vote-reply' && !refused.granted && refused.configuration === configuration);
  assert.equal(acceptor.term, 1);
});

test('who is no member gives no vote and follows nobody', () => {
  const acceptor = acceptorAt(100);
  acceptor.receive('a', vote(1, 0, { version: 2, members: [2, 3, 4] }));
  const [reply] = sent(acceptor.completed());
  assert(reply?.kind === 'vote-reply' && !reply.granted && !reply.isVoter);
  const [refusal] = sent(acceptor.receive('a', elected(1, 100, [...START, { term: 1, startLsn: 100 }])));
  assert(refusal?.kind === 'refusal', 'removed is removed');
});

test('a leader tells those that follow it of a newer configuration, and it is confirmed once it is durable', () => {
  const acceptor = follower();
  const configuration = { version: 1, members: [1], newMembers: [1, 2, 3] };
  assert.deepEqual(kinds(acceptor.receive('a', renew(1, 0, configuration))), ['persist']);
  const [reply] = sent(acceptor.completed());
  assert(reply?.kind === 'append-reply' && reply.configurationVersion === 1);
});
