/**
 * Safekeepers and pageserver as the control plane sees them (api/control.ts).
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { BranchPoint, NewImport, NewTimeline, Storage, TimelineStatus } from '../api/control.ts';
import {
  type ChangesPage,
  type ChangesRequest,
  type ImportableCluster,
  type ImportProgress,
  type ObjectStoreStatus,
  type PageserverClient,
  type TimelineSizes,
} from '../api/pageserver.ts';
import { SafekeeperClient, type SafekeeperTimelineStatus } from '../api/safekeeper.ts';
import type { SafekeeperDirectory } from '../api/safekeeper-set.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import type { Installations, UnixUser } from '../compute/installation.ts';
import { electProposer } from '../compute/proposer.ts';
import { acknowledgedBound } from '../consensus/term-history.ts';
import { DEFAULT_DATABASE_NAME, DEFAULT_ROLE_NAME } from '../control/projects.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { TEMPLATE_TENANT_ID, templateTimelineId, withFreshCluster } from './template.ts';

export interface ClusterStorageOptions {
  readonly pageserver: PageserverClient;
  readonly safekeepers: SafekeeperDirectory;
  /** Scope `platform`. */
  readonly token: string;
  readonly installations: Installations;
  readonly user: UnixUser | undefined;
  readonly runDir: string;
  readonly adminPassword: string;
  /** The commit LSN of a timeline whose compute runs on this host. */
  readonly commitLsnOf: (timelineId: string) => Promise<Lsn | undefined>;
  readonly progress: (text: string) => void;
  readonly log: Logger;
}

const WAIT_LSN_TIMEOUT_MS = 60_000;
const ELECTION_TIMEOUT_MS = 30_000;
const LEADER_WAIT_MS = 10;
/** A verifier that no password fits: the template's role gets a real one in each project. */
const NO_PASSWORD =
  'SCRAM-SHA-256$4096:AAAAAAAAAAAAAAAAAAAAAA==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=';

export class ClusterStorage implements Storage {
  readonly #options: ClusterStorageOptions;
  /** By node id. */
  readonly #safekeepers = new Map<number, SafekeeperClient>();
  readonly #templates = new Map<number, Promise<BranchPoint>>();

  constructor(options: ClusterStorageOptions) {
    this.#options = options;
    this.#connect();
    options.safekeepers.watch(() => this.#connect());
  }

  ensureTemplate(pgVersion: number): Promise<BranchPoint> {
    let template = this.#templates.get(pgVersion);
    if (template === undefined) {
      template = this.#findOrMakeTemplate(pgVersion);
      this.#templates.set(pgVersion, template);
      template.catch(() => this.#templates.delete(pgVersion));
    }
    return template;
  }

  async createTimeline(timeline: NewTimeline): Promise<void> {
    await this.#options.pageserver.createTimeline({
      tenantId: timeline.tenantId,
      timelineId: timeline.timelineId,
      pgVersion: timeline.pgVersion,
      ancestorTimelineId: timeline.ancestor.timelineId,
      ancestorLsn: timeline.ancestor.lsn,
    });
  }

  async deleteTimeline(tenantId: string, timelineId: string): Promise<void> {
    await this.#options.pageserver.deleteTimeline(tenantId, timelineId);
    const safekeepers = [...this.#safekeepers.values()];
    await Promise.all(safekeepers.map((safekeeper) => safekeeper.deleteTimeline(tenantId, timelineId)));
  }

  inspectImport(dataDirectory: string): Promise<ImportableCluster> {
    return this.#options.pageserver.inspectImport(dataDirectory);
  }

  async importTimeline(timeline: NewImport): Promise<Lsn> {
    const { pageserver } = this.#options;
    await pageserver.importTimeline(timeline);
    return (await pageserver.timelineStatus(timeline.timelineId)).startLsn;
  }

  cancelImport(timelineId: string): Promise<void> {
    return this.#options.pageserver.cancelImport(timelineId);
  }

  importProgress(timelineId: string): Promise<ImportProgress | undefined> {
    return this.#options.pageserver.importProgress(timelineId);
  }

  async headLsn(timelineId: string): Promise<Lsn> {
    const lsn = (await this.#options.commitLsnOf(timelineId)) ?? (await this.#committedLsn(timelineId));
    await this.#options.pageserver.waitLsn(timelineId, lsn, WAIT_LSN_TIMEOUT_MS);
    return lsn;
  }

  async resolveLsn(timelineId: string, lsn: Lsn): Promise<Lsn> {
    return (await this.#options.pageserver.resolveLsn(timelineId, lsn)).lsn;
  }

  async lsnForTimestamp(timelineId: string, timestampUs: number): Promise<Lsn> {
    return (await this.#options.pageserver.lsnForTimestamp(timelineId, timestampUs)).lsn;
  }

  timestampOfLsn(timelineId: string, lsn: Lsn): Promise<number | undefined> {
    return this.#options.pageserver.timestampOfLsn(timelineId, lsn);
  }

  async status(timelineId: string): Promise<TimelineStatus> {
    const { oldestLsn, oldestTimeMs, lastRecordLsn } = await this.#options.pageserver.timelineStatus(timelineId);
    return { oldestLsn, newestLsn: lastRecordLsn, ...(oldestTimeMs === undefined ? {} : { oldestTimeMs }) };
  }

  objectStore(): Promise<ObjectStoreStatus | undefined> {
    return this.#options.pageserver.objectStoreStatus();
  }

  sizes(timelineIds: readonly string[]): Promise<readonly TimelineSizes[]> {
    return this.#options.pageserver.storageSizes(timelineIds);
  }

  changes(request: ChangesRequest): Promise<ChangesPage> {
    return this.#options.pageserver.changes(request);
  }

  lastCommitLsn(timelineId: string, lsn: Lsn): Promise<Lsn> {
    return this.#options.pageserver.lastCommitLsn(timelineId, lsn);
  }

  commonLsn(a: BranchPoint, b: BranchPoint): Promise<Lsn> {
    return this.#options.pageserver.commonLsn(a.timelineId, a.lsn, b.timelineId, b.lsn);
  }

  collectGarbage(tenantId: string): Promise<void> {
    return this.#options.pageserver.collectGarbage(tenantId);
  }

  async setRetention(tenantId: string, retentionSeconds: number): Promise<void> {
    await this.#options.pageserver.setRetention(tenantId, retentionSeconds * 1000);
  }

  /**
   * An LSN that is committed, with everything below it that was acknowledged before the call. Reading is enough as a rule, and disturbs nobody: only when the
   * safekeepers that answer leave open what is committed, and no leader is there to settle it, one is elected for that.
   */
  async #committedLsn(timelineId: string): Promise<Lsn> {
    const { pageserver, safekeepers, token, log } = this.#options;
    const identity = await pageserver.timelineIdentity(timelineId);
    const signal = AbortSignal.timeout(ELECTION_TIMEOUT_MS);
    let bound: Lsn | undefined;
    for (;;) {
      // Whatever was acknowledged under this configuration, or the one before it, a majority of these has.
      const { members } = safekeepers.current.configuration;
      const { known, unknownCount } = await this.#positions(identity.tenantId, timelineId);
      const quorum = Math.floor(members.length / 2) + 1;
      if (known.length === 0 && unknownCount >= quorum && !identity.hasWal) return identity.startLsn; // never started
      bound ??= acknowledgedBound(
        known.filter((status) => status.isVoter),
        members.length,
      );
      const commitLsn = Math.max(...known.map((status) => status.commitLsn));
      if (bound !== undefined && commitLsn >= bound) return commitLsn;
      if (known.some((status) => status.hasLeader) && !signal.aborted) {
        await sleep(LEADER_WAIT_MS); // It is about to settle it.
        continue;
      }
      const election = { safekeepers, token, timeline: identity, mayCreate: false, yieldsToLeader: true, signal, log };
      try {
        const proposer = await electProposer(election);
        const { startLsn } = proposer;
        await proposer.close();
        return startLsn;
      } catch (error) {
        if (toStrataError(error).code !== 'conflict' || signal.aborted) throw error;
      }
    }
  }

  #connect(): void {
    const { token, safekeepers } = this.#options;
    const { addresses } = safekeepers.current;
    for (const [nodeId, address] of addresses) {
      if (!this.#safekeepers.has(nodeId)) this.#safekeepers.set(nodeId, new SafekeeperClient({ address, token }));
    }
    for (const [nodeId, client] of this.#safekeepers) {
      if (addresses.has(nodeId)) continue;
      client.close();
      this.#safekeepers.delete(nodeId);
    }
  }

  async #positions(
    tenantId: string,
    timelineId: string,
  ): Promise<{ known: SafekeeperTimelineStatus[]; unknownCount: number }> {
    const answers = await Promise.allSettled(
      this.#options.safekeepers.current.configuration.members
        .flatMap((nodeId) => this.#safekeepers.get(nodeId) ?? [])
        .map(async (safekeeper) => safekeeper.status(tenantId, timelineId)),
    );
    const known = answers.flatMap((answer) => (answer.status === 'fulfilled' ? [answer.value] : []));
    const unknownCount = answers.filter(
      (answer) => answer.status === 'rejected' && toStrataError(answer.reason).code === 'not-found',
    ).length;
    return { known, unknownCount };
  }

  async #findOrMakeTemplate(pgVersion: number): Promise<BranchPoint> {
    const { pageserver, installations, user, runDir, adminPassword, progress } = this.#options;
    const timelineId = templateTimelineId(pgVersion);
    try {
      return { timelineId, lsn: (await pageserver.timelineStatus(timelineId)).lastRecordLsn };
    } catch (error) {
      if (!(error instanceof StrataError) || error.code !== 'not-found') throw error;
    }
    progress(`initialising Postgres ${pgVersion}, once`);
    const template = {
      installation: installations.of(pgVersion),
      user,
      runDir,
      adminPassword,
      catalog: {
        roles: [{ name: DEFAULT_ROLE_NAME, scramVerifier: NO_PASSWORD }],
        databases: [{ name: DEFAULT_DATABASE_NAME, ownerName: DEFAULT_ROLE_NAME }],
      },
    };
    await withFreshCluster(template, (dataDirectory) =>
      pageserver.importTimeline({ tenantId: TEMPLATE_TENANT_ID, timelineId, pgVersion, dataDirectory }),
    );
    return { timelineId, lsn: (await pageserver.timelineStatus(timelineId)).lastRecordLsn };
  }
}
