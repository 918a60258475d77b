/**
 * Every state that a small cluster can get into: the real state machines under all orders of what can happen, within bounds on terms, entries, crashes
 * and broken connections. What the simulation does at random for large clusters, this does completely for small ones.
 *
 *   npm run simulate -- --explore [--terms 2] [--entries 1] [--delays 0] [--crashes 0] [--breaks 0]
 *     [--restarts 0] [--members 0/1] [--max-states N]
 *
 * All proposers are connected at first. A step is one of: a connection is made anew, an acceptor gets a message and its answer is heard at once, or on its way for as long as it takes (a
 * delay), a connection breaks with all that was on it, an acceptor restarts or prunes its history, a proposer starts an election anew, writes an entry, or is
 * replaced. What is never delivered is lost; hints about higher terms always are. Disks are atomic here: torn and late writes are
 * the simulation's. The bytes of a log are, for each entry, the term of the leader who wrote it.
 *
 * With several sets of members, acceptors outside of the first have an empty log from the start, the members are changed from set to set through joint configurations,
 * and each proposer takes a newer configuration over at any time, or never. A final configuration is set once any leader has settled the joint one.
 *
 * States that differ only in the names of acceptors or proposers count once (of acceptors only while the members stay). Those seen are kept as 53-bit hashes: with a million states
 * the chance that two share one is below 1 in 10,000.
 */
import { type Bounds, type ExploredBug, ExploredWorld } from './explored-world.ts';
import { Violation } from './invariants.ts';

export interface Exploration {
  readonly states: number;
  readonly steps: number;
  /** Of the longest shortest way to a state. */
  readonly depth: number;
  /** False: maxStates was reached before everything was seen. */
  readonly isComplete: boolean;
}

/** Seen completely in seconds. */
export const SMALL_BOUNDS: Bounds = {
  acceptors: 3,
  proposers: 2,
  terms: 2,
  entries: 1,
  delays: 0,
  crashes: 0,
  breaks: 0,
  restarts: 0,
  prunes: true,
  memberSets: [[]],
  maxStates: Infinity,
};

/** Throws a Violation with the shortest way to it. */
export function explore(bounds: Bounds, bug?: ExploredBug): Exploration {
  const seen = new Set<number>();
  let frontier: Node[] = [{ world: ExploredWorld.initial(bounds, bug), way: undefined }];
  seen.add(frontier[0]!.world.hash());
  let steps = 0;
  let depth = 0;
  for (; frontier.length > 0; depth++) {
    const next: Node[] = [];
    for (const { world, way } of frontier) {
      for (const step of world.steps()) {
        steps++;
        const after = world.clone();
        try {
          step.take(after);
        } catch (error) {
          throw new Violation(`${String(error)}, after:\n${describeWay({ name: step.name, before: way })}`);
        }
        if (after.isBeyond) continue;
        const hash = after.hash();
        if (seen.has(hash)) continue;
        seen.add(hash);
        if (seen.size > bounds.maxStates) return { states: seen.size, steps, depth, isComplete: false };
        next.push({ world: after, way: { name: step.name, before: way } });
      }
    }
    frontier = next;
  }
  return { states: seen.size, steps, depth, isComplete: true };
}

interface Node {
  readonly world: ExploredWorld;
  readonly way: Way | undefined;
}

interface Way {
  readonly name: string;
  readonly before: Way | undefined;
}

function describeWay(way: Way): string {
  const names: string[] = [];
  for (let at: Way | undefined = way; at !== undefined; at = at.before) names.unshift(`  ${at.name}`);
  return names.join('\n');
}
