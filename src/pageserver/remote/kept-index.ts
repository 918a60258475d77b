/**
 * `remote`, in a timeline's folder: the last index of it that is known to be in the store (remote-index.ts), so that a start need not ask. It is not fsynced: after a
 * power cut an older one, or none, is as good, as then a few layers are uploaded again.
 */

import { readFileSync } from 'node:fs';
import { rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { decodeRemoteIndex } from './remote-index.ts';
import type { RemoteIndex } from './remote-index.ts';

export const KEPT_INDEX_NAME = 'remote';

/** Where it cannot be written, as on a full disk, or when the timeline was deleted meanwhile, there is none: a start asks the store. */
export async function keepRemoteIndex(directory: string, bytes: Buffer): Promise<void> {
  const path = join(directory, KEPT_INDEX_NAME);
  try {
    await writeFile(`${path}.partial`, bytes, { mode: 0o600 });
    await rename(`${path}.partial`, path);
  } catch {
    await rm(path, { force: true }).catch(() => {});
  }
}

/** Undefined when there is none that is whole. */
export function readKeptIndex(directory: string): RemoteIndex | undefined {
  const path = join(directory, KEPT_INDEX_NAME);
  try {
    return decodeRemoteIndex(readFileSync(path), path);
  } catch {
    return undefined;
  }
}
