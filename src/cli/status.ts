/** `strata status`: what runs, where, and how much of it. */
import { connect } from 'node:net';
import type { Command } from 'commander';
import { type CliContext, type CommonOptions, openPlatform, platformCommand, show } from './context.ts';
import type { PlatformFile } from '../api/control.ts';
import { describeRebuiltLog, readRebuiltLogs } from '../api/rebuilt-logs.ts';
import { CliError } from './errors.ts';
import { type BackpressureLimits, backpressureLimits } from '../api/backpressure-limits.ts';
import type { WalLag, WalLags } from '../api/wal-status.ts';
import type { ApiClient, RunningPlatform } from './platform.ts';
import { branchNames, listEndpoints, listProjects } from './entities.ts';
import { formatBytes, formatDuration, formatFields, formatSize } from './format.ts';
import { formatLsn } from '../postgres/lsn.ts';

const PAGESERVER = 'pageserver';
const PROBE_TIMEOUT_MS = 1_000;
/** One that hangs still takes connections. */
const PAGESERVER_TIMEOUT_MS = 3_000;
const SHOWN_REBUILT_LOGS = 5;
const SHOWN_LAGS = 10;

/** What the WAL of the platform's branches waits for. */
export type WalLagTool = (platform: RunningPlatform) => Promise<WalLags>;

/** Without `readWalLags` nothing is said of it. */
export function statusCommand(context: CliContext, readWalLags?: WalLagTool): Command {
  return platformCommand('status', 'show whether the platform runs, and where', 'status').action(
    async (options: CommonOptions) => {
      const { api, dataDirectory, file } = openPlatform(context, options);
      const ready = await api.isReady();
      const projects = ready ? await listProjects(api) : [];
      const endpoints = (await Promise.all(projects.map((project) => listEndpoints(api, project)))).flat();
      const activeCount = endpoints.filter((endpoint) => endpoint.current_state === 'active').length;
      const probed = await probeServices(file);
      const [objectStore, { lags, silent }] = await Promise.all([
        ready && probed[0]?.up === true ? readObjectStore(api) : undefined,
        (ready ? readWalLags?.({ api, dataDirectory, file }) : undefined) ?? { lags: [], silent: [] },
      ]);
      const silentNames = silent.map(safekeeperName);
      if (objectStore === 'no answer') silentNames.push(PAGESERVER);
      const services = probed.map((service) => ({ ...service, up: service.up && !silentNames.includes(service.name) }));
      const rebuilt = readRebuiltLogs(dataDirectory);
      const names = await branchNames(api, projects);
      const limits = backpressureLimits(file.walLimitBytes);
      const status = {
        ready,
        version: file.version,
        pid: file.pid,
        started_at: new Date(file.startedAtMs).toISOString(),
        data_directory: dataDirectory,
        postgres_address: `${file.host}:${file.pgPort}`,
        api_url: `${api.origin}/api/v2`,
        services,
        ...(typeof objectStore === 'object' ? { object_store: objectStore } : {}),
        project_count: projects.length,
        endpoint_count: endpoints.length,
        active_endpoint_count: activeCount,
        wal_limit_size: limits.keep.hardBytes,
        not_in_pages_limit_size: limits.ingest.hardBytes,
        wal: lags.map((lag) => ({
          timeline_id: lag.timelineId,
          branch: names.get(lag.timelineId) ?? null,
          commit_lsn: formatLsn(lag.commitLsn),
          state: walState(lag, limits),
          not_in_pages_size: lag.notInPagesBytes ?? null,
          not_uploaded_size: lag.notUploadedBytes ?? null,
          not_offloaded_size: lag.notOffloadedBytes,
          kept_size: lag.keptBytes,
          failures: lag.failures,
          damaged: lag.damaged,
          next_step: nextStep(lag, file.safekeepers.length) ?? null,
        })),
        rebuilt_logs: rebuilt.map((each) => ({
          timeline_id: each.timelineId,
          rebuilt_at: new Date(each.atMs).toISOString(),
          kept_lsn: formatLsn(each.keptLsn),
          last_commit_at: each.lastCommitMs === undefined ? null : new Date(each.lastCommitMs).toISOString(),
          lost_lsn: each.lostLsn === undefined ? null : formatLsn(each.lostLsn),
          source: each.source,
          safekeepers: each.safekeepers,
          damage: (each.damage ?? []).map((damage) => ({ ...damage, lsn: formatLsn(damage.lsn) })),
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
          ['services', describeServices(services)],
          ...(typeof objectStore === 'object' ? [['object store', describeObjectStore(objectStore)] as const] : []),
          ['projects', String(projects.length)],
          ['endpoints', `${endpoints.length}, ${activeCount} of them active`],
          ...(lags.length === 0 ? [] : [['WAL', describeWal(lags, limits)] as const]),
          ...lags
            .filter((lag) => walState(lag, limits) !== 'ok')
            .slice(0, SHOWN_LAGS)
            .map((lag): [string, string] => [
              '',
              describeLag(lag, names.get(lag.timelineId) ?? lag.timelineId, limits, file.safekeepers.length),
            ]),
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

type WalState = 'ok' | 'slowed' | 'stopped' | 'not offloaded' | 'refused' | 'damaged';

/** `slowed` and `stopped`: commits are, as storage lags. */
function walState(lag: WalLag, { ingest, keep }: BackpressureLimits): WalState {
  const { notInPagesBytes = 0, notUploadedBytes = 0, isOffloadFailing, failures, damaged } = lag;
  if (failures.length > 0) return 'refused';
  if (damaged.length > 0) return 'damaged';
  if (notInPagesBytes >= ingest.hardBytes || notUploadedBytes >= keep.hardBytes) return 'stopped';
  if (notInPagesBytes > ingest.softBytes || notUploadedBytes > keep.softBytes) return 'slowed';
  return isOffloadFailing ? 'not offloaded' : 'ok';
}

function describeWal(lags: readonly WalLag[], { keep }: BackpressureLimits): string {
  const sum = (of: (lag: WalLag) => number): string => formatSize(lags.reduce((total, lag) => total + of(lag), 0));
  const kept = `up to ${sum((lag) => lag.keptBytes)} on each safekeeper`;
  const waiting = `${sum((lag) => lag.notInPagesBytes ?? 0)} not in pages, ${sum((lag) => lag.notOffloadedBytes)} not in the object store`;
  const most = Math.max(...lags.map(({ notUploadedBytes = 0 }) => notUploadedBytes));
  const toUpload = `pages of ${formatSize(most)} of ${formatSize(keep.hardBytes)} to be uploaded`;
  const logs = lags.length === 1 ? `1 log: ` : `${lags.length} logs: `;
  return `${logs}${kept}, ${waiting} yet; ${lags.length === 1 ? toUpload : `the branch with most has ${toUpload}`}`;
}

function describeLag(lag: WalLag, name: string, limits: BackpressureLimits, safekeeperCount: number): string {
  const { notInPagesBytes = 0, notUploadedBytes = 0, keptBytes, failures, damaged } = lag;
  const state = walState(lag, limits);
  const { ingest, keep } = limits;
  const notInPages = `${formatSize(notInPagesBytes)} of ${formatSize(ingest.hardBytes)} not in pages`;
  const notUploaded = `${formatSize(notUploadedBytes)} of ${formatSize(keep.hardBytes)} whose pages are not uploaded`;
  const sizes = `${notInPages}, ${notUploaded}, ${formatSize(keptBytes)} kept`;
  const why = [...failures, ...damaged]
    .map(({ safekeeper, reason }) => `; safekeeper ${safekeeper}: ${reason}`)
    .join('');
  const next = nextStep(lag, safekeeperCount);
  return `${name} is ${state}: ${sizes}${why}${next === undefined ? '' : `; ${next}`}`;
}

/** What a person should do about a log that is damaged. */
function nextStep({ damaged }: WalLag, safekeeperCount: number): string | undefined {
  if (damaged.length === 0) return undefined;
  const ids = damaged.map(({ safekeeper }) => safekeeper);
  if (damaged.length <= (safekeeperCount - 1) / 2) {
    return `the others heal it by themselves, in a minute or two: see to the disk, and if it stays so, run "strata safekeepers replace ${ids.join(' ')}"`;
  }
  return `too few others have it to heal it: bring back what was on the disk; failing that, "strata safekeepers rebuild" says first what would be lost`;
}

interface ObjectStore {
  readonly location: string;
  readonly stale: boolean;
  readonly pending_branches: number;
  readonly pending_size: number;
  readonly failure?: string;
  readonly failing_since?: string;
}

/** Undefined when there is nothing to be said of it. */
async function readObjectStore(api: ApiClient): Promise<ObjectStore | 'no answer' | undefined> {
  try {
    const path = '/object_store';
    const { object_store } = await api.get<{ object_store: ObjectStore | null }>(path, PAGESERVER_TIMEOUT_MS);
    return object_store ?? undefined;
  } catch (error) {
    if (error instanceof CliError) return 'no answer';
    throw error;
  }
}

function describeObjectStore(store: ObjectStore): string {
  const { location, pending_branches: count, pending_size: size, failure, failing_since: since } = store;
  const pending =
    count === 0
      ? 'all layers are uploaded'
      : `${formatBytes(size)} of ${count} ${count === 1 ? 'branch' : 'branches'} to be uploaded`;
  const trouble = failure === undefined ? '' : `; failing since ${since}: ${failure}`;
  return `${location}, ${store.stale ? 'written by a later pageserver' : pending}${trouble}`;
}

interface ServiceStatus {
  readonly name: string;
  readonly address: string;
  /** It takes connections, and answers what is asked of it here. */
  readonly up: boolean;
}

function describeServices(services: readonly ServiceStatus[]): string {
  const names = services.map(({ name }) => name).join(', ');
  const down = services.filter(({ up }) => !up).map(({ name }) => name);
  if (down.length === 0) return names;
  const safekeeperCount = services.filter(({ name }) => name !== PAGESERVER).length;
  const downCount = down.filter((name) => name !== PAGESERVER).length;
  const hasQuorum = downCount < safekeeperCount / 2;
  const consequences = [
    ...(hasQuorum ? [] : ['commits and wakes wait for a majority of the safekeepers']),
    ...(down.includes(PAGESERVER) ? ['pages that no compute has wait for the pageserver'] : []),
  ];
  const effect = consequences.length === 0 ? '' : `: ${consequences.join(', ')}`;
  return `${names}; not answering: ${down.join(', ')}${effect}`;
}

function safekeeperName(id: number): string {
  return `safekeeper ${id}`;
}

async function probeServices(file: Pick<PlatformFile, 'pageserver' | 'safekeepers'>): Promise<ServiceStatus[]> {
  const services = [
    { name: PAGESERVER, ...file.pageserver },
    ...file.safekeepers.map((address, index) => ({ name: safekeeperName(address.id ?? index + 1), ...address })),
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
