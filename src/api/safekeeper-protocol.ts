/**
 * The bytes between a safekeeper and its clients: proposers, WAL readers, the control plane. TCP, frames of base/frames.ts
 * ({u32 payload length, u8 type, payload}), little-endian, LSNs and terms as u64 (below 2^53).
 *
 *   type  name            direction  payload
 *      1  hello           c → s      u32 magic "STRS", u16 version = 3, token (UTF-8, the rest)
 *      2  hello-reply     s → c      u32 node id
 *      3  error           s → c      JSON {code, message}: the server closes after it
 *
 *     10  greeting        c → s      JSON Greeting; makes the connection a proposer's
 *     11  greeting-reply  s → c      u32 node id, u8 flags (1 there is no log here, 2 blank, 4 has a leader), u64 incarnation, u64 term, u32 generation, configuration
 *     12  vote            c → s      u64 term, u32 generation, configuration
 *     13  vote-reply      s → c      u64 term, u64 flush LSN, u64 commit LSN, u32 generation, u8 flags (1 granted, 2 voter), configuration, history
 *     14  elected         c → s      u64 term, u64 start LSN, history
 *     15  append          c → s      u64 term, u64 begin LSN, u64 commit LSN, WAL bytes
 *     16  append-reply    s → c      u64 term, u64 flush LSN, u64 write LSN, u64 commit LSN, u32 generation, u32 version of the configuration
 *     17  refusal         s → c      u64 term, message (UTF-8)
 *     18  term-notice     s → c      u64 term
 *     19  renew           c → s      u64 term, u32 generation, configuration
 *      9  create          c → s      JSON CreateRequest: only after a greeting-reply that there is no log; answered with greeting-reply
 *         history, configuration: log-fields.ts
 *
 *     20  read            c → s      JSON ReadRequest; makes the connection a reader's
 *     21  wal             s → c      u64 LSN of the first byte, u64 commit LSN, WAL bytes (none: only the commit LSN is news)
 *     22  hurry           c → s      u64 LSN; from a reader: somebody waits for the WAL before it, send it as it is committed
 *
 *     30  watch           c → s      nothing; makes the connection a watcher's
 *     31  progress        s → c      count × {16 tenant id, 16 timeline id, u64 commit LSN, u64 flush LSN}
 *     32  feedback        c → s      from a watcher that is a pageserver, and s → c to proposers, of their timeline: count × {16 timeline id, u64 ingested, u64 flushed, u64 remote, u64 oldest LSN}
 *
 *     40  request         c → s      JSON {id, method, params}
 *     41  response        s → c      JSON {id, result} or {id, error: {code, message}}
 *
 * The client may send its second frame without waiting for the hello-reply. A connection has one use.
 */
import { StrataError } from '../base/errors.ts';
import { encodeFrame, FRAME_HEADER_BYTES } from '../base/frames.ts';
import type { AcceptorState } from '../consensus/acceptor.ts';
import type { Configuration } from '../consensus/configuration.ts';
import type { AcceptorMessage, Append, ProposerMessage, VoteRequest } from '../consensus/messages.ts';
import { type Lsn, readLsn, writeLsn } from '../postgres/lsn.ts';
import {
  decodeConfiguration,
  decodeHistory,
  encodeConfiguration,
  encodeHistory,
  need,
  readNumber,
} from './log-fields.ts';

export const PROTOCOL_MAGIC = 0x53525453; // "STRS"
export const PROTOCOL_VERSION = 3;

export const FRAME = {
  hello: 1,
  helloReply: 2,
  error: 3,
  create: 9,
  greeting: 10,
  greetingReply: 11,
  vote: 12,
  voteReply: 13,
  elected: 14,
  append: 15,
  appendReply: 16,
  refusal: 17,
  termNotice: 18,
  renew: 19,
  read: 20,
  wal: 21,
  hurry: 22,
  watch: 30,
  progress: 31,
  feedback: 32,
  request: 40,
  response: 41,
} as const;

/** What a safekeeper accepts in one frame. */
export const MAX_FRAME_BYTES = 4 * 1024 * 1024;
/** WAL bytes in one append or wal frame. */
export const MAX_WAL_BYTES = 512 * 1024;

const HELLO_FIXED_BYTES = 6;
/** Of an append's payload, before its WAL. */
export const APPEND_FIXED_BYTES = 24;
const APPEND_REPLY_BYTES = 40;
/** Without the configuration. */
const GREETING_REPLY_BYTES = 25;
const VOTE_BYTES = 12;
const FLAG_ABSENT = 1;
const FLAG_BLANK = 2;
const FLAG_LED = 4;
const FLAG_GRANTED = 1;
const FLAG_VOTER = 2;
const WAL_FIXED_BYTES = 16;
const PROGRESS_ENTRY_BYTES = 48;
const FEEDBACK_ENTRY_BYTES = 48;
const VOTE_REPLY_FIXED_BYTES = 29;

/** Which log this is, and what its WAL is like. It is made from the first greeting that is followed by `create`; later ones must agree. */
export interface Greeting {
  readonly tenantId: string;
  readonly timelineId: string;
  /** Where the branch begins, the end of a whole record. */
  readonly startLsn: Lsn;
  readonly pgVersion: number;
  /** Postgres' system identifier, a u64 in decimal. */
  readonly systemId: string;
}

export type GreetingReply =
  /** There is no such log here. It may be made by who names this incarnation: another start of the safekeeper has another. 16 hex digits. */
  | { readonly kind: 'absent'; readonly nodeId: number; readonly incarnation: string }
  | {
      readonly kind: 'present';
      readonly nodeId: number;
      readonly term: number;
      readonly generation: number;
      readonly configuration: Configuration;
      readonly isBlank: boolean;
      /** Another proposer is connected, and this is its log. */
      readonly hasLeader: boolean;
    };

export interface CreateRequest {
  readonly incarnation: string;
  readonly state: AcceptorState;
}

/** An empty log for a safekeeper that is new, as the incarnation that said that it is not there; it begins at the state's commit LSN. */
export interface GiveRequest extends CreateRequest {
  readonly timeline: Greeting;
}

export interface ReadRequest {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly fromLsn: Lsn;
  /**
   * Absent: what is committed, following for ever. Present, for the leader's recovery of a safekeeper that lags: up to the flush LSN,
   * as long as the safekeeper's log is that of the leader of this term.
   */
  readonly term?: number;
  /** For the rebuilding of logs that a quorum has lost: up to the flush LSN, whoever's log it is. */
  readonly isRebuild?: boolean;
}

export interface WalChunk {
  readonly lsn: Lsn;
  /** Never past the commit LSN unless it was asked for by term. Shares memory with the connection's input. */
  readonly bytes: Buffer;
  readonly commitLsn: Lsn;
}

export interface TimelineProgress {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly commitLsn: Lsn;
  /** A lower bound when no proposer has been here since the safekeeper's start. */
  readonly flushLsn: Lsn;
}

/** A timeline's WAL on one safekeeper. */
export interface TimelineWalStatus extends TimelineProgress {
  /** The first byte on its disk. */
  readonly localStartLsn: Lsn;
  readonly offloadedLsn: Lsn;
  /** WAL could not be brought to the object store at the last attempt. */
  readonly isOffloadFailing: boolean;
  /** Absent when no pageserver has told of it since the safekeeper's start. */
  readonly feedback?: PageserverFeedback;
  /** Why it is not served. */
  readonly failure?: string;
  /** What is wrong with what is on the disk: the log does not count before others have healed it. Its LSNs may be unknown, and 0. */
  readonly damage?: string;
}

/** How far a pageserver has got with a timeline. */
export interface PageserverFeedback {
  readonly timelineId: string;
  /** Pages up to here can be read. */
  readonly ingestedLsn: Lsn;
  /** What is below is in layers on its disk. */
  readonly flushedLsn: Lsn;
  /** What is below is in layers in the object store, named by an index that no other pageserver can overrule. */
  readonly remoteLsn: Lsn;
  /** The oldest LSN that may be read: WAL that ends before it is of no use to anybody. */
  readonly oldestLsn: Lsn;
}

export interface ErrorBody {
  readonly code: string;
  readonly message: string;
}

export function encodeHello(token: string): Buffer {
  const fixed = Buffer.alloc(HELLO_FIXED_BYTES);
  fixed.writeUInt32LE(PROTOCOL_MAGIC, 0);
  fixed.writeUInt16LE(PROTOCOL_VERSION, 4);
  return encodeFrame(FRAME.hello, fixed, Buffer.from(token));
}

/** The token. Throws `bad-request` for another protocol or version. */
export function decodeHello(payload: Buffer): string {
  need(payload, HELLO_FIXED_BYTES, 'hello');
  const magic = payload.readUInt32LE(0);
  const version = payload.readUInt16LE(4);
  if (magic !== PROTOCOL_MAGIC || version !== PROTOCOL_VERSION) {
    throw new StrataError(
      'bad-request',
      `hello has magic ${magic.toString(16)} version ${version}, this safekeeper speaks version ${PROTOCOL_VERSION}`,
    );
  }
  return payload.toString('utf8', HELLO_FIXED_BYTES);
}

export function encodeHelloReply(nodeId: number): Buffer {
  const payload = Buffer.alloc(4);
  payload.writeUInt32LE(nodeId);
  return encodeFrame(FRAME.helloReply, payload);
}

export function encodeJson(type: number, body: unknown): Buffer {
  return encodeFrame(type, Buffer.from(JSON.stringify(body)));
}

export function decodeJson(payload: Buffer): unknown {
  try {
    return JSON.parse(payload.toString('utf8'));
  } catch (error) {
    throw new StrataError('bad-request', `a frame of ${payload.length} bytes is not JSON`, { cause: error });
  }
}

export function encodeGreetingReply(reply: GreetingReply): Buffer {
  const payload = Buffer.alloc(GREETING_REPLY_BYTES);
  payload.writeUInt32LE(reply.nodeId);
  if (reply.kind === 'absent') {
    payload[4] = FLAG_ABSENT;
    payload.write(reply.incarnation, 5, 8, 'hex');
  } else {
    payload[4] = (reply.isBlank ? FLAG_BLANK : 0) | (reply.hasLeader ? FLAG_LED : 0);
    writeLsn(payload, reply.term, 13);
    payload.writeUInt32LE(reply.generation, 21);
    return encodeFrame(FRAME.greetingReply, payload, encodeConfiguration(reply.configuration));
  }
  return encodeFrame(FRAME.greetingReply, payload);
}

export function decodeGreetingReply(payload: Buffer): GreetingReply {
  need(payload, GREETING_REPLY_BYTES, 'greeting-reply');
  const nodeId = payload.readUInt32LE(0);
  const flags = payload[4]!;
  if ((flags & FLAG_ABSENT) !== 0) return { kind: 'absent', nodeId, incarnation: payload.toString('hex', 5, 13) };
  return {
    kind: 'present',
    nodeId,
    term: readLsn(payload, 13),
    generation: payload.readUInt32LE(21),
    configuration: decodeConfiguration(payload, GREETING_REPLY_BYTES).configuration,
    isBlank: (flags & FLAG_BLANK) !== 0,
    hasLeader: (flags & FLAG_LED) !== 0,
  };
}

/** The frame but for its WAL bytes, which the caller writes right after it. */
export function encodeAppendHead(message: Append): Buffer {
  const head = Buffer.allocUnsafe(FRAME_HEADER_BYTES + APPEND_FIXED_BYTES);
  head.writeUInt32LE(APPEND_FIXED_BYTES + message.bytes.length, 0);
  head[4] = FRAME.append;
  writeLsn(head, message.term, 5);
  writeLsn(head, message.beginLsn, 13);
  writeLsn(head, message.commitLsn, 21);
  return head;
}

export function encodeProposerMessage(message: Exclude<ProposerMessage, Append>): Buffer {
  if (message.kind !== 'elected') {
    const payload = Buffer.alloc(VOTE_BYTES);
    writeLsn(payload, message.term, 0);
    payload.writeUInt32LE(message.generation, 8);
    return encodeFrame(FRAME[message.kind], payload, encodeConfiguration(message.configuration));
  }
  const fixed = Buffer.alloc(16);
  writeLsn(fixed, message.term, 0);
  writeLsn(fixed, message.startLsn, 8);
  return encodeFrame(FRAME.elected, fixed, encodeHistory(message.history));
}

/** Append's bytes share memory with the payload. Undefined: not a proposer's message. */
export function decodeProposerMessage(type: number, payload: Buffer): ProposerMessage | undefined {
  switch (type) {
    case FRAME.append:
      need(payload, APPEND_FIXED_BYTES, 'append');
      return {
        kind: 'append',
        term: readLsn(payload, 0),
        beginLsn: readLsn(payload, 8),
        commitLsn: readLsn(payload, 16),
        bytes: payload.subarray(APPEND_FIXED_BYTES),
      };
    case FRAME.vote:
      need(payload, VOTE_BYTES, 'vote');
      return { kind: 'vote', ...decodeVote(payload) };
    case FRAME.renew:
      need(payload, VOTE_BYTES, 'renew');
      return { kind: 'renew', ...decodeVote(payload) };
    case FRAME.elected:
      need(payload, 16, 'elected');
      return {
        kind: 'elected',
        term: readNumber(payload, 0),
        startLsn: readNumber(payload, 8),
        history: decodeHistory(payload, 16),
      };
    default:
      return undefined;
  }
}

export function encodeAcceptorMessage(message: AcceptorMessage): Buffer {
  switch (message.kind) {
    case 'append-reply': {
      const frame = Buffer.allocUnsafe(FRAME_HEADER_BYTES + APPEND_REPLY_BYTES);
      frame.writeUInt32LE(APPEND_REPLY_BYTES, 0);
      frame[4] = FRAME.appendReply;
      writeLsn(frame, message.term, 5);
      writeLsn(frame, message.flushLsn, 13);
      writeLsn(frame, message.writeLsn, 21);
      writeLsn(frame, message.commitLsn, 29);
      frame.writeUInt32LE(message.generation, 37);
      frame.writeUInt32LE(message.configurationVersion, 41);
      return frame;
    }
    case 'vote-reply': {
      const fixed = Buffer.alloc(VOTE_REPLY_FIXED_BYTES);
      writeLsn(fixed, message.term, 0);
      writeLsn(fixed, message.flushLsn, 8);
      writeLsn(fixed, message.commitLsn, 16);
      fixed.writeUInt32LE(message.generation, 24);
      fixed[28] = (message.granted ? FLAG_GRANTED : 0) | (message.isVoter ? FLAG_VOTER : 0);
      const configuration = encodeConfiguration(message.configuration);
      return encodeFrame(FRAME.voteReply, fixed, configuration, encodeHistory(message.history));
    }
    case 'refusal': {
      const fixed = Buffer.alloc(8);
      writeLsn(fixed, message.term, 0);
      return encodeFrame(FRAME.refusal, fixed, Buffer.from(message.message));
    }
    case 'term-notice': {
      const fixed = Buffer.alloc(8);
      writeLsn(fixed, message.term, 0);
      return encodeFrame(FRAME.termNotice, fixed);
    }
  }
}

/** Undefined: not an acceptor's message. */
export function decodeAcceptorMessage(type: number, payload: Buffer): AcceptorMessage | undefined {
  switch (type) {
    case FRAME.appendReply:
      need(payload, APPEND_REPLY_BYTES, 'append-reply');
      return {
        kind: 'append-reply',
        term: readLsn(payload, 0),
        flushLsn: readLsn(payload, 8),
        writeLsn: readLsn(payload, 16),
        commitLsn: readLsn(payload, 24),
        generation: payload.readUInt32LE(32),
        configurationVersion: payload.readUInt32LE(36),
      };
    case FRAME.voteReply: {
      need(payload, VOTE_REPLY_FIXED_BYTES, 'vote-reply');
      const { configuration, end } = decodeConfiguration(payload, VOTE_REPLY_FIXED_BYTES);
      return {
        kind: 'vote-reply',
        term: readLsn(payload, 0),
        flushLsn: readLsn(payload, 8),
        commitLsn: readLsn(payload, 16),
        generation: payload.readUInt32LE(24),
        granted: (payload[28]! & FLAG_GRANTED) !== 0,
        isVoter: (payload[28]! & FLAG_VOTER) !== 0,
        configuration,
        history: decodeHistory(payload, end),
      };
    }
    case FRAME.refusal:
      need(payload, 8, 'refusal');
      return { kind: 'refusal', term: readLsn(payload, 0), message: payload.toString('utf8', 8) };
    case FRAME.termNotice:
      need(payload, 8, 'term-notice');
      return { kind: 'term-notice', term: readLsn(payload, 0) };
    default:
      return undefined;
  }
}

/** The frame but for its WAL bytes, which the caller writes right after it. */
export function encodeWalHead(lsn: Lsn, commitLsn: Lsn, walBytes: number): Buffer {
  const head = Buffer.allocUnsafe(FRAME_HEADER_BYTES + WAL_FIXED_BYTES);
  head.writeUInt32LE(WAL_FIXED_BYTES + walBytes, 0);
  head[4] = FRAME.wal;
  writeLsn(head, lsn, 5);
  writeLsn(head, commitLsn, 13);
  return head;
}

export function decodeWal(payload: Buffer): WalChunk {
  need(payload, WAL_FIXED_BYTES, 'wal');
  return { lsn: readLsn(payload, 0), commitLsn: readLsn(payload, 8), bytes: payload.subarray(WAL_FIXED_BYTES) };
}

export function encodeHurry(lsn: Lsn): Buffer {
  const payload = Buffer.alloc(8);
  writeLsn(payload, lsn, 0);
  return encodeFrame(FRAME.hurry, payload);
}

export function decodeHurry(payload: Buffer): Lsn {
  need(payload, 8, 'hurry');
  return readLsn(payload, 0);
}

export function encodeProgress(entries: readonly TimelineProgress[]): Buffer {
  const payload = Buffer.alloc(entries.length * PROGRESS_ENTRY_BYTES);
  let offset = 0;
  for (const entry of entries) {
    payload.write(entry.tenantId, offset, 16, 'hex');
    payload.write(entry.timelineId, offset + 16, 16, 'hex');
    writeLsn(payload, entry.commitLsn, offset + 32);
    writeLsn(payload, entry.flushLsn, offset + 40);
    offset += PROGRESS_ENTRY_BYTES;
  }
  return encodeFrame(FRAME.progress, payload);
}

export function decodeProgress(payload: Buffer): TimelineProgress[] {
  if (payload.length % PROGRESS_ENTRY_BYTES !== 0) {
    throw new StrataError('bad-request', `a progress frame of ${payload.length} bytes is not a list of entries`);
  }
  const entries: TimelineProgress[] = [];
  for (let offset = 0; offset < payload.length; offset += PROGRESS_ENTRY_BYTES) {
    entries.push({
      tenantId: payload.toString('hex', offset, offset + 16),
      timelineId: payload.toString('hex', offset + 16, offset + 32),
      commitLsn: readLsn(payload, offset + 32),
      flushLsn: readLsn(payload, offset + 40),
    });
  }
  return entries;
}

export function encodeFeedback(entries: readonly PageserverFeedback[]): Buffer {
  const payload = Buffer.alloc(entries.length * FEEDBACK_ENTRY_BYTES);
  entries.forEach(({ timelineId, ingestedLsn, flushedLsn, remoteLsn, oldestLsn }, index) => {
    const offset = index * FEEDBACK_ENTRY_BYTES;
    payload.write(timelineId, offset, 16, 'hex');
    [ingestedLsn, flushedLsn, remoteLsn, oldestLsn].forEach((lsn, at) => writeLsn(payload, lsn, offset + 16 + 8 * at));
  });
  return encodeFrame(FRAME.feedback, payload);
}

export function decodeFeedback(payload: Buffer): PageserverFeedback[] {
  if (payload.length % FEEDBACK_ENTRY_BYTES !== 0) {
    throw new StrataError('bad-request', `a feedback frame of ${payload.length} bytes is not a list of entries`);
  }
  return Array.from({ length: payload.length / FEEDBACK_ENTRY_BYTES }, (_, index) => {
    const offset = index * FEEDBACK_ENTRY_BYTES;
    return {
      timelineId: payload.toString('hex', offset, offset + 16),
      ingestedLsn: readLsn(payload, offset + 16),
      flushedLsn: readLsn(payload, offset + 24),
      remoteLsn: readLsn(payload, offset + 32),
      oldestLsn: readLsn(payload, offset + 40),
    };
  });
}

function decodeVote(payload: Buffer): Omit<VoteRequest, 'kind'> {
  const { configuration } = decodeConfiguration(payload, VOTE_BYTES);
  return { term: readNumber(payload, 0), generation: payload.readUInt32LE(8), configuration };
}
