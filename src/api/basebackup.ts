/**
 * A basebackup: everything that a compute starts from at an LSN but the pages of its relations.
 *
 * It crosses the wire as a JSON header and one attachment:
 *
 *   control file          8192 bytes
 *   relations             n × { u32 tablespace, u32 database, u32 relation, u8 fork, u8 source fork, u16 zero, u32 blocks }, 20 bytes each
 *   files                 their bytes, one after the other, in the order of the header
 *
 * Everything is little-endian. The lengths are in the header and add up to the attachment's.
 */

import assert from 'node:assert/strict';

import type { CheckPoint } from '../postgres/checkpoint.ts';
import { CONTROL_FILE_SIZE } from '../postgres/control-file.ts';
import type { ControlFileParameters } from '../postgres/control-file.ts';
import type { Lsn } from '../postgres/lsn.ts';

/** A relation fork of a basebackup. */
export interface BasebackupRelation {
  readonly spc: number;
  readonly db: number;
  readonly rel: number;
  readonly fork: number;
  /**
   * The fork whose pages are to be read for this one: the same, except for the main fork of an unlogged relation, which begins as a copy of
   * its init fork.
   */
  readonly sourceFork: number;
  readonly blocks: number;
}

export interface BasebackupFile {
  /** Relative to the data directory. */
  readonly path: string;
  readonly bytes: Buffer;
}

interface BasebackupPosition {
  /** End of a whole record: where the compute's own WAL begins. */
  readonly lsn: Lsn;
  /** Start of that record, which the next one has to link back to. */
  readonly prevRecordLsn: Lsn;
  readonly pgVersion: number;
  /** What a shutdown checkpoint at the LSN says. Redo, timelines, time and oldestActiveXid are those of the last checkpoint. */
  readonly checkPoint: CheckPoint;
  /** The settings that pg_control shows. */
  readonly parameters: ControlFileParameters;
  /** Where the record of the last checkpoint starts. */
  readonly checkpointLsn: Lsn;
  /** Where the last checkpoint's record ends when it is a shutdown checkpoint: equal to `lsn` after a clean stop. Else 0. */
  readonly shutdownLsn: Lsn;
  /** Databases whose directories exist, `global` (1664, 0) among them. */
  readonly databases: readonly { readonly spc: number; readonly db: number }[];
}

export interface Basebackup extends BasebackupPosition {
  /** The control file that initdb wrote. */
  readonly controlFile: Buffer;
  /** PG_VERSION files, filenode maps, SLRU segments, two-phase files. */
  readonly files: readonly BasebackupFile[];
  /** Every fork that exists, sorted; of unlogged relations the init fork and a main fork made from it. */
  readonly relations: readonly BasebackupRelation[];
}

/** The JSON half of an encoded basebackup. */
export interface BasebackupHeader extends BasebackupPosition {
  readonly relationCount: number;
  readonly files: readonly { readonly path: string; readonly length: number }[];
}

const RELATION_SIZE = 20;

export function encodeBasebackup(backup: Basebackup): { header: BasebackupHeader; attachment: Buffer } {
  const { controlFile, files, relations, ...position } = backup;
  assert.equal(controlFile.length, CONTROL_FILE_SIZE, 'a control file is 8192 bytes');
  const table = Buffer.alloc(relations.length * RELATION_SIZE);
  relations.forEach((relation, i) => {
    const at = i * RELATION_SIZE;
    table.writeUInt32LE(relation.spc, at);
    table.writeUInt32LE(relation.db, at + 4);
    table.writeUInt32LE(relation.rel, at + 8);
    table[at + 12] = relation.fork;
    table[at + 13] = relation.sourceFork;
    table.writeUInt32LE(relation.blocks, at + 16);
  });
  const header: BasebackupHeader = {
    ...position,
    relationCount: relations.length,
    files: files.map(({ path, bytes }) => ({ path, length: bytes.length })),
  };
  return { header, attachment: Buffer.concat([controlFile, table, ...files.map((file) => file.bytes)]) };
}

/** The buffers of the result are views of the attachment. Throws RangeError when header and attachment do not fit. */
export function decodeBasebackup(header: BasebackupHeader, attachment: Buffer): Basebackup {
  const { relationCount, files: fileLengths, ...position } = header;
  const tableEnd = CONTROL_FILE_SIZE + relationCount * RELATION_SIZE;
  const length = fileLengths.reduce((sum, file) => sum + file.length, tableEnd);
  if (attachment.length !== length) {
    throw new RangeError(`basebackup's attachment is ${attachment.length} bytes, its header says ${length}`);
  }
  const relations: BasebackupRelation[] = [];
  for (let at = CONTROL_FILE_SIZE; at < tableEnd; at += RELATION_SIZE) {
    relations.push({
      spc: attachment.readUInt32LE(at),
      db: attachment.readUInt32LE(at + 4),
      rel: attachment.readUInt32LE(at + 8),
      fork: attachment[at + 12]!,
      sourceFork: attachment[at + 13]!,
      blocks: attachment.readUInt32LE(at + 16),
    });
  }
  let at = tableEnd;
  const files = fileLengths.map(({ path, length: fileLength }) => {
    const bytes = attachment.subarray(at, at + fileLength);
    at += fileLength;
    return { path, bytes };
  });
  return { ...position, controlFile: attachment.subarray(0, CONTROL_FILE_SIZE), relations, files };
}
