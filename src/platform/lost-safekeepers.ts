/**
 * An operator gives up safekeepers that do not answer and will not come back, when a majority is lost with them: `strata safekeepers rebuild`.
 *
 * What those kept is put aside, and they begin again with an empty disk, so nobody ever hears of what they had again: that they have nothing is true from then
 * on, and the logs that a majority has lost with them are rebuilt as after any such loss (log-rebuild.ts). A crash between the two leaves what the next look of
 * the healer (wal-healer.ts) finishes.
 *
 * Refused while a majority has every log: then nothing is lost, and who is gone is replaced.
 *
 * Nobody need be given up: what a majority has lost already, and the healer does not rebuild by itself as a survivor is damaged, is rebuilt by who accepts what is
 * lost with that. Whatever is accepted, no log is made anew with less than this said it would keep.
 */
import type { SafekeeperListing, SafekeeperRebuild } from '../api/control.ts';
import type { PageserverClient } from '../api/pageserver.ts';
import type { RebuiltLog } from '../api/rebuilt-logs.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import type { LogRebuild } from './log-rebuild.ts';
import type { Safekeepers } from './safekeepers.ts';

export interface LostSafekeepersWorld {
  readonly safekeepers: Pick<Safekeepers, 'list' | 'giveUp'>;
  readonly rebuild: Pick<LogRebuild, 'exclusively' | 'written' | 'preview' | 'rebuild'>;
  readonly pageserver: Pick<PageserverClient, 'listTimelines'>;
  readonly onRebuilt: (rebuilt: RebuiltLog) => void;
  readonly log: Logger;
}

type Log = SafekeeperRebuild['logs'][number];

/** Without `acceptsLoss` nothing is changed: it is said what would be. Throws `bad-request`, `conflict`, `unavailable`. */
export async function rebuildWithout(
  world: LostSafekeepersWorld,
  ids: readonly number[],
  acceptsLoss: boolean,
): Promise<SafekeeperRebuild> {
  return world.rebuild.exclusively(async () => {
    const listing = await world.safekeepers.list();
    assertGone(listing, ids);
    const timelines = await world.rebuild.written(await world.pageserver.listTimelines());
    const lost = new Set(ids);
    const planned = await each(timelines, async (timelineId) => world.rebuild.preview(timelineId, lost));
    const others = listing.safekeepers.map(({ id }) => id).filter((id) => !lost.has(id));
    const isMajorityThere = others.length > listing.safekeepers.length / 2;
    if (isMajorityThere && planned.logs.length === 0 && planned.failed.length === 0) {
      throw new StrataError(
        'conflict',
        `safekeepers ${others.join(', ')} are a majority and have every log: nothing is lost${
          ids.length === 0
            ? ''
            : `. "strata safekeepers replace ${ids.join(' ')}" puts new ones in the place of those that are gone`
        }`,
      );
    }
    if (!acceptsLoss) return { isDone: false, ...planned };
    if (ids.length > 0) {
      world.log.warn({ safekeepers: ids }, 'safekeepers are given up');
      await world.safekeepers.giveUp(ids);
    }
    const plans = new Map(planned.logs.map((log) => [log.timelineId, log]));
    const done = await each(timelines, async (timelineId): Promise<Log | undefined> => {
      const plan = plans.get(timelineId);
      const rebuilt = await world.rebuild.rebuild(timelineId, plan?.keptLsn);
      if (rebuilt === undefined) return undefined;
      world.onRebuilt(rebuilt);
      return { ...rebuilt, heardLsn: plan?.heardLsn };
    });
    return { isDone: true, ...done };
  });
}

/** Only who is silent can be given up, and then all who are silent: one that comes back later might have more than is rebuilt without it. */
function assertGone({ safekeepers, change }: SafekeeperListing, ids: readonly number[]): void {
  if (change !== undefined) {
    throw new StrataError(
      'conflict',
      'a change of the safekeepers is under way: give it up with "strata safekeepers cancel" before',
    );
  }
  for (const id of ids) {
    const found = safekeepers.find((each) => each.id === id);
    if (found === undefined) {
      const known = safekeepers.map((each) => each.id).join(', ');
      throw new StrataError('bad-request', `there is no safekeeper ${id} (safekeepers: ${known})`);
    }
    if (found.state === 'up') {
      throw new StrataError(
        'conflict',
        `safekeeper ${id} answers: only who is gone can be given up. "strata safekeepers replace ${id}" replaces one that works`,
      );
    }
  }
  const silent = safekeepers.filter(({ id, state }) => state === 'down' && !ids.includes(id)).map(({ id }) => id);
  if (silent.length > 0) {
    throw new StrataError(
      'unavailable',
      `safekeeper ${silent.join(', ')} does not answer${ids.length === 0 ? '' : ' either'} and may have more than the others: wait until it does, or give it up too`,
    );
  }
}

async function each(
  timelineIds: readonly string[],
  work: (timelineId: string) => Promise<Log | undefined>,
): Promise<Pick<SafekeeperRebuild, 'logs' | 'failed'>> {
  const logs: Log[] = [];
  const failed: { timelineId: string; reason: string }[] = [];
  for (const timelineId of timelineIds) {
    try {
      const log = await work(timelineId);
      if (log !== undefined) logs.push(log);
    } catch (error) {
      failed.push({ timelineId, reason: toStrataError(error).message });
    }
  }
  return { logs, failed };
}
