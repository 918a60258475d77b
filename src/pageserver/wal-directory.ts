/**
 * A directory of WAL segment files as a stream of bytes with a known first record.
 *
 * Files are named as Postgres names them (24 hex digits); others are ignored. The stream begins with the first segment and goes on while the
 * next one is there: a gap ends it.
 */

import { open, readdir } from 'node:fs/promises';
import { join } from 'node:path';

import {
  WAL_LONG_HEADER_SIZE,
  WAL_SEGMENT_SIZE,
  advanceLsn,
  formatLsn,
  maxAlign,
  parseWalFileName,
  segmentStart,
} from '../postgres/lsn.ts';
import type { Lsn } from '../postgres/lsn.ts';
import { versionOfWalMagic } from '../postgres/version.ts';
import type { PgVersion } from '../postgres/version.ts';
import { WalError } from '../postgres/wal/error.ts';
import { pageHeaderRemaining } from '../postgres/wal/page-header.ts';

const CHUNK_BYTES = 1024 * 1024;

export interface WalChunk {
  readonly lsn: Lsn;
  /** Never written to again. */
  readonly bytes: Buffer;
}

/** WAL from one position on, as it comes from a directory, a branch or a test. */
export interface WalSource {
  readonly version: PgVersion;
  /** Start of a record. */
  readonly startLsn: Lsn;
  /** The end of what there is, so that progress can be told. */
  readonly endLsn: Lsn;
  readonly chunks: AsyncIterable<WalChunk>;
}

/**
 * Opens a directory. `startLsn` is the start of a record; without it, the first record that begins in the first segment. Throws WalError
 * when there is no WAL of a supported version.
 */
export async function openWalDirectory(directory: string, startLsn?: Lsn): Promise<WalSource> {
  const segments = (await readdir(directory))
    .map((name) => ({ name, position: parseWalFileName(name) }))
    .flatMap(({ name, position }) => (position === undefined ? [] : [{ name, startLsn: position.startLsn }]))
    .sort((a, b) => a.startLsn - b.startLsn)
    .filter((segment) => startLsn === undefined || segment.startLsn >= segmentStart(startLsn));
  const first = segments[0];
  if (first === undefined || (startLsn !== undefined && first.startLsn !== segmentStart(startLsn))) {
    const wanted = startLsn === undefined ? 'no WAL segments' : `no segment that holds ${formatLsn(startLsn)}`;
    throw new WalError(startLsn ?? 0, `${wanted} in ${directory}`);
  }
  let count = 1;
  while (segments[count]?.startLsn === first.startLsn + count * WAL_SEGMENT_SIZE) count++;
  const paths = segments.slice(0, count).map((segment) => join(directory, segment.name));

  const header = await readHeader(paths[0]!);
  const version = header.length < WAL_LONG_HEADER_SIZE ? undefined : versionOfWalMagic(header.readUInt16LE(0));
  if (version === undefined) {
    throw new WalError(first.startLsn, `${paths[0]} does not begin with a WAL page of a supported Postgres`);
  }
  const firstRecord = maxAlign(advanceLsn(first.startLsn + WAL_LONG_HEADER_SIZE, pageHeaderRemaining(header, 0)));
  return {
    version,
    startLsn: startLsn ?? firstRecord,
    endLsn: first.startLsn + count * WAL_SEGMENT_SIZE,
    chunks: readSegments(paths, first.startLsn, startLsn ?? firstRecord),
  };
}

async function readHeader(path: string): Promise<Buffer> {
  const file = await open(path);
  try {
    const bytes = Buffer.alloc(WAL_LONG_HEADER_SIZE);
    const { bytesRead } = await file.read(bytes, 0, bytes.length, 0);
    return bytes.subarray(0, bytesRead);
  } finally {
    await file.close();
  }
}

async function* readSegments(paths: readonly string[], firstLsn: Lsn, startLsn: Lsn): AsyncGenerator<WalChunk> {
  for (let i = 0; i < paths.length; i++) {
    const base = firstLsn + i * WAL_SEGMENT_SIZE;
    if (base + WAL_SEGMENT_SIZE <= startLsn) continue;
    const file = await open(paths[i]!);
    try {
      for (let at = Math.max(startLsn - base, 0); at < WAL_SEGMENT_SIZE;) {
        const bytes = Buffer.allocUnsafe(Math.min(CHUNK_BYTES, WAL_SEGMENT_SIZE - at));
        const { bytesRead } = await file.read(bytes, 0, bytes.length, at);
        if (bytesRead === 0) return;
        yield { lsn: base + at, bytes: bytes.subarray(0, bytesRead) };
        at += bytesRead;
      }
    } finally {
      await file.close();
    }
  }
}
