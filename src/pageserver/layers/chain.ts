/**
 * What has to be replayed to get one key's value: its values, newest first, as they are found on the way from new to old.
 */

import type { Lsn } from '../../postgres/lsn.ts';
import type { Key, KeyRange } from '../key.ts';
import { needsNoPrior } from '../value.ts';

export class Chain {
  readonly values: Buffer[] = [];
  readonly lsns: Lsn[] = [];
  /**
   * Why the search is over. base: the last (oldest) value needs nothing before it. floor: nothing more above the floor. absent: an image
   * layer says that the key does not exist before these values.
   */
  end: 'base' | 'floor' | 'absent' | undefined;

  /** Adds an older value; true when the search is over. */
  push(value: Buffer, lsn: Lsn): boolean {
    this.values.push(value);
    this.lsns.push(lsn);
    if (!needsNoPrior(value[0]!)) return false;
    this.end = 'base';
    return true;
  }

  /** For another search. */
  clear(): void {
    this.values.length = 0;
    this.lsns.length = 0;
    this.end = undefined;
  }

  /** Ends the search at the floor. */
  reachFloor(): true {
    this.end = 'floor';
    return true;
  }
}

/** A piece of a timeline's history that can be searched: a layer, in memory or on disk. */
export interface ValueSource {
  /**
   * Adds the key's values with `floor < LSN <= lsn` to the chain, newest first, until one needs nothing before it. True when the
   * search is over; the chain says why.
   */
  collect(key: Key, lsn: Lsn, floor: Lsn, chain: Chain): boolean;
  /** Calls back with the keys in the range that have any value here, in order. */
  forEachKey(range: KeyRange, visit: (key: Key) => void): void;
}
