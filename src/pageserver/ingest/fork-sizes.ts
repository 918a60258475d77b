/**
 * Sizes of relation forks, as the timeline has them, with a cache: every block reference asks.
 *
 * The cache is by database and by `rel * 4 + fork`, so that a lookup makes no garbage. It is bounded: when it is full it is emptied.
 */

import type { Lsn } from '../../postgres/lsn.ts';
import { relationSizeKey } from '../key.ts';
import type { TimelineWriter } from '../timeline-access.ts';
import { encodeCountImage, encodeTombstone } from '../value.ts';

const MAX_CACHED = 200_000;
const ABSENT = -1;
const TOMBSTONE = encodeTombstone();

type Database = Map<number, number>;

export class ForkSizes {
  readonly #writer: TimelineWriter;
  readonly #tablespaces = new Map<number, Map<number, Database>>();
  #cached = 0;
  #lastSpc = -1;
  #lastDb = -1;
  #last: Database = new Map();

  constructor(writer: TimelineWriter) {
    this.#writer = writer;
  }

  /** Blocks; undefined when the fork does not exist. */
  get(spc: number, db: number, rel: number, fork: number): number | undefined {
    const database = this.#database(spc, db);
    let size = database.get(rel * 4 + fork);
    if (size === undefined) {
      const image = this.#writer.get(relationSizeKey(spc, db, rel, fork));
      size = image === undefined ? ABSENT : image.readUInt32LE(0);
      this.#remember(database, rel * 4 + fork, size);
    }
    return size === ABSENT ? undefined : size;
  }

  set(spc: number, db: number, rel: number, fork: number, blocks: number, lsn: Lsn): void {
    this.#remember(this.#database(spc, db), rel * 4 + fork, blocks);
    this.#writer.put(relationSizeKey(spc, db, rel, fork), lsn, encodeCountImage(blocks));
  }

  /** The fork is gone, if it was there. */
  remove(spc: number, db: number, rel: number, fork: number, lsn: Lsn): void {
    if (this.get(spc, db, rel, fork) === undefined) return;
    this.#remember(this.#database(spc, db), rel * 4 + fork, ABSENT);
    this.#writer.put(relationSizeKey(spc, db, rel, fork), lsn, TOMBSTONE);
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

  #remember(database: Database, id: number, size: number): void {
    if (this.#cached >= MAX_CACHED) {
      for (const databases of this.#tablespaces.values()) for (const each of databases.values()) each.clear();
      this.#cached = 0;
    }
    const before = database.size;
    database.set(id, size);
    this.#cached += database.size - before;
  }
}
