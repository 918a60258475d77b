/**
 * A window of WAL in memory: bytes are copied in at the end, sent from anywhere, and let go of at the start.
 *
 * Copied, because Postgres sends a few hundred bytes at a time and keeping those would keep the 64 KiB that each was received in. New blocks all the time, while
 * much WAL comes, would make a third of this process' work that of collecting them; so blocks are used anew.
 *
 * Sockets send from these blocks, later. So a block is never written again where it was filled, and used anew only once every safekeeper that is a member has
 * acknowledged all of it, though it is let go of before. No other bytes can leave then in the name of those that were there:
 *   - What a connection was given and is acknowledged on it has left this process. (Acknowledged may also be what came over an earlier connection, while this one
 *     still has it to send. Then the safekeeper writes behind it already, and takes appends only where it writes.)
 *   - A connection is destroyed as it is lost, or as its safekeeper ceases to be a member: what it had queued is never sent.
 *   - Another election has a buffer of its own, and after `close` or the loss of the lead nothing is appended any more.
 * What is acknowledged belongs to one term, and nobody cuts that within its term: a log that begins anew has a new connection.
 */
import assert from 'node:assert/strict';
import type { Lsn } from '../postgres/lsn.ts';

const BLOCK_BYTES = 256 * 1024;
const MAX_SPARE_BLOCKS = 16;

export class WalBuffer {
  /** All of BLOCK_BYTES; the first begins at #baseLsn. */
  #blocks: Buffer[] = [];
  /** To be used anew. */
  readonly #spare: Buffer[] = [];
  #baseLsn: Lsn;
  #startLsn: Lsn;
  #endLsn: Lsn;

  constructor(startLsn: Lsn) {
    this.#baseLsn = startLsn;
    this.#startLsn = startLsn;
    this.#endLsn = startLsn;
  }

  /** The first byte that is here. */
  get startLsn(): Lsn {
    return this.#startLsn;
  }

  get endLsn(): Lsn {
    return this.#endLsn;
  }

  append(bytes: Buffer): void {
    let from = 0;
    while (from < bytes.length) {
      const filled = this.#endLsn - this.#baseLsn;
      const index = Math.floor(filled / BLOCK_BYTES);
      if (index === this.#blocks.length) this.#blocks.push(this.#spare.pop() ?? Buffer.allocUnsafeSlow(BLOCK_BYTES));
      const copied = bytes.copy(this.#blocks[index]!, filled % BLOCK_BYTES, from);
      from += copied;
      this.#endLsn += copied;
    }
  }

  /** A view of what follows `lsn`, as much as lies in one block and at least one byte. `lsn` is in [startLsn, endLsn). */
  view(lsn: Lsn): Buffer {
    assert(lsn >= this.#startLsn && lsn < this.#endLsn, 'the WAL asked for is in the buffer');
    const offset = lsn - this.#baseLsn;
    const inBlock = offset % BLOCK_BYTES;
    const length = Math.min(BLOCK_BYTES - inBlock, this.#endLsn - lsn);
    return this.#blocks[Math.floor(offset / BLOCK_BYTES)]!.subarray(inBlock, inBlock + length);
  }

  /** Lets go of everything before `lsn`; of what is before `unusedLsn` no view is used any more. */
  trim(lsn: Lsn, unusedLsn: Lsn): void {
    if (lsn <= this.#startLsn) return;
    assert(lsn <= this.#endLsn, 'only WAL that is here can be let go of');
    this.#startLsn = lsn;
    const count = Math.floor((lsn - this.#baseLsn) / BLOCK_BYTES);
    if (count === 0) return;
    const unusedCount = Math.min(count, Math.max(0, Math.floor((unusedLsn - this.#baseLsn) / BLOCK_BYTES)));
    this.#spare.push(...this.#blocks.slice(0, Math.min(unusedCount, MAX_SPARE_BLOCKS - this.#spare.length)));
    this.#blocks = this.#blocks.slice(count);
    this.#baseLsn += count * BLOCK_BYTES;
  }
}
