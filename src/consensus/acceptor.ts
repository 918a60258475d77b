/**
 * The acceptor: one safekeeper's part in one timeline's log. A state machine without clock, socket or disk: it takes messages and completions, and
 * returns actions; the shell (safekeeper/timeline.ts, or the simulation) carries them out in order.
 *
 * At most one I/O action (write, truncate, persist) is out at a time; `completed` tells that it is durable. Appends that come while a
 * write is out make up the next write together: group commit. Votes and elections wait until all that came before them is durable.
 * After an I/O error the machine must not be used again: what the disk holds is then not known.
 *
 * Invariants:
 *   - A vote is granted only for a term above every term known, and replied to only once the term is durable and so is all WAL received.
 *   - No vote is given under a configuration older than one that is known here, nor by who is no member. A newer one is durable before it is confirmed.
 *   - A log that was given anew, in place of one that was lost, gives no vote before it has reached `votesFrom`.
 *   - WAL is taken only from the leader whose history this log carries, and only exactly at the write position.
 *   - flushLsn is the end of a whole record and durable. Nothing above it was ever acknowledged.
 *   - commitLsn ≤ flushLsn, never goes back, and nothing below it is ever cut.
 *   - A divergent tail is cut before the history that leaves it out is persisted. A crash between the two leaves a shorter log of the old
 *     history, which is harmless; the other order would pass the tail off as the new leader's.
 */
import assert from 'node:assert/strict';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import { type Configuration, isMember, NO_CONFIGURATION } from './configuration.ts';
import type { AcceptorMessage, Append, Elected, ProposerMessage, Renew, TermHistory, VoteRequest } from './messages.ts';
import {
  contradiction,
  hasReached,
  type LogPosition,
  highestCommonPoint,
  historyUpTo,
  lastLogTerm,
  prunedHistory,
} from './term-history.ts';

/** What must survive a restart, replaced as a whole. */
export interface AcceptorState {
  readonly term: number;
  readonly history: TermHistory;
  /** May lag behind what was announced: it only says from where to look for the end of the log. */
  readonly commitLsn: Lsn;
  /** Raised each time that an acceptor of this log came back empty. */
  readonly generation: number;
  /** The newest that is known here. */
  readonly configuration: Configuration;
  /** Of a log that was given anew: this acceptor votes once its log has got so far. */
  readonly votesFrom?: LogPosition;
}

/** Of a log that nobody has written to yet. */
export function blankState(startLsn: Lsn, configuration = NO_CONFIGURATION): AcceptorState {
  return { term: 0, history: [{ term: 0, startLsn }], commitLsn: startLsn, generation: 0, configuration };
}

/** Finds where records end in a log that goes on from an LSN. Throws on bytes that are no log. */
export interface BoundaryTracker {
  push(lsn: Lsn, bytes: Buffer): void;
  /** End of the last whole record; at first where it began. */
  readonly boundaryLsn: Lsn;
}

export interface AcceptorOptions {
  /** Its name in configurations. */
  readonly nodeId: number;
  readonly state: AcceptorState;
  /** End of the last whole record found on disk; nothing follows it there. */
  readonly flushLsn: Lsn;
  readonly trackBoundaries: (startLsn: Lsn) => BoundaryTracker;
}

export type AcceptorAction<Sender> =
  /** I/O: write the chunks one after the other from beginLsn on, and make them durable. */
  | { readonly kind: 'write'; readonly beginLsn: Lsn; readonly chunks: readonly Buffer[] }
  /** I/O: cut the log at the LSN, durably, so that nothing after it can ever be read again. */
  | { readonly kind: 'truncate'; readonly lsn: Lsn }
  /** I/O: replace the durable state atomically. */
  | { readonly kind: 'persist'; readonly state: AcceptorState }
  | { readonly kind: 'send'; readonly to: Sender; readonly message: AcceptorMessage }
  /** flushLsn or commitLsn moved. */
  | { readonly kind: 'progress' }
  /** For every proposer that is connected, other than the one that raised it. */
  | { readonly kind: 'term-raised'; readonly by: Sender; readonly term: number };

interface Waiting<Sender> {
  readonly sender: Sender;
  readonly message: ProposerMessage;
}

export class Acceptor<Sender> {
  readonly #nodeId: number;
  readonly #trackBoundaries: (startLsn: Lsn) => BoundaryTracker;
  #term: number;
  #history: TermHistory;
  #commitLsn: Lsn;
  #generation: number;
  #configuration: Configuration;
  #votesFrom: LogPosition | undefined;
  #persistedCommitLsn: Lsn;
  #flushLsn: Lsn;
  /** End of what is durable; may lie inside a record. */
  #durableLsn: Lsn;
  /** End of what was received, durable or not; may lie inside a record. */
  #writeLsn: Lsn;
  #tracker: BoundaryTracker;
  /** End of the last whole record received. */
  #boundaryLsn: Lsn;
  /** The leader has introduced itself since the start, so its appends continue this log. */
  #following = false;
  /** The highest commit LSN that the leader announced; may be past what is flushed here. */
  #announcedCommitLsn: Lsn;

  /** What to do when the I/O that is out has ended. */
  #afterIo: ((actions: AcceptorAction<Sender>[]) => void) | undefined;
  #queue: Waiting<Sender>[] = [];
  /** Of the appends in the queue. */
  #queuedBytes = 0;
  /** Appends received but not handed to a write yet. */
  #unwritten: Buffer[] = [];
  #unwrittenBytes = 0;
  #toAcknowledge = new Set<Sender>();
  #saveWanted = false;

  constructor(options: AcceptorOptions) {
    const { nodeId, state, flushLsn, trackBoundaries } = options;
    assert(state.commitLsn <= flushLsn, 'what is committed is found on disk');
    this.#nodeId = nodeId;
    this.#term = state.term;
    this.#history = state.history;
    this.#commitLsn = state.commitLsn;
    this.#generation = state.generation;
    this.#configuration = state.configuration;
    this.#votesFrom = state.votesFrom;
    this.#persistedCommitLsn = state.commitLsn;
    this.#announcedCommitLsn = state.commitLsn;
    this.#flushLsn = flushLsn;
    this.#durableLsn = flushLsn;
    this.#writeLsn = flushLsn;
    this.#trackBoundaries = trackBoundaries;
    this.#tracker = trackBoundaries(flushLsn);
    this.#boundaryLsn = flushLsn;
  }

  get term(): number {
    return this.#term;
  }

  get history(): TermHistory {
    return this.#history;
  }

  get flushLsn(): Lsn {
    return this.#flushLsn;
  }

  get commitLsn(): Lsn {
    return this.#commitLsn;
  }

  get generation(): number {
    return this.#generation;
  }

  get configuration(): Configuration {
    return this.#configuration;
  }

  /** Nobody's log yet: no vote was given and no leader followed here, and it was not given in place of a lost one. */
  get isBlank(): boolean {
    const isUnwritten = this.#history.length === 1 && this.#flushLsn === this.#history[0]!.startLsn;
    return this.#term === 0 && isUnwritten && this.#votesFrom === undefined;
  }

  get isVoter(): boolean {
    const votesFrom = this.#votesFrom;
    if (!isMember(this.#configuration, this.#nodeId)) return false;
    return votesFrom === undefined || hasReached(this.#history, this.#flushLsn, votesFrom);
  }

  get lastLogTerm(): number {
    return lastLogTerm(this.#history, this.#flushLsn);
  }

  /** The term of the leader whose log this has become, when no higher term is known: up to flushLsn it is that leader's log. */
  get leaderTerm(): number | undefined {
    const last = this.#history[this.#history.length - 1]!;
    return last.term === this.#term && this.lastLogTerm === this.#term ? this.#term : undefined;
  }

  /** Appends of the current term continue this log. */
  get isFollowing(): boolean {
    return this.#following;
  }

  /** The highest commit LSN that the leader announced. */
  get announcedCommitLsn(): Lsn {
    return this.#announcedCommitLsn;
  }

  /** WAL held in memory until the disk is free. */
  get unwrittenBytes(): number {
    return this.#queuedBytes + this.#unwrittenBytes;
  }

  /** Messages that wait for the I/O that is out. */
  get waitingCount(): number {
    return this.#queue.length;
  }

  get isIdle(): boolean {
    return this.#afterIo === undefined && this.#queue.length === 0 && this.#unwrittenBytes === 0;
  }

  receive(sender: Sender, message: ProposerMessage): AcceptorAction<Sender>[] {
    const actions: AcceptorAction<Sender>[] = [];
    if (message.kind === 'append' && this.#queue.length === 0) {
      this.#append(sender, message, actions);
    } else {
      this.#queue.push({ sender, message });
      this.#queuedBytes += walBytesOf(message);
    }
    this.#advance(actions);
    return actions;
  }

  /** The I/O that was out is done and durable. */
  completed(): AcceptorAction<Sender>[] {
    const actions: AcceptorAction<Sender>[] = [];
    const after = this.#afterIo;
    assert(after !== undefined, 'an I/O action was out');
    this.#afterIo = undefined;
    after(actions);
    this.#advance(actions);
    return actions;
  }

  /** Persists the commit LSN at the next chance if it has moved. */
  save(): AcceptorAction<Sender>[] {
    const actions: AcceptorAction<Sender>[] = [];
    this.#saveWanted = true;
    this.#advance(actions);
    return actions;
  }

  /** An independent machine in the same state, for who looks at more than one future. Idle, and at the end of a record. */
  clone(): Acceptor<Sender> {
    assert(this.isIdle && this.#writeLsn === this.#flushLsn, 'nothing is under way in what is cloned');
    const copy = new Acceptor<Sender>({
      nodeId: this.#nodeId,
      state: this.#state(),
      flushLsn: this.#flushLsn,
      trackBoundaries: this.#trackBoundaries,
    });
    copy.#persistedCommitLsn = this.#persistedCommitLsn;
    copy.#announcedCommitLsn = this.#announcedCommitLsn;
    copy.#following = this.#following;
    return copy;
  }

  /** Forgets who wrote the log below the LSN, up to which it is committed; written down with what comes next. */
  prune(committedLsn: Lsn): void {
    this.#history = prunedHistory(this.#history, committedLsn);
  }

  /** A sender that is gone needs no replies. */
  forget(sender: Sender): void {
    this.#toAcknowledge.delete(sender);
    this.#queue = this.#queue.filter((waiting) => waiting.sender !== sender);
    this.#queuedBytes = 0;
    for (const { message } of this.#queue) this.#queuedBytes += walBytesOf(message);
  }

  /** No sender is left: lets go of the memory that following a log takes. The next leader introduces itself anyway. */
  rest(): void {
    this.#following = false;
    this.#tracker = this.#trackBoundaries(this.#flushLsn);
    this.#boundaryLsn = this.#flushLsn;
  }

  #advance(actions: AcceptorAction<Sender>[]): void {
    while (this.#afterIo === undefined) {
      if (this.#saveWanted) {
        // Before what waits to be written: while much comes, something always does.
        this.#saveWanted = false;
        if (this.#commitLsn !== this.#persistedCommitLsn) this.#persist(actions, () => {});
        continue;
      }
      const next = this.#queue[0];
      // Those that waited for something else together make up one write, too.
      if (this.#unwritten.length > 0 && next?.message.kind !== 'append') {
        this.#startWrite(actions);
        return;
      }
      if (next === undefined) break;
      this.#queue.shift();
      const { sender, message } = next;
      this.#queuedBytes -= walBytesOf(message);
      if (message.kind === 'vote') this.#vote(sender, message, actions);
      else if (message.kind === 'elected') this.#elected(sender, message, actions);
      else if (message.kind === 'renew') this.#renew(sender, message, actions);
      else this.#append(sender, message, actions);
    }
  }

  #vote(sender: Sender, message: VoteRequest, actions: AcceptorAction<Sender>[]): void {
    const { configuration } = message;
    const isOutdated = message.generation < this.#generation || configuration.version < this.#configuration.version;
    if (message.term <= this.#term || isOutdated) {
      actions.push({ kind: 'send', to: sender, message: this.#voteReply(false) });
      return;
    }
    this.#configuration = configuration;
    const granted = this.isVoter;
    this.#raiseTerm(message.term);
    this.#generation = message.generation;
    this.#persist(actions, (later) => {
      later.push({ kind: 'send', to: sender, message: this.#voteReply(granted) });
      later.push({ kind: 'term-raised', by: sender, term: message.term });
    });
  }

  #voteReply(granted: boolean): AcceptorMessage {
    return {
      kind: 'vote-reply',
      term: this.#term,
      granted,
      isVoter: this.isVoter,
      generation: this.#generation,
      configuration: this.#configuration,
      flushLsn: this.#flushLsn,
      commitLsn: this.#commitLsn,
      history: historyUpTo(this.#history, this.#flushLsn),
    };
  }

  #elected(sender: Sender, message: Elected, actions: AcceptorAction<Sender>[]): void {
    const { term, startLsn, history } = message;
    if (term < this.#term) {
      this.#refuse(sender, `term ${term} is over`, actions);
      return;
    }
    if (term > this.#term) {
      // Known from a vote as a rule. It is made durable by itself, before anything is cut.
      this.#raiseTerm(term);
      this.#queue.unshift({ sender, message });
      this.#persist(actions, (later) => later.push({ kind: 'term-raised', by: sender, term }));
      return;
    }
    if (!isMember(this.#configuration, this.#nodeId)) {
      const { version } = this.#configuration;
      this.#refuse(sender, `safekeeper ${this.#nodeId} is no member in configuration ${version}`, actions);
      return;
    }
    if (history[history.length - 1]?.term !== term) {
      this.#refuse(sender, `the history of the leader of term ${term} does not end with its term`, actions);
      return;
    }
    const reason = contradiction(history, this.#history);
    if (reason !== undefined) {
      this.#refuse(sender, `this is no log of this timeline: ${reason}`, actions);
      return;
    }
    const [flushLsn, commitLsn] = [this.#flushLsn, this.#commitLsn];
    const commonLsn = highestCommonPoint(history, { history: this.#history, flushLsn, commitLsn });
    if (commonLsn !== startLsn) {
      // This log has moved since the vote, through an older connection of the same leader. It asks again.
      const logs = `${formatLsn(commonLsn)}, not ${formatLsn(startLsn)}`;
      this.#refuse(sender, `the logs are the same up to ${logs}`, actions);
      return;
    }
    if (startLsn < this.#commitLsn) {
      const cut = `cut at ${formatLsn(startLsn)}, below the commit LSN ${formatLsn(this.#commitLsn)}`;
      this.#refuse(sender, `the leader of term ${term} would ${cut}`, actions);
      return;
    }
    if (this.#writeLsn === startLsn) {
      this.#follow(sender, message, actions);
      return;
    }
    actions.push({ kind: 'truncate', lsn: startLsn });
    this.#following = false;
    this.#afterIo = (later) => {
      this.#flushLsn = startLsn;
      this.#durableLsn = startLsn;
      this.#writeLsn = startLsn;
      later.push({ kind: 'progress' });
      this.#follow(sender, message, later);
    };
  }

  #renew(sender: Sender, message: Renew, actions: AcceptorAction<Sender>[]): void {
    const { term, generation, configuration } = message;
    if (term !== this.#term || !this.#following) {
      this.#refuse(sender, `renewal by the leader of term ${term}, which is not followed here`, actions);
      return;
    }
    const isNews = generation > this.#generation || configuration.version > this.#configuration.version;
    if (!isNews) {
      actions.push({ kind: 'send', to: sender, message: this.#appendReply() });
      return;
    }
    this.#generation = Math.max(generation, this.#generation);
    if (configuration.version > this.#configuration.version) this.#configuration = configuration;
    this.#persist(actions, (later) => later.push({ kind: 'send', to: sender, message: this.#appendReply() }));
  }

  #follow(sender: Sender, message: Elected, actions: AcceptorAction<Sender>[]): void {
    const finish = (later: AcceptorAction<Sender>[]): void => {
      this.#tracker = this.#trackBoundaries(this.#flushLsn);
      this.#boundaryLsn = this.#flushLsn;
      this.#following = true;
      this.#announcedCommitLsn = this.#commitLsn;
      later.push({ kind: 'send', to: sender, message: this.#appendReply() });
    };
    if (isSameLog(this.#history, message.history)) {
      finish(actions);
      return;
    }
    this.#following = false;
    this.#history = message.history;
    this.#persist(actions, finish);
  }

  #append(sender: Sender, message: Append, actions: AcceptorAction<Sender>[]): void {
    const { term, beginLsn, commitLsn, bytes } = message;
    if (term !== this.#term) {
      this.#refuse(sender, `append of term ${term}`, actions);
      return;
    }
    if (!this.#following || this.#history[this.#history.length - 1]!.term !== term) {
      this.#refuse(sender, `append before the leader of term ${term} has introduced itself`, actions);
      return;
    }
    if (bytes.length > 0) {
      if (beginLsn !== this.#writeLsn) {
        const gap = `append at ${formatLsn(beginLsn)}, the write position is ${formatLsn(this.#writeLsn)}`;
        this.#refuse(sender, gap, actions);
        return;
      }
      try {
        this.#tracker.push(beginLsn, bytes);
      } catch (error) {
        this.#following = false; // The tracker is not usable: the leader has to begin anew from the last whole record.
        this.#refuse(sender, `append is not WAL: ${error instanceof Error ? error.message : String(error)}`, actions);
        return;
      }
      this.#boundaryLsn = this.#tracker.boundaryLsn;
      this.#writeLsn += bytes.length;
      this.#unwritten.push(bytes);
      this.#unwrittenBytes += bytes.length;
      this.#toAcknowledge.add(sender);
    }
    if (commitLsn > this.#announcedCommitLsn) this.#announcedCommitLsn = commitLsn;
    if (this.#adoptCommit()) actions.push({ kind: 'progress' });
  }

  #startWrite(actions: AcceptorAction<Sender>[]): void {
    const chunks = this.#unwritten;
    const endLsn = this.#writeLsn;
    const boundaryLsn = this.#boundaryLsn;
    const senders = this.#toAcknowledge;
    actions.push({ kind: 'write', beginLsn: endLsn - this.#unwrittenBytes, chunks });
    this.#unwritten = [];
    this.#unwrittenBytes = 0;
    this.#toAcknowledge = new Set();
    this.#afterIo = (later) => {
      this.#durableLsn = endLsn;
      const moved = boundaryLsn > this.#flushLsn;
      if (moved) this.#flushLsn = boundaryLsn;
      if (this.#adoptCommit() || moved) later.push({ kind: 'progress' });
      for (const sender of senders) later.push({ kind: 'send', to: sender, message: this.#appendReply() });
    };
  }

  #adoptCommit(): boolean {
    const commitLsn = Math.min(this.#announcedCommitLsn, this.#flushLsn);
    if (commitLsn <= this.#commitLsn) return false;
    this.#commitLsn = commitLsn;
    return true;
  }

  /** Only as the leader's follower: the history's last term says whose log is acknowledged. */
  #appendReply(): AcceptorMessage {
    const { term } = this.#history[this.#history.length - 1]!;
    const [flushLsn, writeLsn, commitLsn] = [this.#flushLsn, this.#durableLsn, this.#commitLsn];
    const { version: configurationVersion } = this.#configuration;
    const generation = this.#generation;
    return { kind: 'append-reply', term, flushLsn, writeLsn, commitLsn, generation, configurationVersion };
  }

  #refuse(sender: Sender, message: string, actions: AcceptorAction<Sender>[]): void {
    actions.push({ kind: 'send', to: sender, message: { kind: 'refusal', term: this.#term, message } });
  }

  #state(): AcceptorState {
    // Once it was there it has all that it may have helped to commit: it votes from then on, even if a leader with a pruned history cuts it to less.
    if (this.#votesFrom !== undefined && hasReached(this.#history, this.#flushLsn, this.#votesFrom)) {
      this.#votesFrom = undefined;
    }
    const votesFrom = this.#votesFrom;
    return {
      term: this.#term,
      history: this.#history,
      commitLsn: this.#commitLsn,
      generation: this.#generation,
      configuration: this.#configuration,
      ...(votesFrom === undefined ? {} : { votesFrom }),
    };
  }

  #raiseTerm(term: number): void {
    this.#term = term;
    this.#following = false;
  }

  #persist(actions: AcceptorAction<Sender>[], after: (actions: AcceptorAction<Sender>[]) => void): void {
    const state = this.#state();
    actions.push({ kind: 'persist', state });
    this.#afterIo = (later) => {
      this.#persistedCommitLsn = state.commitLsn;
      after(later);
    };
  }
}

function walBytesOf(message: ProposerMessage): number {
  return message.kind === 'append' ? message.bytes.length : 0;
}

/** `known` is the leader's history, or what pruning has left of it. */
function isSameLog(known: TermHistory, leader: TermHistory): boolean {
  const left = leader.length - known.length;
  return (
    left >= 0 &&
    known.length > 1 &&
    known.every(({ term, startLsn }, index) => {
      const same = leader[index === 0 ? 0 : left + index]!;
      return term === same.term && startLsn === same.startLsn;
    })
  );
}
