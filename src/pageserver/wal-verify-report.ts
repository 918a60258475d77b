/** What a verification of redo found (wal-verify.ts), by type of record. */
import type { Lsn } from '../postgres/lsn.ts';
import type { PgVersion } from '../postgres/version.ts';
import type { WalBlock } from '../postgres/wal/record.ts';

/** The first difference of a record type. */
export interface Mismatch {
  /** Where the record starts. */
  readonly lsn: Lsn;
  /** Absent when it is not a page that cannot be made, but what the record implies for others. */
  readonly block?: Pick<WalBlock, 'id' | 'spc' | 'db' | 'rel' | 'fork' | 'blk'>;
  /** What could not be done; or how the page differs. */
  readonly reason: string;
  /** Offset in the page of the first byte that differs, and some bytes from there on in hex; absent when redo failed. */
  readonly offset?: number;
  readonly expected?: string;
  readonly found?: string;
}

export interface TypeReport {
  readonly rmgr: string;
  readonly type: string;
  records: number;
  /** Pages compared with their images. */
  compared: number;
  /** Pages restored from an image that is to be applied. */
  restored: number;
  /** Pages met first without such an image, which took the expected one. */
  trusted: number;
  /** Pages for which the record has no image: replayed where the page was known, else still unknown. */
  unchecked: number;
  /** Records that are refused on principle: of extensions that are not known, of tablespaces. */
  refused: number;
  /** Pages that differ from their image, or that redo could not make. */
  mismatches: number;
  firstMismatch: Mismatch | undefined;
}

export interface VerifyReport {
  readonly version: PgVersion;
  readonly startLsn: Lsn;
  /** End of the last record replayed. */
  readonly endLsn: Lsn;
  /** Why the bytes after endLsn are no record. Undefined when the bytes just end there, or at the LSN that was asked for. */
  readonly stoppedBy: string | undefined;
  /** Where WAL goes on after endLsn: then what stopped verification is damage, or a missing segment, and not the end of WAL. */
  readonly resumesAtLsn: Lsn | undefined;
  readonly records: number;
  readonly compared: number;
  readonly restored: number;
  readonly trusted: number;
  readonly unchecked: number;
  readonly refused: number;
  readonly mismatches: number;
  /** By resource manager and record type, in order of first appearance. */
  readonly types: readonly TypeReport[];
  /** Visibility-map bits that we have and the primary had not, and that no record cleared. They are mismatches too. */
  readonly visibilityBitsLeft: number;
}

export function newType(rmgr: string, type: string): TypeReport {
  const counts = { records: 0, compared: 0, restored: 0, trusted: 0, unchecked: 0, refused: 0, mismatches: 0 };
  return { rmgr, type, ...counts, firstMismatch: undefined };
}

/** Some types have more than one value of info: they are one line in the report. */
export function addType(to: TypeReport, from: TypeReport): void {
  to.records += from.records;
  to.compared += from.compared;
  to.restored += from.restored;
  to.trusted += from.trusted;
  to.unchecked += from.unchecked;
  to.refused += from.refused;
  to.mismatches += from.mismatches;
  to.firstMismatch ??= from.firstMismatch;
}
