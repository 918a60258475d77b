/**
 * Repair of layers that are damaged or not here. The object store is asked first. What it does not have whole is made anew: what a delta layer held, from the WAL
 * of its LSN range, where the safekeepers still have it.
 *
 * For that a shadow of the timeline is made that branches off just below the run that the layer belongs to, and takes the same WAL again; its
 * layers then stand in for the whole run. So what is made is exactly what ingest made the first time, and a damaged index or file that is
 * missing altogether is repaired as a damaged block is. Image layers come from imports: no WAL has what is in them. Nor can it be done where history
 * below the run is no longer whole.
 *
 * A crash leaves the shadow's folder, `<timeline id>.repair`, or layers that no index names: both are removed at start.
 */

import { rename, rm } from 'node:fs/promises';
import { basename, dirname } from 'node:path';
import { StrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import { deltaRuns } from './compaction-plan.ts';
import type { LayerRun } from './compaction-plan.ts';
import { Ingest } from './ingest/ingest.ts';
import { LayerAbsentError, LayerDamagedError } from './layers/block.ts';
import { syncDirectory } from '../base/durable-file.ts';
import { layerPath } from './layers/layer-format.ts';
import type { LayerDescription } from './layers/layer-format.ts';
import { isObjectError } from '../object-store/object-store.ts';
import { fetchWanted, fetchWhole } from './remote/layer-fetch.ts';
import type { Remote } from './remote/remote.ts';
import type { OnStep } from './step.ts';
import type { Timeline } from './timeline.ts';
import type { Timelines } from './timelines.ts';

export interface RepairsOptions {
  readonly timelines: Timelines;
  /** The object store, where there is one. */
  readonly remote?: Remote;
  /** The timeline's WAL from an LSN on, from whoever has it; it may go on for ever. */
  readonly walOf: (timeline: Timeline, fromLsn: Lsn, signal: AbortSignal) => AsyncIterable<WalPiece>;
  /** From this size on, reads fetch pieces of layers. */
  readonly piecesFromBytes?: number;
  readonly log: Logger;
  readonly onStep?: OnStep;
}

export interface WalPiece {
  readonly lsn: Lsn;
  readonly bytes: Buffer;
}

const REPAIR_TIMEOUT_MS = 30 * 60_000;
/** A layer that could not be repaired is not tried again so soon. */
const FAILURE_KEPT_MS = 60_000;
/** When the object store did not answer. */
const FETCH_FAILURE_KEPT_MS = 1_000;

export class Repairs {
  readonly #options: RepairsOptions;
  /** By file: under way, or failed a short time ago. */
  readonly #repairs = new Map<string, Promise<void>>();

  constructor(options: RepairsOptions) {
    this.#options = options;
  }

  /** Resolves when the layer is replaced; rejects, with why, when it cannot be. */
  repair(damage: LayerDamagedError): Promise<void> {
    const { file } = damage;
    let repair = this.#repairs.get(file);
    if (repair === undefined) {
      repair = this.#repair(damage);
      this.#repairs.set(file, repair);
      repair.then(
        () => this.#repairs.delete(file),
        (error: unknown) => {
          const keptMs = isObjectError(error, 'transient') ? FETCH_FAILURE_KEPT_MS : FAILURE_KEPT_MS;
          setTimeout(() => this.#repairs.delete(file), keptMs).unref();
        },
      );
    }
    return repair;
  }

  /** As `repair`, from the object store alone, and always the whole layer. */
  async fetch(damage: LayerDamagedError): Promise<void> {
    const timeline = this.#options.timelines.get(basename(dirname(damage.file)));
    if (!(await this.#fetch(timeline, damage, fetchWhole))) throw damage;
  }

  /** Whether the store had it. Rejects when the layer is not here and the store does not answer: it will have it. */
  async #fetch(timeline: Timeline, damage: LayerDamagedError, how: typeof fetchWanted): Promise<boolean> {
    const layer = timeline.findLayer(damage.file);
    if (layer === undefined) return true; // It was replaced meanwhile.
    const { remote, log } = this.#options;
    const { timelineId } = timeline;
    const isAbsent = damage instanceof LayerAbsentError;
    try {
      if (remote === undefined || !(await how(remote, timeline, layer, damage, this.#options.piecesFromBytes)))
        return false;
    } catch (error) {
      if (isAbsent && isObjectError(error, 'transient')) throw error;
      log.error({ timelineId, file: damage.file, err: error }, 'the layer cannot be had from the object store');
      return false;
    }
    if (!isAbsent) log.info({ timelineId, file: damage.file }, 'the layer was fetched from the object store');
    return true;
  }

  async #repair(damage: LayerDamagedError): Promise<void> {
    const { timelines, log } = this.#options;
    const { file } = damage;
    const timeline = timelines.get(basename(dirname(file)));
    const { timelineId } = timeline;
    const isAbsent = damage instanceof LayerAbsentError;
    if (!isAbsent) log.error({ timelineId, file, offset: damage.offset, reason: damage.message }, 'a layer is damaged');
    if (await this.#fetch(timeline, damage, fetchWanted)) return;
    if (isAbsent) log.error({ timelineId, file }, 'a layer is neither here nor in the object store');
    try {
      const stopped = AbortSignal.timeout(REPAIR_TIMEOUT_MS);
      await timelines.compaction.exclusively(async () => {
        const giveUp = new AbortController();
        const signal = AbortSignal.any([stopped, giveUp.signal]);
        await timeline.inBackground(
          () => this.#rebuildWithOlder(file, signal),
          () => giveUp.abort(),
        );
      });
      log.info({ timelineId, file }, 'the layer was made anew from WAL');
    } catch (error) {
      log.error({ timelineId, file, err: error }, 'the layer cannot be repaired');
      if (!isAbsent) throw error;
      const reason = error instanceof Error ? error.message : String(error);
      const message = `${damage.message}, nor in the object store; it cannot be made anew: ${reason}`;
      throw new StrataError('internal', message, { cause: error });
    }
  }

  /** To take WAL again, older layers are read: those that turn out to be damaged too, or not here, come first. */
  async #rebuildWithOlder(file: string, signal: AbortSignal): Promise<void> {
    const files = [file];
    const fetched = new Set(files);
    const fetchOnce: FetchOnce = async (damage) => {
      if (fetched.has(damage.file)) return false;
      fetched.add(damage.file);
      const timeline = this.#options.timelines.get(basename(dirname(damage.file)));
      return this.#fetch(timeline, damage, fetchWhole);
    };
    for (let last = files.at(-1); last !== undefined; last = files.at(-1)) {
      try {
        await this.#rebuild(last, fetchOnce, signal);
        files.pop();
      } catch (error) {
        if (!(error instanceof LayerDamagedError)) throw error;
        if (await fetchOnce(error)) continue;
        if (files.includes(error.file)) throw error;
        files.push(error.file);
      }
    }
  }

  async #rebuild(file: string, fetchOnce: FetchOnce, signal: AbortSignal): Promise<void> {
    const timeline = this.#options.timelines.get(basename(dirname(file)));
    const damaged = timeline.index.layers.find((layer) => layerPath(timeline.directory, layer) === file);
    if (damaged === undefined) return; // replaced meanwhile
    const run = deltaRuns(timeline.index.layers).find((each) => each.layers.includes(damaged));
    if (run === undefined) throw new StrataError('internal', `${file} is an image layer: no WAL has what was in it`);
    const fromLsn = run.lsnStart - 1;
    timeline.assertReadable(fromLsn);
    const { timelines, onStep } = this.#options;
    const shadow = await timelines.makeShadow(timeline, fromLsn);
    try {
      onStep?.('shadow made');
      await this.#ingest(timeline, shadow, run.lsnEnd - 1, fetchOnce, signal);
      await shadow.flush();
      onStep?.('shadow flushed');
      const made = await takeOver(shadow, timeline, run, onStep);
      onStep?.('layers taken over');
      await timeline.replaceLayers(run.layers, made);
    } finally {
      await shadow.close();
      await rm(shadow.directory, { recursive: true, force: true });
      onStep?.('shadow removed');
    }
  }

  /** Has the shadow take the timeline's WAL up to `endLsn`, the end of a record. */
  async #ingest(
    timeline: Timeline,
    shadow: Timeline,
    endLsn: Lsn,
    fetchOnce: FetchOnce,
    signal: AbortSignal,
  ): Promise<void> {
    const repair = async (damage: LayerDamagedError): Promise<void> => {
      if (!(await fetchOnce(damage))) throw damage;
    };
    const reader = new WalReader(shadow.lastRecordLsn, timeline.pgVersion);
    const ingest = new Ingest(shadow);
    for await (const { lsn, bytes } of this.#options.walOf(timeline, shadow.lastRecordLsn, signal)) {
      reader.push(lsn, bytes);
      while (shadow.lastRecordLsn < endLsn) {
        const record = reader.next();
        if (record === undefined) break;
        await ingest.prepare(record, { signal, repair });
        ingest.ingest(record);
        shadow.freezeIfFull();
      }
      if (shadow.lastRecordLsn >= endLsn) break;
      await shadow.writable();
    }
    if (shadow.lastRecordLsn === endLsn) return;
    const where = `WAL was found up to ${formatLsn(shadow.lastRecordLsn)}, needed is up to ${formatLsn(endLsn)}`;
    throw new StrataError('unavailable', `the layer cannot be made anew: ${where}`);
  }
}

/** Whether the object store had the layer, which is here then. */
type FetchOnce = (damage: LayerDamagedError) => Promise<boolean>;

/** Moves the shadow's layers to the timeline's folder, durably, under names that are new there. */
async function takeOver(
  shadow: Timeline,
  timeline: Timeline,
  run: LayerRun,
  onStep: OnStep | undefined,
): Promise<LayerDescription[]> {
  const revision = 1 + Math.max(...run.layers.map((layer) => layer.revision ?? 0));
  const made: LayerDescription[] = [];
  for (const layer of shadow.index.layers) {
    const description = { ...layer, revision };
    await rename(layerPath(shadow.directory, layer), layerPath(timeline.directory, description));
    made.push(description);
    onStep?.('layer taken over');
  }
  await syncDirectory(timeline.directory);
  return made;
}
