/**
 * What a pageserver does before it loads its timelines: it takes a generation, and makes sure that its disk is not older than the object store.
 *
 * When this directory was the last pageserver's (generation.ts), it is used as it is. Otherwise, as with an empty disk, for each timeline:
 *   - the newest index in the store of a generation up to ours replaces the local one; layers that are here with the same name, length and CRC32 stay,
 *     the others are fetched when they are read; WAL from that index's LSN on comes again from the safekeepers;
 *   - a tombstone removes the local folder;
 *   - a timeline that the store has never heard of stays: nobody else can have it. It is uploaded;
 *   - so does one of which this disk knows a newer index that was in the store: the store has lost it (Remote.restoreAll brings it there again).
 * A crash on the way leaves the old generation in the directory, and all of it is done again.
 *
 * When the disk turns out to have damaged the index of a timeline, that timeline is taken from the store as if nothing of it were here.
 */

import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { mkdir, open, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import type { Generations } from '../../api/generations.ts';
import { forEachLimited } from '../../base/all-done.ts';
import { StrataError } from '../../base/errors.ts';
import type { Logger } from '../../base/log.ts';
import type { ObjectStore } from '../../object-store/object-store.ts';
import { replaceFile, syncDirectory } from '../../base/durable-file.ts';
import { layerFileName } from '../layers/layer-format.ts';
import type { OnStep } from '../step.ts';
import { removeTimelineDirectory } from '../timeline-directory.ts';
import { decodeTimelineIndex, encodeTimelineIndex, TIMELINE_INDEX_NAME } from '../timeline-index.ts';
import { readGeneration, writeGeneration } from './generation.ts';
import { compareIndexes } from './object-names.ts';
import { keepRemoteIndex, KEPT_INDEX_NAME, readKeptIndex } from './kept-index.ts';
import { encodeRemoteIndex } from './remote-index.ts';
import type { RemoteIndex } from './remote-index.ts';
import { listIndexes, newestIndex, readIndex } from './timeline-objects.ts';

export interface FirstLookOptions {
  readonly dataDir: string;
  readonly store: ObjectStore;
  readonly generations: Generations;
  readonly log: Logger;
  readonly onStep?: OnStep;
}

export interface FirstLook {
  readonly generation: number;
  /** From this generation on all pageservers had this disk (generation.ts). */
  readonly since: number;
  /** Timelines whose newest index cannot be read, and why: they must not be served from an older one. */
  readonly broken: ReadonlyMap<string, string>;
}

const TIMELINE_CONCURRENCY = 32;
const CHUNK_BYTES = 1024 * 1024;
const ID = /^[0-9a-f]{32}$/;

export async function takeGeneration(options: FirstLookOptions): Promise<FirstLook> {
  const { dataDir, generations, onStep } = options;
  const last = readGeneration(dataDir);
  let generation = await generations.next(last?.generation ?? 0);
  onStep?.('generation taken');
  const broken = new Map<string, string>();
  const isOurs = last !== undefined && generation === last.generation + 1;
  if (!isOurs) generation = await followStore(options, generation, broken);
  const since = isOurs ? last.since : generation;
  writeGeneration(dataDir, { generation, since });
  onStep?.('generation written');
  return { generation, since, broken };
}

/** Resolves to the generation to be used: when the store knows later ones than the control plane does, one after those. */
async function followStore(options: FirstLookOptions, taken: number, broken: Map<string, string>): Promise<number> {
  const { dataDir, store, generations, log } = options;
  const startMs = performance.now();
  const timelinesDir = join(dataDir, 'timelines');
  await mkdir(timelinesDir, { recursive: true, mode: 0o700 });
  const remote = await listIndexes(store);
  let generation = taken;
  const seen = Math.max(0, ...[...remote.values()].map((indexes) => indexes.at(-1)!.generation));
  if (seen >= generation) {
    // The control plane's state is older than the store, as after it was restored from a copy.
    generation = await generations.next(seen);
    log.warn({ taken, seen, generation }, 'the object store knows later generations than the control plane did');
  }
  const newest = [...remote.values()].map((indexes) => newestIndex(indexes)!);
  await forEachLimited(newest, TIMELINE_CONCURRENCY, async (name) => {
    const directory = join(timelinesDir, name.timelineId);
    if (name.isDeleted) {
      if (existsSync(directory)) await removeTimelineDirectory(directory);
      options.onStep?.('local timeline removed');
      return;
    }
    const { timelineId } = name;
    const kept = readKeptIndex(directory);
    if (kept !== undefined && compareIndexes(kept, name) > 0 && existsSync(join(directory, TIMELINE_INDEX_NAME))) {
      log.error({ timelineId }, 'the object store has an older state than it had: the local disk’s is used');
      return;
    }
    let index: RemoteIndex;
    try {
      index = await readIndex(store, name);
    } catch (error) {
      if (!(error instanceof StrataError) || error.code !== 'internal') throw error;
      if (kept === undefined || compareIndexes(kept, name) !== 0) {
        broken.set(timelineId, error.message);
        return;
      }
      log.error(
        { timelineId, reason: error.message },
        'an index in the object store is damaged: this disk’s copy is used',
      );
      index = kept;
    }
    await adoptIndex(directory, index, options);
  });
  await syncDirectory(timelinesDir);
  const tookMs = Math.round(performance.now() - startMs);
  const localCount = readdirSync(timelinesDir).filter((id) => ID.test(id) && !remote.has(id)).length;
  log.info({ generation, remoteCount: newest.length, localCount, tookMs }, 'took the timelines of the object store');
  return generation;
}

/** To be called with the timelines whose index on this disk is damaged. Those that cannot be had from the store now stay as they are; why is logged. */
export async function takeDamagedFromStore(
  options: Omit<FirstLookOptions, 'generations'>,
  generation: number,
  timelineIds: readonly string[],
): Promise<void> {
  const { dataDir, store, log } = options;
  let remote: Awaited<ReturnType<typeof listIndexes>> | undefined;
  for (const timelineId of timelineIds) {
    const directory = join(dataDir, 'timelines', timelineId);
    try {
      remote ??= await listIndexes(store);
      const name = newestIndex(remote.get(timelineId) ?? [], generation);
      const kept = readKeptIndex(directory);
      const isKeptNewest = kept !== undefined && (name === undefined || compareIndexes(kept, name) >= 0);
      const index = isKeptNewest ? kept : name === undefined ? undefined : await readIndex(store, name);
      if (index === undefined) continue;
      await adoptIndex(directory, index, options);
      log.warn({ timelineId }, 'the index of a timeline is damaged here: what the object store has of it is used');
    } catch (error) {
      log.error(
        { timelineId, err: error },
        'the index of a timeline is damaged here, and cannot be had from the store',
      );
    }
  }
}

async function adoptIndex(
  directory: string,
  index: RemoteIndex,
  { log, onStep }: Pick<FirstLookOptions, 'log' | 'onStep'>,
): Promise<void> {
  const { timeline } = index;
  const indexPath = join(directory, TIMELINE_INDEX_NAME);
  await mkdir(directory, { recursive: true, mode: 0o700 });
  const local = readLocalIndex(indexPath);
  const { timelineId } = timeline;
  if (local !== undefined && local.diskConsistentLsn > timeline.diskConsistentLsn) {
    log.warn({ timelineId }, 'the local disk is not the last pageserver’s: the object store’s state is used');
  }
  for (const layer of index.layers) {
    const path = join(directory, layerFileName(layer.description));
    if (!existsSync(path)) continue;
    const { size } = await stat(path);
    if (size !== layer.description.sizeBytes || (await crc32OfFile(path)) !== layer.crc32) await rm(path);
  }
  onStep?.('other layers removed');
  const keptPath = join(directory, KEPT_INDEX_NAME);
  // An old one may not come back after a power cut: it names objects that others may have deleted since.
  if (existsSync(keptPath)) await replaceFile(keptPath, encodeRemoteIndex(index));
  else await keepRemoteIndex(directory, encodeRemoteIndex(index));
  await replaceFile(indexPath, encodeTimelineIndex(timeline));
  onStep?.('index taken');
}

function readLocalIndex(path: string): { readonly diskConsistentLsn: number } | undefined {
  try {
    return decodeTimelineIndex(readFileSync(path), path);
  } catch {
    return undefined; // Not there, or damaged: the store's is used.
  }
}

export async function crc32OfFile(path: string): Promise<number> {
  await using file = await open(path, 'r');
  const chunk = Buffer.allocUnsafe(CHUNK_BYTES);
  let checksum = 0;
  for (;;) {
    const { bytesRead } = await file.read(chunk, 0, chunk.length, null);
    if (bytesRead === 0) return checksum;
    checksum = crc32(chunk.subarray(0, bytesRead), checksum);
  }
}
