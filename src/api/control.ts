/**
 * The control plane's seams: what it needs of the world (Storage, Computes) and the file by which the command line finds a
 * running platform (PlatformFile). What it offers to the proxy is in wake.ts; the public HTTP API is Neon's API v2.
 *
 * Ids: projectId `adj-noun-12345678`, branchId `br-…`, endpointId `ep-…`; tenantId and timelineId are 32 lower-case hex digits.
 * Every method may reject with a StrataError; `unavailable` and `timeout` are tried again where that can help.
 */
import type { Lsn } from '../postgres/lsn.ts';
import type { RebuildDamage } from './rebuilt-logs.ts';
import type {
  ChangesPage,
  ChangesRequest,
  ImportableCluster,
  ImportProgress,
  ObjectStoreStatus,
  TimelineSizes,
} from './pageserver.ts';
import type { RunningCompute } from './wake.ts';

/** A place in history: the state of a timeline with every record whose end is at or below `lsn`. */
export interface BranchPoint {
  readonly timelineId: string;
  readonly lsn: Lsn;
}

export interface NewTimeline {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly pgVersion: number;
  readonly ancestor: BranchPoint;
}

export interface NewImport {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly pgVersion: number;
  readonly dataDirectory: string;
}

export interface TimelineStatus {
  /** Where what is kept begins, in the timeline or the ancestors that it inherits from. Every LSN in [oldestLsn, newestLsn] can be read. */
  readonly oldestLsn: Lsn;
  /** The time whose state `oldestLsn` is, when older history is gone; milliseconds since 1970. */
  readonly oldestTimeMs?: number;
  /** The last LSN that the pageserver has ingested. */
  readonly newestLsn: Lsn;
  /** Bytes of all databases at the head; absent when not known without work. */
  readonly logicalSizeBytes?: number;
}

/** Safekeepers and pageserver as the control plane sees them. */
export interface Storage {
  /** The fresh cluster of that Postgres version that new projects branch from; made on the first call (slow), then immediate. */
  ensureTemplate(pgVersion: number): Promise<BranchPoint>;
  /** Durable when it resolves. Repeatable: a timeline that exists with the same ancestor is success. */
  createTimeline(timeline: NewTimeline): Promise<void>;
  /** What a data directory holds. `bad-request`, with the reason and the next step, when it cannot be imported. */
  inspectImport(dataDirectory: string): Promise<ImportableCluster>;
  /** A timeline without ancestor, from a stopped cluster's data directory. Durable when it resolves, with where its history begins; takes its time. */
  importTimeline(timeline: NewImport): Promise<Lsn>;
  /** Has importTimeline fail, when it runs. */
  cancelImport(timelineId: string): Promise<void>;
  /** Undefined when the timeline is not being imported. */
  importProgress(timelineId: string): Promise<ImportProgress | undefined>;
  /** Repeatable: a timeline that does not exist is success. Rejects with `conflict` when it has children. */
  deleteTimeline(tenantId: string, timelineId: string): Promise<void>;
  /** An LSN at or past every commit acknowledged before the call, which the pageserver has ingested. */
  headLsn(timelineId: string): Promise<Lsn>;
  /** The end of the last whole record at or below `lsn`. The caller has checked that `lsn` is in the timeline's range. */
  resolveLsn(timelineId: string, lsn: Lsn): Promise<Lsn>;
  /**
   * The LSN of the state of a time, over what is ingested: every commit that was acknowledged by then and none that is later. Microseconds since 1970,
   * as commit records carry them. It may lie in an ancestor. `history-gone`, naming what there is, when that state is no longer kept.
   */
  lsnForTimestamp(timelineId: string, timestampUs: number): Promise<Lsn>;
  /** When the latest commit of the state at `lsn` was made, ancestors' included; undefined when none is known. Microseconds since 1970. */
  timestampOfLsn(timelineId: string, lsn: Lsn): Promise<number | undefined>;
  status(timelineId: string): Promise<TimelineStatus>;
  /** What each of these timelines takes; those that storage does not have are left out. */
  sizes(timelineIds: readonly string[]): Promise<readonly TimelineSizes[]>;
  /** How uploads to the object store are doing; undefined when there is none. */
  objectStore(): Promise<ObjectStoreStatus | undefined>;
  /** A page of what changed in a window that is ingested. `history-gone` when one of its LSNs is no longer kept. */
  changes(request: ChangesRequest): Promise<ChangesPage>;
  /** The end of the last commit in the state at `lsn`; `lsn` itself when there is none near. */
  lastCommitLsn(timelineId: string, lsn: Lsn): Promise<Lsn>;
  /** Where the histories of two timelines, each up to its LSN, part. */
  commonLsn(a: BranchPoint, b: BranchPoint): Promise<Lsn>;
  /** Frees now what of a project's history nobody can read any more; `unavailable` for a while after a start. */
  collectGarbage(tenantId: string): Promise<void>;
  /** How long the history of all branches of a project is kept. Windows that storage does not offer become the nearest that it does. */
  setRetention(tenantId: string, retentionSeconds: number): Promise<void>;
}

export interface RoleSpec {
  readonly name: string;
  /** `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, as pg_authid holds it. */
  readonly scramVerifier: string;
}

export interface DatabaseSpec {
  readonly name: string;
  readonly ownerName: string;
}

/** Roles and databases that must exist inside the cluster. Never a list of all that may exist: users make more with SQL. */
export interface CatalogSpec {
  readonly roles: readonly RoleSpec[];
  readonly databases: readonly DatabaseSpec[];
}

export interface ComputeSpec {
  readonly endpointId: string;
  readonly projectId: string;
  readonly branchId: string;
  readonly tenantId: string;
  readonly timelineId: string;
  readonly pgVersion: number;
  /**
   * Present when the cluster may lack it: create the roles (owner's rights, never superuser) or set their verifiers, create the databases
   * that do not exist. To be done before `start` resolves. Absent: the cluster has it already, nothing to do.
   */
  readonly catalog?: CatalogSpec;
  /**
   * Present, with `catalog`, when the cluster was made elsewhere and may still be as it was there: the platform's role, owners' rights and ownership are to be set
   * right, and every superuser but the platform's is to cease to be one.
   */
  readonly adoption?: { readonly ownerName: string };
}

/** What was found in a cluster that was made elsewhere. */
export interface AdoptionReport {
  /** All but templates, the one to be taken for the default first. */
  readonly databaseNames: readonly string[];
  /** What is not as it was there, for people. */
  readonly notes: readonly string[];
}

export interface StartedCompute extends RunningCompute {
  /** Present when it was asked for. */
  readonly adoption?: AdoptionReport;
}

/** What a compute is doing at one moment, for the decision to suspend it. */
export interface ActivitySample {
  /** Clients' backends that run a query or have a transaction open (the platform's own connections aside). */
  readonly busyBackendCount: number;
  /** Replication connections other than the proposer's. */
  readonly walsenderCount: number;
  /** Enabled subscriptions with a live worker. */
  readonly activeSubscriptionCount: number;
  readonly autovacuumWorkerCount: number;
  /** The newest state change of any client's backend, connected or gone, in milliseconds since 1970; absent when there was none since the start. */
  readonly lastActivityMs?: number;
}

export type ComputeExitListener = (endpointId: string, reason: string) => void;

/** The computes of this host. Calls for one endpoint come one at a time; different endpoints' calls overlap. */
export interface Computes {
  /** Resolves when the compute accepts connections and the catalog is applied. Starting a running compute is success. */
  start(spec: ComputeSpec): Promise<StartedCompute>;
  /** Undefined when the compute is not running, still starting or already stopping. */
  running(endpointId: string): RunningCompute | undefined;
  /** Clean shutdown, cache kept. Not running is success. */
  suspend(endpointId: string): Promise<void>;
  /** Stops at once. `forget` also removes the endpoint's directory. Not running, or never seen, is success. */
  kill(endpointId: string, forget: boolean): Promise<void>;
  /** Applies roles' verifiers and new databases to a running compute. */
  applyCatalog(endpointId: string, catalog: CatalogSpec): Promise<void>;
  activity(endpointId: string): Promise<ActivitySample>;
  /** Called when a compute stops without having been asked to. */
  onExit(listener: ComputeExitListener): void;
}

/** Who keeps the WAL, and how far they are. */
export interface SafekeeperListing {
  /** Of the membership configuration. */
  readonly version: number;
  readonly safekeepers: readonly {
    readonly id: number;
    readonly address: string;
    readonly state: 'up' | 'down';
    readonly role: 'member' | 'joining' | 'leaving';
    readonly timelineCount: number;
    /** Timelines of which it has less than another, or nothing. */
    readonly behindCount: number;
    readonly behindBytes: number;
  }[];
  /** The change under way. */
  readonly change?: {
    readonly members: readonly number[];
    readonly movedTimelines: number;
    /** 0: not known yet. */
    readonly timelineCount: number;
    /** Why it does not go on. */
    readonly lastError?: string;
  };
}

export type SafekeeperChange =
  | { readonly kind: 'add'; readonly count: number }
  | { readonly kind: 'remove'; readonly ids: readonly number[] }
  /** Each by a new one. */
  | { readonly kind: 'replace'; readonly ids: readonly number[] };

/** What was done, or would be, about logs that are lost with safekeepers that are given up. */
export interface SafekeeperRebuild {
  readonly isDone: boolean;
  readonly logs: readonly {
    readonly timelineId: string;
    /** Everything before it is kept. */
    readonly keptLsn: Lsn;
    /** When the last commit that is kept was made, where that is known. */
    readonly lastCommitMs: number | undefined;
    /** The highest LSN that was acknowledged, as the pageserver was told, or may have been, as the safekeepers say that are there: what is not kept up to there is lost. */
    readonly heardLsn: Lsn | undefined;
    /** Who has most of it. */
    readonly source: string;
    /** Who is given the log. */
    readonly safekeepers: readonly number[];
    /** What was found damaged, and what is done about it. */
    readonly damage?: readonly RebuildDamage[];
  }[];
  /** Nothing is done about these, for now. */
  readonly failed: readonly { readonly timelineId: string; readonly reason: string }[];
}

export interface SafekeeperAdmin {
  list(): Promise<SafekeeperListing>;
  /** Begins a change and returns the ids of the members after it. Throws `conflict` when another is under way, `bad-request`. */
  change(change: SafekeeperChange): Promise<readonly number[]>;
  /** Back to the members before the change under way. Throws `conflict` when there is none. */
  cancel(): Promise<void>;
  /**
   * Gives up those safekeepers, which do not answer, perhaps none, and makes the logs anew that a majority has lost, with them or before. Unless `acceptsLoss` it only says what would be
   * done. Throws `bad-request`, `conflict` when they are there or nothing is lost, `unavailable` when others are silent too.
   */
  rebuild(ids: readonly number[], acceptsLoss: boolean): Promise<SafekeeperRebuild>;
}

/** `<data-dir>/platform.json`, written when the platform is ready and removed when it stops. */
export interface PlatformFile {
  readonly pid: number;
  readonly host: string;
  readonly httpPort: number;
  readonly pgPort: number;
  /** Where the platform's services listen, for those who have its secret. */
  readonly pageserver: { readonly host: string; readonly port: number };
  readonly safekeepers: readonly { readonly id?: number; readonly host: string; readonly port: number }[];
  /** Its URL, which has no secrets; absent when there is none. */
  readonly objectStore?: string;
  /** How much WAL of one branch may wait on safekeepers' disks; absent: the default (api/backpressure-limits.ts). */
  readonly walLimitBytes?: number;
  /** The Postgres binaries that computes are started from, one for each major. */
  readonly installations: readonly {
    readonly binDir: string;
    readonly pgVersion: number;
    readonly fullVersion: string;
  }[];
  /** Milliseconds since 1970. */
  readonly startedAtMs: number;
  readonly version: string;
}

/** How long an endpoint is idle before it suspends, where nobody says otherwise. */
export const DEFAULT_SUSPEND_TIMEOUT_SECONDS = 300;

export const PLATFORM_FILE_NAME = 'platform.json';
export const API_KEY_FILE_NAME = 'api-key';
