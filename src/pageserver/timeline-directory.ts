/** The folder of a timeline: removing it so that a crash on the way leaves a timeline that is known to be deleted. */

import { readdir, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { syncDirectory } from '../base/durable-file.ts';
import { TIMELINE_INDEX_NAME } from './timeline-index.ts';

/** Removes what a timeline's folder holds, the index last. Missing files, or a missing folder, are none of its concern. */
export async function removeTimelineDirectory(directory: string): Promise<void> {
  const names = await readdir(directory).catch((error: unknown) => {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  });
  for (const name of names) if (name !== TIMELINE_INDEX_NAME) await rm(join(directory, name), { force: true });
  await rm(directory, { recursive: true, force: true });
  await syncDirectory(dirname(directory));
}
