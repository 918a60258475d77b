/** A timeline with what searches in its WAL index need (ingest/wal-search.ts). Ancestors are made as they are asked for. */

import type { Lsn } from '../postgres/lsn.ts';
import type { WalIndexChunk } from './ingest/wal-index.ts';
import { lsnForTimestamp } from './ingest/wal-search.ts';
import type { IndexedTimeline } from './ingest/wal-search.ts';
import type { Timeline } from './timeline.ts';

/** Where the part of a timeline's index is found that is in memory only. */
export interface IndexTails {
  indexTail(timelineId: string): WalIndexChunk | undefined;
}

const UNIX_TO_POSTGRES_EPOCH_MS = 946_684_800_000;

export class Indexed implements IndexedTimeline {
  readonly reader: Timeline;
  readonly #tails: IndexTails;

  constructor(timeline: Timeline, tails: IndexTails) {
    this.reader = timeline;
    this.#tails = tails;
  }

  get startLsn(): Lsn {
    return this.reader.index.startLsn;
  }

  get tail(): WalIndexChunk | undefined {
    return this.#tails.indexTail(this.reader.timelineId);
  }

  get ancestor(): IndexedTimeline | undefined {
    const { ancestor } = this.reader;
    return ancestor === undefined ? undefined : new Indexed(ancestor, this.#tails);
  }
}

/** The LSN of a timeline's state at a time (milliseconds since 1970); undefined when that was before all that is known. */
export function lsnAtTime(timeline: IndexedTimeline, timeMs: number): Lsn | undefined {
  const { kind, lsn } = lsnForTimestamp(timeline, (timeMs - UNIX_TO_POSTGRES_EPOCH_MS) * 1000);
  return kind === 'present' || kind === 'future' ? lsn : undefined;
}
