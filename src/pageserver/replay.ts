/** Replays values of the page store on pages: redo for WAL records, derived changes for what records imply. */

import type { Lsn } from '../postgres/lsn.ts';
import type { PgVersion } from '../postgres/version.ts';
import { decodeWalRecordAt } from '../postgres/wal/record.ts';
import { applyDerived } from './redo/derived.ts';
import { applyRecord } from './redo/redo.ts';
import { decodeValue, RECORD_HEADER_BYTES, VALUE_KIND } from './value.ts';

/** What is replayed one after the other mostly lies in one piece of memory: making a view takes as long as decoding a record. */
let memory: Memory = makeMemory(new ArrayBuffer(0));

interface Memory {
  readonly buffer: ArrayBufferLike;
  readonly bytes: Buffer;
  readonly view: DataView;
}

/** See Replay in read.ts. */
export function replayValue(page: Buffer, value: Buffer, lsn: Lsn, pgVersion: PgVersion): void {
  const kind = value[0];
  if (kind === VALUE_KIND.record || kind === VALUE_KIND.initRecord) {
    // As decodeValue, without the views that it makes: a page may have hundreds of records.
    const length = value.length - RECORD_HEADER_BYTES;
    const { bytes, view } = memoryOf(value);
    const startLsn = length < 0 ? 0 : value.readUIntLE(2, 6);
    const record = decodeWalRecordAt(bytes, view, value.byteOffset + RECORD_HEADER_BYTES, length, startLsn, lsn);
    applyRecord(page, record, value[1]!, pgVersion);
    return;
  }
  const change = decodeValue(value);
  if (change.kind !== 'derived') throw new Error(`a value of kind ${change.kind} is not replayed`);
  applyDerived(page, change.subtype, change.payload);
}

/** All of the memory of which the value is a piece. */
function memoryOf({ buffer }: Buffer): Memory {
  if (memory.buffer !== buffer) memory = makeMemory(buffer);
  return memory;
}

function makeMemory(buffer: ArrayBufferLike): Memory {
  return { buffer, bytes: Buffer.from(buffer), view: new DataView(buffer) };
}
