/**
 * A stopped compute's directory as a cache: when its branch has not moved since, the next start on this machine uses it as it is (DESIGN 2.5).
 *
 * `<cache dir>/cache.json` is written after a clean shutdown and taken away before the next start, so that a start that fails leaves nothing behind to be
 * trusted. Its content: instance (the folder of data directory, page map and token), timelineId, endLsn (end of the shutdown checkpoint's record),
 * fullVersion (of Postgres), bootId (a machine that went down may have lost what was not synced, and the compute syncs nothing).
 */
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { Lsn } from '../postgres/lsn.ts';

export interface CacheKey {
  readonly timelineId: string;
  readonly endLsn: Lsn;
  readonly fullVersion: string;
}

const CACHE_FILE = 'cache.json';
const INSTANCE_PREFIX = 'instance-';

function bootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
}

/** A kept instance, and the LSN at which it is exactly its branch. */
export interface KeptCache {
  readonly instanceDir: string;
  readonly endLsn: Lsn;
}

/**
 * The kept instance when it fits; `endLsn` undefined: wherever it ends, which the caller then has to prove to be the end of the branch.
 * Whatever the answer, the mark is gone afterwards.
 */
export function takeCache(
  cacheDir: string,
  key: Omit<CacheKey, 'endLsn'> & { readonly endLsn: Lsn | undefined },
): KeptCache | undefined {
  const file = join(cacheDir, CACHE_FILE);
  if (!existsSync(file)) return undefined;
  let kept: (CacheKey & { readonly instance: string; readonly bootId: string }) | undefined;
  try {
    kept = JSON.parse(readFileSync(file, 'utf8')) as typeof kept;
  } catch {
    kept = undefined; // a mark that cannot be read vouches for nothing
  }
  rmSync(file, { force: true });
  const isSame =
    kept !== undefined &&
    kept.timelineId === key.timelineId &&
    (key.endLsn === undefined || kept.endLsn === key.endLsn) &&
    kept.fullVersion === key.fullVersion &&
    kept.bootId === bootId() &&
    existsSync(join(cacheDir, kept.instance));
  return isSame && kept !== undefined ? { instanceDir: join(cacheDir, kept.instance), endLsn: kept.endLsn } : undefined;
}

/** Marks a cleanly stopped instance as a cache. Not durably: after a reboot it is not trusted, and a sync could take long, as this disk is never synced. */
export function keepCache(cacheDir: string, instanceDir: string, key: CacheKey): void {
  const instance = instanceDir.slice(cacheDir.length + 1);
  const mark = { instance, ...key, bootId: bootId() };
  const file = join(cacheDir, CACHE_FILE);
  writeFileSync(`${file}.new`, `${JSON.stringify(mark)}\n`, { mode: 0o600 });
  renameSync(`${file}.new`, file);
}

/** An empty instance folder. Those of earlier starts are put aside and removed while the new one is already in use. */
export function newInstance(cacheDir: string): string {
  for (const name of readdirSync(cacheDir)) {
    if (!name.startsWith(INSTANCE_PREFIX)) continue;
    const aside = join(cacheDir, name.endsWith('.old') ? name : `${name}.old`);
    if (!name.endsWith('.old')) renameSync(join(cacheDir, name), aside);
    void rm(aside, { recursive: true, force: true, maxRetries: 3 }).catch(() => {});
  }
  const instance = join(cacheDir, `${INSTANCE_PREFIX}${process.pid}-${Date.now()}`);
  mkdirSync(instance, { mode: 0o700 });
  return instance;
}
