/**
 * What a WAL record implies beyond the blocks it references: the vocabulary between the pure functions that read records (one file
 * for each resource manager) and Ingest, which alone knows what exists and writes.
 *
 * Invariants:
 * - A change says what the record means, not what is to be written: whether a map page or a fork exists is Ingest's to look up.
 * - The changes of a record are applied in the order of the list.
 */

import type { CheckPoint } from '../../postgres/checkpoint.ts';
import type { ControlFileParameters } from '../../postgres/control-file.ts';
import type { RelationKey } from '../../postgres/relation.ts';
import type { RelationFork } from '../key.ts';
import type { DerivedChange, VisibilityClear } from '../redo/derived.ts';

export type Change =
  /** Bits of the relation's visibility map are cleared, on map pages that exist. */
  | { readonly kind: 'clear-visibility'; readonly relation: RelationKey; readonly clears: readonly VisibilityClear[] }
  /** A fork comes to exist with no blocks, unless it exists. */
  | { readonly kind: 'create-fork'; readonly fork: RelationFork }
  /** The heap ends at `blocks` from here on; its maps are cut to match. */
  | {
      readonly kind: 'truncate-relation';
      readonly relation: RelationKey;
      readonly blocks: number;
      readonly main: boolean;
      readonly freeSpace: boolean;
      readonly visibility: boolean;
    }
  /** All forks of a relation are gone. */
  | { readonly kind: 'drop-relation'; readonly relation: RelationKey }
  /** A database's directory comes to exist, with nothing in it but PG_VERSION. */
  | { readonly kind: 'create-database'; readonly spc: number; readonly db: number }
  /** A database's directory becomes a copy of another's, whatever it was before. */
  | {
      readonly kind: 'copy-database';
      readonly spc: number;
      readonly db: number;
      readonly fromSpc: number;
      readonly fromDb: number;
    }
  /** A database's directory in one tablespace is gone. */
  | { readonly kind: 'drop-database'; readonly spc: number; readonly db: number }
  /** The filenode map of a database (spc 1664, db 0: of the shared relations). */
  | { readonly kind: 'relation-map'; readonly spc: number; readonly db: number; readonly map: Buffer }
  /** A page of an SLRU becomes zeroes; the SLRU reaches at least to it. */
  | { readonly kind: 'zero-slru-page'; readonly slru: number; readonly page: number }
  | { readonly kind: 'change-slru-page'; readonly slru: number; readonly change: DerivedChange }
  /** Segments of an SLRU whose every page is older than `cutoffPage` are gone. */
  | { readonly kind: 'truncate-slru'; readonly slru: number; readonly cutoffPage: number }
  | { readonly kind: 'drop-slru-segment'; readonly slru: number; readonly segment: number }
  /** A transaction is prepared; `file` is what Postgres writes to pg_twophase at the next checkpoint. */
  | { readonly kind: 'prepare'; readonly xid: number; readonly file: Buffer }
  /** A prepared transaction is committed or rolled back. */
  | { readonly kind: 'forget-prepared'; readonly xid: number }
  /** These transactions committed at `timeUs`; matters to commit timestamps, where they are tracked. */
  | {
      readonly kind: 'commit-timestamps';
      readonly timeUs: number;
      readonly origin: number;
      readonly xids: readonly number[];
    }
  /** The record is a commit; `timeUs` is when, in microseconds since 2000-01-01. */
  | { readonly kind: 'commit'; readonly timeUs: number }
  /** Transaction ids that exist, besides the record's own. */
  | { readonly kind: 'xids'; readonly xids: readonly number[] }
  | { readonly kind: 'next-oid'; readonly nextOid: number }
  | { readonly kind: 'next-multixact'; readonly multi: number; readonly offset: number }
  | { readonly kind: 'oldest-xid'; readonly xid: number; readonly db: number }
  | { readonly kind: 'oldest-multixact'; readonly multi: number; readonly db: number }
  | { readonly kind: 'oldest-commit-timestamp'; readonly xid: number }
  | { readonly kind: 'oldest-active-xid'; readonly xid: number }
  | { readonly kind: 'wal-level'; readonly walLevel: number }
  | { readonly kind: 'full-page-writes'; readonly on: boolean }
  | { readonly kind: 'parameters'; readonly parameters: ControlFileParameters }
  | { readonly kind: 'checkpoint'; readonly shutdown: boolean; readonly checkPoint: CheckPoint };

export const NO_CHANGES: readonly Change[] = [];
