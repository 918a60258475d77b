/**
 * The pageserver as other services see it: a typed client of its calls (base/rpc.ts). Pages for computes go over another port, by the
 * protocol of pages.ts.
 *
 * Every call may reject with `unavailable` or `timeout`; `not-found` where the timeline does not exist. All of them may be repeated.
 */
import { RpcClient } from '../base/rpc.ts';
import type { Lsn } from '../postgres/lsn.ts';
import type { RelationForkKey } from '../postgres/relation.ts';
import { type Basebackup, type BasebackupHeader, decodeBasebackup } from './basebackup.ts';
import type { SafekeeperAddress, TimelineIdentity } from './safekeeper.ts';

export interface CreateTimelineRequest {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly pgVersion: number;
  readonly ancestorTimelineId: string;
  /** The end of a record of the ancestor; it need not be ingested yet. */
  readonly ancestorLsn: Lsn;
}

export interface ImportTimelineRequest {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly pgVersion: number;
  /** A cleanly stopped cluster, which the pageserver can read. */
  readonly dataDirectory: string;
}

/** A data directory that can be imported. */
export interface ImportableCluster {
  readonly pgVersion: number;
  readonly systemId: string;
  readonly relationBytes: number;
  /** What will not be as it was, for people. */
  readonly notes: readonly string[];
}

export interface ImportProgress {
  readonly doneBytes: number;
  readonly totalBytes: number;
}

export interface PageserverTimelineStatus {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly pgVersion: number;
  readonly ancestorTimelineId?: string;
  readonly ancestorLsn?: Lsn;
  /** Where the timeline's own WAL begins. */
  readonly startLsn: Lsn;
  /** The oldest LSN that can be read, in the timeline or what it inherits. */
  readonly oldestLsn: Lsn;
  /** The time whose state that is, when older history is gone; milliseconds since 1970. */
  readonly oldestTimeMs?: number;
  /** What is ingested. */
  readonly lastRecordLsn: Lsn;
  /** Where the last ingested record starts. */
  readonly lastRecordStartLsn: Lsn;
  /** What is in layers, and need not be pulled from the safekeepers again. */
  readonly diskConsistentLsn: Lsn;
  /** What is in the object store for good: no pageserver will need this timeline's WAL below it again. startLsn while nothing is known to be there. */
  readonly remoteConsistentLsn: Lsn;
  /** The highest commit LSN that a safekeeper has told of; absent when none did. */
  readonly commitLsn?: Lsn;
  readonly layerCount: number;
  readonly layerBytes: number;
  readonly memoryBytes: number;
  /** Why ingest of this timeline has stopped; it stays so until the pageserver is started anew. */
  readonly ingestError?: string;
  /** Why the last flush failed; it is tried again. */
  readonly flushError?: string;
}

/** A timeline as a list has it. */
export type ListedTimeline =
  | ({ readonly kind: 'loaded' } & PageserverTimelineStatus)
  | { readonly kind: 'broken'; readonly timelineId: string; readonly reason: string };

export interface ResolvedLsn {
  /** The end of the last record that ends at or before the LSN that was asked for. */
  readonly lsn: Lsn;
  /** Where that record starts: xl_prev of the record that comes next. */
  readonly prevRecordLsn: Lsn;
}

export interface LsnForTimestamp {
  /**
   * present: `lsn` is just before the first later commit, here or in an ancestor. future: no commit is later, `lsn` is the last record's end. past:
   * every commit that is known is later, `lsn` is where history begins. nodata: no commit is known, `lsn` is the last record's end.
   */
  readonly kind: 'present' | 'future' | 'past' | 'nodata';
  readonly lsn: Lsn;
}

export interface LsnLease {
  /** For how long it lasts if it is not renewed, in milliseconds. */
  readonly durationMs: number;
}

export interface TimelineSizes {
  readonly timelineId: string;
  /** Of all relations, as Postgres would count them. */
  readonly logicalBytes: number;
  /** Layers of the timeline itself. */
  readonly historyBytes: number;
  /** Not yet in layers. */
  readonly memoryBytes: number;
  /** Of logicalBytes, what is the ancestor's and was not changed. */
  readonly sharedBytes: number;
  readonly freedByDeletionBytes: number;
  readonly childCount: number;
  /** From here on everything can be read. */
  readonly oldestLsn: Lsn;
  /** The time whose state oldestLsn is, in milliseconds since 1970; absent while nothing was collected. */
  readonly oldestTimeMs?: number;
  /** How many points below oldestLsn or above are held by children and leases. */
  readonly retainedLsns: number;
}

/** How uploads to the object store are doing. */
/** An object that nothing can bring back, and why. */
export interface LostObject {
  readonly name: string;
  readonly reason: string;
}

export interface ObjectStoreStatus {
  /** Where it is, without secrets. */
  readonly store: string;
  readonly generation: number;
  /** Indexes in the store of generations before it may be another pageserver's, and not what this one goes by. */
  readonly since: number;
  /** A later pageserver has taken over: this one writes nothing any more. */
  readonly isStale: boolean;
  /** Timelines whose latest state is not in the store yet. */
  readonly pendingTimelines: number;
  /** Of their layers that are not there. */
  readonly pendingBytes: number;
  readonly pendingDeletions: number;
  /** Why the last attempt failed, while none has succeeded since. */
  readonly failure?: string;
  /** Milliseconds since 1970. */
  readonly failingSinceMs?: number;
}

/** A window of a timeline's history: what came after `fromLsn`, up to `toLsn`. */
export interface ChangesRequest {
  readonly timelineId: string;
  readonly fromLsn: Lsn;
  readonly toLsn: Lsn;
  /** Where the page before ended. */
  readonly after?: BlockPosition;
  /** With the ranges of blocks, and not only how many there are. */
  readonly withRanges: boolean;
}

export interface BlockPosition {
  readonly fork: RelationForkKey;
  /** Absent: after the whole fork. */
  readonly blk?: number;
}

/** What changed of a fork, or a part of that: a fork may go on in the next page. */
export interface ChangedFork {
  readonly fork: RelationForkKey;
  /** Written in the window, and there at its end. */
  readonly blockCount: number;
  /** Of those blocks: `[start, end)`, rising. */
  readonly ranges?: readonly (readonly [start: number, end: number])[];
  /** In blocks, absent where the fork does not exist; no sizes: it did not change. */
  readonly size?: { readonly before?: number; readonly after?: number };
}

export interface ChangesPage {
  /** By tablespace, database, relation, fork. */
  readonly forks: readonly ChangedFork[];
  /** Absent on the last page. */
  readonly next?: BlockPosition;
  /** Blocks of the layers' indexes that were read. */
  readonly keyBlocksRead: number;
  /** On the last page: pages of transaction status and the like that changed. */
  readonly slruPageCount?: number;
}

export interface PageserverClientOptions {
  readonly host: string;
  readonly port: number;
  /** Scope `platform`. */
  readonly token: string;
}

const WAIT_MARGIN_MS = 5_000;
const DEFAULT_TIMEOUT_MS = 60_000;
/** A person waits. */
const STATUS_TIMEOUT_MS = 5_000;
const IMPORT_TIMEOUT_MS = 7 * 24 * 60 * 60_000;
const COLLECT_TIMEOUT_MS = 60 * 60_000;
const FLUSH_TIMEOUT_MS = 10 * 60_000;
const CHANGES_TIMEOUT_MS = 10 * 60_000;
const REPAIR_TIMEOUT_MS = 35 * 60_000;

/** What a log of a timeline begins with. */
export interface LogIdentity extends TimelineIdentity {
  /** Some of it has come to the pageserver: it is no log that was never used. */
  readonly hasWal: boolean;
}

export class PageserverClient {
  readonly #rpc: RpcClient;

  constructor(options: PageserverClientOptions) {
    this.#rpc = new RpcClient({ ...options, service: 'pageserver' });
  }

  /** Durable when it resolves. The same timeline again is success; `conflict` with another tenant, ancestor or LSN. */
  async createTimeline(request: CreateTimelineRequest): Promise<void> {
    await this.#rpc.call('createTimeline', request);
  }

  /** `bad-request`, with the reason and the next step, for a directory that cannot be imported. */
  async inspectImport(dataDirectory: string): Promise<ImportableCluster> {
    return (await this.#rpc.call('inspectImport', { dataDirectory })).result as ImportableCluster;
  }

  /** How far importTimeline is; undefined when it does not run. */
  async importProgress(timelineId: string): Promise<ImportProgress | undefined> {
    return ((await this.#rpc.call('importProgress', { timelineId })).result as ImportProgress | null) ?? undefined;
  }

  /** Has importTimeline fail, with nothing left, when it runs. */
  async cancelImport(timelineId: string): Promise<void> {
    await this.#rpc.call('cancelImport', { timelineId });
  }

  /**
   * Durable when it resolves. A timeline that was imported before under this id is success. Ends, with nothing left, when the connection is
   * lost.
   */
  async importTimeline(request: ImportTimelineRequest): Promise<void> {
    await this.#rpc.call('importTimeline', request, { timeoutMs: IMPORT_TIMEOUT_MS });
  }

  /** Durable when it resolves. What does not exist is success; `conflict` when it has children. */
  async deleteTimeline(tenantId: string, timelineId: string): Promise<void> {
    await this.#rpc.call('deleteTimeline', { tenantId, timelineId });
  }

  async timelineStatus(timelineId: string): Promise<PageserverTimelineStatus> {
    return (await this.#rpc.call('timelineStatus', { timelineId })).result as PageserverTimelineStatus;
  }

  /** What a log of this timeline begins with. */
  async timelineIdentity(timelineId: string, signal?: AbortSignal): Promise<LogIdentity> {
    const options = signal === undefined ? {} : { signal };
    return (await this.#rpc.call('timelineIdentity', { timelineId }, options)).result as LogIdentity;
  }

  /** The safekeepers have changed. */
  async setSafekeepers(safekeepers: readonly SafekeeperAddress[]): Promise<void> {
    await this.#rpc.call('setSafekeepers', { safekeepers });
  }

  async listTimelines(): Promise<readonly ListedTimeline[]> {
    return (await this.#rpc.call('listTimelines', {})).result as ListedTimeline[];
  }

  /** Resolves when `lsn` is ingested; rejects with `timeout`, or `unavailable` when ingest of the timeline has stopped. */
  async waitLsn(timelineId: string, lsn: Lsn, timeoutMs: number): Promise<void> {
    await this.#rpc.call('waitLsn', { timelineId, lsn, timeoutMs }, { timeoutMs: timeoutMs + WAIT_MARGIN_MS });
  }

  /** Over what is ingested. `history-gone` when the LSN is before all history. */
  async resolveLsn(timelineId: string, lsn: Lsn): Promise<ResolvedLsn> {
    return (await this.#rpc.call('resolveLsn', { timelineId, lsn })).result as ResolvedLsn;
  }

  /** Over what is ingested. `timestampUs` is microseconds since 1970. `history-gone` when that state is no longer kept. */
  async lsnForTimestamp(timelineId: string, timestampUs: number): Promise<LsnForTimestamp> {
    return (await this.#rpc.call('lsnForTimestamp', { timelineId, timestampUs })).result as LsnForTimestamp;
  }

  /** When the latest commit of the state at `lsn` was made, in microseconds since 1970; undefined when none is known. */
  async timestampOfLsn(timelineId: string, lsn: Lsn): Promise<number | undefined> {
    const { result } = await this.#rpc.call('timestampOfLsn', { timelineId, lsn });
    return (result as { timestampUs?: number }).timestampUs;
  }

  /** The end of the last commit in the state at `lsn`; `lsn` itself when there is none near. */
  async lastCommitLsn(timelineId: string, lsn: Lsn): Promise<Lsn> {
    return ((await this.#rpc.call('lastCommitLsn', { timelineId, lsn })).result as { lsn: Lsn }).lsn;
  }

  /** What a compute starts from at `lsn`, the end of a record, for whose ingest it waits; undefined: at the last record that is ingested. */
  async basebackup(
    timelineId: string,
    lsn: Lsn | undefined,
    timeoutMs = DEFAULT_TIMEOUT_MS,
    signal?: AbortSignal,
  ): Promise<Basebackup> {
    const options = { timeoutMs: timeoutMs + WAIT_MARGIN_MS, ...(signal === undefined ? {} : { signal }) };
    const { result, attachment } = await this.#rpc.call('basebackup', { timelineId, lsn, timeoutMs }, options);
    return decodeBasebackup(result as BasebackupHeader, attachment ?? Buffer.alloc(0));
  }

  /** For people and tests: `count` pages as they were at `lsn`. */
  async getPages(timelineId: string, fork: RelationForkKey, blk: number, count: number, lsn: Lsn): Promise<Buffer> {
    const { spc, db, rel, fork: number } = fork;
    const params = { timelineId, spc, db, rel, fork: number, blk, count, lsn };
    const { attachment } = await this.#rpc.call('getPages', params);
    return attachment ?? Buffer.alloc(0);
  }

  /**
   * Holds `lsn` for `holder` (in the place of what it held before), so that all that can be read there stays. To be renewed well before it
   * expires. `history-gone` when it cannot be read any more.
   */
  async leaseLsn(timelineId: string, lsn: Lsn, holder: string, signal?: AbortSignal): Promise<LsnLease> {
    const options = signal === undefined ? {} : { signal };
    return (await this.#rpc.call('leaseLsn', { timelineId, lsn, holder }, options)).result as LsnLease;
  }

  async releaseLsn(timelineId: string, holder: string): Promise<void> {
    await this.#rpc.call('releaseLsn', { timelineId, holder });
  }

  /** Durable when it resolves. For all branches of a project; `bad-request` outside of 6 hours to 30 days. */
  async setRetention(tenantId: string, retentionMs: number): Promise<void> {
    await this.#rpc.call('setRetention', { tenantId, retentionMs });
  }

  /** What changed in a window that is ingested; from the layers' indexes alone. `history-gone` when one of the LSNs is no longer kept. */
  async changes(request: ChangesRequest): Promise<ChangesPage> {
    return (await this.#rpc.call('changes', request, { timeoutMs: CHANGES_TIMEOUT_MS })).result as ChangesPage;
  }

  /** Where the histories of two timelines, each up to its LSN, part. `bad-request` when they have nothing in common. */
  async commonLsn(timelineId: string, lsn: Lsn, otherTimelineId: string, otherLsn: Lsn): Promise<Lsn> {
    const { result } = await this.#rpc.call('commonLsn', { timelineId, lsn, otherTimelineId, otherLsn });
    return (result as { lsn: Lsn }).lsn;
  }

  /**
   * Moves the horizons of a project's branches to where its history window begins now, and frees what nobody can read any more, however little it is.
   * Resolves when the bytes are gone. `unavailable` while leases may still have to be taken again after a start.
   */
  async collectGarbage(tenantId: string): Promise<void> {
    await this.#rpc.call('collectGarbage', { tenantId }, { timeoutMs: COLLECT_TIMEOUT_MS });
  }

  /** Of those of the timelines that are here. */
  async storageSizes(timelineIds: readonly string[]): Promise<readonly TimelineSizes[]> {
    return (await this.#rpc.call('storageSizes', { timelineIds })).result as TimelineSizes[];
  }

  /** Undefined when there is no object store. */
  async objectStoreStatus(): Promise<ObjectStoreStatus | undefined> {
    return (
      ((await this.#rpc.call('objectStoreStatus', {}, { timeoutMs: STATUS_TIMEOUT_MS }))
        .result as ObjectStoreStatus | null) ?? undefined
    );
  }

  /** Has a layer that is damaged at `offset` brought back. Rejects with why that cannot be. */
  async repairLayer(timelineId: string, file: string, offset: number): Promise<void> {
    await this.#rpc.call('repairLayer', { timelineId, file, offset }, { timeoutMs: REPAIR_TIMEOUT_MS });
  }

  /**
   * Has the object store given again what it has lost of a timeline; `names`: objects of which it is known that they cannot be used. Resolves, when the store has all that
   * could be had, to what could not, and why.
   */
  async restoreObjects(timelineId: string, names: readonly string[]): Promise<LostObject[]> {
    const options = { timeoutMs: REPAIR_TIMEOUT_MS };
    return (await this.#rpc.call('restoreObjects', { timelineId, names }, options)).result as LostObject[];
  }

  /** Makes what is ingested durable in layers. */
  async flush(timelineId: string): Promise<void> {
    await this.#rpc.call('flush', { timelineId }, { timeoutMs: FLUSH_TIMEOUT_MS });
  }

  async close(): Promise<void> {
    await this.#rpc.close();
  }
}
