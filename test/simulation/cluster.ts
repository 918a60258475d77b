/**
 * A whole cluster in one process and virtual time: acceptors, of which some are members, proposers that come and go, sometimes several at once, those who
 * change the membership, and a network and disks that fail. One seed decides everything, so a seed repeats a run exactly.
 */
import { type Configuration, nodesOf } from '../../src/consensus/configuration.ts';
import { Invariants, Violation } from './invariants.ts';
import { Random } from './random.ts';
import { Scheduler } from './scheduler.ts';
import {
  type AcceptorWorld,
  type Bug,
  type FromAcceptor,
  SimulatedAcceptor,
  type ToAcceptor,
} from './simulated-acceptor.ts';
import { NO_TRACE, type Trace } from './trace.ts';
import { LOG_CAPACITY } from './simulated-disk.ts';
import { type ChangerWorld, startChanger } from './simulated-changer.ts';
import { type ProposerWorld, SimulatedProposer } from './simulated-proposer.ts';

const ACCEPTOR_COUNT = 6;
const FAULTS_MS = 2_500;
const HEALING_ROUND_MS = 500;
const MAX_HEALING_ROUNDS = 20;
const CATCHING_UP_MS = 2_000;
const MAX_PROPOSERS = 3;

/** What goes wrong in a run, and how often. */
interface Faults {
  readonly dropRate: number;
  readonly duplicateRate: number;
  /** Messages of a connection overtake each other. */
  readonly isReordering: boolean;
  readonly maxDelayMs: number;
  readonly crashEveryMs: number;
  readonly powerCutRate: number;
  readonly wipeEveryMs: number;
  readonly partitionEveryMs: number;
  readonly newProposerEveryMs: number;
  readonly changeEveryMs: number;
  /** That who changes the membership dies, at each step. */
  readonly changerDeathRate: number;
  /** How often who wins an election, or has just started to write, reaches only one acceptor from then on. */
  readonly isolationRate: number;
}

/** That logs and histories lose their beginning is drawn from a seed of its own, so that it changes no run without it. */
const REMOVAL_SEED = 0x5bd1e995;
const REMOVE_EVERY_MS = [5, 20, 100];

export interface RunResult {
  readonly committedBytes: number;
  readonly proposerCount: number;
  readonly crashCount: number;
  readonly wipeCount: number;
  readonly configurationCount: number;
  /** Logs that were given from a later point than LOG_START. */
  readonly lateLogCount: number;
  /** Of members that were replaced before they had everything. */
  readonly unfinishedLogCount: number;
}

export interface RunOptions {
  /** Whether acceptors remove what is old, and newcomers get only what others still have; drawn by the seed when absent. */
  readonly removesWal?: boolean | undefined;
  readonly bug?: Bug | undefined;
  /** Called for each event, with the virtual time in milliseconds. */
  readonly onEvent?: ((nowMs: number, who: string, what: string) => void) | undefined;
}

/** Throws a Violation that names the seed. */
export function simulate(seed: number, options: RunOptions = {}): RunResult {
  const cluster = new Cluster(seed, options);
  try {
    return cluster.run();
  } catch (error) {
    if (error instanceof Violation) {
      const { removesWal } = options;
      const removal = removesWal === undefined ? '' : removesWal ? ' --removal' : ' --no-removal';
      error.message += ` (seed ${seed} at ${cluster.now} ms; see it with npm run simulate -- --from ${seed}${removal} --trace)`;
    }
    throw error;
  }
}

class Cluster implements AcceptorWorld, ProposerWorld, ChangerWorld {
  readonly scheduler = new Scheduler();
  readonly random: Random;
  readonly invariants = new Invariants();
  readonly bug: Bug | undefined;
  readonly trace: Trace;
  readonly removesWal: boolean;
  readonly offloaded = Buffer.alloc(LOG_CAPACITY);
  readonly #removal: Random;
  readonly #acceptors: SimulatedAcceptor[] = [];
  readonly #proposers = new Map<string, SimulatedProposer>();
  /** Connection → acceptor. */
  readonly #connections = new Map<string, number>();
  /** Pairs that cannot reach each other, `proposer/acceptor`; the proposer may be `*`. */
  readonly #cut = new Set<string>();
  readonly #lastArrival = new Map<string, number>();
  #faults: Faults;
  /** As who assigns versions has written them down. */
  readonly #configurations: Configuration[];
  readonly #settled = new Set<number>();
  #changerCount = 0;
  #proposerCount = 0;
  #connectionCount = 0;
  #crashCount = 0;
  #wipeCount = 0;
  #lateLogCount = 0;
  #unfinishedLogCount = 0;
  /** As the control plane would remember it. */
  #wasEstablished = false;
  isHealing = false;

  constructor(seed: number, options: RunOptions) {
    const { bug, onEvent } = options;
    this.random = new Random(seed);
    this.bug = bug;
    this.trace = onEvent === undefined ? NO_TRACE : (who, what) => onEvent(this.now, who, what());
    this.#faults = drawFaults(this.random);
    this.#removal = new Random((seed ^ REMOVAL_SEED) >>> 0);
    const isDrawn = this.#removal.chance(0.5);
    this.removesWal = options.removesWal ?? isDrawn;
    this.trace(
      'world',
      () => `faults: ${JSON.stringify(this.#faults)}${this.removesWal ? ', logs lose their beginning' : ''}`,
    );
    this.#configurations = [{ version: 1, members: drawNodes(this.random, this.random.pick([1, 3, 3, 3, 3, 5])) }];
    for (let index = 0; index < ACCEPTOR_COUNT; index++) this.#acceptors.push(new SimulatedAcceptor(index, this));
  }

  get now(): number {
    return this.scheduler.now;
  }

  run(): RunResult {
    this.#startProposer();
    this.#repeat(this.#faults.crashEveryMs, () => this.#crashOne());
    this.#repeat(this.#faults.wipeEveryMs, () => this.#wipeOne());
    this.#repeat(this.#faults.partitionEveryMs, () => this.#partition());
    this.#repeat(this.#faults.newProposerEveryMs, () => this.#startProposer());
    this.#repeat(this.#faults.changeEveryMs, () => this.#startChanger());
    this.#repeat(200, () => this.random.pick(this.#acceptors).save());
    if (this.removesWal) this.#removeRepeatedly(this.#removal.pick(REMOVE_EVERY_MS));
    this.scheduler.runUntil(FAULTS_MS);
    this.#heal();
    return {
      committedBytes: this.invariants.committedEnd,
      proposerCount: this.#proposerCount,
      crashCount: this.#crashCount,
      wipeCount: this.#wipeCount,
      configurationCount: this.#configurations.length,
      lateLogCount: this.#lateLogCount,
      unfinishedLogCount: this.#unfinishedLogCount,
    };
  }

  get configuration(): Configuration {
    return this.#configurations.at(-1)!;
  }

  compareAndSet(expectedVersion: number, next: Configuration): boolean {
    if (this.configuration.version !== expectedVersion) return false;
    for (const nodeId of nodesOf(this.configuration).filter((each) => !nodesOf(next).includes(each))) {
      const { hasLog, flushLsn } = this.#acceptors[nodeId]!;
      if (hasLog && flushLsn < this.invariants.committedEnd) this.#unfinishedLogCount++;
    }
    this.#configurations.push(next);
    for (const proposer of this.#proposers.values()) {
      if (this.isHealing || this.random.chance(0.5)) this.#tell(proposer);
    }
    return true;
  }

  settled(proposer: SimulatedProposer, version: number): void {
    this.#settled.add(version);
    this.#isolate(proposer.name);
  }

  isSettled(version: number): boolean {
    return this.#settled.has(version);
  }

  acceptor(nodeId: number): SimulatedAcceptor {
    return this.#acceptors[nodeId]!;
  }

  /** Mostly one is replaced. */
  drawMembers(): number[] {
    const { members } = this.configuration;
    const others = this.#acceptors.map(({ index }) => index).filter((index) => !members.includes(index));
    if (others.length === 0 || this.random.chance(0.4)) return drawNodes(this.random, this.random.pick([1, 3, 3, 5]));
    const leaving = this.random.pick(members);
    return [...members.filter((index) => index !== leaving), this.random.pick(others)];
  }

  connect(proposer: SimulatedProposer, acceptor: number): string {
    for (const [connection, to] of this.#connections) {
      if (to === acceptor && nameOf(connection) === proposer.name) this.#connections.delete(connection);
    }
    const connection = `${proposer.name}#${this.#connectionCount++}`;
    this.#connections.set(connection, acceptor);
    return connection;
  }

  send(connection: string, acceptor: number, message: ToAcceptor): void {
    this.#transmit(connection, acceptor, () => this.#acceptors[acceptor]!.deliver(connection, message));
  }

  reply(from: SimulatedAcceptor, to: string, message: FromAcceptor): void {
    const proposer = this.#proposers.get(nameOf(to));
    if (proposer === undefined) return;
    this.#transmit(to, from.index, () => {
      if (message.kind === 'resume-reply') proposer.deliverResumePoint(Number(to.split('#resume')[1]), message.lsn);
      else if (message.kind === 'read-reply') proposer.deliverRead(Number(to.split('#read')[1]), message);
      else if (message.kind === 'read-refusal') proposer.readRefused(from.index);
      else proposer.deliver(to, message);
    });
  }

  lateLog(): void {
    this.#lateLogCount++;
  }

  #removeRepeatedly(meanMs: number): void {
    this.scheduler.after(this.#removal.between(1, 2 * meanMs), () => {
      const acceptor = this.#removal.pick(this.#acceptors);
      acceptor.save();
      acceptor.removeOld(this.#removal);
      if (this.#removal.chance(0.5)) this.#removal.pick(this.#acceptors).prune();
      if (!this.isHealing) this.#removeRepeatedly(meanMs);
    });
  }

  connectionsOf(acceptor: SimulatedAcceptor): string[] {
    return [...this.#connections].filter(([, to]) => to === acceptor.index).map(([connection]) => connection);
  }

  /** A proposer leads, or writes its first records: the worst moments to lose it. */
  advanced(proposer: SimulatedProposer): void {
    if (proposer.isEstablished) this.#wasEstablished = true;
    this.scheduler.after(this.random.pick([0, 0, this.random.between(0, 30)]), () => this.#isolate(proposer.name));
  }

  /** Delivers after a while, or never, or twice. */
  #transmit(connection: string, acceptor: number, deliver: () => void): void {
    const { dropRate, duplicateRate, isReordering, maxDelayMs } = this.#faults;
    const pair = `${nameOf(connection)}/${acceptor}`;
    const copies = this.random.chance(duplicateRate) ? 2 : 1;
    for (let copy = 0; copy < copies; copy++) {
      if (this.random.chance(dropRate)) continue;
      let delayMs = this.random.chance(0.02)
        ? this.random.between(0, 10 * maxDelayMs)
        : this.random.between(0, maxDelayMs);
      if (!isReordering) {
        const arrival = Math.max(this.now + delayMs, this.#lastArrival.get(pair) ?? 0);
        this.#lastArrival.set(pair, arrival);
        delayMs = arrival - this.now;
      }
      this.scheduler.after(delayMs, () => {
        if (!this.#cut.has(pair) && !this.#cut.has(`*/${acceptor}`)) deliver();
      });
    }
  }

  #startProposer(): void {
    if (this.#proposers.size >= MAX_PROPOSERS) {
      const [oldest] = this.#proposers.values();
      oldest!.stop();
      this.#proposers.delete(oldest!.name);
      for (const connection of this.#connections.keys()) {
        if (nameOf(connection) === oldest!.name) this.#connections.delete(connection);
      }
    }
    const name = `p${this.#proposerCount++}`;
    this.trace(name, () => 'starts');
    const isStale = !this.isHealing && this.random.chance(0.3);
    const known = isStale ? this.random.pick(this.#configurations.slice(-4)) : this.configuration;
    const members = this.bug === 'quorum-of-one' ? [this.random.pick(known.members)] : known.members;
    const proposer = new SimulatedProposer(name, { ...known, members }, !this.#wasEstablished, this);
    this.#proposers.set(name, proposer);
  }

  #startChanger(): void {
    // Whoever may still make the log believes that it was never used: as long as there may be one, nobody leaves.
    if (!this.#wasEstablished || this.#mayStillCreate) return;
    startChanger(`c${this.#changerCount++}`, this.#faults.changerDeathRate, this);
  }

  get #mayStillCreate(): boolean {
    return [...this.#proposers.values()].some((proposer) => proposer.mayStillCreate);
  }

  #tell(proposer: SimulatedProposer): void {
    const { configuration } = this;
    const delayMs = this.random.between(0, this.random.pick([5, 5, 200]));
    this.scheduler.after(delayMs, () => {
      proposer.configure(configuration);
      if (this.random.chance(0.3)) this.#isolate(proposer.name);
    });
  }

  #crashOne(): void {
    const acceptor = this.random.pick(this.#acceptors);
    if (!acceptor.isUp) return;
    this.#crashCount++;
    acceptor.crash(this.random.chance(this.#faults.powerCutRate));
    if (this.random.chance(0.1)) {
      for (const other of this.#acceptors) if (other.isUp) this.#restartLater(other, true);
    }
    this.#restartLater(acceptor, false);
  }

  /**
   * One at a time: who lost its disk is made whole by the others before another may fail in this way. Not the only one that a set of members has. Who is no
   * member may lose it at any time.
   */
  #wipeOne(): void {
    const acceptor = this.random.pick(this.#acceptors);
    const { members, newMembers } = this.configuration;
    const nodes = nodesOf(this.configuration);
    if (nodes.includes(acceptor.index)) {
      const others = nodes.map((index) => this.#acceptors[index]!).filter((other) => other !== acceptor);
      const sets = [members, newMembers ?? []].filter((set) => set.includes(acceptor.index));
      if (sets.some((set) => set.length < 3) || !others.every((other) => other.isWhole)) return;
    }
    // Whoever may still make the log believes that it was never used, and disks are not lost before it is.
    if (!this.#wasEstablished || this.#mayStillCreate) return;
    this.#wipeCount++;
    if (acceptor.isUp) {
      acceptor.crash(false);
      this.#restartLater(acceptor, false);
    }
    acceptor.wipe();
  }

  #restartLater(acceptor: SimulatedAcceptor, crashFirst: boolean): void {
    if (crashFirst) acceptor.crash(this.random.chance(this.#faults.powerCutRate));
    const restartMs = this.random.between(5, this.random.pick([40, 400]));
    this.scheduler.after(restartMs, () => {
      if (!acceptor.isUp) acceptor.start();
    });
  }

  #partition(): void {
    if (this.random.chance(0.4)) {
      const { index } = this.random.pick(this.#acceptors);
      this.trace('network', () => `nobody can reach a${index}`);
      this.#cutFor(`*/${index}`);
      return;
    }
    const [...names] = this.#proposers.keys();
    const pair = `${this.random.pick(names)}/${this.random.between(0, ACCEPTOR_COUNT - 1)}`;
    this.trace('network', () => `${pair.replace('/', ' and a')} cannot reach each other`);
    this.#cutFor(pair);
  }

  /** A leader that reaches one acceptor only leaves logs behind that a quorum never had. */
  #isolate(name: string): void {
    if (this.isHealing || !this.random.chance(this.#faults.isolationRate)) return;
    const reached = this.random.between(0, ACCEPTOR_COUNT - 1);
    this.trace('network', () => `${name} reaches only a${reached}`);
    for (const { index } of this.#acceptors) if (index !== reached) this.#cutFor(`${name}/${index}`);
  }

  #cutFor(pair: string): void {
    this.#cut.add(pair);
    this.scheduler.after(this.random.between(20, 600), () => this.#cut.delete(pair));
  }

  #repeat(meanMs: number, act: () => void): void {
    if (meanMs === Infinity) return;
    this.scheduler.after(this.random.between(1, 2 * meanMs), () => {
      if (this.isHealing) return;
      act();
      this.#repeat(meanMs, act);
    });
  }

  /** Faults stop: one of the proposers, or a new one, must get through, and all logs become the same. */
  #heal(): void {
    this.trace('world', () => 'faults stop');
    this.isHealing = true;
    this.#faults = { ...this.#faults, dropRate: 0, duplicateRate: 0, isReordering: false, maxDelayMs: 3 };
    this.#cut.clear();
    for (const acceptor of this.#acceptors) if (!acceptor.isUp) acceptor.start();
    if (this.random.chance(0.5)) {
      for (const proposer of this.#proposers.values()) proposer.stop();
      this.#proposers.clear();
    }
    const before = this.invariants.committedEnd;
    for (const proposer of this.#proposers.values()) this.#tell(proposer);
    startChanger('last', 0, this);
    for (let round = 0; round < MAX_HEALING_ROUNDS; round++) {
      // Whoever runs computes starts another when one was fenced, as by a term that a candidate left and never led.
      if ([...this.#proposers.values()].every((proposer) => proposer.isFenced)) this.#startProposer();
      this.scheduler.runUntil(this.now + HEALING_ROUND_MS);
      // Candidates that are left take over from each other, once each.
      const [first, ...others] = [...this.#proposers.values()].filter((proposer) => !proposer.isFenced);
      const isStable = this.configuration.newMembers === undefined && this.isSettled(this.configuration.version);
      if (first?.isEstablished === true && others.length === 0 && isStable) {
        this.scheduler.runUntil(this.now + HEALING_ROUND_MS);
        break;
      }
    }
    const established = [...this.#proposers.values()].filter((proposer) => proposer.isEstablished);
    if (this.bug !== 'quorum-of-one') {
      this.invariants.check(established.length === 1, `${established.length} proposers lead once faults have stopped`);
    }
    const last = established.at(-1);
    this.invariants.check(last !== undefined && last.commitLsn > before, 'commits go on once faults have stopped');
    last!.quiesce();
    this.scheduler.runUntil(this.now + CATCHING_UP_MS);
    if (this.bug === 'quorum-of-one') return;
    this.invariants.check(last!.isQuiet, 'everything that was written is committed once faults have stopped');
    const { version, members, newMembers } = this.configuration;
    const isFinal = newMembers === undefined && this.isSettled(version);
    this.invariants.check(isFinal, `configuration ${version} is final and settled in the end`);
    for (const acceptor of members.map((index) => this.#acceptors[index]!)) {
      this.invariants.check(
        acceptor.flushLsn === last!.commitLsn,
        `acceptor ${acceptor.index} has everything in the end: ${acceptor.flushLsn}, not ${last!.commitLsn}`,
      );
      const { visible, startLsn } = acceptor.disk;
      this.invariants.committedOn(acceptor.index, visible, startLsn, last!.commitLsn);
    }
  }
}

function drawFaults(random: Random): Faults {
  return {
    dropRate: random.pick([0, 0, 0.01, 0.1]),
    duplicateRate: random.pick([0, 0, 0.02, 0.1]),
    isReordering: random.chance(0.4),
    maxDelayMs: random.pick([2, 5, 20]),
    crashEveryMs: random.pick([Infinity, 40, 150, 400]),
    wipeEveryMs: random.pick([Infinity, 100, 300, 800]),
    powerCutRate: random.pick([0, 0.5, 1]),
    partitionEveryMs: random.pick([Infinity, 50, 100, 300]),
    newProposerEveryMs: random.pick([40, 80, 150, 300, 900]),
    changeEveryMs: random.pick([Infinity, 100, 200, 400, 800]),
    changerDeathRate: random.pick([0.01, 0.05, 0.2]),
    isolationRate: random.pick([0, 0.3, 0.7]),
  };
}

function drawNodes(random: Random, count: number): number[] {
  const nodes = Array.from({ length: ACCEPTOR_COUNT }, (_, index) => index);
  while (nodes.length > count) nodes.splice(random.between(0, nodes.length - 1), 1);
  return nodes;
}

function nameOf(connection: string): string {
  return connection.slice(0, connection.indexOf('#'));
}
