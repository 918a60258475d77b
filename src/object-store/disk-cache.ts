/**
 * A bounded cache of whole objects on the local disk, for objects that never change under their names.
 *
 *   <directory>/<h>.<size>.<r>            a whole object: h = first 32 hex digits of the name's SHA-256, size in bytes, r = 8 random hex digits
 *   <directory>/<h>.<size>.<r>.partial    one that is being downloaded
 *
 * - A download is checked against the length and CRC32 that the caller expects, and fsynced, before it gets its name. So after a crash
 *   whatever has a whole name and the length that the name says is good; everything else is removed at open. No list is kept beside the files.
 * - The bytes of all files, downloads in flight included, never exceed the limit. Room is made by removing the files that were used the longest
 *   time ago; files in use (pinned) stay, and who needs room that only they hold waits for it, in order of arrival.
 * - Callers who want the same object at the same time share one download. It is given up when the last of them has given up.
 * - One process per directory; the caller sees to that.
 *
 * After a restart the order of use begins with the order of download.
 */
import { createHash, randomBytes } from 'node:crypto';
import { mkdir, open, readdir, rename, stat, unlink } from 'node:fs/promises';
import { join } from 'node:path';
import { isObjectError, ObjectStoreError, withDeadline } from './object-store.ts';
import type { CallOptions, ObjectStore } from './object-store.ts';

export interface CachedObject {
  readonly name: string;
  readonly sizeBytes: number;
  /** Undefined: only the length is checked. */
  readonly crc32: number | undefined;
}

/** A file that stays until it is released. */
export interface PinnedFile extends Disposable {
  readonly path: string;
  /** May be called again. */
  release(): void;
}

export interface DiskCacheOptions {
  readonly directory: string;
  readonly limitBytes: number;
  readonly store: ObjectStore;
}

export interface DiskCacheStatistics {
  readonly limitBytes: number;
  readonly usedBytes: number;
  readonly pinnedBytes: number;
  readonly fileCount: number;
  readonly hits: number;
  readonly misses: number;
  readonly evictions: number;
}

interface Entry {
  readonly key: string;
  readonly path: string;
  readonly sizeBytes: number;
  /** Those who use the file or wait for it. */
  pins: number;
  /** Not to be served any more; the file goes with the last pin. */
  isDropped: boolean;
  /** Undefined when the file is there. */
  flight: Flight | undefined;
}

interface Flight {
  readonly done: Promise<void>;
  readonly controller: AbortController;
}

const ACQUIRE_TIMEOUT_MS = 300_000;
const DOWNLOAD_ATTEMPTS = 2;
const FILE_NAME = /^([0-9a-f]{32})\.(\d+)\.[0-9a-f]{8}$/;

export class DiskCache {
  readonly #directory: string;
  readonly #limitBytes: number;
  readonly #store: ObjectStore;
  /** By key of the name; the first was used the longest time ago. */
  readonly #entries = new Map<string, Entry>();
  readonly #flights = new Set<Flight>();
  readonly #background = new Set<Promise<void>>();
  #usedBytes = 0;
  #pinnedBytes = 0;
  #hits = 0;
  #misses = 0;
  #evictions = 0;
  #isClosed = false;
  /** Ends when those who asked for room before have it. */
  #roomQueue: Promise<unknown> = Promise.resolve();
  #onFreed: (() => void) | undefined;

  private constructor(options: DiskCacheOptions) {
    this.#directory = options.directory;
    this.#limitBytes = options.limitBytes;
    this.#store = options.store;
  }

  /** Takes over what is in the directory, as far as it is whole and within the limit. */
  static async open(options: DiskCacheOptions): Promise<DiskCache> {
    const cache = new DiskCache(options);
    await cache.#load();
    return cache;
  }

  /** The object's file, downloaded when it is not here. Throws what the store throws; `damaged` when twice the wrong bytes came. */
  async acquire(object: CachedObject, options: CallOptions = {}): Promise<PinnedFile> {
    if (this.#isClosed) throw new ObjectStoreError('rejected', `the cache ${this.#directory} is closed`);
    const key = keyOf(object.name);
    let entry = this.#entries.get(key);
    if (entry !== undefined && entry.sizeBytes !== object.sizeBytes) {
      this.drop(object.name);
      entry = undefined;
    }
    if (entry?.flight === undefined && entry !== undefined) this.#hits += 1;
    else this.#misses += 1;
    entry ??= this.#startDownload(key, object);
    this.#entries.delete(key);
    this.#entries.set(key, entry); // used last
    this.#pin(entry);
    const { flight } = entry;
    if (flight !== undefined) {
      try {
        await withDeadline(`get ${object.name}`, options, ACQUIRE_TIMEOUT_MS, (signal) =>
          orAborted(flight.done, signal),
        );
      } catch (error) {
        this.#unpin(entry);
        throw error;
      }
    }
    return this.#pinnedFile(entry);
  }

  /**
   * Makes a local file the cached copy of an object, by renaming it: who has just uploaded a file need not download it again. The file must be on
   * the cache's file system, whole and fsynced. When there is no room for it, it is removed.
   */
  async adopt(object: CachedObject, path: string): Promise<void> {
    const key = keyOf(object.name);
    const { size } = await stat(path);
    if (size !== object.sizeBytes) {
      throw new ObjectStoreError('damaged', `${path} has ${size} bytes, ${object.name} ${object.sizeBytes}`);
    }
    const isWanted = (): boolean => !this.#entries.has(key) && !this.#isClosed;
    if (!isWanted() || !(await this.#tryReserve(size))) return unlink(path);
    if (!isWanted()) {
      this.#free(size);
      return unlink(path);
    }
    const entry = this.#newEntry(key, size);
    this.#entries.set(key, entry);
    this.#pin(entry); // it may not be removed before it has its name
    const done = rename(path, entry.path);
    entry.flight = { done, controller: new AbortController() };
    try {
      await done;
      entry.flight = undefined;
    } catch (error) {
      if (this.#entries.get(key) === entry) this.#entries.delete(key);
      this.#free(size);
      throw error;
    } finally {
      this.#unpin(entry);
    }
  }

  /** Whether the object's file is here. */
  has(name: string): boolean {
    const entry = this.#entries.get(keyOf(name));
    return entry !== undefined && entry.flight === undefined;
  }

  /** Forgets an object, because it is gone or its file is damaged: the next who wants it downloads it. Those who have it keep it until they release it. */
  drop(name: string): void {
    const key = keyOf(name);
    const entry = this.#entries.get(key);
    if (entry === undefined) return;
    this.#entries.delete(key);
    entry.isDropped = true;
    if (entry.pins === 0) this.#removeLater(entry);
  }

  get statistics(): DiskCacheStatistics {
    return {
      limitBytes: this.#limitBytes,
      usedBytes: this.#usedBytes,
      pinnedBytes: this.#pinnedBytes,
      fileCount: this.#entries.size,
      hits: this.#hits,
      misses: this.#misses,
      evictions: this.#evictions,
    };
  }

  /** Ends the downloads; the files stay for the next open. */
  async close(): Promise<void> {
    this.#isClosed = true;
    const reason = new ObjectStoreError('rejected', `the cache ${this.#directory} is closed`);
    for (const { controller } of this.#flights) controller.abort(reason);
    await Promise.allSettled([...this.#flights].map(({ done }) => done));
    await this.#roomQueue;
    await Promise.all(this.#background);
  }

  async #load(): Promise<void> {
    await mkdir(this.#directory, { recursive: true, mode: 0o700 });
    const found: { path: string; key: string; sizeBytes: number; modifiedMs: number }[] = [];
    for (const file of await readdir(this.#directory)) {
      const path = join(this.#directory, file);
      const [, key, size] = FILE_NAME.exec(file) ?? [];
      const { size: sizeBytes, mtimeMs: modifiedMs } = await stat(path);
      if (key !== undefined && Number(size) === sizeBytes) found.push({ path, key, sizeBytes, modifiedMs });
      else await unlink(path);
    }
    found.sort((a, b) => b.modifiedMs - a.modifiedMs);
    const kept: Entry[] = [];
    const keys = new Set<string>();
    for (const { path, key, sizeBytes } of found) {
      if (keys.has(key) || this.#usedBytes + sizeBytes > this.#limitBytes) {
        await unlink(path);
        continue;
      }
      keys.add(key);
      this.#usedBytes += sizeBytes;
      kept.push({ key, path, sizeBytes, pins: 0, isDropped: false, flight: undefined });
    }
    for (const entry of kept.reverse()) this.#entries.set(entry.key, entry);
  }

  #newEntry(key: string, sizeBytes: number): Entry {
    const file = `${key}.${sizeBytes}.${randomBytes(4).toString('hex')}`;
    return { key, path: join(this.#directory, file), sizeBytes, pins: 0, isDropped: false, flight: undefined };
  }

  #startDownload(key: string, object: CachedObject): Entry {
    const entry = this.#newEntry(key, object.sizeBytes);
    const controller = new AbortController();
    const done = this.#download(entry, object, controller.signal).then(
      () => {
        entry.flight = undefined;
      },
      (error: unknown) => {
        // There is no file: nothing is left to remove with the last pin.
        if (this.#entries.get(key) === entry) this.#entries.delete(key);
        throw error;
      },
    );
    const flight = { done, controller };
    entry.flight = flight;
    this.#flights.add(flight);
    // Each who waits for it handles its failure.
    void done.catch(() => {}).then(() => this.#flights.delete(flight));
    return entry;
  }

  async #download(entry: Entry, object: CachedObject, signal: AbortSignal): Promise<void> {
    await this.#reserve(entry.sizeBytes, object.name, signal);
    // From here on the room is ours until the file is removed, or never comes to be.
    const partial = `${entry.path}.partial`;
    try {
      for (let attempt = 1; ; attempt++) {
        try {
          await this.#fetch(object, partial, signal);
          break;
        } catch (error) {
          if (!isObjectError(error, 'damaged') || attempt === DOWNLOAD_ATTEMPTS) throw error;
        }
      }
      signal.throwIfAborted();
      await rename(partial, entry.path);
    } catch (error) {
      await unlink(partial).catch(() => {});
      this.#free(entry.sizeBytes);
      throw error;
    }
  }

  async #fetch(object: CachedObject, path: string, signal: AbortSignal): Promise<void> {
    const received = await this.#store.getToFile(object.name, path, { signal });
    if (received.sizeBytes !== object.sizeBytes) {
      const message = `${object.name} has ${received.sizeBytes} bytes, ${object.sizeBytes} are expected`;
      throw new ObjectStoreError('damaged', message);
    }
    if (object.crc32 !== undefined && received.crc32 !== object.crc32) {
      const message = `${object.name} has the CRC32 ${received.crc32.toString(16)}, ${object.crc32.toString(16)} is expected`;
      throw new ObjectStoreError('damaged', message);
    }
    await using file = await open(path, 'r+');
    await file.sync();
  }

  /** Takes room from the limit, removing files or waiting for those in use. */
  async #reserve(sizeBytes: number, name: string, signal: AbortSignal): Promise<void> {
    if (sizeBytes > this.#limitBytes) {
      const message = `${name} has ${sizeBytes} bytes, the cache ${this.#directory} at most ${this.#limitBytes}`;
      throw new ObjectStoreError('rejected', message);
    }
    const turn = this.#roomQueue.then(async () => {
      for (;;) {
        const freed = new Promise<void>((resolve) => {
          this.#onFreed = resolve;
        });
        signal.throwIfAborted();
        if (await this.#tryReserve(sizeBytes)) return;
        await orAborted(freed, signal);
      }
    });
    this.#roomQueue = turn.catch(() => {});
    await turn;
  }

  /** Takes room if there is some now, or after removing what is not in use. */
  async #tryReserve(sizeBytes: number): Promise<boolean> {
    while (this.#usedBytes + sizeBytes > this.#limitBytes) {
      const victim = this.#leastRecentlyUsed();
      if (victim === undefined) return false;
      this.#entries.delete(victim.key);
      victim.isDropped = true;
      this.#evictions += 1;
      await this.#remove(victim);
    }
    this.#usedBytes += sizeBytes;
    return true;
  }

  #leastRecentlyUsed(): Entry | undefined {
    for (const entry of this.#entries.values()) {
      if (entry.pins === 0 && entry.flight === undefined) return entry;
    }
    return undefined;
  }

  #pin(entry: Entry): void {
    if (entry.pins === 0) this.#pinnedBytes += entry.sizeBytes;
    entry.pins += 1;
  }

  #unpin(entry: Entry): void {
    entry.pins -= 1;
    if (entry.pins > 0) return;
    this.#pinnedBytes -= entry.sizeBytes;
    if (entry.flight !== undefined) {
      // Nobody waits for it any more. Who comes now starts anew.
      if (this.#entries.get(entry.key) === entry) this.#entries.delete(entry.key);
      entry.isDropped = true;
      entry.flight.controller.abort(new ObjectStoreError('transient', 'nobody waits for this download any more'));
      const { done } = entry.flight;
      // The abort may come too late.
      this.#inBackground(done.then(() => this.#remove(entry)).catch(() => {}));
    } else if (entry.isDropped) this.#removeLater(entry);
    else this.#wakeRoom();
  }

  #pinnedFile(entry: Entry): PinnedFile {
    let isReleased = false;
    const release = (): void => {
      if (isReleased) return;
      isReleased = true;
      this.#unpin(entry);
    };
    return { path: entry.path, release, [Symbol.dispose]: release };
  }

  #removeLater(entry: Entry): void {
    this.#inBackground(this.#remove(entry));
  }

  #inBackground(work: Promise<void>): void {
    const tracked: Promise<void> = work.finally(() => this.#background.delete(tracked));
    this.#background.add(tracked);
  }

  /** A file that cannot be removed is forgotten; the next open tries again. */
  async #remove(entry: Entry): Promise<void> {
    await unlink(entry.path).catch(() => {});
    this.#free(entry.sizeBytes);
  }

  #free(sizeBytes: number): void {
    this.#usedBytes -= sizeBytes;
    this.#wakeRoom();
  }

  #wakeRoom(): void {
    this.#onFreed?.();
    this.#onFreed = undefined;
  }
}

function keyOf(name: string): string {
  return createHash('sha256').update(name).digest('hex').slice(0, 32);
}

/** The promise, or the signal's reason when that comes first. */
async function orAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  signal.throwIfAborted();
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  const onAbort = (): void => reject(signal.reason as Error);
  signal.addEventListener('abort', onAbort, { once: true });
  try {
    return await Promise.race([promise, aborted]);
  } finally {
    signal.removeEventListener('abort', onAbort);
  }
}
