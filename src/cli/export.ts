/**
 * `strata export`: a vanilla data directory of a branch. The work is the caller's of the program; here are the command's options and output.
 */
import type { Command } from 'commander';
import { formatLsn, type Lsn, parseLsn } from '../postgres/lsn.ts';
import { parsePoint } from './point.ts';
import { type CliContext, openProject, projectCommand, type ProjectOptions, show } from './context.ts';
import { findBranch, listBranches } from './entities.ts';
import { CliError } from './errors.ts';
import { formatBytes, formatFields } from './format.ts';
import type { RunningPlatform } from './platform.ts';
import { byteProgressPrinter } from './progress.ts';

export interface ExportedDirectory {
  readonly path: string;
  readonly pgVersion: number;
  readonly systemId: string;
  readonly relationBytes: number;
  readonly fileCount: number;
  /** Who owns the directory and may log in as the superuser. */
  readonly systemUsers: readonly string[];
}

export type ExportTool = (request: {
  readonly platform: RunningPlatform;
  readonly timelineId: string;
  readonly lsn: Lsn;
  readonly target: string;
  readonly dataChecksums: boolean;
  readonly superuser: string;
  readonly onProgress: (progress: { doneBytes: number; totalBytes: number }) => void;
}) => Promise<ExportedDirectory>;

interface ExportOptions extends ProjectOptions {
  readonly pgdata: string;
  readonly lsn?: string;
  readonly at?: string;
  readonly dataChecksums: boolean;
  readonly superuser: string;
}

const NOTES = `
The directory is a cluster of its own from then on. Roles keep their passwords. Its superuser (--superuser; a role of that name is made
one when there is one) has none: the system user who owns the directory is let in over the Unix socket (pg_hba.conf, pg_ident.conf).
Unlogged tables are empty, as after a crash. For a dump in SQL, pg_dump takes the branch's connection string.

Examples:
  $ strata export --pgdata /var/lib/postgresql/left
  $ strata export main --pgdata ./yesterday --at '2026-01-31 12:00:00+00' --data-checksums
  $ pg_dump "$(strata connection-string main)" > main.sql`;

export function exportCommand(context: CliContext, tool: ExportTool): Command {
  return projectCommand(
    'export',
    'write a branch as a data directory that a stock Postgres starts from',
    'export dev --pgdata ./dev',
  )
    .argument('[branch]', 'name or id (default: the default branch)')
    .requiredOption('--pgdata <directory>', 'directory to make; it must be empty or not there')
    .option('--lsn <lsn>', 'as it was at this LSN (default: now)')
    .option('--at <point>', 'as it was at an LSN or at a time with its zone (2026-01-31T12:00:00.5Z)')
    .option('--superuser <name>', 'name of its superuser', 'postgres')
    .option('--data-checksums', 'with data checksums in its pages', false)
    .addHelpText('after', NOTES)
    .action(async (wanted: string | undefined, options: ExportOptions) => {
      const query = pointQuery(options);
      assertRoleName(options.superuser);
      if (options.pgdata === '') throw new CliError('--pgdata "" names no directory', 2);
      const { project, ...platform } = await openProject(context, options);
      const branch = findBranch(await listBranches(platform.api, project), wanted);
      const point = await platform.api.get<{ lsn: string; timeline_id: string }>(
        `/projects/${project.id}/branches/${branch.id}/point?${query}`,
      );
      const startedMs = context.now();
      const exported = await tool({
        platform,
        timelineId: point.timeline_id,
        lsn: parseLsn(point.lsn),
        target: options.pgdata,
        dataChecksums: options.dataChecksums,
        superuser: options.superuser,
        onProgress: byteProgressPrinter(context),
      });
      const lsn = formatLsn(parseLsn(point.lsn));
      const value = {
        branch_id: branch.id,
        lsn,
        path: exported.path,
        pg_version: exported.pgVersion,
        system_identifier: exported.systemId,
        relation_bytes: exported.relationBytes,
        files: exported.fileCount,
        superuser: options.superuser,
        system_users: exported.systemUsers,
        data_checksums: options.dataChecksums,
        duration_ms: context.now() - startedMs,
      };
      show(context, options, value, () =>
        formatFields([
          ['branch', `${branch.name} at ${lsn}`],
          ['directory', exported.path],
          ['Postgres', String(exported.pgVersion)],
          ['size', `${formatBytes(exported.relationBytes)} in ${exported.fileCount} files`],
          [
            'superuser',
            `${options.superuser}, over the Unix socket for system user ${exported.systemUsers.join(' or ')}`,
          ],
          [
            'start it',
            `pg_ctl -D ${exported.path} start  (of Postgres ${exported.pgVersion}, as ${exported.systemUsers[0]})`,
          ],
        ]),
      );
    });
}

function pointQuery(options: ExportOptions): string {
  if (options.lsn !== undefined && options.at !== undefined) {
    throw new CliError('--lsn and --at exclude each other: give one of them', 2);
  }
  if (options.lsn !== undefined) {
    try {
      parseLsn(options.lsn);
    } catch {
      throw new CliError(`--lsn ${JSON.stringify(options.lsn)} is not an LSN such as 0/16B3748`, 2);
    }
    return new URLSearchParams({ lsn: options.lsn }).toString();
  }
  if (options.at === undefined) return '';
  const point = parsePoint(options.at);
  if ('parent_lsn' in point) return new URLSearchParams({ lsn: point.parent_lsn }).toString();
  return new URLSearchParams({ timestamp: point.parent_timestamp }).toString();
}

/** It stands in pg_hba.conf. */
function assertRoleName(name: string): void {
  if (name !== '' && Buffer.byteLength(name) <= 63 && !/["\u0000-\u001f]/.test(name) && !name.startsWith('pg_')) return;
  const rule = 'a name has 1 to 63 bytes, no double quotes or control characters, and does not begin with pg_';
  throw new CliError(`--superuser ${JSON.stringify(name)} cannot be the name of a superuser: ${rule}`, 2);
}
