/**
 * Rebuilds logs that were lost with a quorum of safekeepers' disks, from the object store and from what the pageserver has, and says up to where.
 *
 * Only who says "I do not have it" counts as lost; who is silent may come back with everything, so nothing is done before all have answered. An operator who
 * knows better gives up a safekeeper (lost-safekeepers.ts), which then begins again with an empty disk and says so. A log of which neither the pageserver nor
 * the store has any WAL was never used: the first proposer makes it.
 *
 *   1. What is offloaded is committed. Lost logs end there again, with the history of terms that belongs to it. If a safekeeper still has a log that is more
 *      advanced, all that it has was perhaps acknowledged with one of the lost: they get that one's log instead. Either way the lost ones, a majority, have the
 *      most that there is, so every later leader has it.
 *   2. What the pageserver has ingested is committed too. If it is ahead of all of these, its pages are the truth: they are made durable, and every log begins
 *      anew where they end. The WAL between the offloaded end and there is nowhere any more, and nobody needs it to go on.
 *   3. The new term is far above every one that is known, so that no proposer of before, whose votes were lost with the disks, can go on. It is at least the
 *      time in milliseconds: a log may be lost twice before anything that tells of the first time is offloaded.
 *
 * What was acknowledged after that and is on none of them is lost. That, and nothing less, is what losing a majority of the disks means; the result says
 * from which LSN on, and of what time the last commit is that was kept.
 */
import assert from 'node:assert/strict';
import type { SafekeeperDirectory } from '../api/safekeeper-set.ts';
import type { ListedTimeline, PageserverClient, PageserverTimelineStatus } from '../api/pageserver.ts';
import type { RebuiltLog } from '../api/rebuilt-logs.ts';
import {
  type SafekeeperAddress,
  SafekeeperClient,
  type SafekeeperTimelineStatus,
  type TimelineIdentity,
} from '../api/safekeeper.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import type { AcceptorState } from '../consensus/acceptor.ts';
import { NO_CONFIGURATION } from '../consensus/configuration.ts';
import type { TermHistory } from '../consensus/messages.ts';
import { compareLogs, hasReached } from '../consensus/term-history.ts';
import { formatLsn, type Lsn, segmentStart } from '../postgres/lsn.ts';
import { RM_XACT } from '../postgres/rmgr.ts';
import { toPgVersion } from '../postgres/version.ts';
import { WalBoundaryTracker } from '../postgres/wal/boundary-tracker.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import { parseXactRecord, timestampToDate } from '../postgres/xact-record.ts';
import type { OffloadedName } from '../safekeeper/offloaded-segment.ts';
import type { OffloadedWal } from '../safekeeper/offloaded-wal.ts';

export interface LogRebuildOptions {
  readonly safekeepers: SafekeeperDirectory;
  readonly pageserver: Pick<
    PageserverClient,
    'timelineIdentity' | 'timelineStatus' | 'listTimelines' | 'timestampOfLsn' | 'flush'
  >;
  /** Scope `platform`. */
  readonly token: string;
  readonly wal: OffloadedWal;
  readonly log: Logger;
}

/** What one safekeeper says. */
export type SafekeeperView =
  | { readonly kind: 'present'; readonly status: SafekeeperTimelineStatus }
  | { readonly kind: 'absent' }
  | { readonly kind: 'silent'; readonly reason: string };

/** What is offloaded, up to the end of its last whole record. */
export interface OffloadedEnd {
  readonly endLsn: Lsn;
  readonly history: TermHistory;
  /** Of the last commit in the last object; undefined when there is none. */
  readonly lastCommitMs: number | undefined;
}

export type RebuildPlan =
  | { readonly kind: 'none' }
  /** A majority may be lost, but these are silent. */
  | { readonly kind: 'wait'; readonly silent: readonly number[] }
  | {
      readonly kind: 'rebuild';
      /** Indexes of the safekeepers that get a log. */
      readonly targets: readonly number[];
      readonly logStartLsn: Lsn;
      readonly state: AcceptorState;
      readonly source: RebuiltLog['source'];
      /** Of the safekeeper whose log it is; with `source` another safekeeper. */
      readonly copied?: number;
      /** Everything before it is kept. */
      readonly keptLsn: Lsn;
    };

const LOST: SafekeeperView = { kind: 'absent' };
/** No proposer that was elected by what is lost has got so far ahead of what is known. */
const TERM_JUMP = 2 ** 20;
const UPLOAD_WAIT_MS = 30_000;
/** After which a pageserver that has uploaded nothing at all is taken for one that does not. */
const FIRST_UPLOAD_WAIT_MS = 3_000;
const POLL_MS = 200;

export function planRebuild(
  views: readonly SafekeeperView[],
  timeline: Pick<TimelineIdentity, 'startLsn'>,
  ingestedLsn: Lsn,
  offloaded: OffloadedEnd | undefined,
  nowMs: number,
): RebuildPlan {
  const { startLsn } = timeline;
  const quorum = Math.floor(views.length / 2) + 1;
  const indexes = (kind: SafekeeperView['kind']): number[] =>
    views.flatMap((view, index) => (view.kind === kind ? [index] : []));
  const [absent, silent] = [indexes('absent'), indexes('silent')];
  if (absent.length === 0 || absent.length + silent.length < quorum) return { kind: 'none' };
  if (silent.length > 0) return { kind: 'wait', silent };
  const survivors = views.flatMap((view, index) => (view.kind === 'present' ? [{ ...view.status, index }] : []));
  const history = offloaded?.history ?? [{ term: 0, startLsn }];
  const offloadedLsn = offloaded?.endLsn ?? startLsn;
  const best = survivors.reduce<(typeof survivors)[number] | undefined>(
    (most, each) => (most === undefined || compareLogs(each, most) > 0 ? each : most),
    undefined,
  );
  const knownTerms = survivors.map((status) => Math.max(status.term, status.lastLogTerm));
  const term = Math.max(nowMs, Math.max(history.at(-1)!.term, ...knownTerms) + TERM_JUMP);
  const generation = 1 + Math.max(0, ...survivors.map((status) => status.generation));
  const configuration = survivors.reduce(
    (newest, each) => (each.configuration.version > newest.version ? each.configuration : newest),
    NO_CONFIGURATION,
  );
  const stored = { lastLogTerm: history.at(-1)!.term, flushLsn: offloadedLsn };
  const isStoredPruned = stored.lastLogTerm === 0 && offloadedLsn > startLsn; // It is committed, but of a term that nobody knows any more.
  const isSurvivorBest =
    best !== undefined &&
    (isStoredPruned ? best.commitLsn >= offloadedLsn : hasReached(best.history, best.flushLsn, stored));
  const bestLsn = isSurvivorBest ? best.flushLsn : offloadedLsn;
  if (ingestedLsn > bestLsn) {
    return {
      kind: 'rebuild',
      targets: views.map((_, index) => index),
      logStartLsn: ingestedLsn,
      state: {
        term,
        generation,
        configuration,
        commitLsn: ingestedLsn,
        history: [...history, { term, startLsn: ingestedLsn }],
      },
      source: 'pageserver',
      keptLsn: ingestedLsn,
    };
  }
  if (isSurvivorBest) {
    return {
      kind: 'rebuild',
      targets: absent,
      logStartLsn: best.localStartLsn, // The caller finds where a record ends after it.
      state: { term, generation, configuration, commitLsn: best.commitLsn, history: best.history },
      source: 'another safekeeper',
      copied: best.index,
      keptLsn: best.flushLsn,
    };
  }
  return {
    kind: 'rebuild',
    targets: absent,
    logStartLsn: startLsn,
    state: {
      term,
      generation,
      configuration,
      commitLsn: offloadedLsn,
      // So that it is more advanced than what survives of older terms.
      history: isStoredPruned ? [...history, { term, startLsn: offloadedLsn }] : history,
    },
    source: 'object store',
    keptLsn: offloadedLsn,
  };
}

/** What would be done, and how far everything is kept then. */
export interface PlannedRebuild extends Omit<RebuiltLog, 'atMs'> {
  /** The highest commit LSN that the pageserver was told of; what is between keptLsn and there was acknowledged and is lost. */
  readonly heardLsn: Lsn | undefined;
}

interface Look {
  readonly timeline: TimelineIdentity;
  readonly members: readonly Member[];
  readonly views: readonly SafekeeperView[];
}

interface Member {
  readonly nodeId: number;
  readonly address: SafekeeperAddress;
  readonly client: SafekeeperClient;
}

export class LogRebuild {
  readonly #options: LogRebuildOptions;
  readonly #stopWatching: () => void;
  #members: readonly Member[] = [];
  #running: Promise<void> = Promise.resolve();

  constructor(options: LogRebuildOptions) {
    this.#options = options;
    this.#connect();
    this.#stopWatching = options.safekeepers.watch(() => this.#connect());
  }

  close(): void {
    this.#stopWatching();
    for (const { client } of this.#members) client.close();
  }

  #connect(): void {
    const { token, safekeepers } = this.#options;
    const { configuration, addresses } = safekeepers.current;
    for (const { client } of this.#members) client.close();
    this.#members = configuration.members.map((nodeId) => {
      const address = addresses.get(nodeId)!;
      return { nodeId, address, client: new SafekeeperClient({ address, token }) };
    });
  }

  /**
   * Ids of those of the timelines that the pageserver or the store has WAL of. Most branches were never written to: there may be thousands of them, and
   * nothing of each is to be asked.
   */
  async written(timelines: readonly ListedTimeline[]): Promise<string[]> {
    const loaded = timelines.filter((timeline) => timeline.kind === 'loaded');
    const isUnwritten = loaded.some(({ lastRecordLsn, startLsn }) => lastRecordLsn === startLsn);
    const offloaded = isUnwritten ? await this.#options.wal.timelineIds() : undefined;
    return loaded
      .filter(({ timelineId, lastRecordLsn, startLsn }) => lastRecordLsn > startLsn || offloaded?.has(timelineId))
      .map(({ timelineId }) => timelineId);
  }

  /** Nothing else is rebuilt meanwhile. */
  exclusively<T>(work: () => Promise<T>): Promise<T> {
    const done = this.#running.then(work);
    this.#running = done.then(
      () => {},
      () => {},
    );
    return done;
  }

  /** What `rebuild` would do if those safekeepers had lost everything; undefined: nothing. Throws as it does. */
  async preview(timelineId: string, lost: ReadonlySet<number>): Promise<PlannedRebuild | undefined> {
    const found = await this.#look(timelineId, lost);
    if (found === undefined) return undefined;
    const status = await this.#options.pageserver.timelineStatus(timelineId);
    const { plan, ...rest } = await this.#plan(found, status);
    const { source, keptLsn, targets } = plan;
    const safekeepers = targets.map((index) => this.#members[index]!.nodeId);
    const lastCommitMs = await this.#lastCommit(timelineId, source, rest.offloaded, keptLsn);
    return { timelineId, keptLsn, lastCommitMs, source, safekeepers, heardLsn: status.commitLsn };
  }

  /**
   * Rebuilds the timeline's log when a quorum has lost it; undefined when it has not. Throws `unavailable` when it cannot be told, naming who is silent.
   */
  async rebuild(timelineId: string): Promise<RebuiltLog | undefined> {
    const { log, safekeepers: directory } = this.#options;
    const found = await this.#look(timelineId, new Set());
    if (found === undefined) return undefined;
    const { timeline, members } = found;
    const { plan, offloaded } = await this.#plan(found, await this.#madeDurable(timelineId));
    const { targets, source, copied, keptLsn } = plan;
    const { configuration } = directory.current;
    const state =
      plan.state.configuration.version > configuration.version ? plan.state : { ...plan.state, configuration };
    const { tenantId } = timeline;
    const logStartLsn =
      copied === undefined ? plan.logStartLsn : await members[copied]!.client.resumePoint(tenantId, timelineId);
    const safekeepers = targets.map((index) => members[index]!.nodeId);
    log.warn(
      { timelineId, safekeepers, source, keptLsn: formatLsn(keptLsn), term: state.term },
      'a majority of the safekeepers has lost this log: it is rebuilt',
    );
    const replace = source === 'pageserver';
    for (const index of targets) {
      await members[index]!.client.rebuildTimeline({
        timeline: identityOf(timeline),
        logStartLsn,
        state,
        replace,
        ...(copied === undefined ? {} : { source: { address: members[copied]!.address, endLsn: keptLsn } }),
      });
    }
    const lastCommitMs = await this.#lastCommit(timelineId, source, offloaded, keptLsn);
    return { timelineId, atMs: Date.now(), keptLsn, lastCommitMs, source, safekeepers };
  }

  /** Undefined when no quorum has lost it. */
  async #look(timelineId: string, lost: ReadonlySet<number>): Promise<Look | undefined> {
    const { pageserver, wal, safekeepers } = this.#options;
    if (safekeepers.current.configuration.newMembers !== undefined)
      throw new StrataError('unavailable', 'the safekeepers are being changed');
    const members = this.#members;
    const timeline = await pageserver.timelineIdentity(timelineId);
    if (!timeline.hasWal && !(await wal.hasAny(timeline))) return undefined;
    const views = await Promise.all(
      members.map(async (member) => (lost.has(member.nodeId) ? LOST : viewOf(member, timeline))),
    );
    const plan = planRebuild(views, timeline, timeline.startLsn, undefined, Date.now());
    if (plan.kind === 'none') return undefined;
    if (plan.kind === 'wait') throw silentError(timelineId, views, members);
    return { timeline, members, views };
  }

  async #plan(
    { timeline, views }: Look,
    status: PageserverTimelineStatus,
  ): Promise<{
    readonly plan: Extract<RebuildPlan, { kind: 'rebuild' }>;
    readonly offloaded: OffloadedEnd | undefined;
  }> {
    const offloaded = await findOffloadedEnd(this.#options.wal, timeline, status.lastRecordLsn);
    const plan = planRebuild(views, timeline, status.lastRecordLsn, offloaded, Date.now());
    assert(plan.kind === 'rebuild', 'the views are those that asked for it');
    return { plan, offloaded };
  }

  /** Of what is kept, as far as it is known. */
  async #lastCommit(
    timelineId: string,
    source: RebuiltLog['source'],
    offloaded: OffloadedEnd | undefined,
    keptLsn: Lsn,
  ): Promise<number | undefined> {
    if (source === 'object store' && offloaded?.lastCommitMs !== undefined) return offloaded.lastCommitMs;
    const { pageserver } = this.#options;
    try {
      const { lastRecordLsn } = await pageserver.timelineStatus(timelineId);
      if (lastRecordLsn < keptLsn) return undefined;
      const timestampUs = await pageserver.timestampOfLsn(timelineId, keptLsn);
      return timestampUs === undefined ? undefined : Math.floor(timestampUs / 1000);
    } catch {
      return undefined; // It would only have been told.
    }
  }

  /** What the pageserver has ingested is the truth from here on, so it has to outlive the pageserver. */
  async #madeDurable(timelineId: string): Promise<PageserverTimelineStatus> {
    const { pageserver } = this.#options;
    await pageserver.flush(timelineId);
    const deadlineMs = performance.now() + UPLOAD_WAIT_MS;
    for (;;) {
      const status = await pageserver.timelineStatus(timelineId);
      const { lastRecordLsn, diskConsistentLsn, remoteConsistentLsn, startLsn } = status;
      const isUploaded = remoteConsistentLsn >= lastRecordLsn;
      const neverUploads =
        remoteConsistentLsn === startLsn && performance.now() > deadlineMs - UPLOAD_WAIT_MS + FIRST_UPLOAD_WAIT_MS;
      if (diskConsistentLsn >= lastRecordLsn && (isUploaded || neverUploads)) return status;
      if (performance.now() > deadlineMs) {
        const has = `has ${formatLsn(lastRecordLsn)}, durable is ${formatLsn(Math.min(diskConsistentLsn, remoteConsistentLsn))}`;
        throw new StrataError('unavailable', `the pageserver ${has}: its log is rebuilt when that is durable`);
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }
}

/**
 * The end of what is offloaded without a gap from `ingestedLsn` on, at the end of a whole record; undefined when the store has nothing that the
 * pageserver could go on from.
 */
export async function findOffloadedEnd(
  wal: OffloadedWal,
  timeline: TimelineIdentity,
  ingestedLsn: Lsn,
): Promise<OffloadedEnd | undefined> {
  const objects = await wal.list(timeline);
  let endLsn = ingestedLsn;
  let last: OffloadedName | undefined;
  for (const object of objects.sort((a, b) => a.fromLsn - b.fromLsn || a.endLsn - b.endLsn)) {
    if (object.fromLsn <= endLsn && object.endLsn >= endLsn) [endLsn, last] = [object.endLsn, object];
  }
  if (last === undefined) return undefined;
  // A whole segment ends inside a record as a rule; a record may even begin some segments before.
  for (let fromLsn = last.fromLsn; fromLsn >= timeline.startLsn;) {
    const found = await readBackwards(wal, timeline, fromLsn, endLsn);
    if (found !== undefined) return found;
    if (fromLsn === timeline.startLsn) return undefined;
    fromLsn = Math.max(timeline.startLsn, segmentStart(fromLsn - 1));
  }
  return undefined;
}

/** Undefined when no record ends between the two. */
async function readBackwards(
  wal: OffloadedWal,
  timeline: TimelineIdentity,
  fromLsn: Lsn,
  endLsn: Lsn,
): Promise<OffloadedEnd | undefined> {
  const parts: Buffer[] = [];
  let history: TermHistory = [];
  for (let lsn = fromLsn; lsn < endLsn;) {
    const segment = await wal.find(timeline, lsn);
    if (segment === undefined) return undefined;
    parts.push(segment.bytes.subarray(lsn - segment.fromLsn));
    history = segment.history;
    lsn = segment.endLsn;
  }
  const bytes = Buffer.concat(parts).subarray(0, endLsn - fromLsn);
  const tracker = new WalBoundaryTracker(fromLsn);
  let firstLsn = fromLsn;
  for (let at = 0; at < bytes.length; at += 8192) {
    tracker.push(bytes.subarray(at, at + 8192));
    if (firstLsn === fromLsn) firstLsn = tracker.endLsn;
  }
  if (tracker.endLsn === fromLsn) return undefined;
  const beginLsn = fromLsn === timeline.startLsn ? fromLsn : firstLsn;
  const kept = history.filter((entry) => entry.startLsn < tracker.endLsn);
  return { endLsn: tracker.endLsn, history: kept, lastCommitMs: lastCommit(timeline, beginLsn, bytes, fromLsn) };
}

function lastCommit(timeline: TimelineIdentity, beginLsn: Lsn, bytes: Buffer, fromLsn: Lsn): number | undefined {
  const version = toPgVersion(timeline.pgVersion);
  const reader = new WalReader(beginLsn, version);
  reader.push(beginLsn, bytes.subarray(beginLsn - fromLsn));
  let lastMs: number | undefined;
  for (let record = reader.next(); record !== undefined; record = reader.next()) {
    if (record.rmid !== RM_XACT) continue;
    const xact = parseXactRecord(record, version);
    if (xact?.kind === 'commit') lastMs = timestampToDate(xact.timeUs).getTime();
  }
  return lastMs;
}

async function viewOf({ client }: Member, { tenantId, timelineId }: TimelineIdentity): Promise<SafekeeperView> {
  try {
    return { kind: 'present', status: await client.status(tenantId, timelineId) };
  } catch (error) {
    const { code, message } = toStrataError(error);
    // Also one that has the log and cannot read it: it may yet be mended.
    return code === 'not-found' ? LOST : { kind: 'silent', reason: message };
  }
}

function identityOf({ tenantId, timelineId, startLsn, pgVersion, systemId }: TimelineIdentity): TimelineIdentity {
  return { tenantId, timelineId, startLsn, pgVersion, systemId };
}

function silentError(timelineId: string, views: readonly SafekeeperView[], members: readonly Member[]): StrataError {
  const silent = views.flatMap((view, index) =>
    view.kind === 'silent' ? [`safekeeper ${members[index]!.nodeId} (${view.reason})`] : [],
  );
  return new StrataError(
    'unavailable',
    `timeline ${timelineId} may be lost on a majority, but this is not known before they answer: ${silent.join(', ')}`,
  );
}
