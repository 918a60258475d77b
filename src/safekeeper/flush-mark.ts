/**
 * How far a timeline's log was durable a moment ago: a small record that is written in place, some times a second while WAL comes.
 *
 * A start finds the end of the log by looking for the first record that is not whole. A write that was torn by a crash looks like that, and had not been
 * acknowledged; but so does damage to WAL that had been. Whoever votes with such a log would help to elect a leader without what he himself had
 * acknowledged. So a log that ends before the mark gives no vote until its leader has brought it back there (`votesFrom`, consensus/acceptor.ts).
 *
 *   two slots, at 0 and 512, of which the one with the higher number counts; written in turn, so that a torn write leaves the other
 *   offset  size  field
 *        0     8  magic "STRATAFM"
 *        8     4  number, u32 little-endian
 *       12     8  end of the log, u64
 *       20     8  term in which what is before that was written, u64
 *       28     4  CRC32C of bytes 0 to 28, u32
 *
 * Invariant: a legitimate cut of the log lowers the mark first.
 */
import { constants } from 'node:fs';
import { type FileHandle, open, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { crc32c } from '../base/crc32c.ts';
import type { LogPosition } from '../consensus/term-history.ts';
import { readLsn, writeLsn } from '../postgres/lsn.ts';

export const FLUSH_MARK_NAME = 'flushed';

const MAGIC = Buffer.from('STRATAFM');
const SLOT_BYTES = 512;
const RECORD_BYTES = 32;
const INTERVAL_MS = 200;

export class FlushMark {
  readonly #path: string;
  readonly #onError: (error: unknown) => void;
  #handle: FileHandle | undefined;
  #number = 0;
  #wanted: LogPosition | undefined;
  #timer: NodeJS.Timeout | undefined;
  #writing: Promise<void> = Promise.resolve();

  constructor(directory: string, onError: (error: unknown) => void) {
    this.#path = join(directory, FLUSH_MARK_NAME);
    this.#onError = onError;
  }

  /** Undefined when there is none. */
  async read(): Promise<LogPosition | undefined> {
    let file: Buffer;
    try {
      file = await readFile(this.#path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
      throw error;
    }
    let newest: LogPosition | undefined;
    for (const offset of [0, SLOT_BYTES]) {
      const slot = file.subarray(offset, offset + RECORD_BYTES);
      const isWhole = slot.length === RECORD_BYTES && slot.subarray(0, MAGIC.length).equals(MAGIC);
      if (!isWhole || slot.readUInt32LE(28) !== crc32c(slot, 0, 28)) continue;
      const number = slot.readUInt32LE(8);
      if (newest !== undefined && number < this.#number) continue;
      this.#number = number;
      newest = { flushLsn: readLsn(slot, 12), lastLogTerm: readLsn(slot, 20) };
    }
    return newest;
  }

  /** The log is durable up to there; written soon. */
  note(position: LogPosition): void {
    this.#wanted = position;
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.#write().catch(this.#onError);
    }, INTERVAL_MS);
  }

  /** The log is about to be cut; durable when it resolves. */
  async lower(position: LogPosition): Promise<void> {
    this.#wanted = position;
    await this.#write();
  }

  /** Writes what was noted and closes the file; the next note opens it anew. */
  async release(): Promise<void> {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    await this.#write();
    const handle = this.#handle;
    this.#handle = undefined;
    await handle?.close();
  }

  #write(): Promise<void> {
    const written = this.#writing.catch(() => {}).then(async () => this.#writeWanted());
    this.#writing = written;
    return written;
  }

  async #writeWanted(): Promise<void> {
    const wanted = this.#wanted;
    if (wanted === undefined) return;
    this.#wanted = undefined;
    if (this.#handle === undefined) {
      const { O_RDWR, O_CREAT, O_DSYNC } = constants;
      this.#handle = await open(this.#path, O_RDWR | O_CREAT | O_DSYNC, 0o600);
      const { size } = await this.#handle.stat();
      if (size < 2 * SLOT_BYTES) await this.#handle.write(Buffer.alloc(2 * SLOT_BYTES), 0, 2 * SLOT_BYTES, 0);
    }
    this.#number++;
    const slot = Buffer.alloc(RECORD_BYTES);
    MAGIC.copy(slot);
    slot.writeUInt32LE(this.#number, 8);
    writeLsn(slot, wanted.flushLsn, 12);
    writeLsn(slot, wanted.lastLogTerm, 20);
    slot.writeUInt32LE(crc32c(slot, 0, 28), 28);
    await this.#handle.write(slot, 0, RECORD_BYTES, (this.#number % 2) * SLOT_BYTES);
  }
}
