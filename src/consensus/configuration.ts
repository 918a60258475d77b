/**
 * Who keeps a log: a membership configuration, and what is a quorum of it.
 *
 * Configurations follow each other by version, one content for each version; whoever assigns versions does so by compare-and-set. From one set of
 * members to another there is always a joint configuration between, in which a quorum is a majority of the old *and* of the new set:
 *
 *   {1, 2, 3}  →  {1, 2, 3} and {1, 2, 4}  →  {1, 2, 4}
 *
 * Any two configurations that follow each other therefore have a set of which both need a majority, so their quorums meet. Ones further apart need not
 * meet. That is why a joint configuration may be followed by its final one only when it is *settled* (proposer.ts): by then a majority of the old set
 * votes under nothing older, and a majority of the new set has all that was ever committed.
 *
 * Version 0 is no configuration: who is told nothing else takes part in whatever it is asked to.
 */
import type { Lsn } from '../postgres/lsn.ts';

export interface Configuration {
  readonly version: number;
  /** Node ids, each once. */
  readonly members: readonly number[];
  /** Of a joint configuration: the members of what follows it. */
  readonly newMembers?: readonly number[];
}

export const NO_CONFIGURATION: Configuration = { version: 0, members: [] };

/** A joint configuration that leads from `from`, which is none itself, to the new members. */
export function jointConfiguration(from: Configuration, newMembers: readonly number[]): Configuration {
  return { version: from.version + 1, members: from.members, newMembers };
}

/** The same sets under the next version: what was settled before counts no more. */
export function renewedConfiguration(from: Configuration): Configuration {
  return { ...from, version: from.version + 1 };
}

/** What follows a joint configuration that is settled. */
export function finalConfiguration(from: Configuration): Configuration {
  return { version: from.version + 1, members: from.newMembers ?? from.members };
}

/** What may follow a joint configuration at any time. */
export function abandonedConfiguration(from: Configuration): Configuration {
  return { version: from.version + 1, members: from.members };
}

/** Old members first. */
export function nodesOf({ members, newMembers }: Configuration): number[] {
  return [...new Set([...members, ...(newMembers ?? [])])];
}

export function isMember(configuration: Configuration, nodeId: number): boolean {
  return configuration.version === 0 || nodesOf(configuration).includes(nodeId);
}

/** Whether those for whom it is true are a quorum. */
export function isQuorum(configuration: Configuration, has: (nodeId: number) => boolean): boolean {
  return setsOf(configuration).every((set) => set.filter(has).length > set.length / 2);
}

/** The highest LSN that a quorum has. */
export function quorumLsn(configuration: Configuration, lsnOf: (nodeId: number) => Lsn): Lsn {
  let least = Infinity;
  for (const set of setsOf(configuration)) {
    const lsns = set.map(lsnOf).sort((a, b) => b - a);
    least = Math.min(least, lsns[Math.floor(set.length / 2)]!);
  }
  return least;
}

function setsOf({ members, newMembers }: Configuration): readonly (readonly number[])[] {
  return newMembers === undefined ? [members] : [members, newMembers];
}
