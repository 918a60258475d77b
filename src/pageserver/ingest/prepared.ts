/**
 * Prepared transactions: their files in pg_twophase, as Postgres writes them at a checkpoint. Every prepared transaction has its
 * file here from its record on, since a compute starts without WAL to find it in. (Postgres: twophase.c.)
 */

import type { Lsn } from '../../postgres/lsn.ts';
import { twoPhaseKey } from '../key.ts';
import type { Key } from '../key.ts';
import type { TimelineWriter } from '../timeline-access.ts';
import { encodeImage, encodeTombstone } from '../value.ts';
import { fullXid } from './checkpoint-state.ts';

export class PreparedTransactions {
  readonly #writer: TimelineWriter;

  constructor(writer: TimelineWriter) {
    this.#writer = writer;
  }

  /** `nextXid` is the next full xid: it tells the epoch of `xid`. */
  add(xid: number, file: Buffer, nextXid: number, lsn: Lsn): void {
    this.#writer.put(keyOf(xid, nextXid), lsn, encodeImage(file));
  }

  remove(xid: number, nextXid: number, lsn: Lsn): void {
    const key = keyOf(xid, nextXid);
    if (this.#writer.get(key) !== undefined) this.#writer.put(key, lsn, encodeTombstone());
  }
}

function keyOf(xid: number, nextXid: number): Key {
  const full = fullXid(xid, nextXid);
  return twoPhaseKey(Math.floor(full / 2 ** 32), full % 2 ** 32);
}
