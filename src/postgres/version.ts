/**
 * What differs between the major versions of Postgres that Strata runs: 15, 16, 17 and 18. One table; code that replays or forges
 * asks it, so that a new major is one more row and whatever the row cannot say.
 */

export type PgVersion = 15 | 16 | 17 | 18;

export const PG_VERSIONS: readonly PgVersion[] = [15, 16, 17, 18];

export interface VersionFacts {
  readonly version: PgVersion;
  /** xlp_magic of every WAL page (XLOG_PAGE_MAGIC). */
  readonly walPageMagic: number;
  /** pg_control_version in the control file. */
  readonly controlVersion: number;
  /** catalog_version_no in the control file, and part of a tablespace's directory name. */
  readonly catalogVersion: number;
  /** Hex digits of a file name in pg_twophase: 8 (the xid) until 16, 16 (the full xid: epoch and xid) from 17. */
  readonly twoPhaseNameDigits: 8 | 16;
  readonly redo: RedoLayout;
}

/** Record layouts that changed between majors, which the bytes of a record do not tell by themselves. */
export interface RedoLayout {
  /** From 16: heap freeze records carry plans, each for many tuples; in 15 one entry of 12 bytes for each tuple. */
  readonly freezePlans: boolean;
  /** From 17: one record prunes, freezes and vacuums a heap page (heap2 0x10, 0x20, 0x30); before, three kinds of records. */
  readonly pruneFreezeCombined: boolean;
  /** From 16: records that may conflict with a standby's snapshots say whether the relation is a catalog (isCatalogRel). */
  readonly isCatalogRel: boolean;
  /** From 18: heap inplace records carry invalidation messages (xl_heap_inplace is longer). */
  readonly inplaceInvalidations: boolean;
  /** Page numbers in clog, commit_ts and multixact records: 4 bytes until 16, 8 from 17. */
  readonly slruPageNumberBytes: 4 | 8;
  /** Entries of dropped statistics in commit records: 12 bytes until 17, 16 from 18 (object ids grew to 64 bits). */
  readonly statsItemBytes: 12 | 16;
  /** From 17: an XLOG_CHECKPOINT_REDO record marks the redo point of an online checkpoint. */
  readonly checkpointRedo: boolean;
}

const FACTS: Record<PgVersion, VersionFacts> = {
  15: {
    version: 15,
    walPageMagic: 0xd110,
    controlVersion: 1300,
    catalogVersion: 202209061,
    twoPhaseNameDigits: 8,
    redo: {
      freezePlans: false,
      pruneFreezeCombined: false,
      isCatalogRel: false,
      inplaceInvalidations: false,
      slruPageNumberBytes: 4,
      statsItemBytes: 12,
      checkpointRedo: false,
    },
  },
  16: {
    version: 16,
    walPageMagic: 0xd113,
    controlVersion: 1300,
    catalogVersion: 202307071,
    twoPhaseNameDigits: 8,
    redo: {
      freezePlans: true,
      pruneFreezeCombined: false,
      isCatalogRel: true,
      inplaceInvalidations: false,
      slruPageNumberBytes: 4,
      statsItemBytes: 12,
      checkpointRedo: false,
    },
  },
  17: {
    version: 17,
    walPageMagic: 0xd116,
    controlVersion: 1700,
    catalogVersion: 202406281,
    twoPhaseNameDigits: 16,
    redo: {
      freezePlans: true,
      pruneFreezeCombined: true,
      isCatalogRel: true,
      inplaceInvalidations: false,
      slruPageNumberBytes: 8,
      statsItemBytes: 12,
      checkpointRedo: true,
    },
  },
  18: {
    version: 18,
    walPageMagic: 0xd118,
    controlVersion: 1800,
    catalogVersion: 202506291,
    twoPhaseNameDigits: 16,
    redo: {
      freezePlans: true,
      pruneFreezeCombined: true,
      isCatalogRel: true,
      inplaceInvalidations: true,
      slruPageNumberBytes: 8,
      statsItemBytes: 16,
      checkpointRedo: true,
    },
  },
};

export function versionFacts(version: PgVersion): VersionFacts {
  return FACTS[version];
}

/** Narrows a number to a supported major; throws a RangeError that names it. */
export function toPgVersion(major: number): PgVersion {
  for (const version of PG_VERSIONS) if (version === major) return version;
  throw new RangeError(`Postgres ${major} is not supported; supported: ${PG_VERSIONS.join(', ')}`);
}

/** The major whose WAL pages carry this magic, if it is one of ours. */
export function versionOfWalMagic(magic: number): PgVersion | undefined {
  return PG_VERSIONS.find((version) => FACTS[version].walPageMagic === magic);
}

/** The major whose clusters carry this catalog version, if it is one of ours. */
export function versionOfCatalog(catalogVersion: number): PgVersion | undefined {
  return PG_VERSIONS.find((version) => FACTS[version].catalogVersion === catalogVersion);
}

/** Name of a prepared transaction's file in pg_twophase. Until 16 only the xid is in it, from 17 the epoch too. */
export function twoPhaseFileName(version: PgVersion, epoch: number, xid: number): string {
  const low = xid.toString(16).toUpperCase().padStart(8, '0');
  return FACTS[version].twoPhaseNameDigits === 8 ? low : epoch.toString(16).toUpperCase().padStart(8, '0') + low;
}
