/**
 * Passes WAL on from where it may be damaged, a disk or another process' disk: only whole records with the right CRC, each linked to the one before
 * (reader.ts), byte for byte as they came. So silent damage in one place does not become what others have.
 *
 * Invariant: what was given out is everything from the start to `endLsn`, and `endLsn` is the end of a record.
 */
import type { Lsn } from '../lsn.ts';
import type { PgVersion } from '../version.ts';
import { WalError } from './error.ts';
import { WalReader, type WalReaderOptions } from './reader.ts';
import type { WalRecord } from './record.ts';

export interface WholeRecordsOptions extends WalReaderOptions {
  /** Called for each record that is given out. */
  readonly onRecord?: (record: WalRecord) => void;
}

export class WholeRecords {
  readonly #reader: WalReader;
  readonly #onRecord: ((record: WalRecord) => void) | undefined;
  /** Bytes of a record that is not whole yet. */
  #waiting: Buffer[] = [];
  #lsn: Lsn;
  #damage: WalError | undefined;

  /** `startLsn` is the end of a record. */
  constructor(startLsn: Lsn, version: PgVersion, options: WholeRecordsOptions = {}) {
    this.#reader = new WalReader(startLsn, version, options);
    this.#onRecord = options.onRecord;
    this.#lsn = startLsn;
  }

  get endLsn(): Lsn {
    return this.#lsn;
  }

  /** Start of the last record that was given out. */
  get lastRecordStart(): Lsn | undefined {
    return this.#reader.lastRecordStart;
  }

  /** What is wrong with what follows `endLsn`: nothing more is given out then. */
  get damage(): WalError | undefined {
    return this.#damage;
  }

  /** Takes the bytes that follow those pushed before, and gives the bytes of all records that are whole now. */
  push(bytes: Buffer): Buffer[] {
    if (this.#damage !== undefined) return [];
    this.#read(bytes);
    const whole: Buffer[] = [];
    this.#waiting.push(bytes);
    while (this.#lsn < this.#reader.position) {
      const next = this.#waiting.shift()!;
      const part = next.subarray(0, this.#reader.position - this.#lsn);
      if (part.length < next.length) this.#waiting.unshift(next.subarray(part.length));
      this.#lsn += part.length;
      if (part.length > 0) whole.push(part);
    }
    return whole;
  }

  #read(bytes: Buffer): void {
    const reader = this.#reader;
    try {
      reader.push(reader.pushLsn, bytes);
      for (let record = reader.next(); record !== undefined; record = reader.next()) this.#onRecord?.(record);
    } catch (error) {
      if (!(error instanceof WalError)) throw error;
      this.#damage = error;
    }
  }
}
