/** Reads a stopped data directory, and makes one of what the pageserver has, so that the two can be compared. */

import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';

import type { Basebackup } from '../../src/api/basebackup.ts';
import { decodeControlFile } from '../../src/postgres/control-file.ts';
import { forgeShutdownCheckpoint } from '../../src/postgres/forge-checkpoint.ts';
import { BLOCK_SIZE } from '../../src/postgres/page-size.ts';
import { parseRelationPath, relationPath } from '../../src/postgres/relation.ts';
import { WAL_SEGMENT_SIZE } from '../../src/postgres/lsn.ts';
import type { TimelineReader } from '../../src/pageserver/timeline-access.ts';
import { toPgVersion } from '../../src/postgres/version.ts';

/** Relation files by their path, `base/5/1259_vm`. */
export function relationFiles(dataDir: string): Map<string, Buffer> {
  const files = new Map<string, Buffer>();
  const directories = ['global', ...readdirSync(join(dataDir, 'base')).map((name) => `base/${name}`)];
  for (const directory of directories) {
    for (const name of readdirSync(join(dataDir, directory))) {
      const path = `${directory}/${name}`;
      if (parseRelationPath(path) !== undefined) files.set(path, readFileSync(join(dataDir, path)));
    }
  }
  return files;
}

/** The files below some directories of a data directory, by path; lock files and settings are not among them. */
export function otherFiles(dataDir: string, directories: readonly string[]): Map<string, Buffer> {
  const files = new Map<string, Buffer>();
  for (const directory of directories) {
    for (const name of readdirSync(join(dataDir, directory))) {
      files.set(`${directory}/${name}`, readFileSync(join(dataDir, directory, name)));
    }
  }
  return files;
}

/** All files of a data directory that starts at the basebackup's LSN with all pages there, as a compute would see it. */
export function materialize(
  backup: Basebackup,
  reader: TimelineReader,
  timeSeconds: number,
): { path: string; bytes: Buffer }[] {
  const version = toPgVersion(backup.pgVersion);
  const forged = forgeShutdownCheckpoint({
    controlFile: decodeControlFile(backup.controlFile),
    state: backup.checkPoint,
    lsn: backup.lsn,
    prevLsn: backup.prevRecordLsn,
    time: timeSeconds,
    parameters: backup.parameters,
  });
  const relations = backup.relations.map((relation) => {
    const pages: Buffer[] = [];
    for (let blk = 0; blk < relation.blocks; blk += 64) {
      const count = Math.min(64, relation.blocks - blk);
      pages.push(reader.getPages({ ...relation, fork: relation.sourceFork }, blk, count, backup.lsn));
    }
    return { path: relationPath(relation, version), bytes: Buffer.concat(pages) };
  });
  const segments = forged.segments.map((segment) => {
    const bytes = Buffer.alloc(WAL_SEGMENT_SIZE);
    for (const write of segment.writes) write.bytes.copy(bytes, write.offset);
    return { path: `pg_wal/${segment.name}`, bytes };
  });
  return [...backup.files, ...relations, ...segments, { path: 'global/pg_control', bytes: forged.controlFile }];
}

export function pageOf(file: Buffer, blk: number): Buffer {
  return Buffer.from(file.subarray(blk * BLOCK_SIZE, (blk + 1) * BLOCK_SIZE));
}
