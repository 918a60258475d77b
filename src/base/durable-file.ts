/**
 * Files that are whole or not there: write to a temporary name, fsync, rename, fsync the folder.
 */
import { closeSync, fsyncSync, openSync, renameSync, writeSync } from 'node:fs';
import { dirname } from 'node:path';

/** Replaces `path` atomically and durably; when this returns the content survives a power cut. */
export function writeFileDurably(path: string, content: string | Uint8Array, mode: number): void {
  const temporary = `${path}.partial`;
  const bytes = typeof content === 'string' ? Buffer.from(content) : content;
  const file = openSync(temporary, 'w', mode);
  try {
    for (let offset = 0; offset < bytes.length;) offset += writeSync(file, bytes, offset);
    fsyncSync(file);
  } finally {
    closeSync(file);
  }
  renameSync(temporary, path);
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
