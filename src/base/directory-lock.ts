/**
 * One process per directory: a lock that the kernel drops when its holder dies, however it dies.
 * It is SQLite's exclusive lock (fcntl) on `<directory>/lock`, as Node itself has no file locks.
 */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { setTimeout as sleep } from 'node:timers/promises';
import { StrataError } from './errors.ts';

export interface DirectoryLock {
  /** Its file. */
  readonly path: string;
  release(): void;
}

const RETRY_MS = 50;

/** Takes the lock, waiting up to `waitMs` for a holder that is just stopping. Throws `conflict` when it is held for longer. */
export async function lockDirectory(directory: string, waitMs: number): Promise<DirectoryLock> {
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  const path = join(directory, 'lock');
  const deadline = performance.now() + waitMs;
  for (;;) {
    const database = new DatabaseSync(path);
    try {
      database.exec('PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE;');
      return { path, release: () => database.close() };
    } catch (error) {
      database.close();
      const isBusy = error instanceof Error && /locked|busy/i.test(error.message);
      if (!isBusy) throw error;
      if (performance.now() >= deadline)
        throw new StrataError('conflict', `${directory} is in use by another process`, { cause: error });
    }
    await sleep(RETRY_MS);
  }
}
