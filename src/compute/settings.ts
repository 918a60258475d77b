/**
 * The configuration files of a compute (DESIGN 2.3): its disk is a cache, the quorum of safekeepers is what is durable.
 */
import type { PgVersion } from '../postgres/version.ts';

/** The bootstrap superuser: the platform's own, never given to users. */
export const ADMIN_ROLE = 'strata_admin';
/** The name under which the proposer connects; commits wait for it. */
export const PROPOSER_NAME = 'strata';

export type Settings = Readonly<Record<string, string>>;

/** Settings of every compute; `extra` may change any of those that are not about durability. */
export function computeSettings(options: { pgVersion: PgVersion; socketDir: string; extra?: Settings }): Settings {
  const { pgVersion, socketDir, extra } = options;
  return {
    shared_buffers: '128MB',
    max_connections: '100',
    max_prepared_transactions: '64',
    max_wal_size: '1GB',
    log_min_messages: 'warning',
    log_line_prefix: '%m [%p] %q%u@%d ',
    timezone: 'UTC',
    log_timezone: 'UTC',
    datestyle: 'iso, mdy',
    default_text_search_config: 'pg_catalog.english',
    // So many pages may be on their way from the pageserver; until 17 Postgres would ask for one at a time.
    effective_io_concurrency: '64',
    // Whoever may create a role may also become it, as a superuser could (from 16 that is no longer implied).
    ...(pgVersion >= 16 ? { createrole_self_grant: 'set, inherit' } : {}),
    ...extra,
    // What follows is what makes a compute of Strata: not to be changed.
    listen_addresses: '',
    unix_socket_directories: socketDir,
    unix_socket_permissions: '0700',
    fsync: 'off',
    full_page_writes: 'off',
    wal_init_zero: 'off',
    wal_recycle: 'off',
    wal_level: 'replica',
    max_wal_senders: '10',
    max_replication_slots: '10',
    max_slot_wal_keep_size: '-1',
    synchronous_commit: 'on',
    synchronous_standby_names: PROPOSER_NAME,
    wal_sender_timeout: '0',
    restart_after_crash: 'off',
    dynamic_shared_memory_type: 'posix',
    ...(pgVersion >= 18 ? { io_method: 'worker' } : {}),
  };
}

/** postgresql.conf text. */
export function encodeSettings(settings: Settings): string {
  const lines = Object.entries(settings).map(([name, value]) => `${name} = '${value.replaceAll("'", "''")}'`);
  return `# Written by Strata at each start; changes made here are lost.\n${lines.join('\n')}\n`;
}

/** pg_hba.conf: everybody proves a password, over the compute's own Unix socket only. */
export const hbaFile = `# Written by Strata at each start.
local all all scram-sha-256
local replication ${ADMIN_ROLE} scram-sha-256
`;
