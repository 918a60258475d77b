/**
 * JSON schemas of the API's requests. Fields that are not named here are taken and ignored, as clients send more than we know; what we know
 * but cannot do yet is refused by the logic, by name.
 */
import { RETENTION_MS } from '../api/retention.ts';

/** Names of projects, branches and endpoints stand in tables and messages: something must be seen of them, on one line. A `description` is for the error. */
const nameText = {
  type: 'string',
  minLength: 1,
  maxLength: 256,
  pattern: '^(?=.*\\S)[^\\u0000-\\u001f\\u007f\\u2028\\u2029]+$',
  description: 'a name without control characters, and not only of blanks',
} as const;
/** Postgres cuts longer identifiers off; what else it would refuse is in identifiers.ts. */
const identifier = {
  type: 'string',
  minLength: 1,
  maxLength: 63,
  pattern: '^[^\\u0000-\\u001f]+$',
  description: 'a name without control characters',
} as const;
const id = { type: 'string', pattern: '^[a-z0-9-]{1,60}$' } as const;
const computeUnits = { type: 'number', minimum: 0.25, maximum: 64 } as const;
const suspendTimeout = { type: 'integer', minimum: -1, maximum: 604_800 } as const;
const settings = { type: 'object' } as const;
const digits = { type: 'string', pattern: '^[0-9]{1,6}$', description: 'a whole number' } as const;
const flag = { type: 'boolean' } as const;
const flagText = { type: 'string', enum: ['true', 'false'] } as const;
const text = { type: 'string', maxLength: 1024 } as const;

const endpointFields = {
  type: { type: 'string', enum: ['read_write', 'read_only'] },
  name: nameText,
  settings,
  autoscaling_limit_min_cu: computeUnits,
  autoscaling_limit_max_cu: computeUnits,
  suspend_timeout_seconds: suspendTimeout,
  pooler_enabled: flag,
  disabled: flag,
  passwordless_access: flag,
} as const;

const defaultEndpointSettings = {
  type: 'object',
  properties: {
    autoscaling_limit_min_cu: computeUnits,
    autoscaling_limit_max_cu: computeUnits,
    suspend_timeout_seconds: suspendTimeout,
  },
} as const;

/** Seconds. */
const retention = { type: 'integer', minimum: RETENTION_MS.min / 1000, maximum: RETENTION_MS.max / 1000 } as const;

/** A body of one object under one name, as all of the API's are. */
function body(name: string, properties: object, required: readonly string[] = []) {
  return {
    type: 'object',
    required: [name],
    properties: { [name]: { type: 'object', required, properties } },
  } as const;
}

export const projectCreateBody = body('project', {
  name: nameText,
  region_id: text,
  org_id: text,
  pg_version: { type: 'integer' },
  settings,
  default_endpoint_settings: defaultEndpointSettings,
  autoscaling_limit_min_cu: computeUnits,
  autoscaling_limit_max_cu: computeUnits,
  store_passwords: flag,
  history_retention_seconds: retention,
  branch: {
    type: 'object',
    properties: { name: nameText, role_name: identifier, database_name: identifier },
  },
});

export const importBody = body(
  'import',
  {
    data_directory: { type: 'string', pattern: '^/', maxLength: 4096 },
    name: nameText,
    role_name: identifier,
    keep: flag,
  },
  ['data_directory'],
);

export const projectUpdateBody = body('project', {
  name: nameText,
  settings,
  default_endpoint_settings: defaultEndpointSettings,
  history_retention_seconds: retention,
});

export const branchCreateBody = {
  type: ['object', 'null'],
  properties: {
    endpoints: {
      type: 'array',
      maxItems: 16,
      items: { type: 'object', required: ['type'], properties: endpointFields },
    },
    branch: {
      type: 'object',
      properties: {
        parent_id: id,
        name: nameText,
        parent_lsn: text,
        parent_timestamp: text,
        protected: flag,
        archived: flag,
        init_source: text,
        expires_at: { type: ['string', 'null'], maxLength: 64 },
      },
    },
  },
} as const;

export const branchUpdateBody = body('branch', {
  name: nameText,
  protected: flag,
  expires_at: { type: ['string', 'null'], maxLength: 64 },
});

export const endpointCreateBody = body('endpoint', { branch_id: id, ...endpointFields }, ['branch_id', 'type']);
export const endpointUpdateBody = body('endpoint', { branch_id: id, ...endpointFields });

/** Projects, operations: `limit` bounded by the logic, as the API's limits differ. */
export const pageQuery = {
  type: 'object',
  properties: { cursor: text, limit: digits, search: text, org_id: text, recoverable: flagText },
} as const;

export const branchListQuery = {
  type: 'object',
  properties: {
    cursor: text,
    limit: digits,
    search: text,
    sort_by: { type: 'string', enum: ['name', 'created_at', 'updated_at'] },
    sort_order: { type: 'string', enum: ['asc', 'desc'] },
  },
} as const;

export const pointQuery = { type: 'object', properties: { lsn: text, timestamp: text } } as const;

export const changesQuery = {
  type: 'object',
  properties: {
    from_lsn: text,
    from_timestamp: text,
    to_lsn: text,
    to_timestamp: text,
    compare_to: id,
    ranges: flagText,
    cursor: text,
  },
} as const;

export const connectionUriQuery = {
  type: 'object',
  required: ['database_name', 'role_name'],
  properties: { branch_id: id, endpoint_id: id, database_name: text, role_name: text, pooled: flagText },
} as const;
