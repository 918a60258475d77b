/**
 * The proposer: brings a timeline's WAL to a quorum of safekeepers. One per running primary; the rules are in consensus/proposer.ts, this
 * is its network and its memory.
 *
 * WAL that is not committed stays in memory, up to a bound; beyond it `append` asks the caller to wait, who then stops reading from Postgres. A
 * bounded tail of committed WAL stays too, for safekeepers that are a little behind. One that is further behind, or comes back, is brought
 * on from another safekeeper's disk while the others go on.
 */
import assert from 'node:assert/strict';
import { EventEmitter } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Logger } from '../base/log.ts';
import { StrataError } from '../base/errors.ts';
import type { SafekeeperAddress, TimelineIdentity } from '../api/safekeeper.ts';
import { fixedSafekeepers, type SafekeeperDirectory } from '../api/safekeeper-set.ts';
import { ProposerState, type ProposerAction } from '../consensus/proposer.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import { EagerPeers } from './eager-peers.ts';
import type { BackpressureLimits } from '../api/backpressure-limits.ts';
import { allowedRate, lagOf } from './backpressure.ts';
import { ProposerPeer } from './proposer-peer.ts';
import { WalBuffer } from './wal-buffer.ts';

export interface ProposerOptions {
  /** A directory is followed as it changes; addresses alone are taken as a set that never does. */
  readonly safekeepers: SafekeeperDirectory | readonly SafekeeperAddress[];
  /** Scope `platform`, or `timeline` for this timeline. */
  readonly token: string;
  readonly timeline: TimelineIdentity;
  /** Aborting ends the election; a proposer that is elected goes on. */
  readonly signal?: AbortSignal;
  readonly log?: Logger;
  /** WAL that is not committed yet, in memory; beyond it `append` asks the caller to wait. */
  readonly maxPendingBytes?: number;
  /** Committed WAL that stays in memory for safekeepers that are behind. */
  readonly retainedBytes?: number;
  /**
   * True only when it is known from elsewhere that nothing was ever committed to this timeline: its log is then made where it is missing. A log that
   * is missing otherwise was lost, and is given anew once it is certain that nothing is lost with it.
   */
  readonly mayCreate: boolean;
  /** When storage lags; those of api/backpressure-limits.ts when absent. */
  readonly backpressure?: BackpressureLimits;
  /** Rejects with `conflict`, and raises no term, when so many safekeepers have a leader connected that no quorum is free. */
  readonly yieldsToLeader?: boolean;
  /** How long a safekeeper may be silent while it is waited for. */
  readonly stallMs?: number;
}

export interface ProposerEvents {
  /** A quorum has made everything before the LSN durable. */
  commit: [lsn: Lsn];
  /** Another proposer leads under a higher term: nothing will ever be committed by this one again. Its Postgres must be killed. */
  fenced: [term: number];
  /** After `append` returned false: there is room again. */
  drain: [];
}

const MAX_PENDING_BYTES = 32 * 1024 * 1024;
const RETAINED_BYTES = 8 * 1024 * 1024;
/** How often it is looked whether a round of appends is late; and how long a new commit LSN is held back when no WAL follows that would carry it. */
const PAUSE_MS = 5;
/** A round that takes so long is not waited for at the end of a pause. */
const LATE_ROUND_MS = 2;
/** How long WAL is held back from safekeepers that are not needed for a quorum, as long as more comes. */
const HOLD_BACK_MS = 20;
const RETRY_MIN_MS = 20;
/** Doubled with each election that fails: of several candidates one gets the time to bring the others' logs on. */
const RETRY_SPREAD_MS = 180;
const MAX_RETRY_DOUBLINGS = 5;
const STALL_MS = 10_000;
const CLOSE_TIMEOUT_MS = 1_000;
const EQUAL_CHECK_MS = 20;

/**
 * Wins an election, among those of `safekeepers` that answer. When it resolves, everything before `startLsn` is committed on a quorum and is all
 * that there is of the log. Connects anew for ever; rejects by the signal, or when a quorum refuses for good (deleted, not allowed).
 */
export async function electProposer(options: ProposerOptions): Promise<Proposer> {
  const proposer = new Proposer(options);
  await proposer.elected();
  return proposer;
}

interface Waiter {
  readonly lsn: Lsn;
  resolve(): void;
  reject(error: Error): void;
}

/** A leader. */
export class Proposer extends EventEmitter<ProposerEvents> {
  readonly #options: ProposerOptions;
  readonly #maxPendingBytes: number;
  readonly #stallMs: number;
  readonly #state: ProposerState;
  readonly #safekeepers: SafekeeperDirectory;
  readonly #stopWatching: () => void;
  /** By their index in the state machine, those that are gone too. */
  readonly #peers: ProposerPeer[];
  /** Indexes of those that are not gone. */
  #active: readonly number[] = [];
  /** Of those, by their place among them. */
  #eager: EagerPeers;
  readonly #waiters = new Set<Waiter>();
  readonly #stallTimer: NodeJS.Timeout;
  readonly #onAbort = (): void => void this.close();
  readonly #elected: Promise<void>;
  #settleElection: { resolve(): void; reject(error: Error): void } | undefined;
  #buffer = new WalBuffer(0);
  #pumpScheduled = false;
  #isBeginning = false;
  #roundBeganAtMs = 0;
  /** What a quorum has to take in before the next round. */
  #roundEndLsn: Lsn = 0;
  /** When the last of what was held back was sent. */
  #heldBackAtMs = 0;
  /** endLsn when the last pause ended. */
  #pauseEndLsn: Lsn = 0;
  #full = false;
  #feedback: { readonly ingestedLsn: Lsn; readonly remoteLsn: Lsn } | undefined;
  #retryCount = 0;
  #pauseTimer: NodeJS.Timeout | undefined;
  #retryTimer: NodeJS.Timeout | undefined;
  #closing: Promise<void> | undefined;

  constructor(options: ProposerOptions) {
    super();
    this.#options = options;
    this.#maxPendingBytes = options.maxPendingBytes ?? MAX_PENDING_BYTES;
    this.#stallMs = options.stallMs ?? STALL_MS;
    const { safekeepers } = options;
    this.#safekeepers = 'current' in safekeepers ? safekeepers : fixedSafekeepers(safekeepers);
    this.#state = new ProposerState(this.#safekeepers.current.configuration, {
      startLsn: options.timeline.startLsn,
      mayCreate: options.mayCreate,
    });
    this.#eager = this.#chooseEager();
    this.#elected = new Promise((resolve, reject) => {
      this.#settleElection = { resolve, reject };
    });
    this.#peers = Array.from({ length: this.#state.peerCount }, (_, index) => this.#newPeer(index));
    this.#stopWatching = this.#safekeepers.watch(() => {
      if (this.#closing === undefined) this.#perform(this.#state.configure(this.#safekeepers.current.configuration));
    });
    this.#stallTimer = setInterval(() => {
      for (const peer of this.#peers) peer.checkStall();
    }, this.#stallMs / 2);
    this.#stallTimer.unref();
    const { signal } = options;
    if (signal === undefined) return;
    if (signal.aborted) void this.close();
    signal.addEventListener('abort', this.#onAbort, { once: true });
    const finish = (): void => signal.removeEventListener('abort', this.#onAbort);
    this.#elected.then(finish, finish);
  }

  /** Resolves when the election is won and established. */
  elected(): Promise<void> {
    return this.#elected;
  }

  get term(): number {
    return this.#state.term;
  }

  get startLsn(): Lsn {
    return this.#state.startLsn;
  }

  get commitLsn(): Lsn {
    return this.#state.commitLsn;
  }

  /** End of what was appended: the next append begins here. */
  get endLsn(): Lsn {
    return this.#buffer.endLsn;
  }

  /** WAL bytes per second that storage can be given; Infinity as a rule (backpressure.ts). */
  get allowedRate(): number {
    const feedback = this.#feedback;
    if (feedback === undefined) return Infinity;
    return allowedRate(lagOf(this.endLsn, feedback), this.#options.backpressure);
  }

  get fenced(): boolean {
    return this.#state.phase === 'fenced';
  }

  /** Copies the bytes, which begin at endLsn. False: wait for 'drain' before appending more (nothing is refused or lost). */
  append(lsn: Lsn, bytes: Buffer): boolean {
    assert(
      lsn === this.#buffer.endLsn,
      `append at ${formatLsn(lsn)}, the log ends at ${formatLsn(this.#buffer.endLsn)}`,
    );
    if (this.fenced || this.#closing !== undefined) return true;
    this.#buffer.append(bytes);
    this.#schedulePump();
    // Not what is committed counts, but what is taken in: one record can be larger than the bound.
    this.#full = this.#pendingBytes() >= this.#maxPendingBytes;
    return !this.#full;
  }

  /** Resolves when everything before `lsn` is committed; rejects when the proposer is fenced or closed, or the signal aborts. */
  async waitCommitted(lsn: Lsn, signal?: AbortSignal): Promise<void> {
    if (this.#state.phase === 'established' && this.commitLsn >= lsn) return;
    signal?.throwIfAborted();
    if (this.fenced) throw this.#fencedError();
    if (this.#closing !== undefined) throw closedError();
    await new Promise<void>((resolve, reject) => {
      const onAbort = (): void => {
        this.#waiters.delete(waiter);
        reject(signal?.reason as Error);
      };
      const finish = (): void => {
        this.#waiters.delete(waiter);
        signal?.removeEventListener('abort', onAbort);
      };
      const waiter: Waiter = {
        lsn,
        resolve: () => (finish(), resolve()),
        reject: (error) => (finish(), reject(error)),
      };
      this.#waiters.add(waiter);
      signal?.addEventListener('abort', onAbort, { once: true });
    });
  }

  /** Resolves when every safekeeper has all that is committed now; rejects by the signal. Without new WAL only: recovery of an idle log. */
  async waitEqual(signal: AbortSignal): Promise<void> {
    const { commitLsn } = this;
    while (this.#active.some((index) => this.#state.peer(index).ackedLsn < commitLsn)) {
      if (this.fenced) throw this.#fencedError();
      await sleep(EQUAL_CHECK_MS, undefined, { signal });
    }
  }

  /** Tells the safekeepers the last commit LSN and disconnects. WAL that is not committed is forgotten. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    this.#stop();
    await Promise.all(this.#peers.map((peer) => peer.close(CLOSE_TIMEOUT_MS)));
    const why = this.#peers.map((peer) => peer.lastError?.message).filter((text) => text !== undefined);
    const error = closedError(why.length > 0 ? `: ${why.join('; ')}` : '');
    this.#settleElection?.reject(error);
    for (const waiter of this.#waiters) waiter.reject(error);
  }

  #stop(): void {
    clearInterval(this.#stallTimer);
    clearTimeout(this.#pauseTimer);
    clearTimeout(this.#retryTimer);
    this.#stopWatching();
  }

  #perform(actions: readonly ProposerAction[]): void {
    for (const action of actions) {
      switch (action.kind) {
        case 'send':
          this.#peers[action.peer]!.send(action.message);
          break;
        case 'create':
          this.#peers[action.peer]!.create(action.incarnation, action.state);
          break;
        case 'reconnect':
          this.#peers[action.peer]!.reconnect(action.reason);
          break;
        case 'stream':
          this.#pump(); // Another one may have waited for this one's WAL.
          break;
        case 'leading': {
          const startLsn = formatLsn(action.startLsn);
          this.#options.log?.info({ term: action.term, startLsn }, 'election won');
          this.#buffer = new WalBuffer(action.startLsn);
          break;
        }
        case 'retry':
          this.#options.log?.info({ reason: action.reason }, 'a new election is needed');
          if (this.#closing !== undefined) break;
          this.#retryTimer = setTimeout(
            () => this.#perform(this.#state.elect()),
            RETRY_MIN_MS + Math.random() * RETRY_SPREAD_MS * 2 ** Math.min(this.#retryCount++, MAX_RETRY_DOUBLINGS),
          );
          break;
        case 'added':
          this.#peers[action.peer] = this.#newPeer(action.peer);
          this.#eager = this.#chooseEager();
          break;
        case 'removed':
          void this.#peers[action.peer]!.close(0);
          this.#eager = this.#chooseEager();
          break;
        case 'settled':
          this.#options.log?.info({ version: action.version }, 'the configuration is settled');
          this.#safekeepers.settled(this.#options.timeline.timelineId, action.version);
          break;
        case 'committed':
          this.#committed(action.lsn);
          break;
        case 'fenced':
          this.#fencedBy(action.term);
          break;
      }
    }
  }

  #newPeer(index: number): ProposerPeer {
    const { token, timeline, yieldsToLeader, log } = this.#options;
    return new ProposerPeer({
      index,
      address: this.#addressOf(index),
      token,
      timeline,
      yieldsToLeader: yieldsToLeader ?? false,
      stallMs: this.#stallMs,
      state: this.#state,
      buffer: () => this.#buffer,
      mayBegin: () => this.#mayBegin(index),
      perform: (actions) => this.#perform(actions),
      addressOf: (peer) => this.#addressOf(peer),
      onAcknowledged: () => this.#acknowledged(),
      onFeedback: (told) => {
        const { ingestedLsn, remoteLsn } = this.#feedback ?? told;
        // Each safekeeper tells what it heard last; the newest is the highest.
        this.#feedback = {
          ingestedLsn: Math.max(told.ingestedLsn, ingestedLsn),
          remoteLsn: Math.max(told.remoteLsn, remoteLsn),
        };
      },
      onRefused: () => this.#checkRefusals(),
      log,
    });
  }

  #addressOf(index: number): SafekeeperAddress {
    const { nodeId } = this.#state.peer(index);
    const address = this.#safekeepers.current.addresses.get(nodeId);
    assert(
      address !== undefined,
      `safekeeper ${nodeId} of configuration ${this.#state.configuration.version} has an address`,
    );
    return address;
  }

  #chooseEager(): EagerPeers {
    const indexes = Array.from({ length: this.#state.peerCount }, (_, index) => index);
    this.#active = indexes.filter((index) => !this.#state.peer(index).isGone);
    return new EagerPeers(this.#active.length, Number.parseInt(this.#options.timeline.timelineId.slice(-4), 16));
  }

  /** All of them while the members change. */
  #isEager(index: number): boolean {
    return this.#state.configuration.newMembers !== undefined || this.#eager.has(this.#active.indexOf(index));
  }

  /** In a round, also when it began while this one was still busy with the last, of which others had made a quorum. */
  #mayBegin(index: number): boolean {
    return this.#isEager(index) && (this.#isBeginning || this.#state.peer(index).sendLsn < this.#roundEndLsn);
  }

  /** Once for all that has come from Postgres and from safekeepers by now. */
  #schedulePump(): void {
    if (this.#pumpScheduled) return;
    this.#pumpScheduled = true;
    setImmediate(() => {
      this.#pumpScheduled = false;
      this.#pump();
    });
  }

  /**
   * Small appends go to the eager safekeepers in rounds: the next one begins when a quorum has the last. A commit needs them all anyway, and one that was
   * ahead would only make more messages, writes and commits of the same WAL.
   */
  #pump(): void {
    this.#isBeginning = !this.#isRoundUnderWay;
    if (this.#isBeginning) {
      this.#roundBeganAtMs = performance.now();
      this.#roundEndLsn = this.endLsn;
    }
    for (const peer of this.#peers) peer.pump();
    this.#isBeginning = false;
    this.#startPause();
  }

  get #isRoundUnderWay(): boolean {
    return this.#state.quorumWrittenLsn < this.#roundEndLsn;
  }

  #startPause(): void {
    this.#pauseTimer ??= setTimeout(() => {
      this.#pauseTimer = undefined;
      this.#pauseOver();
    }, PAUSE_MS);
  }

  /** Who is not eager gets what came since, when it is time, when nothing more comes, or when a commit needs it. */
  #pauseOver(): void {
    const nowMs = performance.now();
    const isLate = this.#isRoundUnderWay && nowMs - this.#roundBeganAtMs >= LATE_ROUND_MS;
    const isQuiet = this.endLsn === this.#pauseEndLsn;
    const isDue = isQuiet || isLate || nowMs - this.#heldBackAtMs >= HOLD_BACK_MS;
    if (isDue) this.#heldBackAtMs = nowMs;
    this.#pauseEndLsn = this.endLsn;
    this.#eager.choose((place) => this.#peers[this.#active[place]!]!.isPrompt);
    let isMoreToSay = false;
    for (const peer of this.#peers) {
      const maySend = isLate || (isDue && !this.#isEager(peer.index));
      if (peer.catchUp(maySend, isQuiet)) isMoreToSay = true;
    }
    if (isMoreToSay && this.#closing === undefined && !this.fenced) this.#startPause();
  }

  #committed(lsn: Lsn): void {
    if (this.#settleElection !== undefined) {
      this.#settleElection.resolve();
      this.#settleElection = undefined;
    }
    for (const waiter of this.#waiters) if (waiter.lsn <= lsn) waiter.resolve();
    this.emit('commit', lsn);
    const ackedByAll = Math.min(...this.#active.map((index) => this.#state.peer(index).ackedLsn));
    const keptLsn = Math.max(ackedByAll, lsn - (this.#options.retainedBytes ?? RETAINED_BYTES));
    this.#buffer.trim(Math.min(lsn, keptLsn), ackedByAll);
    this.#startPause();
    this.#schedulePump(); // One that recovers may find a source now.
  }

  #pendingBytes(): number {
    return this.#buffer.endLsn - this.#state.quorumWrittenLsn;
  }

  /** A safekeeper has taken WAL in. */
  #acknowledged(): void {
    this.#schedulePump();
    if (!this.#full || this.#pendingBytes() >= this.#maxPendingBytes / 2) return;
    this.#full = false;
    this.emit('drain');
  }

  #fencedBy(term: number): void {
    this.#options.log?.warn({ term: this.term, higherTerm: term }, 'another proposer leads: fenced');
    this.#stop();
    for (const peer of this.#peers) void peer.close(0);
    const error = this.#fencedError();
    for (const waiter of this.#waiters) waiter.reject(error);
    this.emit('fenced', term);
  }

  #fencedError(): StrataError {
    return new StrataError('conflict', `another proposer leads timeline ${this.#options.timeline.timelineId}`);
  }

  /** Trying again cannot help when so many refuse for good that no quorum is left. */
  #checkRefusals(): void {
    const refused = this.#peers.find((peer) => peer.isRefused);
    if (this.#settleElection === undefined || refused === undefined) return;
    if (this.#state.isQuorum((index) => !this.#peers[index]!.isRefused)) return;
    this.#settleElection.reject(refused.lastError!);
    this.#settleElection = undefined;
    void this.close();
  }
}

function closedError(why = ''): StrataError {
  return new StrataError('unavailable', `the proposer was closed${why}`);
}
