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
 * In a joint configuration, a majority of both sets without it must know, under this configuration.
 * A log that no acceptor of a quorum has written to yet is made on all that are there, if the caller knows that it was never used (mayCreate).
 *
 * Configurations. A proposer takes over a newer one at any time, from its shell or from an acceptor. A candidate then begins anew: votes of one
 * configuration make no quorum of another. A leader goes on, commits by the quorums of the new one, and tells those that follow it. The configuration is
 * *settled* once a quorum of it has confirmed that it wrote it down, and has everything committed up to then. Before that, no other set of members may
 * follow. Terms do the rest: who was elected under an older configuration, by votes given before a majority wrote down the new one, has a lower
 * term than the leader that settled it, and finds no quorum.
 *
 * Before it is established a proposer may begin a new election (a higher term was seen, or the voter that alone had the newest log is
 * gone); afterwards never, since its Postgres runs on the log of this term.
 *
 * Invariants:
 *   - A term is used for one election only, and is above every term that the quorum knew.
 *   - Acknowledgements below the term's start count for nothing: what an older term left is committed only together with this term's start.
 *   - Votes count under the configuration under which they were asked for only.
 *   - Acknowledgements count under the configuration that came with them or was confirmed since. (One given earlier may come from an acceptor that has followed a
 *     higher term meanwhile, under which a newer configuration was settled that needs this acceptor alone.)
 *   - An acceptor without the log, or with one that cannot vote yet, counts for no election.
 *   - commitLsn never goes back and is acknowledged by a quorum.
 */
import assert from 'node:assert/strict';
import type { Lsn } from '../postgres/lsn.ts';
import { type AcceptorState, blankState } from './acceptor.ts';
import { type Configuration, isQuorum, nodesOf, quorumLsn } from './configuration.ts';
import type { AcceptorMessage, AppendReply, Elected, Renew, TermHistory, VoteReply, VoteRequest } from './messages.ts';
import { compareLogs, contradiction, highestCommonPoint, lastLogTerm } from './term-history.ts';

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
  /** A newer configuration has a member more, at a new index or at one that was removed. Connect to it. */
  | { readonly kind: 'added'; readonly peer: number; readonly nodeId: number }
  /** Disconnect: a newer configuration does not have it. */
  | { readonly kind: 'removed'; readonly peer: number }
  /** The configuration of this version may be followed by the final one of it. */
  | { readonly kind: 'settled'; readonly version: number }
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
  readonly configuration: Configuration;
  /** See Acceptor.isBlank. */
  readonly isBlank: boolean;
}

export type ProposerPhase = 'electing' | 'leading' | 'established' | 'fenced';

interface Peer {
  readonly nodeId: number;
  /** The configuration does not have it any more. */
  isGone: boolean;
  state: 'lost' | 'absent' | 'creating' | 'greeted' | 'voting' | 'voted' | 'joining' | 'streaming';
  /** The highest term it is known to have. */
  term: number;
  /** As far as it has confirmed, in this connection. */
  generation: number;
  configurationVersion: number;
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
  readonly nodeId: number;
  readonly isGone: boolean;
  readonly state: Peer['state'];
  readonly ackedLsn: Lsn;
  readonly writtenLsn: Lsn;
  readonly sendLsn: Lsn;
  readonly sentCommitLsn: Lsn;
}

export class ProposerState {
  readonly #peers: Peer[];
  #configuration: Configuration;
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
  #candidateVersion = 0;
  #settledVersion = 0;

  /** Its peers are the configuration's nodes, in this order. */
  constructor(configuration: Configuration, origin: LogOrigin) {
    assert(configuration.members.length > 0, 'a log has at least one acceptor');
    this.#origin = origin;
    this.#mayCreate = origin.mayCreate;
    this.#configuration = configuration;
    this.#peers = nodesOf(configuration).map(newPeer);
  }

  get phase(): ProposerPhase {
    return this.#phase;
  }

  /** An independent machine in the same state, for who looks at more than one future. */
  clone(): ProposerState {
    const copy = new ProposerState(this.#configuration, this.#origin);
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
    copy.#candidateVersion = this.#candidateVersion;
    copy.#settledVersion = this.#settledVersion;
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
    return quorumLsn(this.#configuration, (nodeId) => this.#peerOf(nodeId).writtenLsn);
  }

  /** The voter whose log became this term's past; -1 before the election. */
  get donor(): number {
    return this.#donor;
  }

  peer(index: number): PeerView {
    return this.#peers[index]!;
  }

  /** Those that are gone keep their index. */
  get peerCount(): number {
    return this.#peers.length;
  }

  get configuration(): Configuration {
    return this.#configuration;
  }

  /** Of the configuration that the votes of this election were asked under. */
  get candidateVersion(): number {
    return this.#candidateVersion;
  }

  /** The last one that this leader has settled; 0 when none. */
  get settledVersion(): number {
    return this.#settledVersion;
  }

  get generation(): number {
    return this.#generation;
  }

  /** Whether those peers, by index, are a quorum of the configuration. */
  isQuorum(has: (index: number) => boolean): boolean {
    return isQuorum(this.#configuration, (nodeId) => has(this.#peers.indexOf(this.#peerOf(nodeId))));
  }

  /** Joins the next set of members with a joint configuration. Who does that gives it an empty log, if it has none. */
  isNewcomer(index: number): boolean {
    return !this.#configuration.members.includes(this.#peers[index]!.nodeId);
  }

  /** It follows, and has not confirmed the newest generation or configuration yet: who waits for long for that connects to it anew. */
  isUnconfirmed(index: number): boolean {
    const { state, generation, configurationVersion } = this.#peers[index]!;
    return (
      state === 'streaming' && (generation < this.#generation || configurationVersion < this.#configuration.version)
    );
  }

  /** Takes over a configuration if it is newer. */
  configure(configuration: Configuration): ProposerAction[] {
    const actions: ProposerAction[] = [];
    this.#configure(configuration, actions);
    return actions;
  }

  /** The peer is connected, has the log and has answered the greeting. */
  greeted(index: number, greeting: AcceptorGreeting): ProposerAction[] {
    const { term, generation, configuration, isBlank } = greeting;
    const actions: ProposerAction[] = [];
    const peer = this.#peers[index]!;
    this.#configure(configuration, actions);
    if (peer.isGone) return actions;
    peer.state = 'greeted';
    // What a greeting tells may not be durable yet.
    peer.generation = 0;
    peer.configurationVersion = 0;
    peer.isBlank = isBlank;
    peer.vote = undefined;
    if (this.#noteTerm(peer, term, actions)) return actions;
    this.#noteGeneration(generation, actions);
    if (this.#candidateTerm > 0) this.#askVote(index, actions);
    else this.#elect(actions);
    this.#createFirst(actions);
    return actions;
  }

  /** The peer is connected and does not have the log. */
  absent(index: number, incarnation: string): ProposerAction[] {
    const actions: ProposerAction[] = [];
    const peer = this.#peers[index]!;
    if (peer.isGone) return actions;
    peer.state = 'absent';
    peer.incarnation = incarnation;
    peer.vote = undefined;
    peer.votedTerm = 0;
    peer.ackedLsn = 0;
    peer.writtenLsn = 0;
    peer.generation = 0;
    peer.configurationVersion = 0;
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
    if (peer.isGone || this.#noteTerm(peer, message.term, actions)) return actions;
    if (peer.state === 'lost' || peer.state === 'absent' || peer.state === 'creating') return actions;
    if (message.kind === 'vote-reply') {
      this.#configure(message.configuration, actions);
      if (peer.isGone) return actions;
      peer.configurationVersion = message.configuration.version;
    } else if (message.kind === 'append-reply') {
      peer.configurationVersion = message.configurationVersion;
      if (message.configurationVersion > this.#configuration.version) {
        actions.push({
          kind: 'reconnect',
          peer: index,
          reason: 'it knows a newer configuration, which it tells first',
        });
        return actions;
      }
    }
    if (message.kind === 'vote-reply' || message.kind === 'append-reply') {
      peer.generation = Math.max(peer.generation, message.generation);
      if (this.#noteGeneration(message.generation, actions)) return actions;
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

  /** A peer that has the WAL that this one needs next, as part of this term's log; none of `without`. */
  recoverySource(index: number, without: Pick<ReadonlySet<number>, 'has'> = new Set()): number | undefined {
    const { sendLsn } = this.#peers[index]!;
    let best: number | undefined;
    this.#peers.forEach((peer, other) => {
      if (other === index || without.has(other) || peer.state !== 'streaming' || peer.ackedLsn <= sendLsn) return;
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

  #configure(configuration: Configuration, actions: ProposerAction[]): void {
    if (configuration.version <= this.#configuration.version || this.#phase === 'fenced') return;
    this.#configuration = configuration;
    const nodes = nodesOf(configuration);
    this.#peers.forEach((peer, index) => {
      if (peer.isGone || nodes.includes(peer.nodeId)) return;
      Object.assign(peer, newPeer(peer.nodeId), { isGone: true }); // Shells hold on to the object.
      actions.push({ kind: 'removed', peer: index });
    });
    for (const nodeId of nodes) {
      const index = this.#peers.findIndex((peer) => peer.nodeId === nodeId);
      if (index >= 0 && !this.#peers[index]!.isGone) continue;
      if (index >= 0) Object.assign(this.#peers[index]!, newPeer(nodeId));
      else this.#peers.push(newPeer(nodeId));
      actions.push({ kind: 'added', peer: index >= 0 ? index : this.#peers.length - 1, nodeId });
    }
    const { version } = configuration;
    if (this.#phase === 'electing') {
      if (this.#candidateTerm > 0) this.#retry(`configuration ${version} exists`, actions);
      else this.#elect(actions);
      return;
    }
    this.#peers.forEach((peer, index) => {
      if (peer.state === 'streaming') this.#renew(index, actions);
    });
    this.#advanceCommit(actions);
    if (this.#phase === 'leading' && this.#peers[this.#donor]!.isGone)
      this.#retry('the voter with the newest log is no member any more', actions);
  }

  #peerOf(nodeId: number): Peer {
    return this.#peers.find((peer) => peer.nodeId === nodeId)!;
  }

  #isQuorum(has: (peer: Peer) => boolean): boolean {
    return isQuorum(this.#configuration, (nodeId) => has(this.#peerOf(nodeId)));
  }

  /** Notes a generation that a peer knows. True when that ends what was going on. */
  #noteGeneration(generation: number, actions: ProposerAction[]): boolean {
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
    const isConnected = this.#isQuorum((peer) => peer.state !== 'lost');
    const isFresh = connected.every((peer) => peer.state === 'absent' || peer.state === 'creating' || peer.isBlank);
    if (!isConnected || !isFresh) return;
    this.#peers.forEach((peer, index) => {
      if (peer.state !== 'absent') return;
      peer.state = 'creating';
      const state = blankState(this.#origin.startLsn, this.#configuration);
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
    const { generation, configuration } = this;
    const message: Renew = { kind: 'renew', term: this.#candidateTerm, generation, configuration };
    actions.push({ kind: 'send', peer: index, message });
  }

  /** The second step, when a majority without it knows. */
  #createAgain(actions: ProposerAction[]): void {
    this.#peers.forEach((peer, index) => {
      if (peer.state !== 'absent') return;
      const { version } = this.#configuration;
      const isKnown = this.#isQuorum(
        (other) => other !== peer && other.generation >= peer.admittedBy && other.configurationVersion === version,
      );
      if (!isKnown) return;
      peer.state = 'creating';
      const state: AcceptorState = {
        ...blankState(this.#history[0]!.startLsn, this.#configuration),
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
    if (this.#retrying || !this.#isQuorum(hasLog)) return;
    this.#candidateTerm = Math.max(...this.#peers.map((peer) => peer.term)) + 1;
    this.#candidateGeneration = this.#generation;
    this.#candidateVersion = this.#configuration.version;
    this.#donor = -1;
    this.#peers.forEach((peer, index) => {
      peer.vote = undefined;
      peer.ackedLsn = 0;
      peer.writtenLsn = 0;
      if (hasLog(peer)) this.#askVote(index, actions);
    });
  }

  #askVote(index: number, actions: ProposerAction[]): void {
    const { term, generation, configuration } = this;
    this.#peers[index]!.state = 'voting';
    actions.push({ kind: 'send', peer: index, message: { kind: 'vote', term, generation, configuration } });
  }

  #voted(index: number, peer: Peer, reply: VoteReply, actions: ProposerAction[]): void {
    if (peer.state !== 'voting' || reply.term !== this.#candidateTerm) return;
    if (this.#isOutrun()) return; // Winning now would only mean to be fenced later; `elect` asks again.
    const isOther =
      this.#generation !== this.#candidateGeneration || this.#configuration.version !== this.#candidateVersion;
    if (this.#phase === 'electing' && isOther) return; // A vote may be void, or be no part of a quorum.
    const origin: TermHistory = [{ term: 0, startLsn: this.#origin.startLsn }];
    const known = this.#phase === 'electing' ? origin : this.#history;
    const contradicts = contradiction(reply.history, known);
    if (contradicts !== undefined || reply.flushLsn < this.#origin.startLsn) {
      const reason = `its log is none of this timeline: ${contradicts ?? 'it ends before it begins'}`;
      actions.push({ kind: 'reconnect', peer: index, reason });
      return;
    }
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
    this.#peers.forEach((peer, index) => {
      if (!this.#hasVote(peer) || peer.vote === undefined) return;
      if (donor !== undefined && compareLogs(positionOf(peer.vote), positionOf(donor)) <= 0) return;
      donor = peer.vote;
      this.#donor = index;
    });
    if (donor === undefined || !this.#isQuorum((peer) => this.#hasVote(peer))) return;
    this.#phase = 'leading';
    this.#mayCreate = false;
    this.#startLsn = donor.flushLsn;
    this.#history = [...donor.history, { term: this.#candidateTerm, startLsn: this.#startLsn }];
    actions.push({ kind: 'leading', term: this.#candidateTerm, startLsn: this.#startLsn });
    this.#peers.forEach((peer, index) => {
      if (peer.state === 'voted') this.#join(index, actions);
    });
  }

  #hasVote(peer: Peer): boolean {
    return peer.state === 'voted' && peer.vote !== undefined && peer.votedTerm === this.#candidateTerm;
  }

  #join(index: number, actions: ProposerAction[]): void {
    const peer = this.#peers[index]!;
    const vote = peer.vote!;
    const startLsn = highestCommonPoint(this.#history, vote);
    peer.state = 'joining';
    peer.sendLsn = startLsn;
    // Less only for a log that was made anew since, by who gives newcomers theirs.
    peer.ackedLsn = Math.min(peer.ackedLsn, startLsn);
    peer.writtenLsn = Math.min(peer.writtenLsn, startLsn);
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
      if (this.isUnconfirmed(index)) this.#renew(index, actions);
    }
    if (writeLsn > peer.writtenLsn) peer.writtenLsn = writeLsn;
    if (flushLsn > peer.ackedLsn) peer.ackedLsn = flushLsn;
    this.#advanceCommit(actions);
    this.#settle(actions);
  }

  #settle(actions: ProposerAction[]): void {
    const { version } = this.#configuration;
    if (this.#phase !== 'established' || version === 0 || this.#settledVersion === version) return;
    const isSettled = this.#isQuorum(
      (peer) => peer.state === 'streaming' && peer.configurationVersion === version && peer.ackedLsn >= this.#commitLsn,
    );
    if (!isSettled) return;
    this.#settledVersion = version;
    actions.push({ kind: 'settled', version });
  }

  #advanceCommit(actions: ProposerAction[]): void {
    const { version } = this.#configuration;
    const lsn = quorumLsn(this.#configuration, (nodeId) => {
      const { ackedLsn, configurationVersion } = this.#peerOf(nodeId);
      return ackedLsn >= this.#startLsn && configurationVersion === version ? ackedLsn : 0;
    });
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

function newPeer(nodeId: number): Peer {
  return {
    nodeId,
    isGone: false,
    state: 'lost',
    term: 0,
    generation: 0,
    configurationVersion: 0,
    isBlank: false,
    incarnation: '',
    admittedBy: 0,
    votedTerm: 0,
    vote: undefined,
    ackedLsn: 0,
    writtenLsn: 0,
    sendLsn: 0,
    sentCommitLsn: 0,
  };
}

function hasLog(peer: Peer): boolean {
  return peer.state !== 'lost' && peer.state !== 'absent' && peer.state !== 'creating';
}

function positionOf(vote: VoteReply): { lastLogTerm: number; flushLsn: Lsn } {
  return { lastLogTerm: lastLogTerm(vote.history, vote.flushLsn), flushLsn: vote.flushLsn };
}
