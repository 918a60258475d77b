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
  /** Numbers of the safekeepers that had lost it. */
  readonly safekeepers: readonly number[];
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
export function describeRebuiltLog({ timelineId, keptLsn, lastCommitMs, source, safekeepers }: RebuiltLog): string {
  const when = lastCommitMs === undefined ? '' : `, its last commit of ${new Date(lastCommitMs).toISOString()}`;
  const lost = `safekeepers ${safekeepers.join(', ')} had lost the log of timeline ${timelineId}`;
  return `${lost}: rebuilt from ${source === 'another safekeeper' ? source : `the ${source}`} up to ${formatLsn(keptLsn)}${when}; nothing before that is lost`;
}
