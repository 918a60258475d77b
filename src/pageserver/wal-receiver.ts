/**
 * Pulls committed WAL from the safekeepers and has it ingested.
 *
 * Every safekeeper is watched for commit LSNs. A timeline whose commit LSN is beyond what it has ingested gets a stream from one of the
 * safekeepers, which is closed when nothing has come for a while. A stream that breaks, or falls behind what another safekeeper has
 * committed, is replaced by one from another safekeeper.
 *
 * A record that cannot be taken stops its timeline and no other: the error is logged once, the timeline's status shows it, and who waits
 * for an LSN of it is told. WAL that is damaged is asked of the other safekeepers first.
 *
 * Invariant: WAL is taken from one stream at a time for each timeline, from where the last record ended.
 */

import { setImmediate as yieldToOthers, setTimeout as sleep } from 'node:timers/promises';
import { readWal, watchCommits } from '../api/safekeeper.ts';
import type { PageserverFeedback, ReadWalOptions, SafekeeperAddress, WalChunk } from '../api/safekeeper.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { formatLsn } from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { WalError } from '../postgres/wal/error.ts';
import { WalReader } from '../postgres/wal/reader.ts';
import { Ingest } from './ingest/ingest.ts';
import { LayerDamagedError } from './layers/block.ts';
import type { Timeline } from './timeline.ts';
import type { Timelines } from './timelines.ts';

export interface WalReceiverOptions {
  readonly safekeepers: readonly SafekeeperAddress[];
  /** Scope `platform`. */
  readonly token: string;
  readonly timelines: Timelines;
  readonly log: Logger;
  /** Makes a damaged layer whole that ingest has met. */
  readonly repair?: (damage: LayerDamagedError) => Promise<void>;
  readonly idleMs?: number;
}

const IDLE_MS = 30_000;
const RETRY_DELAY_MIN_MS = 20;
const RETRY_DELAY_MAX_MS = 2_000;
const LAG_CHECK_MS = 500;
const LAG_MAX_MS = 2_000;
/** How often safekeepers are told how far timelines have got that have moved. */
const FEEDBACK_MS = 250;
const FEEDBACK_BATCH = 10_000;
const ANCESTOR_WAIT_MS = 60_000;
const SLICE_MS = 2;
/** Layers that ingest may find damaged, one after the other, without getting on. */
const REPAIRS_MAX = 16;

/** What is known of one timeline's WAL, whether it is on this pageserver or not. */
interface Reception {
  readonly timelineId: string;
  /** By safekeeper, the highest that it told of. */
  readonly commitLsns: Lsn[];
  /** How far WAL was received; it may lie past the last whole record. */
  receivedLsn: Lsn;
  ingest: Ingest | undefined;
  isRunning: boolean;
  /** The stream that is open now. */
  stream: { readonly safekeeper: number; readonly aborter: AbortController; lastChunkMs: number } | undefined;
  /** Safekeepers whose WAL did not add up since the last good record. */
  readonly damagedAt: Map<number, WalError>;
  /** Added to the choice of a safekeeper, so that a failure leads to another. */
  rotation: number;
}

/** A safekeeper that is told how far timelines have got. */
interface Told {
  readonly tell: (entries: readonly PageserverFeedback[]) => void;
  /** It was just connected: it has to be told everything. */
  isNew: boolean;
}

export class WalReceiver {
  readonly #options: WalReceiverOptions;
  readonly #receptions = new Map<string, Reception>();
  /** By safekeeper; undefined while it is not connected. */
  readonly #told: (Told | undefined)[] = [];
  /** All that there ever were; what is gone keeps its place. */
  readonly #safekeepers: { readonly address: SafekeeperAddress; readonly gone: AbortController }[] = [];
  readonly #stopped = new AbortController();
  readonly #running = new Set<Promise<void>>();

  constructor(options: WalReceiverOptions) {
    this.#options = options;
    for (const address of options.safekeepers) this.#safekeepers.push({ address, gone: new AbortController() });
  }

  start(): void {
    this.#safekeepers.forEach((_, safekeeper) => this.#track(this.#watch(safekeeper)));
    this.#track(this.#watchLag());
    this.#track(this.#tellAll());
  }

  get safekeepers(): readonly SafekeeperAddress[] {
    return this.#safekeepers.filter(({ gone }) => !gone.signal.aborted).map(({ address }) => address);
  }

  /** From now on WAL comes from these. */
  setSafekeepers(addresses: readonly SafekeeperAddress[]): void {
    const isSame = (one: SafekeeperAddress, other: SafekeeperAddress): boolean =>
      one.host === other.host && one.port === other.port;
    this.#safekeepers.forEach(({ address, gone }, safekeeper) => {
      if (gone.signal.aborted || addresses.some((each) => isSame(each, address))) return;
      gone.abort();
      for (const reception of this.#receptions.values()) {
        reception.commitLsns[safekeeper] = 0;
        if (reception.stream?.safekeeper === safekeeper) reception.stream.aborter.abort();
      }
    });
    for (const address of addresses) {
      if (this.safekeepers.some((known) => isSame(known, address))) continue;
      this.#safekeepers.push({ address, gone: new AbortController() });
      for (const { commitLsns } of this.#receptions.values()) commitLsns.push(0);
      this.#track(this.#watch(this.#safekeepers.length - 1));
    }
  }

  /** Resolves when nothing is ingested any more. */
  async stop(): Promise<void> {
    this.#stopped.abort();
    await Promise.allSettled(this.#running);
  }

  /** The highest commit LSN that a safekeeper has told of. */
  commitLsn(timelineId: string): Lsn | undefined {
    const reception = this.#receptions.get(timelineId);
    return reception === undefined ? undefined : highestCommit(reception);
  }

  /** To be called when a timeline has come to be: its WAL may have been told of before. */
  timelineAdded(timelineId: string): void {
    const reception = this.#receptions.get(timelineId);
    if (reception !== undefined) this.#startIfBehind(reception);
  }

  /** To be called when a timeline is gone. */
  timelineRemoved(timelineId: string): void {
    this.#receptions.get(timelineId)?.stream?.aborter.abort();
    this.#receptions.delete(timelineId);
  }

  async #watch(safekeeper: number): Promise<void> {
    const { token, log } = this.#options;
    const { address, gone } = this.#safekeepers[safekeeper]!;
    const signal = AbortSignal.any([this.#stopped.signal, gone.signal]);
    let delayMs = RETRY_DELAY_MIN_MS;
    let wasLost = false;
    while (!signal.aborted) {
      try {
        const onConnected = (tell: Told['tell']): void => {
          this.#told[safekeeper] = { tell, isNew: true };
        };
        for await (const batch of watchCommits({ address, token, signal, onConnected })) {
          if (wasLost) log.info({ safekeeper: address }, 'safekeeper is back');
          wasLost = false;
          delayMs = RETRY_DELAY_MIN_MS;
          for (const { timelineId, commitLsn } of batch) this.#committed(safekeeper, timelineId, commitLsn);
        }
      } catch (error) {
        if (!wasLost && !gone.signal.aborted)
          log.warn({ safekeeper: address, reason: toStrataError(error).message }, 'safekeeper is lost');
        wasLost = true;
      }
      this.#told[safekeeper] = undefined;
      await pause(delayMs, signal);
      delayMs = Math.min(delayMs * 2, RETRY_DELAY_MAX_MS);
    }
  }

  #committed(safekeeper: number, timelineId: string, commitLsn: Lsn): void {
    let reception = this.#receptions.get(timelineId);
    if (reception === undefined) {
      reception = {
        timelineId,
        commitLsns: this.#safekeepers.map(() => 0),
        receivedLsn: 0,
        ingest: undefined,
        isRunning: false,
        stream: undefined,
        damagedAt: new Map(),
        rotation: parseInt(timelineId.slice(-4), 16),
      };
      this.#receptions.set(timelineId, reception);
    }
    reception.commitLsns[safekeeper] = Math.max(reception.commitLsns[safekeeper]!, commitLsn);
    this.#startIfBehind(reception);
  }

  #startIfBehind(reception: Reception): void {
    const timeline = this.#options.timelines.find(reception.timelineId);
    if (timeline === undefined || reception.isRunning || !this.#isBehind(reception, timeline)) return;
    reception.isRunning = true;
    this.#track(
      this.#receive(reception, timeline).finally(() => {
        reception.isRunning = false;
        if (!this.#stopped.signal.aborted) this.#startIfBehind(reception); // told of while it ended
      }),
    );
  }

  #isBehind(reception: Reception, timeline: Timeline): boolean {
    if (timeline.isStopped || timeline.ingestError !== undefined) return false;
    return highestCommit(reception) > Math.max(reception.receivedLsn, timeline.lastRecordLsn);
  }

  /** Until the timeline has all that is committed and nothing more came for a while. */
  async #receive(reception: Reception, timeline: Timeline): Promise<void> {
    const { log } = this.#options;
    const { timelineId } = timeline;
    const { signal } = this.#stopped;
    let delayMs = RETRY_DELAY_MIN_MS;
    let isLogged = false;
    let repairsLeft = REPAIRS_MAX;
    while (!signal.aborted && this.#isBehind(reception, timeline)) {
      const before = timeline.lastRecordLsn;
      try {
        // What ingest reads of the ancestors must be there.
        await timeline.waitLsn(timeline.lastRecordLsn, ANCESTOR_WAIT_MS, signal);
        await this.#receiveFrom(reception, timeline, choose(reception));
      } catch (error) {
        if (error instanceof IngestStopped) {
          if (timeline.isStopped) return;
          reception.rotation++;
          if (timeline.lastRecordLsn > before) repairsLeft = REPAIRS_MAX;
          if (repairsLeft-- > 0 && (await this.#isRepaired(error.reason))) continue;
          timeline.setIngestError(error.reason);
          log.error({ timelineId, lsn: formatLsn(timeline.lastRecordLsn), err: error.reason }, 'ingest has stopped');
          return;
        }
        const level = isLogged || signal.aborted ? 'debug' : 'warn';
        isLogged = true;
        log[level]({ timelineId, reason: toStrataError(error).message }, 'WAL stream was lost');
        reception.rotation++;
        if (timeline.lastRecordLsn > before) delayMs = RETRY_DELAY_MIN_MS;
        await pause(delayMs, signal);
        delayMs = Math.min(delayMs * 2, RETRY_DELAY_MAX_MS);
      }
    }
  }

  async #isRepaired(reason: Error): Promise<boolean> {
    const { repair } = this.#options;
    if (!(reason instanceof LayerDamagedError) || repair === undefined) return false;
    return repair(reason).then(
      () => true,
      () => false,
    );
  }

  async #receiveFrom(reception: Reception, timeline: Timeline, safekeeper: number): Promise<void> {
    const { token, timelines, log } = this.#options;
    const { address } = this.#safekeepers[safekeeper]!;
    const { tenantId, timelineId } = timeline;
    const fromLsn = timeline.lastRecordLsn;
    const aborter = new AbortController();
    const stream = { safekeeper, aborter, lastChunkMs: performance.now() };
    reception.stream = stream;
    reception.receivedLsn = fromLsn;
    const onStop = (): void => aborter.abort();
    this.#stopped.signal.addEventListener('abort', onStop, { once: true });
    const idleMs = this.#options.idleMs ?? IDLE_MS;
    const idle = setTimeout(() => aborter.abort(), idleMs);
    const reader = new WalReader(fromLsn, timeline.pgVersion, { prevLsn: timeline.lastRecordStartLsn });
    const { waiters } = timeline;
    const onConnected = (hurry: (lsn: Lsn) => void): void => {
      waiters.onWait = hurry;
      if (waiters.highestLsn > 0) hurry(waiters.highestLsn);
    };
    const { signal } = aborter;
    try {
      log.debug({ timelineId, safekeeper: address, fromLsn: formatLsn(fromLsn) }, 'WAL stream begins');
      for await (const chunk of readWal({ address, token, tenantId, timelineId, fromLsn, signal, onConnected })) {
        stream.lastChunkMs = performance.now();
        if (chunk.bytes.length === 0) continue;
        idle.refresh();
        reader.push(chunk.lsn, chunk.bytes);
        const ingested = this.#ingestAll(reader, reception, timeline, signal);
        if (!(await ingested.finally(() => timelines.moved(timeline)))) return;
        reception.receivedLsn = reader.pushLsn;
        reception.damagedAt.clear();
        timelines.relieveMemory();
        await timeline.writable();
        await timelines.memoryRoom(signal);
      }
    } catch (error) {
      if (!(error instanceof WalError)) throw error;
      reception.damagedAt.set(safekeeper, error);
      log.error({ timelineId, safekeeper: address, err: error }, 'WAL of a safekeeper does not add up');
      if (reception.damagedAt.size >= this.safekeepers.length) throw new IngestStopped(error);
      throw new StrataError('internal', error.message, { cause: error });
    } finally {
      clearTimeout(idle);
      waiters.onWait = undefined;
      this.#stopped.signal.removeEventListener('abort', onStop);
      reception.stream = undefined;
    }
  }

  /** Takes all whole records that were pushed; false when it was aborted before the end. */
  async #ingestAll(reader: WalReader, reception: Reception, timeline: Timeline, signal: AbortSignal): Promise<boolean> {
    let sliceStartMs = performance.now();
    const repair = (damage: LayerDamagedError): Promise<void> => this.#options.timelines.repair(damage);
    for (let record = reader.next(); record !== undefined; record = reader.next()) {
      if (timeline.isStopped) throw new IngestStopped(new Error('the timeline is gone'));
      try {
        reception.ingest ??= new Ingest(timeline);
        // It may take minutes, in which the stream is given up: what comes after the record is then asked for again.
        const preparing = reception.ingest.prepare(record, { signal: this.#stopped.signal, repair });
        if (preparing !== undefined) await prepared(preparing, timeline);
        reception.ingest.ingest(record);
      } catch (error) {
        reception.ingest = undefined;
        if (error instanceof NotPrepared) throw error.reason;
        if (!(error instanceof LayerDamagedError)) {
          throw new IngestStopped(error instanceof Error ? error : new Error(String(error)));
        }
        // What ingest reads is not here, or damaged. The record has left no trace: once that is brought back, the stream begins with it again.
        await this.#options.timelines.repair(error).catch((reason: unknown) => {
          throw reason instanceof Error && isPassing(reason) ? reason : new IngestStopped(error);
        });
        return false;
      }
      timeline.freezeIfFull();
      if (performance.now() - sliceStartMs > SLICE_MS) {
        await yieldToOthers();
        if (signal.aborted) return false;
        sliceStartMs = performance.now();
      }
    }
    return true;
  }

  /** Tells every safekeeper that is connected what it was not told yet: in the time of what has moved, however many timelines there are. */
  async #tellAll(): Promise<void> {
    const { signal } = this.#stopped;
    const { timelines } = this.#options;
    while (!signal.aborted) {
      await pause(FEEDBACK_MS, signal);
      const moved = timelines.takeMoved();
      for (const told of this.#told) {
        if (told === undefined) continue;
        tellOf(told, told.isNew ? timelines.all() : moved);
        told.isNew = false;
      }
    }
  }

  /** Breaks off streams that bring nothing although another safekeeper has committed more. */
  async #watchLag(): Promise<void> {
    const { signal } = this.#stopped;
    while (!signal.aborted) {
      await pause(LAG_CHECK_MS, signal);
      const now = performance.now();
      for (const { stream, receivedLsn, ...reception } of this.#receptions.values()) {
        if (stream === undefined || now - stream.lastChunkMs < LAG_MAX_MS) continue;
        const ahead =
          Math.max(...reception.commitLsns) > Math.max(receivedLsn, reception.commitLsns[stream.safekeeper]!);
        if (ahead) stream.aborter.abort();
      }
    }
  }

  #track(promise: Promise<void>): void {
    const tracked = promise.catch((error: unknown) => {
      this.#options.log.error({ err: error }, 'WAL receiver failed');
    });
    this.#running.add(tracked);
    void tracked.finally(() => this.#running.delete(tracked));
  }
}

/** A timeline's WAL from one safekeeper, and where that fails from the next. */
export async function* readWalOfAny(
  safekeepers: readonly SafekeeperAddress[],
  request: Omit<ReadWalOptions, 'address'> & { readonly signal: AbortSignal },
): AsyncGenerator<WalChunk, void, void> {
  let { fromLsn } = request;
  let failure: unknown;
  for (const address of safekeepers) {
    try {
      for await (const chunk of readWal({ ...request, address, fromLsn })) {
        yield chunk;
        fromLsn = chunk.lsn + chunk.bytes.length;
      }
    } catch (error) {
      failure = error;
    }
    if (request.signal.aborted) break;
  }
  if (failure !== undefined) throw toStrataError(failure);
}

/** Ingest of the timeline cannot go on. */
class IngestStopped extends Error {
  readonly reason: Error;

  constructor(reason: Error) {
    super(reason.message, { cause: reason });
    this.reason = reason;
  }
}

/** A record cannot be taken now, and may be later: a disk is full, a server does not answer. */
class NotPrepared extends Error {
  readonly reason: Error;

  constructor(reason: Error) {
    super(reason.message, { cause: reason });
    this.reason = reason;
  }
}

async function prepared(preparing: Promise<void>, timeline: Timeline): Promise<void> {
  try {
    await preparing;
    timeline.assertRunning();
  } catch (error) {
    throw error instanceof Error && isPassing(error) ? new NotPrepared(error) : error;
  }
}

/** Whether the same may succeed later: the disk or another server refused, or it was given up. */
function isPassing(error: Error): boolean {
  if (error.name === 'AbortError') return true;
  const { code } = toStrataError(error);
  return code === 'unavailable' || code === 'timeout' || ('syscall' in error && !(error instanceof StrataError));
}

function feedbackOf(timeline: Timeline): PageserverFeedback {
  return {
    timelineId: timeline.timelineId,
    ingestedLsn: timeline.lastRecordLsn,
    flushedLsn: timeline.diskConsistentLsn,
    remoteLsn: timeline.remoteConsistentLsn,
    oldestLsn: timeline.oldestLsn,
  };
}

function tellOf({ tell }: Told, timelines: Iterable<Timeline>): void {
  let batch: PageserverFeedback[] = [];
  for (const timeline of timelines) {
    batch.push(feedbackOf(timeline));
    if (batch.length < FEEDBACK_BATCH) continue;
    tell(batch);
    batch = [];
  }
  if (batch.length > 0) tell(batch);
}

function highestCommit(reception: Reception): Lsn {
  return Math.max(...reception.commitLsns);
}

/** One of the safekeepers that have most, another each time the last one failed. */
function choose(reception: Reception): number {
  const { commitLsns, damagedAt, rotation } = reception;
  const behindEnd = commitLsns
    .map((commitLsn, safekeeper) => ({ commitLsn, safekeeper }))
    .filter(({ commitLsn, safekeeper }) => commitLsn > reception.receivedLsn && !damagedAt.has(safekeeper));
  const candidates = behindEnd.length > 0 ? behindEnd : [{ safekeeper: rotation % commitLsns.length }];
  return candidates[rotation % candidates.length]!.safekeeper;
}

async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(ms, undefined, { signal }).catch(() => {});
}
