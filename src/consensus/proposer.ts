/**
 * The proposer: the leader of one timeline's log, or who wants to become it. A state machine without clock, socket or memory for WAL: it takes what
 * acceptors say and returns actions; the shell (compute/proposer.ts, or the simulation) carries them out and sends the WAL itself.
 *
 *   electing     collect the terms of a quorum, ask all for their vote under a higher one, wait for a quorum of votes
 *   leading      term, history and start LSN are fixed: the start is where the most advanced voter's log ends. Each acceptor is told where the
 *                logs part and brought on from there. Nothing is committed until a quorum has the log up to the term's start.
 *   established  a quorum has it: the start LSN is committed, and Postgres may start there
 *   fenced       a higher term was seen after that: for good
 *
 * Acceptors that come back empty. What such an acceptor said before is void: its votes, which a slow candidate may still hold, and its
 * acknowledgements. Only an established leader lets it in again:
 *   1. it raises the generation on a majority without it. From then on no candidate that holds one of its old votes gets a quorum.
 *   2. it gives it an empty log that votes once it has come to the leader's commit LSN: all that the old log helped to commit is below.
 * A log that no acceptor of a quorum has written to yet is made on all that are there, if the caller knows that it was never used (mayCreate).
 *
 * Before it is established a proposer may begin a new election (a higher term was seen, or the voter that alone had the newest log is
 * gone); afterwards never, since its Postgres runs on the log of this term.
 *
 * Invariants:
 *   - A term is used for one election only, and is above every term that the quorum knew.
 *   - Acknowledgements below the term's start count for nothing: what an older term left is committed only together with this term's start.
 *   - An acceptor without the log, or with one that cannot vote yet, counts for no election.
 *   - commitLsn never goes back and is acknowledged by a quorum.
 */
import assert from 'node:assert/strict';
import type { Lsn } from '../postgres/lsn.ts';
import { type AcceptorState, blankState } from './acceptor.ts';
import type { AcceptorMessage, AppendReply, Elected, Renew, TermHistory, VoteReply, VoteRequest } from './messages.ts';
import { compareLogs, highestCommonPoint, lastLogTerm } from './term-history.ts';

export type ProposerAction =
  | { readonly kind: 'send'; readonly peer: number; readonly message: VoteRequest | Elected | Renew }
  /** To an acceptor without the log, as the incarnation that said so; it answers with its greeting. */
  | {
      readonly kind: 'create';
      readonly peer: number;
      readonly incarnation: string;
      readonly state: AcceptorState;
    }
  /** WAL from the peer's `sendLsn` on may be sent now. */
  | { readonly kind: 'stream'; readonly peer: number }
  /** Break the connection and make another. */
  | { readonly kind: 'reconnect'; readonly peer: number; readonly reason: string }
  /** A term was won; its WAL begins at the LSN. */
  | { readonly kind: 'leading'; readonly term: number; readonly startLsn: Lsn }
  /** Call `elect` after a short random pause: another proposer may be at it. */
  | { readonly kind: 'retry'; readonly reason: string }
  | { readonly kind: 'committed'; readonly lsn: Lsn }
  | { readonly kind: 'fenced'; readonly term: number };

/** Where the log began, for who may make it. */
export interface LogOrigin {
  readonly startLsn: Lsn;
  /** It is known from elsewhere that nothing was ever committed to it. */
  readonly mayCreate: boolean;
}

/** What an acceptor that has the log answers to a greeting. */
export interface AcceptorGreeting {
  readonly term: number;
  readonly generation: number;
  /** See Acceptor.isBlank. */
  readonly isBlank: boolean;
}

export type ProposerPhase = 'electing' | 'leading' | 'established' | 'fenced';

interface Peer {
  state: 'lost' | 'absent' | 'creating' | 'greeted' | 'voting' | 'voted' | 'joining' | 'streaming';
  /** The highest term it is known to have. */
  term: number;
  /** As far as it has confirmed. */
  generation: number;
  isBlank: boolean;
  /** Of one that does not have the log. */
  incarnation: string;
  /** The generation that a majority without it has to know before it gets one. */
  admittedBy: number;
  /** The candidate term that it voted for. */
  votedTerm: number;
  vote: VoteReply | undefined;
  /** Durable on this acceptor up to the end of a record, as part of this term's log. */
  ackedLsn: Lsn;
  /** Durable on this acceptor, up to wherever it got. */
  writtenLsn: Lsn;
  /** Where the next append begins. */
  sendLsn: Lsn;
  sentCommitLsn: Lsn;
}

export interface PeerView {
  readonly state: Peer['state'];
  readonly ackedLsn: Lsn;
  readonly writtenLsn: Lsn;
  readonly sendLsn: Lsn;
  readonly sentCommitLsn: Lsn;
}

export class ProposerState {
  readonly #peers: Peer[];
  readonly #quorum: number;
  readonly #origin: LogOrigin;
  #phase: ProposerPhase = 'electing';
  #candidateTerm = 0;
  #history: TermHistory = [];
  #startLsn: Lsn = 0;
  #donor = -1;
  #commitLsn: Lsn = 0;
  #retrying = false;
  /** Until an election is won: then the log is in use. */
  #mayCreate: boolean;
  #generation = 0;
  /** What the votes of this election were asked under. */
  #candidateGeneration = 0;

  constructor(peerCount: number, origin: LogOrigin) {
    assert(peerCount > 0, 'a log has at least one acceptor');
    this.#origin = origin;
    this.#mayCreate = origin.mayCreate;
    this.#quorum = Math.floor(peerCount / 2) + 1;
    this.#peers = Array.from({ length: peerCount }, () => ({
      state: 'lost',
      term: 0,
      generation: 0,
      isBlank: false,
      incarnation: '',
      admittedBy: 0,
      votedTerm: 0,
      vote: undefined,
      ackedLsn: 0,
      writtenLsn: 0,
      sendLsn: 0,
      sentCommitLsn: 0,
    }));
  }

  get phase(): ProposerPhase {
    return this.#phase;
  }

  /** An independent machine in the same state, for who looks at more than one future. */
  clone(): ProposerState {
    const copy = new ProposerState(this.#peers.length, this.#origin);
    this.#peers.forEach((peer, index) => {
      copy.#peers[index] = { ...peer };
    });
    copy.#phase = this.#phase;
    copy.#candidateTerm = this.#candidateTerm;
    copy.#history = this.#history;
    copy.#startLsn = this.#startLsn;
    copy.#donor = this.#donor;
    copy.#commitLsn = this.#commitLsn;
    copy.#retrying = this.#retrying;
    copy.#mayCreate = this.#mayCreate;
    copy.#generation = this.#generation;
    copy.#candidateGeneration = this.#candidateGeneration;
    return copy;
  }

  /** Waits for `elect`. */
  get isRetrying(): boolean {
    return this.#retrying;
  }

  /** Of the election under way, or won. */
  get term(): number {
    return this.#candidateTerm;
  }

  get startLsn(): Lsn {
    return this.#startLsn;
  }

  get commitLsn(): Lsn {
    return this.#commitLsn;
  }

  get history(): TermHistory {
    return this.#history;
  }

  /** What a quorum has taken in, records or not; 0 before the election. */
  get quorumWrittenLsn(): Lsn {
    return this.#peers.map((peer) => peer.writtenLsn).sort((a, b) => b - a)[this.#quorum - 1]!;
  }

  /** The voter whose log became this term's past; -1 before the election. */
  get donor(): number {
    return this.#donor;
  }

  peer(index: number): PeerView {
    return this.#peers[index]!;
  }

  get generation(): number {
    return this.#generation;
  }

  /** The election can never be won: so many acceptors do not have the log that the others are no quorum, and it may not be made anew. */
  get isHopeless(): boolean {
    const absent = this.#peers.filter((peer) => peer.state === 'absent');
    return this.#phase === 'electing' && this.#peers.length - absent.length < this.#quorum;
  }

  /** The peer is connected, has the log and has answered the greeting. */
  greeted(index: number, greeting: AcceptorGreeting): ProposerAction[] {
    const { term, generation, isBlank } = greeting;
    const actions: ProposerAction[] = [];
    const peer = this.#peers[index]!;
    peer.state = 'greeted';
    peer.isBlank = isBlank;
    peer.vote = undefined;
    if (this.#noteTerm(peer, term, actions)) return actions;
    this.#noteGeneration(peer, generation, actions);
    if (this.#candidateTerm > 0) this.#askVote(index, actions);
    else this.#elect(actions);
    this.#createFirst(actions);
    return actions;
  }

  /** The peer is connected and does not have the log. */
  absent(index: number, incarnation: string): ProposerAction[] {
    const actions: ProposerAction[] = [];
    const peer = this.#peers[index]!;
    peer.state = 'absent';
    peer.incarnation = incarnation;
    peer.vote = undefined;
    peer.votedTerm = 0;
    peer.ackedLsn = 0;
    peer.writtenLsn = 0;
    peer.generation = 0;
    if (this.#phase === 'established') this.#admit(peer, actions);
    else if (this.#phase === 'leading' && index === this.#donor)
      this.#retry('the voter with the newest log has lost it', actions);
    else this.#createFirst(actions);
    return actions;
  }

  lost(index: number): ProposerAction[] {
    const actions: ProposerAction[] = [];
    this.#peers[index]!.state = 'lost';
    if (this.#phase === 'leading' && index === this.#donor)
      this.#retry(`the voter with the newest log is gone`, actions);
    return actions;
  }

  /** After `retry`: a new election under a higher term, unless the old one has been decided meanwhile. */
  elect(): ProposerAction[] {
    const actions: ProposerAction[] = [];
    if (!this.#retrying) return actions;
    this.#retrying = false;
    if (this.#phase === 'leading' && hasLog(this.#peers[this.#donor]!) && !this.#isOutrun()) return actions;
    if (this.#phase !== 'electing' && this.#phase !== 'leading') return actions;
    this.#phase = 'electing';
    this.#candidateTerm = 0;
    this.#elect(actions);
    return actions;
  }

  receive(index: number, message: AcceptorMessage): ProposerAction[] {
    const actions: ProposerAction[] = [];
    if (this.#phase === 'fenced') return actions;
    const peer = this.#peers[index]!;
    if (this.#noteTerm(peer, message.term, actions)) return actions;
    if (peer.state === 'lost' || peer.state === 'absent' || peer.state === 'creating') return actions;
    if (message.kind === 'vote-reply' || message.kind === 'append-reply') {
      if (this.#noteGeneration(peer, message.generation, actions)) return actions;
    }
    if (message.kind === 'vote-reply') this.#voted(index, peer, message, actions);
    else if (message.kind === 'append-reply') this.#acknowledged(index, peer, message, actions);
    else if (message.kind === 'refusal') actions.push({ kind: 'reconnect', peer: index, reason: message.message });
    return actions;
  }

  /** The WAL before the LSN has been handed to the peer's connection. */
  sent(index: number, endLsn: Lsn): void {
    const peer = this.#peers[index]!;
    peer.sendLsn = endLsn;
    peer.sentCommitLsn = this.#commitLsn;
  }

  /** A peer that has the WAL that this one needs next, as part of this term's log. */
  recoverySource(index: number): number | undefined {
    const { sendLsn } = this.#peers[index]!;
    let best: number | undefined;
    this.#peers.forEach((peer, other) => {
      if (other === index || peer.state !== 'streaming' || peer.ackedLsn <= sendLsn) return;
      if (best === undefined || peer.ackedLsn > this.#peers[best]!.ackedLsn) best = other;
    });
    return best;
  }

  /** Notes the peer's term. True when that ends what was going on. */
  #noteTerm(peer: Peer, term: number, actions: ProposerAction[]): boolean {
    if (term > peer.term) peer.term = term;
    if (this.#candidateTerm === 0 || term <= this.#candidateTerm) return false;
    if (this.#phase === 'established') {
      this.#phase = 'fenced';
      actions.push({ kind: 'fenced', term });
    } else {
      this.#retry(`term ${term} exists`, actions);
    }
    return true;
  }

  /** Notes the generation that the peer knows. True when that ends what was going on. */
  #noteGeneration(peer: Peer, generation: number, actions: ProposerAction[]): boolean {
    if (generation > peer.generation) peer.generation = generation;
    const isNews = generation > this.#generation;
    if (isNews) this.#generation = generation;
    if (this.#phase === 'established') {
      this.#createAgain(actions);
      return false;
    }
    if (!isNews || this.#phase !== 'electing' || this.#candidateTerm === 0) return false;
    this.#retry(`generation ${generation} exists`, actions);
    return true;
  }

  /** Makes the log where it is missing, when nobody of a quorum has written to it and nobody has elsewhere. */
  #createFirst(actions: ProposerAction[]): void {
    if (!this.#mayCreate || this.#phase !== 'electing') return;
    const connected = this.#peers.filter((peer) => peer.state !== 'lost');
    const isFresh = connected.every((peer) => peer.state === 'absent' || peer.state === 'creating' || peer.isBlank);
    if (connected.length < this.#quorum || !isFresh) return;
    this.#peers.forEach((peer, index) => {
      if (peer.state !== 'absent') return;
      peer.state = 'creating';
      const state = blankState(this.#origin.startLsn);
      actions.push({ kind: 'create', peer: index, incarnation: peer.incarnation, state });
    });
  }

  /** The first step of letting a peer in again that has lost its log. */
  #admit(peer: Peer, actions: ProposerAction[]): void {
    this.#generation++;
    peer.admittedBy = this.#generation;
    this.#peers.forEach((other, index) => {
      if (other.state === 'streaming') this.#renew(index, actions);
    });
  }

  #renew(index: number, actions: ProposerAction[]): void {
    const { generation } = this;
    const message: Renew = { kind: 'renew', term: this.#candidateTerm, generation };
    actions.push({ kind: 'send', peer: index, message });
  }

  /** The second step, when a majority without it knows. */
  #createAgain(actions: ProposerAction[]): void {
    this.#peers.forEach((peer, index) => {
      if (peer.state !== 'absent') return;
      const aware = this.#peers.filter((other) => other !== peer && other.generation >= peer.admittedBy);
      if (aware.length < this.#quorum) return;
      peer.state = 'creating';
      const state: AcceptorState = {
        ...blankState(this.#history[0]!.startLsn),
        term: this.#candidateTerm,
        generation: this.#generation,
        votesFrom: { lastLogTerm: this.#candidateTerm, flushLsn: this.#commitLsn },
      };
      actions.push({ kind: 'create', peer: index, incarnation: peer.incarnation, state });
    });
  }

  #retry(reason: string, actions: ProposerAction[]): void {
    if (this.#retrying) return;
    this.#retrying = true;
    actions.push({ kind: 'retry', reason });
  }

  /** Some acceptor has a term that this one can never lead. */
  #isOutrun(): boolean {
    return this.#peers.some((peer) => peer.term > this.#candidateTerm);
  }

  #elect(actions: ProposerAction[]): void {
    const connected = this.#peers.filter(hasLog);
    if (this.#retrying || connected.length < this.#quorum) return;
    this.#candidateTerm = Math.max(...this.#peers.map((peer) => peer.term)) + 1;
    this.#candidateGeneration = this.#generation;
    this.#donor = -1;
    this.#peers.forEach((peer, index) => {
      peer.vote = undefined;
      peer.ackedLsn = 0;
      peer.writtenLsn = 0;
      if (hasLog(peer)) this.#askVote(index, actions);
    });
  }

  #askVote(index: number, actions: ProposerAction[]): void {
    const { term, generation } = this;
    this.#peers[index]!.state = 'voting';
    actions.push({ kind: 'send', peer: index, message: { kind: 'vote', term, generation } });
  }

  #voted(index: number, peer: Peer, reply: VoteReply, actions: ProposerAction[]): void {
    if (peer.state !== 'voting' || reply.term !== this.#candidateTerm) return;
    if (this.#isOutrun()) return; // Winning now would only mean to be fenced later; `elect` asks again.
    if (this.#phase === 'electing' && this.#generation !== this.#candidateGeneration) return; // A vote may be void.
    if (reply.granted) peer.votedTerm = reply.term;
    if (this.#phase === 'electing' && peer.votedTerm !== this.#candidateTerm && reply.isVoter) {
      this.#retry(`a vote for term ${reply.term} went to another proposer, or was lost on the way`, actions);
      return;
    }
    peer.vote = reply;
    peer.state = 'voted';
    peer.isBlank = false;
    if (this.#phase === 'electing') this.#win(actions);
    else this.#join(index, actions);
  }

  #win(actions: ProposerAction[]): void {
    let donor: VoteReply | undefined;
    let count = 0;
    this.#peers.forEach((peer, index) => {
      if (peer.state !== 'voted' || peer.vote === undefined || peer.votedTerm !== this.#candidateTerm) return;
      count++;
      if (donor !== undefined && compareLogs(positionOf(peer.vote), positionOf(donor)) <= 0) return;
      donor = peer.vote;
      this.#donor = index;
    });
    if (donor === undefined || count < this.#quorum) return;
    this.#phase = 'leading';
    this.#mayCreate = false;
    this.#startLsn = donor.flushLsn;
    this.#history = [...donor.history, { term: this.#candidateTerm, startLsn: this.#startLsn }];
    actions.push({ kind: 'leading', term: this.#candidateTerm, startLsn: this.#startLsn });
    this.#peers.forEach((peer, index) => {
      if (peer.state === 'voted') this.#join(index, actions);
    });
  }

  #join(index: number, actions: ProposerAction[]): void {
    const peer = this.#peers[index]!;
    const vote = peer.vote!;
    const startLsn = highestCommonPoint(this.#history, vote.history, vote.flushLsn);
    peer.state = 'joining';
    peer.sendLsn = startLsn;
    peer.sentCommitLsn = 0;
    const message: Elected = { kind: 'elected', term: this.#candidateTerm, startLsn, history: this.#history };
    actions.push({ kind: 'send', peer: index, message });
  }

  #acknowledged(index: number, peer: Peer, reply: AppendReply, actions: ProposerAction[]): void {
    const { term, flushLsn, writeLsn } = reply;
    if (term !== this.#candidateTerm || (peer.state !== 'joining' && peer.state !== 'streaming')) return;
    if (peer.state === 'joining') {
      peer.state = 'streaming';
      actions.push({ kind: 'stream', peer: index });
      if (peer.generation < this.#generation && this.#phase === 'established') this.#renew(index, actions);
    }
    if (writeLsn > peer.writtenLsn) peer.writtenLsn = writeLsn;
    if (flushLsn <= peer.ackedLsn) return;
    peer.ackedLsn = flushLsn;
    this.#advanceCommit(actions);
  }

  #advanceCommit(actions: ProposerAction[]): void {
    const acked = this.#peers
      .map((peer) => (peer.ackedLsn >= this.#startLsn ? peer.ackedLsn : 0))
      .sort((a, b) => b - a);
    const lsn = acked[this.#quorum - 1]!;
    if (lsn < this.#startLsn || lsn === 0) return;
    if (this.#phase === 'leading' && this.#isOutrun()) return;
    const isFirst = this.#phase === 'leading';
    if (!isFirst && lsn <= this.#commitLsn) return;
    this.#phase = 'established';
    this.#commitLsn = lsn;
    actions.push({ kind: 'committed', lsn });
    if (!isFirst) return;
    for (const peer of this.#peers) if (peer.state === 'absent') this.#admit(peer, actions);
  }
}

function hasLog(peer: Peer): boolean {
  return peer.state !== 'lost' && peer.state !== 'absent' && peer.state !== 'creating';
}

function positionOf(vote: VoteReply): { lastLogTerm: number; flushLsn: Lsn } {
  return { lastLogTerm: lastLogTerm(vote.history, vote.flushLsn), flushLsn: vote.flushLsn };
}
