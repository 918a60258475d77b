/**
 * Names of roles and databases that a project may begin with. What Postgres would refuse, or shorten, when the first compute starts is refused when the
 * project is asked for: by then nobody would be there to hear of it.
 */
import { StrataError } from '../base/errors.ts';

/** NAMEDATALEN - 1 (src/include/pg_config_manual.h): Postgres cuts longer identifiers off. */
const IDENTIFIER_MAX_BYTES = 63;
/** IsReservedName and check_rolespec_name (src/backend/utils/adt/acl.c), and the platform's own. */
const RESERVED_ROLES = /^(?:pg_|strata_)|^(?:public|none)$/;
/** In every cluster from the beginning, and not the project's. */
const CLUSTER_DATABASES = new Set(['postgres', 'template0', 'template1']);

/** Throws `bad-request`. */
export function assertRoleName(name: string): void {
  assertLength('role', name);
  if (!RESERVED_ROLES.test(name)) return;
  throw new StrataError(
    'bad-request',
    `role name ${JSON.stringify(name)} is reserved: choose one that is not public or none, and begins with neither pg_ nor strata_`,
  );
}

/** Throws `bad-request`. */
export function assertDatabaseName(name: string): void {
  assertLength('database', name);
  if (!CLUSTER_DATABASES.has(name)) return;
  throw new StrataError(
    'bad-request',
    `database ${JSON.stringify(name)} is in every cluster and cannot be the project's: choose another name`,
  );
}

function assertLength(what: string, name: string): void {
  const length = Buffer.byteLength(name);
  if (length <= IDENTIFIER_MAX_BYTES) return;
  throw new StrataError(
    'bad-request',
    `${what} name ${JSON.stringify(name)} has ${length} bytes, and Postgres keeps ${IDENTIFIER_MAX_BYTES}: choose a shorter one`,
  );
}
