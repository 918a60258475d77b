/**
 * What a Postgres that was killed leaves in its socket folder: the socket and its lock file, which names the process. A new Postgres refuses to start while a
 * process of that id exists, though it may be a zombie that nobody has reaped yet, or somebody else who was given the number. (Postgres:
 * CreateLockFile in src/backend/utils/init/miscinit.c; line 1 is the process id, line 2 the data directory.)
 *
 * The folder belongs to one endpoint of one platform, which starts one Postgres there at a time. So whoever the lock names is not wanted any more.
 */
import { readFileSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { StrataError } from '../base/errors.ts';

const KILL_WAIT_MS = 5_000;

/** Removes both files, after the Postgres that they are of was killed if it still runs. Throws `unavailable` when it does not go. */
export async function clearStaleSocket(socketDir: string, socketName: string): Promise<void> {
  const lockPath = join(socketDir, `${socketName}.lock`);
  const [pidText, dataDir] = readOrEmpty(lockPath).split('\n');
  const pid = Number(pidText);
  if (Number.isInteger(pid) && pid > 1 && dataDir !== undefined && dataDir !== '') {
    for (const deadline = performance.now() + KILL_WAIT_MS; isPostgresOf(pid, dataDir); await sleep(10)) {
      if (performance.now() > deadline) {
        throw new StrataError('unavailable', `an earlier Postgres of this endpoint, process ${pid}, does not end`);
      }
      try {
        process.kill(pid, 'SIGKILL');
      } catch {
        break; // It has gone.
      }
    }
  }
  await rm(lockPath, { force: true });
  await rm(join(socketDir, socketName), { force: true });
}

/** False for zombies too: they have no command line. */
function isPostgresOf(pid: number, dataDir: string): boolean {
  const args = readOrEmpty(`/proc/${pid}/cmdline`).split('\0');
  return args[args.indexOf('-D') + 1] === dataDir && args.includes('-D');
}

function readOrEmpty(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}
