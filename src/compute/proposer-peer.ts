/**
 * A proposer's dealings with one safekeeper: connecting for ever, the election's messages, WAL from memory, and recovery from another safekeeper's
 * disk when memory does not reach back far enough.
 *
 * What comes from a disk is checked on the way, and only whole records with the right CRC are passed on, so that silent damage there does not become what a
 * quorum has. Who has damaged WAL is told of in the log, and the others are asked first.
 */
import type { Logger } from '../base/log.ts';
import { errorTable, StrataError, toStrataError } from '../base/errors.ts';
import type { Frame } from '../base/frames.ts';
import {
  greetingOf,
  readWal,
  type SafekeeperAddress,
  SafekeeperClient,
  SafekeeperConnection,
  type TimelineIdentity,
} from '../api/safekeeper.ts';
import {
  decodeAcceptorMessage,
  decodeFeedback,
  decodeGreetingReply,
  type CreateRequest,
  encodeAppendHead,
  encodeJson,
  encodeProposerMessage,
  FRAME,
  type PageserverFeedback,
} from '../api/safekeeper-protocol.ts';
import type { AcceptorState } from '../consensus/acceptor.ts';
import type { Elected, Renew, VoteRequest } from '../consensus/messages.ts';
import type { ProposerAction, ProposerState } from '../consensus/proposer.ts';
import { historyUpTo } from '../consensus/term-history.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import { toPgVersion } from '../postgres/version.ts';
import { WholeRecords } from '../postgres/wal/whole-records.ts';
import type { WalBuffer } from './wal-buffer.ts';

/** Small appends that are not acknowledged yet. More of them would only be more messages and more writes; what comes meanwhile makes up a larger one. */
const MAX_SMALL_APPENDS = 1;
const SMALL_APPEND_BYTES = 64 * 1024;
/** Bytes that wait in this process for the socket. */
const MAX_QUEUED_BYTES = 1024 * 1024;
const RECONNECT_MIN_MS = 20;
const RECONNECT_MAX_MS = 1_000;
const RECOVERY_RETRY_MS = 100;
/** After which who had damaged WAL, or was silent, may be asked for it again: it may have been healed, or the damage was on the way only. */
const SOURCE_RETRY_MS = 10_000;
const NEWCOMER_RETRY_MS = 50;
/** When a majority has lost the log nobody can give it, but it may be rebuilt, which is heard of by a new greeting only. */
const ABSENT_RETRY_MS = 2_000;
const NO_BYTES = Buffer.alloc(0);

export interface ProposerPeerOptions {
  readonly index: number;
  readonly address: SafekeeperAddress;
  readonly token: string;
  readonly timeline: TimelineIdentity;
  readonly yieldsToLeader: boolean;
  /** After which who is silent is given up: a safekeeper that owes an answer, or one that another recovers from. */
  readonly stallMs: number;
  readonly state: ProposerState;
  readonly buffer: () => WalBuffer;
  /** A small append may go to it now; otherwise only by `catchUp`. */
  readonly mayBegin: () => boolean;
  readonly perform: (actions: readonly ProposerAction[]) => void;
  readonly addressOf: (peer: number) => SafekeeperAddress;
  readonly onAcknowledged: () => void;
  /** How far the pageserver has got. */
  readonly onFeedback: (feedback: PageserverFeedback) => void;
  /** The safekeeper said something that trying again will not change. */
  readonly onRefused: () => void;
  readonly log: Logger | undefined;
}

export class ProposerPeer {
  readonly index: number;
  readonly #options: ProposerPeerOptions;
  readonly #name: string;
  #connection: SafekeeperConnection | undefined;
  #reconnectTimer: NodeJS.Timeout | undefined;
  #reconnectDelayMs = RECONNECT_MIN_MS;
  #recovery: AbortController | undefined;
  /** Those that did not give this one the WAL that it needs, as their disk is damaged or they are silent, and when that was seen. */
  readonly #failedSources = new Map<number, number>();
  /** Of the recovery under way: whom it reads from, and since when nothing has come from there. */
  #source = -1;
  #sourceSilentSinceMs = Infinity;
  #waitingForDrain = false;
  /** Ends of the appends that are not acknowledged. */
  #unacknowledged: Lsn[] = [];
  #roomWaiter: (() => void) | undefined;
  #heardAtMs = 0;
  /** What had been sent when the last pause ended. */
  #sentLsn: Lsn = 0;
  #wasUnconfirmed = false;
  #lastError: StrataError | undefined;
  #closed = false;

  constructor(options: ProposerPeerOptions) {
    this.index = options.index;
    this.#options = options;
    this.#name = `${options.address.host}:${options.address.port}`;
    // After the constructor of the proposer, whose callbacks are used.
    queueMicrotask(() => this.#connect());
  }

  /** Why the last connection ended. */
  get lastError(): StrataError | undefined {
    return this.#lastError;
  }

  get isRefused(): boolean {
    return (
      this.#options.state.peer(this.index).state !== 'creating' &&
      this.#lastError !== undefined &&
      !errorTable[this.#lastError.code].retry &&
      this.#lastError.code !== 'internal'
    );
  }

  send(message: VoteRequest | Elected | Renew): void {
    this.#connection?.write(encodeProposerMessage(message));
  }

  /** Gives an empty log to the safekeeper, which said in this incarnation that it has none. */
  create(incarnation: string, state: AcceptorState): void {
    const connection = this.#connection;
    const give = (given: AcceptorState): void => {
      if (this.#connection !== connection) return;
      connection?.write(encodeJson(FRAME.create, { incarnation, state: given } satisfies CreateRequest));
    };
    if (state.votesFrom === undefined) {
      give(state);
      return;
    }
    this.#options.log?.warn({ safekeeper: this.#name }, 'it has lost this timeline and gets it anew');
    this.#resumed(state).then(give, (error: unknown) => {
      if (this.#connection === connection) this.reconnect(String(error));
    });
  }

  /**
   * The same log, but beginning where the disk of another safekeeper does: what is before is in the object store, and its pages too, or is not kept any more.
   * It is committed and the leader's, so a log that had it would have this history there.
   */
  async #resumed(state: AcceptorState): Promise<AcceptorState> {
    const { state: proposer, index, addressOf, token, timeline } = this.#options;
    const source = proposer.recoverySource(index, this.#failedSources);
    if (source === undefined) {
      if (this.#failedSources.size === 0) return state;
      throw new StrataError('unavailable', 'nobody says where its log may begin');
    }
    const client = new SafekeeperClient({ address: addressOf(source), token });
    try {
      const resumeLsn = await client.resumePoint(timeline.tenantId, timeline.timelineId);
      if (resumeLsn <= state.commitLsn || resumeLsn > proposer.commitLsn) return state;
      return { ...state, commitLsn: resumeLsn, history: historyUpTo(proposer.history, resumeLsn) };
    } catch (error) {
      const { code, message } = toStrataError(error);
      if (code === 'internal') this.#foundDamage(source, message);
      throw error;
    } finally {
      client.close();
    }
  }

  reconnect(reason: string): void {
    this.#options.log?.warn({ safekeeper: this.#name, reason }, 'connecting anew');
    this.#connection?.close();
  }

  /** Sends what may be sent now: what belongs to a round that begins, what was held back, or, as nothing will follow, all the rest. */
  pump(what: 'round' | 'held-back' | 'rest' = 'round'): void {
    const { state, index, mayBegin } = this.#options;
    const buffer = this.#options.buffer();
    const peer = state.peer(index);
    while (peer.state === 'streaming' && this.#recovery === undefined && peer.sendLsn < buffer.endLsn) {
      if (!this.#hasRoom()) return;
      if (peer.sendLsn < buffer.startLsn) {
        if (state.recoverySource(index, this.#failedSources) !== undefined) this.#startRecovery();
        return;
      }
      const isSmall = buffer.endLsn - peer.sendLsn < SMALL_APPEND_BYTES;
      if (isSmall && what !== 'rest') {
        if (this.#unacknowledged.length >= MAX_SMALL_APPENDS || !(what === 'held-back' || mayBegin())) return;
      }
      this.#append(peer.sendLsn, buffer.view(peer.sendLsn));
    }
  }

  /** It has answered all that it had been sent when the last pause ended. */
  get isPrompt(): boolean {
    const peer = this.#options.state.peer(this.index);
    return peer.state === 'streaming' && this.#recovery === undefined && peer.writtenLsn >= this.#sentLsn;
  }

  /** A pause is over: sends what was held back, if it may, and when no WAL came the commit LSN. True when it may have to be told of a commit LSN after another one. */
  catchUp(maySend: boolean, isQuiet: boolean): boolean {
    this.pump(maySend ? 'held-back' : 'round');
    const { state, index } = this.#options;
    const peer = state.peer(index);
    // As long as WAL flows, the next append carries the commit LSN.
    if (isQuiet) this.tellCommit();
    this.#sentLsn = peer.sendLsn;
    const isBehind = peer.sendLsn < this.#options.buffer().endLsn || peer.writtenLsn < peer.sendLsn;
    return peer.state === 'streaming' && (isBehind || peer.sentCommitLsn < state.commitLsn);
  }

  /** An append without WAL, if the safekeeper does not know the commit LSN yet. */
  tellCommit(): void {
    const { state, index } = this.#options;
    const peer = state.peer(index);
    if (peer.state === 'streaming' && peer.sentCommitLsn < state.commitLsn) this.#append(peer.sendLsn, NO_BYTES);
  }

  /** Called now and then: breaks a connection whose safekeeper owes an answer for too long. */
  checkStall(): void {
    const { state, index, stallMs } = this.#options;
    this.#forgetFailures();
    if (this.#recovery !== undefined && performance.now() - this.#sourceSilentSinceMs > stallMs) {
      const { nodeId } = state.peer(this.#source);
      this.#options.log?.warn(
        { safekeeper: this.#name, nodeId },
        'who it recovers from is silent: the others are asked',
      );
      this.#failedSources.set(this.#source, performance.now());
      this.#recovery.abort();
    }
    const peer = state.peer(index);
    const isAsked =
      peer.state === 'voting' || peer.state === 'joining' || peer.state === 'creating' || peer.state === 'lost';
    const isUnconfirmed = state.isUnconfirmed(index);
    if (isUnconfirmed && this.#wasUnconfirmed) this.reconnect('it did not confirm the configuration');
    this.#wasUnconfirmed = isUnconfirmed;
    const owes = isAsked || (peer.state === 'streaming' && peer.writtenLsn < peer.sendLsn);
    if (this.#connection !== undefined && owes && performance.now() - this.#heardAtMs > stallMs)
      this.reconnect('no answer');
  }

  #forgetFailures(): void {
    const nowMs = performance.now();
    for (const [source, seenAtMs] of this.#failedSources) {
      if (nowMs - seenAtMs < SOURCE_RETRY_MS) continue;
      this.#failedSources.delete(source);
      this.pump();
    }
  }

  async close(timeoutMs: number): Promise<void> {
    if (this.#closed) return;
    if (timeoutMs > 0) this.pump('rest');
    this.tellCommit();
    this.#closed = true;
    clearTimeout(this.#reconnectTimer);
    this.#recovery?.abort();
    const connection = this.#connection;
    if (connection === undefined) return;
    if (timeoutMs > 0) await connection.end(timeoutMs);
    connection.close();
  }

  #connect(): void {
    if (this.#closed) return;
    const { address, token, timeline, state, perform, index } = this.#options;
    this.#heardAtMs = performance.now();
    const connection = new SafekeeperConnection(
      { address, token },
      {
        onFrame: (frame) => this.#received(frame),
        keepsFrames: false,
        onClose: (error) => {
          this.#connection = undefined;
          this.#lastError = error;
          this.#waitingForDrain = false;
          this.#recovery?.abort();
          this.#roomWaiter?.();
          perform(state.lost(index));
          this.#scheduleReconnect();
        },
      },
    );
    this.#connection = connection;
    this.#unacknowledged = [];
    connection.write(encodeJson(FRAME.greeting, greetingOf(timeline)));
  }

  #scheduleReconnect(): void {
    if (this.#closed) return;
    this.#options.log?.debug({ safekeeper: this.#name, reason: this.#lastError?.message }, 'connection lost');
    this.#reconnectTimer = setTimeout(() => this.#connect(), this.#reconnectDelayMs);
    this.#reconnectDelayMs = Math.min(2 * this.#reconnectDelayMs, RECONNECT_MAX_MS);
    if (this.isRefused) this.#options.onRefused();
  }

  #received(frame: Frame): void {
    const { state, perform, index } = this.#options;
    this.#heardAtMs = performance.now();
    if (frame.type === FRAME.greetingReply) {
      this.#lastError = undefined;
      const greeting = decodeGreetingReply(frame.payload);
      if (
        greeting.kind === 'present' &&
        greeting.hasLeader &&
        this.#options.yieldsToLeader &&
        state.phase === 'electing'
      ) {
        this.#lastError = new StrataError('conflict', `a leader is connected to safekeeper ${this.#name}`);
        this.#options.onRefused();
        return;
      }
      if (greeting.kind === 'present') {
        perform(state.greeted(index, greeting));
        return;
      }
      perform(state.absent(index, greeting.incarnation));
      const { timelineId } = this.#options.timeline;
      if (state.peer(index).state !== 'absent') return;
      const isNewcomer = state.isNewcomer(index); // It is about to be given one, by who changes the members.
      if (isNewcomer || state.phase !== 'electing') {
        const connection = this.#connection;
        setTimeout(
          () => {
            if (state.peer(index).state === 'absent') connection?.close();
          },
          isNewcomer ? NEWCOMER_RETRY_MS : ABSENT_RETRY_MS,
        ).unref();
      }
      if (isNewcomer) return;
      this.#lastError = new StrataError('not-found', `safekeeper ${this.#name} has no timeline ${timelineId}`);
      this.#options.onRefused();
      return;
    }
    if (frame.type === FRAME.feedback) {
      for (const feedback of decodeFeedback(frame.payload)) this.#options.onFeedback(feedback);
      return;
    }
    const message = decodeAcceptorMessage(frame.type, frame.payload);
    if (message === undefined) throw new StrataError('bad-request', `frame type ${frame.type} from a safekeeper`);
    if (message.kind !== 'append-reply') {
      perform(state.receive(index, message));
      return;
    }
    while (this.#unacknowledged.length > 0 && this.#unacknowledged[0]! <= message.writeLsn)
      this.#unacknowledged.shift();
    perform(state.receive(index, message));
    this.#reconnectDelayMs = RECONNECT_MIN_MS;
    this.#roomWaiter?.();
    this.#options.onAcknowledged();
    this.pump();
  }

  #append(beginLsn: Lsn, bytes: Buffer): void {
    const { state, index } = this.#options;
    const { term, commitLsn } = state;
    const head = encodeAppendHead({ kind: 'append', term, beginLsn, commitLsn, bytes });
    if (bytes.length === 0) this.#connection?.write(head);
    else this.#connection?.write(head, bytes);
    if (bytes.length > 0) this.#unacknowledged.push(beginLsn + bytes.length);
    state.sent(index, beginLsn + bytes.length);
  }

  #hasRoom(): boolean {
    const connection = this.#connection;
    if (connection === undefined) return false;
    if (connection.queuedBytes > MAX_QUEUED_BYTES) {
      if (!this.#waitingForDrain) {
        this.#waitingForDrain = true;
        connection.onceDrained(() => {
          this.#waitingForDrain = false;
          this.#roomWaiter?.();
          this.pump();
        });
      }
      return false;
    }
    return true;
  }

  /** Reads what memory does not have from the disk of a safekeeper that has it, until memory goes on. */
  #startRecovery(): void {
    const recovery = new AbortController();
    this.#recovery = recovery;
    const { state, index } = this.#options;
    const source = state.recoverySource(index, this.#failedSources);
    this.#recover(source, recovery.signal)
      .catch((error: unknown) => {
        const { code, message } = toStrataError(error);
        // It cannot read its disk there.
        const isUnreadable = code === 'internal' || code === 'history-gone';
        if (source !== undefined && isUnreadable && !recovery.signal.aborted) this.#foundDamage(source, message);
        this.#options.log?.info({ safekeeper: this.#name, err: error }, 'recovery has to start again');
        return new Promise((resolve) => setTimeout(resolve, RECOVERY_RETRY_MS));
      })
      .finally(() => {
        this.#recovery = undefined;
        this.#sourceSilentSinceMs = Infinity;
        this.#options.onAcknowledged();
      });
  }

  async #recover(source: number | undefined, signal: AbortSignal): Promise<void> {
    const { state, index, buffer, timeline, token, addressOf, log } = this.#options;
    const peer = state.peer(index);
    if (source === undefined) throw new StrataError('unavailable', 'no safekeeper with the WAL is connected');
    const { tenantId, timelineId } = timeline;
    // The end of a record, from which on whole ones can be checked; what is needed begins in a later one perhaps.
    const fromLsn = peer.ackedLsn;
    const whole = new WholeRecords(fromLsn, toPgVersion(timeline.pgVersion));
    let { sendLsn } = peer;
    const { term } = state;
    log?.info({ safekeeper: this.#name, source, fromLsn: formatLsn(fromLsn) }, 'recovering from another safekeeper');
    const address = addressOf(source);
    const chunks = readWal({ address, token, tenantId, timelineId, fromLsn, term, signal });
    let lsn = fromLsn;
    this.#source = source;
    this.#sourceSilentSinceMs = performance.now();
    for await (const chunk of chunks) {
      this.#sourceSilentSinceMs = performance.now();
      if (chunk.bytes.length === 0) continue;
      for (const bytes of whole.push(chunk.bytes)) {
        const needed = bytes.subarray(Math.max(0, sendLsn - lsn));
        lsn += bytes.length;
        if (needed.length === 0) continue;
        while (!this.#hasRoom() && !signal.aborted) {
          this.#sourceSilentSinceMs = Infinity; // It is not read from now.
          await new Promise<void>((resolve) => {
            this.#roomWaiter = resolve;
          });
          this.#roomWaiter = undefined;
          this.#sourceSilentSinceMs = performance.now();
        }
        // After another election of this proposer the log of that term may be another.
        if (signal.aborted || state.term !== term || peer.state !== 'streaming' || peer.sendLsn !== sendLsn) return;
        this.#append(sendLsn, needed);
        ({ sendLsn } = peer);
      }
      const { damage } = whole;
      if (damage !== undefined) this.#foundDamage(source, damage.message);
      if (damage !== undefined || sendLsn >= buffer().startLsn) return;
    }
  }

  #foundDamage(source: number, reason: string): void {
    const { state, log } = this.#options;
    const { nodeId } = state.peer(source);
    this.#failedSources.set(source, performance.now());
    log?.error(
      { nodeId, reason },
      'the WAL on this safekeeper is damaged: the others are asked for it. See to its disk',
    );
  }
}
