/** `strata storage`: what each branch takes on disk, what of it is its parent's, and what deleting it would free. */
import type { Command } from 'commander';
import { type CliContext, type ProjectOptions, openProject, projectCommand, show } from './context.ts';
import { formatBytes, formatTable } from './format.ts';

interface BranchStorage {
  readonly branch_id: string;
  readonly name: string;
  readonly logical_size: number;
  readonly history_size: number;
  readonly unwritten_size: number;
  readonly shared_with_parent_size: number;
  readonly freed_by_deletion_size: number;
  readonly oldest_lsn: string;
  readonly oldest_timestamp?: string;
}

const NOTES = `
LOGICAL SIZE       of all relations of all databases, the system's own too, as Postgres counts them
OF IT PARENT’S     pages that were not written since the branch began; of a project's first branch: since Postgres was initialised
HISTORY            what was written in this branch, in layers: every version of a page within the history window, compressed
NOT YET IN LAYERS  what the pageserver holds in memory of it
FREED BY DELETING  its history; nothing while other branches begin in it, as it cannot be deleted then
KEPT FROM          the oldest LSN, or time, that can be read`;

export function storageCommand(context: CliContext): Command {
  return projectCommand('storage', 'show what each branch of a project takes', 'storage')
    .addHelpText('after', NOTES)
    .option('--collect', 'first free what is older than the history window and nobody can read any more')
    .action(async (options: ProjectOptions & { readonly collect?: true }) => {
      const { api, project } = await openProject(context, options);
      if (options.collect) await api.post(`/projects/${project.id}/storage/collect`, {});
      const { branches } = await api.get<{ branches: readonly BranchStorage[] }>(`/projects/${project.id}/storage`);
      show(context, options, branches, () =>
        formatTable(
          [
            'BRANCH',
            'LOGICAL SIZE',
            'OF IT PARENT’S',
            'HISTORY',
            'NOT YET IN LAYERS',
            'FREED BY DELETING',
            'KEPT FROM',
          ],
          branches.map((branch) => [
            branch.name,
            formatBytes(branch.logical_size),
            formatBytes(branch.shared_with_parent_size),
            formatBytes(branch.history_size),
            formatBytes(branch.unwritten_size),
            formatBytes(branch.freed_by_deletion_size),
            branch.oldest_timestamp ?? branch.oldest_lsn,
          ]),
        ),
      );
    });
}
