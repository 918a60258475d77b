/**
 * Scrub: whether everything that the indexes name is there and whole, in a pageserver's folders and in the object store, and what lies in the store that
 * nobody names. Runs beside a working pageserver, in a process of its own: it opens files, and shares no lock and no cache with it.
 *
 * Layers come and go meanwhile. So what seems wrong is looked at again under the newest index before it is said: a layer that the index no longer names is
 * nobody's concern. A layer that is not in the folder is missing only when the store does not have it either.
 *
 * Files in a folder that its index does not name are no orphans: a merge is about to name them, or the next start removes them.
 */

import { open, readdir, readFile, rm } from 'node:fs/promises';
import type { FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import { randomUUID } from 'node:crypto';
import type { Finding } from '../api/scrub.ts';
import { toStrataError } from '../base/errors.ts';
import { isObjectError, listAll } from '../object-store/object-store.ts';
import type { ListedObject, ObjectStore } from '../object-store/object-store.ts';
import { LayerDamagedError } from './layers/block.ts';
import { layerFileName } from './layers/layer-format.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import type { KnownGeneration } from './remote/generation.ts';
import {
  compareIndexes,
  indexesOf,
  INDEXES_PREFIX,
  indexObjectName,
  LAYERS_PREFIX,
  parseIndexName,
  parseLayerName,
} from './remote/object-names.ts';
import { objectNameOf } from './remote/remote-index.ts';
import type { RemoteIndex } from './remote/remote-index.ts';
import { listTimelineObjects, newestIndex, ORPHAN_AGE_MS, orphansOf, readIndex } from './remote/timeline-objects.ts';
import type { TimelineObjects } from './remote/timeline-objects.ts';
import { verifyLayer } from './scrub-layer.ts';
import type { Damage, LayerBytes } from './scrub-layer.ts';
import { decodeTimelineIndex, TIMELINE_INDEX_NAME } from './timeline-index.ts';
import type { TimelineIndex } from './timeline-index.ts';

export interface ScrubOptions {
  /** Of the pageserver's timelines: a folder for each. */
  readonly directory: string;
  readonly store?: ObjectStore;
  /** Of the latest pageserver; without it, the highest that is found. */
  readonly generation?: KnownGeneration;
  /** Where an object is put while it is looked at. */
  readonly scratchDirectory: string;
  readonly isWanted: (timelineId: string) => boolean;
  readonly deleteOrphans: boolean;
  /** Milliseconds since 1970. */
  readonly now: () => number;
  readonly onProgress: (progress: ScrubProgress) => void;
  readonly signal?: AbortSignal;
}

export interface ScrubProgress {
  readonly where: 'local' | 'object store';
  readonly layers: number;
  readonly bytes: number;
}

export interface StoreScrub {
  readonly findings: Finding[];
  readonly orphans: ListedObject[];
  orphansDeleted: number;
  /** Remains of uploads that never ended. */
  unfinishedRemoved: number;
  timelines: number;
  readonly local: { layers: number; bytes: number };
  readonly remote: { layers: number; bytes: number };
  /** Layers that are in the store only. */
  evictedLayers: number;
}

/** Bytes between two pauses, and how long those are: page reads share the disk. */
const PACE_BYTES = 8 * 1024 * 1024;
const PACE_MS = 5;
/** How often a timeline is looked at anew because it changed meanwhile. */
const ATTEMPTS = 3;

export async function scrubStore(options: ScrubOptions): Promise<StoreScrub> {
  const scrub = new Scrub(options);
  await scrub.local();
  if (options.store !== undefined) await scrub.remote(options.store);
  else scrub.reportAbsent();
  return scrub.result;
}

class Scrub {
  readonly result: StoreScrub = {
    findings: [],
    orphans: [],
    orphansDeleted: 0,
    unfinishedRemoved: 0,
    timelines: 0,
    local: { layers: 0, bytes: 0 },
    remote: { layers: 0, bytes: 0 },
    evictedLayers: 0,
  };
  readonly #options: ScrubOptions;
  /** By timeline, the names of layers that are whole here. */
  readonly #whole = new Map<string, Set<string>>();
  /** By timeline, the layers that are not here. */
  readonly #absent = new Map<string, Map<string, LayerDescription>>();
  #unpacedBytes = 0;

  constructor(options: ScrubOptions) {
    this.#options = options;
  }

  async local(): Promise<void> {
    const { directory, isWanted } = this.#options;
    for (const timelineId of await namesIn(directory)) {
      if (/^[0-9a-f]{32}$/.test(timelineId) && isWanted(timelineId)) await this.#localTimeline(timelineId);
    }
  }

  async remote(store: ObjectStore): Promise<void> {
    const { isWanted, generation } = this.#options;
    const timelines = new Map<string, string>();
    let highest = 0;
    for (const [prefix, parse] of [
      [INDEXES_PREFIX, parseIndexName],
      [LAYERS_PREFIX, parseLayerName],
    ] as const) {
      for await (const { name } of listAll(store, prefix)) {
        const parsed = parse(name);
        if (parsed === undefined) continue;
        highest = Math.max(highest, parsed.generation);
        if (isWanted(parsed.timelineId)) timelines.set(parsed.timelineId, parsed.tenantId);
      }
    }
    const latest = generation ?? { generation: highest, since: highest };
    for (const [timelineId, tenantId] of timelines) await this.#remoteTimeline(store, tenantId, timelineId, latest);
    if (this.#options.deleteOrphans) this.result.unfinishedRemoved = await store.removeUnfinished(ORPHAN_AGE_MS);
    this.reportAbsent();
  }

  /** Says of the layers that are not here, and were not found in the store, that they are missing. */
  reportAbsent(): void {
    for (const [timelineId, layers] of this.#absent) {
      for (const name of layers.keys()) {
        const path = join(this.#options.directory, timelineId, name);
        const elsewhere = this.#options.store === undefined ? '' : ', and the object store’s index does not name it';
        this.#find(timelineId, 'local', path, 0, `the file is not there${elsewhere}`);
      }
    }
  }

  async #localTimeline(timelineId: string): Promise<void> {
    const index = await this.#localIndex(timelineId);
    if (index === undefined || index.isDeleted) return;
    this.result.timelines++;
    const whole = new Set<string>();
    this.#whole.set(timelineId, whole);
    for (const layer of index.layers) {
      this.#options.signal?.throwIfAborted();
      const name = layerFileName(layer);
      const path = join(this.#options.directory, timelineId, name);
      const damages = await this.#verifyFile(layer, timelineId, path);
      if (damages?.length === 0) {
        whole.add(name);
        continue;
      }
      const now = await this.#localIndex(timelineId);
      const named = now?.layers.find((each) => layerFileName(each) === name);
      if (named === undefined) continue; // It was merged, or the timeline is gone.
      if (damages === undefined) this.#addAbsent(timelineId, name, layer);
      else for (const { offset, reason } of damages) this.#find(timelineId, 'local', path, offset, reason);
    }
  }

  #addAbsent(timelineId: string, name: string, layer: LayerDescription): void {
    const absent = this.#absent.get(timelineId);
    if (absent === undefined) this.#absent.set(timelineId, new Map([[name, layer]]));
    else absent.set(name, layer);
  }

  /** Undefined when it is not there, or damaged, which is said. */
  async #localIndex(timelineId: string): Promise<TimelineIndex | undefined> {
    const path = join(this.#options.directory, timelineId, TIMELINE_INDEX_NAME);
    try {
      return decodeTimelineIndex(await readFile(path), path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') {
        this.#find(timelineId, 'local', path, 0, toStrataError(error).message);
      }
      return undefined;
    }
  }

  /** Undefined when there is no such file. */
  async #verifyFile(layer: LayerDescription, timelineId: string, path: string): Promise<Damage[] | undefined> {
    let file: FileHandle;
    try {
      file = await open(path, 'r');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') return [{ offset: 0, reason: (error as Error).message }];
      return undefined;
    }
    try {
      const { size } = await file.stat();
      const damages = await verifyLayer(layer, timelineId, this.#bytesOf(file, size, path), path);
      this.#progress('local', size);
      return damages;
    } finally {
      await file.close();
    }
  }

  async #remoteTimeline(
    store: ObjectStore,
    tenantId: string,
    timelineId: string,
    generation: KnownGeneration,
  ): Promise<void> {
    for (let attempt = 1; ; attempt++) {
      const objects = await listTimelineObjects(store, tenantId, timelineId);
      const newest = await this.#newest(store, tenantId, timelineId, attempt);
      if (newest === 'damaged') return;
      const isSame = await this.#remoteLayers(store, objects, newest, attempt);
      if (!isSame) continue;
      const orphans = orphansOf(objects, newest, generation, this.#options.now());
      this.result.orphans.push(...orphans);
      if (this.#options.deleteOrphans) await this.#deleteOrphans(store, orphans);
      return;
    }
  }

  /** The newest index, looked for after the layers were listed. */
  async #newest(
    store: ObjectStore,
    tenantId: string,
    timelineId: string,
    attempt: number,
  ): Promise<RemoteIndex | undefined | 'damaged'> {
    const indexes = [];
    for await (const { name } of listAll(store, indexesOf(tenantId, timelineId))) {
      const parsed = parseIndexName(name);
      if (parsed !== undefined) indexes.push(parsed);
    }
    const newest = newestIndex(indexes);
    if (newest === undefined) return undefined;
    try {
      return await readIndex(store, newest);
    } catch (error) {
      if (isObjectError(error, 'not-found') && attempt < ATTEMPTS)
        return this.#newest(store, tenantId, timelineId, attempt + 1);
      if (isObjectError(error, 'transient')) throw error;
      this.#find(timelineId, 'object store', indexObjectName(newest), 0, toStrataError(error).message);
      return 'damaged';
    }
  }

  /** False when what the index names has changed meanwhile. */
  async #remoteLayers(
    store: ObjectStore,
    objects: TimelineObjects,
    newest: RemoteIndex | undefined,
    attempt: number,
  ): Promise<boolean> {
    if (newest === undefined || newest.timeline.isDeleted) return true;
    const { timelineId, tenantId } = newest.timeline;
    const there = new Map(objects.layers.map((layer) => [layer.name, layer]));
    const whole = this.#whole.get(timelineId);
    const absent = this.#absent.get(timelineId);
    const found: Finding[] = [];
    for (const layer of newest.layers) {
      this.#options.signal?.throwIfAborted();
      const name = objectNameOf(newest.timeline, layer);
      const fileName = layerFileName(layer.description);
      const say = (offset: number, reason: string): void => {
        found.push({ timelineId, where: 'object store', name, offset, reason });
      };
      if (absent?.delete(fileName) === true) this.result.evictedLayers++;
      const object = there.get(name);
      if (object === undefined) say(0, 'the object is not there');
      else if (object.sizeBytes !== layer.description.sizeBytes) {
        say(0, `it has ${object.sizeBytes} bytes, the index says ${layer.description.sizeBytes}`);
      }
      if (object === undefined) continue;
      const path = join(this.#options.scratchDirectory, `object-${randomUUID()}`);
      try {
        const { crc32, sizeBytes } = await store.getToFile(name, path);
        if (crc32 !== layer.crc32) say(0, `its checksum is ${hex(crc32)}, the index says ${hex(layer.crc32)}`);
        // What is as it was uploaded, and whole here, is whole.
        if (crc32 === layer.crc32 && whole?.has(fileName) === true) this.#progress('object store', sizeBytes);
        else
          for (const { offset, reason } of await this.#verifyObject(layer.description, timelineId, path, name))
            say(offset, reason);
      } catch (error) {
        if (isObjectError(error, 'transient') || isObjectError(error, 'denied')) throw error;
        say(0, toStrataError(error).message);
      } finally {
        await rm(path, { force: true });
      }
    }
    if (found.length > 0 && attempt < ATTEMPTS) {
      const again = await this.#newest(store, tenantId, timelineId, attempt);
      if (again !== 'damaged' && again !== undefined && compareIndexes(again, newest) > 0) return false;
    }
    this.result.findings.push(...found);
    return true;
  }

  async #verifyObject(layer: LayerDescription, timelineId: string, path: string, name: string): Promise<Damage[]> {
    const file = await open(path, 'r');
    try {
      const { size } = await file.stat();
      const damages = await verifyLayer(layer, timelineId, this.#bytesOf(file, size, name), name);
      this.#progress('object store', size);
      return damages;
    } finally {
      await file.close();
    }
  }

  /** Layers first: an index is not to outlive what it names, nor to go before it. */
  async #deleteOrphans(store: ObjectStore, orphans: readonly ListedObject[]): Promise<void> {
    const isIndex = ({ name }: ListedObject): boolean => name.startsWith(INDEXES_PREFIX);
    for (const some of [orphans.filter((each) => !isIndex(each)), orphans.filter(isIndex)]) {
      if (some.length === 0) continue;
      await store.deleteMany(some.map(({ name }) => name));
      this.result.orphansDeleted += some.length;
    }
  }

  #bytesOf(file: FileHandle, sizeBytes: number, name: string): LayerBytes {
    return {
      sizeBytes,
      read: async (offset, length) => {
        if (offset < 0 || offset + length > sizeBytes) {
          throw new LayerDamagedError(name, offset, `${length} bytes are wanted there, and it has ${sizeBytes}`);
        }
        const bytes = Buffer.allocUnsafe(length);
        for (let done = 0; done < length;) {
          const { bytesRead } = await file.read(bytes, done, length - done, offset + done);
          if (bytesRead === 0) throw new LayerDamagedError(name, offset, `it ends ${length - done} bytes too early`);
          done += bytesRead;
        }
        await this.#pace(length);
        return bytes;
      },
    };
  }

  async #pace(bytes: number): Promise<void> {
    this.#unpacedBytes += bytes;
    if (this.#unpacedBytes < PACE_BYTES) return;
    this.#unpacedBytes = 0;
    await new Promise((done) => setTimeout(done, PACE_MS));
  }

  #progress(where: ScrubProgress['where'], bytes: number): void {
    const counts = where === 'local' ? this.result.local : this.result.remote;
    counts.layers++;
    counts.bytes += bytes;
    this.#options.onProgress({ where, ...counts });
  }

  #find(timelineId: string, where: Finding['where'], name: string, offset: number, reason: string): void {
    this.result.findings.push({ timelineId, where, name, offset, reason });
  }
}

async function namesIn(directory: string): Promise<string[]> {
  try {
    return (await readdir(directory)).sort();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}

function hex(value: number): string {
  return value.toString(16).padStart(8, '0');
}
