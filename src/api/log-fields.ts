/**
 * Fields of several of a safekeeper's messages (safekeeper-protocol.ts), little-endian:
 *
 *   history        u32 count, count × {u64 term, u64 start LSN}; at least one entry, terms ascending, LSNs not descending, all below 2^53
 *   configuration  u32 version, u8 flags (1 joint), u8 count, count × u32 node id; when joint, u8 count, count × u32 node id of the new members
 *
 * What is read throws `bad-request` when it is anything else.
 */
import { StrataError } from '../base/errors.ts';
import type { Configuration } from '../consensus/configuration.ts';
import type { TermHistory, TermStart } from '../consensus/messages.ts';
import { readLsn, writeLsn } from '../postgres/lsn.ts';

const HISTORY_ENTRY_BYTES = 16;
const FLAG_JOINT = 1;
const CONFIGURATION_FIXED_BYTES = 6;

export function encodeConfiguration({ version, members, newMembers }: Configuration): Buffer {
  const sets = newMembers === undefined ? [members] : [members, newMembers];
  const bytes = Buffer.alloc(CONFIGURATION_FIXED_BYTES + 4 * sets.flat().length + sets.length - 1);
  let offset = bytes.writeUInt32LE(version, 0);
  offset = bytes.writeUInt8(newMembers === undefined ? 0 : FLAG_JOINT, offset);
  for (const set of sets) {
    offset = bytes.writeUInt8(set.length, offset);
    for (const nodeId of set) offset = bytes.writeUInt32LE(nodeId, offset);
  }
  return bytes;
}

export function decodeConfiguration(payload: Buffer, start: number): { configuration: Configuration; end: number } {
  let end = start + CONFIGURATION_FIXED_BYTES - 1;
  const readSet = (): number[] => {
    need(payload, end + 1, 'configuration');
    const count = payload[end++]!;
    need(payload, end + 4 * count, 'configuration');
    return Array.from({ length: count }, () => payload.readUInt32LE((end += 4) - 4));
  };
  need(payload, end + 1, 'configuration');
  const version = payload.readUInt32LE(start);
  const isJoint = (payload[start + 4]! & FLAG_JOINT) !== 0;
  const members = readSet();
  return { configuration: { version, members, ...(isJoint ? { newMembers: readSet() } : {}) }, end };
}

export function encodeHistory(history: TermHistory): Buffer {
  const bytes = Buffer.alloc(4 + history.length * HISTORY_ENTRY_BYTES);
  bytes.writeUInt32LE(history.length, 0);
  let offset = 4;
  for (const entry of history) {
    writeLsn(bytes, entry.term, offset);
    writeLsn(bytes, entry.startLsn, offset + 8);
    offset += HISTORY_ENTRY_BYTES;
  }
  return bytes;
}

export function decodeHistory(payload: Buffer, start: number): TermHistory {
  need(payload, start + 4, 'history');
  const count = payload.readUInt32LE(start);
  need(payload, start + 4 + count * HISTORY_ENTRY_BYTES, 'history');
  const history: TermStart[] = [];
  for (let index = 0; index < count; index++) {
    const offset = start + 4 + index * HISTORY_ENTRY_BYTES;
    const entry = { term: readNumber(payload, offset), startLsn: readNumber(payload, offset + 8) };
    const before = history[index - 1];
    if (before !== undefined && (entry.term <= before.term || entry.startLsn < before.startLsn))
      throw new StrataError('bad-request', `a history goes back at its entry ${index}`);
    history.push(entry);
  }
  if (count === 0) throw new StrataError('bad-request', 'a history has no entry');
  return history;
}

/** A term or an LSN that comes rarely enough to be looked at. */
export function readNumber(payload: Buffer, offset: number): number {
  const value = readLsn(payload, offset);
  if (!Number.isSafeInteger(value)) throw new StrataError('bad-request', `${value} is no term and no LSN`);
  return value;
}

export function need(payload: Buffer, bytes: number, name: string): void {
  if (payload.length < bytes) {
    throw new StrataError('bad-request', `a ${name} frame has ${payload.length} bytes, needs ${bytes}`);
  }
}
