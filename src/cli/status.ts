/** `strata status`: what runs, where, and how much of it. */
import { connect } from 'node:net';
import type { Command } from 'commander';
import { type CliContext, type CommonOptions, openPlatform, platformCommand, show } from './context.ts';
import type { PlatformFile } from '../api/control.ts';
import { describeRebuiltLog, readRebuiltLogs } from '../api/rebuilt-logs.ts';
import { CliError } from './errors.ts';
import type { ApiClient } from './platform.ts';
import { listEndpoints, listProjects } from './entities.ts';
import { formatBytes, formatDuration, formatFields } from './format.ts';
import { formatLsn } from '../postgres/lsn.ts';

const PROBE_TIMEOUT_MS = 1_000;
const SHOWN_REBUILT_LOGS = 5;

export function statusCommand(context: CliContext): Command {
  return platformCommand('status', 'show whether the platform runs, and where', 'status').action(
    async (options: CommonOptions) => {
      const { api, dataDirectory, file } = openPlatform(context, options);
      const ready = await api.isReady();
      const projects = ready ? await listProjects(api) : [];
      const endpoints = (await Promise.all(projects.map((project) => listEndpoints(api, project)))).flat();
      const activeCount = endpoints.filter((endpoint) => endpoint.current_state === 'active').length;
      const services = await probeServices(file);
      const objectStore = ready && services[0]?.up === true ? await readObjectStore(api) : undefined;
      const downNames = services.filter((service) => !service.up).map((service) => service.name);
      const rebuilt = readRebuiltLogs(dataDirectory);
      const status = {
        ready,
        version: file.version,
        pid: file.pid,
        started_at: new Date(file.startedAtMs).toISOString(),
        data_directory: dataDirectory,
        postgres_address: `${file.host}:${file.pgPort}`,
        api_url: `${api.origin}/api/v2`,
        services,
        ...(objectStore === undefined ? {} : { object_store: objectStore }),
        project_count: projects.length,
        endpoint_count: endpoints.length,
        active_endpoint_count: activeCount,
        rebuilt_logs: rebuilt.map((each) => ({
          timeline_id: each.timelineId,
          rebuilt_at: new Date(each.atMs).toISOString(),
          kept_lsn: formatLsn(each.keptLsn),
          last_commit_at: each.lastCommitMs === undefined ? null : new Date(each.lastCommitMs).toISOString(),
          source: each.source,
          safekeepers: each.safekeepers,
        })),
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
          [
            'services',
            `${services.map((service) => service.name).join(', ')}${downNames.length > 0 ? `; not answering: ${downNames.join(', ')}` : ''}`,
          ],
          ...(objectStore === undefined ? [] : [['object store', describeObjectStore(objectStore)] as const]),
          ['projects', String(projects.length)],
          ['endpoints', `${endpoints.length}, ${activeCount} of them active`],
          ...rebuilt
            .slice(-SHOWN_REBUILT_LOGS)
            .map((each): [string, string] => [
              'rebuilt',
              `${new Date(each.atMs).toISOString()}: ${describeRebuiltLog(each)}`,
            ]),
        ]),
      );
    },
  );
}

interface ObjectStore {
  readonly location: string;
  readonly stale: boolean;
  readonly pending_branches: number;
  readonly pending_size: number;
  readonly failure?: string;
  readonly failing_since?: string;
}

/** Undefined when the pageserver does not answer. */
async function readObjectStore(api: ApiClient): Promise<ObjectStore | undefined> {
  try {
    const { object_store } = await api.get<{ object_store: ObjectStore | null }>('/object_store');
    return object_store ?? undefined;
  } catch (error) {
    if (error instanceof CliError) return undefined;
    throw error;
  }
}

function describeObjectStore(store: ObjectStore): string {
  const { location, pending_branches: count, pending_size: size, failure, failing_since: since } = store;
  const pending =
    count === 0
      ? 'all is uploaded'
      : `${formatBytes(size)} of ${count} ${count === 1 ? 'branch' : 'branches'} to be uploaded`;
  const trouble = failure === undefined ? '' : `; not answering since ${since}: ${failure}`;
  return `${location}, ${store.stale ? 'written by a later pageserver' : pending}${trouble}`;
}

interface ServiceStatus {
  readonly name: string;
  readonly address: string;
  /** It takes connections. */
  readonly up: boolean;
}

async function probeServices(file: Pick<PlatformFile, 'pageserver' | 'safekeepers'>): Promise<ServiceStatus[]> {
  const services = [
    { name: 'pageserver', ...file.pageserver },
    ...file.safekeepers.map((address, index) => ({ name: `safekeeper ${address.id ?? index + 1}`, ...address })),
  ];
  return Promise.all(
    services.map(async ({ name, host, port }) => ({
      name,
      address: `${host}:${port}`,
      up: await takesConnections(host, port),
    })),
  );
}

function takesConnections(host: string, port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect({ host, port, timeout: PROBE_TIMEOUT_MS });
    const end = (up: boolean): void => {
      socket.destroy();
      resolve(up);
    };
    socket.once('connect', () => end(true));
    socket.once('error', () => end(false));
    socket.once('timeout', () => end(false));
  });
}
