/**
 * Makes safekeepers equal where no compute does: one that was down while a branch was written, or has lost its disk, is brought on from the others' disks
 * although the branch sleeps. A running compute's proposer does that for its own branch; here a proposer is elected for the others, for as long as it
 * takes. It yields to any leader, and so never disturbs a compute. A log that a majority has lost is rebuilt (log-rebuild.ts).
 *
 * Committed WAL on the disks is looked at too, each log's some time after the start and then every hour, and mended from the others (safekeeper/mended-wal.ts).
 *
 * Safekeepers tell the LSNs of all their timelines in one message, so a look at thousands of equal ones costs little.
 */
import type { PageserverClient } from '../api/pageserver.ts';
import type { RebuiltLog } from '../api/rebuilt-logs.ts';
import { SafekeeperClient, type TimelineProgress } from '../api/safekeeper.ts';
import { addressesOf, type SafekeeperDirectory } from '../api/safekeeper-set.ts';
import { toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { electProposer } from '../compute/proposer.ts';
import type { LogRebuild } from './log-rebuild.ts';

export interface WalHealerOptions {
  readonly safekeepers: SafekeeperDirectory;
  readonly pageserver: Pick<PageserverClient, 'timelineIdentity' | 'listTimelines'>;
  /** Scope `platform`. */
  readonly token: string;
  readonly log: Logger;
  /** For logs that a majority has lost; without it they stay lost. */
  readonly rebuild?: LogRebuild;
  readonly onRebuilt?: (rebuilt: RebuiltLog) => void;
  /** Told once of each log that is not rebuilt before somebody accepts what is lost with that. */
  readonly onLoss?: (reason: string) => void;
  readonly intervalMs?: number;
}

const INTERVAL_MS = 30_000;
const HEALING_TIMEOUT_MS = 120_000;
/** After which what is on the disks is looked at again. */
const MEND_INTERVAL_MS = 3_600_000;
/** After which no further log is begun with before the next look. */
const MENDING_MS = 1_000;

interface Unequal {
  readonly timelineId: string;
  /** Where the safekeepers stand; a timeline whose compute is at work moves on between two looks. */
  readonly positions: string;
}

export class WalHealer {
  readonly #options: WalHealerOptions;
  #seen = new Map<string, string>();
  /** How many timelines each safekeeper had at the last look: fewer means that some are lost, or deleted. */
  #counts: readonly number[] | undefined;
  readonly #toldLosses = new Set<string>();
  #clients: readonly SafekeeperClient[] = [];
  readonly #stopWatching: () => void;
  readonly #closing = new AbortController();
  readonly #timer: NodeJS.Timeout;
  #healing: Promise<void> | undefined;
  #mending: Promise<void> | undefined;
  /** When the WAL of a timeline was looked at on a safekeeper, by `timeline id/node id`. */
  readonly #mendedAtMs = new Map<string, number>();
  #lookCount = 0;

  constructor(options: WalHealerOptions) {
    this.#options = options;
    this.#connect();
    this.#stopWatching = options.safekeepers.watch(() => this.#connect());
    this.#timer = setInterval(() => void this.heal(), options.intervalMs ?? INTERVAL_MS);
    this.#timer.unref();
  }

  /** Looks once, and heals what was unequal in the same way at the last look too. Never rejects. */
  heal(): Promise<void> {
    this.#healing ??= this.#heal().finally(() => (this.#healing = undefined));
    return this.#healing;
  }

  #connect(): void {
    const { token, safekeepers } = this.#options;
    for (const client of this.#clients) client.close();
    this.#clients = addressesOf(safekeepers.current).map((address) => new SafekeeperClient({ address, token }));
    this.#seen.clear();
    this.#counts = undefined;
  }

  async close(): Promise<void> {
    this.#stopWatching();
    clearInterval(this.#timer);
    this.#closing.abort();
    await this.#healing;
    for (const client of this.#clients) client.close();
    await this.#mending;
  }

  /** Resolves when the looking at disks that a look has begun has ended. */
  async mended(): Promise<void> {
    await this.#mending;
  }

  async #heal(): Promise<void> {
    await this.#look().catch((error: unknown) => {
      this.#options.log.warn({ reason: toStrataError(error).message }, 'safekeepers could not be looked at');
    });
  }

  async #look(): Promise<void> {
    if (this.#options.safekeepers.current.configuration.newMembers !== undefined) return; // They are made equal by who changes them.
    const lists = await Promise.all(this.#clients.map((client) => client.list().catch(() => undefined)));
    const answers = lists.filter((list) => list !== undefined);
    if (answers.length < lists.length) return; // What is down will be unequal when it is back.
    // Who has just been started has other things to do.
    if (this.#lookCount++ > 0) this.#mending ??= this.#mend(answers).finally(() => (this.#mending = undefined));
    await this.#rebuildLost(answers);
    const unequal = unequalTimelines(answers);
    const stuck = unequal.filter(({ timelineId, positions }) => this.#seen.get(timelineId) === positions);
    this.#seen = new Map(unequal.map(({ timelineId, positions }) => [timelineId, positions]));
    for (const { timelineId } of stuck) {
      if (this.#closing.signal.aborted) return;
      await this.#healOne(timelineId).catch((error: unknown) => {
        if (toStrataError(error).code === 'conflict') return; // A leader is there.
        this.#options.log.warn({ timelineId, err: error }, 'safekeepers could not be made equal');
      });
    }
  }

  /** `lists` are those of the members, in their order. */
  async #mend(lists: readonly (readonly TimelineProgress[])[]): Promise<void> {
    const { safekeepers, token, log } = this.#options;
    if (this.#mendedAtMs.size > 2 * lists.flat().length) this.#mendedAtMs.clear(); // Most of them are gone.
    const members = safekeepers.current.configuration.members.map((nodeId, index) => ({
      nodeId,
      address: safekeepers.current.addresses.get(nodeId)!,
      commitLsns: new Map(lists[index]!.map(({ timelineId, commitLsn }) => [timelineId, commitLsn])),
    }));
    const startedAtMs = performance.now();
    for (const [index, { nodeId, address }] of members.entries()) {
      // Others are not kept waiting by one that takes long.
      const client = new SafekeeperClient({ address, token });
      const onClosing = (): void => client.close();
      this.#closing.signal.addEventListener('abort', onClosing);
      try {
        for (const { tenantId, timelineId } of lists[index]!) {
          const [key, nowMs] = [`${timelineId}/${nodeId}`, performance.now()];
          if (nowMs - (this.#mendedAtMs.get(key) ?? -Infinity) < MEND_INTERVAL_MS) continue;
          if (this.#closing.signal.aborted || nowMs - startedAtMs > MENDING_MS) return;
          this.#mendedAtMs.set(key, nowMs);
          const sources = members
            .filter((member) => member.nodeId !== nodeId)
            .map((member) => ({
              nodeId: member.nodeId,
              address: member.address,
              endLsn: member.commitLsns.get(timelineId) ?? 0,
            }));
          const count = await client.mendWal({ tenantId, timelineId, sources }).catch((error: unknown) => {
            const { code, message } = toStrataError(error);
            // One that was deleted, or is given anew, meanwhile.
            if (code !== 'not-found' && code !== 'conflict' && !this.#closing.signal.aborted)
              log.error({ timelineId, nodeId, reason: message }, 'damaged WAL on a safekeeper could not be mended');
            return 0;
          });
          if (count > 0)
            log.warn({ timelineId, nodeId, count }, 'damaged WAL on a safekeeper was mended by the others');
        }
      } finally {
        this.#closing.signal.removeEventListener('abort', onClosing);
        client.close();
      }
    }
  }

  async #rebuildLost(lists: readonly (readonly TimelineProgress[])[]): Promise<void> {
    const { rebuild, onRebuilt, onLoss, pageserver, log } = this.#options;
    const counts = lists.map((list) => list.length);
    const before = this.#counts;
    if (rebuild === undefined || (before !== undefined && counts.every((count, index) => count >= before[index]!)))
      return;
    const quorum = Math.floor(lists.length / 2) + 1;
    const known = lists.map((list) => new Set(list.map(({ timelineId }) => timelineId)));
    const missing = (await pageserver.listTimelines()).filter(
      ({ timelineId }) => known.filter((ids) => !ids.has(timelineId)).length >= quorum,
    );
    let failedCount = 0;
    await rebuild.exclusively(async () => {
      for (const timelineId of await rebuild.written(missing)) {
        if (this.#closing.signal.aborted) return;
        try {
          const rebuilt = await rebuild.rebuild(timelineId);
          if (rebuilt !== undefined) onRebuilt?.(rebuilt);
        } catch (error) {
          failedCount++;
          const { code, message } = toStrataError(error);
          log.error({ timelineId, reason: message }, 'a lost log could not be rebuilt');
          if (code !== 'conflict' || this.#toldLosses.has(timelineId)) continue;
          this.#toldLosses.add(timelineId);
          onLoss?.(message);
        }
      }
    });
    if (failedCount === 0) this.#counts = counts;
  }

  async #healOne(timelineId: string): Promise<void> {
    const { safekeepers, pageserver, token, log } = this.#options;
    const signal = AbortSignal.any([this.#closing.signal, AbortSignal.timeout(HEALING_TIMEOUT_MS)]);
    const timeline = await pageserver.timelineIdentity(timelineId, signal);
    const election = { safekeepers, token, timeline, mayCreate: false, yieldsToLeader: true, signal, log };
    const proposer = await electProposer(election);
    try {
      await proposer.waitEqual(signal);
      log.info({ timelineId }, 'safekeepers are equal again');
    } finally {
      await proposer.close();
    }
  }
}

function unequalTimelines(lists: readonly (readonly TimelineProgress[])[]): Unequal[] {
  const byTimeline = new Map<string, TimelineProgress[]>();
  for (const progress of lists.flat()) {
    const known = byTimeline.get(progress.timelineId);
    if (known === undefined) byTimeline.set(progress.timelineId, [progress]);
    else known.push(progress);
  }
  const unequal: Unequal[] = [];
  for (const [timelineId, all] of byTimeline) {
    // An unopened timeline's flush LSN is only a lower bound, so commit LSNs are compared, which a clean end leaves equal.
    const isEqual = all.length === lists.length && all.every(({ commitLsn }) => commitLsn === all[0]!.commitLsn);
    if (!isEqual) unequal.push({ timelineId, positions: all.map(({ commitLsn }) => commitLsn).join() });
  }
  return unequal;
}
