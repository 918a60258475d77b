/**
 * What proposers and acceptors say to each other. The rules are in acceptor.ts and proposer.ts, the bytes in api/safekeeper-protocol.ts.
 *
 * A proposer speaks to each acceptor in this order, again on each new connection:
 *   greeting → greeting-reply, vote → vote-reply, elected → append-reply, append… → append-reply…
 * Acknowledgements are cumulative. A refusal or a term-notice can come at any time.
 *
 * An acceptor that does not have the log says so instead of greeting-reply, and waits to be given one with `create`. Whether it never had it or lost
 * its disk makes no difference: what it had acknowledged and whom it had voted for is forgotten, so it must not count again before
 * two things are true (proposer.ts, "Acceptors that come back empty"):
 *   - a majority without it knows, durably, that what it said before is void: the *generation* was raised there;
 *   - its new log has reached all that may have been committed with its help: `votesFrom`.
 *
 * Who keeps the log is the *configuration* (configuration.ts). A vote is asked for, and given, under one; an acceptor takes over a newer one and gives no
 * vote under an older one. Everybody tells the newest that they know.
 */
import type { Lsn } from '../postgres/lsn.ts';
import type { Configuration } from './configuration.ts';

/** From `startLsn` on, the log was written by the leader of `term`. */
export interface TermStart {
  readonly term: number;
  readonly startLsn: Lsn;
}

/**
 * Ascending in term; LSNs never descend. The first entry is term 0 at the timeline's start: the past that a branch begins with. Entries after it may have been
 * left out (term-history.ts).
 */
export type TermHistory = readonly TermStart[];

export interface VoteRequest {
  readonly kind: 'vote';
  readonly term: number;
  /** The highest that the proposer knows. An acceptor that knows a higher one gives no vote: the proposer may hold votes that are void. */
  readonly generation: number;
  readonly configuration: Configuration;
}

/** From the leader whose log this is: remember the generation and the configuration. Answered with append-reply. */
export interface Renew {
  readonly kind: 'renew';
  readonly term: number;
  readonly generation: number;
  readonly configuration: Configuration;
}

export interface VoteReply {
  readonly kind: 'vote-reply';
  /** The acceptor's term after the request. */
  readonly term: number;
  readonly granted: boolean;
  /** False: it is no member, or its log was given to it anew and is not complete yet. It has raised its term, but cannot vote. */
  readonly isVoter: boolean;
  readonly generation: number;
  readonly configuration: Configuration;
  readonly flushLsn: Lsn;
  readonly commitLsn: Lsn;
  /** Of what is flushed: entries that start past flushLsn are left out. */
  readonly history: TermHistory;
}

export interface Elected {
  readonly kind: 'elected';
  readonly term: number;
  /** The highest point that the leader's log and the acceptor's have in common. Appends go on from here. */
  readonly startLsn: Lsn;
  /** The leader's whole history; the last entry is its own term. */
  readonly history: TermHistory;
}

export interface Append {
  readonly kind: 'append';
  readonly term: number;
  readonly beginLsn: Lsn;
  readonly commitLsn: Lsn;
  /** May be empty (to carry the commit LSN) and may end inside a record. */
  readonly bytes: Buffer;
}

export interface AppendReply {
  readonly kind: 'append-reply';
  /** The term of the leader whose log this is. */
  readonly term: number;
  /** End of the last whole record that is durable. */
  readonly flushLsn: Lsn;
  /** End of what is durable, records or not: how much the acceptor has taken in. */
  readonly writeLsn: Lsn;
  readonly commitLsn: Lsn;
  readonly generation: number;
  /** Of the configuration that the acceptor has written down. */
  readonly configurationVersion: number;
}

/** The message was not obeyed; the proposer connects anew, or gives up when the term is above its own. */
export interface Refusal {
  readonly kind: 'refusal';
  readonly term: number;
  readonly message: string;
}

/** A higher term exists: whoever leads a lower one is a leader no more. */
export interface TermNotice {
  readonly kind: 'term-notice';
  readonly term: number;
}

export type ProposerMessage = VoteRequest | Elected | Append | Renew;
export type AcceptorMessage = VoteReply | AppendReply | Refusal | TermNotice;
