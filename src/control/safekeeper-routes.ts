/** The API's part about the safekeepers, which Neon's has not: list them, change who they are. */
import type { FastifyInstance } from 'fastify';
import type { SafekeeperAdmin, SafekeeperChange, SafekeeperListing } from '../api/control.ts';

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
