/**
 * The memory of open layers, in pieces that are used again: who fills and drops 4 MiB a hundred times a second would have the garbage
 * collector look through the whole heap for each few dozen of them, and the kernel clear their pages anew.
 *
 * Invariant: nobody has a view of a piece that was let go. What is let go is taken by the next layer, or detached and freed at once, so that a
 * view that is kept in spite of this fails instead of showing something else's bytes for long.
 */

import { viewOf } from './copy-bytes.ts';

export const ARENA_BYTES_MAX = 4 * 1024 * 1024;
const ARENA_BYTES_MIN = 16 * 1024;
/** As many as a large layer has; what another timeline lets go beyond it is freed. */
const FREE_COUNT_MAX = 16;
/** What nobody has wanted for so long is freed. */
const FREE_MS = 5_000;

export interface Arena {
  readonly bytes: Buffer;
  readonly view: DataView;
  /** The same memory, in words of the processor's own byte order. */
  readonly words: Int32Array;
}

const free: Arena[] = [];
let timer: NodeJS.Timeout | undefined;

/** Memory for `bytesMin` bytes at least, and otherwise for about `bytesWanted`. What is in it is anything. */
export function takeArena(bytesMin: number, bytesWanted: number): Arena {
  const wanted = Math.min(ARENA_BYTES_MAX, Math.max(ARENA_BYTES_MIN, bytesWanted));
  const size = Math.max(wanted, (bytesMin + 3) & ~3);
  if (size === ARENA_BYTES_MAX) {
    timer?.refresh();
    const used = free.pop();
    if (used !== undefined) return used;
  }
  const bytes = Buffer.allocUnsafeSlow(size);
  return { bytes, view: viewOf(bytes), words: new Int32Array(bytes.buffer, 0, size >>> 2) };
}

/** The caller has no view of it any more. */
export function letGo(arena: Arena): void {
  if (arena.bytes.length === ARENA_BYTES_MAX && free.length < FREE_COUNT_MAX) {
    free.push(arena);
    timer ??= setTimeout(freeAll, FREE_MS).unref();
  } else {
    detach(arena);
  }
}

function freeAll(): void {
  timer = undefined;
  for (const arena of free.splice(0)) detach(arena);
}

/** Its memory is free when this returns, and not some time later. */
function detach({ bytes }: Arena): void {
  (bytes.buffer as ArrayBuffer).transfer(0);
}
