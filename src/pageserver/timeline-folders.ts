/**
 * The folders of a pageserver's timelines, as a start finds them (timelines.ts says what is in one). What creations, imports, flushes and repairs have left
 * behind is removed.
 */

import { mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { fsyncDirectory } from '../base/durable-file.ts';
import { toStrataError } from '../base/errors.ts';
import { layerFileName } from './layers/layer-format.ts';
import { KEPT_INDEX_NAME } from './remote/kept-index.ts';
import { decodeTimelineIndex, TIMELINE_INDEX_NAME } from './timeline-index.ts';
import type { TimelineIndex } from './timeline-index.ts';

/** Of the folder of a repair (repair.ts). */
export const SHADOW_SUFFIX = '.repair';
const ID = /^[0-9a-f]{32}$/;

export function isTimelineId(text: string): boolean {
  return ID.test(text);
}

export interface TimelineFolders {
  /** By timeline id. */
  readonly indexes: ReadonlyMap<string, FoundTimeline>;
  /** Of timelines that are deleted: to be removed. */
  readonly deleted: readonly string[];
  /** By timeline id, why its index cannot be used. */
  readonly broken: ReadonlyMap<string, string>;
}

export interface FoundTimeline {
  readonly index: TimelineIndex;
  /** Names of the files that are there. */
  readonly files: ReadonlySet<string>;
}

export function findTimelineFolders(parent: string): TimelineFolders {
  const indexes = new Map<string, FoundTimeline>();
  const deleted: string[] = [];
  const broken = new Map<string, string>();
  mkdirSync(parent, { recursive: true, mode: 0o700 });
  let wasRemoved = false;
  for (const timelineId of readdirSync(parent)) {
    const directory = join(parent, timelineId);
    if (timelineId.endsWith(SHADOW_SUFFIX)) rmSync(directory, { recursive: true });
    if (!isTimelineId(timelineId)) continue;
    const names = readdirSync(directory);
    if (!names.includes(TIMELINE_INDEX_NAME)) {
      rmSync(directory, { recursive: true });
      wasRemoved = true;
      continue;
    }
    const path = join(directory, TIMELINE_INDEX_NAME);
    try {
      const index = decodeTimelineIndex(readFileSync(path), path);
      if (index.isDeleted) {
        deleted.push(directory);
        continue;
      }
      removeUnnamed(directory, names, index);
      indexes.set(timelineId, { index, files: new Set(names) });
    } catch (error) {
      broken.set(timelineId, toStrataError(error).message);
    }
  }
  if (wasRemoved) fsyncDirectory(parent);
  return { indexes, deleted, broken };
}

function removeUnnamed(directory: string, names: readonly string[], index: TimelineIndex): void {
  const named = new Set([TIMELINE_INDEX_NAME, KEPT_INDEX_NAME, ...index.layers.map(layerFileName)]);
  for (const name of names) if (!named.has(name)) rmSync(join(directory, name), { force: true });
}
