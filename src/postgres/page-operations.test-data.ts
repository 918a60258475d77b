/**
 * Random operations on a page for page.test.ts: from a seed, the same on every machine, so that what Postgres' own code made of them could be
 * written down once. Which operation comes next depends on the page as it is, so that most of them are possible.
 */

import {
  itemFlags,
  itemLength,
  LP_UNUSED,
  markItemDead,
  pageAddItem,
  pageGetExactFreeSpace,
  pageGetFreeSpace,
  pageGetFreeSpaceForMultipleTuples,
  pageGetHeapFreeSpace,
  pageIndexMultiDelete,
  pageIndexTupleDelete,
  pageIndexTupleDeleteNoCompact,
  pageIndexTupleOverwrite,
  pageInit,
  pageMaxOffset,
  pageRepairFragmentation,
  pageTruncateLinePointerArray,
  setItemDead,
  setItemRedirect,
  setItemUnused,
} from './page.ts';

export type PageOperation =
  | { readonly kind: 'init'; readonly specialSize: number }
  | { readonly kind: 'add'; readonly item: Buffer; readonly offset: number; readonly flags: number }
  | { readonly kind: 'multi-delete'; readonly offsets: readonly number[] }
  | { readonly kind: 'delete'; readonly offset: number }
  | { readonly kind: 'delete-no-compact'; readonly offset: number }
  | { readonly kind: 'overwrite'; readonly offset: number; readonly item: Buffer }
  | { readonly kind: 'repair' }
  | { readonly kind: 'truncate' }
  | { readonly kind: 'mark'; readonly offset: number; readonly as: 'unused' | 'dead' | 'redirect' | 'mark-dead' }
  | { readonly kind: 'free-space'; readonly count: number };

const OPERATIONS = 600;

/** Yields operations; the caller applies each to `page` before it asks for the next. */
export function* randomPageOperations(seed: number, kind: 'heap' | 'index', page: Buffer): Generator<PageOperation> {
  const random = xorshift(seed);
  const item = (): Buffer => Buffer.alloc(1 + random(random(4) === 0 ? 900 : 90), random(256));
  yield { kind: 'init', specialSize: kind === 'heap' ? 0 : 13 };
  let holes = false; // Line pointers without storage, which some index operations do not allow.
  for (let i = 0; i < OPERATIONS; i++) {
    const count = pageMaxOffset(page);
    const offset = 1 + random(Math.max(count, 1));
    const dice = random(100);
    if (dice < 55 || count === 0) {
      if (kind === 'heap') {
        yield {
          kind: 'add',
          item: item(),
          offset: random(5) === 0 ? 1 + random(count + 2) : 0,
          flags: random(5) === 0 ? 3 : 2,
        };
      } else {
        yield {
          kind: 'add',
          item: item(),
          offset: random(2) === 0 ? 1 + random(count + 1) : 0,
          flags: random(6) === 0 ? 1 : 0,
        };
      }
    } else if (dice < 60) {
      yield { kind: 'free-space', count: random(6) };
    } else if (kind === 'heap') {
      if (dice < 80) {
        const as = (['unused', 'unused', 'dead', 'redirect'] as const)[random(4)]!;
        const run = random(3) === 0 ? random(40) : 1;
        for (let at = offset; at < offset + run && at <= count; at++) yield { kind: 'mark', offset: at, as };
      } else if (dice < 93) {
        yield { kind: 'repair' };
      } else if (hasUnused(page)) {
        yield { kind: 'truncate' };
      }
    } else if (dice < 70 && !holes) {
      const chance = 1 + random(6);
      const offsets = Array.from({ length: count }, (_, at) => at + 1).filter(() => random(chance) === 0);
      yield { kind: 'multi-delete', offsets };
    } else if (dice < 80 && !holes) {
      yield { kind: 'delete', offset };
    } else if (dice < 86 && itemLength(page, offset) > 0) {
      yield { kind: 'mark', offset, as: 'mark-dead' };
    } else if (dice < 88 && itemLength(page, offset) > 0 && i > OPERATIONS / 2) {
      holes ||= offset < count;
      yield { kind: 'delete-no-compact', offset };
    } else if (itemLength(page, offset) > 0) {
      yield { kind: 'overwrite', offset, item: item() };
    }
  }
}

/** Applies an operation and returns its number, 0 where it has none. */
export function applyPageOperation(page: Buffer, operation: PageOperation): number {
  switch (operation.kind) {
    case 'init':
      pageInit(page, operation.specialSize);
      return 0;
    case 'add':
      return pageAddItem(page, operation.item, operation.offset, operation.flags);
    case 'multi-delete':
      pageIndexMultiDelete(page, operation.offsets);
      return 0;
    case 'delete':
      pageIndexTupleDelete(page, operation.offset);
      return 0;
    case 'delete-no-compact':
      pageIndexTupleDeleteNoCompact(page, operation.offset);
      return 0;
    case 'overwrite':
      return pageIndexTupleOverwrite(page, operation.offset, operation.item) ? 1 : 0;
    case 'repair':
      pageRepairFragmentation(page);
      return 0;
    case 'truncate':
      pageTruncateLinePointerArray(page);
      return 0;
    case 'mark':
      if (operation.as === 'unused') setItemUnused(page, operation.offset);
      else if (operation.as === 'dead') setItemDead(page, operation.offset);
      else if (operation.as === 'redirect') setItemRedirect(page, operation.offset, 1);
      else markItemDead(page, operation.offset);
      return 0;
    case 'free-space':
      return (
        (pageGetFreeSpace(page) +
          3 * pageGetHeapFreeSpace(page) +
          5 * pageGetExactFreeSpace(page) +
          7 * pageGetFreeSpaceForMultipleTuples(page, operation.count)) &
        0xffff
      );
  }
}

function hasUnused(page: Buffer): boolean {
  for (let offset = 1; offset <= pageMaxOffset(page); offset++) if (itemFlags(page, offset) === LP_UNUSED) return true;
  return false;
}

/** `random(n)` is in [0, n). */
function xorshift(seed: number): (bound: number) => number {
  let state = seed | 0 || 1;
  return (bound) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % bound;
  };
}
