/**
 * The proposer: brings a timeline's WAL to a quorum of safekeepers. One per running primary; the rules are in consensus/proposer.ts, this
 * is its network.
 */
import type { EventEmitter } from 'node:events';
import type { Logger } from '../base/log.ts';
import type { SafekeeperAddress, TimelineIdentity } from '../api/safekeeper.ts';
import type { Lsn } from '../postgres/lsn.ts';

export interface ProposerOptions {
  readonly safekeepers: readonly SafekeeperAddress[];
  /** Scope `platform`, or `timeline` for this timeline. */
  readonly token: string;
  readonly timeline: TimelineIdentity;
  /** Aborting closes the proposer, and rejects an election under way. */
  readonly signal?: AbortSignal;
  readonly log?: Logger;
  /** WAL that is not committed yet, in memory; beyond it `append` asks the caller to wait. */
  readonly maxPendingBytes?: number;
}

export interface ProposerEvents {
  /** A quorum has made everything before the LSN durable. */
  commit: [lsn: Lsn];
  /** Another proposer leads under a higher term: nothing will ever be committed by this one again. Its Postgres must be killed. */
  fenced: [term: number];
  /** After `append` returned false: there is room again. */
  drain: [];
}

/** A leader. Everything before `startLsn` is committed on a quorum and is all that there is of the log. */
export interface Proposer extends EventEmitter<ProposerEvents> {
  readonly term: number;
  readonly startLsn: Lsn;
  readonly commitLsn: Lsn;
  /** End of what was appended: the next append begins here. */
  readonly endLsn: Lsn;
  readonly fenced: boolean;
  /** Copies the bytes. False: wait for 'drain' before appending more (nothing is refused or lost). */
  append(lsn: Lsn, bytes: Buffer): boolean;
  /** Resolves when everything before `lsn` is committed; rejects when the proposer is fenced, closed, or the signal aborts. */
  waitCommitted(lsn: Lsn, signal?: AbortSignal): Promise<void>;
  /** Tells the safekeepers the last commit LSN and disconnects. */
  close(): Promise<void>;
}

export declare function electProposer(options: ProposerOptions): Promise<Proposer>;
