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
 *   3. A survivor's log is read before, record by record (survivor-check.ts). What is damaged there is taken from the store or another survivor; what nobody has and
 *      the pageserver has ingested is left out, and the log begins after it. Where neither helps, the log ends. A survivor that is damaged is given
 *      the new log too, in the place of its own, which stays beside it: before the others, so that a crash leaves a majority that is still to be given it.
 *   4. The new term is far above every one that is known, so that no proposer of before, whose votes were lost with the disks, can go on. It is at least the
 *      time in milliseconds: a log may be lost twice before anything that tells of the first time is offloaded.
 *
 * What was acknowledged after that and is on none of them is lost. That, and nothing less, is what losing a majority of the disks means; the result says
 * from which LSN on, and of what time the last commit is that was kept. But what a survivor has, or says that it had acknowledged, is not given up before an
 * operator who was told so has said yes (`acceptedLsn`). To him, and nobody else, logs that are damaged on a majority are lost as well.
 */
import assert from 'node:assert/strict';
import type { SafekeeperDirectory } from '../api/safekeeper-set.ts';
import type { ListedTimeline, PageserverClient, PageserverTimelineStatus } from '../api/pageserver.ts';
import { describeDamage, type RebuildDamage, type RebuiltLog } from '../api/rebuilt-logs.ts';
import { type SafekeeperAddress, SafekeeperClient, type TimelineIdentity, type WalSource } from '../api/safekeeper.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import type { TermHistory } from '../consensus/messages.ts';
import { contradiction, highestCommonPoint } from '../consensus/term-history.ts';
import { formatLsn, type Lsn, segmentStart } from '../postgres/lsn.ts';
import { toPgVersion } from '../postgres/version.ts';
import { WalBoundaryTracker } from '../postgres/wal/boundary-tracker.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import type { OffloadedName } from '../safekeeper/offloaded-segment.ts';
import type { OffloadedWal } from '../safekeeper/offloaded-wal.ts';
import { offloadedOrigin, safekeeperOrigin } from '../safekeeper/sound-wal.ts';
import { type OffloadedEnd, planRebuild, type RebuildPlan, type SafekeeperView } from './rebuild-plan.ts';
import { checkSurvivor, commitTimeMs } from './survivor-check.ts';

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

const LOST: SafekeeperView = { kind: 'absent' };
const UPLOAD_WAIT_MS = 30_000;
/** After which a pageserver that has uploaded nothing at all is taken for one that does not. */
const FIRST_UPLOAD_WAIT_MS = 3_000;
const POLL_MS = 200;
/** To read all of a survivor's log. */
const CHECK_TIMEOUT_MS = 10 * 60_000;

/** What would be done, and how far everything is kept then. */
export interface PlannedRebuild extends Omit<RebuiltLog, 'atMs'> {
  /** The highest commit LSN that the pageserver was told of, or `lostLsn`; what is between keptLsn and there is lost. */
  readonly heardLsn: Lsn | undefined;
}

interface Decision {
  readonly plan: Extract<RebuildPlan, { kind: 'rebuild' }>;
  readonly offloaded: OffloadedEnd | undefined;
  /** Whose log is copied, first, and who else has a part of it. */
  readonly sources: readonly WalSource[];
  readonly damage: readonly RebuildDamage[];
  /** Of the last commit in what was read of the survivor. */
  readonly lastCommitMs: number | undefined;
}

interface Look {
  readonly timeline: TimelineIdentity;
  readonly members: readonly Member[];
  readonly views: readonly SafekeeperView[];
  /** By an operator: see planRebuild. */
  readonly isAsked: boolean;
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
    const found = await this.#look(timelineId, lost, true);
    if (found === undefined) return undefined;
    const status = await this.#options.pageserver.timelineStatus(timelineId);
    const decision = await this.#decide(found, status);
    const { commitLsn = 0 } = status;
    const { lostLsn = 0 } = decision.plan;
    const heardLsn = Math.max(commitLsn, lostLsn);
    return { ...(await this.#result(found, decision)), heardLsn: heardLsn === 0 ? undefined : heardLsn };
  }

  /**
   * Rebuilds the timeline's log when a quorum has lost it; undefined when it has not. Throws `unavailable` when it cannot be told, naming who is silent; `conflict`
   * when less would be kept than the survivors had acknowledged and nobody has accepted it, or less than was accepted.
   */
  async rebuild(timelineId: string, acceptedLsn?: Lsn): Promise<RebuiltLog | undefined> {
    const { log, safekeepers: directory } = this.#options;
    const found = await this.#look(timelineId, new Set(), acceptedLsn !== undefined);
    if (found === undefined) return undefined;
    const { timeline, members, views } = found;
    const decision = await this.#decide(found, await this.#madeDurable(timelineId));
    const { plan, sources, damage } = decision;
    const { targets, source, copied, keptLsn, logStartLsn } = plan;
    assertAccepted(timelineId, decision, acceptedLsn);
    const { configuration } = directory.current;
    const state =
      plan.state.configuration.version > configuration.version ? plan.state : { ...plan.state, configuration };
    const safekeepers = targets.map((index) => members[index]!.nodeId);
    log.warn(
      { timelineId, safekeepers, source, keptLsn: formatLsn(keptLsn), term: state.term, damage },
      'a majority of the safekeepers has lost this log: it is rebuilt',
    );
    for (const index of targets) {
      await members[index]!.client.rebuildTimeline({
        timeline: identityOf(timeline),
        logStartLsn,
        state,
        replace: views[index]!.kind === 'present',
        ...(copied === undefined ? {} : { copy: { endLsn: keptLsn, sources } }),
      });
    }
    return { ...(await this.#result(found, decision)), atMs: Date.now() };
  }

  async #result({ timeline, members }: Look, decision: Decision): Promise<Omit<RebuiltLog, 'atMs'>> {
    const { plan, damage } = decision;
    const { source, keptLsn, targets, lostLsn } = plan;
    return {
      timelineId: timeline.timelineId,
      keptLsn,
      lastCommitMs: await this.#lastCommit(timeline.timelineId, decision),
      source,
      safekeepers: targets.map((index) => members[index]!.nodeId),
      ...(lostLsn === undefined ? {} : { lostLsn }),
      ...(damage.length === 0 ? {} : { damage }),
    };
  }

  /** Undefined when no quorum has lost it. */
  async #look(timelineId: string, lost: ReadonlySet<number>, isAsked: boolean): Promise<Look | undefined> {
    const { pageserver, wal, safekeepers } = this.#options;
    if (safekeepers.current.configuration.newMembers !== undefined)
      throw new StrataError('unavailable', 'the safekeepers are being changed');
    const members = this.#members;
    const timeline = await pageserver.timelineIdentity(timelineId);
    if (!timeline.hasWal && !(await wal.hasAny(timeline))) return undefined;
    const views = await Promise.all(
      members.map(async (member) => (lost.has(member.nodeId) ? LOST : viewOf(member, timeline, isAsked))),
    );
    const plan = planRebuild(views, timeline, timeline.startLsn, undefined, Date.now(), undefined, isAsked);
    if (plan.kind === 'none') return undefined;
    if (plan.kind === 'wait') throw silentError(timelineId, views, members);
    return { timeline, members, views, isAsked };
  }

  async #decide({ timeline, views, members, isAsked }: Look, status: PageserverTimelineStatus): Promise<Decision> {
    const { wal, token } = this.#options;
    const { lastRecordLsn, lastRecordStartLsn } = status;
    const offloaded = await findOffloadedEnd(wal, timeline, lastRecordLsn);
    const nowMs = Date.now();
    const first = planRebuild(views, timeline, lastRecordLsn, offloaded, nowMs, undefined, isAsked);
    assert(first.kind === 'rebuild', 'the views are those that asked for it');
    const best = first.copied === undefined ? undefined : views[first.copied]!;
    if (best?.kind !== 'present') return { plan: first, offloaded, sources: [], damage: [], lastCommitMs: undefined };

    const signal = AbortSignal.timeout(CHECK_TIMEOUT_MS);
    const sources = sourcesOf(views, members, first.copied!);
    const { tenantId, timelineId } = timeline;
    const check = await checkSurvivor({
      timeline,
      origins: [
        ...sources.map(({ nodeId, address, endLsn }) =>
          safekeeperOrigin(`safekeeper ${nodeId}`, timeline, { address, token }, endLsn, signal),
        ),
        offloadedOrigin(timeline, wal),
      ],
      resumePoint: () => members[first.copied!]!.client.resumePoint(tenantId, timelineId),
      localStartLsn: best.status.localStartLsn,
      flushLsn: best.status.flushLsn,
      ingested: { endLsn: lastRecordLsn, startLsn: lastRecordStartLsn },
      offloadedLsn: offloaded?.endLsn,
    });
    const { damage, soundLsn, lastCommitMs } = check;
    if (offloaded !== undefined && soundLsn < offloaded.endLsn) {
      // What is in the store is never written again, and would be taken for what comes in its place.
      const where = damage.map(describeDamage).join('; ');
      throw new StrataError(
        'unavailable',
        `timeline ${timelineId} is sound up to ${formatLsn(soundLsn)} only, and offloaded up to ${formatLsn(offloaded.endLsn)}: bring back what is damaged. ${where}`,
      );
    }
    const plan = planRebuild(views, timeline, lastRecordLsn, offloaded, nowMs, check, isAsked);
    assert(plan.kind === 'rebuild', 'the views are those that asked for it');
    return { plan, offloaded, sources, damage, lastCommitMs };
  }

  /** Of what is kept, as far as it is known. */
  async #lastCommit(timelineId: string, { plan, offloaded, lastCommitMs }: Decision): Promise<number | undefined> {
    const { source, keptLsn } = plan;
    if (source === 'object store' && offloaded?.lastCommitMs !== undefined) return offloaded.lastCommitMs;
    if (source === 'another safekeeper' && lastCommitMs !== undefined) return lastCommitMs;
    const { pageserver } = this.#options;
    try {
      const { lastRecordLsn } = await pageserver.timelineStatus(timelineId);
      const timestampUs = await pageserver.timestampOfLsn(timelineId, Math.min(keptLsn, lastRecordLsn));
      // After what the pageserver has, no commit was found.
      const isKnown = lastRecordLsn >= keptLsn || source === 'another safekeeper';
      return timestampUs === undefined || !isKnown ? undefined : Math.floor(timestampUs / 1000);
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
    lastMs = commitTimeMs(record, version) ?? lastMs;
  }
  return lastMs;
}

/** The best survivor, and those that have a part of the same log. */
function sourcesOf(views: readonly SafekeeperView[], members: readonly Member[], copied: number): WalSource[] {
  const best = views[copied]!;
  assert(best.kind === 'present', 'who is copied has it');
  const { history, flushLsn } = best.status;
  const source = (index: number, endLsn: Lsn): WalSource => {
    const { nodeId, address } = members[index]!;
    return { nodeId, address, endLsn };
  };
  const others = views.flatMap((view, index) => {
    if (view.kind !== 'present' || index === copied) return [];
    if (contradiction(history, view.status.history) !== undefined) return [];
    return [source(index, Math.min(flushLsn, highestCommonPoint(history, view.status)))];
  });
  return [source(copied, flushLsn), ...others];
}

/** What survivors have, or had acknowledged, is not given up without a word. */
function assertAccepted(timelineId: string, { plan, damage }: Decision, acceptedLsn: Lsn | undefined): void {
  const { keptLsn, lostLsn } = plan;
  const kept = formatLsn(keptLsn);
  if (lostLsn !== undefined && acceptedLsn === undefined) {
    const where = damage.filter(({ remedy }) => remedy === 'none').map(describeDamage);
    throw new StrataError(
      'conflict',
      `timeline ${timelineId} can be had up to ${kept} only, and may have been acknowledged up to ${formatLsn(lostLsn)}${where.map((each) => `; ${each}`).join('')}: bring the disk back, or see "strata safekeepers rebuild", which says for each branch what would be kept`,
    );
  }
  if (acceptedLsn !== undefined && keptLsn < acceptedLsn) {
    throw new StrataError(
      'conflict',
      `timeline ${timelineId} could be kept up to ${kept} only, not ${formatLsn(acceptedLsn)} as was said before: ask again what would be kept`,
    );
  }
}

/** One that has the log and cannot read it is silent, as it may yet be mended; to an operator who asks, it is lost when it is damaged. */
async function viewOf(
  { client }: Member,
  { tenantId, timelineId }: TimelineIdentity,
  isAsked: boolean,
): Promise<SafekeeperView> {
  try {
    return { kind: 'present', status: await client.status(tenantId, timelineId) };
  } catch (error) {
    const { code, message } = toStrataError(error);
    if (code === 'not-found') return LOST;
    const logs = isAsked ? await client.walStatus().catch(() => []) : [];
    const isDamaged = logs.some((each) => each.timelineId === timelineId && each.damage !== undefined);
    return isDamaged ? LOST : { kind: 'silent', reason: message };
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
