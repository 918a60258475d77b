/** Files that are whole or not there, written without holding up the process. (base/durable-file.ts does the same at once.) */

import { open, rename } from 'node:fs/promises';
import { dirname } from 'node:path';

/** Makes renames, creations and removals in the folder durable. */
export async function syncDirectory(directory: string): Promise<void> {
  const handle = await open(directory, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** Replaces `path` atomically; when this resolves the content survives a power cut. Calls for one path must not overlap. */
export async function replaceFile(path: string, content: Uint8Array): Promise<void> {
  const partialPath = `${path}.partial`;
  const handle = await open(partialPath, 'w', 0o600);
  try {
    await handle.writeFile(content);
    await handle.sync();
  } finally {
    await handle.close();
  }
  await rename(partialPath, path);
  await syncDirectory(dirname(path));
}
