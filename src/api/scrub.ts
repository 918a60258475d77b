/** What scrub is asked, and what it finds: between the command that shows it and the platform that does it. */

import type { Lsn } from '../postgres/lsn.ts';
import type { RelationForkKey } from '../postgres/relation.ts';

export interface ScrubRequest {
  /** Timelines whose layers and objects are looked at; undefined: all that there are, those of templates included. */
  readonly timelineIds: readonly string[] | undefined;
  /** Whose pages are compared. */
  readonly branches: readonly { readonly name: string; readonly timelineId: string }[];
  /** Pages of each branch; 0: none. */
  readonly sample: number;
  readonly seed: number;
  /** WAL of each branch that is replayed, at most. */
  readonly walBytes: number;
  readonly deleteOrphans: boolean;
  readonly repair: boolean;
  readonly onProgress: (text: string) => void;
  readonly signal: AbortSignal;
}

export interface ScrubReport {
  readonly seed: number;
  readonly objectStore: string | undefined;
  readonly timelines: number;
  readonly local: Looked;
  /** Layers in the object store. */
  readonly remote: Looked;
  /** Objects of WAL. */
  readonly wal: { readonly objects: number; readonly bytes: number };
  /** Layers that are in the store only. */
  readonly evictedLayers: number;
  readonly findings: readonly Finding[];
  /** Of findings: those that were mended. */
  readonly repaired: readonly Finding[];
  readonly orphans: readonly { readonly name: string; readonly sizeBytes: number }[];
  readonly orphansDeleted: number;
  /** Remains of uploads that never ended. */
  readonly unfinishedRemoved: number;
  readonly replays: readonly BranchReplay[];
  readonly differences: readonly PageDifference[];
  readonly fileDifferences: readonly FileDifference[];
}

export interface Looked {
  readonly layers: number;
  readonly bytes: number;
}

/** Something that is not as it has to be. */
export interface Finding {
  readonly timelineId: string;
  readonly where: 'local' | 'object store';
  /** A file's path, or an object's name. */
  readonly name: string;
  /** In the file or object; 0 where it is about the whole. */
  readonly offset: number;
  readonly reason: string;
}

export interface BranchReplay {
  readonly branch: string;
  readonly timelineId: string;
  /** The WAL that was replayed; absent when there was none. */
  readonly fromLsn?: Lsn;
  readonly toLsn?: Lsn;
  /** From the beginning of the branch to what is in layers. */
  readonly walBytes: number;
  readonly records: number;
  readonly compared: number;
  /** Of those, made from WAL alone; the others begin with a page of the store. */
  readonly fromWalAlone: number;
  /** Not compared, because the replay could not make them. */
  readonly refused: number;
  /** Files (of SLRUs, filenode maps, prepared transactions) and forks' sizes that were compared. */
  readonly files: number;
  /** Why nothing was compared. */
  readonly skipped?: string;
}

export interface PageDifference {
  readonly branch: string;
  readonly timelineId: string;
  readonly fork: RelationForkKey;
  readonly blk: number;
  readonly lsn: Lsn;
  /** First byte that differs; undefined when the page could not be read. */
  readonly offset: number | undefined;
  readonly reason: string;
}

/** As PageDifference, of what is no page of a relation. */
export interface FileDifference {
  readonly branch: string;
  readonly timelineId: string;
  /** Relative to a data directory. */
  readonly file: string;
  readonly lsn: Lsn;
  /** First byte that differs; undefined when it is about the whole. */
  readonly offset: number | undefined;
  readonly reason: string;
}
