/**
 * The default object store: a directory. An object is a file whose path below the root is its name, and whose bytes are the object's, so a
 * copy of the directory is a copy of the store.
 *
 *   <root>/tenants/…/<object>     objects
 *   <root>/.partial/<random>      objects that are being written
 *
 * A put writes a file in `.partial`, fsyncs it, renames it to its place (with `ifAbsent`: links it there), and fsyncs the folders. A crash
 * leaves at most a file in `.partial`; old ones are removed (`removeUnfinished`; younger ones may be another process' work).
 *
 * Names cannot leave the root: their segments begin with a letter, a digit or `_`, so none is `.`, `..` or `.partial` (checkName). Symbolic links in
 * the directory are followed: they are the operator's own.
 *
 * A file that is put or read with `share` and lies on the same file system gets a second name (a hard link) instead of a second copy. Objects are never written
 * to, nor are such files: an object that is replaced or deleted, and a file that is, only lose a name.
 *
 * Several processes may use one directory. Folders that became empty are removed; a put that loses its folder to that makes it again.
 * A listing reads the whole folder for each page: fine for the tens of thousands of files that a timeline has, not for millions.
 */
import { randomUUID } from 'node:crypto';
import type { Dirent } from 'node:fs';
import { constants, createReadStream } from 'node:fs';
import { link, open, readdir, rename, rmdir, stat, unlink } from 'node:fs/promises';
import type { FileHandle } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { allDone } from '../base/all-done.ts';
import { makeMissingDirectories } from '../base/directories.ts';
import { CountingStream } from './counting-stream.ts';
import {
  checkLimit,
  checkName,
  checkPrefix,
  checkRange,
  LIST_LIMIT,
  ObjectStoreError,
  withDeadline,
} from './object-store.ts';
import type {
  CallOptions,
  Downloaded,
  FileOptions,
  ListedObject,
  ListOptions,
  ListPage,
  ObjectErrorKind,
  ObjectInfo,
  ObjectStore,
  PutOptions,
} from './object-store.ts';

export interface FileSystemStoreOptions {
  /** Deadline of a call that gives none. The kernel's calls cannot be interrupted: it is seen between them. */
  readonly timeoutMs?: number;
  /** Where a crash would matter during a put; a test throws from here. */
  readonly atStep?: (step: PutStep, name: string) => void;
}

export type PutStep = 'created' | 'written' | 'synced' | 'named' | 'folder-synced';

const PARTIAL = '.partial';
const TIMEOUT_MS = 300_000;
const CHUNK_BYTES = 1024 * 1024;
const RENAME_ATTEMPTS = 10;
const DURABLE_FOLDERS_MAX = 10_000;

export class FileSystemStore implements ObjectStore {
  readonly description: string;
  readonly supportsIfAbsent = true;
  readonly #root: string;
  readonly #timeoutMs: number;
  readonly #atStep: (step: PutStep, name: string) => void;
  /** Folders that are there and whose way from the root is durable, as far as we know. */
  readonly #durableFolders = new Set<string>();

  private constructor(root: string, options: FileSystemStoreOptions) {
    this.#root = root;
    this.description = root;
    this.#timeoutMs = options.timeoutMs ?? TIMEOUT_MS;
    this.#atStep = options.atStep ?? ((): void => {});
  }

  /** Makes the directory where there is none. Throws an `ObjectStoreError` where that cannot be. */
  static async open(directory: string, options: FileSystemStoreOptions = {}): Promise<FileSystemStore> {
    const root = resolve(directory);
    const store = new FileSystemStore(root, options);
    const partials = join(root, PARTIAL);
    try {
      await store.#makeDurable(partials, await store.#makeFolder(partials));
    } catch (error) {
      throw toObjectError(error, `open ${root}`);
    }
    return store;
  }

  put(name: string, bytes: Uint8Array, options: PutOptions = {}): Promise<void> {
    return this.#put(name, options, undefined, (file) => writeAll(file, bytes));
  }

  putFile(name: string, path: string, options: PutOptions & FileOptions = {}): Promise<void> {
    const shared = options.share === true ? path : undefined;
    return this.#put(name, options, shared, async (file, signal) => {
      await using source = await open(path, 'r');
      const chunk = Buffer.allocUnsafe(CHUNK_BYTES);
      for (;;) {
        signal.throwIfAborted();
        const { bytesRead } = await source.read(chunk, 0, chunk.length, null);
        if (bytesRead === 0) return;
        await writeAll(file, chunk.subarray(0, bytesRead));
      }
    });
  }

  get(name: string, options: CallOptions = {}): Promise<Buffer> {
    return this.#call('get', name, options, async (path) => {
      await using file = await open(path, 'r');
      const { size } = await file.stat();
      return await readRange(file, name, 0, size);
    });
  }

  getRange(name: string, start: number, end: number, options: CallOptions = {}): Promise<Buffer> {
    return this.#call('get', name, options, async (path) => {
      checkRange(name, start, end);
      if (start === end) return Buffer.alloc(0);
      await using file = await open(path, 'r');
      return await readRange(file, name, start, end);
    });
  }

  getToFile(name: string, path: string, options: FileOptions = {}): Promise<Downloaded> {
    return this.#call('get', name, options, async (source, signal) => {
      await using file = await open(source, 'r');
      const { size } = await file.stat();
      const counter = new CountingStream();
      try {
        if (options.share === true) {
          await unlink(path).catch(ignoreAbsent);
          if (await tryLink(source, path)) {
            const from = createReadStream(source, { fd: file, autoClose: false, highWaterMark: CHUNK_BYTES });
            await pipeline(from, counter, (counted) => drained(counted), { signal });
            if (counter.sizeBytes !== size) throw shorter(name, counter.sizeBytes, size);
            return { sizeBytes: size, crc32: counter.crc32 };
          }
        }
        const to = await open(path, 'w').catch((error: unknown) => {
          throw new ObjectStoreError('rejected', `get ${name}: ${messageOf(error)}`, { cause: error });
        });
        const from = createReadStream(source, { fd: file, autoClose: false, highWaterMark: CHUNK_BYTES });
        await pipeline(from, counter, to.createWriteStream(), { signal });
      } catch (error) {
        await unlink(path).catch(() => {});
        throw error;
      }
      if (counter.sizeBytes !== size) throw shorter(name, counter.sizeBytes, size);
      return { sizeBytes: size, crc32: counter.crc32 };
    });
  }

  head(name: string, options: CallOptions = {}): Promise<ObjectInfo> {
    return this.#call('head', name, options, async (path) => {
      const found = await stat(path);
      if (!found.isFile()) throw new ObjectStoreError('not-found', `${name} is not in ${this.description}`);
      return { sizeBytes: found.size, modifiedMs: Math.floor(found.mtimeMs), crc32: undefined };
    });
  }

  async list(prefix: string, options: ListOptions = {}): Promise<ListPage> {
    checkPrefix(prefix);
    const limit = options.limit ?? LIST_LIMIT;
    checkLimit(limit);
    const what = `list ${prefix} (${this.description})`;
    return withDeadline(what, options, this.#timeoutMs, async (signal) => {
      const objects: ListedObject[] = [];
      try {
        // Nothing above the prefix's own folder is looked at: there may be many beside it.
        const folder = prefix.slice(0, prefix.lastIndexOf('/') + 1);
        for await (const name of this.#walk(folder, prefix, options.after ?? '')) {
          signal.throwIfAborted();
          const found = await stat(join(this.#root, name)).catch(ignoreAbsent);
          if (found === undefined || !found.isFile()) continue;
          if (objects.length === limit) return { objects, next: objects.at(-1)?.name };
          objects.push({ name, sizeBytes: found.size, modifiedMs: Math.floor(found.mtimeMs) });
        }
      } catch (error) {
        throw toObjectError(error, what);
      }
      return { objects, next: undefined };
    });
  }

  delete(name: string, options: CallOptions = {}): Promise<void> {
    return this.deleteMany([name], options);
  }

  async deleteMany(names: readonly string[], options: CallOptions = {}): Promise<void> {
    names.forEach(checkName);
    const what = `delete ${names.length === 1 ? names[0] : `${names.length} objects`} (${this.description})`;
    return withDeadline(what, options, this.#timeoutMs, async (signal) => {
      try {
        const folders = new Set<string>();
        for (const name of names) {
          signal.throwIfAborted();
          const path = join(this.#root, name);
          if (await removeFile(path)) folders.add(dirname(path));
        }
        for (const folder of folders) await this.#syncOrRemoveFolder(folder);
      } catch (error) {
        throw toObjectError(error, what);
      }
    });
  }

  async removeUnfinished(olderThanMs: number, options: CallOptions = {}): Promise<number> {
    const folder = join(this.#root, PARTIAL);
    const what = `remove unfinished puts (${this.description})`;
    return withDeadline(what, options, this.#timeoutMs, async (signal) => {
      let count = 0;
      try {
        for (const entry of await readdir(folder)) {
          signal.throwIfAborted();
          const path = join(folder, entry);
          const found = await stat(path).catch(ignoreAbsent);
          // Of a shared file the age is that of its bytes; when its name was made, the change time tells.
          if (found === undefined || Date.now() - found.ctimeMs <= olderThanMs) continue;
          if (await removeFile(path)) count++;
        }
      } catch (error) {
        throw toObjectError(error, what);
      }
      return count;
    });
  }

  async #put(
    name: string,
    options: PutOptions,
    shared: string | undefined,
    write: (file: FileHandle, signal: AbortSignal) => Promise<void>,
  ): Promise<void> {
    return this.#call('put', name, options, async (path, signal) => {
      const partial = join(this.#root, PARTIAL, randomUUID());
      let isCrash = false;
      const atStep = (step: PutStep): void => {
        isCrash = true; // what a crash leaves, stays
        this.#atStep(step, name);
        isCrash = false;
      };
      try {
        {
          const isShared = shared !== undefined && (await tryLink(shared, partial));
          await using file = await open(partial, isShared ? 'r' : 'wx', 0o600);
          atStep('created');
          if (!isShared) await write(file, signal);
          atStep('written');
          await file.sync();
        }
        atStep('synced');
        signal.throwIfAborted();
        const way = await this.#giveName(partial, path, name, options.ifAbsent === true);
        atStep('named');
        await this.#makeDurable(dirname(path), way);
        atStep('folder-synced');
      } catch (error) {
        // What is not found here is the source file or the store itself.
        const isAbsent = ['ENOENT', 'ENOTDIR', 'EISDIR'].includes(errorCode(error) ?? '');
        if (isAbsent) throw new ObjectStoreError('rejected', `put ${name}: ${messageOf(error)}`, { cause: error });
        throw error;
      } finally {
        if (!isCrash) await unlink(partial).catch(() => {});
      }
    });
  }

  /** The folder may be removed, being empty, between its making and our rename. Resolves to what is to be made durable with it. */
  async #giveName(partial: string, path: string, name: string, ifAbsent: boolean): Promise<readonly string[]> {
    const folder = dirname(path);
    for (let attempt = 1; ; attempt++) {
      try {
        const way = await this.#makeFolder(folder);
        if (ifAbsent) await link(partial, path);
        else await rename(partial, path);
        return way;
      } catch (error) {
        const code = errorCode(error);
        if (code === 'EEXIST' && ifAbsent)
          throw new ObjectStoreError('exists', `${name} is in ${this.description} already`);
        if (code !== 'ENOENT' || attempt === RENAME_ATTEMPTS) throw error;
        this.#durableFolders.delete(folder);
      }
    }
  }

  /**
   * Makes a folder and those above it. Resolves to those of them, up to the root, whose names are not known to be durable: one that is there may be another
   * put's, which has not fsynced it yet.
   */
  async #makeFolder(folder: string): Promise<readonly string[]> {
    if (this.#durableFolders.has(folder)) return [];
    const first = await makeMissingDirectories(folder, 0o700);
    const way: string[] = [];
    for (let at = folder; at !== this.#root; at = dirname(at)) {
      const isMade = first !== undefined && at.startsWith(first);
      if (!isMade && this.#durableFolders.has(at)) break;
      way.push(at);
    }
    // The root itself, and what was made above it.
    for (let at = this.#root; first !== undefined && at.startsWith(first); at = dirname(at)) way.push(at);
    return way;
  }

  /** Fsyncs the folder, and those that hold the names of `way`; all at once, as one turn of the disk may serve them all. */
  async #makeDurable(folder: string, way: readonly string[]): Promise<void> {
    const above = new Set(way.map((at) => dirname(at)));
    above.delete(folder);
    await allDone([syncFolder(folder), ...Array.from(above, (at) => syncFolder(at).catch(ignoreAbsent))]);
    if (this.#durableFolders.size + way.length > DURABLE_FOLDERS_MAX) this.#durableFolders.clear();
    for (const at of way) this.#durableFolders.add(at);
  }

  /** After removals: the folder is fsynced, or, when it is empty, removed, and so on upwards. */
  async #syncOrRemoveFolder(folder: string): Promise<void> {
    for (let at = folder; ; at = dirname(at)) {
      if (at !== this.#root) {
        this.#durableFolders.delete(at);
        const isRemoved = await rmdir(at).then(
          () => true,
          (error: unknown) => {
            if (['ENOTEMPTY', 'EEXIST'].includes(errorCode(error) ?? '')) return false;
            return ignoreAbsent(error) === undefined;
          },
        );
        if (isRemoved) continue;
      }
      await syncFolder(at).catch(ignoreAbsent);
      return;
    }
  }

  /** Names below `folder` (which is '' or ends in '/') that begin with `prefix` and come after `after`, in order of their bytes. */
  async *#walk(folder: string, prefix: string, after: string): AsyncGenerator<string> {
    const entries = await readdir(join(this.#root, folder), { withFileTypes: true }).catch(ignoreAbsent);
    // As a folder's names go on with '/', it sorts as if it ended in one. Names are ASCII: order of UTF-16 units is order of bytes.
    const names = (entries ?? []).map(sortName).sort((a, b) => (a < b ? -1 : 1));
    for (const entry of names) {
      const name = folder + entry;
      if (name.startsWith('.')) continue; // .partial
      if (!entry.endsWith('/')) {
        if (name > after && name.startsWith(prefix)) yield name;
      } else if ((name.startsWith(prefix) || prefix.startsWith(name)) && (name > after || after.startsWith(name))) {
        yield* this.#walk(name, prefix, after);
      }
    }
  }

  async #call<T>(
    verb: string,
    name: string,
    options: CallOptions,
    work: (path: string, signal: AbortSignal) => Promise<T>,
  ): Promise<T> {
    checkName(name);
    const what = `${verb} ${name} (${this.description})`;
    return withDeadline(what, options, this.#timeoutMs, async (signal) => {
      try {
        return await work(join(this.#root, name), signal);
      } catch (error) {
        throw toObjectError(error, what);
      }
    });
  }
}

/** Gives a file a second name; false where that cannot be, and its bytes have to be copied. */
async function tryLink(from: string, to: string): Promise<boolean> {
  try {
    await link(from, to);
    return true;
  } catch (error) {
    // Another file system, one without links, too many of them, or a file that is not ours.
    if (['EXDEV', 'EPERM', 'EACCES', 'EMLINK', 'ENOTSUP', 'ENOSYS'].includes(errorCode(error) ?? '')) return false;
    throw error;
  }
}

async function drained(stream: AsyncIterable<unknown>): Promise<void> {
  for await (const _ of stream);
}

async function writeAll(file: FileHandle, bytes: Uint8Array): Promise<void> {
  for (let offset = 0; offset < bytes.length;) {
    const { bytesWritten } = await file.write(bytes, offset, bytes.length - offset);
    offset += bytesWritten;
  }
}

async function readRange(file: FileHandle, name: string, start: number, end: number): Promise<Buffer> {
  const bytes = Buffer.allocUnsafe(end - start);
  for (let offset = 0; offset < bytes.length;) {
    const { bytesRead } = await file.read(bytes, offset, bytes.length - offset, start + offset);
    if (bytesRead === 0) throw shorter(name, start + offset, end);
    offset += bytesRead;
  }
  return bytes;
}

function shorter(name: string, sizeBytes: number, end: number): ObjectStoreError {
  return new ObjectStoreError('damaged', `${name} ends at byte ${sizeBytes}, before ${end}`);
}

async function syncFolder(folder: string): Promise<void> {
  await using handle = await open(folder, constants.O_RDONLY | constants.O_DIRECTORY);
  await handle.sync();
}

/** Whether there was one. A folder is no object. */
async function removeFile(path: string): Promise<boolean> {
  try {
    await unlink(path);
    return true;
  } catch (error) {
    const code = errorCode(error);
    if (code === 'ENOENT' || code === 'ENOTDIR') return false;
    if ((code === 'EISDIR' || code === 'EPERM') && (await stat(path)).isDirectory()) return false;
    throw error;
  }
}

function sortName(entry: Dirent): string {
  return entry.isDirectory() ? `${entry.name}/` : entry.name;
}

function ignoreAbsent(error: unknown): undefined {
  if (!['ENOENT', 'ENOTDIR'].includes(errorCode(error) ?? '')) throw error;
  return undefined;
}

function errorCode(error: unknown): string | undefined {
  return error instanceof Error ? (error as NodeJS.ErrnoException).code : undefined;
}

const KINDS: Readonly<Record<string, ObjectErrorKind>> = {
  ENOENT: 'not-found',
  ENOTDIR: 'not-found',
  EISDIR: 'not-found',
  EACCES: 'denied',
  EPERM: 'denied',
  EROFS: 'denied',
  ENOSPC: 'transient',
  EDQUOT: 'transient',
  EIO: 'transient',
  EAGAIN: 'transient',
  EBUSY: 'transient',
  EINTR: 'transient',
  EMFILE: 'transient',
  ENFILE: 'transient',
  ENOMEM: 'transient',
  ESTALE: 'transient',
  ETIMEDOUT: 'transient',
};

/** An error of the file system with its kind. What has no system error code passes through: it is an abort, a test's crash or a bug. */
function toObjectError(error: unknown, what: string): unknown {
  if (error instanceof ObjectStoreError) return error;
  const code = errorCode(error);
  if (code === undefined || !/^E[A-Z]+$/.test(code)) return error;
  return new ObjectStoreError(KINDS[code] ?? 'rejected', `${what}: ${messageOf(error)}`, { cause: error });
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
