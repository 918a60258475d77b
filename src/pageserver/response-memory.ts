/**
 * Memory for responses that is used again when the system has taken them: memory that is given up for each response makes V8 collect garbage for
 * every few hundred pages that are served.
 */

import { PAGE_RESPONSE_HEADER_BYTES } from '../api/pages.ts';
import { BLOCK_SIZE } from '../postgres/page-size.ts';

/** Of each size; what comes back beyond it is left to V8. */
const FREE_BYTES_MAX = 4 * 1024 * 1024;

export class ResponseMemory {
  /** At n: for responses of up to 2^n pages. */
  readonly #free: Buffer[][] = [];

  /** For a response of so many pages, with its header. */
  take(pageCount: number): Buffer {
    const size = sizeOf(pageCount);
    const memory = this.#free[size]?.pop() ?? Buffer.allocUnsafeSlow(responseBytes(2 ** size));
    const length = responseBytes(pageCount);
    return length === memory.length ? memory : memory.subarray(0, length);
  }

  /** Nobody looks any more at what `take` gave for so many pages. */
  giveBack(response: Buffer, pageCount: number): void {
    const size = sizeOf(pageCount);
    const free = (this.#free[size] ??= []);
    if ((free.length + 1) * response.buffer.byteLength <= FREE_BYTES_MAX) free.push(Buffer.from(response.buffer));
  }
}

function sizeOf(pageCount: number): number {
  return 32 - Math.clz32(pageCount - 1);
}

function responseBytes(pageCount: number): number {
  return PAGE_RESPONSE_HEADER_BYTES + pageCount * BLOCK_SIZE;
}
