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
 * Before it is established a proposer may begin a new election (a higher term was seen, or the voter that alone had the newest log is
 * gone); afterwards never, since its Postgres runs on the log of this term.
 *
 * Invariants:
 *   - A term is used for one election only, and is above every term that the quorum knew.
 *   - Acknowledgements below the term's start count for nothing: what an older term left is committed only together with this term's start.
 *   - commitLsn never goes back and is acknowledged by a quorum.
 */
import assert from 'node:assert/strict';
import type { Lsn } from '../postgres/lsn.ts';
import type { AcceptorMessage, AppendReply, Elected, TermHistory, VoteReply, VoteRequest } from './messages.ts';
import { compareLogs, highestCommonPoint, lastLogTerm } from './term-history.ts';

export type ProposerAction =
  | { readonly kind: 'send'; readonly peer: number; readonly message: VoteRequest | Elected }
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

export type ProposerPhase = 'electing' | 'leading' | 'established' | 'fenced';

interface Peer {
  state: 'lost' | 'greeted' | 'voting' | 'voted' | 'joining' | 'streaming';
  /** The highest term it is known to have. */
  term: number;
  /** Known since it was first greeted. */
  known: boolean;
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
  #phase: ProposerPhase = 'electing';
  #candidateTerm = 0;
  #history: TermHistory = [];
  #startLsn: Lsn = 0;
  #donor = -1;
  #commitLsn: Lsn = 0;
  #retrying = false;

  constructor(peerCount: number) {
    assert(peerCount > 0, 'a log has at least one acceptor');
    this.#quorum = Math.floor(peerCount / 2) + 1;
    this.#peers = Array.from({ length: peerCount }, () => ({
      state: 'lost',
      term: 0,
      known: false,
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
    const copy = new ProposerState(this.#peers.length);
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

  /** The peer is connected and has answered the greeting. */
  greeted(index: number, term: number): ProposerAction[] {
    const actions: ProposerAction[] = [];
    const peer = this.#peers[index]!;
    peer.state = 'greeted';
    peer.known = true;
    peer.vote = undefined;
    if (this.#noteTerm(peer, term, actions)) return actions;
    if (this.#candidateTerm > 0) this.#askVote(index, actions);
    else this.#elect(actions);
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
    if (this.#phase === 'leading' && this.#peers[this.#donor]!.state !== 'lost' && !this.#isOutrun()) return actions;
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
    if (peer.state === 'lost') return actions;
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
    const connected = this.#peers.filter((peer) => peer.state !== 'lost');
    if (this.#retrying || connected.length < this.#quorum) return;
    this.#candidateTerm = Math.max(...this.#peers.map((peer) => peer.term)) + 1;
    this.#donor = -1;
    this.#peers.forEach((peer, index) => {
      peer.vote = undefined;
      peer.ackedLsn = 0;
      peer.writtenLsn = 0;
      if (peer.state !== 'lost') this.#askVote(index, actions);
    });
  }

  #askVote(index: number, actions: ProposerAction[]): void {
    this.#peers[index]!.state = 'voting';
    actions.push({ kind: 'send', peer: index, message: { kind: 'vote', term: this.#candidateTerm } });
  }

  #voted(index: number, peer: Peer, reply: VoteReply, actions: ProposerAction[]): void {
    if (peer.state !== 'voting' || reply.term !== this.#candidateTerm) return;
    if (this.#isOutrun()) return; // Winning now would only mean to be fenced later; `elect` asks again.
    if (reply.granted) peer.votedTerm = reply.term;
    if (this.#phase === 'electing' && peer.votedTerm !== this.#candidateTerm) {
      this.#retry(`a vote for term ${reply.term} went to another proposer, or was lost on the way`, actions);
      return;
    }
    peer.vote = reply;
    peer.state = 'voted';
    if (this.#phase === 'electing') this.#win(actions);
    else this.#join(index, actions);
  }

  #win(actions: ProposerAction[]): void {
    let donor: VoteReply | undefined;
    let count = 0;
    this.#peers.forEach((peer, index) => {
      if (peer.state !== 'voted' || peer.vote === undefined) return;
      count++;
      if (donor !== undefined && compareLogs(positionOf(peer.vote), positionOf(donor)) <= 0) return;
      donor = peer.vote;
      this.#donor = index;
    });
    if (donor === undefined || count < this.#quorum) return;
    this.#phase = 'leading';
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
    if (this.#phase === 'leading') this.#phase = 'established';
    else if (lsn <= this.#commitLsn) return;
    this.#commitLsn = lsn;
    actions.push({ kind: 'committed', lsn });
  }
}

function positionOf(vote: VoteReply): { lastLogTerm: number; flushLsn: Lsn } {
  return { lastLogTerm: lastLogTerm(vote.history, vote.flushLsn), flushLsn: vote.flushLsn };
}
