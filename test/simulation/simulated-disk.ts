/**
 * One acceptor's disk: what a process sees, what would survive a power cut, and what is on its way from the one to the other.
 *
 * A power cut loses unsynced writes, or parts of them, sector by sector. Killing the process only loses what it had not written yet.
 *
 * The log begins at `startLsn`: what is before was removed, or never was here. Other bytes stand in its place, so that who reads them is found.
 */
import type { AcceptorState } from '../../src/consensus/acceptor.ts';
import { LOG_START } from './log-records.ts';
import type { Random } from './random.ts';

export const LOG_CAPACITY = 128 * 1024;
const SECTOR_BYTES = 16;
const REMOVED = 0xee;

export interface PendingWrite {
  readonly at: number;
  readonly bytes: Buffer;
}

export class SimulatedDisk {
  readonly #random: Random;
  readonly visible = Buffer.alloc(LOG_CAPACITY);
  readonly #durable = Buffer.alloc(LOG_CAPACITY);
  #startLsn = LOG_START;
  #highest = 0;
  #pending: PendingWrite[] = [];
  /** Undefined: there is no log here. */
  #visibleState: AcceptorState | undefined;
  #durableState: AcceptorState | undefined;
  #pendingState: AcceptorState | undefined;

  constructor(random: Random) {
    this.#random = random;
  }

  get state(): AcceptorState | undefined {
    return this.#visibleState;
  }

  /** As a power cut would leave it. */
  get durableState(): AcceptorState | undefined {
    return this.#durableState;
  }

  /** The first byte that is here. */
  get startLsn(): number {
    return this.#startLsn;
  }

  /** From now on the log begins there, durably. */
  removeBefore(lsn: number): void {
    this.#startLsn = lsn;
    for (const bytes of [this.visible, this.#durable]) bytes.fill(REMOVED, 0, lsn - LOG_START);
  }

  write(lsn: number, chunks: readonly Buffer[]): PendingWrite {
    return this.#put(lsn - LOG_START, Buffer.concat(chunks));
  }

  truncate(lsn: number): PendingWrite {
    const at = lsn - LOG_START;
    return this.#put(at, Buffer.alloc(Math.max(0, this.#highest - at)));
  }

  /** The write is durable. Unknown after a crash, which has decided about it already. */
  sync(write: PendingWrite): void {
    if (!this.#pending.includes(write)) return;
    this.#pending = this.#pending.filter((other) => other !== write);
    write.bytes.copy(this.#durable, write.at);
  }

  startPersist(state: AcceptorState): void {
    this.#pendingState = state;
    this.#visibleState = state;
  }

  finishPersist(state: AcceptorState): void {
    if (this.#pendingState !== state) return;
    this.#durableState = state;
    this.#pendingState = undefined;
  }

  /** The process dies; what it wrote is in the system's cache, the last write perhaps in part. */
  kill(): void {
    for (const { at, bytes } of this.#pending) {
      if (this.#random.chance(0.7)) continue;
      const kept = this.#random.between(0, bytes.length);
      this.#durable.copy(this.visible, at + kept, at + kept, at + bytes.length);
    }
    if (this.#pendingState !== undefined && this.#random.chance(0.5)) this.#visibleState = this.#durableState;
    this.#pending = [];
    this.#pendingState = undefined;
  }

  cutPower(): void {
    for (const { at, bytes } of this.#pending) {
      const keep = this.#random.pick([0, 0.5, 0.9, 0.9, 1]);
      for (let from = at; from < at + bytes.length; from = nextSector(from)) {
        const to = Math.min(nextSector(from), at + bytes.length);
        if (this.#random.chance(keep)) bytes.copy(this.#durable, from, from - at, to - at);
      }
    }
    if (this.#pendingState !== undefined && this.#random.chance(0.5)) this.#durableState = this.#pendingState;
    this.#pending = [];
    this.#pendingState = undefined;
    this.#durable.copy(this.visible);
    this.#visibleState = this.#durableState;
  }

  /** All is lost. */
  wipe(): void {
    this.visible.fill(0);
    this.#durable.fill(0);
    this.#startLsn = LOG_START;
    this.#highest = 0;
    this.#pending = [];
    this.#pendingState = undefined;
    this.#visibleState = undefined;
    this.#durableState = undefined;
  }

  /** What a restarted process does before it serves: all that it sees becomes durable, and nothing follows the end. */
  settle(endLsn: number): void {
    this.visible.fill(0, endLsn - LOG_START);
    this.visible.copy(this.#durable);
    this.#durableState = this.#visibleState;
  }

  #put(at: number, bytes: Buffer): PendingWrite {
    bytes.copy(this.visible, at);
    this.#highest = Math.max(this.#highest, at + bytes.length);
    const write = { at, bytes };
    this.#pending.push(write);
    return write;
  }
}

function nextSector(at: number): number {
  return (Math.floor(at / SECTOR_BYTES) + 1) * SECTOR_BYTES;
}
