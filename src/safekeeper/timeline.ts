/**
 * One timeline of a safekeeper: the acceptor (consensus/acceptor.ts) with its disk and its connections.
 *
 * An idle timeline is this object with its last known control file: no open file, no timer. The first proposer opens it, which finds the end
 * of its WAL; when the last one leaves, its file is closed and its commit LSN saved.
 *
 * After an I/O error nothing more is acknowledged and nobody is served, until the disk works again (#ioFailed), or turns out to be empty (main.ts). WAL that was acknowledged and is damaged at a
 * start costs the timeline its vote until others have healed it (flush-mark.ts).
 */
import { open, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { Logger } from '../base/log.ts';
import { StrataError } from '../base/errors.ts';
import type { PageserverFeedback, SafekeeperTimelineStatus, TimelineIdentity } from '../api/safekeeper.ts';
import { Acceptor, type AcceptorAction, type AcceptorState, type BoundaryTracker } from '../consensus/acceptor.ts';
import type { AcceptorMessage, ProposerMessage, TermHistory } from '../consensus/messages.ts';
import type { AcceptorGreeting } from '../consensus/proposer.ts';
import { compareLogs, hasReached, historyUpTo, lastLogTerm, type LogPosition } from '../consensus/term-history.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import { WalBoundaryTracker } from '../postgres/wal/boundary-tracker.ts';
import { CONTROL_FILE_NAME, writeControlFile } from './control-file.ts';
import { FLUSH_MARK_NAME, FlushMark } from './flush-mark.ts';
import type { KeptWal } from './kept-wal.ts';
import type { OffloadedWal } from './offloaded-wal.ts';
import { EXTENT_FILE_NAME } from './wal-extent.ts';
import { WalStore } from './wal-store.ts';

/** A proposer's connection, as the timeline needs it. */
export interface ProposerLink {
  send(message: AcceptorMessage): void;
  tell(feedback: PageserverFeedback): void;
  fail(error: StrataError): void;
}

/** WAL that waits for the disk; beyond it connections are paused. */
const MAX_UNWRITTEN_BYTES = 8 * 1024 * 1024;
/** Messages that wait for the disk; likewise. */
const MAX_WAITING = 64;
const REVIVE_MIN_MS = 1_000;
const REVIVE_MAX_MS = 30_000;
/** What must be writable before a timeline whose disk was full is served again. */
const ROOM_BYTES = 4 * 1024 * 1024;

export class Timeline {
  readonly identity: TimelineIdentity;
  readonly directory: string;
  readonly kept: KeptWal;
  /** Where WAL is that is not here any more; undefined without an object store. */
  readonly offloadedWal: OffloadedWal | undefined;
  readonly #nodeId: number;
  readonly #store: WalStore;
  readonly #mark: FlushMark;
  readonly #log: Logger;
  readonly #onProgress: (timeline: Timeline) => void;
  readonly #onLost: () => void;
  readonly #links = new Set<ProposerLink>();
  readonly #progressListeners = new Set<() => void>();
  /** Called when something that was written is durable. */
  readonly #ioWaiters: (() => void)[] = [];
  readonly #writableWaiters: (() => void)[] = [];
  #state: AcceptorState;
  #savedCommitLsn: Lsn;
  #acceptor: Acceptor<ProposerLink> | undefined;
  /** Who introduced itself as the leader last. */
  #leader: ProposerLink | undefined;
  #opening: Promise<void> | undefined;
  #failure: StrataError | undefined;
  #isDamaged = false;
  #isDeleted = false;
  /** Nothing of it touches its folder any more, which may be another log's. */
  #isOver = false;
  /** What was missing of the log when it was opened. */
  #loss: string | undefined;
  #reviveTimer: NodeJS.Timeout | undefined;
  #reviving: Promise<void> | undefined;
  /** Where the log is being cut, or was when that failed. */
  #cutLsn: Lsn | undefined;
  #markedLsn: Lsn = 0;

  constructor(options: {
    /** Of the safekeeper. */
    readonly nodeId: number;
    readonly directory: string;
    readonly identity: TimelineIdentity;
    readonly state: AcceptorState;
    readonly kept: KeptWal;
    readonly offloadedWal: OffloadedWal | undefined;
    /** Made just now: there is no WAL to look for. */
    readonly isNew: boolean;
    readonly log: Logger;
    readonly onProgress: (timeline: Timeline) => void;
    /** Its files are gone from the disk. */
    readonly onLost: () => void;
  }) {
    this.#nodeId = options.nodeId;
    this.directory = options.directory;
    this.identity = options.identity;
    this.kept = options.kept;
    this.offloadedWal = options.offloadedWal;
    this.#state = options.state;
    this.#savedCommitLsn = options.state.commitLsn;
    this.#onProgress = options.onProgress;
    this.#onLost = options.onLost;
    this.#log = options.log.child({ timelineId: options.identity.timelineId });
    this.#mark = new FlushMark(options.directory, (error) => this.#log.warn({ err: error }, 'the flush mark failed'));
    this.#store = new WalStore(options.directory, options.identity, options.kept.logStartLsn);
    if (options.isNew) this.#opening = Promise.resolve(this.#opened(options.state.commitLsn));
  }

  get term(): number {
    return this.#acceptor?.term ?? this.#state.term;
  }

  get commitLsn(): Lsn {
    return this.#acceptor?.commitLsn ?? this.#state.commitLsn;
  }

  /** Before the timeline was opened: a lower bound. */
  get flushLsn(): Lsn {
    return this.#acceptor?.flushLsn ?? this.#state.commitLsn;
  }

  /** As the control file has it: from here a start looks for the end of the log. */
  get savedCommitLsn(): Lsn {
    return Math.min(this.#savedCommitLsn, this.commitLsn);
  }

  get history(): TermHistory {
    return this.#acceptor?.history ?? this.#state.history;
  }

  /** Why it is not served; undefined as a rule. */
  get failure(): StrataError | undefined {
    return this.#failure;
  }

  get isFailed(): boolean {
    return this.#failure !== undefined;
  }

  get isDeleted(): boolean {
    return this.#isDeleted;
  }

  /** What is wrong with what is on the disk, until others have healed it. */
  get damage(): string | undefined {
    if (this.#isDamaged) return this.#failure?.message;
    return this.#acceptor?.isVoter === true ? undefined : this.#loss;
  }

  /** What is on the disk is not a log with which it can be opened. */
  get isDamaged(): boolean {
    return this.#isDamaged;
  }

  /** See Acceptor.leaderTerm. */
  get leaderTerm(): number | undefined {
    return this.#acceptor?.leaderTerm;
  }

  /** What a proposer is told. The timeline must be open. */
  get greeting(): AcceptorGreeting {
    const { term, generation, configuration, isBlank } = this.#acceptor!;
    return { term, generation, configuration, isBlank };
  }

  /** A proposer whose log this is, is connected. */
  get hasLeader(): boolean {
    return this.#leader !== undefined && this.#links.has(this.#leader) && this.leaderTerm !== undefined;
  }

  get status(): SafekeeperTimelineStatus {
    const isVoter = this.#acceptor?.isVoter ?? false;
    const { votesFrom } = this.#state;
    return {
      ...this.identity,
      term: this.term,
      generation: this.#acceptor?.generation ?? this.#state.generation,
      configuration: this.#acceptor?.configuration ?? this.#state.configuration,
      lastLogTerm: lastLogTerm(this.#acceptor?.history ?? this.#state.history, this.flushLsn),
      history: historyUpTo(this.history, this.flushLsn),
      flushLsn: this.flushLsn,
      commitLsn: this.commitLsn,
      localStartLsn: this.kept.localStartLsn,
      offloadedLsn: this.kept.offloadedLsn,
      isVoter,
      ...(isVoter || votesFrom === undefined ? {} : { votesFrom }),
      hasLeader: this.hasLeader,
      proposerCount: this.#links.size,
    };
  }

  /** Finds the end of the WAL, once. Rejects for ever after a failure. */
  async open(): Promise<void> {
    if (this.#isOver) this.throwIfFailed();
    this.#opening ??= this.#recover();
    await this.#opening;
    this.throwIfFailed();
  }

  throwIfFailed(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  /** The timeline must be open. */
  attach(link: ProposerLink): void {
    this.#links.add(link);
  }

  detach(link: ProposerLink): void {
    if (!this.#links.delete(link)) return;
    this.#acceptor?.forget(link);
    if (this.#links.size === 0 && this.#failure === undefined)
      this.#rest().catch((error: unknown) => this.#ioFailed(error));
  }

  /** From an attached link. False: `onWritable` tells when to go on. */
  receive(link: ProposerLink, message: ProposerMessage): boolean {
    this.throwIfFailed();
    const acceptor = this.#acceptor!;
    if (message.kind === 'elected') this.#leader = link;
    this.#perform(acceptor.receive(link, message));
    return hasRoom(acceptor);
  }

  /** The pageserver has told how far it has got. */
  told(feedback: PageserverFeedback): void {
    this.kept.feedback = feedback;
    for (const link of this.#links) link.tell(feedback);
  }

  onWritable(callback: () => void): void {
    this.#writableWaiters.push(callback);
  }

  /** Calls back each time that flushLsn, commitLsn or the term changes, until the returned function is called. */
  listen(callback: () => void): () => void {
    this.#progressListeners.add(callback);
    return () => this.#progressListeners.delete(callback);
  }

  /**
   * Writes the commit LSN down, so that a start need not search from far behind. Resolves when that is durable. Who wrote what is in the object store, which
   * says it too (offloaded-segment.ts), is forgotten: a branch may wake thousands of times.
   */
  async save(): Promise<void> {
    const acceptor = this.#acceptor;
    if (this.#failure !== undefined || acceptor === undefined) return;
    acceptor.prune(Math.min(this.kept.offloadedLsn, acceptor.commitLsn));
    const { commitLsn } = acceptor;
    this.#perform(acceptor.save());
    await this.#when(() => acceptor.isIdle || this.#savedCommitLsn >= commitLsn);
  }

  /** Replaces the timeline by a tombstone; durable when it resolves. Repeatable after a crash. */
  async delete(): Promise<void> {
    const { tenantId, timelineId } = this.identity;
    this.#isDeleted = true;
    await this.#end(new StrataError('not-found', `timeline ${timelineId} was deleted`));
    await writeControlFile(this.directory, { kind: 'deleted', tenantId, timelineId });
    await this.#store.remove();
    for (const name of [FLUSH_MARK_NAME, EXTENT_FILE_NAME]) await rm(join(this.directory, name), { force: true });
  }

  /** Ends it as if it were not here; its files stay. */
  async retire(): Promise<void> {
    await this.#end(new StrataError('unavailable', `timeline ${this.identity.timelineId} is being rebuilt`));
  }

  /** Nobody is connected any more. */
  async close(): Promise<void> {
    await this.#opening?.catch(() => {});
    await this.save();
    await this.#whenIdle();
    this.#isOver = true;
    await this.#release();
  }

  /** It is told to all who use it, whatever failed before. When it resolves, its folder is left alone. */
  async #end(reason: StrataError): Promise<void> {
    await this.#opening?.catch(() => {});
    await this.#whenIdle();
    this.#isOver = true;
    this.#failure = undefined;
    this.#fail(reason);
    await this.#release();
    await this.kept.close();
  }

  async #release(): Promise<void> {
    clearTimeout(this.#reviveTimer);
    await this.#reviving;
    await this.#releaseMark();
    await this.#store.release();
  }

  async #releaseMark(): Promise<void> {
    await this.#mark.release().catch(() => {}); // It only says less than it could.
  }

  async #recover(): Promise<void> {
    try {
      const mark = await this.#mark.read();
      const { commitLsn, history } = this.#state;
      const isLoss = (endLsn: Lsn): boolean => mark !== undefined && !hasReached(history, endLsn, mark);
      const flushLsn = await this.#store.recover(commitLsn, isLoss);
      if (mark !== undefined && isLoss(flushLsn)) this.#noteLoss(flushLsn, mark);
      // A control file that was renamed just before a kill may not be durable yet; what follows relies on it.
      await this.#writeControl();
      await this.#store.release(); // Who only asks for its status writes nothing.
      this.#opened(flushLsn);
    } catch (error) {
      this.#isDamaged = (error as NodeJS.ErrnoException).code === undefined;
      this.#ioFailed(error);
    }
  }

  /** A log that ends before what it had acknowledged is damaged: it gives no vote before others have brought it back there. */
  #noteLoss(flushLsn: Lsn, mark: LogPosition): void {
    const state = this.#state;
    const [ends, was] = [formatLsn(flushLsn), formatLsn(mark.flushLsn)];
    this.#loss = `it ends at ${ends}, before ${was}, up to which it had been acknowledged`;
    this.#log.error(
      { ends, acknowledged: was },
      'the WAL on this disk is damaged: it ends before what was acknowledged. It does not vote before others have healed it',
    );
    const { votesFrom } = state;
    if (votesFrom === undefined || compareLogs(mark, votesFrom) > 0) this.#state = { ...state, votesFrom: mark };
  }

  async #writeControl(): Promise<void> {
    const acceptor = this.#state;
    await writeControlFile(this.directory, { kind: 'timeline', identity: this.identity, acceptor });
    this.#savedCommitLsn = acceptor.commitLsn;
  }

  #opened(flushLsn: Lsn): void {
    const state = this.#state;
    this.#acceptor = new Acceptor({
      nodeId: this.#nodeId,
      state,
      flushLsn,
      trackBoundaries: (startLsn) => new Boundaries(startLsn),
    });
    const term = lastLogTerm(state.history, flushLsn);
    this.#log.debug({ term, commitLsn: formatLsn(state.commitLsn), flushLsn: formatLsn(flushLsn) }, 'opened');
  }

  async #rest(): Promise<void> {
    await this.save();
    await this.#whenIdle();
    if (this.#links.size > 0 || this.#acceptor?.isIdle !== true) return;
    this.#acceptor.rest();
    // The file at once, as nobody writes to it now: a leader that comes back meanwhile opens it anew.
    await Promise.all([this.#store.release(), this.#releaseMark()]);
  }

  #perform(actions: readonly AcceptorAction<ProposerLink>[]): void {
    for (const action of actions) {
      switch (action.kind) {
        case 'write':
          this.#write(action.beginLsn, action.chunks);
          break;
        case 'send':
          action.to.send(action.message);
          break;
        case 'progress':
          this.#progressed();
          break;
        case 'truncate':
          this.#log.info({ lsn: formatLsn(action.lsn) }, 'cutting WAL that another leader has not got');
          this.#cutLsn = action.lsn;
          this.#io(this.#cut(action.lsn).then(() => (this.#cutLsn = undefined)));
          break;
        case 'persist':
          this.#state = action.state;
          this.#io(this.#writeControl());
          break;
        case 'term-raised':
          for (const link of this.#links) {
            if (link !== action.by) link.send({ kind: 'term-notice', term: action.term });
          }
          this.#progressed(); // Readers for the old term have to end.
          break;
      }
    }
  }

  #write(lsn: Lsn, chunks: readonly Buffer[]): void {
    let writing: Promise<void> | undefined;
    try {
      writing = this.#store.write(lsn, chunks);
    } catch (error) {
      this.#ioFailed(error);
      return;
    }
    if (writing === undefined) this.#ioDone();
    else this.#io(writing);
  }

  #io(operation: Promise<unknown>): void {
    operation.then(
      () => this.#ioDone(),
      (error: unknown) => this.#ioFailed(error),
    );
  }

  #ioDone(): void {
    if (this.#failure !== undefined) return;
    const acceptor = this.#acceptor!;
    this.#perform(acceptor.completed());
    if (hasRoom(acceptor)) this.#wake(this.#writableWaiters);
    if (this.#ioWaiters.length > 0) this.#wake(this.#ioWaiters);
  }

  async #cut(lsn: Lsn): Promise<void> {
    const { history } = this.#acceptor!;
    await this.#mark.lower({ lastLogTerm: lastLogTerm(history, lsn), flushLsn: lsn });
    await this.#store.truncate(lsn);
  }

  #progressed(): void {
    const acceptor = this.#acceptor;
    if (acceptor !== undefined && acceptor.flushLsn !== this.#markedLsn) {
      this.#markedLsn = acceptor.flushLsn;
      this.#mark.note({ lastLogTerm: acceptor.lastLogTerm, flushLsn: acceptor.flushLsn });
    }
    this.#onProgress(this);
    for (const callback of this.#progressListeners) callback();
  }

  /**
   * After a failed write or fsync nobody knows what the disk holds after what was acknowledged. What was, is there: it was written through. So the timeline
   * comes back, when the disk works again, as from a restart that ended its log there, or where it was being cut.
   */
  #ioFailed(error: unknown): void {
    const { code } = (error ?? {}) as NodeJS.ErrnoException;
    const reason = error instanceof Error ? error.message : String(error);
    const { timelineId } = this.identity;
    if (code === undefined) {
      // Not the disk's refusal, but what is on it.
      this.#log.error(
        { err: error },
        'the timeline is out of order until others have healed it, or the safekeeper is restarted',
      );
      this.#fail(new StrataError('internal', `timeline ${timelineId} is out of order: ${reason}`, { cause: error }));
      return;
    }
    const isFull = code === 'ENOSPC' || code === 'EDQUOT';
    const what = isFull ? 'the disk is full' : 'the disk failed';
    this.#log.error({ err: error }, `${what}: the timeline is not served until it works again`);
    this.#fail(new StrataError('unavailable', `timeline ${timelineId}: ${what}: ${reason}`, { cause: error }));
    this.#scheduleRevival(REVIVE_MIN_MS);
  }

  #scheduleRevival(delayMs: number): void {
    clearTimeout(this.#reviveTimer);
    if (this.#isOver) return;
    this.#reviveTimer = setTimeout(() => {
      this.#reviving = this.#revive().catch(async (error: unknown) => {
        if (await this.#isLost()) {
          this.#onLost();
          return;
        }
        this.#log.debug({ err: error }, 'the disk does not work yet');
        this.#scheduleRevival(Math.min(2 * delayMs, REVIVE_MAX_MS));
      });
    }, delayMs);
    this.#reviveTimer.unref();
  }

  async #revive(): Promise<void> {
    await assertRoom(this.directory);
    if (this.#isOver) return;
    const acceptor = this.#acceptor;
    if (acceptor === undefined) {
      this.#opening = undefined; // It was the opening that failed: the next one tries again.
    } else {
      // A cut that failed may have taken some of what it was to take: it is made whole.
      const endLsn = this.#cutLsn ?? acceptor.flushLsn;
      if (this.#cutLsn === undefined) await this.#store.truncate(endLsn);
      else await this.#cut(endLsn);
      await this.#writeControl();
      if (this.#isOver) return;
      this.#cutLsn = undefined;
      this.#opened(endLsn);
    }
    this.#failure = undefined;
    this.#log.info({ flushLsn: formatLsn(this.flushLsn) }, 'the disk works again');
    this.#progressed();
  }

  async #isLost(): Promise<boolean> {
    const found = await stat(join(this.directory, CONTROL_FILE_NAME)).catch((error: NodeJS.ErrnoException) => error);
    return found instanceof Error && found.code === 'ENOENT' && !this.#isOver;
  }

  #fail(failure: StrataError): void {
    this.#failure ??= failure;
    for (const link of this.#links) link.fail(failure);
    for (const callback of this.#progressListeners) callback();
    this.#wake(this.#writableWaiters);
    this.#wake(this.#ioWaiters);
  }

  #whenIdle(): Promise<void> {
    return this.#when(() => this.#acceptor?.isIdle ?? true);
  }

  /** Or when it has failed. */
  async #when(isSo: () => boolean): Promise<void> {
    while (this.#failure === undefined && !isSo()) {
      await new Promise<void>((resolve) => this.#ioWaiters.push(resolve));
    }
  }

  #wake(waiters: (() => void)[]): void {
    for (const wake of waiters.splice(0)) wake();
  }
}

/** For more from proposers: what has come and waits for the disk is bounded. */
function hasRoom(acceptor: Acceptor<ProposerLink>): boolean {
  return acceptor.unwrittenBytes < MAX_UNWRITTEN_BYTES && acceptor.waitingCount < MAX_WAITING;
}

/** Throws the disk's error when a little more than nothing cannot be written. */
async function assertRoom(directory: string): Promise<void> {
  const path = join(directory, 'room.partial');
  try {
    const file = await open(path, 'w', 0o600);
    try {
      await file.write(Buffer.alloc(ROOM_BYTES, 1));
      await file.sync();
    } finally {
      await file.close();
    }
  } finally {
    await rm(path, { force: true });
  }
}

class Boundaries implements BoundaryTracker {
  readonly #tracker: WalBoundaryTracker;

  constructor(startLsn: Lsn) {
    this.#tracker = new WalBoundaryTracker(startLsn);
  }

  get boundaryLsn(): Lsn {
    return this.#tracker.endLsn;
  }

  push(_lsn: Lsn, bytes: Buffer): void {
    this.#tracker.push(bytes);
  }
}
