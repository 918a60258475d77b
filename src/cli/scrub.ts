/**
 * `strata scrub`: whether everything that is stored is whole. The work is the caller's of the program; here are the command's options and output.
 */
import { randomInt } from 'node:crypto';
import type { Command } from 'commander';
import type { Finding, ScrubReport, ScrubRequest } from '../api/scrub.ts';
import { formatLsn } from '../postgres/lsn.ts';
import { type CliContext, openPlatform, projectCommand, type ProjectOptions, show } from './context.ts';
import { findBranch, findProject, listBranches, listProjects } from './entities.ts';
import { CliError } from './errors.ts';
import { formatBytes, formatFields } from './format.ts';
import { wholeNumber } from './numbers.ts';
import type { RunningPlatform } from './platform.ts';
import { occasionally } from './progress.ts';

export type ScrubTool = (request: ScrubRequest & { readonly platform: RunningPlatform }) => Promise<ScrubReport>;

interface ScrubOptions extends ProjectOptions {
  readonly branch?: string;
  readonly sample: number;
  readonly seed?: number;
  readonly walMb: number;
  readonly deleteOrphans: boolean;
  readonly repair: boolean;
}

const SAMPLE = 200;
const WAL_MB = 256;
const SEED_MAX = 2 ** 31;
const ORPHANS_SHOWN = 20;

const NOTES = `
Looks at every layer that an index names, here and in the object store: every block's checksum, and that all of it fits together; and at all offloaded WAL. Then it makes a
sample of each branch's pages anew from the branch's WAL alone, and its transaction status, filenode maps and fork sizes, and compares them with those of the layers. It works beside the running platform, at a low
priority, and past its caches.

Exit code 1 when something is damaged, missing or different. Orphans (objects that no index names) are not wrong, they take space.
A layer that is damaged here is also brought back when it is next read; --repair has it done now, and gives the object store again what it has lost.

Examples:
  $ strata scrub
  $ strata scrub --branch main --sample 1000 --seed 42
  $ strata scrub --repair --delete-orphans`;

export function scrubCommand(context: CliContext, tool: ScrubTool, setExitCode: (code: number) => void): Command {
  return projectCommand('scrub', 'verify layers, objects and a sample of pages', 'scrub')
    .option('--branch <branch>', 'only this branch (name or id); with --project when there are several')
    .option('--sample <count>', 'pages of each branch to make anew and compare; 0: none', wholeNumber(0), SAMPLE)
    .option('--seed <number>', 'which pages; a seed gives the same ones again (default: by chance)', wholeNumber(0))
    .option('--wal-mb <megabytes>', 'WAL of each branch to replay, at most', wholeNumber(0), WAL_MB)
    .option('--delete-orphans', 'delete objects that nobody needs', false)
    .option('--repair', 'have damaged layers and objects brought back now, from what else has them or from WAL', false)
    .addHelpText('after', NOTES)
    .action(async (options: ScrubOptions) => {
      const platform = openPlatform(context, options);
      const branches = await branchesToScrub(platform, options);
      const isPartial = options.branch !== undefined || options.project !== undefined;
      const interrupted = new AbortController();
      process.once('SIGINT', () => interrupted.abort(new CliError('interrupted')));
      const report = await tool({
        platform,
        timelineIds: isPartial ? branches.map(({ timelineId }) => timelineId) : undefined,
        branches,
        sample: options.sample,
        seed: options.seed ?? randomInt(SEED_MAX),
        walBytes: options.walMb * 1_000_000,
        deleteOrphans: options.deleteOrphans,
        repair: options.repair,
        onProgress: occasionally<string>(context, (text) => text),
        signal: interrupted.signal,
      });
      show(context, options, toJson(report), () => toText(report));
      const different = report.differences.length + report.fileDifferences.length;
      const left = report.findings.length - report.repaired.length + different;
      if (left > 0) setExitCode(1);
      for (const advice of adviceFor(report, options)) context.printError(advice);
    });
}

async function branchesToScrub(
  { api }: RunningPlatform,
  options: ScrubOptions,
): Promise<{ name: string; timelineId: string }[]> {
  const projects =
    options.branch === undefined && options.project === undefined
      ? await listProjects(api)
      : [await findProject(api, options.project)];
  const found = [];
  for (const project of projects) {
    const branches = await listBranches(api, project);
    const wanted = options.branch === undefined ? branches : [findBranch(branches, options.branch)];
    for (const branch of wanted) {
      const name = projects.length > 1 ? `${project.name}/${branch.name}` : branch.name;
      found.push({ name, timelineId: branch.timeline_id });
    }
  }
  return found;
}

function adviceFor(
  { findings, repaired, differences, fileDifferences, orphans, orphansDeleted }: ScrubReport,
  options: ScrubOptions,
): string[] {
  const advice: string[] = [];
  const left = findings.filter((finding) => !repaired.includes(finding));
  if (left.some(({ where }) => where === 'local')) {
    advice.push(
      options.repair
        ? 'strata: what is left could not be repaired; logs/pageserver.log says why. Branch or export what can still be read'
        : 'strata: damaged layers here are brought back from the object store or WAL when they are read; "strata scrub --repair" does it now',
    );
  }
  if (left.some(({ where }) => where === 'object store')) {
    advice.push(
      options.repair
        ? 'strata: what is left of the objects is nowhere else; logs/pageserver.log says more. A copy of the store may have it: put it in its place under the same name, and scrub again'
        : 'strata: "strata scrub --repair" gives the object store again what the pageserver’s disk or WAL still has',
    );
  }
  if (differences.length + fileDifferences.length > 0) {
    advice.push(
      'strata: pages and files that differ from what WAL says were stored wrong: keep the data directory and the WAL, and report it with the seed; a branch from before the LSN may be right',
    );
  }
  if (orphans.length > orphansDeleted) advice.push('strata: "strata scrub --delete-orphans" deletes the orphans');
  return advice;
}

function toText(report: ScrubReport): string {
  const { local, remote, findings, repaired, differences, replays, orphans } = report;
  const lines: string[] = [];
  for (const { where, name, offset, reason, ...finding } of findings) {
    const isRepaired = repaired.some((each) => each.name === name && each.timelineId === finding.timelineId);
    lines.push(
      `${where === 'local' ? 'file' : 'object'} ${name} at ${offset}: ${reason}${isRepaired ? ' (repaired)' : ''}`,
    );
  }
  for (const { branch, fork, blk, lsn, offset, reason } of differences) {
    const place = offset === undefined ? '' : ` at byte ${offset}`;
    const relation = `${fork.spc}/${fork.db}/${fork.rel}`;
    lines.push(`branch ${branch}: block ${blk} of relation ${relation} as of ${formatLsn(lsn)}${place}: ${reason}`);
  }
  for (const { branch, file, lsn, offset, reason } of report.fileDifferences) {
    const place = offset === undefined ? '' : ` at byte ${offset}`;
    lines.push(`branch ${branch}: ${file} as of ${formatLsn(lsn)}${place}: ${reason}`);
  }
  for (const { name, sizeBytes } of orphans.slice(0, ORPHANS_SHOWN))
    lines.push(`orphan ${name}, ${formatBytes(sizeBytes)}`);
  if (orphans.length > ORPHANS_SHOWN) lines.push(`… and ${orphans.length - ORPHANS_SHOWN} more orphans`);
  if (lines.length > 0) lines.push('');
  const orphanBytes = orphans.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const deleted = report.orphansDeleted > 0 ? `, ${report.orphansDeleted} deleted` : '';
  lines.push(
    formatFields([
      ['seed', String(report.seed)],
      ['layers here', `${local.layers} of ${report.timelines} timelines, ${formatBytes(local.bytes)}`],
      [
        'object store',
        report.objectStore === undefined
          ? 'none'
          : `${remote.layers} layers, ${formatBytes(remote.bytes)}; ${report.evictedLayers} only there; ${report.objectStore}`,
      ],
      ['WAL', `${report.wal.objects} objects, ${formatBytes(report.wal.bytes)}`],
      ['orphans', `${orphans.length}, ${formatBytes(orphanBytes)}${deleted}`],
      ['damaged or missing', String(findings.length)],
      ...replays.map((replay): [string, string] => [`pages of ${replay.branch}`, replayText(replay)]),
      ['pages that differ', String(differences.length)],
      ['files that differ', String(report.fileDifferences.length)],
    ]),
  );
  return lines.join('\n');
}

function replayText(replay: ScrubReport['replays'][number]): string {
  const { fromLsn, toLsn, walBytes, compared, fromWalAlone, refused, files, skipped } = replay;
  if (skipped !== undefined || fromLsn === undefined || toLsn === undefined)
    return `none compared: ${skipped ?? 'no WAL'}`;
  const part = `${formatBytes(toLsn - fromLsn)} of ${formatBytes(walBytes)} of its WAL, ${formatLsn(fromLsn)} to ${formatLsn(toLsn)}`;
  const notMade = refused === 0 ? '' : `, ${refused} not made`;
  return `${compared} states compared with ${part}; ${fromWalAlone} from WAL alone${notMade}; ${files} files and fork sizes`;
}

function toJson(report: ScrubReport): object {
  const finding = ({ timelineId, where, name, offset, reason }: Finding): object => ({
    timeline_id: timelineId,
    where,
    name,
    offset,
    reason,
  });
  return {
    seed: report.seed,
    object_store: report.objectStore ?? null,
    timelines: report.timelines,
    local_layers: report.local.layers,
    local_bytes: report.local.bytes,
    object_layers: report.remote.layers,
    object_bytes: report.remote.bytes,
    wal_objects: report.wal.objects,
    wal_bytes: report.wal.bytes,
    evicted_layers: report.evictedLayers,
    findings: report.findings.map(finding),
    repaired: report.repaired.map(finding),
    orphans: report.orphans.map(({ name, sizeBytes }) => ({ name, bytes: sizeBytes })),
    orphans_deleted: report.orphansDeleted,
    unfinished_uploads_removed: report.unfinishedRemoved,
    branches: report.replays.map((replay) => ({
      branch: replay.branch,
      from_lsn: replay.fromLsn === undefined ? null : formatLsn(replay.fromLsn),
      to_lsn: replay.toLsn === undefined ? null : formatLsn(replay.toLsn),
      wal_bytes: replay.walBytes,
      records: replay.records,
      compared: replay.compared,
      from_wal_alone: replay.fromWalAlone,
      refused: replay.refused,
      files: replay.files,
      skipped: replay.skipped ?? null,
    })),
    differences: report.differences.map(({ branch, fork, blk, lsn, offset, reason }) => ({
      branch,
      tablespace_oid: fork.spc,
      database_oid: fork.db,
      relfilenode: fork.rel,
      fork: fork.fork,
      block: blk,
      lsn: formatLsn(lsn),
      offset: offset ?? null,
      reason,
    })),
    file_differences: report.fileDifferences.map(({ branch, file, lsn, offset, reason }) => ({
      branch,
      file,
      lsn: formatLsn(lsn),
      offset: offset ?? null,
      reason,
    })),
  };
}
