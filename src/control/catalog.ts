/**
 * Roles and databases of a branch, as far as the control plane made them. (Others may be made with SQL; those are Postgres' own.)
 *
 * A branch counts the changes in `catalog_version`; `catalog_applied` is what its cluster is known to have. A compute that starts with less
 * gets the whole catalog to apply, which is repeatable. So a crash between writing here and applying there loses nothing.
 */
import type { CatalogSpec } from '../api/control.ts';
import { StrataError } from '../base/errors.ts';
import type { ControlContext } from './context.ts';
import { newPassword, scramVerifier } from './secrets.ts';
import type { BranchRow, DatabaseRow, RoleRow } from './state.ts';

export interface NewRole {
  readonly name: string;
  readonly password: string;
  readonly verifier: string;
}

/** A role with a random password. Not written yet: the verifier takes milliseconds, a transaction cannot wait for it. */
export async function prepareRole(name: string): Promise<NewRole> {
  const password = newPassword();
  return { name, password, verifier: await scramVerifier(password) };
}

export class Catalog {
  readonly #context: ControlContext;

  constructor(context: ControlContext) {
    this.#context = context;
  }

  roles(branchId: string): RoleRow[] {
    return this.#context.state.all<RoleRow>('SELECT * FROM roles WHERE branch_id = ? ORDER BY name', branchId);
  }

  role(branchId: string, name: string): RoleRow {
    const row = this.#context.state.get<RoleRow>(
      'SELECT * FROM roles WHERE branch_id = ? AND name = ?',
      branchId,
      name,
    );
    if (row !== undefined) return row;
    const names = this.roles(branchId).map((role) => role.name);
    throw new StrataError(
      'not-found',
      `the platform has no role ${JSON.stringify(name)} on branch ${branchId} (roles: ${names.join(', ')}); of one that was made with SQL it knows no password: write name and password into a connection string of the branch`,
    );
  }

  databases(branchId: string): DatabaseRow[] {
    return this.#context.state.all<DatabaseRow>('SELECT * FROM databases WHERE branch_id = ? ORDER BY id', branchId);
  }

  database(branchId: string, name: string): DatabaseRow {
    const row = this.#context.state.get<DatabaseRow>(
      'SELECT * FROM databases WHERE branch_id = ? AND name = ?',
      branchId,
      name,
    );
    if (row !== undefined) return row;
    const names = this.databases(branchId).map((database) => database.name);
    throw new StrataError(
      'not-found',
      `the platform has no database ${JSON.stringify(name)} on branch ${branchId} (databases: ${names.join(', ')}): write the name of one that was made with SQL into a connection string of the branch`,
    );
  }

  password(role: RoleRow): string {
    return this.#context.secrets.open(role.password_sealed, sealContext(role.branch_id, role.name));
  }

  insertRole(branchId: string, role: NewRole): void {
    const now = this.#context.now();
    this.#context.state.insert('roles', {
      branch_id: branchId,
      name: role.name,
      password_sealed: this.#context.secrets.seal(role.password, sealContext(branchId, role.name)),
      scram_verifier: role.verifier,
      protected: 0,
      created_at: now,
      updated_at: now,
    });
  }

  insertDatabase(branchId: string, name: string, ownerName: string): void {
    const now = this.#context.now();
    this.#context.state.insert('databases', {
      branch_id: branchId,
      name,
      owner_name: ownerName,
      created_at: now,
      updated_at: now,
    });
  }

  /** Those that are not known yet, in this order. */
  addDatabases(branchId: string, names: readonly string[], ownerName: string): void {
    const known = new Set(this.databases(branchId).map((database) => database.name));
    for (const name of names) if (!known.has(name)) this.insertDatabase(branchId, name, ownerName);
  }

  /** A child branch begins with its parent's roles (same passwords) and databases. */
  copy(parentId: string, childId: string): void {
    for (const role of this.roles(parentId)) {
      this.insertRole(childId, { name: role.name, password: this.password(role), verifier: role.scram_verifier });
    }
    for (const database of this.databases(parentId)) this.insertDatabase(childId, database.name, database.owner_name);
  }

  setPassword(branchId: string, role: NewRole): void {
    const { state, secrets, now } = this.#context;
    state.run(
      'UPDATE roles SET password_sealed = ?, scram_verifier = ?, updated_at = ? WHERE branch_id = ? AND name = ?',
      secrets.seal(role.password, sealContext(branchId, role.name)),
      role.verifier,
      now(),
      branchId,
      role.name,
    );
    state.run('UPDATE branches SET catalog_version = catalog_version + 1 WHERE id = ?', branchId);
  }

  spec(branchId: string): CatalogSpec {
    return {
      roles: this.roles(branchId).map((role) => ({ name: role.name, scramVerifier: role.scram_verifier })),
      databases: this.databases(branchId).map((database) => ({ name: database.name, ownerName: database.owner_name })),
    };
  }

  isApplied(branch: BranchRow): boolean {
    return branch.catalog_applied >= branch.catalog_version;
  }

  markApplied(branchId: string, version: number): void {
    this.#context.state.run(
      'UPDATE branches SET catalog_applied = max(catalog_applied, ?) WHERE id = ?',
      version,
      branchId,
    );
  }
}

function sealContext(branchId: string, roleName: string): string {
  return `role password ${branchId} ${roleName}`;
}
