/** The calls of api/pageserver.ts, as the pageserver answers them. */

import { basename } from 'node:path';
import { setImmediate as yieldToOthers } from 'node:timers/promises';
import type {
  ChangesRequest,
  CreateTimelineRequest,
  ImportableCluster,
  ImportProgress,
  ImportTimelineRequest,
  ListedTimeline,
  LsnForTimestamp,
  LsnLease,
  LogIdentity,
  LostObject,
  ObjectStoreStatus,
  PageserverTimelineStatus,
  ResolvedLsn,
  TimelineSizes,
} from '../api/pageserver.ts';
import { encodeBasebackup } from '../api/basebackup.ts';
import { StrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import type { RpcContext, RpcMethod, RpcReply } from '../base/rpc.ts';
import { decodeControlFile } from '../postgres/control-file.ts';
import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { takeBasebackup } from './basebackup.ts';
import { changesPage } from './changes-page.ts';
import { commonPoint } from './changes.ts';
import { importDataDirectory } from './import.ts';
import { ImportError, inspectDataDirectory } from './import-check.ts';
import { WalIndexError } from './ingest/wal-index.ts';
import { lastCommitEnd, lsnForTimestamp, resolveLsn, timestampOfLsn } from './ingest/wal-search.ts';
import type { IndexedTimeline } from './ingest/wal-search.ts';
import { Indexed } from './indexed-timeline.ts';
import { CONTROL_FILE_KEY } from './key.ts';
import { LayerDamagedError } from './layers/block.ts';
import { timeGone } from './retention.ts';
import { StorageSizes } from './storage-sizes.ts';
import type { SafekeeperAddress } from '../api/safekeeper.ts';
import type { Remote } from './remote/remote.ts';
import { restoreTimeline } from './remote/restore.ts';
import type { Timeline } from './timeline.ts';
import type { Timelines } from './timelines.ts';
import type { WalReceiver } from './wal-receiver.ts';
import { readWhole } from './whole-reads.ts';

export interface MethodsOptions {
  readonly timelines: Timelines;
  readonly receiver: WalReceiver;
  /** The object store, where there is one. */
  readonly remote?: Remote;
  readonly log: Logger;
}

/** How long a branch may wait for its ancestor to reach the branch point. */
const ANCESTOR_WAIT_MS = 30_000;
const UNIX_TO_POSTGRES_EPOCH_US = 946_684_800_000_000;
const PAGES_MAX = 1024;
const SLICE_MS = 5;

interface TimelineParams {
  readonly timelineId: string;
}

interface LsnParams extends TimelineParams {
  readonly lsn: Lsn;
}

interface RunningImport {
  progress: ImportProgress;
  readonly cancelled: AbortController;
}

export function pageserverMethods(options: MethodsOptions): Record<string, RpcMethod> {
  const { timelines, receiver, log } = options;
  /** Reads; what is damaged or not here on the way is brought back first. */
  const repairing = <T>(read: () => T): Promise<T> => readWhole(read, timelines.repair);
  const imports = new Map<string, RunningImport>();
  const sizes = new StorageSizes();
  const indexed = (timeline: Timeline): IndexedTimeline => new Indexed(timeline);

  return {
    async createTimeline(request: CreateTimelineRequest, { signal }: RpcContext): Promise<RpcReply> {
      const { tenantId, timelineId, pgVersion, ancestorTimelineId, ancestorLsn } = request;
      const ancestor = timelines.get(ancestorTimelineId);
      if (pgVersion !== ancestor.pgVersion) {
        throw new StrataError('bad-request', `the ancestor is of Postgres ${ancestor.pgVersion}, not ${pgVersion}`);
      }
      await ancestor.waitLsn(ancestorLsn, ANCESTOR_WAIT_MS, signal);
      const { startLsn, endLsn } = await repairing(() => resolved(indexed(ancestor), ancestorLsn));
      if (endLsn !== ancestorLsn) {
        const where = `the last record before it ends at ${formatLsn(endLsn)}`;
        throw new StrataError('bad-request', `no record ends at ${formatLsn(ancestorLsn)}; ${where}`);
      }
      await timelines.create({ tenantId, timelineId, ancestorTimelineId, ancestorLsn, ancestorRecordLsn: startLsn });
      receiver.timelineAdded(timelineId);
      return { result: {} };
    },

    setSafekeepers({ safekeepers }: { safekeepers: readonly SafekeeperAddress[] }): RpcReply {
      receiver.setSafekeepers(safekeepers);
      return { result: {} };
    },

    /** What importTimeline would find; nothing is changed. */
    inspectImport({ dataDirectory }: { dataDirectory: string }): RpcReply {
      const { pgVersion, systemId, relationBytes, notes } = importable(() => inspectDataDirectory(dataDirectory));
      const result: ImportableCluster = { pgVersion, systemId: systemId.toString(), relationBytes, notes };
      return { result };
    },

    async importTimeline(request: ImportTimelineRequest, { signal }: RpcContext): Promise<RpcReply> {
      const { tenantId, timelineId, pgVersion, dataDirectory } = request;
      const existing = timelines.find(timelineId);
      if (existing !== undefined && existing.ancestor === undefined && existing.pgVersion === pgVersion) {
        await timelines.stored(existing);
        return { result: {} };
      }
      const startMs = performance.now();
      const cluster = importable(() => inspectDataDirectory(dataDirectory));
      if (cluster.pgVersion !== pgVersion) {
        throw new StrataError('bad-request', `${dataDirectory} is of Postgres ${cluster.pgVersion}, not ${pgVersion}`);
      }
      const { lsn, recordStartLsn, relationBytes: totalBytes } = cluster;
      const cancelled = new AbortController();
      const running: RunningImport = { cancelled, progress: { doneBytes: 0, totalBytes } };
      imports.set(timelineId, running);
      try {
        await timelines.import(
          { tenantId, timelineId, pgVersion: cluster.pgVersion, lsn, recordLsn: recordStartLsn },
          async (target) => {
            await importDataDirectory(dataDirectory, target, {
              onProgress: (doneBytes) => void (running.progress = { doneBytes, totalBytes }),
              signal: AbortSignal.any([signal, cancelled.signal]),
            });
          },
        );
      } catch (error) {
        throw asCoded(error);
      } finally {
        imports.delete(timelineId);
      }
      receiver.timelineAdded(timelineId);
      log.info({ timelineId, pgVersion, tookMs: Math.round(performance.now() - startMs) }, 'cluster is imported');
      return { result: {} };
    },

    /** How far an import is that runs; null when none does. */
    importProgress({ timelineId }: TimelineParams): RpcReply {
      return { result: imports.get(timelineId)?.progress ?? null };
    },

    /** Has an import that runs fail, with nothing left. */
    cancelImport({ timelineId }: TimelineParams): RpcReply {
      imports.get(timelineId)?.cancelled.abort(new StrataError('unavailable', 'the import was cancelled'));
      return { result: {} };
    },

    async deleteTimeline({ timelineId, tenantId }: TimelineParams & { tenantId: string }): Promise<RpcReply> {
      await timelines.delete(timelineId, tenantId);
      receiver.timelineRemoved(timelineId);
      return { result: {} };
    },

    timelineStatus({ timelineId }: TimelineParams): RpcReply {
      return { result: statusOf(timelines.get(timelineId), receiver) };
    },

    async timelineIdentity({ timelineId }: TimelineParams, { signal }: RpcContext): Promise<RpcReply> {
      const timeline = timelines.get(timelineId);
      const { tenantId, pgVersion } = timeline;
      const { startLsn } = timeline.index;
      await timeline.waitLsn(startLsn, ANCESTOR_WAIT_MS, signal);
      const controlFile = await repairing(() => timeline.getImage(CONTROL_FILE_KEY, timeline.lastRecordLsn));
      if (controlFile === undefined) throw new StrataError('internal', `timeline ${timelineId} has no control file`);
      const systemId = decodeControlFile(controlFile).systemId.toString();
      const hasWal = timeline.lastRecordLsn > startLsn;
      const result: LogIdentity = { tenantId, timelineId, startLsn, pgVersion, systemId, hasWal };
      return { result };
    },

    listTimelines(): RpcReply {
      const result: ListedTimeline[] = [];
      for (const timeline of timelines.all()) result.push({ kind: 'loaded', ...statusOf(timeline, receiver) });
      for (const [timelineId, reason] of timelines.broken) result.push({ kind: 'broken', timelineId, reason });
      return { result };
    },

    async waitLsn(params: LsnParams & { timeoutMs: number }, { signal }: RpcContext): Promise<RpcReply> {
      await timelines.get(params.timelineId).waitLsn(params.lsn, params.timeoutMs, signal);
      return { result: {} };
    },

    async resolveLsn({ timelineId, lsn }: LsnParams): Promise<RpcReply> {
      const timeline = timelines.get(timelineId);
      const { startLsn, endLsn } = await repairing(() => resolved(indexed(timeline), lsn));
      timeline.assertReadable(endLsn);
      const result: ResolvedLsn = { lsn: endLsn, prevRecordLsn: startLsn };
      return { result };
    },

    async lsnForTimestamp({ timelineId, timestampUs }: TimelineParams & { timestampUs: number }): Promise<RpcReply> {
      const timeline = timelines.get(timelineId);
      const result: LsnForTimestamp = await repairing(() =>
        lsnForTimestamp(indexed(timeline), timestampUs - UNIX_TO_POSTGRES_EPOCH_US),
      );
      if (result.lsn < timeline.oldestLsn || (result.kind === 'past' && timeline.oldestHorizon !== undefined)) {
        throw timeGone(timelineId, timestampUs / 1000, timeline.oldestLsn, timeline.oldestHorizon);
      }
      return { result };
    },

    async timestampOfLsn({ timelineId, lsn }: LsnParams): Promise<RpcReply> {
      const timeline = timelines.get(timelineId);
      timeline.assertReadable(lsn);
      const timeUs = await repairing(() => timestampOfLsn(indexed(timeline), lsn));
      return { result: timeUs === undefined ? {} : { timestampUs: timeUs + UNIX_TO_POSTGRES_EPOCH_US } };
    },

    async lastCommitLsn({ timelineId, lsn }: LsnParams): Promise<RpcReply> {
      const timeline = timelines.get(timelineId);
      timeline.assertReadable(lsn);
      return { result: { lsn: await repairing(() => lastCommitEnd(indexed(timeline), lsn)) } };
    },

    async basebackup(
      params: TimelineParams & { lsn?: Lsn; timeoutMs: number },
      { signal }: RpcContext,
    ): Promise<RpcReply> {
      const timeline = timelines.get(params.timelineId);
      const lsn = params.lsn ?? timeline.lastRecordLsn;
      await timeline.waitLsn(lsn, params.timeoutMs, signal);
      const startMs = performance.now();
      const { header, attachment } = encodeBasebackup(await repairing(() => takeBasebackup(indexed(timeline), lsn)));
      const tookMs = Math.round(performance.now() - startMs);
      log.debug({ timelineId: params.timelineId, bytes: attachment.length, tookMs }, 'basebackup');
      return { result: header, attachment };
    },

    async getPages(
      params: LsnParams & { spc: number; db: number; rel: number; fork: number; blk: number; count: number },
      { signal }: RpcContext,
    ): Promise<RpcReply> {
      const { timelineId, lsn, blk, count } = params;
      if (!(count > 0 && count <= PAGES_MAX))
        throw new StrataError('bad-request', `${count} pages cannot be read at once`);
      const timeline = timelines.get(timelineId);
      await timeline.waitLsn(lsn, ANCESTOR_WAIT_MS, signal);
      return { result: {}, attachment: await repairing(() => timeline.getPages(params, blk, count, lsn)) };
    },

    /** Holds an LSN for `holder`, so that garbage collection leaves all that can be read there. */
    leaseLsn({ timelineId, lsn, holder }: LsnParams & { holder: string }): RpcReply {
      const timeline = timelines.get(timelineId);
      timeline.assertReadable(lsn);
      timelines.leases.take(timeline.ownerOf(lsn).timelineId, holder, lsn);
      const result: LsnLease = { durationMs: timelines.leases.durationMs };
      return { result };
    },

    releaseLsn({ timelineId, holder }: TimelineParams & { holder: string }): RpcReply {
      const timeline = timelines.find(timelineId);
      if (timeline === undefined) return { result: {} };
      for (const each of [timeline, ...timeline.ancestors()]) timelines.leases.release(each.timelineId, holder);
      return { result: {} };
    },

    setRetention({ tenantId, retentionMs }: { tenantId: string; retentionMs: number }): RpcReply {
      timelines.retention.set(tenantId, retentionMs);
      return { result: {} };
    },

    async collectGarbage({ tenantId }: { tenantId: string }): Promise<RpcReply> {
      const { garbage } = timelines;
      if (!garbage.isAllowed) {
        const seconds = Math.ceil(garbage.allowedInMs / 1000);
        throw new StrataError(
          'unavailable',
          `nothing is collected until whoever reads has had the time to say so again after the start: try again in ${seconds} seconds`,
        );
      }
      const own = [...timelines.all()].filter((timeline) => timeline.tenantId === tenantId);
      // What is in memory only has no layers to collect.
      for (const timeline of own) await timeline.flush();
      await garbage.run(own, true);
      return { result: {} };
    },

    async changes(request: ChangesRequest, { signal }: RpcContext): Promise<RpcReply> {
      const timeline = timelines.get(request.timelineId);
      await timeline.waitLsn(request.toLsn, ANCESTOR_WAIT_MS, signal);
      const result = await repairing(() => changesPage(timeline, request, timelines.leases));
      return { result };
    },

    async commonLsn(
      params: LsnParams & { otherTimelineId: string; otherLsn: Lsn },
      { signal }: RpcContext,
    ): Promise<RpcReply> {
      const { timelineId, lsn, otherTimelineId, otherLsn } = params;
      const timeline = timelines.get(timelineId);
      const other = timelines.get(otherTimelineId);
      await Promise.all([
        timeline.waitLsn(lsn, ANCESTOR_WAIT_MS, signal),
        other.waitLsn(otherLsn, ANCESTOR_WAIT_MS, signal),
      ]);
      const common = commonPoint(timeline, lsn, other, otherLsn);
      if (common === undefined) {
        throw new StrataError(
          'bad-request',
          `timelines ${timelineId} and ${otherTimelineId} have no ancestor in common`,
        );
      }
      return { result: { lsn: common.lsn } };
    },

    async storageSizes({ timelineIds }: { timelineIds: readonly string[] }, { signal }: RpcContext): Promise<RpcReply> {
      const result: TimelineSizes[] = [];
      let sliceStartMs = performance.now();
      for (const timelineId of timelineIds) {
        if (performance.now() - sliceStartMs > SLICE_MS) {
          await yieldToOthers();
          sliceStartMs = performance.now();
        }
        if (signal.aborted) break;
        const timeline = timelines.find(timelineId);
        if (timeline === undefined) continue;
        try {
          result.push(await repairing(() => sizes.of(timeline, timelines.childCount(timelineId))));
        } catch (error) {
          if (!timeline.isStopped) throw error; // Deleted meanwhile.
        }
      }
      return { result };
    },

    objectStoreStatus(): RpcReply {
      const { remote } = options;
      const result: ObjectStoreStatus | undefined = remote?.status;
      return { result: result ?? null };
    },

    async repairLayer({
      timelineId,
      file,
      offset,
    }: TimelineParams & { file: string; offset: number }): Promise<RpcReply> {
      const layers = [...timelines.get(timelineId).layerMap.all()];
      const layer = layers.find(({ path }) => basename(path) === basename(file));
      if (layer === undefined) return { result: {} }; // It was replaced meanwhile.
      await timelines.repair(new LayerDamagedError(layer.path, offset, 'it was found by scrub'));
      return { result: {} };
    },

    async restoreObjects({ timelineId, names }: TimelineParams & { names: readonly string[] }): Promise<RpcReply> {
      const { remote } = options;
      const timeline = timelines.get(timelineId);
      if (remote === undefined) return { result: [] };
      const restoring = { remote, repair: timelines.repair, log };
      const result: LostObject[] = await restoreTimeline(restoring, timeline, new Set(names));
      await timelines.stored(timeline);
      return { result };
    },

    async flush({ timelineId }: TimelineParams): Promise<RpcReply> {
      await timelines.get(timelineId).flush();
      return { result: {} };
    },
  };
}

function importable<T>(inspect: () => T): T {
  try {
    return inspect();
  } catch (error) {
    throw asCoded(error);
  }
}

function asCoded(error: unknown): unknown {
  return error instanceof ImportError ? new StrataError('bad-request', error.message, { cause: error }) : error;
}

function resolved(timeline: IndexedTimeline, lsn: Lsn): { startLsn: Lsn; endLsn: Lsn } {
  try {
    return resolveLsn(timeline, lsn);
  } catch (error) {
    if (error instanceof WalIndexError) throw new StrataError('history-gone', error.message, { cause: error });
    throw error;
  }
}

function statusOf(timeline: Timeline, receiver: WalReceiver): PageserverTimelineStatus {
  const { index, ingestError, flushError } = timeline;
  const commitLsn = receiver.commitLsn(timeline.timelineId);
  return {
    tenantId: timeline.tenantId,
    timelineId: timeline.timelineId,
    pgVersion: timeline.pgVersion,
    ...(index.ancestor === undefined
      ? {}
      : { ancestorTimelineId: index.ancestor.timelineId, ancestorLsn: index.ancestor.lsn }),
    startLsn: index.startLsn,
    oldestLsn: timeline.oldestLsn,
    ...(timeline.oldestHorizon === undefined ? {} : { oldestTimeMs: timeline.oldestHorizon.timeMs }),
    lastRecordLsn: timeline.lastRecordLsn,
    lastRecordStartLsn: timeline.lastRecordStartLsn,
    diskConsistentLsn: timeline.diskConsistentLsn,
    remoteConsistentLsn: timeline.remoteConsistentLsn,
    ...(commitLsn === undefined ? {} : { commitLsn }),
    layerCount: index.layers.length,
    layerBytes: index.layers.reduce((sum, layer) => sum + layer.sizeBytes, 0),
    memoryBytes: timeline.memoryBytes,
    ...(ingestError === undefined ? {} : { ingestError: ingestError.message }),
    ...(flushError === undefined ? {} : { flushError: flushError.message }),
  };
}
