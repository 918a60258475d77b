/**
 * The API's entities, as far as the command line looks at them, and how a person's words become one of them.
 */
import { CliError } from './errors.ts';
import type { ApiClient } from './platform.ts';

export interface Project {
  readonly id: string;
  readonly name: string;
  readonly pg_version: number;
  readonly history_retention_seconds: number;
  readonly created_at: string;
}

export interface Branch {
  readonly id: string;
  readonly name: string;
  readonly project_id: string;
  /** The branch's id in the store: 32 hex digits. */
  readonly timeline_id: string;
  readonly parent_id?: string;
  readonly parent_lsn?: string;
  readonly parent_timestamp?: string;
  readonly current_state: string;
  readonly default: boolean;
  readonly created_at: string;
}

export interface Endpoint {
  readonly id: string;
  readonly branch_id: string;
  readonly type: string;
  readonly current_state: string;
  readonly pending_state?: string;
  readonly last_active?: string;
  readonly suspend_timeout_seconds: number;
}

export interface Database {
  readonly name: string;
  readonly owner_name: string;
}

export interface Operation {
  readonly id: string;
  readonly status: string;
  readonly error?: string;
}

const PAGE_SIZE = 400;
/** In an error's list of what there is. */
const SHOWN_NAMES = 20;

export async function listProjects(api: ApiClient): Promise<Project[]> {
  const projects: Project[] = [];
  for (let cursor = ''; ;) {
    const page = await api.get<{ projects: Project[]; pagination?: { cursor: string } }>(
      `/projects?limit=${PAGE_SIZE}${cursor}`,
    );
    projects.push(...page.projects);
    if (page.projects.length < PAGE_SIZE || page.pagination === undefined) return projects;
    cursor = `&cursor=${encodeURIComponent(page.pagination.cursor)}`;
  }
}

/** In the order in which they were made. */
export async function listBranches(api: ApiClient, project: Project): Promise<Branch[]> {
  const branches: Branch[] = [];
  for (let cursor = ''; ;) {
    const page = await api.get<{ branches: Branch[]; pagination: { next?: string } }>(
      `/projects/${project.id}/branches?sort_by=created_at&sort_order=asc${cursor}`,
    );
    branches.push(...page.branches);
    if (page.pagination.next === undefined) return branches;
    cursor = `&cursor=${encodeURIComponent(page.pagination.next)}`;
  }
}

export async function listEndpoints(api: ApiClient, project: Project): Promise<Endpoint[]> {
  return (await api.get<{ endpoints: Endpoint[] }>(`/projects/${project.id}/endpoints`)).endpoints;
}

/** By id or name; without either, the only one. */
export async function findProject(api: ApiClient, wanted: string | undefined): Promise<Project> {
  const projects = await listProjects(api);
  const names = () => projects.map(label).join(', ');
  if (wanted === undefined) {
    const [first, ...others] = projects;
    if (first === undefined) throw new CliError('there is no project: make one with "strata projects create"');
    if (others.length > 0) throw new CliError(`there are several projects, say which with --project: ${names()}`, 2);
    return first;
  }
  const byId = projects.find((project) => project.id === wanted);
  if (byId !== undefined) return byId;
  const [named, ...others] = projects.filter((project) => project.name === wanted);
  if (named === undefined) throw new CliError(`there is no project ${quote(wanted)} (projects: ${names() || 'none'})`);
  if (others.length > 0) {
    const ids = [named, ...others].map((project) => project.id).join(', ');
    throw new CliError(`several projects are named ${quote(wanted)}, say which by its id: ${ids}`, 2);
  }
  return named;
}

/** By id or name; without either, the default branch. */
export function findBranch(branches: readonly Branch[], wanted: string | undefined): Branch {
  const found = branches.find((branch) =>
    wanted === undefined ? branch.default : branch.id === wanted || branch.name === wanted,
  );
  if (found !== undefined) return found;
  const names = branches.slice(0, SHOWN_NAMES).map((branch) => branch.name);
  const more = branches.length > SHOWN_NAMES ? `, and ${branches.length - SHOWN_NAMES} more` : '';
  const known = `(branches: ${names.join(', ')}${more})`;
  throw new CliError(`there is no branch ${wanted === undefined ? 'by default' : quote(wanted)} ${known}`);
}

export function quote(text: string): string {
  return JSON.stringify(text);
}

function label(project: Project): string {
  return project.name === project.id ? project.id : `${project.id} (${project.name})`;
}

/** By timeline: `project/branch`. */
export async function branchNames(api: ApiClient, projects: readonly Project[]): Promise<Map<string, string>> {
  const lists = await Promise.all(
    projects.map(async (project) =>
      (await listBranches(api, project)).map(
        (branch) => [branch.timeline_id, `${project.name}/${branch.name}`] as const,
      ),
    ),
  );
  return new Map(lists.flat());
}
