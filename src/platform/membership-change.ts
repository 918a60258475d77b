/**
 * Takes the safekeepers of all timelines from one set of members to another, while computes write. Each step is durable and can be repeated, so whoever
 * finds a change left behind by a crash begins this anew and goes on.
 *
 *   1. ask newcomers in which life they are, and which timelines they have
 *   2. renew the joint configuration (consensus/configuration.ts), by compare-and-set
 *   3. tell it to the safekeepers: to a majority of the old members at least, which then make no timeline under an older one. What they list from then
 *      on is all that there is
 *   4. give newcomers an empty log of each timeline that they did not have, for the life of 1 only. Where the old members' disks do not reach back to its
 *      start, it begins where they do: what is before may be in no store any more. All before that is committed, so it is what a member that had it all
 *      would have; it has voted for nobody
 *   5. have a leader of each timeline settle the configuration (consensus/proposer.ts): the compute's, if one runs, else one elected for that, which yields to
 *      any. Wait until newcomers have all that is committed
 *   6. set the final configuration, by compare-and-set
 *
 * Because 2 comes between 1 and 4, what a newcomer confirmed before it lost its disk counts for no configuration that may become final. A newcomer that
 * is found without a timeline later takes everything back to 1. The simulation's changers keep to the same order (test/simulation/simulated-changer.ts).
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { SafekeeperClient, type TimelineIdentity } from '../api/safekeeper.ts';
import { type SafekeeperDirectory } from '../api/safekeeper-set.ts';
import { forEachLimited } from '../base/all-done.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { electProposer } from '../compute/proposer.ts';
import { type AcceptorState, blankState } from '../consensus/acceptor.ts';
import {
  type Configuration,
  finalConfiguration,
  isQuorum,
  nodesOf,
  renewedConfiguration,
} from '../consensus/configuration.ts';
import type { TermHistory } from '../consensus/messages.ts';
import { historyUpTo } from '../consensus/term-history.ts';
import type { Lsn } from '../postgres/lsn.ts';

export interface ChangeWorld {
  readonly directory: SafekeeperDirectory;
  /** Durable when it returns; the directory has it then. False: the configuration was of another version. */
  replace(expectedVersion: number, next: Configuration): boolean;
  settledVersion(timelineId: string): number;
  /** Undefined: there is no such timeline any more. */
  identityOf(timelineId: string): Promise<(TimelineIdentity & { readonly hasWal: boolean }) | undefined>;
  /** Scope `platform`. */
  readonly token: string;
  readonly log: Logger;
  progress(done: number, total: number): void;
}

interface Newcomer {
  readonly nodeId: number;
  readonly incarnation: string;
  readonly timelineIds: ReadonlySet<string>;
}

/** A newcomer has lost a timeline: from the beginning. */
class Restart extends Error {}

const CONCURRENCY = 4;
const LOOK_MS = 20;
const ELECTION_TIMEOUT_MS = 20_000;
const RETRY_MS = 200;

/** Resolves when the configuration is no joint one. Rejects with `unavailable` when too few safekeepers answer: it may be tried again. */
export async function finishChange(world: ChangeWorld, signal: AbortSignal): Promise<void> {
  for (;;) {
    signal.throwIfAborted();
    const found = world.directory.current.configuration;
    if (found.newMembers === undefined) return;
    try {
      await finishOnce(world, found, signal);
    } catch (error) {
      if (!(error instanceof Restart)) throw error;
      world.log.warn({ reason: error.message }, 'the change of the safekeepers begins anew');
      await sleep(RETRY_MS, undefined, { signal });
    }
  }
}

async function finishOnce(world: ChangeWorld, found: Configuration, signal: AbortSignal): Promise<void> {
  const clients = new Clients(world);
  try {
    const newcomerIds = found.newMembers!.filter((nodeId) => !found.members.includes(nodeId));
    const newcomers = await Promise.all(newcomerIds.map((nodeId) => askNewcomer(clients, nodeId, found)));
    const joint = renewedConfiguration(found);
    if (!world.replace(found.version, joint)) return;
    const timelineIds = await tellMembers(clients, joint);
    let done = 0;
    world.progress(done, timelineIds.length);
    await untilFailure(signal, clients, async (moving, fail) =>
      forEachLimited(timelineIds, CONCURRENCY, async (timelineId) => {
        await moveTimeline(world, clients, { timelineId, joint, newcomers }, moving).catch(fail);
        world.progress(++done, timelineIds.length);
      }),
    );
    world.replace(joint.version, finalConfiguration(joint));
  } finally {
    clients.close();
  }
}

async function askNewcomer(clients: Clients, nodeId: number, configuration: Configuration): Promise<Newcomer> {
  const client = clients.of(nodeId);
  const { incarnation } = await client.configure(configuration);
  const timelineIds = new Set((await client.list()).map(({ timelineId }) => timelineId));
  return { nodeId, incarnation, timelineIds };
}

/** All timelines that a majority of the old members knows. */
async function tellMembers(clients: Clients, joint: Configuration): Promise<string[]> {
  const lists = new Map<number, string[]>();
  let reason = '';
  await Promise.all(
    nodesOf(joint).map(async (nodeId) => {
      const client = clients.of(nodeId);
      try {
        await client.configure(joint);
        lists.set(
          nodeId,
          (await client.list()).map(({ timelineId }) => timelineId),
        );
      } catch (error) {
        reason = `safekeeper ${nodeId}: ${toStrataError(error).message}`;
      }
    }),
  );
  if (!isQuorum({ version: joint.version, members: joint.members }, (nodeId) => lists.has(nodeId))) {
    throw new StrataError('unavailable', `too few of safekeepers ${joint.members.join(', ')} answer (${reason})`);
  }
  return [...new Set([...lists.values()].flat())];
}

interface Move {
  readonly timelineId: string;
  readonly joint: Configuration;
  readonly newcomers: readonly Newcomer[];
}

async function moveTimeline(world: ChangeWorld, clients: Clients, move: Move, signal: AbortSignal): Promise<void> {
  const { timelineId, joint, newcomers } = move;
  const identity = await world.identityOf(timelineId);
  if (identity === undefined) return;
  const without = newcomers.filter(({ timelineIds }) => !timelineIds.has(timelineId));
  const given = without.length === 0 ? undefined : await newLog(clients, identity, joint);
  for (const { nodeId, incarnation } of without) {
    await clients
      .of(nodeId)
      .giveTimeline(identity, incarnation, given!)
      .catch((error: unknown) => {
        if (toStrataError(error).code === 'conflict') throw new Restart(toStrataError(error).message);
        throw error;
      });
  }
  const { hasWal, ...timeline } = identity;
  for (;;) {
    signal.throwIfAborted();
    if (world.directory.current.configuration.version !== joint.version) throw new Restart('it was changed meanwhile');
    if (world.settledVersion(timelineId) >= joint.version) {
      await caughtUp(clients, timeline, move, signal);
      return;
    }
    const electionSignal = AbortSignal.any([signal, AbortSignal.timeout(ELECTION_TIMEOUT_MS)]);
    const { directory: safekeepers, token, log } = world;
    const election = { safekeepers, token, timeline, mayCreate: !hasWal, yieldsToLeader: true, log };
    try {
      const proposer = await electProposer({ ...election, signal: electionSignal });
      try {
        while (world.settledVersion(timelineId) < joint.version && !proposer.fenced) {
          await sleep(LOOK_MS, undefined, { signal: electionSignal });
        }
        if (!proposer.fenced) await caughtUp(clients, timeline, move, signal);
      } finally {
        await proposer.close();
      }
    } catch (error) {
      if (error instanceof Restart) throw error;
      signal.throwIfAborted();
      if ((await world.identityOf(timelineId)) === undefined) return;
      // A leader is there, which settles it; or too few answer now.
      const { code, message } = toStrataError(error);
      if (code !== 'conflict') log.info({ timelineId, reason: message }, 'a timeline could not be moved yet');
      await sleep(RETRY_MS, undefined, { signal });
    }
  }
}

/** Of a newcomer. Throws `unavailable` when it cannot be told yet where it may begin. */
async function newLog(
  clients: Clients,
  { tenantId, timelineId, startLsn }: TimelineIdentity,
  joint: Configuration,
): Promise<AcceptorState> {
  const absent = new Set<number>();
  let reason = '';
  let latest: { readonly resumeLsn: Lsn; readonly history: TermHistory } | undefined;
  await Promise.all(
    joint.members.map(async (nodeId) => {
      try {
        const client = clients.of(nodeId);
        await client.status(tenantId, timelineId); // Opens it: how far the log goes is known then.
        const resumeLsn = await client.resumePoint(tenantId, timelineId);
        // Afterwards, when the history says of what term all before that point is.
        const { history, flushLsn } = await client.status(tenantId, timelineId);
        if (flushLsn < resumeLsn) throw new StrataError('unavailable', 'its log was made anew meanwhile');
        if (latest === undefined || resumeLsn > latest.resumeLsn) latest = { resumeLsn, history };
      } catch (error) {
        const { code, message } = toStrataError(error);
        if (code === 'not-found') absent.add(nodeId);
        else reason = `safekeeper ${nodeId}: ${message}`;
      }
    }),
  );
  const found = latest as { readonly resumeLsn: Lsn; readonly history: TermHistory } | undefined;
  if (found === undefined) {
    // Just being made.
    const isAbsent = isQuorum({ version: joint.version, members: joint.members }, (nodeId) => absent.has(nodeId));
    if (isAbsent) return blankState(startLsn, joint);
    throw new StrataError('unavailable', `nobody says where the log of timeline ${timelineId} may begin (${reason})`);
  }
  const { resumeLsn } = found;
  if (resumeLsn <= startLsn) return blankState(startLsn, joint);
  const history = historyUpTo(found.history, resumeLsn);
  return { term: history.at(-1)!.term, history, commitLsn: resumeLsn, generation: 0, configuration: joint };
}

/** Until newcomers have all that is committed now, whoever leads. */
async function caughtUp(
  clients: Clients,
  { tenantId, timelineId }: TimelineIdentity,
  { joint, newcomers }: Move,
  signal: AbortSignal,
): Promise<void> {
  const known = await Promise.allSettled(
    joint.members.map(async (nodeId) => clients.of(nodeId).status(tenantId, timelineId)),
  );
  const commitLsns = known.map((each): Lsn => (each.status === 'fulfilled' ? each.value.commitLsn : 0));
  for (const { nodeId } of newcomers) {
    for (;;) {
      const status = await clients
        .of(nodeId)
        .status(tenantId, timelineId)
        .catch((error: unknown) => toStrataError(error));
      if (status instanceof StrataError) {
        if (status.code === 'not-found') throw new Restart(`safekeeper ${nodeId} has lost timeline ${timelineId}`);
      } else if (status.isVoter && status.flushLsn >= Math.max(...commitLsns)) {
        break;
      }
      await sleep(LOOK_MS, undefined, { signal });
    }
  }
}

/**
 * Moves several timelines under a signal of their own: the first that fails ends the others, which may be waiting for who never answers. Rejects, when all
 * have ended, with what that first one rejected with.
 */
async function untilFailure(
  signal: AbortSignal,
  clients: Clients,
  work: (moving: AbortSignal, fail: (error: unknown) => never) => Promise<void>,
): Promise<void> {
  const aborter = new AbortController();
  let first: { readonly error: unknown } | undefined;
  const fail = (error: unknown): never => {
    first ??= { error };
    aborter.abort();
    clients.close(); // What was asked of them rejects at once.
    throw error;
  };
  try {
    await work(AbortSignal.any([signal, aborter.signal]), fail);
  } catch (error) {
    throw first === undefined ? error : first.error;
  }
}

class Clients {
  readonly #world: ChangeWorld;
  readonly #clients = new Map<number, SafekeeperClient>();

  constructor(world: ChangeWorld) {
    this.#world = world;
  }

  of(nodeId: number): SafekeeperClient {
    let client = this.#clients.get(nodeId);
    if (client === undefined) {
      const { directory, token } = this.#world;
      const address = directory.current.addresses.get(nodeId);
      if (address === undefined) throw new StrataError('unavailable', `safekeeper ${nodeId} does not run`);
      client = new SafekeeperClient({ address, token });
      this.#clients.set(nodeId, client);
    }
    return client;
  }

  close(): void {
    for (const client of this.#clients.values()) client.close();
  }
}
