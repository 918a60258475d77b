/**
 * What was rebuilt after a majority of the safekeepers had lost it, for `strata status`: `rebuilt-logs.json` in the data directory, the newest last.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { writeFileDurably } from '../base/durable-file.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';

export interface RebuiltLog {
  readonly timelineId: string;
  readonly atMs: number;
  /** Everything before it is kept; what was acknowledged after it is lost, if anything was. */
  readonly keptLsn: Lsn;
  /** When the last commit that was kept was made, where that is known. */
  readonly lastCommitMs: number | undefined;
  /** Who had most of it. */
  readonly source: 'object store' | 'pageserver' | 'another safekeeper';
  /** Numbers of the safekeepers that were given it: those that had lost it, and those whose log was damaged. */
  readonly safekeepers: readonly number[];
  /** Up to where it was acknowledged, or may have been, on what is there; absent when that is kept. */
  readonly lostLsn?: Lsn;
  readonly damage?: readonly RebuildDamage[];
}

/** What was found damaged in a log while it was made anew from it. */
export interface RebuildDamage {
  /** Where: a safekeeper, or the object store. */
  readonly origin: string;
  /** Of the record; what is before it is sound. */
  readonly lsn: Lsn;
  readonly reason: string;
  /** `copied`: another had it. `ingested`: nobody had it, but the pageserver has its pages. `none`: it is lost, with all that follows. */
  readonly remedy: 'copied' | 'ingested' | 'none';
}

const FILE_NAME = 'rebuilt-logs.json';
const KEPT = 1_000;

export function readRebuiltLogs(dataDir: string): readonly RebuiltLog[] {
  let text: string;
  try {
    text = readFileSync(join(dataDir, FILE_NAME), 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
  return (JSON.parse(text) as { readonly logs: readonly RebuiltLog[] }).logs;
}

export function noteRebuiltLog(dataDir: string, rebuilt: RebuiltLog): void {
  const logs = [...readRebuiltLogs(dataDir), rebuilt].slice(-KEPT);
  writeFileDurably(join(dataDir, FILE_NAME), `${JSON.stringify({ version: 1, logs }, undefined, 2)}\n`, 0o600);
}

/** One sentence for people. */
export function describeRebuiltLog(rebuilt: RebuiltLog): string {
  const { timelineId, keptLsn, lastCommitMs, lostLsn, source, safekeepers, damage = [] } = rebuilt;
  const when = lastCommitMs === undefined ? '' : `, its last commit of ${new Date(lastCommitMs).toISOString()}`;
  const lost = `safekeepers ${safekeepers.join(', ')} had lost the log of timeline ${timelineId}`;
  const from = source === 'another safekeeper' ? source : `the ${source}`;
  const after = lostLsn === undefined ? '' : `; what was acknowledged after that, up to ${formatLsn(lostLsn)}, is lost`;
  const found = damage.map((each) => `; ${describeDamage(each)}`).join('');
  return `${lost}: rebuilt from ${from} up to ${formatLsn(keptLsn)}${when}; nothing before that is lost${after}${found}`;
}

const REMEDIES = {
  copied: 'taken from another copy',
  ingested: 'nobody has it, and nobody needs it: the pageserver has its pages',
  none: 'nobody has it: it is lost with all that follows',
} as const;

export function describeDamage({ origin, lsn, reason, remedy }: RebuildDamage): string {
  return `damaged in ${origin} at ${formatLsn(lsn)} (${reason}): ${REMEDIES[remedy]}`;
}
