/**
 * A world for tests of the control plane alone: storage and computes in memory, with their contracts checked (ancestors exist, timelines with children
 * stay, calls for one endpoint do not overlap) and failures on demand. The end-to-end tests use the real ones.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setImmediate as turn } from 'node:timers/promises';
import type {
  ActivitySample,
  BranchPoint,
  CatalogSpec,
  ComputeExitListener,
  Computes,
  ComputeSpec,
  NewImport,
  NewTimeline,
  StartedCompute,
  Storage,
  TimelineStatus,
} from '../api/control.ts';
import type {
  ChangesPage,
  ChangesRequest,
  ImportableCluster,
  ImportProgress,
  ObjectStoreStatus,
  TimelineSizes,
} from '../api/pageserver.ts';
import type { RunningCompute } from '../api/wake.ts';
import { StrataError } from '../base/errors.ts';
import { createLog } from '../base/log.ts';
import type { Lsn } from '../postgres/lsn.ts';
import type { ControlConfig } from './context.ts';
import { Control } from './control.ts';

export const TEMPLATE_LSN = 0x1500000;

interface FakeTimeline {
  readonly tenantId: string;
  readonly ancestor: BranchPoint | undefined;
  head: Lsn;
  readonly commits: { readonly atUs: number; readonly lsn: Lsn }[];
}

export class FakeStorage implements Storage {
  readonly retentions = new Map<string, number>();
  readonly cancelled: string[] = [];
  readonly collected: string[] = [];
  readonly timelines = new Map<string, FakeTimeline>();
  /** Thrown by the next calls of createTimeline and deleteTimeline, in order. */
  readonly failures: Error[] = [];

  async ensureTemplate(pgVersion: number): Promise<BranchPoint> {
    const timelineId = String(pgVersion).padStart(32, '0');
    if (!this.timelines.has(timelineId)) {
      this.timelines.set(timelineId, {
        tenantId: '0'.repeat(32),
        ancestor: undefined,
        head: TEMPLATE_LSN,
        commits: [],
      });
    }
    return { timelineId, lsn: TEMPLATE_LSN };
  }

  async createTimeline(timeline: NewTimeline): Promise<void> {
    await this.#turn();
    const existing = this.timelines.get(timeline.timelineId);
    if (existing !== undefined) {
      assert.deepEqual(existing.ancestor, timeline.ancestor, 'a timeline is created again with the same ancestor');
      return;
    }
    const ancestor = this.#get(timeline.ancestor.timelineId);
    assert(timeline.ancestor.lsn <= ancestor.head, 'a timeline begins in its ancestor’s history');
    const { tenantId } = timeline;
    this.timelines.set(timeline.timelineId, {
      tenantId,
      ancestor: timeline.ancestor,
      head: timeline.ancestor.lsn,
      commits: [],
    });
  }

  async inspectImport(dataDirectory: string): Promise<ImportableCluster> {
    return { pgVersion: 17, systemId: '7', relationBytes: 1000, notes: [`from ${dataDirectory}`] };
  }

  async importTimeline({ tenantId, timelineId }: NewImport): Promise<Lsn> {
    await this.#turn();
    this.timelines.set(timelineId, { tenantId, ancestor: undefined, head: TEMPLATE_LSN, commits: [] });
    return TEMPLATE_LSN;
  }

  async cancelImport(timelineId: string): Promise<void> {
    this.cancelled.push(timelineId);
  }

  async importProgress(): Promise<ImportProgress | undefined> {
    return { doneBytes: 500, totalBytes: 1000 };
  }

  async deleteTimeline(_tenantId: string, timelineId: string): Promise<void> {
    await this.#turn();
    for (const other of this.timelines.values()) {
      if (other.ancestor?.timelineId === timelineId) throw new StrataError('conflict', `${timelineId} has children`);
    }
    this.timelines.delete(timelineId);
  }

  async headLsn(timelineId: string): Promise<Lsn> {
    return this.#get(timelineId).head;
  }

  async resolveLsn(_timelineId: string, lsn: Lsn): Promise<Lsn> {
    return lsn - (lsn % 8);
  }

  async lsnForTimestamp(timelineId: string, timestampUs: number): Promise<Lsn> {
    const { ancestor, commits } = this.#get(timelineId);
    const own = commits.findLast((commit) => commit.atUs <= timestampUs);
    if (own !== undefined) return own.lsn;
    if (ancestor === undefined) return 0;
    return Math.min(ancestor.lsn, await this.lsnForTimestamp(ancestor.timelineId, timestampUs));
  }

  async timestampOfLsn(timelineId: string, lsn: Lsn): Promise<number | undefined> {
    const { ancestor, commits } = this.#get(timelineId);
    const own = commits.findLast((commit) => commit.lsn <= lsn)?.atUs;
    if (own !== undefined || ancestor === undefined) return own;
    return this.timestampOfLsn(ancestor.timelineId, Math.min(lsn, ancestor.lsn));
  }

  async status(timelineId: string): Promise<TimelineStatus> {
    const timeline = this.#get(timelineId);
    return { oldestLsn: 0, newestLsn: timeline.head, logicalSizeBytes: 7_654_321 };
  }

  async objectStore(): Promise<ObjectStoreStatus> {
    return {
      store: '/fake/object-store',
      generation: 1,
      since: 1,
      isStale: false,
      pendingTimelines: 2,
      pendingBytes: 3 * 1024 * 1024,
      pendingDeletions: 0,
    };
  }

  async sizes(timelineIds: readonly string[]): Promise<readonly TimelineSizes[]> {
    return timelineIds.map((timelineId) => {
      const oldestLsn = this.#get(timelineId).ancestor?.lsn ?? 0;
      const childCount = [...this.timelines.values()].filter((each) => each.ancestor?.timelineId === timelineId).length;
      const bytes = { logicalBytes: 7_654_321, historyBytes: 1000, memoryBytes: 10, sharedBytes: 7_000_000 };
      const freedByDeletionBytes = childCount === 0 ? 1000 : 0;
      return { timelineId, ...bytes, freedByDeletionBytes, childCount, oldestLsn, retainedLsns: childCount };
    });
  }

  /** Every commit changes the first block of relation 16384. */
  async changes({ timelineId, fromLsn, toLsn, withRanges }: ChangesRequest): Promise<ChangesPage> {
    const changed = this.#get(timelineId).commits.some(({ lsn }) => lsn > fromLsn && lsn <= toLsn);
    const fork = { spc: 1663, db: 16_383, rel: 16_384, fork: 0 };
    const one = {
      fork,
      blockCount: 1,
      size: { before: 0, after: 1 },
      ...(withRanges ? { ranges: [[0, 1] as const] } : {}),
    };
    return { forks: changed ? [one] : [], keyBlocksRead: 0, slruPageCount: changed ? 1 : 0 };
  }

  async lastCommitLsn(_timelineId: string, lsn: Lsn): Promise<Lsn> {
    return lsn;
  }

  async commonLsn(a: BranchPoint, b: BranchPoint): Promise<Lsn> {
    for (let at: BranchPoint | undefined = a; at !== undefined; at = this.#get(at.timelineId).ancestor) {
      for (let of: BranchPoint | undefined = b; of !== undefined; of = this.#get(of.timelineId).ancestor) {
        if (at.timelineId === of.timelineId) return Math.min(at.lsn, of.lsn);
      }
    }
    throw new StrataError('bad-request', 'no ancestor in common');
  }

  async collectGarbage(tenantId: string): Promise<void> {
    this.collected.push(tenantId);
  }

  async setRetention(tenantId: string, retentionSeconds: number): Promise<void> {
    this.retentions.set(tenantId, retentionSeconds);
  }

  /** A commit on the timeline; returns its LSN. */
  commit(timelineId: string, atUs: number): Lsn {
    const timeline = this.#get(timelineId);
    timeline.head += 64;
    timeline.commits.push({ atUs, lsn: timeline.head });
    return timeline.head;
  }

  #get(timelineId: string): FakeTimeline {
    const timeline = this.timelines.get(timelineId);
    if (timeline === undefined) throw new StrataError('not-found', `timeline ${timelineId} does not exist`);
    return timeline;
  }

  async #turn(): Promise<void> {
    await turn();
    const failure = this.failures.shift();
    if (failure !== undefined) throw failure;
  }
}

export class FakeComputes implements Computes {
  readonly specs = new Map<string, ComputeSpec>();
  /** Every start, suspend, kill and catalog, in order. */
  readonly calls: string[] = [];
  readonly catalogs = new Map<string, CatalogSpec>();
  readonly samples = new Map<string, ActivitySample>();
  /** Thrown by the next starts. */
  readonly startFailures: Error[] = [];
  readonly #busy = new Set<string>();
  #exitListener: ComputeExitListener = () => {};

  start(spec: ComputeSpec): Promise<StartedCompute> {
    return this.#alone(spec.endpointId, `start ${spec.endpointId}`, () => {
      const failure = this.startFailures.shift();
      if (failure !== undefined) throw failure;
      this.specs.set(spec.endpointId, spec);
      if (spec.catalog !== undefined) this.catalogs.set(spec.endpointId, spec.catalog);
      const running = { endpointId: spec.endpointId, socketPath: `/run/${spec.endpointId}` };
      if (spec.adoption === undefined) return running;
      return { ...running, adoption: { databaseNames: ['shop', 'postgres'], notes: ['adopted'] } };
    });
  }

  running(endpointId: string): RunningCompute | undefined {
    if (!this.specs.has(endpointId) || this.#busy.has(endpointId)) return undefined;
    return { endpointId, socketPath: `/run/${endpointId}` };
  }

  async suspend(endpointId: string): Promise<void> {
    await this.#alone(endpointId, `suspend ${endpointId}`, () => this.specs.delete(endpointId));
  }

  async kill(endpointId: string, forget: boolean): Promise<void> {
    await this.#alone(endpointId, `kill ${endpointId}${forget ? ' and forget' : ''}`, () =>
      this.specs.delete(endpointId),
    );
  }

  async applyCatalog(endpointId: string, catalog: CatalogSpec): Promise<void> {
    await this.#alone(endpointId, `catalog ${endpointId}`, () => this.catalogs.set(endpointId, catalog));
  }

  async activity(endpointId: string): Promise<ActivitySample> {
    return this.samples.get(endpointId) ?? quietSample;
  }

  onExit(listener: ComputeExitListener): void {
    this.#exitListener = listener;
  }

  crash(endpointId: string): void {
    this.specs.delete(endpointId);
    this.#exitListener(endpointId, 'killed by signal 9');
  }

  async #alone<T>(endpointId: string, call: string, work: () => T): Promise<T> {
    assert(!this.#busy.has(endpointId), `calls for one endpoint come one at a time: ${call}`);
    this.#busy.add(endpointId);
    this.calls.push(call);
    await turn();
    this.#busy.delete(endpointId);
    return work();
  }
}

export const quietSample: ActivitySample = {
  busyBackendCount: 0,
  walsenderCount: 0,
  activeSubscriptionCount: 0,
  autovacuumWorkerCount: 0,
};

export class World {
  readonly storage = new FakeStorage();
  readonly computes = new FakeComputes();
  readonly dataDirectory = mkdtempSync(join(tmpdir(), 'strata-control-'));
  nowMs = Date.UTC(2026, 0, 31, 12);
  control: Control;

  constructor(config: Partial<ControlConfig> = {}) {
    this.control = this.#open(config);
  }

  /** As after a crash: what is in memory is gone, computes too; the state file and the storage are as they were. */
  async restart(): Promise<void> {
    this.computes.specs.clear();
    this.control = this.#open({});
    await this.control.recover();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.control.close();
    rmSync(this.dataDirectory, { recursive: true });
  }

  #open(config: Partial<ControlConfig>): Control {
    return Control.open({
      dataDirectory: this.dataDirectory,
      storage: this.storage,
      computes: this.computes,
      log: createLog({ name: 'test', level: 'silent' }),
      now: () => this.nowMs,
      config: {
        proxyHost: '127.0.0.1',
        proxyPort: 55432,
        domain: 'localhost',
        defaultPgVersion: 17,
        availablePgVersions: [17],
        suspendTimeoutSeconds: 300,
        ...config,
      },
    });
  }
}
