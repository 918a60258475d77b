/**
 * `--sync-delay MS`: both contenders on a disk whose flushes take so much longer (slow-disk.c), as the disks of clouds do; what a commit costs is
 * then less a matter of this machine's processors.
 */
import { execFileSync } from 'node:child_process';
import { chmodSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/** The environment of processes that are to have such a disk. */
export function slowDisk(delayMs: number): Readonly<Record<string, string>> {
  const directory = mkdtempSync(join(tmpdir(), 'strata-slow-disk-'));
  process.once('exit', () => rmSync(directory, { recursive: true, force: true }));
  chmodSync(directory, 0o755); // Postgres, which runs as another user, loads it too.
  const library = join(directory, 'slow-disk.so');
  const source = join(import.meta.dirname, 'slow-disk.c');
  execFileSync(process.env['CC'] ?? 'cc', ['-shared', '-fPIC', '-O1', '-o', library, source, '-ldl']);
  return { LD_PRELOAD: library, STRATA_SYNC_DELAY_US: String(Math.round(delayMs * 1000)) };
}
