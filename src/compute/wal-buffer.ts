/**
 * A window of WAL in memory: bytes are copied in at the end, sent from anywhere, and let go of at the start.
 *
 * Copied, because Postgres sends a few hundred bytes at a time and keeping those would keep the 64 KiB that each was received in. A block is
 * never written again where it was filled, and used anew only when nobody can hold it any more: a socket may still do so when it is let go of. New blocks
 * all the time, while much WAL comes, would make a third of this process' work that of collecting them.
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
