/**
 * A timeline's pages as its layers on disk give them, read beside a working pageserver and past its caches: what is compared is what is stored. Up to
 * diskConsistentLsn only; what is newer is in the pageserver's memory.
 *
 * Layers that are merged meanwhile are found anew in the newest index.
 */

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Lsn } from '../postgres/lsn.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';
import { filesAt } from './basebackup.ts';
import type { Key, KeyRange, RelationFork } from './key.ts';
import { LayerAbsentError } from './layers/block.ts';
import { LayerCache, LayerFile } from './layers/layer-file.ts';
import { layerPath } from './layers/layer-format.ts';
import { LayerMap } from './layers/layer-map.ts';
import { PageCache } from './page-cache.ts';
import { HistoryReader } from './read.ts';
import type { KeyImage, LineageStep } from './read.ts';
import { replayValue } from './replay.ts';
import type { Files } from './scrub-files.ts';
import { decodeTimelineIndex, TIMELINE_INDEX_NAME } from './timeline-index.ts';
import type { TimelineIndex } from './timeline-index.ts';

const CACHE_BYTES = 16 * 1024 * 1024;
const OPEN_FILES_MAX = 64;
const ATTEMPTS = 4;

export class StoredPages {
  readonly #directory: string;
  readonly #timelineId: string;
  #cache = new LayerCache({ blockBytesMax: CACHE_BYTES, openFilesMax: OPEN_FILES_MAX });
  #reader = new HistoryReader(new PageCache(CACHE_BYTES), this.#cache.blocks, replayValue);
  #files: LayerFile[] = [];
  #lineage: LineageStep[] = [];
  #index: TimelineIndex | undefined;

  /** `directory` has a folder for each timeline. */
  constructor(directory: string, timelineId: string) {
    this.#directory = directory;
    this.#timelineId = timelineId;
  }

  /** Throws when an index is not there or damaged. */
  async load(): Promise<TimelineIndex> {
    this.close();
    this.#cache = new LayerCache({ blockBytesMax: CACHE_BYTES, openFilesMax: OPEN_FILES_MAX });
    this.#reader = new HistoryReader(new PageCache(CACHE_BYTES), this.#cache.blocks, replayValue);
    this.#lineage = [];
    this.#index = undefined;
    let endLsn: Lsn = Infinity;
    for (let timelineId: string | undefined = this.#timelineId; timelineId !== undefined;) {
      const directory = join(this.#directory, timelineId);
      const path = join(directory, TIMELINE_INDEX_NAME);
      const index: TimelineIndex = decodeTimelineIndex(await readFile(path), path);
      this.#index ??= index;
      const layerMap = new LayerMap();
      for (const layer of index.layers) {
        const file = new LayerFile(layerPath(directory, layer), layer, this.#cache);
        this.#files.push(file);
        layerMap.insert(file);
      }
      const history = { number: this.#lineage.length, lastRecordLsn: Infinity, memoryLayers: [], layerMap };
      this.#lineage.push({ history, endLsn, filter: undefined, groups: [] });
      endLsn = Math.min(endLsn, index.startLsn);
      timelineId = index.ancestor?.timelineId;
    }
    return this.#index!;
  }

  /** Undefined when a layer of it is not on this disk. Throws LayerDamagedError, or what replaying throws. */
  read(fork: RelationFork, blk: number, lsn: Lsn): Promise<Buffer | undefined> {
    return this.#readWhole(({ pgVersion }) => {
      const page = Buffer.alloc(BLOCK_SIZE);
      this.#reader.readPages(this.#lineage, fork, blk, 1, lsn, pgVersion, page, 0);
      return page;
    });
  }

  /** What is no page of a relation; undefined and throws as `read`. */
  files(lsn: Lsn): Promise<Files | undefined> {
    return this.#readWhole(({ pgVersion }) => {
      const getImage = (key: Key, at: Lsn): Buffer | undefined => this.#reader.read(this.#lineage, key, at, pgVersion);
      const scan = (range: KeyRange, at: Lsn): KeyImage[] => this.#reader.scan(this.#lineage, range, at, pgVersion);
      return filesAt({ pgVersion, getImage, scan }, lsn);
    });
  }

  async #readWhole<T>(read: (index: TimelineIndex) => T): Promise<T | undefined> {
    for (let attempt = 1; ; attempt++) {
      try {
        return read(this.#index ?? (await this.load()));
      } catch (error) {
        if (!(error instanceof LayerAbsentError)) throw error;
        if (attempt === ATTEMPTS) return undefined;
        await this.load();
      }
    }
  }

  close(): void {
    for (const file of this.#files) file.close();
    this.#files = [];
  }
}
