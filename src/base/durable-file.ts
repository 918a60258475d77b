/**
 * Files that are whole or not there: write to a temporary name, fsync, rename, fsync the folder. At once, or without holding up the process.
 */
import { closeSync, fsyncSync, openSync, renameSync, rmSync, writeSync } from 'node:fs';
import { open, readFile, rename } from 'node:fs/promises';
import { dirname } from 'node:path';

/** Replaces `path` atomically and durably; when this returns the content survives a power cut. When it throws nothing is left beside it. */
export function writeFileDurably(path: string, content: string | Uint8Array, mode: number): void {
  const temporary = `${path}.partial`;
  const bytes = typeof content === 'string' ? Buffer.from(content) : content;
  const file = openSync(temporary, 'w', mode);
  try {
    try {
      for (let offset = 0; offset < bytes.length;) offset += writeSync(file, bytes, offset);
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
    renameSync(temporary, path);
  } catch (error) {
    rmSync(temporary, { force: true });
    throw error;
  }
  fsyncDirectory(dirname(path));
}

/** Makes renames, creations and removals in the folder durable. */
export function fsyncDirectory(directory: string): void {
  const handle = openSync(directory, 'r');
  try {
    fsyncSync(handle);
  } finally {
    closeSync(handle);
  }
}

/** As `writeFileDurably`, for its owner only, without holding up the process. Calls for one path must not overlap. After a rejection either content may be there. */
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

/** As `fsyncDirectory`, without holding up the process. */
export async function syncDirectory(directory: string): Promise<void> {
  const handle = await open(directory, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** What `decode` makes of the file; undefined when there is none. What `decode` throws is thrown with the path. */
export async function readDecoded<T>(path: string, decode: (bytes: Buffer) => T): Promise<T | undefined> {
  let bytes: Buffer;
  try {
    bytes = await readFile(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  try {
    return decode(bytes);
  } catch (error) {
    throw new Error(`${path}: ${(error as Error).message}`, { cause: error });
  }
}
