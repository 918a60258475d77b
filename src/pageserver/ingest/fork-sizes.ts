/**
 * Sizes of relation forks, as the timeline has them, with a cache: every block reference asks.
 *
 * The cache is by database and by `rel * 4 + fork`, so that a lookup makes no garbage; before it, a short one of the forks that were asked for last, found by
 * nothing but their numbers. It is bounded: when it is full it is emptied.
 */

import type { Lsn } from '../../postgres/lsn.ts';
import { relationSizeKey } from '../key.ts';
import type { TimelineWriter } from '../timeline-access.ts';
import { encodeCountImage, encodeTombstone } from '../value.ts';

const MAX_CACHED = 200_000;
const ABSENT = -1;
const TOMBSTONE = encodeTombstone();

/** How many forks are remembered as the last that were asked for: a power of two. */
const RECENT_COUNT = 64;

interface ForkSize {
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
  readonly fork: number;
  /** ABSENT when it does not exist. */
  blocks: number;
}

type Database = Map<number, ForkSize>;

export class ForkSizes {
  readonly #writer: TimelineWriter;
  readonly #tablespaces = new Map<number, Map<number, Database>>();
  readonly #recent: (ForkSize | undefined)[] = Array.from({ length: RECENT_COUNT }, () => undefined);
  #cached = 0;
  #lastSpc = -1;
  #lastDb = -1;
  #last: Database = new Map();

  constructor(writer: TimelineWriter) {
    this.#writer = writer;
  }

  /** Blocks; undefined when the fork does not exist. */
  get(spc: number, db: number, rel: number, fork: number): number | undefined {
    const place = (rel ^ (rel >>> 6) ^ (fork << 4)) & (RECENT_COUNT - 1);
    let size = this.#recent[place];
    if (size?.rel !== rel || size.fork !== fork || size.db !== db || size.spc !== spc) {
      size = this.#database(spc, db).get(rel * 4 + fork) ?? this.#read(spc, db, rel, fork);
      this.#recent[place] = size;
    }
    return size.blocks === ABSENT ? undefined : size.blocks;
  }

  set(spc: number, db: number, rel: number, fork: number, blocks: number, lsn: Lsn): void {
    this.#remember(spc, db, rel, fork, blocks);
    this.#writer.put(relationSizeKey(spc, db, rel, fork), lsn, encodeCountImage(blocks));
  }

  /** The fork is gone, if it was there. */
  remove(spc: number, db: number, rel: number, fork: number, lsn: Lsn): void {
    if (this.get(spc, db, rel, fork) === undefined) return;
    this.#remember(spc, db, rel, fork, ABSENT);
    this.#writer.put(relationSizeKey(spc, db, rel, fork), lsn, TOMBSTONE);
  }

  #read(spc: number, db: number, rel: number, fork: number): ForkSize {
    const image = this.#writer.get(relationSizeKey(spc, db, rel, fork));
    return this.#remember(spc, db, rel, fork, image === undefined ? ABSENT : image.readUInt32LE(0));
  }

  #database(spc: number, db: number): Database {
    if (spc === this.#lastSpc && db === this.#lastDb) return this.#last;
    let databases = this.#tablespaces.get(spc);
    if (databases === undefined) this.#tablespaces.set(spc, (databases = new Map()));
    let database = databases.get(db);
    if (database === undefined) databases.set(db, (database = new Map()));
    this.#lastSpc = spc;
    this.#lastDb = db;
    this.#last = database;
    return database;
  }

  #remember(spc: number, db: number, rel: number, fork: number, blocks: number): ForkSize {
    const database = this.#database(spc, db);
    const known = database.get(rel * 4 + fork);
    if (known !== undefined) {
      known.blocks = blocks;
      return known;
    }
    if (this.#cached >= MAX_CACHED) {
      for (const databases of this.#tablespaces.values()) for (const each of databases.values()) each.clear();
      this.#recent.fill(undefined);
      this.#cached = 0;
    }
    const size = { spc, db, rel, fork, blocks };
    database.set(rel * 4 + fork, size);
    this.#cached++;
    return size;
  }
}
