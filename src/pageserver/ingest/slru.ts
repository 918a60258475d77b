/**
 * SLRUs: the four arrays of fixed-size entries that Postgres keeps in files of 32 pages: transaction statuses, the offsets and
 * members of multixacts, commit timestamps. Their page numbers wrap around with the ids they are indexed by.
 * (Postgres: slru.c, clog.c, multixact.c, commit_ts.c.)
 */

import { SLRU } from '../key.ts';
import { COMMIT_TIMESTAMPS_PER_PAGE, MULTIXACT_OFFSETS_PER_PAGE, TRANSACTIONS_PER_CLOG_PAGE } from '../redo/derived.ts';

export const PAGES_PER_SLRU_SEGMENT = 32;

const DIRECTORIES = ['pg_xact', 'pg_multixact/offsets', 'pg_multixact/members', 'pg_commit_ts'] as const;

/** Every SLRU that is kept, with its directory. */
export const SLRUS: readonly { readonly slru: number; readonly directory: string }[] = DIRECTORIES.map(
  (directory, slru) => ({ slru, directory }),
);

/** `pg_xact/0000`: the path of a segment, relative to the data directory. */
export function slruSegmentPath(slru: number, segment: number): string {
  return `${DIRECTORIES[slru]}/${segment.toString(16).toUpperCase().padStart(4, '0')}`;
}

/** The segment's number, or undefined when the name is not a segment's. */
export function parseSlruFileName(name: string): number | undefined {
  return /^[0-9A-F]{4,6}$/.test(name) ? parseInt(name, 16) : undefined;
}

/** True when every page of the segment is older than `cutoffPage`, the page of the oldest entry still wanted. */
export function slruSegmentIsOld(slru: number, segment: number, cutoffPage: number): boolean {
  const first = segment * PAGES_PER_SLRU_SEGMENT;
  return (
    slruPagePrecedes(slru, first, cutoffPage) && slruPagePrecedes(slru, first + PAGES_PER_SLRU_SEGMENT - 1, cutoffPage)
  );
}

/** Ids in the wrapping space of 32 bits: true when `a` is before `b`, counted the short way round. */
export function idPrecedes(a: number, b: number): boolean {
  return ((a - b) | 0) < 0;
}

/**
 * True when even the newest entry that page `a` can hold is before all those of page `b`. The constant keeps both clear of the
 * special ids at the start of page 0: first normal xid + 1, or first multixact + 1.
 */
function slruPagePrecedes(slru: number, a: number, b: number): boolean {
  const perPage = ENTRIES_PER_PAGE[slru];
  if (perPage === undefined) throw new RangeError(`pages of SLRU ${slru} are not removed by age`);
  const skip = slru === SLRU.multixactOffsets ? 2 : 4;
  const first = a * perPage + skip;
  const second = b * perPage + skip;
  return idPrecedes(first, second) && idPrecedes(first, second + perPage - 1);
}

const ENTRIES_PER_PAGE: Partial<Record<number, number>> = {
  [SLRU.clog]: TRANSACTIONS_PER_CLOG_PAGE,
  [SLRU.multixactOffsets]: MULTIXACT_OFFSETS_PER_PAGE,
  [SLRU.commitTs]: COMMIT_TIMESTAMPS_PER_PAGE,
};
