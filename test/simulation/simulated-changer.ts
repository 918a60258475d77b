/**
 * Who changes the membership: reads the configuration, gives newcomers an empty log, and moves on by compare-and-set, step by step. It may die between any
 * two steps, and others may be at it at the same time; whoever comes next goes on from the configuration that it finds.
 *
 * The order is what src/platform/safekeepers.ts keeps to:
 *   1. ask those who are new whether they have the log, and in which life
 *   2. set the joint configuration, or a renewed one when another changer left one behind
 *   3. give an empty log to those that had none, for that life only; it begins where the disks of the old members do
 *   4. wait until a leader has settled it; when a newcomer has lost its log meanwhile, begin again
 *   5. set the final configuration; or go back to the old members, when it takes too long
 * Because 2 comes between 1 and 3, what a newcomer confirmed before it lost its log counts for no configuration that may become final.
 */
import { type AcceptorState, blankState } from '../../src/consensus/acceptor.ts';
import {
  abandonedConfiguration,
  type Configuration,
  finalConfiguration,
  jointConfiguration,
  renewedConfiguration,
} from '../../src/consensus/configuration.ts';
import { historyUpTo } from '../../src/consensus/term-history.ts';
import { LOG_START } from './log-records.ts';
import type { Random } from './random.ts';
import type { Scheduler } from './scheduler.ts';
import type { Bug, SimulatedAcceptor } from './simulated-acceptor.ts';
import type { Trace } from './trace.ts';

const MAX_STEP_MS = [20, 20, 60, 400];
const ABANDON_RATE = 0.1;
const MAX_LOOKS = 60;

export interface ChangerWorld {
  readonly scheduler: Scheduler;
  readonly random: Random;
  readonly bug: Bug | undefined;
  readonly trace: Trace;
  readonly isHealing: boolean;
  /** Acceptors remove what is old, and logs are given from where others still have them. */
  readonly removesWal: boolean;
  /** As it is written down by who assigns versions. */
  readonly configuration: Configuration;
  compareAndSet(expectedVersion: number, next: Configuration): boolean;
  isSettled(version: number): boolean;
  acceptor(nodeId: number): SimulatedAcceptor;
  drawMembers(): number[];
}

interface Report {
  readonly nodeId: number;
  readonly incarnation: string;
  readonly hasLog: boolean;
}

/** Begins a change, or finishes one that was left behind. Dies at each step with the probability. */
export function startChanger(name: string, deathRate: number, world: ChangerWorld): void {
  const { scheduler, random, trace } = world;
  const steps = change(name, deathRate === 0, world);
  const step = (): void => {
    if (random.chance(deathRate) || (world.isHealing && deathRate > 0)) {
      trace(name, () => 'dies');
      return;
    }
    if (steps.next().done !== true)
      scheduler.after(random.between(0, deathRate === 0 ? 20 : random.pick(MAX_STEP_MS)), step);
  };
  step();
}

function* change(name: string, isLast: boolean, world: ChangerWorld): Generator<void, void, void> {
  const { random, bug, trace } = world;
  const set = (expectedVersion: number, next: Configuration): boolean => {
    const isSet = world.compareAndSet(expectedVersion, next);
    trace(name, () => `${isSet ? 'sets' : 'is too late to set'} ${describeConfiguration(next)}`);
    return isSet;
  };
  for (let round = 0; isLast || round < 3; round++) {
    const found = world.configuration;
    if (isLast && found.newMembers === undefined) return;
    if (found.newMembers !== undefined && !isLast && random.chance(ABANDON_RATE)) {
      set(found.version, abandonedConfiguration(found));
      return;
    }
    const target = found.newMembers ?? world.drawMembers();
    const newcomers = target.filter((nodeId) => !found.members.includes(nodeId));
    yield;
    const reports = newcomers.map((nodeId) => report(world.acceptor(nodeId))).filter((each) => each !== undefined);
    if (reports.length < newcomers.length && (isLast || random.chance(0.7))) {
      yield; // One of them is down.
      continue;
    }
    const isWhole = target.every((nodeId) => newcomers.includes(nodeId) || world.acceptor(nodeId).hasLog);
    if (found.newMembers === undefined && !isWhole) {
      yield; // Who stays must be there before: a small set of new members could not give it its log anew.
      continue;
    }
    yield;
    if (bug === 'skip-joint-phase' && found.newMembers === undefined) {
      const next = { version: found.version + 1, members: target };
      if (set(found.version, next)) yield* give(world, reports, next);
      return;
    }
    const joint = found.newMembers === undefined ? jointConfiguration(found, target) : renewedConfiguration(found);
    const isFirst = found.newMembers === undefined;
    const isRenewed = isFirst || bug !== 'give-without-renewing';
    if (isRenewed && !set(found.version, joint)) {
      yield;
      continue;
    }
    const current = isRenewed ? joint : found;
    yield* give(world, reports, current);
    const isSettled = yield* settle(world, current, newcomers);
    if (isSettled === true) set(current.version, finalConfiguration(current));
    else if (isSettled === false && isLast) set(current.version, abandonedConfiguration(current));
    if (isSettled !== undefined && !isLast) return;
  }
}

function report(acceptor: SimulatedAcceptor): Report | undefined {
  const { index: nodeId, incarnation, hasLog } = acceptor;
  return acceptor.isUp ? { nodeId, incarnation, hasLog } : undefined;
}

function* give(
  world: ChangerWorld,
  reports: readonly Report[],
  configuration: Configuration,
): Generator<void, void, void> {
  for (const { nodeId, incarnation, hasLog } of reports) {
    if (hasLog) continue;
    yield;
    const state = newLog(world, configuration);
    if (state === undefined) return; // Nobody who would know is there.
    if (world.removesWal) yield;
    world.trace(`a${nodeId}`, () => `is given an empty log from ${state.commitLsn} on, in life ${incarnation}`);
    world.acceptor(nodeId).give(incarnation, state);
  }
}

/** As platform/membership-change.ts has it. */
function newLog(world: ChangerWorld, configuration: Configuration): AcceptorState | undefined {
  const blank = blankState(LOG_START, configuration);
  if (!world.removesWal) return blank;
  let latest: { readonly resumeLsn: number; readonly from: SimulatedAcceptor } | undefined;
  for (const from of configuration.members.map((member) => world.acceptor(member))) {
    const resumeLsn = from.resumePoint;
    if (resumeLsn !== undefined && resumeLsn > (latest?.resumeLsn ?? 0)) latest = { resumeLsn, from };
  }
  if (latest === undefined) return undefined;
  const { resumeLsn, from } = latest;
  if (resumeLsn === LOG_START) return blank;
  from.offload(Math.min(resumeLsn, from.commitLsn));
  const history = historyUpTo(from.history, resumeLsn);
  return { ...blank, term: history.at(-1)!.term, history, commitLsn: resumeLsn };
}

/** Undefined: a newcomer has no log, which takes a new round. False: somebody else has gone on, or it takes too long. */
function* settle(
  world: ChangerWorld,
  { version }: Configuration,
  newcomers: readonly number[],
): Generator<void, boolean | undefined, void> {
  for (let look = 0; look < MAX_LOOKS; look++) {
    yield;
    if (world.configuration.version !== version) return false;
    if (world.isSettled(version) || world.bug === 'finish-before-settled') return true;
    const isMissing = newcomers.some((nodeId) => report(world.acceptor(nodeId))?.hasLog === false);
    if (isMissing && look % 4 === 3) return undefined;
  }
  return false;
}

export function describeConfiguration({ version, members, newMembers }: Configuration): string {
  return `configuration ${version}: {${members.join()}}${newMembers === undefined ? '' : ` and {${newMembers.join()}}`}`;
}
