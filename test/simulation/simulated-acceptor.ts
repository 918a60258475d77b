/** One safekeeper of the simulation: the real acceptor on a simulated disk, which crashes and comes back. */
import { Acceptor, type AcceptorAction, type AcceptorState, blankState } from '../../src/consensus/acceptor.ts';
import { type Configuration, isMember, NO_CONFIGURATION } from '../../src/consensus/configuration.ts';
import type { AcceptorMessage, ProposerMessage, TermHistory, VoteReply } from '../../src/consensus/messages.ts';
import type { AcceptorGreeting } from '../../src/consensus/proposer.ts';
import { hasReached } from '../../src/consensus/term-history.ts';
import type { Invariants } from './invariants.ts';
import { boundaryFrom, findEnd, LOG_START, RecordBoundaries } from './log-records.ts';
import type { Random } from './random.ts';
import type { Scheduler } from './scheduler.ts';
import { SimulatedDisk } from './simulated-disk.ts';
import { describe, describeHistory, type Trace } from './trace.ts';

/** A mistake made on purpose, to see that the simulation finds it. */
export const BUGS = [
  'acknowledge-before-sync',
  'count-old-term-acks',
  'vote-without-persisting',
  'skip-truncation',
  'quorum-of-one',
  'reuse-of-term',
  'flush-inside-record',
  'lost-control-file-rename',
  'recreate-when-wiped',
  'vote-before-caught-up',
  'skip-joint-phase',
  'finish-before-settled',
  'count-new-set-only',
  'accept-older-configuration',
  'settle-unconfirmed',
  'give-without-renewing',
  'remove-unsaved',
  'begin-past-commit',
  'prune-at-commit',
] as const;

export type Bug = (typeof BUGS)[number];

export type ToAcceptor =
  | { readonly kind: 'greeting' }
  | { readonly kind: 'create'; readonly incarnation: string; readonly state: AcceptorState }
  | { readonly kind: 'read'; readonly fromLsn: number; readonly term: number }
  /** Where may a log begin that is given anew? */
  | { readonly kind: 'resume' }
  | ProposerMessage;

export type FromAcceptor =
  | ({ readonly kind: 'greeting-reply' } & AcceptorGreeting)
  /** There is no log here. */
  | { readonly kind: 'absent'; readonly incarnation: string }
  | { readonly kind: 'read-reply'; readonly term: number; readonly lsn: number; readonly bytes: Buffer }
  | { readonly kind: 'resume-reply'; readonly lsn: number }
  /** To a read: there is no log here. A proposer of the world learns it when its connection breaks. */
  | { readonly kind: 'read-refusal' }
  /** A vote-reply brings the log that is voted with, which a real compute gets from the pageserver. */
  | (VoteReply & { readonly image?: Buffer })
  | Exclude<AcceptorMessage, VoteReply>;

/** Old WAL is removed in pieces of so much. */
const SEGMENT_BYTES = 256;
const MAX_IO_MS = 8;
const READ_BYTES = 120;

export interface AcceptorWorld {
  readonly scheduler: Scheduler;
  readonly random: Random;
  readonly invariants: Invariants;
  readonly bug: Bug | undefined;
  readonly trace: Trace;
  /** What acceptors have brought to the object store; `[0]` is at LOG_START. It is all committed. */
  readonly offloaded: Buffer;
  reply(from: SimulatedAcceptor, to: string, message: FromAcceptor): void;
  /** Connections that were greeted here and may still be there. */
  connectionsOf(acceptor: SimulatedAcceptor): Iterable<string>;
  /** It is given a log that begins after LOG_START. */
  lateLog(acceptor: SimulatedAcceptor): void;
}

export class SimulatedAcceptor {
  readonly index: number;
  readonly disk: SimulatedDisk;
  readonly #name: string;
  readonly #world: AcceptorWorld;
  #acceptor: Acceptor<string> | undefined;
  #isUp = false;
  #isCreating = false;
  #wasWiped = false;
  /** Completions of I/O that belong to an earlier life are ignored. */
  #life = 0;

  constructor(index: number, world: AcceptorWorld) {
    this.index = index;
    this.#name = `a${index}`;
    this.#world = world;
    this.disk = new SimulatedDisk(world.random);
    this.start();
  }

  get isUp(): boolean {
    return this.#isUp;
  }

  /** Has all that it ever acknowledged, or what makes up for it, and would have it after a power cut: it votes. */
  get isWhole(): boolean {
    const state = this.disk.durableState;
    if (state === undefined || this.#acceptor?.isVoter === false) return false;
    const { history, votesFrom, configuration, commitLsn } = state;
    const flushLsn =
      this.#acceptor?.flushLsn ?? findEnd(this.disk.visible, commitLsn, LOG_START + this.disk.visible.length).endLsn;
    const isComplete = votesFrom === undefined || hasReached(history, flushLsn, votesFrom);
    return isMember(configuration, this.index) && isComplete;
  }

  /** Of the log, with what the object store has of it where this disk has it not. */
  image(endLsn: number): Buffer {
    const image = Buffer.from(this.disk.visible.subarray(0, endLsn - LOG_START));
    this.#world.offloaded.copy(image, 0, 0, Math.min(image.length, this.disk.startLsn - LOG_START));
    return image;
  }

  get history(): TermHistory {
    return this.#acceptor!.history;
  }

  /** As safekeeper/wal-cursor.ts has it. Undefined when it cannot be told. */
  get resumePoint(): number | undefined {
    const acceptor = this.#acceptor;
    if (acceptor === undefined) return undefined;
    if (this.#world.bug === 'begin-past-commit') return acceptor.flushLsn;
    return boundaryFrom(this.image(acceptor.commitLsn), this.disk.startLsn, acceptor.commitLsn);
  }

  get hasLog(): boolean {
    return this.#acceptor !== undefined;
  }

  /** Names this life of the process. */
  get incarnation(): string {
    return `${this.index}.${this.#life}`;
  }

  get flushLsn(): number {
    return this.#acceptor?.flushLsn ?? 0;
  }

  get commitLsn(): number {
    return this.#acceptor?.commitLsn ?? 0;
  }

  start(): void {
    const { bug, invariants } = this.#world;
    this.#isUp = true;
    this.#isCreating = false;
    let { state } = this.disk;
    if (state === undefined && this.#wasWiped && bug === 'recreate-when-wiped') state = blankState(LOG_START);
    if (state === undefined) {
      this.#world.trace(this.#name, () => 'starts without a log');
      return;
    }
    const { endLsn } = findEnd(this.disk.visible, state.commitLsn, LOG_START + this.disk.visible.length);
    this.disk.settle(endLsn);
    this.#acceptor = new Acceptor({
      nodeId: this.index,
      state,
      flushLsn: endLsn,
      trackBoundaries: (startLsn) =>
        bug === 'flush-inside-record' ? new EveryByteABoundary(startLsn) : new RecordBoundaries(startLsn),
    });
    const found = state;
    this.#world.trace(this.#name, () => `starts: ${describeLog(found, endLsn)}`);
    invariants.restarted(this.index, endLsn);
    invariants.committedOn(this.index, this.disk.visible, this.disk.startLsn, state.commitLsn);
  }

  /** Brings what is committed to the object store and removes it here, as safekeeper/kept-wal.ts does: below the commit LSN as it is written down. */
  removeOld(random: Random): void {
    const acceptor = this.#acceptor;
    if (acceptor === undefined) return;
    const { disk } = this;
    const savedLsn = this.#world.bug === 'remove-unsaved' ? acceptor.commitLsn : disk.durableState!.commitLsn;
    const keptBytes = random.pick([0, 0, 500, 4_000]);
    const lsn = SEGMENT_BYTES * Math.floor(Math.max(LOG_START, savedLsn - keptBytes) / SEGMENT_BYTES);
    if (lsn <= disk.startLsn) return;
    this.#world.trace(this.#name, () => `removes its log before ${lsn}`);
    this.offload(lsn);
    disk.removeBefore(lsn);
  }

  /** Forgets who wrote what is committed. */
  prune(): void {
    const acceptor = this.#acceptor;
    if (acceptor === undefined) return;
    // With the bug, as if the entry that begins at the commit LSN had a committed byte.
    acceptor.prune(acceptor.commitLsn + (this.#world.bug === 'prune-at-commit' ? 1 : 0));
  }

  /** What is committed below there is in the object store afterwards. */
  offload(lsn: number): void {
    const { startLsn, visible } = this.disk;
    this.#world.invariants.committedOn(this.index, visible, startLsn, lsn);
    visible.copy(this.#world.offloaded, startLsn - LOG_START, startLsn - LOG_START, lsn - LOG_START);
  }

  crash(isPowerCut: boolean): void {
    this.#world.trace(this.#name, () => (isPowerCut ? 'loses power' : 'is killed'));
    this.#acceptor = undefined;
    this.#isUp = false;
    this.#life++;
    if (isPowerCut) this.disk.cutPower();
    else this.disk.kill();
  }

  /** The disk is lost. The acceptor must be down. */
  wipe(): void {
    this.#world.trace(this.#name, () => 'loses its disk');
    this.#wasWiped = true;
    this.disk.wipe();
    this.#world.invariants.wiped(this.index);
  }

  /** From who changes the membership: an empty log, if there is none and if this is still the life that was asked. */
  give(incarnation: string, state: AcceptorState): void {
    if (this.#isUp && this.#acceptor === undefined && incarnation === this.incarnation) this.#create(undefined, state);
  }

  deliver(connection: string, message: ToAcceptor): void {
    if (!this.#isUp) return;
    this.#world.trace(this.#name, () => `hears ${connection}: ${describe(message)}`);
    const acceptor = this.#acceptor;
    if (acceptor === undefined) {
      if (message.kind === 'greeting') {
        this.#world.reply(this, connection, { kind: 'absent', incarnation: this.incarnation });
      } else if (message.kind === 'create' && message.incarnation === this.incarnation) {
        this.#create(connection, message.state);
      } else if (message.kind === 'read') {
        this.#world.reply(this, connection, { kind: 'read-refusal' });
      }
    } else if (message.kind === 'greeting' || message.kind === 'create') {
      this.#greet(acceptor, connection);
    } else if (message.kind === 'resume') {
      const { resumePoint: lsn } = this;
      if (lsn === undefined) return;
      this.offload(Math.min(lsn, acceptor.commitLsn)); // The pageserver and the object store have it, or nobody needs it.
      this.#world.reply(this, connection, { kind: 'resume-reply', lsn });
    } else if (message.kind === 'read') {
      if (acceptor.leaderTerm !== message.term || message.fromLsn >= acceptor.flushLsn) return;
      const from = message.fromLsn - LOG_START;
      const isHere = message.fromLsn >= this.disk.startLsn;
      const endLsn = isHere ? acceptor.flushLsn : this.disk.startLsn;
      const source = isHere ? this.disk.visible : this.#world.offloaded;
      const bytes = Buffer.from(source.subarray(from, Math.min(from + READ_BYTES, endLsn - LOG_START)));
      this.#world.reply(this, connection, { kind: 'read-reply', term: message.term, lsn: message.fromLsn, bytes });
    } else if (this.#world.bug === 'reuse-of-term' && message.kind === 'vote' && message.term === acceptor.term) {
      this.#voteAgain(acceptor, connection);
    } else if (this.#world.bug === 'accept-older-configuration' && message.kind === 'vote') {
      this.#perform(
        acceptor.receive(connection, { ...message, configuration: newer(message.configuration, acceptor) }),
      );
    } else {
      this.#perform(acceptor.receive(connection, message));
    }
  }

  save(): void {
    if (this.#acceptor !== undefined) this.#perform(this.#acceptor.save());
  }

  #greet(acceptor: Acceptor<string>, connection: string): void {
    const { term, generation, isBlank } = acceptor;
    const configuration = this.#told(acceptor.configuration);
    this.#world.reply(this, connection, { kind: 'greeting-reply', term, generation, configuration, isBlank });
  }

  #create(connection: string | undefined, told: AcceptorState): void {
    if (this.#isCreating) return;
    this.#isCreating = true;
    const { votesFrom, ...others } = told;
    const isRestricted = votesFrom !== undefined && this.#world.bug !== 'vote-before-caught-up';
    const state = isRestricted ? { ...others, votesFrom } : others;
    const life = this.#life;
    if (state.commitLsn > LOG_START) this.#world.lateLog(this);
    this.disk.removeBefore(state.commitLsn);
    this.disk.startPersist(state);
    this.#world.scheduler.after(this.#world.random.between(0, MAX_IO_MS), () => {
      if (this.#life !== life) return;
      this.disk.finishPersist(state);
      this.start();
      if (connection !== undefined) this.#greet(this.#acceptor!, connection);
    });
  }

  #perform(actions: readonly AcceptorAction<string>[]): void {
    const { invariants } = this.#world;
    for (const action of actions) {
      switch (action.kind) {
        case 'write': {
          const write = this.disk.write(action.beginLsn, action.chunks);
          this.#world.trace(this.#name, () => `writes [${action.beginLsn}, ${action.beginLsn + write.bytes.length})`);
          this.#io(() => this.disk.sync(write), 'acknowledge-before-sync');
          break;
        }
        case 'truncate': {
          this.#world.trace(this.#name, () => `cuts its log at ${action.lsn}`);
          invariants.truncated(this.index, action.lsn);
          const write = this.#world.bug === 'skip-truncation' ? undefined : this.disk.truncate(action.lsn);
          this.#io(() => write !== undefined && this.disk.sync(write));
          break;
        }
        case 'persist':
          if (this.#world.bug === 'vote-without-persisting' && action.state.term > this.disk.state!.term) {
            this.#complete();
            break;
          }
          this.#world.trace(this.#name, () => `writes its control file: ${describeState(action.state)}`);
          this.disk.startPersist(action.state);
          this.#io(() => {
            // Without an fsync of the folder the old file may be back after a power cut.
            if (this.#world.bug !== 'lost-control-file-rename') this.disk.finishPersist(action.state);
          });
          break;
        case 'send':
          if (action.message.kind === 'append-reply') invariants.acknowledged(this.index, action.message.flushLsn);
          if (action.message.kind === 'vote-reply' && action.message.granted) {
            invariants.voted(this.index, action.message.term, action.to);
          }
          this.#world.reply(this, action.to, this.#withImage(action.message));
          break;
        case 'term-raised':
          for (const connection of this.#world.connectionsOf(this)) {
            if (connection === action.by) continue;
            this.#world.reply(this, connection, { kind: 'term-notice', term: action.term });
          }
          break;
        case 'progress': {
          const acceptor = this.#acceptor!;
          invariants.check(acceptor.commitLsn <= acceptor.flushLsn, 'the commit LSN is not past the flush LSN');
          invariants.committedOn(this.index, this.disk.visible, this.disk.startLsn, acceptor.commitLsn);
          break;
        }
      }
    }
  }

  #withImage(message: AcceptorMessage): FromAcceptor {
    if (message.kind !== 'vote-reply') return message;
    const configuration = this.#told(message.configuration);
    return { ...message, configuration, image: this.image(message.flushLsn) };
  }

  #told(configuration: Configuration): Configuration {
    return this.#world.bug === 'accept-older-configuration' ? NO_CONFIGURATION : configuration;
  }

  #voteAgain(acceptor: Acceptor<string>, connection: string): void {
    const { term, flushLsn, commitLsn, history, generation, configuration } = acceptor;
    const position = { flushLsn, commitLsn, history };
    const reply: AcceptorMessage = {
      kind: 'vote-reply',
      term,
      granted: true,
      isVoter: true,
      generation,
      configuration,
      ...position,
    };
    this.#perform([{ kind: 'send', to: connection, message: reply }]);
  }

  #io(finish: () => void, earlyBug?: Bug): void {
    const life = this.#life;
    const isEarly = earlyBug !== undefined && this.#world.bug === earlyBug;
    this.#world.scheduler.after(this.#world.random.between(0, MAX_IO_MS), () => {
      if (this.#life !== life) return;
      finish();
      if (!isEarly) this.#complete();
    });
    if (isEarly) this.#complete();
  }

  #complete(): void {
    if (this.#acceptor !== undefined) this.#perform(this.#acceptor.completed());
  }
}

function newer(told: Configuration, { configuration }: Acceptor<string>): Configuration {
  return told.version > configuration.version ? told : configuration;
}

function describeLog(state: AcceptorState, endLsn: number): string {
  return `log to ${endLsn}, ${describeState(state)}`;
}

function describeState(state: AcceptorState): string {
  const { term, history, commitLsn, generation, configuration, votesFrom } = state;
  const voter = votesFrom === undefined ? '' : `, votes from ${votesFrom.flushLsn} of term ${votesFrom.lastLogTerm}`;
  return `term ${term}, generation ${generation}, configuration ${configuration.version}, committed ${commitLsn}, history ${describeHistory(history)}${voter}`;
}

class EveryByteABoundary {
  boundaryLsn: number;

  constructor(startLsn: number) {
    this.boundaryLsn = startLsn;
  }

  push(lsn: number, bytes: Buffer): void {
    this.boundaryLsn = lsn + bytes.length;
  }
}
