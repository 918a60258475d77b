/**
 * The pages that WAL verification has in its hands: as many as fit in memory, the others in a file that has no name any more.
 *
 * A page is found by relation fork and block. Nothing here survives the process; a page that is dropped is unknown afterwards.
 *
 * Invariant: a page is either in memory or in the file, never in both; the buffer that `get` returns may be changed until the next call.
 */

import { closeSync, openSync, readSync, unlinkSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { randomUUID } from 'node:crypto';

import { BLOCK_SIZE } from '../postgres/page-size.ts';

/** A relation fork as text: `spc/db/rel/fork`. */
export type ForkName = string;

interface Slot {
  readonly fork: ForkName;
  readonly blk: number;
  /** Undefined while the page is in the file. */
  page: Buffer | undefined;
  /** Where the page has its place in the file, once it had to be put there. */
  place: number | undefined;
}

export class VerifyPages {
  readonly #forks = new Map<ForkName, Map<number, Slot>>();
  /** Slots in memory, the one that was used longest ago first. */
  readonly #inMemory = new Set<Slot>();
  readonly #limit: number;
  readonly #freePlaces: number[] = [];
  #places = 0;
  #file: number | undefined;

  /** `limit` is how many pages are kept in memory. */
  constructor(limit: number) {
    this.#limit = Math.max(limit, 1);
  }

  get(fork: ForkName, blk: number): Buffer | undefined {
    const slot = this.#forks.get(fork)?.get(blk);
    if (slot === undefined) return undefined;
    if (slot.page === undefined) {
      slot.page = Buffer.allocUnsafe(BLOCK_SIZE);
      readSync(this.#file!, slot.page, 0, BLOCK_SIZE, slot.place! * BLOCK_SIZE);
    } else {
      this.#inMemory.delete(slot);
    }
    this.#inMemory.add(slot);
    this.#shrink();
    return slot.page;
  }

  /** Takes over `page`, which is new here, or replaces the one that was. */
  set(fork: ForkName, blk: number, page: Buffer): void {
    let blocks = this.#forks.get(fork);
    if (blocks === undefined) this.#forks.set(fork, (blocks = new Map()));
    let slot = blocks.get(blk);
    if (slot === undefined) blocks.set(blk, (slot = { fork, blk, page, place: undefined }));
    slot.page = page;
    this.#inMemory.delete(slot);
    this.#inMemory.add(slot);
    this.#shrink();
  }

  delete(fork: ForkName, blk: number): void {
    const slot = this.#forks.get(fork)?.get(blk);
    if (slot === undefined) return;
    this.#forks.get(fork)!.delete(blk);
    this.#release(slot);
  }

  /** Forgets the blocks of a fork from `blocks` on. */
  truncate(fork: ForkName, blocks: number): void {
    const slots = this.#forks.get(fork);
    if (slots === undefined) return;
    for (const slot of slots.values()) {
      if (slot.blk < blocks) continue;
      slots.delete(slot.blk);
      this.#release(slot);
    }
    if (slots.size === 0) this.#forks.delete(fork);
  }

  /** Forgets all forks whose names begin so: `spc/db/` is a database, `spc/db/rel/` a relation. */
  drop(prefix: string): void {
    for (const fork of this.#forks.keys()) if (fork.startsWith(prefix)) this.truncate(fork, 0);
  }

  /** Calls back with every page, which is not to be changed. */
  forEach(visit: (page: Buffer, fork: ForkName, blk: number) => void): void {
    for (const [fork, slots] of this.#forks) {
      for (const blk of slots.keys()) visit(this.get(fork, blk)!, fork, blk);
    }
  }

  close(): void {
    this.#forks.clear();
    this.#inMemory.clear();
    if (this.#file !== undefined) closeSync(this.#file);
    this.#file = undefined;
  }

  #release(slot: Slot): void {
    this.#inMemory.delete(slot);
    if (slot.place !== undefined) this.#freePlaces.push(slot.place);
  }

  #shrink(): void {
    if (this.#inMemory.size <= this.#limit) return;
    for (const slot of this.#inMemory) {
      slot.place ??= this.#freePlaces.pop() ?? this.#places++;
      writeSync((this.#file ??= openUnnamed()), slot.page!, 0, BLOCK_SIZE, slot.place * BLOCK_SIZE);
      slot.page = undefined;
      this.#inMemory.delete(slot);
      return;
    }
  }
}

function openUnnamed(): number {
  const path = join(tmpdir(), `strata-wal-verify-${randomUUID()}`);
  const file = openSync(path, 'wx+', 0o600);
  unlinkSync(path);
  return file;
}
