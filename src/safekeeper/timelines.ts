/**
 * All timelines of a safekeeper: `<data dir>/<tenant id>/<timeline id>/`, each with a control file and WAL segments.
 *
 * A timeline exists once its control file does; a folder without one is the rest of an unfinished creation and is removed at start, unless a flush mark says
 * that there was one. A deleted timeline leaves a tombstone, so that a late proposer cannot bring it back empty.
 *
 * A timeline whose files are damaged (their checksums say so) is not served, and the others are. Its leader finds it absent and gives it anew, as after the loss
 * of a disk; what is here is put aside then. Without a leader, whom others have elected, nothing happens to it: it may hold what nobody else has.
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdir, readdir, rename, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import type { Logger } from '../base/log.ts';
import { StrataError } from '../base/errors.ts';
import type { MendRequest, RebuildRequest, TimelineIdentity } from '../api/safekeeper.ts';
import type { PageserverFeedback, TimelineProgress, TimelineWalStatus } from '../api/safekeeper-protocol.ts';
import { type AcceptorState, blankState } from '../consensus/acceptor.ts';
import { type Configuration, NO_CONFIGURATION } from '../consensus/configuration.ts';
import { lastLogTerm } from '../consensus/term-history.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import { forEachLimited } from '../base/all-done.ts';
import { syncDirectory } from '../base/durable-file.ts';
import { CONTROL_FILE_NAME, type ControlFile, readControlFile, writeControlFile } from './control-file.ts';
import { FLUSH_MARK_NAME, FlushMark } from './flush-mark.ts';
import { KeptWal } from './kept-wal.ts';
import { mendWal } from './mended-wal.ts';
import type { OffloadedWal } from './offloaded-wal.ts';
import type { Offloader } from './offloader.ts';
import { copyWal, fetchWal } from './rebuilt-wal.ts';
import { Timeline } from './timeline.ts';
import { assertSameIdentity, checkIdentity, checkState, isId } from './timeline-checks.ts';
import { EXTENT_FILE_NAME, readWalExtent, type WalExtent, wholeExtent, writeWalExtent } from './wal-extent.ts';
import { WalStore } from './wal-store.ts';

/** How long a commit LSN may be newer than the control file says, while commits go on. */
const SAVE_DELAY_MS = 5_000;
const LOAD_CONCURRENCY = 16;
/** Of the folder of a log that is being made in the place of one that is here. */
const REPLACEMENT_SUFFIX = '.replacement';

/** Where WAL goes beside this disk. */
export interface Offloading {
  readonly wal: OffloadedWal;
  readonly offloader: Offloader;
}

export class Timelines {
  /** Of this start of the safekeeper, 16 hex digits: who was told that a timeline is not here makes it in this life of it or not at all. */
  readonly incarnation = randomBytes(8).toString('hex');
  readonly #nodeId: number;
  readonly #dataDir: string;
  readonly #log: Logger;
  readonly #offloading: Offloading | undefined;
  readonly #onLost: (what: string) => void;
  readonly #timelines = new Map<string, Timeline>();
  readonly #byId = new Map<string, Timeline>();
  readonly #tombstones = new Set<string>();
  /** What is wrong with the files of those that could not be loaded. */
  readonly #damaged = new Map<string, string>();
  readonly #creations = new Map<string, Promise<Timeline>>();
  readonly #watchers = new Set<(timeline: Timeline) => void>();
  readonly #unsaved = new Set<Timeline>();
  /** The newest that this safekeeper was told, whichever of its timelines know it. */
  #configuration = NO_CONFIGURATION;
  #configuring: Promise<void> = Promise.resolve();
  #saveTimer: NodeJS.Timeout | undefined;

  private constructor(
    nodeId: number,
    dataDir: string,
    log: Logger,
    offloading: Offloading | undefined,
    onLost: (what: string) => void,
  ) {
    this.#nodeId = nodeId;
    this.#dataDir = dataDir;
    this.#log = log;
    this.#offloading = offloading;
    this.#onLost = onLost;
  }

  /** `onLost` is told what was on the disk and is gone from there. */
  static async load(
    nodeId: number,
    dataDir: string,
    log: Logger,
    offloading?: Offloading,
    onLost: (what: string) => void = () => {},
  ): Promise<Timelines> {
    const timelines = new Timelines(nodeId, dataDir, log, offloading, onLost);
    await makeDirectory(dataDir);
    const control = await readControlFile(dataDir);
    if (control?.kind === 'safekeeper') timelines.#configuration = control.configuration;
    const found: { tenantId: string; timelineId: string }[] = [];
    for (const tenantId of (await readdir(dataDir)).filter(isId)) {
      await finishReplacements(join(dataDir, tenantId));
      for (const timelineId of (await readdir(join(dataDir, tenantId))).filter(isId))
        found.push({ tenantId, timelineId });
    }
    await forEachLimited(found, LOAD_CONCURRENCY, ({ tenantId, timelineId }) => timelines.#load(tenantId, timelineId));
    return timelines;
  }

  /** Throws `not-found`. */
  get(tenantId: string, timelineId: string): Timeline {
    const key = keyOf(tenantId, timelineId);
    const timeline = this.#timelines.get(key);
    if (timeline !== undefined) return timeline;
    this.#assertNotDamaged(key);
    throw new StrataError('not-found', `this safekeeper has no timeline ${timelineId} of tenant ${tenantId}`);
  }

  /** Whatever its tenant. Throws `not-found`. */
  getById(timelineId: string): Timeline {
    const timeline = this.#byId.get(timelineId);
    if (timeline !== undefined) return timeline;
    for (const key of this.#damaged.keys()) if (key.endsWith(`/${timelineId}`)) this.#assertNotDamaged(key);
    throw new StrataError('not-found', `this safekeeper has no timeline ${timelineId}`);
  }

  #assertNotDamaged(key: string): void {
    const damage = this.#damaged.get(key);
    if (damage !== undefined) throw new StrataError('unavailable', `the log of timeline ${key} is damaged: ${damage}`);
  }

  /** Undefined when it is not here, or damaged. Throws `not-found` when it was deleted, `conflict` when it is another than it is said to be. */
  async find(identity: TimelineIdentity): Promise<Timeline | undefined> {
    checkIdentity(identity);
    const key = keyOf(identity.tenantId, identity.timelineId);
    const known = this.#timelines.get(key) ?? (await this.#creations.get(key));
    if (known !== undefined) {
      assertSameIdentity(known.identity, identity);
      return known.isDamaged ? undefined : known;
    }
    this.#assertNotDeleted(key);
    return undefined;
  }

  #assertNotDeleted(key: string): void {
    if (this.#tombstones.has(key)) throw new StrataError('not-found', `timeline ${key} was deleted`);
  }

  /** The timeline, made now from `state`, which is that of an unused log as a rule, when it is not here. Throws as `find` does. */
  async getOrCreate(identity: TimelineIdentity, state = blankState(identity.startLsn)): Promise<Timeline> {
    const known = await this.find(identity);
    if (known !== undefined) return known;
    checkState(identity, state);
    const { version } = this.#configuration;
    if (state.configuration.version < version) {
      const told = `configuration ${state.configuration.version}`;
      throw new StrataError('conflict', `this safekeeper knows configuration ${version}, newer than ${told}`);
    }
    const key = keyOf(identity.tenantId, identity.timelineId);
    const other = this.#creations.get(key); // made meanwhile
    if (other !== undefined) return other;
    const here = this.#timelines.get(key);
    if (here?.isDamaged === false) return here;
    const isDamaged = here !== undefined || this.#damaged.has(key);
    if (isDamaged && state.votesFrom === undefined) {
      const { timelineId } = identity;
      throw new StrataError(
        'unavailable',
        `what is here of the log of timeline ${timelineId} is damaged, and is given up only when others have elected a leader without it`,
      );
    }
    // One that was lost and begins later: nobody needs from it what is before.
    const makeWal = async (directory: string): Promise<WalExtent> => {
      await new WalStore(directory, identity, state.commitLsn).create();
      return wholeExtent(state.commitLsn);
    };
    const create = async (): Promise<Timeline> => {
      if (isDamaged) await this.#putAside(identity);
      return this.#create(identity, state, makeWal, true);
    };
    const creation = create().finally(() => this.#creations.delete(key));
    this.#creations.set(key, creation);
    return creation;
  }

  async delete(tenantId: string, timelineId: string): Promise<void> {
    if (!isId(tenantId) || !isId(timelineId)) throw new StrataError('bad-request', 'ids are 32 lower-case hex digits');
    const key = keyOf(tenantId, timelineId);
    // From here on none is made of that name.
    this.#tombstones.add(key);
    const timeline = this.#timelines.get(key) ?? (await this.#creations.get(key)?.catch(() => undefined));
    this.#timelines.delete(key);
    this.#damaged.delete(key);
    this.#byId.delete(timelineId);
    if (timeline === undefined) {
      const directory = join(this.#dataDir, tenantId, timelineId);
      await makeDirectory(directory);
      await writeControlFile(directory, { kind: 'deleted', tenantId, timelineId });
      // Of a deletion that failed, or of one that was damaged.
      await removeDeleted(directory);
      await this.#offloading?.wal.removeBefore({ tenantId, timelineId }, Infinity);
      return;
    }
    this.#unsaved.delete(timeline);
    this.#offloading?.offloader.forget(timeline);
    await timeline.delete();
    // An object that another safekeeper puts after this is found by whoever deletes there.
    await this.#offloading?.wal.removeBefore({ tenantId, timelineId }, Infinity);
    this.#log.info({ tenantId, timelineId }, 'timeline deleted');
  }

  get configuration(): Configuration {
    return this.#configuration;
  }

  /** Durable when it resolves. From then on no timeline is made under an older configuration. */
  async configure(configuration: Configuration): Promise<void> {
    this.#configuring = this.#configuring
      .catch(() => {})
      .then(async () => {
        if (configuration.version <= this.#configuration.version) return;
        await writeControlFile(this.#dataDir, { kind: 'safekeeper', configuration });
        this.#configuration = configuration;
      });
    await this.#configuring;
  }

  /** What each timeline's WAL takes here, and what waits. */
  walStatus(): TimelineWalStatus[] {
    const known = Array.from(this.#timelines.values(), (timeline): TimelineWalStatus => {
      const { kept, damage, failure } = timeline;
      return {
        ...progressOf(timeline),
        localStartLsn: kept.localStartLsn,
        offloadedLsn: kept.offloadedLsn,
        isOffloadFailing: this.#offloading?.offloader.isFailing(timeline) ?? false,
        ...(kept.feedback === undefined ? {} : { feedback: kept.feedback }),
        ...(damage !== undefined ? { damage } : failure === undefined ? {} : { failure: failure.message }),
      };
    });
    const lost = Array.from(this.#damaged, ([key, damage]): TimelineWalStatus => {
      const [tenantId, timelineId] = key.split('/') as [string, string];
      const unknown = { commitLsn: 0, flushLsn: 0, localStartLsn: 0, offloadedLsn: 0, isOffloadFailing: true };
      return { tenantId, timelineId, ...unknown, damage };
    });
    return [...known, ...lost];
  }

  /** Has what is on this disk brought to the object store again where it is not there any more. */
  async offloadAgain(tenantId: string, timelineId: string): Promise<void> {
    const timeline = this.get(tenantId, timelineId);
    await timeline.open();
    timeline.kept.forgetOffloaded();
    await timeline.kept.save();
    this.#offloading?.offloader.notice(timeline);
  }

  /** Looks at the committed WAL on this disk and has the others mend it (mended-wal.ts); how many places were. `token` opens them. */
  async mend({ tenantId, timelineId, sources }: MendRequest, token: string): Promise<number> {
    const timeline = this.get(tenantId, timelineId);
    timeline.throwIfFailed();
    const key = keyOf(tenantId, timelineId);
    const isHere = (): boolean => this.#timelines.get(key) === timeline && !timeline.isFailed;
    const onDamage = (lsn: Lsn, reason: string): void =>
      this.#log.error(
        { timelineId, lsn: formatLsn(lsn), reason },
        'committed WAL on this disk is damaged: it is mended from the others. See to the disk',
      );
    return mendWal({ timeline, sources, token, isHere, onDamage });
  }

  /** Without those that are damaged. */
  list(): TimelineProgress[] {
    return Array.from(this.#timelines.values())
      .filter((timeline) => !timeline.isDamaged)
      .map(progressOf);
  }

  /** What a pageserver tells. Timelines that are not here are left out. */
  feedback(entries: readonly PageserverFeedback[]): void {
    for (const entry of entries) {
      const timeline = this.#byId.get(entry.timelineId);
      if (timeline === undefined) continue;
      timeline.told(entry);
      this.#offloading?.offloader.notice(timeline);
    }
  }

  /** Calls back when a timeline is made or moves, until the returned function is called. */
  watch(callback: (timeline: Timeline) => void): () => void {
    this.#watchers.add(callback);
    return () => this.#watchers.delete(callback);
  }

  /** Nobody is connected any more. */
  async close(): Promise<void> {
    clearTimeout(this.#saveTimer);
    for (const timeline of this.#timelines.values()) await timeline.close();
  }

  async #load(tenantId: string, timelineId: string): Promise<void> {
    const directory = join(this.#dataDir, tenantId, timelineId);
    const key = keyOf(tenantId, timelineId);
    let control: ControlFile | undefined;
    let extent: WalExtent | undefined;
    try {
      control = await readControlFile(directory);
      extent = await readWalExtent(directory);
      if (control === undefined && (await new FlushMark(directory, () => {}).read()) !== undefined)
        throw new Error(`${directory} has WAL that was acknowledged, and no ${CONTROL_FILE_NAME}`);
      const named = control === undefined ? key : nameIn(control);
      if (named !== key) throw new Error(`${directory} has the ${CONTROL_FILE_NAME} of ${named}: was it moved here?`);
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      this.#log.error(
        { tenantId, timelineId, reason },
        'a log is damaged: it is not served before others have healed it',
      );
      this.#damaged.set(key, reason);
      return;
    }
    if (control === undefined) {
      await rm(directory, { recursive: true });
    } else if (control.kind !== 'timeline') {
      this.#tombstones.add(key);
      await removeDeleted(directory);
    } else {
      const { identity, acceptor } = control;
      const timeline = this.#add(directory, identity, acceptor, extent ?? wholeExtent(identity.startLsn), false);
      this.#offloading?.offloader.notice(timeline);
    }
  }

  /** Who thinks that a log was never used may be wrong when a majority has lost it and the pageserver had not got far: the store knows better. */
  async assertUnused(identity: TimelineIdentity, { votesFrom }: AcceptorState): Promise<void> {
    if (votesFrom !== undefined || !((await this.#offloading?.wal.hasAny(identity)) ?? false)) return;
    throw new StrataError(
      'unavailable',
      `the log of timeline ${identity.timelineId} is not here, but WAL of it is in the object store: it has to be rebuilt`,
    );
  }

  /**
   * Makes a log anew that was lost with a quorum of its disks: its last segment from the object store, and a state from which the others can be elected
   * with; or all that others, or the log that is here, still have of it. A copy signs for nothing but itself: what it has flushed may have been acknowledged.
   * What was here under that name stays in a folder beside it. `token` opens the safekeepers.
   */
  async rebuild(
    { timeline: identity, logStartLsn, state, copy, replace }: RebuildRequest,
    token: string,
  ): Promise<void> {
    const known = await this.find(identity);
    const { tenantId, timelineId } = identity;
    const key = keyOf(tenantId, timelineId);
    if (known !== undefined && !replace) {
      throw new StrataError('conflict', `this safekeeper has timeline ${timelineId}`);
    }
    if (this.#creations.has(key)) throw new StrataError('locked', `timeline ${timelineId} is being made here`);
    const endLsn = copy?.endLsn ?? state.commitLsn;
    const end = { lastLogTerm: lastLogTerm(state.history, endLsn), flushLsn: endLsn };
    const wal = this.#offloading?.wal;
    const makeWal = (directory: string): Promise<WalExtent> =>
      copy === undefined
        ? fetchWal(directory, identity, logStartLsn, endLsn, wal)
        : copyWal(directory, identity, logStartLsn, end, { safekeepers: copy.sources, token, wal }, this.#log);
    const isHere = this.#timelines.has(key) || this.#damaged.has(key);
    const isEnd = copy === undefined;
    const creation = (
      isHere ? this.#replace(identity, state, makeWal, isEnd) : this.#create(identity, state, makeWal, isEnd)
    ).finally(() => this.#creations.delete(key));
    this.#creations.set(key, creation);
    await creation;
    this.#log.warn({ timelineId, endLsn: formatLsn(endLsn), term: state.term }, 'the log was rebuilt');
  }

  /** What is here serves until the new one is whole: a crash leaves the one or the other (finishReplacements). */
  async #replace(
    identity: TimelineIdentity,
    acceptor: AcceptorState,
    makeWal: (directory: string) => Promise<WalExtent>,
    isEnd: boolean,
  ): Promise<Timeline> {
    const directory = join(this.#dataDir, identity.tenantId, identity.timelineId);
    const made = `${directory}${REPLACEMENT_SUFFIX}`;
    const extent = await this.#make(made, identity, acceptor, makeWal);
    this.#assertNotDeleted(keyOf(identity.tenantId, identity.timelineId)); // Who deletes it from here on waits for this one.
    await this.#putAside(identity);
    await rename(made, directory);
    await syncDirectory(dirname(directory));
    return this.#made(directory, identity, acceptor, extent, isEnd);
  }

  /** Keeps its files, in a folder beside. */
  async #putAside({ tenantId, timelineId }: TimelineIdentity): Promise<void> {
    const key = keyOf(tenantId, timelineId);
    const timeline = this.#timelines.get(key);
    this.#timelines.delete(key);
    this.#damaged.delete(key);
    this.#byId.delete(timelineId);
    if (timeline !== undefined) {
      this.#unsaved.delete(timeline);
      this.#offloading?.offloader.forget(timeline);
      await timeline.retire();
    }
    const directory = join(this.#dataDir, tenantId, timelineId);
    await rename(directory, `${directory}.aside-${Date.now()}`);
    await syncDirectory(join(this.#dataDir, tenantId));
  }

  /** `isEnd`: the log ends at its commit LSN. Otherwise its end is looked for when it is opened. */
  async #create(
    identity: TimelineIdentity,
    acceptor: AcceptorState,
    makeWal: (directory: string) => Promise<WalExtent>,
    isEnd: boolean,
  ): Promise<Timeline> {
    const { tenantId, timelineId } = identity;
    this.#assertNotDeleted(keyOf(tenantId, timelineId));
    const directory = join(this.#dataDir, tenantId, timelineId);
    assert((await readControlFile(directory)) === undefined, 'a log is made where none is');
    const extent = await this.#make(directory, identity, acceptor, makeWal);
    return this.#made(directory, identity, acceptor, extent, isEnd);
  }

  /** All files of a log; the control file, with which it exists, last. */
  async #make(
    directory: string,
    identity: TimelineIdentity,
    acceptor: AcceptorState,
    makeWal: (directory: string) => Promise<WalExtent>,
  ): Promise<WalExtent> {
    // What an attempt that failed has left would follow the end of this log.
    await rm(directory, { recursive: true, force: true });
    await makeDirectory(directory);
    const extent = await makeWal(directory);
    if (extent.localStartLsn !== identity.startLsn) await writeWalExtent(directory, extent);
    await writeControlFile(directory, { kind: 'timeline', identity, acceptor });
    return extent;
  }

  #made(
    directory: string,
    identity: TimelineIdentity,
    acceptor: AcceptorState,
    extent: WalExtent,
    isEnd: boolean,
  ): Timeline {
    const { tenantId, timelineId, startLsn } = identity;
    const timeline = this.#add(directory, identity, acceptor, extent, isEnd);
    this.#log.info({ tenantId, timelineId, startLsn: formatLsn(startLsn) }, 'timeline created');
    for (const callback of this.#watchers) callback(timeline);
    return timeline;
  }

  #add(
    directory: string,
    identity: TimelineIdentity,
    state: AcceptorState,
    extent: WalExtent,
    isNew: boolean,
  ): Timeline {
    const timeline: Timeline = new Timeline({
      nodeId: this.#nodeId,
      directory,
      identity,
      state,
      kept: new KeptWal(directory, extent, () => this.#maybeTrim(timeline)),
      offloadedWal: this.#offloading?.wal,
      isNew,
      log: this.#log,
      onProgress: (moved) => this.#progressed(moved),
      onLost: () => this.#onLost(directory),
    });
    this.#timelines.set(keyOf(identity.tenantId, identity.timelineId), timeline);
    this.#byId.set(identity.timelineId, timeline);
    return timeline;
  }

  #progressed(timeline: Timeline): void {
    for (const callback of this.#watchers) callback(timeline);
    this.#unsaved.add(timeline);
    this.#offloading?.offloader.notice(timeline);
    this.#saveTimer ??= setTimeout(() => void this.#saveAll(), SAVE_DELAY_MS);
  }

  /** Unless it is gone meanwhile. */
  #maybeTrim(timeline: Timeline): void {
    if (this.#byId.get(timeline.identity.timelineId) === timeline) this.#offloading?.offloader.notice(timeline);
  }

  async #saveAll(): Promise<void> {
    const timelines = [...this.#unsaved];
    this.#unsaved.clear();
    for (const timeline of timelines) {
      await timeline.save();
      this.#maybeTrim(timeline); // What may be removed from the disk lies below what was saved.
    }
    this.#saveTimer = undefined;
    if (this.#unsaved.size > 0) this.#saveTimer = setTimeout(() => void this.#saveAll(), SAVE_DELAY_MS);
  }
}

export function progressOf(timeline: Timeline): TimelineProgress {
  const { tenantId, timelineId } = timeline.identity;
  return { tenantId, timelineId, commitLsn: timeline.commitLsn, flushLsn: timeline.flushLsn };
}

function nameIn(control: ControlFile): string {
  if (control.kind === 'safekeeper') return 'the safekeeper itself';
  const { tenantId, timelineId } = control.kind === 'timeline' ? control.identity : control;
  return keyOf(tenantId, timelineId);
}

function keyOf(tenantId: string, timelineId: string): string {
  return `${tenantId}/${timelineId}`;
}

/** A log that was made in the place of another, which has been put aside, takes it; one that is not whole yet, or came too early, goes. */
async function finishReplacements(tenantDirectory: string): Promise<void> {
  const names = await readdir(tenantDirectory);
  if (!names.some((name) => name.endsWith(REPLACEMENT_SUFFIX))) return;
  for (const name of names.filter((each) => each.endsWith(REPLACEMENT_SUFFIX))) {
    const [made, timelineId] = [join(tenantDirectory, name), name.slice(0, -REPLACEMENT_SUFFIX.length)];
    const isWhole = (await readControlFile(made).catch(() => undefined)) !== undefined;
    if (isWhole && !names.includes(timelineId)) await rename(made, join(tenantDirectory, timelineId));
    else await rm(made, { recursive: true });
  }
  await syncDirectory(tenantDirectory);
}

/** What a deletion that did not finish has left beside the tombstone. */
async function removeDeleted(directory: string): Promise<void> {
  for (const name of await readdir(directory)) {
    if (/^[0-9A-F]{24}(\.cut.*)?$/.test(name) || name === FLUSH_MARK_NAME || name.startsWith(EXTENT_FILE_NAME))
      await rm(join(directory, name));
  }
}

/** Like mkdir -p, durable when it resolves. */
async function makeDirectory(directory: string): Promise<void> {
  const first = await mkdir(directory, { recursive: true, mode: 0o700 });
  if (first === undefined) return;
  for (let made = directory; made.length >= first.length; made = dirname(made)) await syncDirectory(dirname(made));
}
