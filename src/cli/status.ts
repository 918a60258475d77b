/** `strata status`: what runs, where, and how much of it. */
import type { Command } from 'commander';
import { type CliContext, type CommonOptions, openPlatform, platformCommand, show } from './context.ts';
import { listEndpoints, listProjects } from './entities.ts';
import { formatDuration, formatFields } from './format.ts';

export function statusCommand(context: CliContext): Command {
  return platformCommand('status', 'show whether the platform runs, and where', 'status').action(
    async (options: CommonOptions) => {
      const { api, dataDirectory, file } = openPlatform(context, options);
      const ready = await api.isReady();
      const projects = ready ? await listProjects(api) : [];
      const endpoints = (await Promise.all(projects.map((project) => listEndpoints(api, project)))).flat();
      const activeCount = endpoints.filter((endpoint) => endpoint.current_state === 'active').length;
      const status = {
        ready,
        version: file.version,
        pid: file.pid,
        started_at: new Date(file.startedAtMs).toISOString(),
        data_directory: dataDirectory,
        postgres_address: `${file.host}:${file.pgPort}`,
        api_url: `${api.origin}/api/v2`,
        project_count: projects.length,
        endpoint_count: endpoints.length,
        active_endpoint_count: activeCount,
      };
      show(context, options, status, () =>
        formatFields([
          [
            'state',
            `${ready ? 'ready' : 'starting'}, up ${formatDuration(context.now() - file.startedAtMs)}, process ${file.pid}`,
          ],
          ['version', file.version],
          ['data', dataDirectory],
          ['Postgres', status.postgres_address],
          ['API', status.api_url],
          ['projects', String(projects.length)],
          ['endpoints', `${endpoints.length}, ${activeCount} of them active`],
        ]),
      );
    },
  );
}
