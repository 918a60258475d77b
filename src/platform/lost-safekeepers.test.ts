/** Who may be given up, and when. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { SafekeeperListing } from '../api/control.ts';
import type { ListedTimeline } from '../api/pageserver.ts';
import { createLog } from '../base/log.ts';
import { type LostSafekeepersWorld, rebuildWithout } from './lost-safekeepers.ts';

const log = createLog({ name: 'test', level: 'silent' });
const PLAN = {
  keptLsn: 1_000,
  lastCommitMs: 5,
  source: 'object store',
  safekeepers: [1, 2],
} as const;

/** Of safekeepers 1 to 3, of which those are silent, and two logs, of which those are lost without them. */
function world(silent: readonly number[], lostIds: readonly string[], more: Partial<SafekeeperListing> = {}) {
  const told: string[] = [];
  const listing: SafekeeperListing = {
    version: 1,
    safekeepers: [1, 2, 3].map((id) => ({
      id,
      address: '',
      state: silent.includes(id) ? 'down' : 'up',
      role: 'member',
      timelineCount: 0,
      behindCount: 0,
      behindBytes: 0,
    })),
    ...more,
  };
  const lostSafekeepers: LostSafekeepersWorld = {
    safekeepers: {
      list: async () => listing,
      giveUp: async (ids) => void told.push(`gives up ${ids.join()}`),
    },
    rebuild: {
      exclusively: async (work) => work(),
      written: async (timelines) => timelines.map(({ timelineId }) => timelineId),
      preview: async (timelineId) =>
        lostIds.includes(timelineId) ? { ...PLAN, timelineId, heardLsn: 1_200 } : undefined,
      rebuild: async (timelineId) => (lostIds.includes(timelineId) ? { ...PLAN, timelineId, atMs: 9 } : undefined),
    },
    pageserver: {
      listTimelines: async () =>
        ['a', 'b'].map((timelineId) => ({ kind: 'loaded', timelineId }) as unknown as ListedTimeline),
    },
    onRebuilt: ({ timelineId }) => void told.push(`${timelineId} is rebuilt`),
    log,
  };
  return { told, lostSafekeepers };
}

test('only all who are silent are given up, and only when a log is lost without them', async () => {
  const refused = async (
    silent: readonly number[],
    ids: readonly number[],
    lostIds: readonly string[],
    code: string,
    message: RegExp,
    more: Partial<SafekeeperListing> = {},
  ): Promise<void> => {
    const { told, lostSafekeepers } = world(silent, lostIds, more);
    await assert.rejects(rebuildWithout(lostSafekeepers, ids, true), { code, message });
    assert.deepEqual(told, []);
  };
  await refused([], [2], ['a'], 'conflict', /safekeeper 2 answers/);
  await refused([1, 2], [1], ['a'], 'unavailable', /safekeeper 2 does not answer either/);
  await refused([1, 2], [1, 7], ['a'], 'bad-request', /there is no safekeeper 7 \(safekeepers: 1, 2, 3\)/);
  await refused([2], [2], [], 'conflict', /safekeepers 1, 3 are a majority and have every log.* replace 2/);
  const change = { members: [1, 2, 4], movedTimelines: 0, timelineCount: 0 };
  await refused([1, 2], [1, 2], ['a'], 'conflict', /change of the safekeepers is under way/, { change });
});

test('what is lost is told without being done, and done when the loss is accepted', async () => {
  const { told, lostSafekeepers } = world([1, 2], ['b']);
  const planned = await rebuildWithout(lostSafekeepers, [1, 2], false);
  assert.deepEqual([planned.isDone, planned.failed, told], [false, [], []]);
  assert.deepEqual(planned.logs, [{ ...PLAN, timelineId: 'b', heardLsn: 1_200 }]);
  const done = await rebuildWithout(lostSafekeepers, [1, 2], true);
  assert(done.isDone);
  assert.deepEqual([done.logs[0]?.timelineId, done.logs[0]?.heardLsn], ['b', 1_200]);
  assert.deepEqual(told, ['gives up 1,2', 'b is rebuilt']);
});

test('one of two may be given up when a log is lost with it, as the others have lost theirs', async () => {
  const { told, lostSafekeepers } = world([3], ['a', 'b']);
  await rebuildWithout(lostSafekeepers, [3], true);
  assert.deepEqual(told, ['gives up 3', 'a is rebuilt', 'b is rebuilt']);
});
