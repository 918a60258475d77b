/**
 * Rows as the API shows them: Neon's entities, every required field, plus those optional ones that we know.
 * What Strata does not count (billing figures) is 0; what it does not limit is shown as the largest value that clients take.
 */
import type { ImportProgress, ObjectStoreStatus, TimelineSizes } from '../api/pageserver.ts';
import type { PointInHistory } from './branch-points.ts';
import type { BranchChanges } from './branch-changes.ts';
import type { BranchRow, DatabaseRow, EndpointRow, ImportRow, OperationRow, ProjectRow, RoleRow } from './state.ts';
import type { ControlConfig } from './context.ts';
import { formatLsn } from '../postgres/lsn.ts';
import { formatTimestampMs, formatTimestampUs } from './timestamps.ts';

export const REGION_ID = 'local';
export const USER_ID = '00000000-0000-4000-8000-000000000001';
const PLATFORM_ID = 'strata';
const PROVISIONER = 'serverless-platform';
const LOGICAL_SIZE_LIMIT_BYTES = 2 ** 50;

const NOTHING_BILLED = {
  active_time_seconds: 0,
  compute_time_seconds: 0,
  cpu_used_sec: 0,
  data_transfer_bytes: 0,
  written_data_bytes: 0,
} as const;

function projectBase(row: ProjectRow, config: ControlConfig, lastActive: number | undefined) {
  return {
    id: row.id,
    platform_id: PLATFORM_ID,
    region_id: REGION_ID,
    name: row.name,
    provisioner: PROVISIONER,
    default_endpoint_settings: JSON.parse(row.default_endpoint_settings) as object,
    settings: JSON.parse(row.settings) as object,
    pg_version: row.pg_version,
    proxy_host: config.domain,
    branch_logical_size_limit: LOGICAL_SIZE_LIMIT_BYTES / 2 ** 20,
    branch_logical_size_limit_bytes: LOGICAL_SIZE_LIMIT_BYTES,
    store_passwords: row.store_passwords === 1,
    cpu_used_sec: 0,
    creation_source: 'console',
    history_retention_seconds: row.history_retention_seconds,
    created_at: formatTimestampMs(row.created_at),
    updated_at: formatTimestampMs(row.updated_at),
    owner_id: USER_ID,
    ...(lastActive === undefined ? {} : { compute_last_active_at: formatTimestampMs(lastActive) }),
  };
}

/** `lastActiveMs`: the newest activity of the project's endpoints. */
export function projectListItem(row: ProjectRow, config: ControlConfig, lastActiveMs?: number) {
  return { ...projectBase(row, config, lastActiveMs), active_time: 0 };
}

export function project(row: ProjectRow, config: ControlConfig, lastActiveMs?: number) {
  return {
    ...NOTHING_BILLED,
    data_storage_bytes_hour: 0,
    ...projectBase(row, config, lastActiveMs),
    consumption_period_start: formatTimestampMs(row.created_at),
    consumption_period_end: formatTimestampMs(row.created_at),
  };
}

export function branch(row: BranchRow, logicalSizeBytes?: number) {
  return {
    id: row.id,
    project_id: row.project_id,
    timeline_id: row.timeline_id,
    ...(row.parent_id === null ? {} : { parent_id: row.parent_id, parent_lsn: formatLsn(row.ancestor_lsn) }),
    ...(row.parent_timestamp_us === null ? {} : { parent_timestamp: formatTimestampUs(row.parent_timestamp_us) }),
    name: row.name,
    current_state: row.state,
    ...(row.state === 'init' ? { pending_state: 'ready' } : {}),
    state_changed_at: formatTimestampMs(row.state_changed_at),
    ...(logicalSizeBytes === undefined ? {} : { logical_size: logicalSizeBytes }),
    creation_source: row.creation_source,
    primary: row.is_default === 1,
    default: row.is_default === 1,
    protected: row.protected === 1,
    ...NOTHING_BILLED,
    created_at: formatTimestampMs(row.created_at),
    updated_at: formatTimestampMs(row.updated_at),
    init_source: 'parent-data',
  };
}

export function endpoint(row: EndpointRow, config: ControlConfig) {
  return {
    host: endpointHost(row.id, config),
    id: row.id,
    ...(row.name === null ? {} : { name: row.name }),
    project_id: row.project_id,
    branch_id: row.branch_id,
    autoscaling_limit_min_cu: row.autoscaling_limit_min_cu,
    autoscaling_limit_max_cu: row.autoscaling_limit_max_cu,
    region_id: REGION_ID,
    type: row.type,
    current_state: row.state,
    ...(row.pending_state === null || row.pending_state === row.state ? {} : { pending_state: row.pending_state }),
    settings: JSON.parse(row.settings) as object,
    pooler_enabled: row.pooler_enabled === 1,
    pooler_mode: 'transaction',
    disabled: row.disabled === 1,
    passwordless_access: row.passwordless_access === 1,
    ...optionalTime('last_active', row.last_active),
    creation_source: row.creation_source,
    created_at: formatTimestampMs(row.created_at),
    updated_at: formatTimestampMs(row.updated_at),
    ...optionalTime('started_at', row.started_at),
    ...optionalTime('suspended_at', row.suspended_at),
    proxy_host: config.domain,
    suspend_timeout_seconds: row.suspend_timeout_seconds,
    provisioner: PROVISIONER,
  };
}

/** With the proxy's port: clients put the host into connection strings as it is. */
export function endpointHost(endpointId: string, config: ControlConfig): string {
  return `${endpointId}.${config.domain}:${config.proxyPort}`;
}

export function role(row: RoleRow, password?: string) {
  return {
    branch_id: row.branch_id,
    name: row.name,
    ...(password === undefined ? {} : { password }),
    protected: row.protected === 1,
    authentication_method: 'password',
    created_at: formatTimestampMs(row.created_at),
    updated_at: formatTimestampMs(row.updated_at),
  };
}

export function database(row: DatabaseRow) {
  return {
    id: row.id,
    branch_id: row.branch_id,
    name: row.name,
    owner_name: row.owner_name,
    created_at: formatTimestampMs(row.created_at),
    updated_at: formatTimestampMs(row.updated_at),
  };
}

export function operation(row: OperationRow) {
  return {
    id: row.id,
    project_id: row.project_id,
    ...(row.branch_id === null ? {} : { branch_id: row.branch_id }),
    ...(row.endpoint_id === null ? {} : { endpoint_id: row.endpoint_id }),
    action: row.action,
    status: row.status,
    ...(row.error === null ? {} : { error: row.error }),
    failures_count: row.failures_count,
    ...optionalTime('retry_at', row.retry_at),
    created_at: formatTimestampMs(row.created_at),
    updated_at: formatTimestampMs(row.updated_at),
    total_duration_ms: row.updated_at - row.created_at,
  };
}

function optionalTime<Name extends string>(name: Name, timeMs: number | null): { [key in Name]?: string } {
  return (timeMs === null ? {} : { [name]: formatTimestampMs(timeMs) }) as { [key in Name]?: string };
}

/** Not Neon's: what a branch takes, in bytes. */
export function branchStorage(row: BranchRow, sizes: TimelineSizes): object {
  return {
    branch_id: row.id,
    name: row.name,
    ...(row.parent_id === null ? {} : { parent_id: row.parent_id }),
    logical_size: sizes.logicalBytes,
    history_size: sizes.historyBytes,
    unwritten_size: sizes.memoryBytes,
    shared_with_parent_size: sizes.sharedBytes,
    freed_by_deletion_size: sizes.freedByDeletionBytes,
    oldest_lsn: formatLsn(sizes.oldestLsn),
    ...(sizes.oldestTimeMs === undefined ? {} : { oldest_timestamp: new Date(sizes.oldestTimeMs).toISOString() }),
  };
}

/** `timestampUs`: when the latest commit in it was made. */
export function point({ branch, lsn }: PointInHistory, timestampUs: number | undefined): object {
  return {
    branch_id: branch.id,
    branch_name: branch.name,
    timeline_id: branch.timeline_id,
    lsn: formatLsn(lsn),
    ...(timestampUs === undefined ? {} : { last_commit_at: formatTimestampUs(timestampUs) }),
  };
}

/** Not Neon's: what changed in a branch. Sizes and counts are in blocks of 8 KiB. */
export function branchChanges(changes: BranchChanges): object {
  const { branch, fromLsn, toLsn, forks, slruPageCount, keyBlocksRead, cursor } = changes;
  return {
    branch_id: branch.id,
    from_lsn: formatLsn(fromLsn),
    to_lsn: formatLsn(toLsn),
    forks: forks.map(({ fork, blockCount, ranges, size }) => ({
      tablespace_oid: fork.spc,
      database_oid: fork.db,
      relfilenode: fork.rel,
      fork: FORK_NAMES[fork.fork] ?? String(fork.fork),
      changed_blocks: blockCount,
      ...(ranges === undefined ? {} : { ranges }),
      ...(size === undefined ? {} : { blocks_before: size.before ?? null, blocks_after: size.after ?? null }),
    })),
    ...(slruPageCount === undefined ? {} : { transaction_status_pages: slruPageCount }),
    index_blocks_read: keyBlocksRead,
    ...(cursor === undefined ? {} : { pagination: { next: cursor } }),
  };
}

const FORK_NAMES = ['main', 'fsm', 'vm', 'init'];

export function objectStore(status: ObjectStoreStatus): Record<string, unknown> {
  return {
    location: status.store,
    generation: status.generation,
    stale: status.isStale,
    pending_branches: status.pendingTimelines,
    pending_size: status.pendingBytes,
    pending_deletions: status.pendingDeletions,
    ...(status.failure === undefined ? {} : { failure: status.failure }),
    ...(status.failingSinceMs === undefined ? {} : { failing_since: formatTimestampMs(status.failingSinceMs) }),
  };
}

/** Not Neon's: a project that comes from elsewhere. */
export function dataImport(row: ImportRow, progress?: ImportProgress): object {
  return {
    id: row.id,
    project_id: row.project_id,
    branch_id: row.branch_id,
    data_directory: row.data_directory,
    state: row.state,
    ...(row.error === null ? {} : { error: row.error }),
    ...(progress === undefined ? {} : { done_bytes: progress.doneBytes, total_bytes: progress.totalBytes }),
    notes: JSON.parse(row.notes) as string[],
    created_at: formatTimestampMs(row.created_at),
    updated_at: formatTimestampMs(row.updated_at),
  };
}
