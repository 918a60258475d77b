/** One state of a small cluster with all that can happen next; explore.ts goes through them and says what is modelled. */
import { Acceptor, blankState, type BoundaryTracker } from '../../src/consensus/acceptor.ts';
import {
  type Configuration,
  finalConfiguration,
  jointConfiguration,
  NO_CONFIGURATION,
  quorumLsn,
} from '../../src/consensus/configuration.ts';
import type { AcceptorMessage, ProposerMessage } from '../../src/consensus/messages.ts';
import { type ProposerAction, ProposerState } from '../../src/consensus/proposer.ts';
import { prunedHistory } from '../../src/consensus/term-history.ts';
import { Violation } from './invariants.ts';

export interface Bounds {
  readonly acceptors: number;
  readonly proposers: number;
  /** Elections under higher terms are not looked at. */
  readonly terms: number;
  /** Length of the log. */
  readonly entries: number;
  /** Answers that do not arrive at once. */
  readonly delays: number;
  readonly crashes: number;
  readonly breaks: number;
  /** Proposers replaced by new ones. */
  readonly restarts: number;
  /** Whether acceptors forget who wrote what is committed, at any time. */
  readonly prunes: boolean;
  /** One after the other; a single empty set: all acceptors, for ever. */
  readonly memberSets: readonly (readonly number[])[];
  readonly maxStates: number;
}

export type ExploredBug =
  | 'count-old-term-acks'
  | 'reuse-of-term'
  | 'vote-without-persisting'
  | 'skip-joint-phase'
  | 'finish-before-settled'
  | 'accept-older-configuration'
  | 'count-earlier-acks';

const ENTRY_BYTES = 8;
const START = ENTRY_BYTES;

export interface Step {
  readonly name: string;
  readonly take: (world: ExploredWorld) => void;
}

interface Committed {
  readonly entry: number;
  readonly byTerm: number;
}

interface Led {
  readonly term: number;
  readonly log: readonly number[];
}

interface AcceptorSide {
  machine: Acceptor<number>;
  /** The term that wrote each entry. */
  log: number[];
}

interface ProposerSide {
  machine: ProposerState;
  log: number[];
  isEstablished: boolean;
  /** By acceptor: what is on its way to it, and back. */
  requests: ProposerMessage[][];
  replies: AcceptorMessage[][];
}

export class ExploredWorld {
  readonly #bounds: Bounds;
  readonly #bug: ExploredBug | undefined;
  #acceptors: AcceptorSide[] = [];
  #proposers: ProposerSide[] = [];
  /** What was ever committed, with the lowest term whose leader did so. */
  #committed: readonly Committed[] = [];
  /** By term, the log that its leader began with. */
  #led: readonly Led[] = [];
  #delays = 0;
  #crashes = 0;
  #breaks = 0;
  #restarts = 0;
  /** As who assigns versions has it. */
  #configuration: Configuration;
  /** How many of the sets have had their turn. */
  #setCount = 1;
  #settledVersion = 0;
  /** An election went past the bound. */
  isBeyond = false;

  private constructor(bounds: Bounds, bug: ExploredBug | undefined) {
    this.#bounds = bounds;
    this.#bug = bug;
    this.#configuration = firstConfiguration(bounds);
  }

  static initial(bounds: Bounds, bug: ExploredBug | undefined): ExploredWorld {
    const world = new ExploredWorld(bounds, bug);
    const state = blankState(START, world.#configuration);
    world.#acceptors = Array.from({ length: bounds.acceptors }, (_, nodeId) => ({
      machine: new Acceptor<number>({
        nodeId,
        state,
        flushLsn: START,
        trackBoundaries: (lsn) => new WholeEntries(lsn),
      }),
      log: [],
    }));
    world.#proposers = Array.from({ length: bounds.proposers }, () => newProposer(bounds));
    world.#proposers.forEach(({ machine }, p) => {
      world.#acceptors.forEach((_, a) => {
        if (peerOf(machine, a) !== undefined) world.#connect(p, a);
      });
    });
    return world;
  }

  clone(): ExploredWorld {
    const copy = new ExploredWorld(this.#bounds, this.#bug);
    copy.#acceptors = this.#acceptors.map(({ machine, log }) => ({ machine: machine.clone(), log: log.slice() }));
    copy.#proposers = this.#proposers.map((each) => ({
      machine: each.machine.clone(),
      log: each.log.slice(),
      isEstablished: each.isEstablished,
      requests: each.requests.map((queue) => queue.slice()),
      replies: each.replies.map((queue) => queue.slice()),
    }));
    copy.#committed = this.#committed;
    copy.#led = this.#led;
    copy.#delays = this.#delays;
    copy.#crashes = this.#crashes;
    copy.#breaks = this.#breaks;
    copy.#restarts = this.#restarts;
    copy.#configuration = this.#configuration;
    copy.#setCount = this.#setCount;
    copy.#settledVersion = this.#settledVersion;
    return copy;
  }

  /** All that can happen now. */
  steps(): Step[] {
    const steps: Step[] = [];
    const { delays, crashes, breaks, restarts, entries } = this.#bounds;
    this.#proposers.forEach((proposer, p) => {
      const { machine } = proposer;
      const isOver = machine.phase === 'fenced';
      this.#acceptors.forEach((_, a) => {
        if (proposer.replies[a]!.length > 0) {
          const what = describe(proposer.replies[a]![0]!);
          steps.push({ name: `p${p} hears a${a}: ${what}`, take: (world) => world.#hear(p, a) });
        }
        if (proposer.requests[a]!.length > 0) {
          const what = describe(proposer.requests[a]![0]!);
          const name = `a${a} hears p${p}: ${what}`;
          if (proposer.replies[a]!.length === 0) steps.push({ name, take: (world) => world.#exchange(p, a) });
          if (this.#delays < delays) {
            steps.push({ name: `${name} (its answer takes its time)`, take: (world) => world.#deliverLate(p, a) });
          }
        }
        const peer = peerOf(machine, a);
        if (peer === undefined) return;
        const isLost = machine.peer(peer).state === 'lost';
        if (isLost && !isOver) steps.push({ name: `p${p} connects to a${a}`, take: (world) => world.#connect(p, a) });
        if (!isLost && this.#breaks < breaks) {
          steps.push({ name: `p${p} loses a${a}`, take: (world) => world.#break(p, a) });
        }
      });
      if (machine.configuration.version < this.#configuration.version && !isOver) {
        const name = `p${p} takes over configuration ${this.#configuration.version}`;
        steps.push({ name, take: (world) => world.#configure(p) });
      }
      if (machine.isRetrying && !isOver) {
        steps.push({ name: `p${p} tries again`, take: (world) => world.#perform(p, (state) => state.elect()) });
      }
      if (proposer.isEstablished && proposer.log.length < entries && !isOver) {
        steps.push({ name: `p${p} writes`, take: (world) => world.#write(p) });
      }
      if (machine.term > 0 && this.#restarts < restarts) {
        steps.push({ name: `p${p} is replaced`, take: (world) => world.#replace(p) });
      }
    });
    if (this.#bounds.prunes) {
      this.#acceptors.forEach(({ machine: { history, commitLsn } }, a) => {
        if (prunedHistory(history, commitLsn) === history) return;
        steps.push({ name: `a${a} prunes its history`, take: (world) => world.#prune(a) });
      });
    }
    const change = this.#nextConfiguration();
    if (change !== undefined) {
      steps.push({ name: `set ${JSON.stringify(change)}`, take: (world) => world.#change(change) });
    }
    if (this.#crashes < crashes) {
      this.#acceptors.forEach((_, a) => {
        steps.push({ name: `a${a} restarts`, take: (world) => world.#restart(a) });
      });
    }
    return steps;
  }

  /** The same for states that differ in names only. */
  hash(): number {
    const orders =
      this.#proposers.length === 2
        ? [
            [0, 1],
            [1, 0],
          ]
        : [this.#proposers.map((_, index) => index)];
    const keys = orders.map((order) => {
      const acceptors = this.#acceptors.map((_, a) => this.#acceptorKey(a, order));
      if (this.#bounds.memberSets.length === 1) acceptors.sort();
      const proposers = order.map((p) => proposerKey(this.#proposers[p]!));
      return `${proposers.join('/')}|${acceptors.join('|')}`;
    });
    const rest = `${JSON.stringify(this.#committed)};${JSON.stringify(this.#led)};${this.#delays},${this.#crashes},${this.#breaks},${this.#restarts},${this.#configuration.version},${this.#setCount},${this.#settledVersion}`;
    return hashOf(`${keys.sort()[0]};${rest}`);
  }

  #acceptorKey(a: number, order: readonly number[]): string {
    const { machine, log } = this.#acceptors[a]!;
    const { term, history, commitLsn, announcedCommitLsn, isFollowing } = machine;
    let key = `${term},${JSON.stringify(history)},${commitLsn},${announcedCommitLsn},${isFollowing},${log.join('')},${machine.configuration.version}`;
    for (const p of order) {
      const { machine: proposer, requests, replies } = this.#proposers[p]!;
      const peer = peerOf(proposer, a);
      const view = peer === undefined ? undefined : { ...proposer.peer(peer), nodeId: undefined };
      key += `:${JSON.stringify(view)}${peer !== undefined && proposer.donor === peer}`;
      key += `${requests[a]!.map(describe).join()}>${replies[a]!.map(describe).join()}`;
    }
    return key;
  }

  #configure(p: number): void {
    this.#perform(p, (state) => state.configure(this.#configuration));
    if (this.#bug !== 'count-earlier-acks') return;
    // As if what was acknowledged under the configuration before had been under this one.
    this.#acceptors.forEach((_, a) => {
      this.#perform(p, (state) => {
        const peer = peerOf(state, a);
        if (peer === undefined || state.peer(peer).state !== 'streaming') return [];
        const { ackedLsn: flushLsn, writtenLsn: writeLsn } = state.peer(peer);
        const { term, commitLsn, generation } = state;
        const configurationVersion = state.configuration.version;
        const position = { flushLsn, writeLsn, commitLsn };
        return state.receive(peer, { kind: 'append-reply', term, ...position, generation, configurationVersion });
      });
    });
  }

  #connect(p: number, a: number): void {
    this.#perform(p, (state) => state.greeted(peerOf(state, a)!, this.#acceptors[a]!.machine));
  }

  #break(p: number, a: number): void {
    this.#breaks++;
    this.#perform(p, (state) => this.#lose(state, p, a));
  }

  /** Restarts with what is durable, which is everything. */
  #restart(a: number): void {
    this.#crashes++;
    const { machine } = this.#acceptors[a]!;
    const { history, commitLsn, flushLsn } = machine;
    // With the bug, what was not written down with the log is forgotten.
    const term = this.#bug === 'vote-without-persisting' ? history[history.length - 1]!.term : machine.term;
    this.#acceptors[a]!.machine = new Acceptor<number>({
      nodeId: a,
      state: { term, history, commitLsn, generation: 0, configuration: machine.configuration },
      flushLsn,
      trackBoundaries: (lsn) => new WholeEntries(lsn),
    });
    this.#proposers.forEach((proposer, p) => {
      const peer = peerOf(proposer.machine, a);
      if (peer !== undefined && proposer.machine.peer(peer).state !== 'lost')
        this.#perform(p, (state) => this.#lose(state, p, a));
    });
  }

  #prune(a: number): void {
    const { machine } = this.#acceptors[a]!;
    machine.prune(machine.commitLsn);
  }

  #replace(p: number): void {
    this.#restarts++;
    this.#acceptors.forEach(({ machine }) => machine.forget(p));
    this.#proposers[p] = newProposer(this.#bounds);
  }

  /** What who changes the members may do next. */
  #nextConfiguration(): Configuration | undefined {
    const current = this.#configuration;
    if (current.newMembers !== undefined) {
      const isSettled = this.#settledVersion >= current.version || this.#bug === 'finish-before-settled';
      return isSettled ? finalConfiguration(current) : undefined;
    }
    const next = this.#bounds.memberSets[this.#setCount];
    if (next === undefined) return undefined;
    if (this.#bug === 'skip-joint-phase') return { version: current.version + 1, members: next };
    return jointConfiguration(current, next);
  }

  #change(configuration: Configuration): void {
    if (this.#configuration.newMembers === undefined) this.#setCount++;
    this.#configuration = configuration;
  }

  #write(p: number): void {
    const proposer = this.#proposers[p]!;
    proposer.log.push(proposer.machine.term);
    this.#pump(p);
  }

  #exchange(p: number, a: number): void {
    this.#deliver(p, a);
    while (this.#proposers[p]!.replies[a]!.length > 0) this.#hear(p, a);
  }

  #deliverLate(p: number, a: number): void {
    this.#delays++;
    this.#deliver(p, a);
  }

  #hear(p: number, a: number): void {
    const message = this.#proposers[p]!.replies[a]!.shift()!;
    this.#perform(p, (state) => {
      const peer = peerOf(state, a);
      return peer === undefined ? [] : state.receive(peer, message);
    });
  }

  #deliver(p: number, a: number): void {
    const message = this.#proposers[p]!.requests[a]!.shift()!;
    const { machine, log } = this.#acceptors[a]!;
    if (this.#bug === 'reuse-of-term' && message.kind === 'vote' && message.term === machine.term) {
      const { term, flushLsn, commitLsn, history, generation, configuration } = machine;
      const position = { configuration, flushLsn, commitLsn, history };
      const reply = { kind: 'vote-reply', term, granted: true, isVoter: true, generation, ...position } as const;
      this.#proposers[p]!.replies[a]!.push(reply);
      return;
    }
    const actions = machine.receive(p, this.#asHeard(message, machine));
    for (let action = actions.shift(); action !== undefined; action = actions.shift()) {
      switch (action.kind) {
        case 'write':
          for (const chunk of action.chunks) {
            for (let at = 0; at < chunk.length; at += ENTRY_BYTES)
              log[indexOf(action.beginLsn) + at / ENTRY_BYTES] = chunk[at]!;
          }
          actions.push(...machine.completed());
          break;
        case 'truncate':
          log.length = indexOf(action.lsn);
          actions.push(...machine.completed());
          break;
        case 'persist':
          actions.push(...machine.completed());
          break;
        case 'send':
          if (peerOf(this.#proposers[action.to]!.machine, a) === undefined) break;
          this.#proposers[action.to]!.replies[a]!.push(this.#asTold(action.message));
          break;
        case 'term-raised':
        case 'progress':
          break;
      }
    }
    this.#checkAcceptor(a);
  }

  #perform(p: number, act: (state: ProposerState) => ProposerAction[]): void {
    const proposer = this.#proposers[p]!;
    const { machine } = proposer;
    const actions = act(machine);
    for (let action = actions.shift(); action !== undefined; action = actions.shift()) {
      switch (action.kind) {
        case 'send':
          proposer.requests[nodeOf(machine, action.peer)]!.push(action.message);
          break;
        case 'reconnect':
          actions.push(...this.#lose(machine, p, nodeOf(machine, action.peer)));
          break;
        case 'removed':
          this.#forget(p, nodeOf(machine, action.peer));
          break;
        case 'settled':
          this.#settledVersion = Math.max(this.#settledVersion, action.version);
          break;
        case 'leading':
          this.#lead(proposer, action.term, action.startLsn);
          break;
        case 'committed':
          this.#commit(p, action.lsn);
          proposer.isEstablished = true;
          break;
        case 'added': // Connects later.
        case 'create': // All of them have the log from the first.
        case 'fenced':
        case 'retry':
        case 'stream':
          break;
      }
    }
    if (this.#bug === 'count-old-term-acks' && machine.phase === 'leading') {
      const lsn = quorumLsn(machine.configuration, (nodeId) => machine.peer(peerOf(machine, nodeId)!).ackedLsn);
      if (lsn >= START && lsn < machine.startLsn) this.#commit(p, lsn);
    }
    this.#pump(p);
    if (machine.term > this.#bounds.terms) this.isBeyond = true;
  }

  #lose(state: ProposerState, p: number, a: number): ProposerAction[] {
    this.#forget(p, a);
    const peer = peerOf(state, a);
    return peer === undefined ? [] : state.lost(peer);
  }

  /** What is on the way between them is lost. */
  #forget(p: number, a: number): void {
    const proposer = this.#proposers[p]!;
    proposer.requests[a] = [];
    proposer.replies[a] = [];
    this.#acceptors[a]!.machine.forget(p);
  }

  #asHeard(message: ProposerMessage, { configuration }: Acceptor<number>): ProposerMessage {
    if (this.#bug !== 'accept-older-configuration' || message.kind !== 'vote') return message;
    return message.configuration.version >= configuration.version ? message : { ...message, configuration };
  }

  #asTold(message: AcceptorMessage): AcceptorMessage {
    if (this.#bug !== 'accept-older-configuration' || message.kind !== 'vote-reply') return message;
    return { ...message, configuration: NO_CONFIGURATION };
  }

  /** One append at a time to each acceptor; the commit LSN travels with the next entry. */
  #pump(p: number): void {
    const { machine, requests, log } = this.#proposers[p]!;
    if (machine.phase === 'fenced') return;
    this.#acceptors.forEach((_, a) => {
      const index = peerOf(machine, a);
      if (index === undefined) return;
      const peer = machine.peer(index);
      if (peer.state !== 'streaming' || requests[a]!.some((message) => message.kind === 'append')) return;
      const at = indexOf(peer.sendLsn);
      const isBehind = at < log.length;
      if (!isBehind) return;
      const bytes = Buffer.alloc(ENTRY_BYTES, log[at]);
      const { term, commitLsn } = machine;
      requests[a]!.push({ kind: 'append', term, beginLsn: peer.sendLsn, commitLsn, bytes });
      machine.sent(index, peer.sendLsn + bytes.length);
    });
  }

  #lead(proposer: ProposerSide, term: number, startLsn: number): void {
    if (this.#led.some((other) => other.term === term)) throw new Violation(`term ${term} has two leaders`);
    proposer.log = this.#acceptors[nodeOf(proposer.machine, proposer.machine.donor)]!.log.slice(0, indexOf(startLsn));
    this.#led = [...this.#led, { term, log: proposer.log.slice() }].sort((x, y) => x.term - y.term);
    this.#checkLeaders();
  }

  #commit(p: number, lsn: number): void {
    const { log, machine } = this.#proposers[p]!;
    const committed = this.#committed.slice();
    for (const [index, entry] of log.slice(0, indexOf(lsn)).entries()) {
      const known = committed[index];
      if (known !== undefined && known.entry !== entry) {
        throw new Violation(`p${p} commits [${log.join()}], committed is ${JSON.stringify(committed)}`);
      }
      committed[index] = { entry, byTerm: Math.min(machine.term, known?.byTerm ?? Infinity) };
    }
    this.#committed = committed;
    this.#checkLeaders();
  }

  /** What one term commits, each later term begins with. */
  #checkLeaders(): void {
    for (const { term, log } of this.#led) {
      this.#committed.forEach(({ entry, byTerm }, index) => {
        if (byTerm >= term || log[index] === entry) return;
        throw new Violation(
          `the leader of term ${term} began with [${log.join()}], term ${byTerm} committed ${entry} at ${index}`,
        );
      });
    }
  }

  #checkAcceptor(a: number): void {
    const { machine, log } = this.#acceptors[a]!;
    for (let index = 0; index < indexOf(machine.commitLsn); index++) {
      if (log[index] === this.#committed[index]?.entry) continue;
      throw new Violation(`a${a} says that [${log.join()}] is committed, it is ${JSON.stringify(this.#committed)}`);
    }
  }
}

/** Everybody knows it from the start. */
function firstConfiguration({ acceptors, memberSets }: Bounds): Configuration {
  if (memberSets.length > 1) return { version: 1, members: memberSets[0]! };
  return { version: 0, members: Array.from({ length: acceptors }, (_, nodeId) => nodeId) };
}

/** The index of an acceptor, as the proposer has it; undefined when it is none of its members. */
function peerOf(machine: ProposerState, nodeId: number): number | undefined {
  for (let index = 0; index < machine.peerCount; index++) {
    const peer = machine.peer(index);
    if (peer.nodeId === nodeId && !peer.isGone) return index;
  }
  return undefined;
}

function nodeOf(machine: ProposerState, peer: number): number {
  return machine.peer(peer).nodeId;
}

function newProposer(bounds: Bounds): ProposerSide {
  const queues = <T>(): T[][] => Array.from({ length: bounds.acceptors }, () => []);
  return {
    machine: new ProposerState(firstConfiguration(bounds), { startLsn: START, mayCreate: false }),
    log: [],
    isEstablished: false,
    requests: queues(),
    replies: queues(),
  };
}

function proposerKey({ machine, log, isEstablished }: ProposerSide): string {
  const { phase, term, startLsn, commitLsn, history, isRetrying } = machine;
  const { configuration, candidateVersion, settledVersion } = machine;
  return `${configuration.version},${candidateVersion},${settledVersion},${phase},${term},${startLsn},${commitLsn},${JSON.stringify(history)},${isRetrying},${isEstablished},${log.join('')}`;
}

function describe(message: ProposerMessage | AcceptorMessage): string {
  if (message.kind !== 'append') return JSON.stringify(message);
  const { term, beginLsn, commitLsn, bytes } = message;
  return `append(term ${term}, at ${beginLsn}, entry of ${bytes[0] ?? 'none'}, committed ${commitLsn})`;
}

function indexOf(lsn: number): number {
  return (lsn - START) / ENTRY_BYTES;
}

/** Two FNV-1a sums, over the characters in both directions. */
function hashOf(text: string): number {
  let low = 0x811c9dc5;
  let high = 0x9747b28c;
  for (let index = 0, last = text.length - 1; index <= last; index++) {
    low = Math.imul(low ^ text.charCodeAt(index), 0x01000193);
    high = Math.imul(high ^ text.charCodeAt(last - index), 0x5bd1e995);
    high ^= high >>> 15;
  }
  return (low >>> 0) * 2 ** 21 + (high >>> 11);
}

class WholeEntries implements BoundaryTracker {
  boundaryLsn: number;

  constructor(startLsn: number) {
    this.boundaryLsn = startLsn;
  }

  push(lsn: number, bytes: Buffer): void {
    this.boundaryLsn = lsn + bytes.length;
  }
}
