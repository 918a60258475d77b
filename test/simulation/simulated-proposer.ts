/** One proposer of the simulation: the real state machine with a memory for its log, and a Postgres that never stops writing records. */
import { type Configuration, quorumLsn } from '../../src/consensus/configuration.ts';
import type { AcceptorMessage, Elected, Renew, VoteRequest } from '../../src/consensus/messages.ts';
import { type ProposerAction, ProposerState } from '../../src/consensus/proposer.ts';
import { historyUpTo } from '../../src/consensus/term-history.ts';
import type { Invariants } from './invariants.ts';
import { findEnd, LOG_START, makeRecord } from './log-records.ts';
import type { Random } from './random.ts';
import type { Scheduler } from './scheduler.ts';
import type { Bug, FromAcceptor, ToAcceptor } from './simulated-acceptor.ts';
import { LOG_CAPACITY } from './simulated-disk.ts';
import { describe, type Trace } from './trace.ts';

const MAX_CHUNK_BYTES = 200;
const MAX_IN_FLIGHT_BYTES = 1_500;
const MAX_PENDING_BYTES = 3_000;
const RETAINED_BYTES = 600;
const PATIENCE_MS = 80;
const MAX_UNCONFIRMED = 10;
const RETRY_MS = 60;
const MAX_DOUBLINGS = 4;
const NO_IMAGE = Buffer.alloc(0);

type CreateAction = Extract<ProposerAction, { kind: 'create' }>;

export interface ProposerWorld {
  readonly scheduler: Scheduler;
  readonly random: Random;
  readonly invariants: Invariants;
  readonly bug: Bug | undefined;
  readonly trace: Trace;
  /** Acceptors remove what is old. */
  readonly removesWal: boolean;
  /** Opens a connection to an acceptor, in place of an earlier one. */
  connect(proposer: SimulatedProposer, acceptor: number): string;
  send(connection: string, acceptor: number, message: ToAcceptor): void;
  /** The leader has settled a configuration. */
  settled(proposer: SimulatedProposer, version: number): void;
  /** It leads now, or what it began with is committed. */
  advanced(proposer: SimulatedProposer): void;
}

export class SimulatedProposer {
  readonly name: string;
  readonly #world: ProposerWorld;
  readonly #state: ProposerState;
  // By peer:
  readonly #connections: string[] = [];
  readonly #heardAt: number[] = [];
  readonly #reading: boolean[] = [];
  /** How often in a row it had not confirmed the newest configuration when it was looked at. */
  readonly #unconfirmedCounts: number[] = [];
  /** The logs that the last votes came with. */
  readonly #images: Buffer[] = [];
  /** What waits for the answer from where on it can be given. */
  readonly #creating: (CreateAction | undefined)[] = [];
  /** The whole log; what is below #memoryStart would not be in a real proposer's memory and has to be read from another acceptor. */
  readonly #log = Buffer.alloc(LOG_CAPACITY);
  #memoryStart = LOG_START;
  #endLsn = LOG_START;
  #lastRecordStart = 0;
  readonly #mayCreate: boolean;
  #retryCount = 0;
  #stopped = false;
  #writing = true;
  /** This term's first commit is to come. */
  #isStart = true;

  constructor(name: string, configuration: Configuration, mayCreate: boolean, world: ProposerWorld) {
    this.name = name;
    this.#mayCreate = mayCreate;
    this.#world = world;
    this.#state = new ProposerState(this.#doctored(configuration), { startLsn: LOG_START, mayCreate });
    for (let peer = 0; peer < this.#state.peerCount; peer++) this.#added(peer);
    this.#watch();
    this.#write();
  }

  get isFenced(): boolean {
    return this.#state.phase === 'fenced';
  }

  /** It may yet make a log where there is none. */
  get mayStillCreate(): boolean {
    return this.#mayCreate && !this.#stopped && this.#state.phase === 'electing';
  }

  get isEstablished(): boolean {
    return this.#state.phase === 'established';
  }

  get commitLsn(): number {
    return this.#state.commitLsn;
  }

  get configuration(): Configuration {
    return this.#state.configuration;
  }

  /** Who assigns versions tells of a newer configuration. */
  configure(configuration: Configuration): void {
    if (this.#stopped) return;
    this.#perform(this.#state.configure(this.#doctored(configuration)));
  }

  /** Writes no more records; goes on committing those there are. */
  quiesce(): void {
    this.#writing = false;
  }

  get isQuiet(): boolean {
    return this.isEstablished && this.commitLsn === this.#endLsn;
  }

  stop(): void {
    this.#world.trace(this.name, () => 'stops');
    this.#stopped = true;
  }

  deliver(connection: string, message: FromAcceptor): void {
    const peer = this.#connections.indexOf(connection);
    if (this.#stopped || peer < 0) return;
    this.#heardAt[peer] = this.#world.scheduler.now;
    this.#world.trace(this.name, () => `hears a${this.#nodeOf(peer)}: ${describe(message)}`);
    if (message.kind === 'read-reply' || message.kind === 'resume-reply') return; // deliverRead, deliverResumePoint
    if (message.kind === 'greeting-reply') {
      this.#perform(this.#state.greeted(peer, message));
    } else if (message.kind === 'absent') {
      this.#perform(this.#state.absent(peer, message.incarnation));
    } else if (message.kind !== 'read-refusal') {
      const isVote = message.kind === 'vote-reply' && message.term === this.#state.term;
      if (isVote) this.#images[peer] = message.image ?? NO_IMAGE;
      this.#perform(this.#state.receive(peer, this.#misread(message)));
      if (this.#world.bug === 'count-old-term-acks') this.#countOldTermAcks();
      this.#pump(peer);
    }
  }

  /** WAL read from another acceptor for the peer. What was asked for in an earlier term of this proposer is of another log. */
  deliverRead(peer: number, { term, lsn, bytes }: Extract<FromAcceptor, { kind: 'read-reply' }>): void {
    this.#reading[peer] = false;
    const view = this.#state.peer(peer);
    if (this.#stopped || term !== this.#state.term || view.state !== 'streaming' || view.sendLsn !== lsn) return;
    this.#append(peer, lsn, bytes);
    this.#pump(peer);
  }

  /** Where the log may begin that the peer gets anew, as compute/proposer-peer.ts decides. */
  deliverResumePoint(peer: number, lsn: number): void {
    const create = this.#creating[peer];
    this.#creating[peer] = undefined;
    if (this.#stopped || create === undefined || this.#state.peer(peer).state !== 'creating') return;
    const { state } = create;
    const isLater = lsn > state.commitLsn && lsn <= this.#limitOfResume();
    const history = historyUpTo(this.#state.history, lsn);
    this.#send(peer, isLater ? { ...create, state: { ...state, commitLsn: lsn, history } } : create);
  }

  /** The acceptor that was read from has lost its log. */
  readRefused(acceptor: number): void {
    const peer = this.#peers().find((each) => this.#nodeOf(each) === acceptor);
    if (peer === undefined || this.#stopped) return;
    if (this.#state.peer(peer).state === 'streaming') this.#reconnect(peer);
  }

  #perform(actions: readonly ProposerAction[]): void {
    const { scheduler, random, invariants } = this.#world;
    for (const action of actions) {
      switch (action.kind) {
        case 'send':
          this.#send(action.peer, action.message);
          break;
        case 'create':
          this.#give(action.peer, action);
          break;
        case 'reconnect':
          this.#reconnect(action.peer);
          break;
        case 'stream':
          for (const peer of this.#peers()) this.#pump(peer);
          break;
        case 'added':
          this.#added(action.peer);
          break;
        case 'removed':
          this.#connections[action.peer] = '';
          break;
        case 'settled':
          this.#world.trace(this.name, () => `has settled configuration ${action.version}`);
          this.#world.settled(this, action.version);
          break;
        case 'retry':
          scheduler.after(random.between(1, RETRY_MS * 2 ** Math.min(this.#retryCount++, MAX_DOUBLINGS)), () => {
            if (!this.#stopped) this.#perform(this.#state.elect());
          });
          break;
        case 'leading':
          invariants.leads(this.name, action.term);
          this.#world.trace(this.name, () => `leads term ${action.term} from ${action.startLsn}`);
          this.#begin(action.startLsn);
          this.#world.advanced(this);
          break;
        case 'committed':
          this.#committed(action.lsn);
          break;
        case 'fenced':
          this.#world.trace(this.name, () => `is fenced by term ${action.term}`);
          this.#stopped = true;
          break;
      }
    }
  }

  /** The bug that the commit rule is there to avoid: what an older term left is called committed as soon as a quorum has it. */
  #countOldTermAcks(): void {
    if (this.#state.phase !== 'leading') return;
    const peers = this.#peers();
    const nodes = peers.map((peer) => this.#nodeOf(peer));
    const lsn = quorumLsn(this.configuration, (nodeId) => this.#state.peer(peers[nodes.indexOf(nodeId)]!).ackedLsn);
    if (lsn < LOG_START || lsn >= this.#state.startLsn) return;
    this.#world.trace(this.name, () => `commits up to ${lsn}, of an older term`);
    this.#world.invariants.committed(this.name, this.#state.term, this.#log, lsn, false);
  }

  #begin(startLsn: number): void {
    this.#images[this.#state.donor]!.copy(this.#log, 0, 0, startLsn - LOG_START);
    this.#memoryStart = startLsn;
    this.#endLsn = startLsn;
    this.#lastRecordStart = findEnd(this.#log, LOG_START, startLsn, 0).lastStart;
    this.#isStart = true;
  }

  #committed(lsn: number): void {
    const { invariants, scheduler } = this.#world;
    this.#world.trace(this.name, () => `commits up to ${lsn}`);
    invariants.committed(this.name, this.#state.term, this.#log, lsn, this.#isStart);
    if (this.#isStart) this.#world.advanced(this);
    this.#isStart = false;
    this.#memoryStart = Math.max(this.#memoryStart, Math.min(lsn, lsn - RETAINED_BYTES));
    scheduler.after(1, () => {
      if (this.#stopped) return;
      for (const peer of this.#peers()) {
        const view = this.#state.peer(peer);
        if (view.state === 'streaming' && view.sentCommitLsn < this.#state.commitLsn) {
          this.#append(peer, view.sendLsn, Buffer.alloc(0));
        }
      }
    });
  }

  #pump(peer: number): void {
    const view = this.#state.peer(peer);
    while (view.state === 'streaming' && view.sendLsn < this.#endLsn) {
      if (view.sendLsn - view.writtenLsn > MAX_IN_FLIGHT_BYTES) return;
      if (view.sendLsn < this.#memoryStart) {
        this.#read(peer);
        return;
      }
      const length = Math.min(this.#world.random.between(1, MAX_CHUNK_BYTES), this.#endLsn - view.sendLsn);
      const at = view.sendLsn - LOG_START;
      this.#append(peer, view.sendLsn, Buffer.from(this.#log.subarray(at, at + length)));
    }
  }

  /** One that has lost its log gets it from where the disk of another begins. */
  #give(peer: number, create: CreateAction): void {
    const source = create.state.votesFrom === undefined ? undefined : this.#state.recoverySource(peer);
    if (source === undefined || !this.#world.removesWal) {
      this.#send(peer, create);
      return;
    }
    this.#creating[peer] = create;
    this.#world.send(`${this.name}#resume${peer}`, this.#nodeOf(source), { kind: 'resume' });
  }

  #limitOfResume(): number {
    return this.#world.bug === 'begin-past-commit' ? Infinity : this.commitLsn;
  }

  #append(peer: number, beginLsn: number, bytes: Buffer): void {
    const { term, commitLsn } = this.#state;
    this.#send(peer, { kind: 'append', term, beginLsn, commitLsn, bytes });
    this.#state.sent(peer, beginLsn + bytes.length);
  }

  #read(peer: number): void {
    const source = this.#state.recoverySource(peer);
    if (source === undefined || this.#reading[peer]!) return;
    this.#reading[peer] = true;
    const fromLsn = this.#state.peer(peer).sendLsn;
    this.#world.send(`${this.name}#read${peer}`, this.#nodeOf(source), {
      kind: 'read',
      fromLsn,
      term: this.#state.term,
    });
    this.#world.scheduler.after(PATIENCE_MS, () => {
      this.#reading[peer] = false;
    });
  }

  #send(peer: number, message: VoteRequest | Elected | Renew | ToAcceptor): void {
    this.#world.send(this.#connections[peer]!, this.#nodeOf(peer), message);
  }

  #added(peer: number): void {
    this.#reading[peer] = false;
    this.#unconfirmedCounts[peer] = 0;
    this.#images[peer] = NO_IMAGE;
    this.#connect(peer);
  }

  #nodeOf(peer: number): number {
    return this.#state.peer(peer).nodeId;
  }

  /** Those that are not gone. */
  #peers(): number[] {
    return this.#connections.map((_, peer) => peer).filter((peer) => !this.#state.peer(peer).isGone);
  }

  #doctored(configuration: Configuration): Configuration {
    if (this.#world.bug !== 'count-new-set-only' || configuration.newMembers === undefined) return configuration;
    return { version: configuration.version, members: configuration.newMembers };
  }

  #misread(message: AcceptorMessage): AcceptorMessage {
    if (this.#world.bug !== 'settle-unconfirmed' || message.kind !== 'append-reply') return message;
    return { ...message, configurationVersion: Math.max(message.configurationVersion, this.configuration.version) };
  }

  #connect(peer: number): void {
    this.#creating[peer] = undefined;
    this.#connections[peer] = this.#world.connect(this, this.#nodeOf(peer));
    this.#heardAt[peer] = this.#world.scheduler.now;
    this.#send(peer, { kind: 'greeting' });
  }

  #reconnect(peer: number): void {
    if (this.#state.peer(peer).isGone) return;
    this.#perform(this.#state.lost(peer));
    this.#connect(peer);
  }

  /** Connects anew where an answer is overdue, and keeps recoveries going. */
  #watch(): void {
    if (this.#stopped) return;
    const { scheduler, random } = this.#world;
    for (const peer of this.#peers()) {
      const view = this.#state.peer(peer);
      const isOwed = view.state === 'streaming' ? view.writtenLsn < view.sendLsn : true;
      const unconfirmedCount = this.#state.isUnconfirmed(peer) ? this.#unconfirmedCounts[peer]! + 1 : 0;
      this.#unconfirmedCounts[peer] = unconfirmedCount;
      if (unconfirmedCount > MAX_UNCONFIRMED) this.#reconnect(peer);
      else if (isOwed && scheduler.now - this.#heardAt[peer]! > PATIENCE_MS) this.#reconnect(peer);
      else this.#pump(peer);
    }
    scheduler.after(random.between(20, 40), () => this.#watch());
  }

  #write(): void {
    if (this.#stopped) return;
    const { scheduler, random } = this.#world;
    if (this.#writing && this.isEstablished && this.#endLsn - this.commitLsn < MAX_PENDING_BYTES) {
      for (let count = random.between(1, 3); count > 0; count--) {
        const record = makeRecord(this.#lastRecordStart, random);
        if (this.#endLsn + record.length > LOG_START + LOG_CAPACITY) break;
        record.copy(this.#log, this.#endLsn - LOG_START);
        this.#lastRecordStart = this.#endLsn;
        this.#endLsn += record.length;
      }
      for (const peer of this.#peers()) this.#pump(peer);
    }
    scheduler.after(random.between(2, 20), () => this.#write());
  }
}
