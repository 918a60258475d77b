/** A timeline with what searches in its WAL index need (ingest/wal-search.ts). Ancestors are made as they are asked for. */

import type { Lsn } from '../postgres/lsn.ts';
import type { WalIndexChunk } from './ingest/wal-index.ts';
import { lsnForTimestamp } from './ingest/wal-search.ts';
import type { IndexedTimeline } from './ingest/wal-search.ts';
import type { Timeline } from './timeline.ts';

const UNIX_TO_POSTGRES_EPOCH_MS = 946_684_800_000;

export class Indexed implements IndexedTimeline {
  readonly reader: Timeline;

  constructor(timeline: Timeline) {
    this.reader = timeline;
  }

  get startLsn(): Lsn {
    return this.reader.index.startLsn;
  }

  get horizonLsn(): Lsn | undefined {
    return this.reader.horizon?.lsn;
  }

  get tail(): WalIndexChunk | undefined {
    return this.reader.indexTail?.();
  }

  get ancestor(): IndexedTimeline | undefined {
    const { ancestor } = this.reader;
    return ancestor === undefined ? undefined : new Indexed(ancestor);
  }
}

/** The LSN of a timeline's state at a time (milliseconds since 1970); undefined when that was before all that is known. */
export function lsnAtTime(timeline: IndexedTimeline, timeMs: number): Lsn | undefined {
  const { kind, lsn } = lsnForTimestamp(timeline, (timeMs - UNIX_TO_POSTGRES_EPOCH_MS) * 1000);
  return kind === 'present' || kind === 'future' ? lsn : undefined;
}
