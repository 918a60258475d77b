/**
 * One timeline's way into the object store.
 *
 * A pass takes the timeline's index as it is, uploads the layers that are not in the store, then an index object of the next sequence that names them
 * all. What changes meanwhile is for the next pass. The steps, between any two of which a crash may fall: 'layer uploaded', 'index uploaded'; then, when
 * the generation was confirmed (remote.ts), 'objects deleted'. A put whose reply was lost is repeated under the same name with the same bytes.
 *
 * Invariants:
 * - The newest index is of our own before anything is promised that depends on it, and soon in any case.
 * - An index is put when all layers that it names are acknowledged, and one at a time. No upload of a pass outlives it, even one that fails: its layer would come
 *   between the next pass and what that one takes for named.
 * - What is deleted is told by its object's name: no object that an index still to come may name, or that the newest names, is deleted.
 * - What is known to be in the store (`stored`) is an index that was acknowledged.
 */

import { stat } from 'node:fs/promises';
import { allDone } from '../../base/all-done.ts';
import { StrataError } from '../../base/errors.ts';
import { isObjectError } from '../../object-store/object-store.ts';
import type { ObjectStore } from '../../object-store/object-store.ts';
import type { Lsn } from '../../postgres/lsn.ts';
import { LayerAbsentError } from '../layers/block.ts';
import { layerFileName, layerPath } from '../layers/layer-format.ts';
import type { LayerDescription } from '../layers/layer-format.ts';
import type { OnStep } from '../step.ts';
import { encodeTimelineIndex } from '../timeline-index.ts';
import type { TimelineIndex } from '../timeline-index.ts';
import { crc32OfFile } from './first-look.ts';
import { indexObjectName, layerObjectName } from './object-names.ts';
import type { IndexName } from './object-names.ts';
import { keepRemoteIndex, readKeptIndex } from './kept-index.ts';
import { encodeRemoteIndex, objectNameOf } from './remote-index.ts';
import type { RemoteIndex, RemoteLayer } from './remote-index.ts';
import { indexesInStore, listTimelineObjects, newestIndex, readIndex } from './timeline-objects.ts';

/** A timeline as far as uploads are concerned with it. */
export interface UploadedTimeline {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly directory: string;
  /** What is durable here; another object after each change. */
  readonly index: TimelineIndex;
  /** Told how far the object store has the timeline for good. */
  setRemoteConsistentLsn(lsn: Lsn): void;
}

export interface UploadOptions {
  readonly store: ObjectStore;
  readonly generation: number;
  /** Indexes of generations before it are not of our own (generation.ts). */
  readonly since: number;
  /** Runs an upload of a layer when it is its turn. */
  readonly inTurn: (upload: () => Promise<void>) => Promise<void>;
  readonly onStep?: OnStep;
}

/** What a pass has brought to the store. */
export interface Pass {
  /** Up to here the store has the timeline; it counts when the generation was confirmed. */
  readonly lsn: Lsn;
  /** What is not needed any more when the generation was confirmed. */
  readonly deleted: readonly string[];
}

/** What the store has lost of what its newest index names. */
export interface Loss {
  /** Objects that the next pass brings there again. */
  readonly againCount: number;
  /** Layers that are neither there nor whole here. */
  readonly lost: readonly RemoteLayer[];
}

/** Another process has our generation: nothing may be written any more. */
export class GenerationTakenError extends StrataError {
  constructor(name: string) {
    super('internal', `object ${name} was written by another pageserver of the same generation`);
    this.name = 'GenerationTakenError';
  }
}

const INDEX_TIMEOUT_MS = 20_000;

export class TimelineUpload {
  readonly timeline: UploadedTimeline;
  readonly #options: UploadOptions;
  /** The newest index that is known to be in the store. */
  #stored: RemoteIndex | undefined;
  #storedLayers: ReadonlySet<RemoteLayer> = new Set();
  /** The local index that it was made of. */
  #storedOf: TimelineIndex | undefined;
  /** An index whose put may have taken effect, though no reply came. */
  #unresolved: { readonly index: RemoteIndex; readonly of: TimelineIndex } | undefined;
  /** Older index objects, to be deleted with the next pass. */
  #olderIndexes: string[] = [];
  /** Objects in whose place others were uploaded, to be deleted when no index names them. */
  #replaced: string[] = [];
  /** By file name; uploaded, whether an index names them or not. */
  readonly #layers = new Map<string, RemoteLayer>();
  #sequence = 0;
  #isLoaded = false;
  #loading: Promise<void> | undefined;

  constructor(timeline: UploadedTimeline, options: UploadOptions) {
    this.timeline = timeline;
    this.#options = options;
  }

  /** Of a timeline that was just made: nothing of it can be in the store. */
  isNew(): void {
    this.#isLoaded = true;
  }

  /** Whether the newest index in the store, if there is one, is of our own. */
  get isOwn(): boolean {
    return this.#stored === undefined || this.#stored.generation >= this.#options.since;
  }

  /** Names of the objects that the newest index names, or the next one may. */
  neededObjects(): ReadonlySet<string> {
    const { index } = this.timeline;
    const names = [...(this.#stored?.layers ?? []), ...this.#layers.values()].map((layer) =>
      objectNameOf(index, layer),
    );
    if (this.storedIndexName !== undefined) names.push(this.storedIndexName);
    return new Set(names);
  }

  /** Whether the store has the timeline as it is here. */
  get isUpToDate(): boolean {
    return this.#isLoaded && this.#storedOf === this.timeline.index;
  }

  /** Bytes of layers that are not in the store. */
  get pendingBytes(): number {
    let bytes = 0;
    for (const layer of this.timeline.index.layers)
      if (!this.#layers.has(layerFileName(layer))) bytes += layer.sizeBytes;
    return bytes;
  }

  /** How the layer lies in the store, when an index there names it. */
  async storedLayer(layer: LayerDescription): Promise<RemoteLayer | undefined> {
    await this.load();
    return this.isStored(layer) ? this.#layers.get(layerFileName(layer)) : undefined;
  }

  /** Whether an index in the store names the layer, as far as is known now. */
  isStored(layer: LayerDescription): boolean {
    const uploaded = this.#layers.get(layerFileName(layer));
    return uploaded !== undefined && this.#storedLayers.has(uploaded);
  }

  /** Learns what the store has of the timeline: from the file beside the local index, else from the store. */
  async load(): Promise<void> {
    if (this.#isLoaded) return;
    this.#loading ??= this.#load().finally(() => (this.#loading = undefined));
    await this.#loading;
  }

  async #load(): Promise<void> {
    const index = readKeptIndex(this.timeline.directory) ?? (await this.#readStored());
    this.#isLoaded = true;
    if (index === undefined) return;
    this.#stored = index;
    this.#storedLayers = new Set(index.layers);
    if (index.generation === this.#options.generation) this.#sequence = index.sequence;
    for (const layer of index.layers) this.#layers.set(layerFileName(layer.description), layer);
    const local = this.timeline.index;
    const isSame = encodeTimelineIndex(index.timeline).equals(encodeTimelineIndex(local));
    if (isSame && this.isOwn) this.#storedOf = local;
  }

  async #readStored(): Promise<RemoteIndex | undefined> {
    const { tenantId, timelineId } = this.timeline;
    const { store, generation } = this.#options;
    const indexes = await indexesInStore(store, tenantId, timelineId);
    const newest = newestIndex(indexes, generation);
    if (newest === undefined) return undefined;
    this.#olderIndexes = indexes.filter((index) => index.generation < newest.generation).map(({ name }) => name);
    return readIndex(store, newest);
  }

  /** Brings the timeline, as it is now, to the store. Undefined when it was there. Whatever fails may be tried again. */
  async pass(signal: AbortSignal): Promise<Pass | undefined> {
    await this.load();
    if (this.#unresolved !== undefined) return this.#putIndex(this.#unresolved, signal);
    const { index } = this.timeline;
    if (index === this.#storedOf) return undefined;
    const missing = index.layers.filter((layer) => !this.#layers.has(layerFileName(layer)));
    await allDone(missing.map((layer) => this.#options.inTurn(() => this.#uploadLayer(layer, signal))));
    if (this.timeline.index !== index && missing.some((layer) => !this.#layers.has(layerFileName(layer)))) {
      return this.pass(signal); // Some were merged away before they were read.
    }
    const layers = index.layers.map((layer) => this.#layers.get(layerFileName(layer))!);
    const { generation } = this.#options;
    this.#unresolved = { index: { generation, sequence: ++this.#sequence, timeline: index, layers }, of: index };
    return this.#putIndex(this.#unresolved, signal);
  }

  /** The newest index that is known to be in the store. */
  get storedIndexName(): string | undefined {
    if (this.#stored === undefined) return undefined;
    const { tenantId, timelineId } = this.timeline;
    const { generation, sequence } = this.#stored;
    return indexObjectName({ tenantId, timelineId, generation, sequence, isDeleted: false });
  }

  /**
   * Looks whether the store still has what its newest index names; of the objects in `damaged` it is known that they cannot be used. What is lost there and whole here
   * is uploaded again with the next pass, under our generation. What is not whole here either stays named, as nothing better is known.
   */
  async findLoss(damaged: ReadonlySet<string>): Promise<Loss> {
    await this.load();
    const { store, generation } = this.#options;
    const { tenantId, timelineId, directory } = this.timeline;
    for (;;) {
      const stored = this.#stored;
      if (stored === undefined) return { againCount: 0, lost: [] };
      const objects = await listTimelineObjects(store, tenantId, timelineId);
      const sizes = new Map([...objects.indexes, ...objects.layers].map(({ name, sizeBytes }) => [name, sizeBytes]));
      const lost: RemoteLayer[] = [];
      const again: RemoteLayer[] = [];
      for (const layer of stored.layers) {
        const name = objectNameOf(stored.timeline, layer);
        if (sizes.get(name) === layer.description.sizeBytes && !damaged.has(name)) continue;
        ((await isWholeHere(directory, layer)) ? again : lost).push(layer);
      }
      if (stored !== this.#stored) continue; // A pass has come between.
      const indexName = this.storedIndexName!;
      const isIndexThere = sizes.has(indexName) && !damaged.has(indexName);
      for (const layer of again) {
        this.#layers.delete(layerFileName(layer.description));
        if (layer.generation !== generation) this.#replaced.push(objectNameOf(stored.timeline, layer));
      }
      if (again.length > 0 || !isIndexThere) this.#storedOf = undefined;
      return { againCount: again.length + (isIndexThere ? 0 : 1), lost };
    }
  }

  /** That this was confirmed is what the last known state says already: for a timeline that needed no pass after a start. */
  get storedPass(): Pass | undefined {
    return this.#stored === undefined ? undefined : { lsn: this.#stored.timeline.diskConsistentLsn, deleted: [] };
  }

  /** Puts a tombstone. */
  async putTombstone(signal: AbortSignal): Promise<IndexName> {
    await this.load();
    const { timeline } = this;
    const { store, generation } = this.#options;
    const { tenantId, timelineId } = timeline;
    const sequence = ++this.#sequence;
    const index = { ...timeline.index, isDeleted: true, layers: [] };
    const name = { tenantId, timelineId, generation, sequence, isDeleted: true };
    const bytes = encodeRemoteIndex({ generation, sequence, timeline: index, layers: [] });
    await store.put(indexObjectName(name), bytes, { signal, timeoutMs: INDEX_TIMEOUT_MS });
    this.#options.onStep?.('tombstone uploaded');
    return name;
  }

  async #uploadLayer(layer: LayerDescription, signal: AbortSignal): Promise<void> {
    const { timeline } = this;
    const { store, generation } = this.#options;
    const { tenantId, timelineId, directory } = timeline;
    const fileName = layerFileName(layer);
    const path = layerPath(directory, layer);
    try {
      const crc32 = await crc32OfFile(path);
      const name = layerObjectName({ tenantId, timelineId, fileName, generation });
      await store.putFile(name, path, { signal, share: true });
      this.#options.onStep?.('layer uploaded');
      this.#layers.set(fileName, { description: layer, crc32, generation });
    } catch (error) {
      const isGone = !timeline.index.layers.includes(layer);
      if (!isAbsent(error) && !isObjectError(error, 'rejected')) throw error;
      if (isGone) return;
      throw isAbsent(error) ? new LayerAbsentError(path) : error;
    }
  }

  async #putIndex(unresolved: { index: RemoteIndex; of: TimelineIndex }, signal: AbortSignal): Promise<Pass> {
    const { index, of } = unresolved;
    const { tenantId, timelineId, directory } = this.timeline;
    const { store, onStep } = this.#options;
    const { generation, sequence } = index;
    const bytes = encodeRemoteIndex(index);
    const name = indexObjectName({ tenantId, timelineId, generation, sequence, isDeleted: false });
    try {
      const ifAbsent = store.supportsIfAbsent;
      await store.put(name, bytes, { signal, ifAbsent, timeoutMs: INDEX_TIMEOUT_MS });
    } catch (error) {
      if (!isObjectError(error, 'exists')) throw error;
      if (!(await store.get(name, { signal })).equals(bytes)) throw new GenerationTakenError(name);
    }
    onStep?.('index uploaded');
    const deleted = this.#olderIndexes;
    if (this.storedIndexName !== undefined) deleted.push(this.storedIndexName);
    const namedObjects = new Set(index.layers.map((layer) => objectNameOf(index.timeline, layer)));
    for (const [fileName, layer] of this.#layers) {
      const objectName = objectNameOf(index.timeline, layer);
      if (namedObjects.has(objectName)) continue;
      // Uploaded for a pass that came to nothing, or named by the index before.
      this.#layers.delete(fileName);
      deleted.push(objectName);
    }
    deleted.push(...this.#replaced.filter((replaced) => !namedObjects.has(replaced)));
    this.#replaced = this.#replaced.filter((replaced) => namedObjects.has(replaced));
    this.#olderIndexes = [];
    this.#stored = index;
    this.#storedLayers = new Set(index.layers);
    // What was found to be lost meanwhile is for the next pass.
    const isComplete = index.layers.every((layer) => this.#layers.get(layerFileName(layer.description)) === layer);
    this.#storedOf = isComplete ? of : undefined;
    this.#unresolved = undefined;
    await keepRemoteIndex(directory, bytes);
    onStep?.('remote index kept');
    return { lsn: index.timeline.diskConsistentLsn, deleted };
  }
}

/** Whether the layer's file is here, with the bytes that were uploaded. */
async function isWholeHere(directory: string, { description, crc32 }: RemoteLayer): Promise<boolean> {
  const path = layerPath(directory, description);
  try {
    return (await stat(path)).size === description.sizeBytes && (await crc32OfFile(path)) === crc32;
  } catch {
    return false; // Not there, or it cannot be read.
  }
}

function isAbsent(error: unknown): boolean {
  return error instanceof Error && (error as NodeJS.ErrnoException).code === 'ENOENT';
}
