/** The API's part about the safekeepers, which Neon's has not: list them, change who they are, rebuild what is lost with them. */
import type { FastifyInstance } from 'fastify';
import type { SafekeeperAdmin, SafekeeperChange, SafekeeperListing, SafekeeperRebuild } from '../api/control.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';

const ids = { type: 'array', items: { type: 'integer', minimum: 1 }, minItems: 1, uniqueItems: true } as const;
const changeBody = {
  type: 'object',
  required: ['change'],
  additionalProperties: false,
  properties: {
    change: {
      oneOf: [
        {
          type: 'object',
          required: ['kind', 'count'],
          additionalProperties: false,
          properties: { kind: { const: 'add' }, count: { type: 'integer', minimum: 1 } },
        },
        {
          type: 'object',
          required: ['kind', 'ids'],
          additionalProperties: false,
          properties: { kind: { enum: ['remove', 'replace'] }, ids },
        },
      ],
    },
  },
} as const;

const rebuildBody = {
  type: 'object',
  required: ['ids'],
  additionalProperties: false,
  properties: { ids: { ...ids, minItems: 0 }, accept_loss: { type: 'boolean' } },
} as const;

export function registerSafekeepers(api: FastifyInstance, safekeepers: SafekeeperAdmin): void {
  api.get('/safekeepers', async () => shown(await safekeepers.list()));
  api.post<{ Body: { change: SafekeeperChange } }>(
    '/safekeepers/change',
    { schema: { body: changeBody } },
    async (request, reply) => reply.code(202).send({ members: await safekeepers.change(request.body.change) }),
  );
  api.delete('/safekeepers/change', async () => {
    await safekeepers.cancel();
    return shown(await safekeepers.list());
  });
  api.post<{ Body: { ids: number[]; accept_loss?: boolean } }>(
    '/safekeepers/rebuild',
    { schema: { body: rebuildBody } },
    async (request) => shownRebuild(await safekeepers.rebuild(request.body.ids, request.body.accept_loss ?? false)),
  );
}

function shownRebuild({ isDone, logs, failed }: SafekeeperRebuild) {
  const shownLsn = (lsn: Lsn | undefined): string | null => (lsn === undefined ? null : formatLsn(lsn));
  return {
    done: isDone,
    logs: logs.map(({ timelineId, keptLsn, lastCommitMs, heardLsn, source, safekeepers, damage = [] }) => ({
      timeline_id: timelineId,
      kept_lsn: formatLsn(keptLsn),
      last_commit_at: lastCommitMs === undefined ? null : new Date(lastCommitMs).toISOString(),
      lost_lsn: heardLsn !== undefined && heardLsn > keptLsn ? shownLsn(heardLsn) : null,
      source,
      safekeepers,
      damage: damage.map((each) => ({ ...each, lsn: formatLsn(each.lsn) })),
    })),
    failed: failed.map(({ timelineId, reason }) => ({ timeline_id: timelineId, reason })),
  };
}

function shown({ version, safekeepers, change }: SafekeeperListing) {
  return {
    version,
    safekeepers: safekeepers.map(({ timelineCount, behindCount, behindBytes, ...others }) => ({
      ...others,
      timeline_count: timelineCount,
      behind_count: behindCount,
      behind_bytes: behindBytes,
    })),
    ...(change === undefined
      ? {}
      : {
          change: {
            members: change.members,
            moved_timelines: change.movedTimelines,
            timeline_count: change.timelineCount,
            ...(change.lastError === undefined ? {} : { last_error: change.lastError }),
          },
        }),
  };
}
